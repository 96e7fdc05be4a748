"""Masks as COCO stores them: run-length encodings (RLE), plain or compressed to text, and polygons.

Runs are column-major from the upper left corner and begin with a run of background. Counts come from files, so they are
checked: whatever they hold, no more memory is allocated than the mask needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..post_processing_maskformer_rle import compress

# COCO draws a polygon on a grid five times as fine, whose cells 2, 7, 12, ... are the centres of pixels.
FINENESS = 5
CENTRE = FINENESS // 2
# More digits of five bits than any image needs; 64-bit sums of such numbers cannot overflow.
MAX_DIGITS = 8


def decode_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Decodes the `segmentation` of a COCO annotation: a list of polygons, or an RLE with plain or compressed counts.

    Returns (H, W) bool. Raises a ValueError for anything else, and if it does not match `size` (height, width).
    """
    if isinstance(segmentation, list):
        return draw_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("is neither a list of polygons nor an RLE with counts")
    given = segmentation.get("size", size)
    if not isinstance(given, list | tuple | np.ndarray) or list(given) != list(size):
        raise ValueError(f"has the size {given}, but its image is {size[0]} x {size[1]}")
    return decode_rle(segmentation["counts"], size)


def decode_rle(counts: str | bytes | Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Returns the mask (H, W), bool, of RLE counts. Raises a ValueError unless they fill `size` exactly."""
    if isinstance(counts, str | bytes):
        runs = _unpack(counts)
    else:
        runs = np.array(counts, ndmin=1) if counts else np.zeros(0, np.int64)
    if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
        raise ValueError("has counts that are not a list of integers")
    num_pixels = size[0] * size[1]
    if runs.size and (runs.min() < 0 or runs.max() > num_pixels):
        wrong = runs.min() if runs.min() < 0 else runs.max()
        raise ValueError(f"has a run of {wrong} pixels, but its image has {num_pixels}")
    if runs.sum() != num_pixels:
        raise ValueError(f"has runs of {runs.sum()} pixels in total, but its image has {num_pixels}")
    return _fill(runs.astype(np.int64), size)


def encode_rle(mask: np.ndarray) -> str:
    """Compresses a mask (H, W) to the text that `decode_rle` reads."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return compress([runs])[0]


def draw_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Rasterises polygons, each [x1, y1, x2, y2, ...] in pixels, to their union, exactly as COCO's own tools do.

    Polygons with one or two vertices, which some tools leave among others, cover nothing.

    Returns (H, W) bool. Raises a ValueError if there are no others, and for one far outside the image.
    """
    mask = np.zeros(size, dtype=bool)
    if not polygons:
        raise ValueError("has no polygon")
    polygons = [each for each in polygons if not isinstance(each, list) or len(each) not in (2, 4)] or polygons
    for polygon in polygons:
        positions = np.sort(_column_crossings(_corners(polygon, size), size))
        mask |= _fill(np.diff(np.concatenate([[0], positions, [mask.size]])), size)
    return mask


def _corners(polygon: Any, size: tuple[int, int]) -> np.ndarray:
    """Checks a polygon and returns its vertices (N, 2)."""
    try:
        values = np.array(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"has the polygon {str(polygon)[:60]}, which is not a list of numbers") from error
    if values.ndim != 1 or len(values) < 6 or len(values) % 2:
        raise ValueError(f"has a polygon of {values.size} numbers; it needs x and y of at least 3 corners, in one list")
    # The work grows with the length of the outline, which is not bounded otherwise.
    reach = 2 * max(size)
    if not np.isfinite(values).all() or np.abs(values).max() > reach:
        furthest, (height, width) = values[np.abs(values).argmax()], size
        raise ValueError(f"has the coordinate {furthest}, far outside its image of {height} x {width} (height x width)")
    return values.reshape(-1, 2)


def _column_crossings(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where the outline crosses the centre of a column: column-major positions (N,) at which runs end."""
    x, y = _outline((corners * FINENESS + 0.5).astype(np.int64))
    crossed = np.maximum(x[1:], x[:-1]) - 1
    column, is_centre = crossed // FINENESS, crossed % FINENESS == CENTRE
    is_crossing = (x[1:] != x[:-1]) & is_centre & (column >= 0) & (column < size[1])
    upper = np.minimum(y[1:], y[:-1])
    row = np.clip((upper + CENTRE) // FINENESS, 0, size[0])
    return (column * size[0] + row)[is_crossing]


def _outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cells of a closed outline through integer vertices (N, 2), in order: x and y, one cell apart."""
    begin, end = corners, np.roll(corners, -1, axis=0)
    lengths = np.abs(end - begin).max(axis=1)
    long_axis = np.abs(end - begin).argmax(axis=1)
    edges = np.arange(len(corners))
    # An edge is drawn from its lower end, so that it covers the same cells in both directions.
    is_reversed = begin[edges, long_axis] > end[edges, long_axis]
    lower = np.where(is_reversed[:, None], end, begin)
    slope = np.where(is_reversed[:, None], begin - end, end - begin) / np.maximum(lengths, 1)[:, None]

    edge = np.repeat(edges, lengths + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(lengths + 1) - lengths - 1, lengths + 1)
    step = np.where(is_reversed[edge], lengths[edge] - step, step)
    cells = (lower[edge] + slope[edge] * step[:, None] + 0.5).astype(np.int64)
    cells[np.arange(len(edge)), long_axis[edge]] = lower[edge, long_axis[edge]] + step
    return cells[:, 0], cells[:, 1]


def _fill(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    is_foreground = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_foreground, runs).reshape(size[1], size[0]).T


def _unpack(text: str | bytes) -> np.ndarray:
    """Decompresses counts: digits of five bits, lowest first, with a sixth bit set if another digit follows."""
    if not isinstance(text, bytes):
        text = text.encode()
    if not text:
        return np.zeros(0, dtype=np.int64)
    digits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if digits.min() < 0 or digits.max() > 63:
        raise ValueError("has compressed counts with a character that they never contain")
    is_last = digits < 32
    if not is_last[-1]:
        raise ValueError("has compressed counts that end within a number")
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    lengths = np.diff(np.concatenate([starts, [len(digits)]]))
    if lengths.max() > MAX_DIGITS:
        raise ValueError(f"has compressed counts with a number of {lengths.max()} digits")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((digits & 31) << (5 * places), starts)
    is_negative = digits[is_last] & 16 != 0
    numbers -= np.where(is_negative, 1 << (5 * lengths), 0)
    # From the fourth on, a number is the difference from the previous run of the same colour.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
