"""Reads COCO's panoptic and instance annotations, and those of other data sets in the same format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .coco_file import CocoFile, listed_file
from .labels import LabelSet
from .rle import decode_mask
from .sample import Sample, empty_masks, fit_image, load_image, make_sample_of_masks
from .segments import make_sample_of_segments, number_segments


class _CocoDataset(Dataset[Sample]):
    """What both kinds of annotations have in common."""

    _file: CocoFile

    def __len__(self) -> int:
        return len(self._file)

    def image_id(self, index: int) -> Any:
        """The id of a sample's image in the JSON file."""
        return self._file.image(index)["id"]

    def image_path(self, index: int) -> Path:
        """Path of a sample's image."""
        return self._file.image_path(index)


class CocoPanoptic(_CocoDataset):
    """Images with panoptic annotations: a JSON file, and a PNG per image with an id for each segment.

    The id of a pixel is red + 256 green + 65536 blue; 0 is void. A sample has a `segmentation_map` of ids in the order
    of the JSON file, `instance_id_to_semantic_id` and `crowd_ids` (see `Sample`).

    Args:
        json_path: for instance annotations/panoptic_train2017.json.
        image_folder: folder of the images.
        png_folder: folder of the PNGs; by default the JSON file's path without its suffix.
        labels: classes to which categories are matched by name; by default the file's categories.
        image_name: maps `file_name` to the path of an image inside `image_folder`, where the two differ.

    Attributes:
        labels, label_source: the classes, and the file they come from.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the JSON file contradicts itself (see `CocoFile`).
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path,
        png_folder: str | Path | None = None,
        labels: LabelSet | None = None,
        image_name: Callable[[str], str] = str,
    ) -> None:
        self._png_folder = Path(json_path).with_suffix("") if png_folder is None else Path(png_folder)
        self._file = CocoFile(json_path, image_folder, self._png_folder, labels, image_name)
        self.labels, self.label_source = self._file.labels, str(json_path)
        counts = self._file.num_annotations()
        if (counts != 1).any():
            index = int((counts != 1).argmax())
            raise ValueError(
                f"{json_path}: {(counts != 1).sum()} of {len(counts)} images do not have exactly one panoptic "
                f"annotation; image {self._file.image(index)['id']} has {counts[index]}. Add or remove annotations."
            )

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample. Raises a ValueError that names the file if it is damaged or the files disagree."""
        image_path, annotation = self.image_path(index), self._file.annotations(index)[0]
        map_path = listed_file(self._png_folder, annotation["file_name"])
        segments = number_segments(load_image(map_path), annotation["segments_info"], self.labels, str(map_path))
        name = self._file.sample_name(index)
        return make_sample_of_segments(name, load_image(image_path), segments, str(image_path), str(map_path))

    def map_source(self, index: int) -> str:
        """Where the segmentation map of a sample comes from, for messages."""
        return str(listed_file(self._png_folder, self._file.annotations(index)[0]["file_name"]))


class CocoInstances(_CocoDataset):
    """Images with instance annotations: a JSON file with a polygon or an RLE for each object.

    A sample has `masks`, `labels`, `iscrowd` and, if all its objects do, `area` (see `Sample`). Crowds are kept for
    evaluation; the data collator leaves them out of training. Masks are rasterised exactly as by COCO's own tools.

    Args:
        json_path: for instance annotations/instances_train2017.json.
        image_folder: folder of the images.
        labels: classes to which categories are matched by name; by default the file's categories.

    Attributes:
        labels, label_source: the classes, and the file they come from.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the JSON file contradicts itself (see `CocoFile`).
    """

    def __init__(self, json_path: str | Path, image_folder: str | Path, labels: LabelSet | None = None) -> None:
        self._file = CocoFile(json_path, image_folder, labels=labels)
        self.labels, self.label_source = self._file.labels, str(json_path)

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample. Raises a ValueError that names file and annotation if something is wrong with it."""
        entry, source, image_path = self._file.image(index), self.map_source(index), self.image_path(index)
        size = entry.get("height"), entry.get("width")
        if not all(isinstance(edge, int) and edge > 0 for edge in size):
            raise ValueError(f"{source} has height and width {size}; they must be positive integers.")
        image = fit_image(load_image(image_path), size, str(image_path), source)
        annotations = self._file.annotations(index)
        masks = empty_masks(len(annotations), size, source)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = self._mask(annotation, size)
        labels = [self.labels.label_of(annotation["category_id"], source) for annotation in annotations]
        return make_sample_of_masks(self._file.sample_name(index), image, masks, labels, annotations, source)

    def map_source(self, index: int) -> str:
        """Where the masks of a sample come from, for messages."""
        return f"{self._file.path}, image {self._file.image(index)['id']}"

    def _mask(self, annotation: Any, size: tuple[int, int]) -> np.ndarray:
        try:
            return decode_mask(annotation.get("segmentation"), size)
        except ValueError as error:
            raise ValueError(
                f"{self._file.path}: annotation {annotation.get('id')} of image {annotation['image_id']} {error}. "
                "Draw its mask, or remove the annotation."
            ) from error
