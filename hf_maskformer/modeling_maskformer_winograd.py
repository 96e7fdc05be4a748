"""3 x 3 convolution at inference on a CPU with a quarter of the multiplications (Winograd's way, arXiv 1509.09308).

A tile of 4 x 4 outputs depends on 6 x 6 inputs. Both are evaluations of polynomials: taken at 6 x 6 points, inputs and
kernel are multiplied point by point, 36 products where the definition has 144. Over channels and tiles that makes 36
matrix products. float32 loses one bit on the way.

Letters: C input and O output channels, T tiles, h x w feature map.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, KERNEL = 4, 3
PATCH = TILE + KERNEL - 1
# Five points and infinity; 0, 1, -1 and a pair of other size and sign keep the rounding errors small.
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
# Of narrower or smaller maps the transforms cost what the products save.
MIN_CHANNELS, MIN_TILES = 96, 100
# Tiles at a time: enough for the matrix products, few enough for the cache.
TILES_AT_ONCE = 160


def convolve(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
) -> Tensor:
    """`torch.nn.functional.conv2d`, in the way that is fast for what is given."""
    if stride == padding == dilation == (1, 1) and winograd_pays(states, weight):
        return winograd(states, weight, bias)
    return F.conv2d(states, weight, bias, stride, padding, dilation)


def winograd_pays(states: Tensor, weight: Tensor) -> bool:
    # GPU libraries have it inside, compilers fuse and exported graphs are read by others: they get the plain operator.
    if torch.is_grad_enabled() or is_traced():
        return False
    if states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if type(weight) not in (Tensor, torch.nn.Parameter):  # quantised or sharded
        return False
    if not states.dtype == weight.dtype == torch.float32 or tuple(weight.shape[2:]) != (KERNEL, KERNEL):
        return False
    num_tiles = -(-states.shape[2] // TILE) * -(-states.shape[3] // TILE)
    return len(states) > 0 and min(weight.shape[:2]) >= MIN_CHANNELS and num_tiles >= MIN_TILES


def is_traced() -> bool:
    """Whether a graph is being recorded, in which loops over parts of a map would be unrolled for one size."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def winograd(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution with stride 1 and one pixel of zeros around.

    Takes (B, C, h, w), weight (O, C, 3, 3) and bias (O,); gives (B, O, h, w) in channels_last layout.
    """
    of_outputs, of_kernel, of_inputs = (matrix.to(states.dtype) for matrix in transforms())
    out_channels, in_channels = weight.shape[:2]
    kernel = (of_kernel @ weight.permute(2, 3, 1, 0).reshape(KERNEL**2, -1)).view(-1, in_channels, out_channels)
    batch_size, _, height, width = states.shape
    output = None
    for index, image in enumerate(states.permute(0, 2, 3, 1)):
        top = 0
        for strip in _convolve_in_strips(image, kernel, of_inputs, of_outputs):
            if output is None:  # made of a strip so that it is batched if one of the inputs is (`torch.vmap`)
                output = strip.new_empty(batch_size, height, width, out_channels)
            output[index, top : top + len(strip)] = strip if bias is None else strip.add_(bias)
            top += len(strip)
    assert output is not None
    return output.permute(0, 3, 1, 2)


def _convolve_in_strips(image: Tensor, kernel: Tensor, of_inputs: Tensor, of_outputs: Tensor) -> Iterator[Tensor]:
    """(h, w, C) to (h, w, O), a few rows of tiles at a time."""
    height, width, _ = image.shape
    num_columns = -(-width // TILE)
    rows_at_once = TILE * max(1, round(TILES_AT_ONCE / num_columns))
    for top in range(0, height, rows_at_once):
        bottom = min(top + rows_at_once, height)
        num_rows = -(-(bottom - top) // TILE)
        first, last = top - 1, top + num_rows * TILE + 1  # what the tiles read, beyond the image too
        missing = (max(-first, 0), max(last - height, 0))
        strip = F.pad(image[max(first, 0) : last], (0, 0, 1, num_columns * TILE + 1 - width, *missing))
        patches = strip.unfold(0, PATCH, TILE).unfold(1, PATCH, TILE)  # (rows, columns, C, 6, 6)
        patches = patches.permute(3, 4, 0, 1, 2).reshape(PATCH**2, -1)
        products = torch.bmm((of_inputs @ patches).view(PATCH**2, num_rows * num_columns, -1), kernel)
        tiles = (of_outputs @ products.flatten(1)).view(TILE, TILE, num_rows, num_columns, -1)
        strip = tiles.permute(2, 0, 3, 1, 4).reshape(num_rows * TILE, num_columns * TILE, -1)
        yield strip[: bottom - top, :width]


@cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """The matrices for outputs (16, 36), kernel (36, 9) and inputs (36, 36), float64.

    Multiplying polynomials: both factors at the points, the values multiplied, the product from its values.
    Correlation, which neural networks call convolution, is the transpose of that in one factor.
    """
    outputs, kernel, inputs = powers(TILE).T, powers(KERNEL), torch.linalg.inv(powers(PATCH)).T
    # Rows first, then columns: together the Kronecker product.
    return tuple(torch.kron(matrix.contiguous(), matrix.contiguous()) for matrix in (outputs, kernel, inputs))  # type: ignore[return-value]


def powers(count: int) -> Tensor:
    """(6, count): the powers 0 to count - 1 of each point; at infinity the highest counts alone."""
    rows = [[point**exponent for exponent in range(count)] for point in POINTS]
    # Whatever the default device is at the first call: `transforms` keeps them.
    return torch.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=torch.float64, device="cpu")
