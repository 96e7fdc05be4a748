"""A ready-made `compute_metrics` for transformers' own `Trainer`."""

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import EvalPrediction

from ..data.labels import LabelSet
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from ..modeling_per_pixel_baseline import PerPixelBaselineOutput
from .report import scalars
from .tasks import TASKS, Task, as_prediction, metric_for, segments_of, task_for

IGNORED = -1


class ComputeMetrics:
    """Accumulates the predictions of `Trainer` batch by batch, at the size of the images in the batch::

        metrics = ComputeMetrics(image_processor, labels, "panoptic")
        trainer = Trainer(
            args=TrainingArguments(..., batch_eval_metrics=True, remove_unused_columns=False),
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.logits,
            ...,
        )

    For figures at the resolution of the ground truth, and for several processes whose batches differ in size or hold
    lists of masks, use `MaskFormerTrainer`: `Trainer` gathers the masks of all processes, which must then have one
    size. What the collator leaves out of training, crowds and void, counts as void.

    Args:
        image_processor: post-processes the outputs.
        labels: the classes of the data.
        task: by default that of the image processor (`task_for`).

    Raises:
        ValueError: there is no such task.
    """

    def __init__(self, image_processor: Any, labels: LabelSet, task: Task | None = None) -> None:
        self._image_processor: MaskFormerImageProcessor = image_processor
        self._task: Task = task or task_for(image_processor)
        if self._task not in TASKS:
            raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
        self._whole_lists: Any = None  # the labels of the last batch that `logits` was given
        # Targets are already classes from 0, so the files' value of void no longer matters.
        self._metric: Any = metric_for(self._task, LabelSet(labels.id2label, IGNORED, thing_ids=labels.thing_ids))

    def logits(self, outputs: Any, labels: Any = None) -> tuple[Tensor, Tensor] | Tensor:
        """The outputs that `Trainer` keeps, as its `preprocess_logits_for_metrics`.

        The logits of classes (B, Q, K + 1) and masks (B, Q, h, w); for a per-pixel baseline its logits (B, K, h, w).

        Raises a ValueError with several processes if the labels hold lists of masks.
        """
        has_lists = isinstance(labels, tuple | list) and any(isinstance(each, tuple | list) for each in labels)
        if has_lists and PartialState().num_processes > 1:
            raise ValueError(
                "Trainer would concatenate the masks of one image from each process when it gathers lists. Evaluate "
                "masks that may overlap in one process, or with MaskFormerTrainer."
            )
        # In the last batch, Trainer would truncate each tensor in a list as if it were the batch.
        self._whole_lists = labels if has_lists else None
        return _logits(outputs)

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Adds a batch, and with `compute_result` returns the figures over all of them.

        Raises a ValueError if `Trainer` passes no `compute_result`, since it then passes all predictions at once, and
        for a per-pixel baseline if the task is not semantic.
        """
        if compute_result is None:
            raise ValueError(
                "Trainer passes the predictions of all batches at once, but metrics are accumulated batch by batch. "
                "Set batch_eval_metrics=True in TrainingArguments."
            )
        targets: Any = prediction.label_ids if self._whole_lists is None else self._whole_lists
        self._whole_lists = None
        predictions = _logits(prediction.predictions)
        if isinstance(predictions, tuple):
            mask_labels, class_labels = targets
            size = torch.tensor([_size(masks) for masks in mask_labels])
            class_logits, mask_logits = (torch.as_tensor(logits) for logits in predictions)
            outputs: Any = MaskFormerForInstanceSegmentationOutput(
                class_queries_logits=class_logits, masks_queries_logits=mask_logits, image_sizes=size, padded_sizes=size
            )
            references = [self._reference(*image) for image in zip(mask_labels, class_labels, strict=True)]
        else:
            if self._task != "semantic":
                raise ValueError(f"A per-pixel baseline has no segments, so its task is semantic, not {self._task}.")
            maps = torch.as_tensor(targets)
            size = torch.tensor([_size(label_map) for label_map in maps])
            logits = torch.as_tensor(predictions)
            outputs = PerPixelBaselineOutput(logits=logits, image_sizes=size, padded_sizes=size)
            references = list(maps.where((maps >= 0) & (maps < logits.shape[1]), IGNORED))
        results = segments_of(outputs, self._image_processor, None, self._task)
        self._metric.add_batch(
            predictions=[as_prediction(result, self._task) for result in results], references=references
        )
        return scalars(self._metric.compute()) if compute_result else {}

    def _reference(self, masks: Any, classes: Any) -> Any:
        """The reference of one image, from the segment index of each pixel (H, W), or masks (N, H, W)."""
        masks, classes = torch.as_tensor(masks), torch.as_tensor(classes).long()
        classes = classes[classes >= 0]
        if self._task == "instance":
            if masks.ndim == 2:
                masks = masks == torch.arange(len(classes), device=masks.device)[:, None, None]
            if len(masks) != len(classes):
                raise ValueError(
                    f"An image has {len(masks)} masks, but {len(classes)} labels. If they come from Trainer, pass it "
                    "preprocess_logits_for_metrics=metrics.logits, or it truncates lists of masks in the last batch."
                )
            return {"masks": masks.bool(), "labels": classes}
        if masks.ndim == 3:
            raise ValueError(f"Masks that may overlap allow no {self._task} metric. Set target_format='segment_map'.")
        if self._task == "semantic":
            return torch.cat([classes, classes.new_full((1,), IGNORED)])[masks.long()]
        segments_info = [{"id": number, "label_id": label} for number, label in enumerate(classes.tolist(), start=1)]
        return {"segmentation": masks.int() + 1, "segments_info": segments_info}


def _logits(outputs: Any) -> tuple[Tensor, Tensor] | Tensor:
    if not isinstance(outputs, tuple | list):  # a single output, which Trainer unwraps
        return outputs
    return outputs[0] if outputs[0].ndim == 4 else (outputs[0], outputs[1])


def _size(masks: Any) -> tuple[int, int]:
    height, width = masks.shape[-2:]
    return int(height), int(width)
