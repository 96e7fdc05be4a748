"""The run-length encoding of COCO: lengths of runs down the columns of a mask, written as a short string.

N masks of H x W pixels. Runs of 0 and 1 take turns and begin with 0, so the first length may be 0.
"""

from typing import Any

import numpy as np
from torch import Tensor

_BITS = 5  # of a number that one character holds
_FIRST_CHARACTER = 48


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Encodes masks (N, H, W), bool.

    Returns:
        One dictionary per mask as pycocotools takes it: `size`, [H, W], and `counts`, a string.
    """
    height, width = masks.shape[1:]
    # All at once: each copy from a GPU waits for it.
    columns = masks.transpose(1, 2).flatten(1).cpu().numpy()
    return [{"size": [height, width], "counts": _compress(run_lengths(pixels))} for pixels in columns]


def run_lengths(pixels: np.ndarray) -> np.ndarray:
    """The lengths of the runs of a flat bool array, those of False and True in turns."""
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = np.concatenate([[0], changes, [len(pixels)]])
    lengths = np.diff(starts)
    return np.concatenate([[0], lengths]) if len(pixels) and pixels[0] else lengths


def _compress(lengths: np.ndarray) -> str:
    """Writes each number with as many characters as it needs: 5 bits, the lowest first, and 1 for "more follow".

    From the fourth on, a number is the difference to the last length of the same kind, two before.
    """
    numbers = lengths.astype(np.int64)
    numbers[3:] -= lengths[1:-2]
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
    return grid[grid > 0].tobytes().decode("ascii")
