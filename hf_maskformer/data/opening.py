"""Opens any supported data set by name, as on a command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

from .check import LabelledDataset
from .coco import CocoInstances, CocoPanoptic
from .columns import StreamedColumns, load_columns
from .folder import CHOOSE_SPLIT, SegmentationFolder
from .labels import LabelSet, shorten
from .layouts import ON_LAYOUTS, Ade20kFull, CocoStuff10k, ade20k, cityscapes, cityscapes_panoptic, mapillary_vistas

COLUMN_FORMATS = ("columns", "instance-columns")

# File names in downloads, and in other data sets in COCO's format; {} is the split.
PANOPTIC_FILES = ("annotations/panoptic_{}2017.json", "annotations/panoptic_{}.json", "ade20k_panoptic_{}.json")
INSTANCE_FILES = (
    "annotations/instances_{}2017.json",
    "annotations/instances_{}.json",
    "ade20k_instance_{}.json",
    "{}/_annotations.coco.json",
)
IMAGE_FOLDERS = ("{}2017", "images/{}2017", "images/{}", "{}")
OTHER_NAMES = {"train": ("training",), "val": ("validation", "valid")}


@overload
def open_dataset(
    path: str,
    split: str,
    image_column: str | None = None,
    label_column: str = "label",
    classes: str | None = None,
    *,
    format: str | None = None,
    streaming: Literal[False] = False,
) -> LabelledDataset: ...


@overload
def open_dataset(
    path: str,
    split: str,
    image_column: str | None = None,
    label_column: str = "label",
    classes: str | None = None,
    *,
    format: str | None = None,
    streaming: bool,
) -> LabelledDataset | StreamedColumns: ...


def open_dataset(
    path: str,
    split: str,
    image_column: str | None = None,
    label_column: str = "label",
    classes: str | None = None,
    *,
    format: str | None = None,
    streaming: bool = False,
) -> LabelledDataset | StreamedColumns:
    """Opens one split of a data set of samples with their `labels`.

    Args:
        path: a folder in one of the layouts that docs/data.md shows, or a data set of the Hub.
        split: "train", "val", or the data set's own name for it.
        image_column, label_column: columns of a `datasets` data set; giving the first implies that it is one.
        classes: a `classes.json` that replaces the data set's own classes.
        format: name of the layout (see `FORMATS` and `COLUMN_FORMATS`), if a folder is ambiguous.
        streaming: stream a `datasets` data set row by row.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or it is malformed.
    """
    if format is None:
        format = "columns" if image_column is not None else _detect(Path(path), classes)
    if format in COLUMN_FORMATS:
        classes = classes or _own_classes(path)
        return load_columns(
            path,
            split,
            image_column or "image",
            label_column,
            classes_path=classes,
            instance_maps=format == "instance-columns",
            streaming=streaming,
        )
    if streaming:
        raise ValueError(
            f"Only columns of a `datasets` data set can be streamed; {path} is read as {format}. Write it as Parquet "
            "with scripts/prepare_dataset.py parquet, and stream that."
        )
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join((*FORMATS, *COLUMN_FORMATS))}.")
    labels = None if classes is None else LabelSet.from_json(classes)
    dataset = FORMATS[format](Path(path), split, labels)
    if classes is not None:
        dataset.label_source = classes
    return dataset


def _detect(root: Path, classes: str | None) -> str:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder. Name one in a layout of docs/data.md, such as images/, annotations/ "
            "and classes.json, or give image_column (--image_column) to read a data set from the Hub."
        )
    found = [name for name, marks in MARKS.items() if any(any(root.glob(mark)) for mark in marks)]
    if "folder" in found or not found:
        # Any layout may include a classes.json, but with one, ADE20K's split names mean a user's own folder. If nothing
        # matches, the folder reader's error says best what is missing.
        found = [name for name in found if name not in ("folder", "ade20k")] or ["folder"]
    if found == ["folder"] and classes is None and not (root / "classes.json").exists():
        beside = list(root.glob("annotations/*"))
        if any(path.suffix == ".json" for path in beside) and all(path.is_file() for path in beside):
            names = ", ".join(pattern.format("SPLIT") for pattern in PANOPTIC_FILES + INSTANCE_FILES)
            raise FileNotFoundError(
                f"{root}/annotations has JSON files and no folders of maps; COCO's format is recognised by {names}."
            )
    if len(found) == 1:
        return found[0]
    raise ValueError(f"{root} can be read as {' or '.join(found)}. Choose one with format (--format).")


def _own_classes(path: str) -> str:
    own = Path(path) / "classes.json"
    if own.is_file():
        return str(own)
    raise ValueError(
        f"{path} is read by columns, which do not name the classes. Pass a classes.json (--classes), such as "
        '{"id2label": {"0": "sky", "1": "road"}}.'
    )


def _coco(reader: Callable[..., Any], files: tuple[str, ...]) -> Callable[[Path, str, LabelSet | None], Any]:
    def read(root: Path, split: str, labels: LabelSet | None) -> Any:
        # Custom data often has one folder of images for all splits.
        json_path, image_folder = _existing(root, files, split), _existing(root, IMAGE_FOLDERS, split, "images")
        return reader(json_path, image_folder, labels=labels)

    return read


def _existing(root: Path, patterns: tuple[str, ...], split: str, *others: str) -> Path:
    splits = (split, *OTHER_NAMES.get(split, ()))
    names = [*(pattern.format(name) for name in splits for pattern in patterns), *others]
    for name in names:
        if (root / name).exists():
            return root / name
    found = (path for pattern in patterns if pattern != "{}" for path in root.glob(pattern.format("*")))
    present = sorted({str(path.relative_to(root)) for path in found})
    hint = f" It has {shorten(present)}. {CHOOSE_SPLIT}" if present else ""
    raise FileNotFoundError(f"{root} has none of {', '.join(names)}.{hint} {ON_LAYOUTS}")


FORMATS: dict[str, Callable[[Path, str, LabelSet | None], Any]] = {
    "folder": SegmentationFolder,
    "ade20k": ade20k,
    "ade20k-full": Ade20kFull,
    "cityscapes": cityscapes,
    "cityscapes-panoptic": cityscapes_panoptic,
    "coco-instances": _coco(CocoInstances, INSTANCE_FILES),
    "coco-panoptic": _coco(CocoPanoptic, PANOPTIC_FILES),
    "coco-stuff-10k": CocoStuff10k,
    "mapillary-vistas": mapillary_vistas,
}
# Files and folders that identify a layout; one is enough.
MARKS = {
    "folder": ("classes.json",),
    "ade20k": ("annotations/training", "annotations/validation"),
    "ade20k-full": ("images/ADE/training", "images/ADE/validation"),
    "cityscapes": ("leftImg8bit",),
    "cityscapes-panoptic": ("gtFine/cityscapes_panoptic_*.json",),
    "coco-instances": tuple(pattern.format("*") for pattern in INSTANCE_FILES),
    "coco-panoptic": tuple(pattern.format("*") for pattern in PANOPTIC_FILES),
    "coco-stuff-10k": ("imageLists",),
    "mapillary-vistas": ("training/images",),
    "columns": ("*.parquet", "data/*.parquet", "dataset_dict.json", "state.json"),
}
