"""Converts the segment encodings of files to the map of ids in a sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..image_processing_maskformer_images import stored_values
from ..image_processing_maskformer_targets import ids_of_colors
from .labels import LabelSet, shorten
from .sample import Sample, check_is_exact, fit_image, read_crowd

# The first id in the map of a sample is above every 8-bit value, since the ignored value usually has 8 bits.
_FIRST_ID = 256

Segments = tuple[np.ndarray, dict[int, int], tuple[int, ...]]


def make_sample_of_segments(
    name: str, image: Image.Image, segments: Segments, image_source: str, map_source: str
) -> Sample:
    """Builds a sample from an image as stored and its segments; otherwise as `make_sample`."""
    segmentation_map, label_of_number, crowd_ids = segments
    return {
        "image": fit_image(image, segmentation_map.shape, image_source, map_source),
        "name": name,
        "segmentation_map": segmentation_map,
        "instance_id_to_semantic_id": label_of_number,
        "crowd_ids": crowd_ids,
    }


def _read_ids(image: Image.Image, segments_info: Sequence[Mapping[str, Any]], source: str) -> np.ndarray:
    """The ids (H, W) in an image with one integer channel, or in colours: red + 256 green + 65536 blue, as in COCO.

    The colours of a palette are ids if all of them are listed; otherwise the palette is for viewing only. Alpha is not
    part of an id.
    """
    check_is_exact(image, source)
    values = stored_values(image)
    if image.mode == "P":
        ids = ids_of_colors(np.asarray(image.convert("RGB")))
        listed = [str(segment.get("id")) for segment in segments_info if isinstance(segment, Mapping)]
        return ids if set(map(str, np.unique(ids).tolist())) <= {"0", *listed} else values.astype(np.int32)
    if image.mode in ("RGB", "RGBA"):
        return ids_of_colors(values)
    if values.ndim == 2 and values.dtype.kind in "bui":
        return values.astype(np.int32)
    raise ValueError(f"{source} has mode {image.mode}; segment ids are stored as RGB or in one integer channel.")


def number_segments(
    image: Image.Image, segments_info: Sequence[Mapping[str, Any]], labels: LabelSet, source: str
) -> Segments:
    """Numbers the segments of an image of ids in list order, starting at 256 or a little above.

    Args:
        image: the ids in one integer channel or as colours; 0 is void unless it is listed.
        segments_info: `id` and `category_id` of each segment, and optionally `iscrowd`.
        labels: gives the label of a category, and the value of void in the result.
        source: where the image comes from, for messages.

    Returns:
        The map (H, W) int32, the label of each of its ids, and the ids of crowds.

    Raises:
        ValueError: the image holds no ids, an id is missing from the list or listed twice, or a category is unknown.
    """
    ids = _read_ids(image, segments_info, source)
    number_of_id: dict[int, int] = {}
    label_of_number: dict[int, int] = {}
    crowd_ids = []
    for number, segment in enumerate(segments_info, start=_first_id(len(segments_info), labels.ignore_index)):
        segment_id = _integer(segment, "id", source)
        if segment_id in number_of_id:
            raise ValueError(f"{source}: segments_info lists the id {segment_id} twice. Give each segment its own id.")
        number_of_id[segment_id] = number
        category_id = _integer(segment, "category_id", source)
        label_of_number[number] = labels.label_of(category_id, f"{source}: segment {segment_id}")
        if read_crowd(segment, f"{source}: segment {segment_id}"):
            crowd_ids.append(number)
    number_of_id.setdefault(0, labels.ignore_index)

    numbers, unknown = renumber(ids, number_of_id)
    if unknown:
        raise ValueError(
            f"{source} contains the ids {shorten(unknown)}, which its segments_info does not list. List them, or set "
            "their pixels to 0 if they are void."
        )
    return numbers, label_of_number, tuple(crowd_ids)


def renumber(ids: np.ndarray, number_of_id: Mapping[int, int]) -> tuple[np.ndarray, list[int]]:
    """The number of each id in a map (H, W), int32, and the ids that have none, whose pixels then mean nothing."""
    known = np.array(sorted(number_of_id))
    numbers = np.array([number_of_id[segment_id] for segment_id in known.tolist()], dtype=np.int32)
    positions = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return numbers[positions], np.unique(ids[known[positions] != ids]).tolist()


def split_class_and_instance(image: Image.Image, ignore_index: int, source: str) -> Segments:
    """Reads an image whose red channel is the class of a pixel and whose green channel is its instance.

    Pixels of class `ignore_index` are void. Returns what `number_segments` does; there are no crowds.
    """
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{source} has mode {image.mode}; red must be the class and green the instance of a pixel.")
    channels = np.asarray(image)
    pairs = 256 * channels[..., 0].astype(np.int32) + channels[..., 1]
    present = np.flatnonzero(np.bincount(pairs.ravel(), minlength=2**16))
    segments = present[present // 256 != ignore_index]
    number_of_pair = np.full(2**16, ignore_index, dtype=np.int32)
    start = _first_id(len(segments), ignore_index)
    number_of_pair[segments] = np.arange(start, start + len(segments))
    label_of_number = dict(enumerate((segments // 256).tolist(), start=start))
    return number_of_pair[pairs], label_of_number, ()


def _first_id(num_segments: int, ignore_index: int) -> int:
    """The first segment id of an image, chosen so that no id is the ignored value."""
    return ignore_index + 1 if _FIRST_ID <= ignore_index < _FIRST_ID + num_segments else _FIRST_ID


def _integer(segment: Mapping[str, Any], field: str, source: str) -> int:
    value = segment.get(field) if isinstance(segment, Mapping) else None
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ValueError(f"{source}: segments_info has the entry {str(segment)[:80]}, whose {field} is not an integer.")
    return int(value)
