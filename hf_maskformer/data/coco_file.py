"""COCO's JSON files, panoptic and instances: which image has which annotations, and where they are in the file."""

import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .json_file import Span, read_entries, stream_json
from .labels import LabelSet, shorten
from .sample import check_file_name


class CocoFile:
    """An annotation file that is indexed in one pass: only the byte offsets of its entries are kept.

    That is a few dozen bytes per image and annotation, in arrays that worker processes share, instead of the
    gigabytes that all of COCO takes as Python objects.

    Args:
        path: the JSON file.
        image_folder: folder of the images.
        png_folder: folder of the PNGs of panoptic annotations; None for instances.
        labels: classes to which every category is matched by name; by default the file's categories, sorted by id.
        image_name: maps `file_name` to the path of an image inside `image_folder`, where the two differ.

    Attributes:
        labels: the classes, whose `category_ids` are the file's.

    Raises:
        FileNotFoundError: the JSON file, images or PNGs are missing.
        ValueError: the file is damaged, or an entry lacks a field, is a duplicate or refers to a missing one.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path,
        png_folder: Path | None = None,
        labels: LabelSet | None = None,
        image_name: Callable[[str], str] = str,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist.")
        self.image_folder = Path(image_folder)
        self._image_name = image_name
        found = _Contents(self.path, self.image_folder, png_folder, image_name)
        for key, value, span in stream_json(self.path, ("images", "annotations")):
            found.add(key, value, span)
        owners = found.owners()
        self.labels = found.labels(labels)
        order = np.argsort(owners, kind="stable")
        self._image_spans = np.array(found.image_spans).reshape(-1, 2)
        self._annotation_spans = np.array(found.annotation_spans).reshape(-1, 2)[order]
        self._first_annotation = np.searchsorted(owners[order], np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self._image_spans)

    def image(self, index: int) -> Any:
        """Reads the entry of an image. Raises an IndexError past the last one."""
        return read_entries(self.path, [self._image_spans[index]])[0]

    def image_path(self, index: int) -> Path:
        """Path of an image."""
        return listed_file(self.image_folder, self._image_name(self.image(index)["file_name"]))

    def sample_name(self, index: int) -> str:
        """A unique name for a sample: that of its image, preceded by the folder that the file gives, if any."""
        file_name = self.image(index)["file_name"].replace("\\", "/")
        return Path(file_name).with_name(Path(self._image_name(file_name)).stem).as_posix()

    def annotations(self, index: int) -> list[Any]:
        """Reads the annotations of an image, in the order of the file. Raises an IndexError past the last one."""
        index = range(len(self))[index]  # counted from the end if negative
        places = slice(*self._first_annotation[[index, index + 1]])
        return read_entries(self.path, self._annotation_spans[places])

    def num_annotations(self) -> np.ndarray:
        """The number of annotations of each image, (len(self),)."""
        return np.diff(self._first_annotation)


class _Contents:
    """What is collected while the file is read; `owners` and `labels` check it at the end."""

    def __init__(
        self, path: Path, image_folder: Path, png_folder: Path | None, image_name: Callable[[str], str]
    ) -> None:
        self._path = path
        self._images = _FileList("images", image_folder, path, image_name)
        self._pngs = None if png_folder is None else _FileList("PNGs", png_folder, path)
        self._position_of_image: dict[Any, int] = {}
        self._images_of_annotations: list[Any] = []
        self._use_of_category: dict[Any, Any] = {}
        self._categories: Any = None
        self.image_spans, self.annotation_spans = array("q"), array("q")

    def add(self, key: str, value: Any, span: Span) -> None:
        if key == "images":
            image_id = _field(value, "id", self._path, "an image")
            if image_id in self._position_of_image:
                raise ValueError(f"{self._path} lists the image {image_id} twice. Remove one of them.")
            self._position_of_image[image_id] = len(self._position_of_image)
            self._images.look_up(value.get("file_name"))
            self.image_spans.extend(span)
        elif key == "annotations":
            image_id = _field(value, "image_id", self._path, "an annotation")
            self._images_of_annotations.append(image_id)
            if self._pngs is not None:
                self._pngs.look_up(value.get("file_name"))
            self.annotation_spans.extend(span)
            segments = value.get("segments_info", [value])
            if not isinstance(segments, list):
                raise ValueError(f"{self._path}: segments_info of image {image_id} is not a list. Make it one.")
            for segment in segments:
                self._use_of_category.setdefault(_field(segment, "category_id", self._path, "a segment"), image_id)
        elif key == "categories":
            self._categories = value

    def owners(self) -> np.ndarray:
        """The index of each annotation's image, after checking that images and files exist."""
        if not self._position_of_image:
            raise ValueError(f"{self._path} lists no images. Export it again, or use another file.")
        self._images.require_all()
        if self._pngs is not None:
            self._pngs.require_all()
        ids = self._images_of_annotations
        owners = np.fromiter((self._position_of_image.get(image_id, -1) for image_id in ids), np.int64)
        if (owners < 0).any():
            lost = ids[int((owners < 0).argmax())]
            raise ValueError(f"{self._path} has annotations of image {lost!r}, which its images do not list. Add it.")
        return owners

    def labels(self, given: LabelSet | None) -> LabelSet:
        """The classes, after checking that every category in use is listed."""
        self._categories = _without_root(self._categories, self._use_of_category)
        names = _category_names(self._categories, self._path)
        for category_id, image_id in self._use_of_category.items():
            if category_id not in names:
                raise ValueError(
                    f"{self._path}: a segment of image {image_id} has the category_id {category_id!r}, which its "
                    "categories do not list. Add it."
                )
        things = {entry["id"] for entry in self._categories if entry.get("isthing", 1)}
        if given is not None:
            return _labels_by_name(names, things, given, self._path)
        category_ids = tuple(sorted(names))
        try:
            return LabelSet(
                {label: names[category_id] for label, category_id in enumerate(category_ids)},
                ignore_index=255 if len(names) <= 255 else 65535,
                thing_ids=tuple(label for label, category_id in enumerate(category_ids) if category_id in things),
                category_ids=category_ids,
            )
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from error


class _FileList:
    """Checks that files listed in a JSON file exist; each folder is listed once instead of a lookup per file."""

    def __init__(self, kind: str, folder: Path, json_path: Path, rename: Callable[[str], str] = str) -> None:
        self._kind, self._folder, self._json_path, self._rename = kind, folder, json_path, rename
        self._names_in: dict[str, set[str]] = {}
        self._num_listed = 0
        self._missing: list[str] = []

    def look_up(self, name: Any) -> None:
        if name is None:
            raise ValueError(
                f"{self._json_path} lists {self._kind} without a file_name. Give each of them the name of its file in "
                f"{self._folder}."
            )
        check_file_name(name, self._folder, str(self._json_path))
        name = self._rename(name)
        check_file_name(name, self._folder, str(self._json_path))
        self._num_listed += 1
        if not any(self._has(spelling) for spelling in _spellings(self._folder, name)):
            self._missing.append(name)

    def _has(self, name: str) -> bool:
        parent, base = os.path.split(name)
        if parent not in self._names_in:
            folder = self._folder / parent
            self._names_in[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        return base in self._names_in[parent]

    def require_all(self) -> None:
        if self._missing:
            raise FileNotFoundError(
                f"{len(self._missing)} of {self._num_listed} {self._kind} that {self._json_path} lists are not in "
                f"{self._folder}: {shorten(self._missing)}. Complete the folder; names are relative to it."
            )


def listed_file(folder: Path, name: str) -> Path:
    """Path of a file in a folder that a JSON file lists."""
    places = (folder / spelling for spelling in _spellings(folder, name))
    return next((place for place in places if place.is_file()), folder / name)


def _spellings(folder: Path, name: str) -> Iterator[str]:
    """The names that a listed file may have on disk: the list may prepend the folder or use Windows' backslashes.

    File systems and tools also encode accents in two ways.
    """
    yield name
    for form in ("NFC", "NFD"):
        path = unicodedata.normalize(form, name).replace("\\", "/")
        yield path
        yield path.removeprefix(f"{folder.name}/").lstrip("/")  # not an absolute path, which would leave the folder


def _without_root(categories: Any, used: Collection[Any]) -> Any:
    """The categories without Roboflow's id 0, which is named after the project: parent of all, used by no object."""
    if not isinstance(categories, list) or 0 in used or not all(isinstance(entry, dict) for entry in categories):
        return categories
    parents = [entry.get("supercategory") for entry in categories]
    return [
        entry
        for entry in categories
        if entry.get("id") != 0 or entry.get("supercategory") != "none" or entry.get("name") not in parents
    ]


def _category_names(categories: Any, path: Path) -> dict[int, str]:
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{path} has no list of categories. Add one, with the id and name of each.")
    names = {_field(entry, "id", path, "a category"): _field(entry, "name", path, "a category") for entry in categories}
    if not all(isinstance(category_id, int) for category_id in names):
        raise ValueError(f"{path} has categories whose ids are not integers. Use integers.")
    if len(names) < len(categories):
        raise ValueError(f"{path} lists {len(categories)} categories with only {len(names)} ids. Give each its own id.")
    return names


def _labels_by_name(names: dict[int, str], things: set[int], labels: LabelSet, path: Path) -> LabelSet:
    category_of_name = {name: category_id for category_id, name in names.items()}
    if len(category_of_name) < len(names):
        repeated = sorted(name for name, count in Counter(names.values()).items() if count > 1)
        raise ValueError(f"{path} has several categories named {shorten(repeated)}, so names do not identify them.")
    wanted = set(labels.id2label.values())
    unknown = sorted(set(category_of_name) - wanted)
    missing = sorted(wanted - set(category_of_name))
    if unknown or missing:
        sides = {"the file has": unknown, "the classes have": missing}
        differences = " and ".join(f"only {side} {shorten(names)}" for side, names in sides.items() if names)
        raise ValueError(
            f"{path} and the given classes must have the same names, but {differences}. Rename the classes, add what "
            "is missing, or use the classes of the file."
        )
    category_ids = tuple(category_of_name[labels.id2label[label]] for label in range(labels.num_labels))
    # A plain list of names does not override what the file says about them.
    thing_ids = labels.thing_ids or tuple(label for label, value in enumerate(category_ids) if value in things)
    return LabelSet(labels.id2label, labels.ignore_index, thing_ids=thing_ids, category_ids=category_ids)


def _field(entry: Any, name: str, path: Path, kind: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {kind} is {str(entry)[:60]}, not an object.")
    value = entry.get(name)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{path}: {kind} has the {name} {value!r}: {str(entry)[:80]}. Give it an integer or a name.")
    return value
