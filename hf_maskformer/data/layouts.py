"""Opens well-known data sets in the folder layouts of their downloads.

Each function takes the folder, a split ("train" or "val") and optionally the classes (see `LabelSet`), and raises a
FileNotFoundError or ValueError that names what is missing or wrong.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from .coco import CocoPanoptic
from .folder import IMAGE_SUFFIXES, MAP_SUFFIXES, SegmentationFiles, files_by_name
from .labels import LabelSet
from .sample import check_is_exact, load_image

LABEL_NAMES = Path(__file__).parent / "label_names"
ON_LAYOUTS = "docs/data.md shows the folders that are read."

# What some downloads call their splits.
LONG_NAMES = {"train": "training", "val": "validation"}

# Of COCO-Stuff's ids 1 to 182, these are objects that were planned but never annotated; the other 171 are the classes.
COCO_STUFF_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)

# Objects of ADE20K-Full are numbered by 256 * (red // 10) + green.
ADE20K_MAX_ID = 255 // 10 * 256 + 255


def ade20k(root: str | Path, split: str, labels: LabelSet | None = None) -> SegmentationFiles:
    """ADE20K for scene parsing, 150 classes (ADEChallengeData2016).

    Reads images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, whose labels start at 1.
    """
    folder = LONG_NAMES.get(split, split)
    labels = labels or replace(named_labels("ade20k"), do_reduce_labels=True)
    images = _files(Path(root) / "images" / folder, IMAGE_SUFFIXES)
    maps = _files(Path(root) / "annotations" / folder, MAP_SUFFIXES)
    return SegmentationFiles(images, maps, labels, "ADE20K's classes")


class Ade20kFull(SegmentationFiles):
    """ADE20K-Full, 847 classes: images/ADE/{training,validation}/*/*/NAME.jpg and, next to it, NAME_seg.png.

    Of more than 3,000 kinds of objects, the classes are those in both splits (paper, appendix on data sets). The red
    and green channels of a map encode the object ids of index_ade20k.pkl, from 1; `category_ids` of the classes are
    these ids, and pixels of other objects are ignored.

    Raises:
        FileNotFoundError, ValueError: a file is missing, a map is not RGB, or `labels` have no such ids.
    """

    def __init__(self, root: str | Path, split: str, labels: LabelSet | None = None) -> None:
        folder = Path(root) / "images" / "ADE" / LONG_NAMES.get(split, split)
        images = _files(folder, (".jpg",), pattern="*/*/*")
        maps = _files(folder, (".png",), "_seg", "*/*/*")
        labels = labels or named_labels("ade20k_full")
        super().__init__(images, maps, labels, "ADE20K-Full's classes")
        # Zero is unlabelled.
        if not labels.category_ids or not 0 < min(labels.category_ids) <= max(labels.category_ids) <= ADE20K_MAX_ID:
            raise ValueError(
                "The maps of ADE20K-Full hold object ids. Give classes.json category_ids: for each class the id of "
                f"its objects, 1 to {ADE20K_MAX_ID}."
            )
        self._label_of_id = np.full(ADE20K_MAX_ID + 1, labels.ignore_index, dtype=np.int32)
        self._label_of_id[list(labels.category_ids)] = np.arange(labels.num_labels)

    def _load_map(self, path: Path) -> Image.Image:
        image = load_image(path)
        check_is_exact(image, str(path))
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(
                f"{path} has mode {image.mode}, but maps of ADE20K-Full encode ids in red and green. Unpack it "
                "from the download again."
            )
        values = np.asarray(image)
        ids = values[..., 0].astype(np.int32) // 10 * 256 + values[..., 1]
        return Image.fromarray(self._label_of_id[ids])


def cityscapes(root: str | Path, split: str, labels: LabelSet | None = None) -> SegmentationFiles:
    """Cityscapes, 19 classes: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/..._gtFine_labelTrainIds.png."""
    labels = labels or named_labels("cityscapes")
    images = _files(Path(root) / "leftImg8bit" / split, IMAGE_SUFFIXES, "_leftImg8bit", "*/*")
    remedy = "Make them from polygons with createTrainIdLabelImgs.py of cityscapesscripts."
    maps = _files(Path(root) / "gtFine" / split, MAP_SUFFIXES, "_gtFine_labelTrainIds", "*/*", remedy)
    return SegmentationFiles(images, maps, labels, "Cityscapes' classes")


def cityscapes_panoptic(root: str | Path, split: str, labels: LabelSet | None = None) -> CocoPanoptic:
    """Cityscapes with panoptic annotations, 19 classes, 8 of them things.

    Reads leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and the output of createPanopticImgs.py of cityscapesscripts:
    gtFine/cityscapes_panoptic_SPLIT.json and a folder of that name with its PNGs, or both with the suffix _trainId.
    """
    stem = Path(root) / "gtFine" / f"cityscapes_panoptic_{split}"
    json_paths = [stem.with_name(f"{stem.name}{ending}.json") for ending in ("", "_trainId")]
    json_path = next((path for path in json_paths if path.is_file()), None)
    if json_path is None:
        raise FileNotFoundError(
            f"{json_paths[0]} does not exist. Make it from polygons with createPanopticImgs.py of cityscapesscripts."
        )
    return CocoPanoptic(json_path, Path(root) / "leftImg8bit" / split, labels=labels, image_name=_cityscapes_image)


def _cityscapes_image(file_name: str) -> str:
    # That file omits the city folder, and names images after their annotations.
    name = file_name.replace("_gtFine_leftImg8bit", "_leftImg8bit")
    return name if "/" in name else f"{name.split('_')[0]}/{name}"


def mapillary_vistas(root: str | Path, split: str, labels: LabelSet | None = None) -> SegmentationFiles:
    """Mapillary Vistas: {training,validation}/images/*.jpg and labels/*.png, 65 classes in version 1.2.

    A download of version 2.0 has a folder for each version: {training,validation}/v1.2/labels and config_v1.2.json.
    Without `labels`, the classes are those of config.json, and its "Unlabeled" is ignored.
    """
    part = Path(root) / LONG_NAMES.get(split, split)
    version = "v1.2" if (part / "v1.2").is_dir() else ""
    config = Path(root) / (f"config_{version}.json" if version else "config.json")
    images = _files(part / "images", IMAGE_SUFFIXES)
    maps = _files(part / version / "labels", MAP_SUFFIXES)
    return SegmentationFiles(images, maps, labels or _mapillary_labels(config), str(config))


class CocoStuff10k(SegmentationFiles):
    """COCO-Stuff 10k in version 1.1, 171 classes: images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt.

    "val" is its test list. Pixels of a map are classes from 0, and `ignore_index` where there is none.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or a map holds an id that COCO-Stuff does not have.
    """

    def __init__(self, root: str | Path, split: str, labels: LabelSet | None = None) -> None:
        list_path = Path(root) / "imageLists" / f"{'test' if split == 'val' else split}.txt"
        if not list_path.is_file():
            raise FileNotFoundError(
                f"{list_path} does not exist. COCO-Stuff 10k has a list for train and one for test."
            )
        names = set(list_path.read_text(errors="replace").split())
        if not names:
            raise ValueError(f"{list_path} lists no image. Unpack it again.")
        images = _chosen(_files(Path(root) / "images", IMAGE_SUFFIXES), names, list_path)
        maps = _chosen(_files(Path(root) / "annotations", (".mat",)), names, list_path)
        super().__init__(images, maps, labels or named_labels("coco_stuff_10k"), "COCO-Stuff's classes")
        self._label_of_id = np.full(183, self.labels.ignore_index, dtype=np.int32)
        self._label_of_id[np.setdiff1d(np.arange(1, 183), COCO_STUFF_UNUSED_IDS)] = np.arange(171)

    def _load_map(self, path: Path) -> Image.Image:
        from scipy.io import loadmat

        try:
            content = loadmat(path)
            ids, is_first_version = content["S"], np.size(content.get("names", ())) == 172  # with "unlabeled"
            if ids.ndim != 2 or ids.dtype.kind not in "iu":
                raise ValueError(f"it holds {ids.dtype} of shape {ids.shape}, not a map of integers")
        except NotImplementedError:  # scipy's error for the later MATLAB format, which version 1.0 uses
            is_first_version = True
        # On damaged files scipy raises many kinds of error.
        except Exception as error:
            raise ValueError(f"{path} is not a label file of COCO-Stuff ({error}). Download it again.") from error
        if is_first_version:
            raise ValueError(
                f"{path} is of version 1.0 of COCO-Stuff 10k, which numbers classes differently. Download version 1.1."
            )
        unknown = np.setdiff1d(ids, np.setdiff1d(np.arange(183), COCO_STUFF_UNUSED_IDS))
        if unknown.size:
            raise ValueError(f"{path} contains the id {unknown[0]}, which COCO-Stuff does not have. Download it again.")
        return Image.fromarray(self._label_of_id[ids])


def _files(
    folder: Path, suffixes: tuple[str, ...], ending: str = "", pattern: str = "*", remedy: str = ON_LAYOUTS
) -> dict[str, Path]:
    """Like `files_by_name`, but raises a FileNotFoundError if there is none; `remedy` says what to do then."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist. {ON_LAYOUTS}")
    files = files_by_name(folder, suffixes, ending, pattern)
    if not files:
        raise FileNotFoundError(f"{folder} holds no {pattern}{ending} ({', '.join(suffixes)}). {remedy}")
    return files


def _chosen(files: dict[str, Path], names: set[str], list_path: Path) -> dict[str, Path]:
    missing = sorted(names - set(files))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {list_path} are missing, the first of them {missing[0]}. Unpack them again."
        )
    return {name: files[name] for name in names}


def named_labels(name: str) -> LabelSet:
    """The classes of a well-known data set, shipped with this package."""
    return LabelSet.from_json(LABEL_NAMES / f"{name}.json")


def _mapillary_labels(config: Path) -> LabelSet:
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist. It comes with Mapillary Vistas and names the classes.")
    try:
        entries: Sequence[dict[str, str]] = json.loads(config.read_text(encoding="utf-8"))["labels"]
        names = [entry["readable"] for entry in entries]
        # The last entry is the unlabelled class.
        if names and names[-1].lower() == "unlabeled":
            return LabelSet(dict(enumerate(names[:-1])), ignore_index=len(names) - 1)
        return LabelSet(dict(enumerate(names)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{config} has no list "labels" whose "readable" names are those of the classes ({error}). Download it '
            "again."
        ) from error
