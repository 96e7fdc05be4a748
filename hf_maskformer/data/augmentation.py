"""Joint random augmentation of an image and its labels, for training: that of the paper's recipes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch

from .color import color_jitter
from .geometry import Size, Window, drop_empty_masks, flip_horizontally, resize, resized_size
from .sample import Sample

MAX_CROPS = 10


class Augmentation(Protocol):
    """Takes a sample and returns an augmented one; random numbers come from the generator, by default torch's own."""

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample: ...


@dataclass(frozen=True)
class RandomScaleCropFlip:
    """Resizes to a random scale, crops, jitters colours and flips, as in the paper's semantic training.

    Takes a sample and returns a new one: the image is resized bilinearly, labels by nearest neighbour. Masks that fall
    outside the crop are dropped with their labels; ids of a map stay in `instance_id_to_semantic_id`. Random numbers
    come from the given generator, by default torch's global one.

    Args:
        short_edges: lengths of the shorter side in pixels; one is drawn uniformly.
        max_size: upper bound on the longer side; takes precedence over `short_edges`.
        crop_size: (height, width) of the crop, or None for no crop. A shorter side is not cropped.
        flip_probability: probability of a horizontal flip.
        change_colors: whether to change brightness, contrast, saturation and hue (see `color_jitter`).
        single_category_max_area: a crop in which one class has a larger share of the labelled pixels is drawn again, up
            to ten times. 1 accepts every crop, as all of the paper's recipes do.
        ignored_values: values of a map that do not count towards that share.

    Raises:
        ValueError: no or non-positive sizes, or a probability or share outside 0 to 1.
    """

    short_edges: Sequence[int]
    max_size: int
    crop_size: tuple[int, int] | None = None
    flip_probability: float = 0.5
    change_colors: bool = False
    single_category_max_area: float = 1.0
    ignored_values: tuple[int, ...] = (255,)

    def __post_init__(self) -> None:
        sizes = (*self.short_edges, self.max_size, *(self.crop_size or ()))
        if not self.short_edges or min(sizes) < 1:
            raise ValueError(
                f"short_edges {list(self.short_edges)}, max_size {self.max_size} and crop_size {self.crop_size} must "
                "be at least one pixel each, and short_edges must hold at least one length."
            )
        _check_shares(flip_probability=self.flip_probability, single_category_max_area=self.single_category_max_area)

    @classmethod
    def from_scales(
        cls, image_size: int, min_scale: float, max_scale: float, change_colors: bool = True, crop: bool = True
    ) -> Self:
        """The paper's augmentation around a size: scales in steps of 0.1, square crops of `image_size`.

        Scales of 0.5 to 2 around 512 are its recipe for ADE20K. The longer side is at most four times `image_size`.
        `crop=False` disables cropping.
        """
        crop_size = (image_size, image_size) if crop else None
        return cls(scales(image_size, min_scale, max_scale), 4 * image_size, crop_size, change_colors=change_colors)

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        short_edge = self.short_edges[_draw(len(self.short_edges), generator)]
        size = resized_size(sample["image"], short_edge, self.max_size)
        sample = resize(sample, size) if self.crop_size is None else self._crop(sample, size, self.crop_size, generator)
        if self.change_colors:
            sample = {**sample, "image": color_jitter(sample["image"], generator)}
        if torch.rand((), generator=generator).item() < self.flip_probability:
            sample = flip_horizontally(sample)
        return drop_empty_masks(sample)

    def _crop(self, sample: Sample, size: Size, crop_size: Size, generator: torch.Generator | None) -> Sample:
        for _ in range(MAX_CROPS):
            cropped = resize(sample, size, random_window(size, crop_size, generator))
            if self.single_category_max_area == 1 or self._is_varied(cropped):
                break
        return cropped

    def _is_varied(self, sample: Sample) -> bool:
        areas = class_areas(sample, self.ignored_values)
        return len(areas) > 1 and areas.max() < self.single_category_max_area * areas.sum()


@dataclass(frozen=True)
class RandomFlipCropScale:
    """Flips, resizes and crops half of the samples, and resizes: the paper's panoptic training on COCO, as in DETR.

    Takes and returns samples as `RandomScaleCropFlip` does. The defaults are the paper's.

    Args:
        short_edges, max_size: of the final resize, as in `RandomScaleCropFlip`.
        early_short_edges: lengths of the shorter side before a crop, of which one is drawn.
        crop_range: smallest and largest crop side, drawn separately for each side. Shorter sides are not cropped.
        crop_probability: probability of cropping.
        flip_probability: probability of a horizontal flip.

    Raises:
        ValueError: no or non-positive sizes, a descending range, or a probability outside 0 to 1.
    """

    short_edges: Sequence[int] = tuple(range(480, 801, 32))
    max_size: int = 1333
    early_short_edges: Sequence[int] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    crop_probability: float = 0.5
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        sizes = (*self.short_edges, self.max_size, *self.early_short_edges, *self.crop_range)
        is_missing = not self.short_edges or not self.early_short_edges
        if is_missing or min(sizes) < 1 or self.crop_range[0] > self.crop_range[1]:
            raise ValueError(
                f"short_edges {list(self.short_edges)}, max_size {self.max_size}, early_short_edges "
                f"{list(self.early_short_edges)} and crop_range {self.crop_range} must be at least one pixel each, "
                "short_edges and early_short_edges must hold at least one length, and crop_range must ascend."
            )
        _check_shares(crop_probability=self.crop_probability, flip_probability=self.flip_probability)

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        if torch.rand((), generator=generator).item() < self.flip_probability:
            sample = flip_horizontally(sample)
        if torch.rand((), generator=generator).item() < self.crop_probability:
            early = self.early_short_edges[_draw(len(self.early_short_edges), generator)]
            size = resized_size(sample["image"], early)
            crop_size = self._draw_edge(size[0], generator), self._draw_edge(size[1], generator)
            sample = resize(sample, size, random_window(size, crop_size, generator))
        short_edge = self.short_edges[_draw(len(self.short_edges), generator)]
        return drop_empty_masks(resize(sample, resized_size(sample["image"], short_edge, self.max_size)))

    def _draw_edge(self, edge: int, generator: torch.Generator | None) -> int:
        low, high = (min(edge, limit) for limit in self.crop_range)
        return low + _draw(high - low + 1, generator)


def random_window(size: Size, crop_size: Size, generator: torch.Generator | None = None) -> Window:
    """A window of `crop_size` (height, width) at a random position in an image; a shorter side is not cropped."""
    height, width = min(size[0], crop_size[0]), min(size[1], crop_size[1])
    top, left = _draw(size[0] - height + 1, generator), _draw(size[1] - width + 1, generator)
    return top, left, height, width


def class_areas(sample: Sample, ignored_values: Sequence[int] = ()) -> np.ndarray:
    """The pixel count of each class in a sample, in no particular order; pixels without a class are not counted."""
    if "masks" in sample:
        areas = np.bincount(sample["labels"], sample["masks"].sum(axis=(1, 2)))
        return areas[areas > 0]
    values, counts = np.unique(sample["segmentation_map"], return_counts=True)
    id_to_label = sample.get("instance_id_to_semantic_id")
    classes = [value if id_to_label is None else id_to_label.get(value, -1) for value in values.tolist()]
    areas_by_class: dict[int, int] = {}
    for value, label, count in zip(values.tolist(), classes, counts.tolist(), strict=True):
        if value not in ignored_values and label not in (*ignored_values, -1):
            areas_by_class[label] = areas_by_class.get(label, 0) + count
    return np.array(list(areas_by_class.values()))


def scales(size: int, min_scale: float, max_scale: float) -> list[int]:
    """The lengths of the shorter side around `size`, in steps of 0.1 from one scale to the other."""
    tenths = range(round(10 * min_scale), round(10 * max_scale) + 1)
    if not tenths or tenths[0] < 1:
        raise ValueError(f"min_scale {min_scale} and max_scale {max_scale} must be 0.1 or more and in ascending order.")
    return [int(tenth * 0.1 * size) for tenth in tenths]


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; it must be between 0 and 1.")


# The paper's augmentation for each data set; "ade20k-640" is for its larger Swin models and panoptic ADE20K,
# "coco-panoptic-1000" for Swin-L.
PAPER_AUGMENTATIONS: dict[str, Augmentation] = {
    "ade20k": RandomScaleCropFlip.from_scales(512, 0.5, 2.0),
    "ade20k-640": RandomScaleCropFlip.from_scales(640, 0.5, 2.0),
    "cityscapes": RandomScaleCropFlip(scales(1024, 0.5, 2.0), 4096, (512, 1024), change_colors=True),
    "coco-panoptic": RandomFlipCropScale(),
    "coco-panoptic-1000": RandomFlipCropScale(max_size=1000),
    "coco-stuff-10k": RandomScaleCropFlip.from_scales(640, 0.5, 1.5),
    "mapillary-vistas": RandomScaleCropFlip(scales(2048, 0.5, 2.0), 8192, (1280, 1280), change_colors=True),
}


def _draw(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(count, (), generator=generator))
