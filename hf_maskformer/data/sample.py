"""The sample format that every data reader returns, and how stored images become one."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL import Image, ImageOps

from ..image_processing_maskformer_images import open_image, stored_values
from ..image_processing_maskformer_images import to_rgb as convert_to_rgb
from ..image_processing_maskformer_targets import MAX_MASK_BYTES

# 1 bit, 8 bit, 8 bit with a palette (whose indices are the labels), 16 bit in three byte orders, 32 bit.
MODES_OF_SEGMENTATION_MAPS = ("1", "L", "P", "I;16", "I;16L", "I;16B", "I")


class Sample(TypedDict):
    """One labelled image, in one of two forms; H and W are those of `image` (RGB).

    `name` identifies the sample in messages and in names of written files.

    Segments that do not overlap: `segmentation_map` is (H, W) integers. Its pixels are labels as in the files (before
    `do_reduce_labels`) or, if `instance_id_to_semantic_id` is given, ids which that table maps to labels. Ids in
    `crowd_ids` are crowds (groups of objects): evaluation uses them, training ignores their pixels.

    Segments that may overlap: `masks` is (N, H, W) bool, `labels` (N,) int64 class ids from 0, and
    `iscrowd` (N,) bool, omitted if there are no crowds (see `crowds_of`). `area` is (N,) float64, the areas in pixels
    that COCO's evaluation uses for its size ranges, if the data give others than those of the masks.
    """

    image: Image.Image
    name: str
    segmentation_map: NotRequired[np.ndarray]
    instance_id_to_semantic_id: NotRequired[dict[int, int]]
    crowd_ids: NotRequired[tuple[int, ...]]
    masks: NotRequired[np.ndarray]
    labels: NotRequired[np.ndarray]
    iscrowd: NotRequired[np.ndarray]
    area: NotRequired[np.ndarray]


def crowds_of(sample: Sample) -> np.ndarray:
    """Which of a sample's masks are crowds, (N,) bool."""
    # COCO's files hold 0 and 1, which numpy and torch would treat as indices.
    return np.asarray(sample.get("iscrowd", np.zeros(len(sample["labels"]))), dtype=bool)


def required_fields(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that a sample must have: one with masks, or one with a segmentation map."""
    return ("image", "masks", "labels", "name") if "masks" in sample else ("image", "segmentation_map", "name")


def read_crowd(entry: Mapping[str, Any], source: str) -> bool:
    """Whether an entry is a crowd. Raises a ValueError if its `iscrowd` is neither true nor false."""
    value = entry.get("iscrowd")
    if value not in (None, 0, 1):
        raise ValueError(f"{source} has the iscrowd {value!r}. Give 0 or 1.")
    return bool(value)


def load_image(path: Path) -> Image.Image:
    """Reads and decodes an image file completely, or raises a ValueError that names it."""
    try:
        # From memory, so that no file handle stays open in a long-lived worker, whatever the format.
        return decode_image(path.read_bytes())
    # On damaged files decoders raise OSError, SyntaxError, EOFError, struct.error and more.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Replace the file or remove it.") from error


def decode_image(content: bytes) -> Image.Image:
    """Decodes an image file without applying its EXIF orientation. Raises Pillow's errors, of many kinds."""
    image = open_image(io.BytesIO(content))
    image.load()
    return image


def make_sample(name: str, image: Image.Image, label_image: Image.Image, image_source: str, map_source: str) -> Sample:
    """Builds a sample from an image and its label map as they are stored.

    `image_source` and `map_source` say in error messages where the two come from. Raises a ValueError if the label
    map has several channels, the image has mode I or F, or if their sizes differ.
    """
    segmentation_map = _to_segmentation_map(label_image, map_source)
    image = fit_image(image, segmentation_map.shape, image_source, map_source)
    return {"image": image, "segmentation_map": segmentation_map, "name": name}


def make_sample_of_masks(
    name: str,
    image: Image.Image,
    masks: np.ndarray,
    labels: Sequence[int],
    objects: Sequence[Mapping[str, Any]],
    source: str,
) -> Sample:
    """Builds a sample from an RGB image, masks (N, H, W), their labels, and a list of the objects.

    The list may give `iscrowd` and `area`; `source` says in error messages where it comes from. Raises a ValueError for
    an invalid one.
    """
    sample: Sample = {
        "image": image,
        "name": name,
        "masks": masks,
        "labels": np.array(labels, dtype=np.int64),
        "iscrowd": np.array([read_crowd(entry, source) for entry in objects], dtype=bool),
    }
    areas = [entry.get("area") for entry in objects]
    for number, area in enumerate(areas):
        if area is not None and (not isinstance(area, int | float) or not 0 <= area < math.inf):
            raise ValueError(f"{source}: object {number} has the area {area!r}. Give its pixel count, or leave it out.")
    if None not in areas:
        sample["area"] = np.array(areas, dtype=np.float64)
    return sample


def fit_image(image: Image.Image, size: tuple[int, ...], image_source: str, map_source: str) -> Image.Image:
    """Returns a stored image upright and as RGB. Raises a ValueError unless it has the `size` (H, W) of its labels."""
    image = to_rgb(_orient(image, size[::-1]), image_source)
    check_sizes(image, size, image_source, map_source)
    return image


def check_sizes(image: Image.Image, size: tuple[int, ...], image_source: str, map_source: str) -> None:
    """Raises a ValueError unless the labels, of `size` (H, W), have the size of the image."""
    if size != (image.height, image.width):
        raise ValueError(
            f"{map_source} is {' x '.join(map(str, size))} (height x width), but its image {image_source} is "
            f"{image.height} x {image.width}. Export both at the same size."
        )


def empty_masks(num_masks: int, size: tuple[int, int], source: str) -> np.ndarray:
    """Empty masks (num_masks, H, W), bool. Raises a ValueError if they would take more than 8 GB.

    A tiny file can list many objects, or hold a huge image of one colour.
    """
    if num_masks * size[0] * size[1] > MAX_MASK_BYTES:
        raise ValueError(
            f"{source} has {num_masks} masks of {size[0]} x {size[1]} pixels, more than {MAX_MASK_BYTES / 1e9:.0f} GB. "
            "Make the image smaller, or remove objects."
        )
    return np.zeros((num_masks, *size), dtype=bool)


def check_file_name(name: Any, folder: Path, source: str) -> None:
    """Raises a ValueError unless a file name that a data set lists stays inside its folder."""
    path = name.replace("\\", "/") if isinstance(name, str) else ""
    if not path or "\0" in path or os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError(f"{source} has the file name {name!r}, which is not one inside {folder}.")


def _orient(image: Image.Image, map_size: tuple[int, ...]) -> Image.Image:
    # Cameras store pixels as the sensor read them, with an EXIF orientation tag. Annotation tools draw on the upright
    # image, so the tag is applied; but some data sets have maps of the image as stored, which a quarter turn's swapped
    # sizes reveal. If both fit (square images, half turns), upright is by far the more common.
    # Map files are used as they are: tools that write them set no such tag.
    upright = ImageOps.exif_transpose(image)
    return image if upright.size != map_size and image.size == map_size else upright


def to_rgb(image: Image.Image, source: str) -> Image.Image:
    """Converts to RGB as the image processor does; raises a ValueError naming the source for modes I and F."""
    try:
        return convert_to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{source} cannot be used as an image: {error}") from error


def check_is_exact(image: Image.Image, source: str) -> None:
    """Raises a ValueError for a label map in a lossy format, whatever its file is called."""
    if image.format in ("JPEG", "MPO"):
        raise ValueError(f"{source} is a JPEG, which is lossy and changes labels. Export the label maps again, as PNG.")


def _to_segmentation_map(image: Image.Image, source: str) -> np.ndarray:
    check_is_exact(image, source)
    if image.mode not in MODES_OF_SEGMENTATION_MAPS:
        raise ValueError(
            f"{source} has mode {image.mode} ({', '.join(image.getbands())}), but a segmentation map has one integer "
            "channel that holds the class of each pixel. Convert colours to class indices, keep one grey channel, or "
            "save floating-point values as integers."
        )
    # torch has hardly any operators for uint16, hence int32 for more than 8 bits.
    return stored_values(image).astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)
