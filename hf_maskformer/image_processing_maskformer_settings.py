"""The settings of the image processor: their valid values, and their names in older files."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from transformers.image_utils import SizeDict

from .post_processing_maskformer_inputs import MAX_EDGE, Size, checked_label_ids

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # by PIL's numbers
MAX_PIXELS = 2**28  # 3.2 GB as float32
SEGMENTATION_TASKS = ("semantic", "instance", "panoptic")
# transformers' own.
DEFAULT_PANOPTIC_THRESHOLDS = {"threshold": 0.5, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.8}
DEFAULT_INSTANCE_THRESHOLD = 0.5
DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}

_DEFAULT_SIZE_DIVISOR = 32
_SIZE_FORMS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}, {"max_height", "max_width"})

# transformers' files may hold these; here each has a single valid value.
FIXED_SETTINGS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_pad": True,
    "do_center_crop": False,
    "default_to_square": False,
    "data_format": "channels_first",
    "crop_size": None,
    "device": "cpu",
    "input_data_format": None,
    "return_tensors": None,
    "image_seq_length": None,
}
_BOOKKEEPING_SETTINGS = {"disable_grouping", "_max_size", "_valid_processor_keys", "_processor_class"}
# They choose among transformers' implementations; here there is one.
_BOOKKEEPING_SETTINGS |= {"use_fast", "backend"}
_TYPES: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("do_resize", "do_rescale", "do_normalize", "do_reduce_labels"), "true or false", bool),
    (("size_divisor", "ignore_index", "num_labels"), "an integer", Integral),
    (("rescale_factor",), "a number", Real),
    (("size", "pad_size", "panoptic_thresholds"), "a dictionary of numbers", Mapping),
)


@dataclass
class ImageProcessorSettings:
    """The settings that `MaskFormerImageProcessor` documents. Raises ValueError for an invalid value."""

    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_SIZE))
    size_divisor: int = _DEFAULT_SIZE_DIVISOR
    resample: int = 2
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    ignore_index: int | None = None
    do_reduce_labels: bool = False
    num_labels: int | None = None
    pad_size: dict[str, int] | None = None
    label_ids_to_fuse: list[int] | None = None
    segmentation_task: str | None = None
    panoptic_thresholds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for names, kind, types in _TYPES:
            for name in names:
                given = getattr(self, name)
                value = plain(given)
                is_number_by_accident = isinstance(value, bool) and types is not bool
                if value is not None and (not isinstance(value, types) or is_number_by_accident):
                    raise ValueError(f"{name} is {repr(given)[:60]}, but must be {kind}.")
                setattr(self, name, value)
        self.size_divisor = self.size_divisor or 0  # an attribute may have been set to None
        self.size = _checked_size("size", self.size, _SIZE_FORMS)
        if self.pad_size is not None:
            self.pad_size = _checked_size("pad_size", self.pad_size, ({"height", "width"},))
        if not 0 <= self.size_divisor <= MAX_EDGE:
            raise ValueError(
                f"size_divisor is {self.size_divisor}; give an integer up to {MAX_EDGE}, or 0 not to round up."
            )
        if not isinstance(self.resample, int) or self.resample not in RESAMPLING:
            known = ", ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
            raise ValueError(f"resample is {self.resample!r}; known are {known}.")
        self.resample = int(self.resample)
        if not 0 < self.rescale_factor < math.inf:
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}; give a number above 0, such as 1 / 255.")
        self.image_mean = _three_channels("image_mean", self.image_mean)
        self.image_std = _three_channels("image_std", self.image_std)
        if not all(self.image_std):
            raise ValueError(f"image_std is {self.image_std}; images are divided by it, so it must not contain a zero.")
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}; give the number of labels, or None not to check them.")
        if self.segmentation_task not in (None, *SEGMENTATION_TASKS):
            known = ", ".join(SEGMENTATION_TASKS)
            raise ValueError(f"segmentation_task is {self.segmentation_task!r}; give one of {known}, or None.")
        if self.panoptic_thresholds is not None and not _are_thresholds(self.panoptic_thresholds):
            raise ValueError(
                f"panoptic_thresholds is {self.panoptic_thresholds}; give numbers from 0 to 1 for some of "
                f"{', '.join(DEFAULT_PANOPTIC_THRESHOLDS)}."
            )
        if self.label_ids_to_fuse is not None:
            self.label_ids_to_fuse = sorted(map(int, checked_label_ids(self.label_ids_to_fuse)))

    def resized_size(self, size: Size) -> Size:
        """The resized size of an image of this size: rounded half up, as in the original, and at least one pixel."""
        if not self.do_resize:
            return size
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        if "max_height" in self.size:
            scale = min(self.size["max_height"] / size[0], self.size["max_width"] / size[1])
            edges = [edge * scale for edge in size]
        else:
            # In the original's order of operations: at a tie, common for images of 1 : 2, the last bit decides.
            shortest, longest = self.size["shortest_edge"], self.size.get("longest_edge", math.inf)
            edges = [float(shortest) if edge == min(size) else shortest / min(size) * edge for edge in size]
            if max(edges) > longest:
                edges = [edge * (longest / max(edges)) for edge in edges]
        return max(1, int(edges[0] + 0.5)), max(1, int(edges[1] + 0.5))

    def padded_size(self, sizes: Sequence[Size]) -> Size:
        """The size of a batch that holds images of these sizes. Raises a ValueError if there is none."""
        if self.pad_size is None:
            divisor = self.size_divisor or 1
            height, width = (math.ceil(max(edges) / divisor) * divisor for edges in zip(*sizes, strict=True))
        else:
            height, width = self.pad_size["height"], self.pad_size["width"]
            for index, size in enumerate(sizes):
                if size[0] > height or size[1] > width:
                    raise ValueError(
                        f"Image {index} is {size[0]} x {size[1]} after resizing and does not fit into pad_size "
                        f"{height} x {width} (height x width); give a larger pad_size or a smaller size."
                    )
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"Images would be {height} x {width} after resizing and padding, more than {MAX_PIXELS} pixels. Give a "
                "smaller size, with a longest_edge, or leave out extremely narrow images."
            )
        return height, width


SETTINGS = {setting.name for setting in fields(ImageProcessorSettings)}
OLD_SETTINGS = {"reduce_labels", "size_divisibility", "max_size"}
_MAY_BE_NONE = {setting.name for setting in fields(ImageProcessorSettings) if setting.default is None}


def current_settings(given: Mapping[str, Any], known_size: Mapping[str, int]) -> dict[str, Any]:
    """Translates settings from files of any year to today's, dropping those with a single valid value.

    Args:
        given: settings by name. None means "not given" where it is not itself a valid value, and 0 for size_divisor.
        known_size: the `size` of which an integer `size` or a `max_size` changes one edge.

    Raises:
        ValueError: a setting is unknown, not supported or contradicts another.
    """
    _check_names(given)
    known = SETTINGS | OLD_SETTINGS
    settings = {name: given[name] for name in given.keys() & known if given[name] is not None or name in _MAY_BE_NONE}
    if "size_divisor" in given:
        settings.setdefault("size_divisor", 0)
    _take_old_name(settings, "reduce_labels", "do_reduce_labels", default=False)
    _take_old_name(settings, "size_divisibility", "size_divisor", default=_DEFAULT_SIZE_DIVISOR)
    max_size = settings.pop("max_size", None)
    if "size" in settings or max_size is not None:
        settings["size"] = _read_size(settings.get("size"), max_size, known_size)
    if isinstance(settings.get("pad_size"), Integral):
        settings["pad_size"] = {"height": settings["pad_size"], "width": settings["pad_size"]}
    return settings


def unknown_settings(given: Mapping[str, Any]) -> set[str]:
    """The names among these that the processor does not know."""
    return given.keys() - SETTINGS - OLD_SETTINGS - _BOOKKEEPING_SETTINGS - FIXED_SETTINGS.keys()


def _check_names(given: Mapping[str, Any]) -> None:
    for name in unknown_settings(given):
        known = ", ".join(sorted(SETTINGS))
        raise ValueError(f"{name}={given[name]!r} is not a setting of MaskFormerImageProcessor; it has {known}.")
    for name in given.keys() & FIXED_SETTINGS.keys():
        if given[name] is not None and given[name] != FIXED_SETTINGS[name]:
            raise ValueError(f"{name}={given[name]!r} is not supported; only {FIXED_SETTINGS[name]!r} is.")


def _take_old_name(settings: dict[str, Any], old: str, new: str, default: Any) -> None:
    """Moves a setting from 2022 to its new name."""
    if old not in settings:
        return
    value = settings.pop(old)
    # transformers does not know the old names: when it saves such a file again, it adds its own defaults.
    if settings.get(new, default) not in (default, value):
        raise ValueError(f"{old}={value!r} contradicts {new}={settings[new]!r}, its new name; keep only {new}.")
    settings[new] = value


def _read_size(size: Any, max_size: int | None, known_size: Mapping[str, int]) -> dict[str, int]:
    """Returns the edges that a size in any of its forms means."""
    size = plain(size)
    known_edges = known_size if "shortest_edge" in known_size else DEFAULT_SIZE
    if size is None or isinstance(size, Integral):
        edges = dict(known_edges) if size is None else {**known_edges, "shortest_edge": plain(size)}
        return edges if max_size is None else {**edges, "longest_edge": max_size}
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if not is_pair and not isinstance(size, Mapping):
        raise ValueError(f"size is {str(size)[:60]!r}; give an integer, (height, width) or a dictionary of edges.")
    edges = {"height": size[0], "width": size[1]} if is_pair else dict(size)
    if edges.keys() == {"height", "width"} and max_size == DEFAULT_SIZE["longest_edge"]:
        return edges  # files from 2022 have this beside any size, where it had no effect
    if edges.keys() == {"shortest_edge"} and max_size is not None:
        return {**edges, "longest_edge": max_size}
    if max_size is not None and edges.get("longest_edge") != max_size:
        raise ValueError(f"max_size={max_size} contradicts size={edges}; give it as the longest_edge of size instead.")
    return edges


def _checked_size(name: str, size: Any, forms: Sequence[set[str]]) -> dict[str, int]:
    if not isinstance(size, Mapping) or set(size) not in forms:
        known = " or ".join(str(sorted(form)) for form in forms)
        raise ValueError(f"{name} is {size!r}; give a dictionary with {known}.")
    if not all(type(edge) is int and 0 < edge <= MAX_EDGE for edge in size.values()):  # True is an int too
        raise ValueError(f"{name} is {size}; every edge must be a positive integer, at most {MAX_EDGE}.")
    return dict(size)


def _are_thresholds(values: Any) -> bool:
    return (
        isinstance(values, Mapping)
        and values.keys() <= DEFAULT_PANOPTIC_THRESHOLDS.keys()
        and _are_all(values.values(), Real)
        and all(0 <= value <= 1 for value in values.values())
    )


def _are_all(values: Any, kind: type) -> bool:
    return isinstance(values, Collection) and all(isinstance(value, kind) for value in values)


def _three_channels(name: str, value: float | Sequence[float]) -> list[float]:
    channels: Any = [value] * 3 if isinstance(value, int | float) else value
    if not _are_all(channels, Real) or len(channels) != 3 or not all(map(math.isfinite, channels)):
        raise ValueError(f"{name} is {value!r}; give three numbers, for red, green and blue.")
    return plain(list(channels))


def plain(value: Any) -> Any:
    """A setting in Python's own types, as JSON has them: not numpy's numbers, nor transformers' `SizeDict`."""
    if isinstance(value, Mapping | SizeDict):
        return {name: plain(number) for name, number in dict(value).items()}
    if isinstance(value, list | tuple):
        return [plain(number) for number in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
