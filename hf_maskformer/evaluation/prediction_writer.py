"""Writes the predictions of an evaluation in the file formats of other tools."""

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

    - Semantic: FOLDER/NAME.png, whose pixels are class ids as in the maps of a folder: from 0, or from 1 with
      `do_reduce_labels`.
    - Panoptic, for panopticapi: FOLDER/panoptic/NAME.png (id = R + 256 G + 65536 B) and FOLDER/panoptic.json.
    - Instance, for `COCO.loadRes`: FOLDER/instances.json, a list of results with their RLEs.

    Category ids are those of the data set, `LabelSet.category_ids`, or else those of the classes, from 1 with
    `do_reduce_labels`. Image ids are those of its JSON file, or else indices in the data set.

    Args:
        folder: created if it does not exist; existing files are replaced.
        task: of the evaluation.
        dataset: what is evaluated; if it, or what it is a `torch.utils.data.Subset` of, has a method `image_id(index)`,
            that gives the image ids.

    Raises a ValueError, when called, for a name that leads out of the folder, and for a duplicate name or id: the
    worker processes of a stream each count their samples from 0. `finish` raises it for duplicates across processes.
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
        """Writes the result of one sample, or stores it for `finish`."""
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
        """Writes the JSON file with the entries of all processes; all of them must call it once."""
        counts = Counter(gather_object(sorted(self._identities)))
        repeated = [identity for identity, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(
                f"Samples of several processes have the {shorten(repeated)}, so predictions were overwritten."
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
                    "rejects."
                )

    def _path(self, folder: Path, name: str) -> Path:
        # Names from a column of a data set may be anything.
        check_file_name(f"{name}.png", folder, "The data set")
        self._require_new(f"name {name}", "rename the file, or in columns the entry of `name`")
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _require_new(self, identity: str, remedy: str) -> None:
        if identity in self._identities:
            raise ValueError(f"Several samples have the {identity}, which must be unique for predictions; {remedy}.")
        self._identities.add(identity)


def _image_id(dataset: Any, index: int) -> Any:
    while not hasattr(dataset, "image_id"):
        if not isinstance(dataset, Subset):
            return index
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.image_id(index)
