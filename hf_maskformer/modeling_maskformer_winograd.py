"""3 x 3 convolution on a CPU with a quarter of the multiplications (Winograd, arXiv 1509.09308).

A tile of 4 x 4 outputs depends on 6 x 6 inputs. Transformed to values at 6 x 6 points, inputs and kernel are multiplied
elementwise, 36 products where the definition has 144. Over channels and tiles that makes 36 matrix products, which are
computed as one grouped 1 x 1 convolution: on an AMD Zen 5 torch's convolutions are twice as fast as its matrix
products, on a Zen 4 as fast. float32 loses about two bits on the way. Gradients are computed likewise.

Other convolutions are left to torch.

Letters: B images, C input and O output channels, T tiles, h x w feature map.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .modeling_maskformer_dispatch import is_plain, is_transformed, register_operator

TILE, KERNEL = 4, 3
PATCH = TILE + KERNEL - 1
# Five points and infinity; 0, 1, -1 and a pair of different magnitude and sign keep the rounding errors small.
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
# At 1 in both directions, where each output has weight 1: what is added to that product is added to all outputs.
POINT_OF_BIAS = PATCH * POINTS.index(1.0) + POINTS.index(1.0)
# For narrower or smaller maps the transforms, also of the kernel unless it is cached, cost what the products save.
MIN_CHANNELS, MIN_TILES, MIN_TILES_OF_CACHED = 192, 128, 64
# A transformed kernel is four times as large: for more channels, 9 MB for these, that is not worth the memory.
MAX_CHANNELS_OF_CACHED = 256
# Tiles at a time: enough for the matrix products, few enough for the cache. The gradient of the kernel sums over tiles
# and writes its sum once per chunk.
TILES_AT_ONCE, TILES_AT_ONCE_FOR_KERNEL = 160, 256
# Stride, padding and dilation of the convolutions that can be computed this way.
WINOGRAD_GEOMETRY = ((1, 1), (1, 1), (1, 1))
# Padding, stride, dilation and groups of the convolution that computes the elementwise products.
GROUPED = ([0, 0], [1, 1], [1, 1], PATCH**2)


def convolve(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
) -> Tensor:
    """`torch.nn.functional.conv2d`, by the algorithm that is fast for these arguments."""
    if (stride, padding, dilation) == WINOGRAD_GEOMETRY and winograd_pays(states, weight):
        return WinogradConvolution.apply(states, weight, bias)
    return F.conv2d(states, weight, bias, stride, padding, dilation)


def winograd_pays(states: Tensor, weight: Tensor) -> bool:
    """Whether Winograd is faster, for a convolution of the geometry that it needs."""
    if not is_plain(states, weight) or not is_wide(weight) or is_transformed():
        return False
    # One compiled graph serves all sizes: there the operator checks them.
    return torch.compiler.is_compiling() or has_tiles(states, MIN_TILES)


def cached_winograd_pays(states: Tensor, weight: Tensor) -> bool:
    """Whether it is faster at inference with a cached transformed kernel."""
    is_small = weight.shape[:2].numel() <= MAX_CHANNELS_OF_CACHED**2
    return is_small and is_wide(weight) and has_tiles(states, MIN_TILES_OF_CACHED)


def is_wide(weight: Tensor) -> bool:
    return tuple(weight.shape[2:]) == (KERNEL, KERNEL) and min(weight.shape[:2]) >= MIN_CHANNELS


def has_tiles(states: Tensor, count: int) -> bool:
    return len(states) > 0 and -(-states.shape[2] // TILE) * -(-states.shape[3] // TILE) >= count


class WinogradConvolution(torch.autograd.Function):
    """Convolution with stride 1 and zero padding 1, and its gradients.

    Takes (B, C, h, w), weight (O, C, 3, 3) and bias (O,) or None; returns (B, O, h, w).
    """

    @staticmethod
    def forward(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolution(states, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        states, weight, bias = inputs
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for gradients of gradients
            geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            sizes = [len(weight)] if ctx.has_bias else None
            return torch.ops.aten.convolution_backward(gradient, states, weight, sizes, *geometry, list(needed))
        turned = weight.flip(2, 3).transpose(0, 1)
        return (
            _convolution(gradient, turned, None) if needed[0] else None,
            _kernel_gradient(states, gradient) if needed[1] else None,
            gradient.sum((0, 2, 3)) if needed[2] else None,
        )


def _convolution(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.hf_maskformer.convolve_3x3(states, weight, bias)
    return winograd(states, transformed_kernel(weight), bias)


def _kernel_gradient(states: Tensor, gradient: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.hf_maskformer.convolve_3x3_kernel_gradient(states, gradient)
    return winograd_kernel_gradient(states, gradient)


def winograd(states: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Takes (B, C, h, w), a kernel from `transformed_kernel` and bias (O,); returns channels_last (B, O, h, w)."""
    batch_size, _, height, width = states.shape
    out_channels = len(kernel) // PATCH**2
    num_rows, num_columns = -(-height // TILE), -(-width // TILE)
    output = states.new_empty(batch_size, num_rows, TILE, num_columns, TILE, out_channels)
    for image, output_of_image in zip(states.permute(0, 2, 3, 1), output, strict=True):
        for top, bottom, values in _inputs_in_strips(image, TILES_AT_ONCE):
            tiles = _outputs(values, kernel, bias, out_channels).view(-1, num_columns, TILE, TILE, out_channels)
            output_of_image[top // TILE : -(-bottom // TILE)] = tiles.permute(0, 2, 1, 3, 4)
    output = output.view(batch_size, num_rows * TILE, num_columns * TILE, out_channels)
    return output[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def transformed_kernel(weight: Tensor) -> Tensor:
    """Takes (O, C, 3, 3); returns it transformed, in oneDNN's layout, four times as large."""
    in_channels = weight.shape[1]
    kernel = transforms()[1].to(weight.dtype) @ weight.permute(2, 3, 0, 1).reshape(KERNEL**2, -1)
    sizes = [1, PATCH**2 * in_channels, TILES_AT_ONCE, 1]
    return torch.ops.mkldnn._reorder_convolution_weight(kernel.view(-1, in_channels, 1, 1), *GROUPED, sizes)


def _outputs(values: Tensor, kernel: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    """Takes transformed inputs (T, 36, C); returns outputs (T, 16, O)."""
    # One image of one column of tiles, with all points and channels of a tile contiguous.
    column = values.view(1, len(values), 1, -1).permute(0, 3, 1, 2)
    products = torch.ops.mkldnn._convolution_pointwise(column, kernel, None, *GROUPED, "none", [], "")
    products = products.permute(0, 2, 3, 1).view(-1, PATCH**2, out_channels)
    if bias is not None:
        products[:, POINT_OF_BIAS] += bias
    return transforms()[0].to(values.dtype) @ products


def winograd_kernel_gradient(states: Tensor, gradient: Tensor) -> Tensor:
    """Takes inputs (B, C, h, w) and the gradient of outputs (B, O, h, w); returns that of the kernel (O, C, 3, 3)."""
    of_outputs, of_kernel, _ = (matrix.to(states.dtype) for matrix in transforms())
    in_channels, out_channels = states.shape[1], gradient.shape[1]
    width = states.shape[3]
    num_columns = -(-width // TILE)
    products = states.new_zeros(PATCH**2, in_channels, out_channels)
    for image, of_image in zip(states.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), strict=True):
        for top, bottom, values in _inputs_in_strips(image, TILES_AT_ONCE_FOR_KERNEL):
            missing = (0, 0, 0, num_columns * TILE - width, 0, -(bottom - top) % TILE)
            tiles = F.pad(of_image[top:bottom], missing).view(-1, TILE, num_columns, TILE, out_channels)
            tiles = tiles.permute(0, 2, 1, 3, 4).reshape(-1, TILE**2, out_channels)
            products.baddbmm_(values.permute(1, 2, 0), (of_outputs.T @ tiles).transpose(0, 1))
    kernel = (of_kernel.T @ products.flatten(1)).view(KERNEL, KERNEL, in_channels, out_channels)
    return kernel.permute(3, 2, 0, 1).contiguous()


def _inputs_in_strips(image: Tensor, tiles_at_once: int) -> Iterator[tuple[int, int, Tensor]]:
    """The transformed inputs of an image (h, w, C), a few rows of tiles at a time.

    Yields the first row of outputs, the one after the last, and the values (T, 36, C).
    """
    height, width, _ = image.shape
    num_columns = -(-width // TILE)
    rows_at_once = TILE * max(1, round(tiles_at_once / num_columns))
    for top in range(0, height, rows_at_once):
        bottom = min(top + rows_at_once, height)
        # What the tiles read, also beyond the image.
        first, last = top - 1, top + -(-(bottom - top) // TILE) * TILE + 1
        missing = (max(-first, 0), max(last - height, 0))
        sides = (1, num_columns * TILE + 1 - width)
        yield top, bottom, _at_points(F.pad(image[max(first, 0) : last], (0, 0, *sides, *missing)))


def _at_points(strip: Tensor) -> Tensor:
    """Takes all that some rows of tiles read (4 * rows + 2, 4 * columns + 2, C); returns values (T, 36, C)."""
    matrix, channels = transforms()[2].to(strip.dtype), strip.shape[-1]
    # Rows first, then columns. The first product reads the strip without a copy.
    rows = strip.flatten(1).unfold(0, PATCH, TILE).mT  # (rows of tiles, 6, columns * C)
    rows = torch.bmm(matrix.expand(len(rows), -1, -1), rows).unflatten(2, (-1, channels))
    columns = rows.unfold(2, PATCH, TILE).permute(0, 2, 1, 4, 3).reshape(-1, PATCH, channels)
    return torch.bmm(matrix.expand(len(columns), -1, -1), columns).view(-1, PATCH**2, channels)


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """The matrices for outputs (16, 36), kernel (36, 9) and rows or columns of inputs (6, 6), float64.

    Polynomial multiplication: evaluate both factors at the points, multiply, interpolate the product. Correlation,
    which neural networks call convolution, is the transpose of that in one factor.
    """
    outputs, kernel, inputs = powers(TILE).T, powers(KERNEL), torch.linalg.inv(powers(PATCH)).T
    # Rows first, then columns: together the Kronecker product. For the inputs, which are the most, separately.
    return torch.kron(outputs.contiguous(), outputs.contiguous()), torch.kron(kernel, kernel), inputs.contiguous()


def powers(count: int) -> Tensor:
    """(6, count): the powers 0 to count - 1 of each point; at infinity only the highest counts."""
    rows = [[point**exponent for exponent in range(count)] for point in POINTS]
    # Whatever the default device is at the first call: `transforms` caches them.
    return torch.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=torch.float64, device="cpu")


def convolve_3x3(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiled graph calls: the compiler neither unrolls the loops nor specialises on the size."""
    if has_tiles(states, MIN_TILES):
        return winograd(states, transformed_kernel(weight), bias)
    return F.conv2d(states, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def convolve_3x3_kernel_gradient(states: Tensor, gradient: Tensor) -> Tensor:
    if has_tiles(states, MIN_TILES):
        return winograd_kernel_gradient(states, gradient)
    shape = (gradient.shape[1], states.shape[1], KERNEL, KERNEL)
    return conv2d_weight(states, shape, gradient, padding=1).contiguous()


def _output_of_convolution(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch_size, _, height, width = states.shape
    return states.new_empty(batch_size, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def _output_of_kernel_gradient(states: Tensor, gradient: Tensor) -> Tensor:
    return states.new_empty(gradient.shape[1], states.shape[1], KERNEL, KERNEL)


register_operator(
    "convolve_3x3(Tensor states, Tensor weight, Tensor? bias) -> Tensor", convolve_3x3, _output_of_convolution
)
register_operator(
    "convolve_3x3_kernel_gradient(Tensor states, Tensor gradient) -> Tensor",
    convolve_3x3_kernel_gradient,
    _output_of_kernel_gradient,
)
