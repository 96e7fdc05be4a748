"""Draws predictions for TensorBoard, after every evaluation, and for model cards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..data.labels import LabelSet, labels_of
from ..data.sample import Sample
from ..evaluation.drawing import draw_comparison, draw_segmentation, legend_labels
from ..evaluation.prediction import predict
from ..evaluation.tasks import reference_of, task_for
from ..hub.model_card import Picture

FOLDER = "pictures"
MAX_SIDE = 1600  # pixels of a picture in a model card


class PictureCallback(TrainerCallback):
    """Shows the first samples of a data set as image, ground truth and prediction; writes only TensorBoard events.

    Args:
        dataset: samples with their `labels`, map-style.
        image_processor: a `MaskFormerImageProcessor`, for the predictions; its `segmentation_task` is what is drawn.
        tensorboard: transformers' callback, whose event file gets the pictures.
        num_pictures: how many samples.
    """

    def __init__(
        self,
        dataset: Any,
        image_processor: Any,
        tensorboard: TensorBoardCallback,
        num_pictures: int = 4,
    ) -> None:
        self._dataset, self._image_processor, self._tensorboard = dataset, image_processor, tensorboard
        self._num_pictures = num_pictures

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        writer: Any = self._tensorboard.tb_writer
        if writer is None or not state.is_world_process_zero:
            return
        drawn = draw_samples(kwargs["model"], self._image_processor, self._dataset, self._num_pictures)
        for name, picture in drawn:
            writer.add_image(f"eval/{name}", np.asarray(picture), state.global_step, dataformats="HWC")


def drawn_data(trainer: Any) -> Any:
    """The evaluation data of a trainer, the first of several, if its first samples can be drawn; otherwise None."""
    dataset = trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    # A process that holds only a part of the weights cannot predict alone.
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return dataset if hasattr(dataset, "__len__") and not is_sharded else None


def write_pictures(model: Any, image_processor: Any, dataset: Any, num_pictures: int, folder: Path) -> list[Picture]:
    """Draws the first samples of a data set as `picture_of` does, for a model card.

    Args:
        model, image_processor: what predicts.
        dataset: samples with their `labels`, map-style.
        num_pictures: how many samples.
        folder: the folder of the card; pictures of an earlier card there are removed.
    """
    for path in (folder / FOLDER).glob("sample_*.jpg"):
        path.unlink()
    pictures = []
    # Without sample names, which may reveal more than their owner wants to publish.
    for number, (_, drawn) in enumerate(draw_samples(model, image_processor, dataset, num_pictures), start=1):
        drawn.thumbnail((MAX_SIDE, MAX_SIDE))
        pictures.append(Picture("Image, ground truth and prediction", f"{FOLDER}/sample_{number}.jpg"))
        (folder / FOLDER).mkdir(exist_ok=True)
        drawn.save(folder / pictures[-1].file, quality=90)
    return pictures


def draw_samples(
    model: Any, image_processor: Any, dataset: Any, num_pictures: int
) -> Iterator[tuple[str, Image.Image]]:
    """The names of the first samples of a data set and their pictures (`picture_of`); restores the model's mode."""
    was_training = model.training
    model.eval()
    try:
        for index in range(min(num_pictures, len(dataset))):
            sample = dataset[index]
            yield sample["name"], picture_of(model, image_processor, sample, labels_of(dataset))
    finally:
        model.train(was_training)


@torch.no_grad()
def picture_of(model: Any, image_processor: Any, sample: Sample, labels: LabelSet) -> Image.Image:
    """Draws the image of a sample, its ground truth and a model's prediction side by side, with a legend."""
    task = task_for(image_processor)
    truth = reference_of(sample, labels, task)
    if task == "instance":
        truth = _as_id_map(truth, (sample["image"].height, sample["image"].width))
    prediction = predict(model, image_processor, sample["image"], task)
    pictures: list[tuple[Any, Any]]
    if task == "semantic":
        pictures = [(truth, None), (prediction.segmentation, None)]
        present = np.concatenate([truth.ravel(), prediction.segmentation.ravel()])
    else:
        pictures = [(truth["segmentation"], truth["segments_info"]), (prediction.segmentation, prediction.segments)]
        present = np.array([info["label_id"] for _, segments in pictures for info in segments], dtype=np.int64)
    panels = [
        draw_segmentation(
            sample["image"], segmentation, labels.id2label, segments=segments, ignore_index=labels.ignore_index
        )
        for segmentation, segments in pictures
    ]
    titled = list(zip(("ground truth", "prediction"), panels, strict=True))
    return draw_comparison(sample["image"], titled, legend_labels(present, labels.id2label))


def _as_id_map(objects: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Draws masks on top of one another, the smallest last."""
    masks = np.asarray(objects["masks"])
    segmentation = np.zeros(size, dtype=np.int32)
    for number in np.argsort(-masks.sum(axis=(1, 2))):
        segmentation[masks[number]] = number + 1
    segments_info = [{"id": number, "label_id": int(label)} for number, label in enumerate(objects["labels"], start=1)]
    return {"segmentation": segmentation, "segments_info": segments_info}
