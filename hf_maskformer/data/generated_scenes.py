"""A synthetic data set that needs no download: textured backgrounds with overlapping objects, exactly labelled.

Background classes differ by texture and object classes by shape, never by colour; `color_classifier_mean_iou`
measures how little a colour gives away.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .labels import LabelSet
from .sample import Sample
from .scene_drawing import CLASS_NAMES, THING_IDS, Scene, draw_scene

LABELS = LabelSet(dict(enumerate(CLASS_NAMES)), thing_ids=tuple(THING_IDS))
MIN_SIDE = 64


class GeneratedScenes(Dataset[Sample]):
    """Scenes drawn on access; scene i of a seed is the same in every process, access order and length.

    For the semantic task `segmentation_map` is (H, W) uint8 with class ids. For the panoptic task it is (H, W) int32
    with segment ids from 1, and `instance_id_to_semantic_id` gives their classes. Every pixel is labelled.

    Args:
        num_scenes: number of scenes.
        seed: which series of scenes, 0 or more.
        image_size: (height, width) in pixels, at least 64 each.
        task: "semantic" or "panoptic".
    """

    def __init__(
        self,
        num_scenes: int,
        seed: int = 0,
        image_size: tuple[int, int] = (128, 128),
        task: Literal["semantic", "panoptic"] = "semantic",
    ) -> None:
        if num_scenes < 0 or seed < 0:
            raise ValueError(f"num_scenes is {num_scenes} and seed is {seed}; neither may be negative.")
        if min(image_size) < MIN_SIDE:
            raise ValueError(
                f"image_size is {image_size}; shapes need at least {MIN_SIDE} pixels a side to be told apart."
            )
        if task not in ("semantic", "panoptic"):
            raise ValueError(f'task is {task!r}; use "semantic" or "panoptic".')
        self.num_scenes, self.seed, self.image_size, self.task = num_scenes, seed, image_size, task
        self.labels = LABELS

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        sample: Sample = {
            "image": Image.fromarray(scene.image),
            "segmentation_map": scene.label_map,
            "name": self.name(index),
        }
        if self.task == "panoptic":
            sample["segmentation_map"] = scene.segment_map
            sample["instance_id_to_semantic_id"] = scene.segment_labels
        return sample

    def scene(self, index: int) -> Scene:
        """Draws scene `index` (0 to length - 1) with both kinds of labels. Raises IndexError for any other index."""
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"There is no scene {index}: this data set has scenes 0 to {self.num_scenes - 1}.")
        return draw_scene(np.random.default_rng((self.seed, index)), self.image_size)

    def name(self, index: int) -> str:
        """The file stem of scene `index`."""
        return f"scene_{index:05d}"


def write_generated_scenes(
    root: str | Path, num_train: int, num_val: int, seed: int = 0, image_size: tuple[int, int] = (128, 128)
) -> None:
    """Writes scenes as a folder data set with semantic and COCO panoptic labels.

    The folder then holds `images/{train,val}/NAME.png`, `annotations/{train,val}/NAME.png` (8-bit class ids),
    `classes.json`, `panoptic/{train,val}/NAME.png` (segment id = R + 256 G + 65536 B) and `panoptic_{train,val}.json`.
    No scene is in both splits; val comes first in the series, so it stays the same when train grows.

    Raises FileExistsError if `root` is not empty, since leftovers would count as scenes, and ValueError if a split
    would have no scene.
    """
    root = Path(root)
    if min(num_train, num_val) < 1:
        raise ValueError(f"num_train is {num_train} and num_val {num_val}; each split needs at least one scene.")
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; remove it or choose a new folder for the generated scenes.")
    scenes = GeneratedScenes(num_val + num_train, seed, image_size)
    for split, indices in (("train", range(num_val, num_val + num_train)), ("val", range(num_val))):
        _write_split(root, split, scenes, indices)
    LABELS.to_json(root / "classes.json")


def _write_split(root: Path, split: str, scenes: GeneratedScenes, indices: range) -> None:
    folders = [root / kind / split for kind in ("images", "annotations", "panoptic")]
    for folder in folders:
        folder.mkdir(parents=True)
    images, annotations = [], []
    for index in tqdm(indices, desc=f"Drawing {split} scenes", unit="scene"):
        scene, file_name = scenes.scene(index), f"{scenes.name(index)}.png"
        segment_colors = (scene.segment_map[..., None] >> np.array([0, 8, 16]) & 255).astype(np.uint8)
        for folder, pixels in zip(folders, (scene.image, scene.label_map, segment_colors), strict=True):
            Image.fromarray(pixels).save(folder / file_name)
        height, width = scene.segment_map.shape
        images.append({"id": index, "file_name": file_name, "height": height, "width": width})
        annotations.append({"image_id": index, "file_name": file_name, "segments_info": _segments_info(scene)})
    categories = [
        {"id": label, "name": name, "isthing": int(label in THING_IDS)} for label, name in LABELS.id2label.items()
    ]
    panoptic = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"panoptic_{split}.json").write_text(json.dumps(panoptic))


def _segments_info(scene: Scene) -> list[dict[str, Any]]:
    """The COCO panoptic description of every segment; boxes are (left, top, width, height)."""
    infos = []
    for segment_id, label in scene.segment_labels.items():
        rows, columns = (scene.segment_map == segment_id).nonzero()
        left, top = int(columns.min()), int(rows.min())
        bbox = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        infos.append({"id": segment_id, "category_id": label, "area": len(rows), "bbox": bbox, "iscrowd": 0})
    return infos


def color_classifier_mean_iou(train: Iterable[Sample], val: Iterable[Sample], num_labels: int) -> float:
    """Returns the mean IoU (0 to 1) on `val` of a classifier that sees one pixel's colour and nothing else.

    It counts on `train` how often each colour (16 levels per channel) has each class and predicts the most likely one,
    with the classes weighted by frequency or equally, whichever scores better. The mean is over the classes in `val`;
    pixels of 255 are ignored. Samples are those of `GeneratedScenes` for the semantic task.

    Raises ValueError if a map holds a label outside 0 to num_labels - 1 other than 255, or nothing is labelled.
    """
    counts, val_counts = (_count_colors(samples, num_labels) for samples in (train, val))
    frequency = counts.sum(0) / counts.sum()
    # A little of the overall frequency decides for colours that `train` does not contain.
    by_frequency = counts + 1e-3 * frequency
    alike = by_frequency / np.maximum(frequency, 1e-9)
    return max(_mean_iou(scores.argmax(1), val_counts) for scores in (by_frequency, alike))


def _count_colors(samples: Iterable[Sample], num_labels: int) -> np.ndarray:
    """Counts the pixels of each colour and class, (4096, num_labels)."""
    counts = np.zeros(4096 * num_labels, dtype=np.int64)
    for sample in samples:
        labels = np.asarray(sample["segmentation_map"]).astype(np.int64)
        kept = labels != LABELS.ignore_index
        outside = labels[kept & ((labels < 0) | (labels >= num_labels))]
        if outside.size:
            raise ValueError(
                f"{sample['name']} contains label {outside[0]}, but labels are 0 to {num_labels - 1}. "
                "Raise num_labels, or pass semantic maps if these are segment ids."
            )
        red, green, blue = np.moveaxis(np.asarray(sample["image"])[kept].astype(np.int64) // 16, -1, 0)
        colors = (red * 16 + green) * 16 + blue
        counts += np.bincount(colors * num_labels + labels[kept], minlength=len(counts))
    if not counts.any():
        raise ValueError(
            "There is no labelled pixel to fit or score; pass at least one labelled sample as train and val."
        )
    return counts.reshape(4096, num_labels)


def _mean_iou(predicted: np.ndarray, counts: np.ndarray) -> float:
    """Mean IoU of predicting class `predicted` (4096,) for each colour, given the pixel counts (4096, num_labels)."""
    num_labels = counts.shape[1]
    confusion = np.stack([counts[predicted == label].sum(0) for label in range(num_labels)])
    hits, present = confusion.diagonal(), counts.sum(0) > 0
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits[present] / union[present]).mean())
