"""Reads folders of images and label maps."""

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from .labels import LabelSet, shorten
from .sample import Sample, load_image, make_sample

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAP_SUFFIXES = (".png", ".tif", ".tiff")

# In messages about a split that is missing.
CHOOSE_SPLIT = "Choose splits with --train_split, --eval_split or --split."


class SegmentationFiles(Dataset[Sample]):
    """Images and their label maps.

    A label map has one channel of 8, 16 or 32 bits, or a palette, whose pixels are labels. Files are read when a sample
    is accessed; their names take a few bytes each, which worker processes share.

    Args:
        image_files, map_files: paths by sample name; both must have the same names.
        labels: the classes; stored as an attribute.
        label_source: where `labels` comes from, for messages.

    Attributes:
        names: names of the samples, sorted; the order of the samples.

    Raises:
        FileNotFoundError: there is no image.
        ValueError: an image without a label map or the reverse.
    """

    def __init__(
        self, image_files: Mapping[str, Path], map_files: Mapping[str, Path], labels: LabelSet, label_source: str
    ) -> None:
        _check_pairs(image_files, map_files)
        names = sorted(image_files)
        self._names = PackedStrings(names)
        self._image_paths = PackedStrings(str(image_files[name]) for name in names)
        self._map_paths = PackedStrings(str(map_files[name]) for name in names)
        self.labels = labels
        self.label_source = label_source

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample. Raises a ValueError naming the file if it is damaged or image and map disagree."""
        image_path, map_path = self.image_path(index), Path(self._map_paths[index])
        name = self._names[index]
        return make_sample(name, load_image(image_path), self._load_map(map_path), str(image_path), str(map_path))

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def image_path(self, index: int) -> Path:
        """Path of a sample's image."""
        return Path(self._image_paths[index])

    def map_source(self, index: int) -> str:
        """Where the segmentation map of a sample comes from, for messages."""
        return self._map_paths[index]

    def _load_map(self, path: Path) -> Image.Image:
        return load_image(path)


class SegmentationFolder(SegmentationFiles):
    """Images and segmentation maps of one split of a folder.

    The layout is

        root/images/SPLIT/NAME.jpg          (or another common image format)
        root/annotations/SPLIT/NAME.png     (one channel of 8 or 16 bits, or a palette: class indices; also .tif)
        root/classes.json                   (see `LabelSet.from_json`)

    Files are read when a sample is accessed. A sample is `{"image", "segmentation_map", "name"}`, see `Sample`; an EXIF
    orientation is applied unless the map only fits the image as stored.

    Args:
        root: the folder.
        split: name of the split.
        labels: classes to use instead of those of root/classes.json.

    Attributes:
        names: file names without suffix, sorted; the order of the samples.
        labels: the classes.
        label_source: where they come from, for messages.

    Raises:
        FileNotFoundError: a folder or `classes.json` is missing, or there is no image.
        ValueError: an image without a label file or the reverse, two files with one name, a malformed `classes.json`.
    """

    def __init__(self, root: str | Path, split: str, labels: LabelSet | None = None) -> None:
        image_folder = _split_folder(Path(root), "images", split)
        map_folder = _split_folder(Path(root), "annotations", split)
        image_files = files_by_name(image_folder, IMAGE_SUFFIXES)
        map_files = files_by_name(map_folder, MAP_SUFFIXES)
        if not image_files:
            raise FileNotFoundError(f"{image_folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        if not map_files:
            raise FileNotFoundError(
                f"{map_folder} holds no label file ({', '.join(MAP_SUFFIXES)}); there is {_listed(map_folder)}. Other "
                "formats, such as JPEG, would change labels."
            )
        _warn_of_unread(image_folder, image_files.values())
        label_source = str(Path(root) / "classes.json") if labels is None else "the given classes"
        super().__init__(image_files, map_files, labels or LabelSet.from_json(label_source), label_source)


class PackedStrings(Sequence[str]):
    """Strings in two arrays, since reading a list of them copies it into each worker process."""

    def __init__(self, strings: Iterable[str]) -> None:
        # File names may contain bytes that are not valid text.
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} samples.")
        index %= len(self)
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


def _check_pairs(images: Mapping[str, Path], maps: Mapping[str, Path]) -> None:
    if not images or not maps:
        raise FileNotFoundError(f"There are {len(images)} images and {len(maps)} label files. Both are needed.")
    if images.keys() == maps.keys():
        return
    # Some layouts have subfolders.
    image_folder, map_folder = (
        Path(os.path.commonpath([path.parent for path in files.values()])) for files in (images, maps)
    )
    without_map = [str(images[name].relative_to(image_folder)) for name in sorted(set(images) - set(maps))]
    without_image = [str(maps[name].relative_to(map_folder)) for name in sorted(set(maps) - set(images))]
    if without_map and without_image:
        raise ValueError(
            f"Images and label files must have the same names before the suffix, but in {image_folder} there are only "
            f"{shorten(without_map)}, and in {map_folder} only {shorten(without_image)}. Rename them, or move away "
            "those without a counterpart."
        )
    if without_map:
        raise ValueError(
            f"{len(without_map)} of {len(images)} images in {image_folder} have no label file in "
            f"{map_folder}: {shorten(without_map)}. Add the label files or move these images away."
        )
    if without_image:
        raise ValueError(
            f"{len(without_image)} of {len(maps)} label files in {map_folder} have no image in {image_folder}: "
            f"{shorten(without_image)}. Add the images ({', '.join(IMAGE_SUFFIXES)}) or move these label files away."
        )


def _split_folder(root: Path, kind: str, split: str) -> Path:
    folder = root / kind / split
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"{folder.parent} does not exist. A data set folder holds images/{split}, annotations/{split} and "
            f"classes.json, or has another layout of docs/data.md; {root} holds {_listed(root)}."
        )
    splits = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    if not splits:
        raise FileNotFoundError(
            f"{folder} does not exist, and neither does any other split in {folder.parent}. Move the files there into "
            f"a folder for each split, or see docs/data.md for other layouts; {root} holds {_listed(root)}."
        )
    raise FileNotFoundError(
        f"{folder} does not exist. The splits in {folder.parent} are: {', '.join(splits)}. {CHOOSE_SPLIT}"
    )


def _warn_of_unread(folder: Path, files: Iterable[Path]) -> None:
    """Warns of subfolders and images in other formats: parts of the data set that would be silently skipped."""
    read = {path.name for path in files}
    others = (path for path in sorted(folder.glob("[!.]*")) if path.name not in read)
    pictures = Image.registered_extensions()
    unread = [path.name for path in others if path.suffix.lower() in pictures or path.is_dir()]
    if unread:
        logger.warning(
            f"{folder} also holds {shorten(unread)}, which is not read: only files in the folder itself "
            f"({', '.join(IMAGE_SUFFIXES)}) are."
        )


def _listed(folder: Path) -> str:
    found = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.glob("*"))
    return shorten(found) or "nothing"


def files_by_name(folder: Path, suffixes: tuple[str, ...], ending: str = "", pattern: str = "*") -> dict[str, Path]:
    """Paths by stem, with a common `ending` removed, sorted.

    Raises a ValueError for two files with the same stem, which would be one sample.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        # A leading dot marks what operating systems leave behind, such as "._NAME.png".
        is_left_over = path.name.startswith(".")
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending) or is_left_over:
            continue
        # macOS encodes the same name in other bytes.
        name = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
        if name in files:
            raise ValueError(f"{folder} holds both {files[name].name} and {path.name}. Keep one of them.")
        files[name] = path
    return files
