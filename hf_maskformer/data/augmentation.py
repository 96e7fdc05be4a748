"""Random changes of an image and its segmentation map together, for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..image_processing_maskformer_images import resize_nearest
from ..image_processing_maskformer_settings import ImageProcessorSettings
from .sample import Sample


@dataclass(frozen=True)
class RandomScaleCropFlip:
    """Resizes to a random scale, takes a random crop and mirrors at random, as in the paper's training.

    Takes a sample and returns a new one, whose image is interpolated bilinearly and whose map keeps its values. Ids
    that the crop left out stay in `instance_id_to_semantic_id`. Random numbers come from torch's global generator,
    which a `DataLoader` seeds in each worker and epoch and `torch.manual_seed` sets.

    Args:
        short_edges: lengths of the shorter side in pixels; one is drawn with equal chance.
        max_size: no side gets longer than this; it outranks `short_edges`.
        crop_size: (height, width) of the crop, or None for none. A side that is shorter stays whole.
        flip_probability: chance of mirroring left and right.

    Raises:
        ValueError: no or non-positive sizes, or a chance outside 0 to 1.
    """

    short_edges: Sequence[int]
    max_size: int
    crop_size: tuple[int, int] | None = None
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        sizes = (*self.short_edges, self.max_size, *(self.crop_size or ()))
        if not self.short_edges or min(sizes) < 1:
            raise ValueError(
                f"short_edges {list(self.short_edges)}, max_size {self.max_size} and crop_size {self.crop_size} must "
                "be at least one pixel each, and short_edges must hold at least one length."
            )
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability is {self.flip_probability}; it must lie between 0 and 1.")

    @classmethod
    def from_scales(cls, image_size: int, min_scale: float, max_scale: float) -> Self:
        """The paper's augmentation around a size: scales in steps of 0.1, square crops of `image_size`.

        Scales of 0.5 to 2 around 512 are its recipe for ADE20K. No side gets longer than four times `image_size`.
        """
        tenths = range(round(10 * min_scale), round(10 * max_scale) + 1)
        if not tenths or tenths[0] < 1:
            raise ValueError(f"min_scale {min_scale} and max_scale {max_scale} must be 0.1 or more and in this order.")
        short_edges = [int(tenth * 0.1 * image_size) for tenth in tenths]
        return cls(short_edges, max_size=4 * image_size, crop_size=(image_size, image_size))

    def __call__(self, sample: Sample) -> Sample:
        image, segmentation_map = self._scale(sample["image"], sample["segmentation_map"])
        image, segmentation_map = self._crop(image, segmentation_map)
        if torch.rand(()).item() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            segmentation_map = segmentation_map[:, ::-1]
        # torch takes no mirrored view, and a crop that is a view would keep the whole map alive.
        return {**sample, "image": image, "segmentation_map": np.ascontiguousarray(segmentation_map)}

    def _scale(self, image: Image.Image, segmentation_map: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        short_edge = self.short_edges[_draw(len(self.short_edges))]
        # The image processor's own rule, so that images are rounded alike in training and afterwards.
        rule = ImageProcessorSettings(size={"shortest_edge": short_edge, "longest_edge": self.max_size})
        height, width = rule.resized_size((image.height, image.width))
        scaled = image.resize((width, height), Image.Resampling.BILINEAR)
        return scaled, resize_nearest(torch.from_numpy(segmentation_map), (height, width)).numpy()

    def _crop(self, image: Image.Image, segmentation_map: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        if self.crop_size is None:
            return image, segmentation_map
        height, width = min(self.crop_size[0], image.height), min(self.crop_size[1], image.width)
        top, left = _draw(image.height - height + 1), _draw(image.width - width + 1)
        cropped = image.crop((left, top, left + width, top + height))
        return cropped, segmentation_map[top : top + height, left : left + width]


class AugmentedDataset(Dataset[Sample]):
    """A data set whose samples go through an augmentation each time they are read.

    Args:
        dataset: a map-style data set of samples.
        augmentation: takes a sample and returns the changed one, for instance `RandomScaleCropFlip`.
    """

    def __init__(self, dataset: Dataset[Sample], augmentation: Callable[[Sample], Sample]) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's base class leaves the length out

    def __getitem__(self, index: int) -> Sample:
        return self.augmentation(self.dataset[index])


def _draw(count: int) -> int:
    return int(torch.randint(count, ()))
