"""Writes the predictions of an evaluation in the files that other tools read."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Subset
from transformers.utils import logging

from ..data.labels import labels_of, shorten
from ..data.sample import check_file_name
from .formats import coco_results, panoptic_annotation, panoptic_image, semantic_image
from .tasks import Task

logger = logging.get_logger(__name__)


class PredictionWriter:
    """Takes the results of `evaluate`, as its `on_result`, and writes them; `finish` completes the files.

    - Semantic: FOLDER/NAME.png, whose pixels number the classes as maps of a folder would: from 0, or from 1 where
      `do_reduce_labels` says so.
    - Panoptic, for panopticapi: FOLDER/panoptic/NAME.png (id = R + 256 G + 65536 B) and FOLDER/panoptic.json.
    - Instance, for `COCO.loadRes`: FOLDER/instances.json, a list of results with their run lengths.

    Categories have the ids of the data set, `LabelSet.category_ids`; without these, those of the classes, from 1 where
    `do_reduce_labels` says so. Images have those of its JSON file; without one, their index in the data set.

    Args:
        folder: made if it does not exist; files of these names are replaced.
        task: of the evaluation.
        dataset: what is evaluated; if it, or what it is a `torch.utils.data.Subset` of, has a method `image_id(index)`,
            that names the images.

    Raises a ValueError, when called, for a name that leads out of the folder, and for a name or id that a sample before
    had: the worker processes of a stream each count their samples from 0. `finish` raises it if another process had it.
    """

    def __init__(self, folder: str | Path, task: Task, dataset: Any) -> None:
        self._folder, self._task, self._dataset = Path(folder), task, dataset
        self._labels = labels_of(dataset)
        first = int(self._labels.do_reduce_labels)
        numbers = range(first, first + self._labels.num_labels)
        self._category_ids = dict(enumerate(self._labels.category_ids or numbers))
        self._entries: list[dict[str, Any]] = []
        self._identities: set[str] = set()
        (self._folder / "panoptic" if task == "panoptic" else self._folder).mkdir(parents=True, exist_ok=True)

    def __call__(self, index: int, name: str, result: Any) -> None:
        """Writes or remembers the result of one sample."""
        if self._task == "semantic":
            label_map = np.asarray(result.cpu()) + int(self._labels.do_reduce_labels)
            semantic_image(label_map).save(self._path(self._folder, name))
            return
        image_id = _image_id(self._dataset, index)
        self._require_new(f"image_id {image_id}", "read a stream with no more than one worker process")
        if self._task == "panoptic":
            result = {**result, "segmentation": result["segmentation"].cpu()}
            panoptic_image(result["segmentation"]).save(self._path(self._folder / "panoptic", name))
            self._entries.append(panoptic_annotation(result, image_id, f"{name}.png", self._category_ids))
        else:
            self._entries += coco_results(result, image_id, self._category_ids)

    def finish(self) -> None:
        """Writes the JSON file of all processes' entries; to be called by all of them once."""
        counts = Counter(gather_object(sorted(self._identities)))
        repeated = [identity for identity, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(
                f"Samples of several processes have the {shorten(repeated)}, so predictions were replaced."
            )
        if self._task == "semantic":
            return
        entries = gather_object(self._entries)
        if PartialState().is_main_process:
            content = {"annotations": entries} if self._task == "panoptic" else entries
            name = "panoptic.json" if self._task == "panoptic" else "instances.json"
            (self._folder / name).write_text(json.dumps(content))
            if not entries:
                logger.warning(
                    f"No object was found in any image: {self._folder / name} is an empty list, which `COCO.loadRes` "
                    "refuses."
                )

    def _path(self, folder: Path, name: str) -> Path:
        # A column of a data set may name its samples in any way.
        check_file_name(f"{name}.png", folder, "The data set")
        self._require_new(f"name {name}", "rename the file, or in columns the entry of `name`")
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _require_new(self, identity: str, remedy: str) -> None:
        if identity in self._identities:
            raise ValueError(f"Several samples have the {identity}, which must tell their predictions apart; {remedy}.")
        self._identities.add(identity)


def _image_id(dataset: Any, index: int) -> Any:
    while not hasattr(dataset, "image_id"):
        if not isinstance(dataset, Subset):
            return index
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.image_id(index)
