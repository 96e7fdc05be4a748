"""The JSON files of COCO, panoptic and instances: which image has which annotations, and where they lie in the file."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .json_file import read_entries, walk_json
from .labels import LabelSet, shorten
from .sample import path_inside


class CocoFile:
    """An annotation file, opened by walking it once and keeping nothing but the places of its entries.

    That is a few dozen bytes per image and annotation, in arrays that worker processes share, instead of the
    gigabytes that all of COCO takes as Python objects.

    Args:
        path: the JSON file.
        image_folder: where the images lie.
        png_folder: where the PNGs of panoptic annotations lie; None for instances.
        labels: classes of which each category must have one by name; by default the file's categories, by their ids.

    Attributes:
        labels: the classes, whose `category_ids` are the file's.

    Raises:
        FileNotFoundError: the JSON file, images or PNGs are missing.
        ValueError: the file is damaged, or an entry lacks a field, is there twice or refers to one that is not there.
    """

    def __init__(
        self, path: str | Path, image_folder: str | Path, png_folder: Path | None = None, labels: LabelSet | None = None
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist.")
        self.image_folder = Path(image_folder)
        images = _FileList("images", self.image_folder, self.path)
        pngs = None if png_folder is None else _FileList("PNGs", png_folder, self.path)
        position_of_image: dict[Any, int] = {}
        image_spans, annotation_spans = array("q"), array("q")
        images_of_annotations: list[Any] = []
        first_use_of_category: dict[Any, str] = {}
        categories: list[Any] = []
        for key, value, span in walk_json(self.path, ("images", "annotations")):
            if key == "categories":
                categories = value
            elif key == "images":
                image_id = _field(value, "id", f"{self.path}: an image")
                if image_id in position_of_image:
                    raise ValueError(f"{self.path} lists the image {image_id} twice. Remove one of them.")
                position_of_image[image_id] = len(position_of_image)
                images.look_up(value.get("file_name"))
                image_spans.extend(span)
            elif key == "annotations":
                images_of_annotations.append(_field(value, "image_id", f"{self.path}: an annotation"))
                annotation_spans.extend(span)
                if pngs is not None:
                    pngs.look_up(value.get("file_name"))
                for category_id, owner in _categories_of(value, self.path):
                    first_use_of_category.setdefault(category_id, owner)
        if not position_of_image:
            raise ValueError(f"{self.path} lists no images.")
        images.require_all()
        if pngs is not None:
            pngs.require_all()

        self.labels = _labels_of(categories, first_use_of_category, labels, self.path)
        self._image_spans = np.array(image_spans).reshape(-1, 2)
        owners = self._positions(images_of_annotations, position_of_image)
        order = np.argsort(owners, kind="stable")
        self._annotation_spans = np.array(annotation_spans).reshape(-1, 2)[order]
        self._first_annotation = np.searchsorted(owners[order], np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self._image_spans)

    def image(self, index: int) -> Any:
        """Reads the entry of an image. Raises an IndexError past the last one."""
        return read_entries(self.path, [self._image_spans[index]])[0]

    def image_path(self, index: int) -> Path:
        """Where an image lies."""
        return self.image_folder / self.image(index)["file_name"]

    def annotations(self, index: int) -> list[Any]:
        """Reads the annotations of an image, in the order of the file."""
        places = slice(*self._first_annotation[[index, index + 1]])
        return read_entries(self.path, self._annotation_spans[places])

    def num_annotations(self) -> np.ndarray:
        """The number of annotations of each image, (len(self),)."""
        return np.diff(self._first_annotation)

    def _positions(self, image_ids: list[Any], position_of_image: dict[Any, int]) -> np.ndarray:
        positions = np.fromiter((position_of_image.get(image_id, -1) for image_id in image_ids), np.int64)
        if (positions < 0).any():
            lost = image_ids[int((positions < 0).argmax())]
            raise ValueError(f"{self.path} has annotations of image {lost!r}, which its images do not list.")
        return positions


class _FileList:
    """Looks up files that a JSON file lists in a folder, which is read once instead of asking for each file."""

    def __init__(self, kind: str, folder: Path, json_path: Path) -> None:
        self._kind, self._folder, self._json_path = kind, folder, json_path
        self._names_in: dict[Path, set[str]] = {}
        self._num_listed = 0
        self._missing: list[str] = []

    def look_up(self, name: Any) -> None:
        path = path_inside(self._folder, name, str(self._json_path))
        if path.parent not in self._names_in:
            found = path.parent.iterdir() if path.parent.is_dir() else ()
            self._names_in[path.parent] = {file.name for file in found}
        self._num_listed += 1
        if path.name not in self._names_in[path.parent]:
            self._missing.append(name)

    def require_all(self) -> None:
        if self._missing:
            raise FileNotFoundError(
                f"{len(self._missing)} of {self._num_listed} {self._kind} that {self._json_path} lists are not in "
                f"{self._folder}: {shorten(self._missing)}. Complete the folder, or name another one."
            )


def _categories_of(annotation: Any, path: Path) -> Iterator[tuple[Any, str]]:
    """The categories that an annotation uses, of one segment (instances) or of several (panoptic), and where."""
    if "segments_info" not in annotation:
        where = f"annotation {annotation.get('id')} of image {annotation['image_id']}"
        yield _field(annotation, "category_id", f"{path}: {where}"), where
        return
    if not isinstance(annotation["segments_info"], list):
        raise ValueError(f"{path}: segments_info of image {annotation['image_id']} is no list.")
    for segment in annotation["segments_info"]:
        where = f"a segment of image {annotation['image_id']}"
        yield _field(segment, "category_id", f"{path}: {where}"), where


def _labels_of(categories: Any, used: dict[Any, str], labels: LabelSet | None, path: Path) -> LabelSet:
    """The classes of a file, after checking that every category in use is listed."""
    if not isinstance(categories, list) or not categories:
        raise ValueError(f"{path} has no list of categories.")
    names = {
        _field(entry, "id", f"{path}: a category"): _field(entry, "name", f"{path}: a category") for entry in categories
    }
    if len(names) < len(categories):
        raise ValueError(f"{path} lists {len(categories)} categories under {len(names)} ids. Give each its own id.")
    for category_id, owner in used.items():
        if category_id not in names:
            raise ValueError(f"{path}: {owner} has the category_id {category_id!r}, which its categories do not list.")
    if labels is not None:
        return _labels_by_name(names, labels, path)
    category_ids = tuple(sorted(names))
    things = {entry["id"] for entry in categories if entry.get("isthing", 1)}
    try:
        return LabelSet(
            {label: names[category_id] for label, category_id in enumerate(category_ids)},
            ignore_index=255 if len(names) <= 255 else 65535,
            thing_ids=tuple(label for label, category_id in enumerate(category_ids) if category_id in things),
            category_ids=category_ids,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _labels_by_name(names: dict[int, str], labels: LabelSet, path: Path) -> LabelSet:
    category_of_name = {name: category_id for category_id, name in names.items()}
    wanted = set(labels.id2label.values())
    unknown = sorted(set(category_of_name) - wanted)
    missing = sorted(wanted - set(category_of_name))
    if unknown or missing:
        raise ValueError(
            f"{path} and the given classes differ in their names: only the file has {shorten(unknown) or 'none'}, only "
            f"the classes have {shorten(missing) or 'none'}. Rename the classes, or leave them to the file."
        )
    category_ids = tuple(category_of_name[labels.id2label[label]] for label in range(labels.num_labels))
    return LabelSet(labels.id2label, labels.ignore_index, thing_ids=labels.thing_ids, category_ids=category_ids)


def _field(entry: Any, name: str, owner: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{owner} is {str(entry)[:60]}, not an object.")
    value = entry.get(name)
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{owner} has the {name} {value!r}: {str(entry)[:80]}. It must be a number or a name.")
    return value
