"""Moves image, segmentation map and masks of a sample together, so that every pixel keeps its label."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..image_processing_maskformer import resize_nearest
from ..image_processing_maskformer_settings import ImageProcessorSettings
from .sample import Sample

LABEL_FIELDS = ("segmentation_map", "masks")


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Scales to `size` (height, width): the image bilinearly, labels to the value at the centre of each pixel."""
    image = sample["image"].resize(size[::-1], Image.Resampling.BILINEAR)
    return _changed(sample, image, lambda labels: resize_nearest(torch.from_numpy(labels), size).numpy())


def resize_shortest_edge(sample: Sample, short_edge: int, max_size: int | None = None) -> Sample:
    """Scales to a length of the shorter side, unless the longer one would exceed `max_size`."""
    # The image processor's own rule, so that images are rounded alike in training and afterwards.
    longest = {} if max_size is None else {"longest_edge": max_size}
    rule = ImageProcessorSettings(size={"shortest_edge": short_edge, **longest})
    return resize(sample, rule.resized_size((sample["image"].height, sample["image"].width)))


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cuts out a window that lies within the image."""
    image = sample["image"].crop((left, top, left + width, top + height))
    return _changed(sample, image, lambda labels: labels[..., top : top + height, left : left + width])


def mirror(sample: Sample) -> Sample:
    """Mirrors left and right."""
    image = sample["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _changed(sample, image, lambda labels: labels[..., ::-1])


def tidy(sample: Sample) -> Sample:
    """Drops masks without a pixel, with their labels, and gives arrays that own their memory.

    torch takes no mirrored view, and a crop that is a view would keep the whole array alive. A map needs no more: a
    segment without a pixel is none.
    """
    if "masks" not in sample:
        return {**sample, "segmentation_map": np.ascontiguousarray(sample["segmentation_map"])}
    is_there = sample["masks"].any(axis=(1, 2))
    return {
        **sample,
        "masks": np.ascontiguousarray(sample["masks"][is_there]),
        "labels": sample["labels"][is_there],
        "iscrowd": sample["iscrowd"][is_there],
    }


def _changed(sample: Sample, image: Image.Image, change: Any) -> Sample:
    changed: Any = {**sample, "image": image}
    for name in LABEL_FIELDS:
        if name in sample:
            changed[name] = change(changed[name])
    return changed
