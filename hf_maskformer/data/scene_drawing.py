"""Draws one scene: wavy regions of background texture, and shaped objects that overlap, with exact labels.

Classes differ in texture (background) and shape (objects). Colours carry no information: those of all regions of a
scene come from one distribution.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Every `y` and `x` below is an (H, W) float grid in units of 1/128 of the shorter side: a scene looks the same at any
# size, and lengths read as pixels of the default size.

Drawing = Callable[..., np.ndarray]  # a texture or a shape, evaluated at every point of a grid

MIN_VISIBLE_SHARE = 0.65  # of every segment, so that it can still be recognised
MAX_PLACEMENTS = 20
SHADOW_REACH = 5


def stripes(generator: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Parallel bands at any angle, -1 to 1."""
    across, _ = _rotated(generator, y, x)
    return _wave(generator, across, period=generator.uniform(6, 9), sharpness=2.5)


def checker(generator: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Squares of alternating brightness at any angle, -1 to 1."""
    period = generator.uniform(10, 14)
    u, v = (_wave(generator, axis, period, sharpness=2.5) for axis in _rotated(generator, y, x))
    return u * v


def speckle(generator: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Randomly scattered round spots, -1 to 1."""
    spacing = generator.uniform(5.5, 7)
    rows, columns = y / spacing, x / spacing
    row, column = np.floor(rows).astype(int), np.floor(columns).astype(int)
    # One spot per cell, anywhere in it: a point is nearest to the spot of its own cell or of one of the eight around.
    jitter = generator.uniform(0.1, 0.9, size=(2, row.max() + 3, column.max() + 3))
    squared = np.full(y.shape, np.inf)
    for down, right in np.ndindex(3, 3):
        spot_y = row + down - 1 + jitter[0, row + down, column + right]
        spot_x = column + right - 1 + jitter[1, row + down, column + right]
        squared = np.minimum(squared, (rows - spot_y) ** 2 + (columns - spot_x) ** 2)
    return np.clip((0.36 - np.sqrt(squared)) * 8, -1, 1)


def disc(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a disc of radius 1, negative inside."""
    return np.hypot(y, x) - 1


def triangle(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of an equilateral triangle."""
    return _polygon(y, x, [(-1.25, 0), (0.625, 1.083), (0.625, -1.083)])


def square(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a square."""
    return _polygon(y, x, [(-0.88, -0.88), (-0.88, 0.88), (0.88, 0.88), (0.88, -0.88)])


def ring(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to the two outlines of a ring; the background shows through the hole."""
    return np.abs(np.hypot(y, x) - 0.83) - 0.25


def cross(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a cross with four equal arms."""
    arm, tip = 0.36, 1.15
    corners = [(-tip, -arm), (-tip, arm), (-arm, arm)]
    for _ in range(3):
        corners += [(corner_x, -corner_y) for corner_y, corner_x in corners[-3:]]
    return _polygon(y, x, corners)


TEXTURES: tuple[Drawing, ...] = (speckle, stripes, checker)
SHAPES: tuple[Drawing, ...] = (disc, triangle, square, ring, cross)
DRAWINGS: tuple[Drawing, ...] = (*TEXTURES, *SHAPES)

CLASS_NAMES: tuple[str, ...] = tuple(drawing.__name__ for drawing in DRAWINGS)
STUFF_IDS: tuple[int, ...] = tuple(range(len(TEXTURES)))
THING_IDS: tuple[int, ...] = tuple(range(len(TEXTURES), len(CLASS_NAMES)))


class Scene(NamedTuple):
    """One drawn picture and its ground truth."""

    image: np.ndarray  # (H, W, 3) uint8
    segment_map: np.ndarray  # (H, W) int32, segment ids from 1 without gaps
    segment_labels: dict[int, int]  # class of every segment id

    @property
    def label_map(self) -> np.ndarray:
        """The class of every pixel, (H, W) uint8."""
        return np.array([0, *self.segment_labels.values()], dtype=np.uint8)[self.segment_map]


def draw_scene(generator: np.random.Generator, image_size: tuple[int, int]) -> Scene:
    """Draws two or three background regions, then objects from back to front.

    An object that would hide too much of the others is placed again, and left out if no place is found, so every
    segment stays recognisable. A pixel belongs to the front-most region that covers its centre; only the image is
    anti-aliased.
    """
    stuff = generator.choice(STUFF_IDS, size=generator.integers(2, 4), replace=False).tolist()
    things = generator.choice(THING_IDS, size=generator.integers(3, 7)).tolist()
    colors = _palette(generator, len(stuff) + len(things))
    canvas = _Canvas(generator, image_size)
    canvas.cover(stuff, colors[: len(stuff)])
    for label, color in zip(things, colors[len(stuff) :], strict=True):
        canvas.add(label, color)
    image = np.clip(canvas.image * 255 + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, canvas.segment_map, dict(enumerate(canvas.labels, start=1)))


class _Canvas:
    """A scene being drawn."""

    def __init__(self, generator: np.random.Generator, image_size: tuple[int, int]) -> None:
        self.generator = generator
        self.unit = 128 / min(image_size)  # length of a pixel
        self.y, self.x = (grid * self.unit for grid in np.mgrid[0.5 : image_size[0], 0.5 : image_size[1]])
        self.image = np.zeros((*image_size, 3))
        self.segment_map = np.zeros(image_size, dtype=np.int32)
        self.labels: list[int] = []  # of segments 1, 2, ...
        self.areas: list[int] = []  # of segments 1, 2, ... if nothing hid them

    def cover(self, labels: list[int], colors: np.ndarray) -> None:
        """Divides the canvas among background classes along wavy lines."""
        closeness = self._closeness(len(labels))
        self.segment_map[:] = closeness.argmax(0) + 1
        self.labels, self.areas = list(labels), np.bincount(self.segment_map.ravel())[1:].tolist()
        shares = np.exp(2 * (closeness - closeness.max(0)) / self.unit)
        for label, color, share in zip(labels, colors, shares / shares.sum(0), strict=True):
            pattern = DRAWINGS[label](self.generator, self.y, self.x)
            contrast = self.generator.uniform(0.26, 0.36)
            self.image += (share * (1 + contrast * pattern))[..., None] * color

    def _closeness(self, num_regions: int) -> np.ndarray:
        """Returns (num_regions, H, W), in units of length: a point belongs to the region with the largest value."""
        spread = 2 * np.pi * np.arange(num_regions) / num_regions + self.generator.uniform(-0.3, 0.3, num_regions)
        turn = self.generator.uniform(0, 2 * np.pi) + spread[:, None, None]
        down, right = (
            along + 5 * _wave(self.generator, across, self.generator.uniform(50, 90))
            for along, across in ((self.y, self.x), (self.x, self.y))
        )
        middle_y, middle_x = (axis.max() * self.generator.uniform(0.38, 0.62) for axis in (self.y, self.x))
        return (down - middle_y) * np.sin(turn) + (right - middle_x) * np.cos(turn)

    def add(self, label: int, color: np.ndarray) -> None:
        """Places an object in front of everything where it leaves every segment visible, if there is such a place."""
        for _ in range(MAX_PLACEMENTS):
            window, distance = self._try_place(DRAWINGS[label])
            hidden = np.bincount(self.segment_map[window][distance < 0], minlength=len(self.areas) + 1)
            visible = np.bincount(self.segment_map.ravel(), minlength=len(self.areas) + 1) - hidden
            if (visible[1:] >= MIN_VISIBLE_SHARE * np.array(self.areas)).all():
                self.labels.append(label)
                self.areas.append(int(np.count_nonzero(distance < 0)))
                self.segment_map[window][distance < 0] = len(self.labels)
                self._paint(window, distance, color)
                return

    def _try_place(self, shape: Drawing) -> tuple[tuple[slice, slice], np.ndarray]:
        """Draws size, position and rotation of an object; returns a window around it and the signed distances in it."""
        radius = self.generator.uniform(14, 27)
        middle = [self.generator.uniform(0.8 * radius, axis.max() - 0.8 * radius) for axis in (self.y, self.x)]
        reach = 1.3 * radius + SHADOW_REACH
        top, left = (max(int((along - reach) / self.unit), 0) for along in middle)
        bottom, right = (int((along + reach) / self.unit) + 1 for along in middle)
        window = slice(top, bottom), slice(left, right)
        # Tilted, not turned all the way: a small network then learns the shapes within minutes.
        y, x = _rotated(self.generator, self.y[window] - middle[0], self.x[window] - middle[1], most=0.4)
        return window, radius * shape(y / radius, x / radius)

    def _paint(self, window: tuple[slice, slice], distance: np.ndarray, color: np.ndarray) -> None:
        """Paints an object with a faint texture, lit from one side, and its soft shadow over the image."""
        y, x = self.y[window], self.x[window]
        pattern = TEXTURES[self.generator.integers(len(TEXTURES))](self.generator, y, x)
        light = _wave(self.generator, _rotated(self.generator, y, x)[0], period=160)
        fill = (1 + 0.07 * pattern + 0.14 * light)[..., None] * color
        shadow = 0.4 * np.clip(1 - distance / SHADOW_REACH, 0, 1)[..., None]
        coverage = np.clip(0.5 - distance / self.unit, 0, 1)[..., None]
        self.image[window] = self.image[window] * (1 - shadow) * (1 - coverage) + fill * coverage


def _palette(generator: np.random.Generator, num_colors: int) -> np.ndarray:
    """Draws colours (num_colors, 3), 0 to 1, that differ visibly from one another."""
    colors = _color(generator, 1)
    while len(colors) < num_colors:
        candidates = _color(generator, 24)
        gaps = np.abs(candidates[:, None] - colors[None]).sum(-1).min(-1)
        colors = np.vstack([colors, candidates[gaps.argmax()]])
    # Later colours are more extreme than earlier ones; after shuffling, all regions have the same distribution.
    return generator.permutation(colors)


def _color(generator: np.random.Generator, num_colors: int) -> np.ndarray:
    """Draws colours (num_colors, 3) of any hue, neither grey nor so bright or dark that a texture would be clipped."""
    hue, saturation, value = generator.uniform((0, 0.2, 0.4), (1, 0.65, 0.78), size=(num_colors, 3)).T
    ramp = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return value[:, None] * (1 - saturation[:, None] * (1 - np.clip(ramp, 0, 1)))


def _rotated(
    generator: np.random.Generator, y: np.ndarray, x: np.ndarray, most: float = np.pi
) -> tuple[np.ndarray, np.ndarray]:
    """The grid rotated by a random angle of at most `most` radians either way."""
    angle = generator.uniform(-most, most)
    return y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)


def _wave(generator: np.random.Generator, along: np.ndarray, period: float, sharpness: float = 1) -> np.ndarray:
    phase = generator.uniform(0, 2 * np.pi)
    return np.clip(sharpness * np.sin(2 * np.pi * along / period + phase), -1, 1)


def _polygon(y: np.ndarray, x: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a closed outline through vertices (y, x), negative inside."""
    squared, inside = np.full(y.shape, np.inf), np.zeros(y.shape, dtype=bool)
    for (from_y, from_x), (to_y, to_x) in zip(corners, [*corners[1:], corners[0]], strict=True):
        edge_y, edge_x, gap_y, gap_x = to_y - from_y, to_x - from_x, y - from_y, x - from_x
        along = np.clip((gap_y * edge_y + gap_x * edge_x) / (edge_y**2 + edge_x**2), 0, 1)
        squared = np.minimum(squared, (gap_y - along * edge_y) ** 2 + (gap_x - along * edge_x) ** 2)
        # A point is inside if a ray to the right crosses the outline an odd number of times.
        spanned = (gap_y < 0) != (y < to_y)
        inside ^= spanned & ((gap_x * edge_y < gap_y * edge_x) == (edge_y > 0))
    distance = np.sqrt(squared)
    return np.where(inside, -distance, distance)
