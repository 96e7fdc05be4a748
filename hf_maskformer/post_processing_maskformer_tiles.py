"""Resizing mask logits to the pixels of an image, only where it matters.

A segmentation is the same over large parts of an image, and there a few logits determine the winner: resizing
bilinearly is averaging, so a resized logit lies between the lowest and the highest of those it is made of. The target
is split into square tiles; bounds tell which tiles are decided, and the others are computed exactly, a few at a time.

Q queries, h x w the grid of the mask logits; R rows and C columns of tiles of T x T pixels, n tiles among them, given
by row and column. A tile depends on S x S' grid points and takes the sigmoid at M x M' points.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from .post_processing_maskformer_inputs import ImageSizes

# What is resized to the target: scores at the size of the padded input ("paper"), mask logits ("direct"), or scores at
# the size of the grid ("fast").
Mode = Literal["paper", "direct", "fast"]

TILE = 16
# Numbers in the largest tensor of a chunk of tiles: four megabytes stay in a CPU's cache; a GPU needs more.
_CHUNK_ON_CPU = 2**20
_CHUNK_ON_GPU = 2**25
_FEWEST_TILES = 32  # per chunk; with fewer, call overhead exceeds the computation
# Beyond this a logit adds nothing, and far beyond it, as where a mask is filled with the lowest finite number, its
# resized neighbours would not be finite.
_LARGEST_LOGIT = 1e30


class Axis(NamedTuple):
    """How one axis of the tiles is computed from one axis of the grid: two linear maps, the sigmoid between them."""

    support: Tensor  # (tiles, S) int64: the grid points
    before: Tensor | None  # (tiles, M, S): from grid points to those where the sigmoid is taken; None: the same
    after: Tensor | None  # (tiles, T, M): from there to pixels; None: the same
    is_inside: Tensor  # (tiles, T) bool: the last tile may reach beyond the target

    def to(self, device: torch.device) -> "Axis":
        return Axis(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class TiledMasks:
    """The mask logits of one image, and how they become the pixels of its target.

    Args:
        mask_logits: (Q, h, w).
        sizes: of the image, the padded input and the target.
        mode: see `Mode`.
    """

    def __init__(self, mask_logits: Tensor, sizes: ImageSizes, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; give one of {', '.join(get_args(Mode))}.")
        self.target_size = sizes.target
        axes = zip(sizes.target, sizes.image, sizes.padded, mask_logits.shape[1:], strict=True)
        self.rows, self.columns = (_axis(*lengths, mode).to(mask_logits.device) for lengths in axes)
        # (h, w, Q): gathering grid points copies contiguous rows.
        logits = mask_logits.float().permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        self.logits = logits.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest logit that each query can have in each tile, both (R, C, Q)."""
        lower, upper = self.logits, self.logits
        for dim, axis in enumerate((self.rows, self.columns)):
            lower = _reduce(torch.minimum, lower, dim, axis.support)
            upper = _reduce(torch.maximum, upper, dim, axis.support)
        return lower, upper

    def areas(self) -> Tensor:
        """How many pixels of the target each tile has, (R, C) int64."""
        return self.rows.is_inside.sum(1)[:, None] * self.columns.is_inside.sum(1)

    def clear_outside(self, pixels: Tensor, tiles: Tensor) -> None:
        """Zeroes the pixels (n, q, T, T) of tiles (n, 2) that lie beyond the target."""
        # Only the last row and column of tiles may reach that far.
        last = tiles.new_tensor([len(self.rows.support) - 1, len(self.columns.support) - 1])
        border = (tiles == last).any(dim=1).nonzero().flatten()
        rows, columns = tiles[border].unbind(1)
        is_inside = self.rows.is_inside[rows, :, None] & self.columns.is_inside[columns, None, :]
        pixels[border] *= is_inside[:, None]

    def chunks(self, tiles: Tensor, numbers_per_pixel: int) -> Iterator[Tensor]:
        """Splits tiles so that a chunk with so many numbers per pixel takes little memory."""
        budget = _CHUNK_ON_CPU if tiles.device.type == "cpu" else _CHUNK_ON_GPU
        size = max(_FEWEST_TILES, budget // (numbers_per_pixel * TILE**2))
        return (tiles[start : start + size] for start in range(0, len(tiles), size))

    def resized_logits(self, tiles: Tensor) -> Tensor:
        """Mask logits where the sigmoid is taken, (n, M, M', Q)."""
        return _apply(self.rows.before, self.columns.before, tiles, self._at_grid_points(tiles))

    def resized_logits_by_query(self, tiles: Tensor, queries: Tensor) -> Tensor:
        """As `resized_logits` in mode "direct", for some queries (q,) in the order of one map each, (n, q, T, T)."""
        logits = self._at_grid_points(tiles).permute(0, 3, 1, 2).index_select(1, queries)
        rows, columns = self._matrices(tiles)
        return rows[:, None] @ (logits.flatten(1, 2) @ columns.mT).unflatten(1, logits.shape[1:3])

    def resized_logits_of(self, queries: Tensor, tiles: Tensor) -> Tensor:
        """As `resized_logits` in mode "direct", with one query (n,) for each tile, (n, T, T)."""
        points = self._grid_points(tiles) * self.logits.shape[2] + queries[:, None, None]
        rows, columns = self._matrices(tiles)
        return rows @ self.logits.take(points) @ columns.mT

    def at_pixels(self, values: Tensor, tiles: Tensor) -> Tensor:
        """Maps values (n, M, M', any) to the pixels of their tiles, (n, T, T, any)."""
        return _apply(self.rows.after, self.columns.after, tiles, values)

    def paste(self, canvas: Tensor, tiles: Tensor, values: Tensor) -> Tensor:
        """Pastes pixels (n, T, T) of some tiles into a map (R, C) of one value per tile; returns (H, W)."""
        canvas = canvas[:, None, :, None].repeat(1, TILE, 1, TILE)
        canvas[tiles[:, 0], :, tiles[:, 1]] = values
        return self.crop(canvas)

    def spread(self, num_maps: int, maps: Tensor, tiles: Tensor, pixels: Tensor) -> Tensor:
        """Makes bool maps (num_maps, H, W) from pixels (n, T, T) of tiles, each in the map with this index (n,)."""
        height, width = self.target_size
        if pixels.device.type == "cpu":
            # numpy leaves pages of zeros to the operating system until they are written; most of a map never is.
            canvas = torch.from_numpy(np.zeros((num_maps, height, width), dtype=bool))
        else:
            canvas = pixels.new_zeros(num_maps, height, width)
        # The last row and column of tiles may be cut off, so they are written separately from the others.
        for (top, bottom), (left, right) in itertools.product(_whole_and_rest(height), _whole_and_rest(width)):
            num_rows, num_columns = min(TILE, bottom - top), min(TILE, right - left)
            block = canvas[:, top:bottom, left:right].unflatten(2, (-1, num_columns)).unflatten(1, (-1, num_rows))
            rows, columns = tiles[:, 0] - top // TILE, tiles[:, 1] - left // TILE
            is_here = (rows >= 0) & (rows < block.shape[1]) & (columns >= 0) & (columns < block.shape[3])
            here = is_here.nonzero().flatten()
            block[maps[here], rows[here], :, columns[here]] = pixels.index_select(0, here)[:, :num_rows, :num_columns]
        return canvas

    def crop(self, canvas: Tensor) -> Tensor:
        """Makes a map (..., H, W) of the target from one of its tiles (..., R, T, C, T)."""
        height, width = self.target_size
        return canvas.flatten(-4, -3).flatten(-2)[..., :height, :width].contiguous()

    def _matrices(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """In mode "direct": those from the grid points of tiles to their pixels, (n, T, S) and (n, T, S')."""
        rows, columns = (cast(Tensor, axis.before) for axis in (self.rows, self.columns))
        return rows.index_select(0, tiles[:, 0]), columns.index_select(0, tiles[:, 1])

    def _at_grid_points(self, tiles: Tensor) -> Tensor:
        """The logits at the grid points of tiles, (n, S, S', Q)."""
        points = self._grid_points(tiles)
        return self.logits.flatten(0, 1).index_select(0, points.flatten()).unflatten(0, points.shape)

    def _grid_points(self, tiles: Tensor) -> Tensor:
        """Flat indices of the grid points of tiles, (n, S, S')."""
        rows, columns = (
            axis.support.index_select(0, places)
            for axis, places in zip((self.rows, self.columns), tiles.unbind(1), strict=True)
        )
        return rows[:, :, None] * self.logits.shape[1] + columns[:, None, :]


def _axis(target: int, image: int, padded: int, grid: int, mode: Mode) -> Axis:
    positions = torch.arange(-(-target // TILE) * TILE, device="cpu").view(-1, TILE)
    is_inside = positions < target
    positions = positions.clamp(max=target - 1)
    if mode == "fast":
        # The image covers a part of the grid that may end between two of its points.
        covered = image * grid / padded
        support, after = _interpolation(positions, covered / target, -int(-covered // 1))
        return Axis(support, None, after, is_inside)
    in_image, after = _interpolation(positions, image / target, image)
    support, before = _interpolation(in_image, grid / padded, grid)
    if mode == "direct":
        return Axis(support, after @ before, None, is_inside)
    return Axis(support, before, after, is_inside)


def _interpolation(positions: Tensor, scale: float, length: int) -> tuple[Tensor, Tensor]:
    """Bilinear resizing of an axis of this length, at positions (tiles, m) of its result.

    Returns the points (tiles, s) that matter to each tile and their weights (tiles, m, s).
    """
    source = ((positions.float() + 0.5) * scale - 0.5).clamp(min=0, max=length - 1)
    low = source.long()
    high = (low + 1).clamp(max=length - 1)
    first = low.amin(dim=1, keepdim=True)
    num_points = int((high - first).max()) + 1
    if num_points <= 2 * positions.shape[1]:
        points = (first + torch.arange(num_points, device=first.device)).clamp(max=length - 1)
        low_at, high_at = low - first, high - first
    else:  # a much smaller result skips most points
        points = torch.cat([low, high], dim=1)
        low_at, high_at = torch.arange(points.shape[1], device=points.device).expand_as(points).chunk(2, dim=1)
    share = (source - low)[..., None]
    weights = share.new_zeros(*positions.shape, points.shape[1])
    weights.scatter_add_(2, low_at[..., None], 1 - share).scatter_add_(2, high_at[..., None], share)
    return points, weights


def _whole_and_rest(length: int) -> list[tuple[int, int]]:
    """The ranges of an axis's whole tiles and, if it is cut off, of the last one."""
    whole = length // TILE * TILE
    return [(start, stop) for start, stop in ((0, whole), (whole, length)) if start < stop]


def _reduce(function: Callable[..., Tensor], values: Tensor, dim: int, points: Tensor) -> Tensor:
    """Reduces over the points (tiles, s) of each tile along one dimension, whose length becomes that of the tiles."""
    reduced, *others = (values.index_select(dim, each) for each in points.T)
    for other in others:
        reduced = function(reduced, other)
    return reduced


def _apply(rows: Tensor | None, columns: Tensor | None, tiles: Tensor, values: Any) -> Tensor:
    """Multiplies values (n, a, b, any) of tiles by the matrices of their rows and of their columns."""
    if rows is not None:
        values = (rows.index_select(0, tiles[:, 0]) @ values.flatten(2)).unflatten(2, values.shape[2:])
    if columns is not None:
        values = columns.index_select(0, tiles[:, 1])[:, None] @ values
    return values
