"""The run-length encoding of COCO: lengths of runs down the columns of a mask, written as a short string.

N masks of H x W pixels. Runs of 0 and 1 alternate and begin with 0, so the first length may be 0.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

_BITS = 5  # of a number that one character holds
_FIRST_CHARACTER = 48


def encode_tiles(
    num_masks: int, masks_of_tiles: Tensor, tiles: Tensor, pixels: Tensor, size: tuple[int, int]
) -> list[str]:
    """Encodes masks given as their non-empty tiles.

    Args:
        num_masks: how many masks there are.
        masks_of_tiles: (n,) int64, to which mask a tile belongs.
        tiles: (n, 2) int64, its row and column.
        pixels: (n, T, T) bool, those of the mask; none is outside the image.
        size: (H, W).

    Returns:
        The string of each mask.
    """
    height, width = size
    changes = _changes(num_masks, masks_of_tiles, tiles, pixels, size)
    firsts = np.arange(num_masks) * (height * width + 1)
    lasts = firsts + height * width
    spans = zip(firsts, lasts, *np.searchsorted(changes, [firsts, lasts]), strict=True)
    return compress([np.diff(changes[start:stop], prepend=first, append=last) for first, last, start, stop in spans])


def _changes(
    num_masks: int, masks_of_tiles: Tensor, tiles: Tensor, pixels: Tensor, size: tuple[int, int]
) -> np.ndarray:
    """The positions of pixels that differ from the one before, ascending, down the columns of one mask after the other.

    Each mask has one position more than pixels, so that its end is not the beginning of the next.
    """
    height, width = size
    side = pixels.shape[1]
    rows, columns = tiles.unbind(1)
    # -1 where there is no tile, also above the first row and below the last.
    tile_at = tiles.new_full((num_masks, -(-height // side) + 2, -(-width // side)), -1)
    tile_at[masks_of_tiles, rows + 1, columns] = torch.arange(len(tiles), device=tiles.device)
    above, below = (tile_at[masks_of_tiles, row, columns] for row in (rows, rows + 2))
    bottoms = torch.cat([pixels[:, -1], pixels.new_zeros(1, side)])  # the last is that of tile -1
    # Each column separately, as if 0 came before and after it.
    differs = torch.cat([pixels, (bottoms[:-1] & (below < 0)[:, None])[:, None]], dim=1)
    differs[:, 0] ^= bottoms[above]
    differs[:, 1:-1] ^= pixels[:, :-1]
    # All at once: each copy from a GPU synchronises.
    starts = masks_of_tiles * (height * width + 1) + columns * (side * height) + rows * side
    places = differs.flatten().nonzero().flatten()
    in_tile = torch.arange(side + 1, device="cpu")[:, None] + torch.arange(side, device="cpu") * height
    area = in_tile.numel()
    positions = starts[places // area] + in_tile.flatten().to(places.device)[places % area]
    changes = positions.cpu().numpy()
    changes.sort()
    # A run that continues from the end of one column at the beginning of the next does not change there.
    is_pair = changes[1:] == changes[:-1]
    is_change = np.ones(len(changes), dtype=bool)
    is_change[1:] &= ~is_pair
    is_change[:-1] &= ~is_pair
    return changes[is_change]


def compress(masks: list[np.ndarray]) -> list[str]:
    """Writes the run lengths of each mask with as many characters as each needs: 5 bits, the lowest first, and 1 for
    "more follow".

    From the fourth on, a number is the difference to the last length of the same kind, two before.
    """
    if not masks:
        return []
    numbers = np.concatenate([np.concatenate([lengths[:3], lengths[3:] - lengths[1:-2]]) for lengths in masks])
    characters = []
    is_written = np.ones(len(numbers), dtype=bool)
    while is_written.any():
        digits = numbers & (2**_BITS - 1)
        numbers = numbers >> _BITS
        # The highest bit of the last digit is the sign.
        has_more = is_written & (numbers != -(digits >> (_BITS - 1)))
        characters.append(np.where(is_written, digits + (has_more << _BITS) + _FIRST_CHARACTER, 0))
        is_written = has_more
    grid = np.stack(characters, axis=1).astype(np.uint8)
    text = grid[grid > 0].tobytes().decode("ascii")
    num_characters = np.cumsum((grid > 0).sum(axis=1))
    stops = num_characters[np.cumsum([len(lengths) for lengths in masks]) - 1]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *stops])]
