"""How a Swin partitions feature maps into windows and merges them again.

Letters: B images, h x w feature map of the stage, C its channels, W windows in one image, N = window x window
positions in a window.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_maskformer_dispatch import is_exporting, is_for_any_size, is_traced, is_transformed, register_operator

# Added to the attention scores of positions that the cyclic shift made neighbours; the paper's code uses -100 too.
MASK_VALUE = -100.0

# Pairs of positions in the windows of a map, up to which they are cached: 64 MB.
MAX_CACHED_PAIRS = 2**24


class WindowGrid:
    """The windows of a feature map of one size: which position goes where.

    Padding, cyclic shift and window partition are one rearrangement of positions, and so one copy each way.

    Args:
        size: (h, w) of the feature map.
        window_size: Side of a window.
        shift: By how much the windows are moved down and to the right.
        device: Of the feature maps.
        in_graph: Whether a graph is being recorded, which does not separate windows that the shift cuts from others:
            that would fix in it that there are others.
        with_mask: Whether the attention mask is needed, which is most of the work.

    Attributes:
        attention_mask: (W, N, N), what is added to the scores of positions that a shift brought together, and 0 for
            others; None without a shift.
        num_whole_windows: How many windows, the first ones, are known not to be cut by the shift.
    """

    def __init__(
        self,
        size: Sequence[int],
        window_size: int,
        shift: int,
        device: torch.device,
        in_graph: bool = False,
        with_mask: bool = True,
    ) -> None:
        self.height, self.width = size
        self.window_size = window_size
        # In whole windows, of which all later sizes are products: with remainders, those of a model that is exported
        # for any size grow into expressions that take minutes.
        num_rows, num_columns = (count_parts(length, window_size) for length in size)
        self.num_windows = num_rows * num_columns
        self.num_positions = window_size**2
        self.padded_size = (num_rows * window_size, num_columns * window_size)
        positions = torch.arange(self.padded_size[0] * self.padded_size[1], device=device)
        shifted = positions.view(self.padded_size).roll((-shift, -shift), dims=(0, 1))
        cut_into_windows = windows_by_rows if in_graph else windows_cut_last
        self.order = cut_into_windows(shifted, window_size).flatten()
        self.inverse = torch.empty_like(self.order).scatter_(0, self.order, positions)
        self.num_whole_windows, self.attention_mask = self.num_windows, None
        if shift:
            self.num_whole_windows = 0 if in_graph else (num_rows - 1) * (num_columns - 1)
        if shift and with_mask:
            regions = cut_into_windows(shift_regions(self.padded_size, window_size, shift, device), window_size)
            # 0 between positions that were neighbours before the cyclic shift.
            self.attention_mask = (regions[:, :, None] != regions[:, None, :]).float() * MASK_VALUE

    def to_windows(self, states: Tensor) -> Tensor:
        """(B, h, w, C) to (B W, N, C)."""
        states = pad_to_multiple(states, self.window_size, dims=(1, 2))
        windows = rearrange(states.flatten(1, 2), self.order, self.inverse)
        return windows.view(states.shape[0] * self.num_windows, self.num_positions, states.shape[-1])

    def to_map(self, windows: Tensor) -> Tensor:
        """(B W, N, C) to (B, h, w, C)."""
        num_images = windows.shape[0] // self.num_windows
        positions = windows.reshape(num_images, self.num_windows * self.num_positions, windows.shape[-1])
        states = rearrange(positions, self.inverse, self.order).unflatten(1, self.padded_size)
        states = states[:, : self.height, : self.width]
        # Strides show whether anything is cropped, so that a graph would be specialised to such sizes, or to others.
        return states.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else states


# Enough for the stages of a Swin at two image sizes.
@lru_cache(maxsize=16)
def _cached_grid(size: tuple[int, int], window_size: int, shift: int, device: torch.device) -> WindowGrid:
    # Other passes may need gradients.
    with torch.inference_mode(False):
        return WindowGrid(size, window_size, shift, device)


class CompiledWindowGrid:
    """As `WindowGrid`, for graphs that are compiled for any size: everything is computed by operators.

    torch's compiler sees only their sizes. With the index arithmetic of all positions inductor does not terminate, and
    training graphs would be specialised to padded maps or others.
    """

    def __init__(self, size: Sequence[int], window_size: int, shift: int, device: torch.device) -> None:
        self.height, self.width = size
        self.window_size, self.shift = window_size, shift
        self.attention_mask = None
        if shift:
            self.attention_mask = torch.ops.hf_maskformer.window_attention_mask(*size, window_size, shift, device)

    def to_windows(self, states: Tensor) -> Tensor:
        """(B, h, w, C) to (B W, N, C)."""
        return torch.ops.hf_maskformer.to_windows(states, self.window_size, self.shift)

    def to_map(self, windows: Tensor) -> Tensor:
        """(B W, N, C) to (B, h, w, C)."""
        return torch.ops.hf_maskformer.to_map(windows, self.height, self.width, self.window_size, self.shift)


Windows: TypeAlias = WindowGrid | CompiledWindowGrid


def window_grid(size: Sequence[int], window_size: int, shift: int, device: torch.device) -> Windows:
    """The windows of a feature map for the current kind of pass."""
    # Checked once: it is true in all threads while one compiles.
    in_graph = is_traced()
    if in_graph and is_for_any_size(size) and not is_transformed():
        return CompiledWindowGrid(size, window_size, shift, device)
    if in_graph or is_transformed() or torch._C._len_torch_dispatch_stack():
        return WindowGrid(size, window_size, shift, device, in_graph)
    return reused_grid(size, window_size, shift, device)


def reused_grid(
    size: Sequence[int], window_size: int, shift: int, device: torch.device, with_mask: bool = True
) -> WindowGrid:
    """A `WindowGrid` cached from an earlier pass where possible: a Swin-T's at 512 x 512 take some milliseconds."""
    # On accelerators others might use it before it is filled, or after it is freed.
    if device.type != "cpu" or math.prod(size) * window_size**2 > MAX_CACHED_PAIRS:
        return WindowGrid(size, window_size, shift, device, with_mask=with_mask)
    return _cached_grid(tuple(size), window_size, shift, device)


def rearrange(states: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`Rearrange`, but in exported graphs the operator inside, which other runtimes know."""
    return states.index_select(1, order) if is_exporting() else Rearrange.apply(states, order, inverse)


class Rearrange(torch.autograd.Function):
    """Reorders the positions of (B, P, C). Its gradient is a copy too; that of indexing accumulates."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return states.index_select(1, order)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, order, inverse = inputs
        context.save_for_backward(order, inverse)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = context.saved_tensors
        return Rearrange.apply(gradient, inverse, order), None, None


def pad_to_multiple(states: Tensor, divisor: int, dims: tuple[int, int]) -> Tensor:
    """Pads rows and columns, the dimensions `dims`, with zeros to multiples of the divisor."""
    missing = [count_parts(states.shape[dim], divisor) * divisor - states.shape[dim] for dim in dims]
    # A graph for any size always pads: a branch would specialise it to one side.
    if not (torch.compiler.is_compiling() or any(missing)):
        return states
    padding = [0, 0] * states.dim()  # from the last dimension to the first, before and after each
    for dim, length in zip(dims, missing, strict=True):
        padding[2 * (states.dim() - dim) - 1] = length
    return F.pad(states, padding)


def count_parts(length: int, part: int) -> int:
    """How many parts cover a length, which the last one may exceed."""
    # In this form torch's compiler reduces the sizes of a Swin's maps to quotients of the image's and knows that they
    # are positive. (length + part - 1) // part grows into nested expressions, and -(-length // part) may be negative to
    # it; with that, ONNX, which rounds quotients towards zero, would also lose the last part.
    return (length - 1) // part + 1


def count_windows(size: Sequence[int], window_size: int) -> int:
    """How many windows cover a map of a size (h, w)."""
    return count_parts(size[0], window_size) * count_parts(size[1], window_size)


def windows_by_rows(positions: Tensor, window_size: int) -> Tensor:
    """(h, w) to (W, N); h and w are multiples of the window.

    By arithmetic: views would fix in a graph whether there is one row or column of windows, or more.
    """
    height, width = positions.shape
    num_windows = (height // window_size) * (width // window_size)
    places = torch.arange(height * width, device=positions.device)
    windows, in_window = places // window_size**2, places % window_size**2
    window_rows = windows // (width // window_size)
    window_columns = windows - window_rows * (width // window_size)  # ONNX has no remainder of dynamic values
    rows = window_rows * window_size + in_window // window_size
    columns = window_columns * window_size + in_window % window_size
    return positions.flatten().index_select(0, rows * width + columns).view(num_windows, window_size**2)


def windows_cut_last(positions: Tensor, window_size: int) -> Tensor:
    """As `windows_by_rows`, but the windows of the last column and row last: a shift cuts through those."""
    height, width = positions.shape
    grid = positions.view(height // window_size, window_size, width // window_size, window_size)
    grid = grid.transpose(1, 2).flatten(2)
    return torch.cat((grid[:-1, :-1].flatten(0, 1), grid[:-1, -1], grid[-1]))


def shift_regions(size: Sequence[int], window_size: int, shift: int, device: torch.device) -> Tensor:
    """(h, w): a number for each part of a cyclically shifted map whose positions were neighbours before."""
    regions = []
    for length in size:
        positions = torch.arange(length, device=device)
        regions.append((positions >= length - window_size).int() + (positions >= length - shift).int())
    rows, columns = regions
    return rows[:, None] * 3 + columns


# The operators of `CompiledWindowGrid`. Those that move positions are each other's gradients: padding is filled with 0,
# and its gradient is dropped.
def _to_windows(states: Tensor, window_size: int, shift: int) -> Tensor:
    grid = reused_grid(states.shape[1:3], window_size, shift, states.device, with_mask=False)
    return grid.to_windows(states)


def _output_of_to_windows(states: Tensor, window_size: int, shift: int) -> Tensor:
    num_windows = count_windows(states.shape[1:3], window_size)
    return states.new_empty(states.shape[0] * num_windows, window_size**2, states.shape[-1])


def _context_of_to_windows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, ctx.window_size, ctx.shift = inputs
    ctx.height, ctx.width = states.shape[1:3]


def _backward_of_to_windows(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    to_map = torch.ops.hf_maskformer.to_map
    return to_map(gradient, ctx.height, ctx.width, ctx.window_size, ctx.shift), None, None


def _to_map(windows: Tensor, height: int, width: int, window_size: int, shift: int) -> Tensor:
    grid = reused_grid((height, width), window_size, shift, windows.device, with_mask=False)
    return grid.to_map(windows).contiguous()


def _output_of_to_map(windows: Tensor, height: int, width: int, window_size: int, shift: int) -> Tensor:
    num_images = windows.shape[0] // count_windows((height, width), window_size)
    return windows.new_empty(num_images, height, width, windows.shape[-1])


def _context_of_to_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, ctx.window_size, ctx.shift = inputs


def _backward_of_to_map(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    to_windows = torch.ops.hf_maskformer.to_windows
    return to_windows(gradient, ctx.window_size, ctx.shift), None, None, None, None


def _attention_mask(height: int, width: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    attention_mask = reused_grid((height, width), window_size, shift, device).attention_mask
    assert attention_mask is not None
    return attention_mask.clone()  # a compiled graph may overwrite what it has read


def _output_of_attention_mask(height: int, width: int, window_size: int, shift: int, device: torch.device) -> Tensor:
    num_windows, num_positions = count_windows((height, width), window_size), window_size**2
    return torch.empty(num_windows, num_positions, num_positions, dtype=torch.float32, device=device)


ON_EVERY_DEVICE = "CompositeExplicitAutograd"
register_operator(
    "to_windows(Tensor states, int window_size, int shift) -> Tensor",
    _to_windows,
    _output_of_to_windows,
    ON_EVERY_DEVICE,
    gradient=(_context_of_to_windows, _backward_of_to_windows),
)
register_operator(
    "to_map(Tensor windows, SymInt height, SymInt width, int window_size, int shift) -> Tensor",
    _to_map,
    _output_of_to_map,
    ON_EVERY_DEVICE,
    gradient=(_context_of_to_map, _backward_of_to_map),
)
register_operator(
    "window_attention_mask(SymInt height, SymInt width, int window_size, int shift, Device device) -> Tensor",
    _attention_mask,
    _output_of_attention_mask,
    ON_EVERY_DEVICE,
)
