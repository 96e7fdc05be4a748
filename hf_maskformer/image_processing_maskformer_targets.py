"""From segmentation maps to training targets: which segments an image has, where they are and what their labels are.

N_i segments in image i, H x W the padded size of the batch. A segmentation map is (height, width) integers: labels, or
ids of segments whose labels are in a dictionary ("instance labels" below). It stays a map until the very end, and an
array: numpy does this work on one thread. torch's threads would synchronise after each short operation, and wait for
each other many times as long as it takes where other programs are running.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_processing_maskformer_images import read_upright, resize_nearest, stored_values, zeros
from .image_processing_maskformer_settings import ImageProcessorSettings
from .post_processing_maskformer_inputs import Size

# Above this, masks are not usable as targets: a few bytes of a file can ask for any number of segments.
MAX_MASK_BYTES = 8 * 10**9
# Pads class labels in their tensor form; cross-entropy ignores this value by default.
NO_LABEL = -100
# Means "ignore" when the settings do not set another value; 8-bit maps use it.
COMMON_IGNORE_VALUE = 255
MAX_LABELS = 2**63  # labels are int64

InstanceLabels = Mapping[int, int] | None
Device = str | torch.device | None


def read_segmentation_map(segmentation_map: Any, index: int, has_ids: bool) -> np.ndarray:
    """Reads the map of image `index`, in any form that `preprocess` takes: integers (height, width).

    Three 8-bit channels are read as COCO panoptic ids. `has_ids` says whether there are labels of ids.

    Raises:
        ValueError: it is something else, is damaged or does not hold integers, or is grey and there are no ids.
    """
    if isinstance(segmentation_map, Tensor):
        segmentation_map = segmentation_map.detach().cpu().numpy()
    if not isinstance(segmentation_map, str | Path | np.ndarray | Image.Image):
        kind = type(segmentation_map).__name__
        raise ValueError(
            f"Segmentation map {index} is a {kind}; give a PIL image, an array, a tensor, a path or a URL."
        )
    source = f" ({segmentation_map})" if isinstance(segmentation_map, str | Path) else ""
    try:
        if isinstance(segmentation_map, str | Path):
            # In its own mode: pixels of a palette image are indices, which are the labels.
            segmentation_map = read_upright(segmentation_map)
        is_image = isinstance(segmentation_map, Image.Image)
        values = stored_values(segmentation_map) if is_image else np.asarray(segmentation_map)
    except Exception as error:  # damage shows when a file is decoded
        raise ValueError(f"Segmentation map {index}{source} cannot be read: {error}") from error
    if is_coloured(values):
        if not has_ids and (values == values[..., :1]).all():
            raise ValueError(
                f"Segmentation map {index} is grey, but has three channels, which would be read as COCO panoptic "
                'colours. If it holds labels or plain ids, give one channel: image.convert("L"), or array[..., 0]. If '
                "it holds ids as R + 256 G + 65536 B, pass instance_id_to_semantic_id."
            )
        values = ids_of_colors(values)
    elif values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            f"Segmentation map {index} has shape {values.shape} and type {values.dtype}; give integers (height, "
            "width), or COCO panoptic colours, (height, width, 3) uint8."
        )
    if values.size == 0:
        raise ValueError(f"Segmentation map {index} has shape {values.shape}, so it holds no pixel.")
    return values.astype(np.uint8) if values.dtype.kind == "b" else values


def is_single_map(segmentation_map: Any, num_images: int) -> bool:
    """Whether an array or tensor of three dimensions is one map with its channels last, and not a stack of maps."""
    if not isinstance(segmentation_map, np.ndarray | Tensor) or segmentation_map.ndim != 3:
        return False
    return is_coloured(segmentation_map) or (segmentation_map.shape[-1] == 1 and num_images == 1)


def is_coloured(segmentation_map: Any) -> bool:
    """Whether an array or tensor is one map in COCO panoptic colours, (height, width, 3) uint8."""
    if not isinstance(segmentation_map, np.ndarray | Tensor):
        return False
    is_bytes = segmentation_map.dtype in (np.uint8, torch.uint8)
    return is_bytes and segmentation_map.ndim == 3 and segmentation_map.shape[-1] == 3


def ids_of_colors(colors: np.ndarray) -> np.ndarray:
    """The ids (height, width), int32, that COCO panoptic colours encode: R + 256 G + 65536 B."""
    channels = colors.astype(np.int32)
    return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


def check_ignore_value(settings: ImageProcessorSettings, target_format: str) -> None:
    """Raises ValueError if the value that means "ignore" by default is also a label."""
    highest = (settings.num_labels or 0) - 1 + bool(settings.do_reduce_labels)
    uses_common_value = settings.do_reduce_labels or target_format == "label_map"
    if settings.ignore_index is None and uses_common_value and highest >= COMMON_IGNORE_VALUE:
        raise ValueError(
            f"With num_labels {settings.num_labels}, {COMMON_IGNORE_VALUE} in a map is a label, but without "
            "ignore_index it stands for no segment too. Set ignore_index to a value that is not a label, such as 65535 "
            "(and semantic_loss_ignore_index of a per-pixel baseline to the same)."
        )


def check_map_sizes(maps: Sequence[np.ndarray], image_sizes: Sequence[Size]) -> None:
    """Raises ValueError unless there is one map (height, width) for each image, and of its size."""
    if len(maps) != len(image_sizes):
        raise ValueError(
            f"There are {len(image_sizes)} images, but {len(maps)} segmentation maps; give one for each image."
        )
    for index, (segmentation_map, size) in enumerate(zip(maps, image_sizes, strict=True)):
        height, width = segmentation_map.shape
        if (height, width) != size:
            raise ValueError(
                f"Segmentation map {index} is {height} x {width}, but image {index} is {size[0]} x {size[1]} "
                "(height x width); they must have the same size."
            )


def instance_labels_of_images(instance_labels: Any, num_images: int) -> list[InstanceLabels]:
    """Returns each image's dictionary, from one for all or a list.

    Raises ValueError if the list has another length, or ids or labels are strings.
    """
    is_one = instance_labels is None or isinstance(instance_labels, Mapping)
    tables = [instance_labels] * num_images if is_one else list(instance_labels)
    if len(tables) != num_images:
        raise ValueError(
            f"instance_id_to_semantic_id has {len(tables)} dictionaries, but there are {num_images} images; "
            "give one for each, or a single one for all."
        )
    for table in tables[:1] if is_one else tables:
        if not isinstance(table, Mapping | None):
            raise ValueError(f"instance_id_to_semantic_id holds a {type(table).__name__} where a dictionary is needed.")
        for number, label in (table or {}).items():
            if isinstance(number, str) or isinstance(label, str):
                raise ValueError(
                    f"instance_id_to_semantic_id has {number!r}: {label!r}, but ids and labels must be integers. JSON "
                    "turns ids into strings: {int(number): label for number, label in table.items()}."
                )
    return tables


def resized_segments(
    segmentation_map: np.ndarray,
    size: Size,
    settings: ImageProcessorSettings,
    instance_labels: InstanceLabels,
    index: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The segments of a map at another size, as `split_segmentation_map` gives them."""
    if size[0] < segmentation_map.shape[0] or size[1] < segmentation_map.shape[1]:
        return split_segmentation_map(resize_nearest(segmentation_map, size), settings, instance_labels, index)
    # Upsampling loses no segment, and numbering the fewer pixels is less work.
    segment_map, labels = split_segmentation_map(segmentation_map, settings, instance_labels, index)
    return resize_nearest(segment_map, size), labels


def split_segmentation_map(
    segmentation_map: np.ndarray, settings: ImageProcessorSettings, instance_labels: InstanceLabels, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the segments in the map (height, width) of image `index`, in ascending order of their value.

    Returns the index of the segment that owns each pixel, (height, width) int16, -1 for none, and the labels (N_i,)
    int64; the indices are int32 where there are too many for int16. Raises ValueError for a value without a label, or
    whose label is out of range.
    """
    pixels = segmentation_map.ravel()
    # Neighbours nearly always belong together: runs of equal pixels are about a hundredth of all, and quickly sorted.
    starts = np.append(0, np.flatnonzero(pixels[1:] != pixels[:-1]) + 1)
    runs = pixels[starts]
    if runs.dtype in (np.uint8, np.uint16):
        is_present = np.zeros(2**16, dtype=bool)
        is_present[runs] = True
        values, value_of_run = np.flatnonzero(is_present), (is_present.cumsum() - 1)[runs]
    else:
        values, value_of_run = np.unique(runs, return_inverse=True)
    if instance_labels is not None:
        _check_ids(values.tolist(), settings, instance_labels, index)
    labels = [_label_of(value, settings, instance_labels, index) for value in values.tolist()]
    has_label = np.array([label is not None for label in labels])
    index_type = np.int16 if len(values) < 2**15 else np.int32
    segment_of_value = np.where(has_label, has_label.cumsum() - 1, -1).astype(index_type)
    segment_map = np.repeat(segment_of_value[value_of_run], np.diff(starts, append=pixels.size))
    segment_labels = np.array([label for label in labels if label is not None], dtype=np.int64)
    return segment_map.reshape(segmentation_map.shape), segment_labels


def _check_ids(
    ids: Sequence[int], settings: ImageProcessorSettings, instance_labels: Mapping[int, int], index: int
) -> None:
    """Raises ValueError unless all ids in the map of image `index` are valid."""
    unlabelled = {settings.ignore_index, 0} if settings.do_reduce_labels else {settings.ignore_index}
    used = [number for number in ids if number not in unlabelled]
    negative = [number for number in used if number < 0]
    if negative:
        raise ValueError(
            f"Segmentation map {index} contains the negative {_listed(negative)}; ids start at 0. Set "
            f"ignore_index={negative[0]} if such pixels belong to no segment."
        )
    missing = [number for number in used if number not in instance_labels]
    if missing:
        raise ValueError(
            f"Segmentation map {index} contains the {_listed(missing)}, which instance_id_to_semantic_id does not "
            f"contain. Add labels, or set ignore_index={missing[0]} if pixels with this id belong to no segment."
        )


def _listed(ids: Sequence[int], limit: int = 10) -> str:
    shown = ", ".join(map(str, ids[:limit])) + (f", ... ({len(ids)} in all)" if len(ids) > limit else "")
    return f"ids {shown}" if len(ids) > 1 else f"id {shown}"


def _label_of(value: int, settings: ImageProcessorSettings, instance_labels: InstanceLabels, index: int) -> int | None:
    """The label of a value in the map, None if it belongs to no segment.

    The ignore value is a value as in the map, before labels are reduced: so 1 is kept when 0 is ignored and reduced,
    and 255 does not turn into 254.
    """
    if value == settings.ignore_index:
        return None
    label = value
    if instance_labels is not None:
        if value not in instance_labels:  # 0, "other"
            return None
        label = int(instance_labels[value])
    if settings.do_reduce_labels:
        ignored = COMMON_IGNORE_VALUE if settings.ignore_index is None else settings.ignore_index
        if label in (0, ignored):
            return None
        label -= 1
    _check_label(label, settings.num_labels, value, index)
    return label


def _check_label(label: int, num_labels: int | None, value: int, index: int) -> None:
    if 0 <= label < (MAX_LABELS if num_labels is None else num_labels):
        return
    meaning = f"the value {value}" if label == value else f"the value {value}, which means label {label}"
    known = "labels start at 0" if num_labels is None else f"num_labels is {num_labels} (labels 0 to {num_labels - 1})"
    raise ValueError(
        f"Segmentation map {index} contains {meaning}, but {known}. If such pixels belong to no segment, set "
        f"ignore_index={value}; if 0 means 'other' and labels start at 1, set do_reduce_labels=True; if there are "
        "more labels, raise num_labels."
    )


def pad_as_masks(
    segments: Sequence[tuple[np.ndarray, np.ndarray]], size: Size, device: Device = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Makes lists of (N_i, H, W) bool masks and of (N_i,) labels from what `split_segmentation_map` gives."""
    all_masks = []
    for index, (segment_map, labels) in enumerate(segments):
        height, width = segment_map.shape
        if len(labels) * size[0] * size[1] > MAX_MASK_BYTES:
            raise ValueError(
                f"Segmentation map {index} has {len(labels)} segments; masks of {size[0]} x {size[1]} pixels take "
                f'more than {MAX_MASK_BYTES / 1e9:.0f} GB. Use target_format="segment_map", or a smaller size.'
            )
        masks = zeros((len(labels), *size), torch.bool, device)
        within = masks[:, :height, :width]
        indices = np.arange(len(labels), dtype=segment_map.dtype)[:, None, None]
        if within.device.type == "cpu":
            np.equal(segment_map, indices, out=within.numpy())
        else:  # a map is less to transfer than its masks
            within.copy_(torch.from_numpy(segment_map).to(device) == torch.from_numpy(indices).to(device))
        all_masks.append(masks)
    return all_masks, [torch.from_numpy(labels).to(device) for _, labels in segments]


def pad_as_segment_map(
    segments: Sequence[tuple[np.ndarray, np.ndarray]], size: Size, device: Device = None
) -> tuple[Tensor, Tensor]:
    """Makes one (B, H, W) map of segment indices, -1 for none, and (B, max N_i) labels padded with -100.

    The indices are int16, or int32 if there are too many for that, or several processes, which cannot exchange int16.
    """
    most_segments = max(len(labels) for _, labels in segments)
    index_type = np.int32 if is_one_of_several() else np.result_type(*(segment_map for segment_map, _ in segments))
    segment_maps = np.full((len(segments), *size), -1, dtype=index_type)
    class_labels = np.full((len(segments), most_segments), NO_LABEL, dtype=np.int64)
    for index, (segment_map, labels) in enumerate(segments):
        height, width = segment_map.shape
        segment_maps[index, :height, :width] = segment_map
        class_labels[index, : len(labels)] = labels
    return torch.from_numpy(segment_maps).to(device), torch.from_numpy(class_labels).to(device)


def is_one_of_several() -> bool:
    """Whether several processes work together."""
    # The variable is also set in worker processes that load data, which have no process group.
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return has_group or os.environ.get("WORLD_SIZE", "1") != "1"


def pad_as_label_map(
    segments: Sequence[tuple[np.ndarray, np.ndarray]], size: Size, ignore_index: int, device: Device
) -> Tensor:
    """Makes one (B, H, W) int64 map of labels, with `ignore_index`, which must not be a label, for void pixels."""
    label_maps = np.full((len(segments), *size), ignore_index, dtype=np.int64)
    for index, (segment_map, labels) in enumerate(segments):
        if (labels == ignore_index).any():
            raise ValueError(
                f"Segmentation map {index} has segments of label {ignore_index}, which in a label map stands for no "
                "segment. Set ignore_index to a value that is not a label, such as 65535 (and "
                "semantic_loss_ignore_index of a per-pixel baseline to the same)."
            )
        height, width = segment_map.shape
        # -1, no segment, indexes the last entry here.
        label_maps[index, :height, :width] = np.append(labels, ignore_index)[segment_map]
    return torch.from_numpy(label_maps).to(device)
