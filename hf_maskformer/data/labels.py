"""The classes of a data set: their names, which pixels are ignored, and how label files encode them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

FIELDS_OF_CLASSES_JSON = ("id2label", "ignore_index", "do_reduce_labels", "thing_ids", "category_ids", "palette")


@dataclass(frozen=True)
class LabelSet:
    """What the pixel values of a data set's segmentation maps mean.

    Attributes:
        id2label: name of each class; ids are 0 to K - 1.
        ignore_index: value, in the files, of pixels that belong to no class. Ignored in training and evaluation.
        do_reduce_labels: the files number the classes from 1, and 0 is ignored too. The ids here are those after
            the reduction: pixel value 1 is class 0.
        thing_ids: classes with countable instances; the others are stuff. Empty if the data set does not say.
        category_ids: for each class its `category_id` in lists of segments and in maps of ADE20K-Full. Empty if these
            are the class ids themselves.

    Raises:
        ValueError: ids have gaps, a name is not a string or is used twice, `thing_ids` has an unknown class,
            `category_ids` is not one id for each class, or `ignore_index` is also the value of a class or exceeds 32
            bits.
    """

    id2label: dict[int, str]
    ignore_index: int = 255
    do_reduce_labels: bool = False
    thing_ids: tuple[int, ...] = ()
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        if not self.id2label or set(self.id2label) != set(range(self.num_labels)):
            ids = shorten(sorted(self.id2label)) or "(none)"
            raise ValueError(
                f"id2label has the ids {ids}, but ids must be 0 to K - 1 without gaps. Renumber the classes and their "
                "pixels; if only 0 is missing, as it marks ignored pixels, number the classes from 0 and set "
                "do_reduce_labels to true instead."
            )
        repeated = sorted(name for name, count in Counter(self.id2label.values()).items() if count > 1)
        if repeated:
            raise ValueError(f"id2label names several classes {shorten(repeated)}. Give each class its own name.")
        unknown = sorted(set(self.thing_ids) - set(self.id2label))
        if unknown:
            raise ValueError(f"thing_ids names {shorten(unknown)}, which id2label does not contain. Remove them.")
        self._check_category_ids()
        if 0 <= self.ignore_index <= self._highest_value:
            raise ValueError(
                f"ignore_index {self.ignore_index} is also the pixel value of a class (0 to {self._highest_value}"
                f"{', after 0 = ignored' if self.do_reduce_labels else ''}). Set it to a value above, such as 65535, "
                "or take the ignored class out of id2label."
            )

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads a `classes.json`.

        The file holds `{"id2label": {"0": "sky", ...}}` and optionally `ignore_index`, `do_reduce_labels`,
        `thing_ids`, `category_ids` and `palette` (unused here), or `{"0": "sky", ...}` alone, as an `id2label.json`
        on the Hub does. Classes that share a name, as two of ADE20K may, get their ids appended, with a warning.
        Raises FileNotFoundError or ValueError, both naming the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f'{path} does not exist. Write the classes there, as {{"id2label": {{"0": "sky", "1": "road"}}}}.'
            )
        try:
            # Windows editors prepend a byte order mark, which plain utf-8 would not accept.
            fields = _fields(json.loads(path.read_text(encoding="utf-8-sig")))
            labels = cls(**fields | {"id2label": with_unique_names(fields["id2label"])})
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8 ({error}). Save it in this encoding.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        changed = [name for label, name in labels.id2label.items() if name != fields["id2label"][label]]
        if changed:
            logger.warning_once(f"{path} gives several classes the same name. They are renamed {shorten(changed)}.")
        return labels

    @property
    def num_labels(self) -> int:
        """Number of classes, K."""
        return len(self.id2label)

    @property
    def stuff_ids(self) -> tuple[int, ...]:
        """The classes that are not things; empty if the data set does not say which are."""
        things = set(self.thing_ids)
        return tuple(label for label in self.id2label if label not in things) if things else ()

    @property
    def _highest_value(self) -> int:
        return self.num_labels - 1 + int(self.do_reduce_labels)

    def to_json(self, path: Path) -> None:
        """Writes a `classes.json` that `from_json` reads back equal."""
        # ids may be numpy integers, which JSON cannot encode.
        content = {**asdict(self), "id2label": {str(label): name for label, name in self.id2label.items()}}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=int), encoding="utf-8")

    def label_of(self, category_id: int, source: str) -> int:
        """The label, as in the files, of a category. Raises a ValueError that names the source if it is unknown."""
        label = self._label_of_category.get(category_id)
        if label is None:
            known = shorten(sorted(self._label_of_category), limit=10)
            raise ValueError(
                f"{source} has the category_id {category_id}, but the {self.num_labels} classes have {known}."
            )
        return label

    @cached_property
    def _label_of_category(self) -> dict[int, int]:
        return {value: label for label, value in enumerate(self.category_ids or range(self._highest_value + 1))}

    def class_map(
        self, segmentation_map: np.ndarray, instance_id_to_semantic_id: Mapping[int, int] | None = None
    ) -> np.ndarray:
        """Turns pixel values as in the files into class ids.

        Takes (H, W) integers, which are segment ids if `instance_id_to_semantic_id` gives their labels; ids missing
        there have no class. Returns (H, W) int64 with 0 to K - 1, and `ignore_index` where there is no class.
        """
        values = segmentation_map.astype(np.int64)
        if instance_id_to_semantic_id is not None:
            ids, positions = np.unique(values, return_inverse=True)
            labels = [instance_id_to_semantic_id.get(segment_id, self.ignore_index) for segment_id in ids.tolist()]
            values = np.array(labels, dtype=np.int64)[positions].reshape(values.shape)
        if not self.do_reduce_labels:
            return values
        return np.where((values == 0) | (values == self.ignore_index), self.ignore_index, values - 1)

    def unknown_values(self, values: np.ndarray) -> list[int]:
        """The distinct pixel values, as in the files, that are neither a class nor ignored, ascending."""
        values = np.unique(values)
        is_known = ((values >= 0) & (values <= self._highest_value)) | (values == self.ignore_index)
        return values[~is_known].tolist()

    def _check_category_ids(self) -> None:
        if not self.category_ids:
            return
        if len(set(self.category_ids)) != self.num_labels or len(self.category_ids) != self.num_labels:
            raise ValueError(
                f"category_ids has {len(set(self.category_ids))} different ids, but there are {self.num_labels} "
                "classes. Give each class its own id."
            )
        if self.do_reduce_labels:
            raise ValueError("category_ids already map values to classes, so do_reduce_labels must be false with them.")

    def _check_types(self) -> None:
        for label_id, label in self.id2label.items():
            if not _is_integer(label_id) or not isinstance(label, str):
                raise ValueError(f"id2label maps {label_id!r} to {label!r}; it must map integers to names.")
        if not _is_integer(self.ignore_index):
            raise ValueError(f"ignore_index is {self.ignore_index!r}; it must be an integer.")
        if not -(2**31) <= self.ignore_index < 2**31:
            raise ValueError(f"ignore_index is {self.ignore_index}, but pixels have at most 32 bits. Use 255 or 65535.")
        if not isinstance(self.do_reduce_labels, bool):
            raise ValueError(f"do_reduce_labels is {self.do_reduce_labels!r}; it must be true or false.")
        if not all(_is_integer(thing_id) for thing_id in self.thing_ids):
            raise ValueError(f"thing_ids is {list(self.thing_ids)!r}; it must be a list of class ids.")
        if not all(_is_integer(category_id) for category_id in self.category_ids):
            raise ValueError(f"category_ids is {list(self.category_ids)!r}; it must be a list of integers.")


def labels_of(dataset: Any) -> LabelSet:
    """The `labels` of a data set, or of the one that it wraps, as `torch.utils.data.Subset` does.

    Raises a ValueError if there are none.
    """
    source = dataset
    while not isinstance(getattr(source, "labels", None), LabelSet):
        source = getattr(source, "dataset", None)
        if source is None:
            raise ValueError(
                f"The data set, of type {type(dataset).__name__}, does not say which classes it has. Open it with a "
                "reader of hf_maskformer.data, such as SegmentationColumns for a `datasets` data set, or give it an "
                "attribute `labels`, a LabelSet (docs/data.md, your own reader)."
            )
    return source.labels


def _fields(content: Any) -> dict[str, Any]:
    if isinstance(content, dict) and content and all(key.isdecimal() for key in content):
        content = {"id2label": content}  # an id2label.json, as many data sets of the Hub have it
    if not isinstance(content, dict) or not isinstance(content.get("id2label"), dict):
        raise ValueError('there is no object "id2label". Write it as {"id2label": {"0": "sky", "1": "road"}}.')
    # A misspelt field would be silently ignored, and the labels misinterpreted.
    unknown = sorted(set(content) - set(FIELDS_OF_CLASSES_JSON))
    if unknown:
        raise ValueError(f"unknown field {', '.join(unknown)}; the fields are {', '.join(FIELDS_OF_CLASSES_JSON)}.")
    fields = {name: value for name, value in content.items() if name != "palette"}
    fields["id2label"] = {_to_id(key): label for key, label in content["id2label"].items()}
    for name in ("thing_ids", "category_ids"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{name} is {content[name]!r}; it must be a list of ids.")
        fields[name] = tuple(content.get(name, []))
    return fields


def with_unique_names(id2label: dict[int, Any]) -> dict[int, Any]:
    """The names of classes, with the id appended where several share a name."""
    # Anything that is not a string is rejected by the type check.
    counts = Counter(name for name in id2label.values() if isinstance(name, str))
    return {
        label: f"{name} ({label})" if isinstance(name, str) and counts[name] > 1 else name
        for label, name in id2label.items()
    }


def _to_id(key: str) -> int:
    # int() alone would also accept "1_0" and "01", which would then replace another class.
    if not key.isdecimal() or str(int(key)) != key:
        raise ValueError(f'id2label has the key "{key}"; keys are class ids, "0" to "K - 1".')
    return int(key)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def shorten(values: Iterable[object], limit: int = 5) -> str:
    """Lists the first values for a message, and their total number if there are more."""
    listed = [str(value) for value in values]
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
