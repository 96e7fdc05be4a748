"""Places the names of segments where there is room for them."""

from collections.abc import Mapping
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom

_PAPER: Color = (255, 255, 255)
_INK: Color = (20, 20, 20)
_MAX_SIDE = 1024  # of the map in which names are placed, in pixels


def font_for(size: tuple[int, int], smallest: int = 15) -> ImageFont.FreeTypeFont:
    """A font that is legible in a picture of this size."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=max(smallest, min(size) // 28)))


def write_labels(picture: Image.Image, ids: np.ndarray, names: Mapping[int, str]) -> None:
    """Writes the names of segments (by id) into a picture of their map (H, W), the largest segment first.

    A name is placed where its segment is widest. It is left out if the segment is narrower there than the letters are
    high, if it does not fit into the picture, or if it would overlap another name.
    """
    font = font_for(picture.size, smallest=9)
    pen = ImageDraw.Draw(picture)
    taken: list[Box] = []
    # A name is a twenty-eighth of the picture high, so its position need not be exact to the pixel.
    stride = -(-max(ids.shape) // _MAX_SIDE)
    ids = ids[::stride, ::stride]
    numbers, places = number_ids(ids)
    boxes = _boxes(places)
    areas = np.bincount(places.ravel()).tolist()
    order = sorted(range(len(numbers)), key=lambda place: (-areas[place], place))
    for number, place in ((int(numbers[place]), place) for place in order):
        if number not in names:
            continue
        point = _widest_point(places[boxes[place]] == place, smallest_radius=0.4 * font.size / stride)
        if point is None:
            continue
        row, column = (stride * (offset + part.start) for offset, part in zip(point, boxes[place], strict=True))
        width, height = font.getlength(names[number]) + 0.5 * font.size, 1.25 * font.size
        # Moved inwards from the edge of the picture if necessary.
        left = min(max(column - width / 2, 0), picture.width - width)
        top = min(max(row - height / 2, 0), picture.height - height)
        box = left, top, left + width, top + height
        if left < 0 or top < 0 or any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        pen.rounded_rectangle(box, radius=0.25 * font.size, fill=_PAPER)
        pen.text((left + width / 2, top + height / 2), names[number], _INK, font, anchor="mm")


def number_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that occur in a map (H, W) of integers, ascending (N,), and the index of each pixel's id, (H, W)."""
    low, high = int(ids.min()), int(ids.max())
    if high - low >= ids.size:
        numbers, places = np.unique(ids, return_inverse=True)
        return numbers, places.reshape(ids.shape)
    # Counting is many times faster than sorting.
    offsets = ids.astype(np.int64) - low
    occurs = np.bincount(offsets.ravel()) > 0
    return np.flatnonzero(occurs) + low, (np.cumsum(occurs) - 1)[offsets]


def _boxes(places: np.ndarray) -> list[tuple[slice, slice]]:
    """Rows and columns of the bounding box of each number in a map (H, W) of 0, 1, ... without gaps."""
    from scipy.ndimage import find_objects

    return find_objects(places + 1)


def _widest_point(mask: np.ndarray, smallest_radius: float) -> tuple[int, int] | None:
    """Row and column of the pixel furthest from the outside; None if its distance is below the smallest radius."""
    from scipy.ndimage import distance_transform_edt

    # The distance transform is slow, and many segments have no room for such a circle.
    if min(mask.shape) + 1 < 2 * smallest_radius or mask.sum() < smallest_radius**2:
        return None
    # Everything beyond the box of a segment is outside too.
    distances = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distances.argmax(), mask.shape)
    return (int(row), int(column)) if distances[row, column] >= smallest_radius else None


def _overlap(one: Box, other: Box) -> bool:
    gap = 2  # pixels, so that two names do not read as one
    return one[0] < other[2] + gap and other[0] < one[2] + gap and one[1] < other[3] + gap and other[1] < one[3] + gap
