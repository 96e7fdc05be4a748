"""The sample form that every data reader delivers, and how stored images become one."""

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
    `do_reduce_labels`) or, where `instance_id_to_semantic_id` is given, ids which that table maps to labels. Ids in
    `crowd_ids` stand for groups of objects: evaluation knows them, training leaves their pixels out.

    Segments that may overlap: `masks` is (N, H, W) bool, `labels` (N,) int64 class ids from 0, and
    `iscrowd` (N,) bool, which is left out where there are no crowds (see `crowds_of`). `area` is (N,) float64, the
    areas in pixels by which COCO's evaluation sorts objects, where the data give others than those of the masks.
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
    # COCO's files hold 0 and 1, which numpy and torch would take for positions.
    return np.asarray(sample.get("iscrowd", np.zeros(len(sample["labels"]))), dtype=bool)


def read_crowd(entry: Mapping[str, Any], source: str) -> bool:
    """Whether an entry's `iscrowd` says that it is one. Raises a ValueError for what is neither true nor false."""
    value = entry.get("iscrowd")
    if value not in (None, 0, 1):
        raise ValueError(f"{source} has the iscrowd {value!r}. Give 0 or 1.")
    return bool(value)


def load_image(path: Path) -> Image.Image:
    """Reads and decodes an image file completely, or raises a ValueError that names it."""
    try:
        # From memory, so that no handle stays open in a long-lived worker, whatever the format.
        return decode_image(path.read_bytes())
    # Decoders meet damage with OSError, SyntaxError, EOFError, struct.error and more.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image ({error}). Replace the file or remove it.") from error


def decode_image(content: bytes) -> Image.Image:
    """The image in a file, as it is stored, upright or not. Raises errors of Pillow, of many kinds."""
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
    """Builds a sample from an RGB image, masks (N, H, W), their labels, and the list of the objects.

    That one has `iscrowd` and `area`, and `source` says in error messages where it comes from. Raises a ValueError for
    what is none of these.
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
            raise ValueError(
                f"{source}: object {number} has the area {area!r}. Give its pixels, or leave the area out."
            )
    if None not in areas:
        sample["area"] = np.array(areas, dtype=np.float64)
    return sample


def fit_image(image: Image.Image, size: tuple[int, ...], image_source: str, map_source: str) -> Image.Image:
    """Gives a stored image upright and as RGB. Raises a ValueError unless it has the `size` (H, W) of its labels."""
    image = to_rgb(_orient(image, size[::-1]), image_source)
    check_sizes(image, size, image_source, map_source)
    return image


def check_sizes(image: Image.Image, size: tuple[int, ...], image_source: str, map_source: str) -> None:
    """Raises a ValueError unless the labels, of `size` (H, W), have one pixel for each of the image."""
    if size != (image.height, image.width):
        raise ValueError(
            f"{map_source} is {' x '.join(map(str, size))} (height x width), but its image {image_source} is "
            f"{image.height} x {image.width}. Export both at the same size."
        )


def empty_masks(num_masks: int, size: tuple[int, int], source: str) -> np.ndarray:
    """Masks (num_masks, H, W), bool, without a pixel. Raises a ValueError if they would take above 8 GB.

    A few bytes of a file list an object, and a few a large image of one colour.
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
    # Cameras store a turned picture as an EXIF tag on the sensor's grid. Annotation tools draw on the upright
    # picture, so the tag is applied; but some data sets hold maps on the stored grid, and then the sizes of a
    # quarter turn tell. Where both grids fit (square images, half turns), upright is by far the more common.
    # Map files are taken as they are: what writes them sets no such tag.
    upright = ImageOps.exif_transpose(image)
    return image if upright.size != map_size and image.size == map_size else upright


def to_rgb(image: Image.Image, source: str) -> Image.Image:
    """Converts to RGB as the image processor does; raises a ValueError that names the source for modes I and F."""
    try:
        return convert_to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{source} cannot be taken as a picture: {error}") from error


def check_is_exact(image: Image.Image, source: str) -> None:
    """Raises a ValueError for a label map in a format that changes numbers, whatever the name of its file says."""
    if image.format in ("JPEG", "MPO"):
        raise ValueError(
            f"{source} is a JPEG, which changes labels where they meet. Export the label maps again, as PNG."
        )


def _to_segmentation_map(image: Image.Image, source: str) -> np.ndarray:
    check_is_exact(image, source)
    if image.mode not in MODES_OF_SEGMENTATION_MAPS:
        raise ValueError(
            f"{source} has mode {image.mode} ({', '.join(image.getbands())}), but a segmentation map has one integer "
            "channel that holds the class of each pixel. Convert colours to class indices, keep one grey channel, or "
            "save numbers with a decimal point as whole ones."
        )
    # uint16 has hardly any operators in torch, hence int32 for whatever exceeds 8 bits.
    return stored_values(image).astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)
