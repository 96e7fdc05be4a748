"""Reads a folder of images and label PNGs."""

from pathlib import Path

from torch.utils.data import Dataset

from .labels import LabelSet, shorten
from .sample import Sample, load_image, make_sample

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAP_SUFFIXES = (".png",)


class SegmentationFolder(Dataset[Sample]):
    """Images and segmentation maps of one split of a folder.

    The layout is

        root/images/SPLIT/NAME.jpg          (or another common image format)
        root/annotations/SPLIT/NAME.png     (one channel of 8 or 16 bits, or a palette: class indices)
        root/classes.json                   (see `LabelSet.from_json`)

    Files are read when a sample is asked for. A sample of index i is `{"image", "segmentation_map", "name"}`, see
    `Sample`; an image with an EXIF orientation is turned upright unless its map fits the stored grid only.

    Attributes:
        names: file names without suffix, sorted; the order of the samples.
        labels: the classes, from `classes.json`.
        label_source: path of `classes.json`, for messages.

    Raises:
        FileNotFoundError: a folder or `classes.json` is missing, or there is no image.
        ValueError: an image without a label file or the reverse, two files of one name, a malformed `classes.json`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self._image_folder = _split_folder(Path(root), "images", split)
        self._map_folder = _split_folder(Path(root), "annotations", split)
        self._image_files = files_by_name(self._image_folder, IMAGE_SUFFIXES)
        self._map_files = files_by_name(self._map_folder, MAP_SUFFIXES)
        if not self._image_files:
            raise FileNotFoundError(f"{self._image_folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        self._check_pairs()
        self.names = sorted(self._image_files)

        self.label_source = str(Path(root) / "classes.json")
        self.labels = LabelSet.from_json(self.label_source)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample. Raises a ValueError that names the file if it is damaged or image and map disagree."""
        name = self.names[index]
        image_path = self._image_folder / self._image_files[name]
        map_path = self._map_folder / self._map_files[name]
        return make_sample(name, load_image(image_path), load_image(map_path), str(image_path), str(map_path))

    def map_source(self, index: int) -> str:
        """Says where the segmentation map of a sample comes from, for messages."""
        return str(self._map_folder / self._map_files[self.names[index]])

    def _check_pairs(self) -> None:
        images, maps = self._image_files, self._map_files
        without_map = [images[name] for name in sorted(set(images) - set(maps))]
        if without_map:
            raise ValueError(
                f"{len(without_map)} of {len(images)} images in {self._image_folder} have no label file NAME.png in "
                f"{self._map_folder}: {shorten(without_map)}. Add the label files or move these images away."
            )
        without_image = [maps[name] for name in sorted(set(maps) - set(images))]
        if without_image:
            raise ValueError(
                f"{len(without_image)} of {len(maps)} label files in {self._map_folder} have no image in "
                f"{self._image_folder}: {shorten(without_image)}. Add the images ({', '.join(IMAGE_SUFFIXES)}) or move "
                "these label files away."
            )


def _split_folder(root: Path, kind: str, split: str) -> Path:
    folder = root / kind / split
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"{folder.parent} does not exist. A data set folder holds images/{split}, annotations/{split} and "
            "classes.json."
        )
    splits = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    raise FileNotFoundError(
        f"{folder} does not exist. The splits in {folder.parent} are: {', '.join(splits) or 'none'}."
    )


def files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """File names by stem, sorted. Raises a ValueError for two files of one stem, which would be one sample."""
    files: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        # A leading dot marks what operating systems leave behind, such as "._NAME.png".
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise ValueError(f"{folder} holds both {files[path.stem]} and {path.name}. Keep one of them.")
        files[path.stem] = path.name
    return files
