"""Transforms image, segmentation map and masks of a sample together, so that every pixel keeps its label."""

from typing import Any

import numpy as np
from PIL import Image

from ..image_processing_maskformer_images import nearest_positions
from ..image_processing_maskformer_settings import ImageProcessorSettings
from .sample import Sample, crowds_of

Size = tuple[int, int]
Window = tuple[int, int, int, int]

LABEL_FIELDS = ("segmentation_map", "masks")


def resize(sample: Sample, size: Size, window: Window | None = None) -> Sample:
    """Resizes to `size` (height, width): the image bilinearly, labels to the value at the centre of each pixel.

    With a `window` (top, left, height, width) of the result, only that crop is computed.
    """
    image = sample["image"]
    top, left, height, width = window or (0, 0, *size)
    # Pillow's filter also reads pixels outside the box, so this is exactly a crop of the whole resized image.
    x_step, y_step = image.width / size[1], image.height / size[0]
    box = (left * x_step, top * y_step, (left + width) * x_step, (top + height) * y_step)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    rows = nearest_positions(image.height, size[0])[top : top + height, None]
    columns = nearest_positions(image.width, size[1])[left : left + width]
    return _changed(sample, scaled, lambda labels: labels[..., rows, columns])


def resized_size(image: Image.Image, short_edge: int, max_size: int | None = None) -> Size:
    """The size whose shorter side has this length, unless the longer one would exceed `max_size`."""
    # The image processor's own rule, so that sizes are rounded alike in training and inference.
    longest = {} if max_size is None else {"longest_edge": max_size}
    rule = ImageProcessorSettings(size={"shortest_edge": short_edge, **longest})
    return rule.resized_size((image.height, image.width))


def flip_horizontally(sample: Sample) -> Sample:
    """Flips horizontally."""
    image = sample["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _changed(sample, image, lambda labels: labels[..., ::-1])


def drop_empty_masks(sample: Sample) -> Sample:
    """Drops empty masks, with their labels, and makes the arrays contiguous copies.

    Areas given by the data are dropped too, as they no longer hold.

    torch does not accept a flipped view, and a crop that is a view would keep the whole array alive. Maps need nothing
    else: their empty segments vanish by themselves.
    """
    if "masks" not in sample:
        return {**sample, "segmentation_map": np.ascontiguousarray(sample["segmentation_map"])}
    is_there = sample["masks"].any(axis=(1, 2))
    tidied: Any = {
        **sample,
        "masks": np.ascontiguousarray(sample["masks"][is_there]),
        "labels": sample["labels"][is_there],
        "iscrowd": crowds_of(sample)[is_there],
    }
    tidied.pop("area", None)
    return tidied


def _changed(sample: Sample, image: Image.Image, change: Any) -> Sample:
    changed: Any = {**sample, "image": image}
    for name in LABEL_FIELDS:
        if name in sample:
            changed[name] = change(changed[name])
    return changed
