"""The three tasks: the data they need, the predictions they give, and their metrics.

N segments of one image; H x W its size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils import ModelOutput

from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..data.labels import LabelSet
from ..data.sample import Sample, crowds_of
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..image_processing_maskformer_settings import DEFAULT_INSTANCE_THRESHOLD, DEFAULT_PANOPTIC_THRESHOLDS
from ..modeling_maskformer_pixel_level import sizes_in_batch
from ..post_processing_maskformer_inputs import Size
from .average_precision import AveragePrecision
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality

Task = Literal["semantic", "instance", "panoptic"]
TASKS: tuple[Task, ...] = ("semantic", "instance", "panoptic")
# The figures over all classes.
FIGURES: dict[Task, tuple[str, ...]] = {
    "semantic": ("mean_iou", "mean_accuracy", "overall_accuracy", "frequency_weighted_iou"),
    "instance": (
        *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
    ),
    "panoptic": tuple(f"{name}{kind}" for kind in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")),
}
# The figure that selects the best checkpoint.
MAIN_FIGURES: dict[Task, str] = {task: figures[0] for task, figures in FIGURES.items()}

Metric = MeanIoU | PanopticQuality | AveragePrecision
Context = Callable[[], AbstractContextManager[Any]]


def task_for(image_processor: Any) -> Task:
    """The task that a model was trained for, from its image processor; "semantic" if that does not say."""
    return image_processor.segmentation_task or "semantic"


def task_of(sample: Sample) -> Task:
    """The task that labels of this form are for: masks, a map of segment ids, or a map of classes."""
    if "masks" in sample:
        return "instance"
    return "semantic" if sample.get("instance_id_to_semantic_id") is None else "panoptic"


def task_of_data(dataset: Any) -> Task:
    """The task of a data set's first sample. Raises a ValueError if there is none."""
    # Iterating over torch's map-style base class may never end.
    first = next(iter(dataset), None) if not hasattr(dataset, "__len__") else dataset[0] if len(dataset) else None
    if first is None:
        raise ValueError("The data set is empty, so its task cannot be inferred.")
    return task_of(first)


def check_model(task: Task, model: torch.nn.Module) -> None:
    """Raises a ValueError if there is no such task, or the model does not support it."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
    if task != "semantic" and is_per_pixel_baseline(model):
        raise ValueError(f"A per-pixel baseline has no segments, so its task is semantic, not {task}.")


def check_sample(task: Task, sample: Sample) -> None:
    """Raises a ValueError if the labels of a sample do not support the task."""
    form = task_of(sample)
    if task == "semantic" and form == "instance":
        raise ValueError(
            f"{sample['name']} has masks, which may overlap and leave pixels without a class, so it cannot be "
            'evaluated as semantic segmentation. Choose the task "instance", or data with a map of classes.'
        )
    if task == "panoptic" and form == "instance":
        raise ValueError(
            f"{sample['name']} has masks, which may overlap, but panoptic segmentation gives each pixel to one "
            'segment. Choose the task "instance", or data with a map of segments.'
        )
    if task != "semantic" and form == "semantic":
        raise ValueError(
            f"{sample['name']} has a map of classes, which does not tell {task} segments apart. Choose the task "
            '"semantic", or data with a map of segments and the class of each.'
        )


def metric_for(task: Task, labels: LabelSet) -> Metric:
    """The metric of a task, for these classes."""
    if task == "semantic":
        return MeanIoU(labels.num_labels, labels.ignore_index)
    if task == "panoptic":
        return PanopticQuality(labels.num_labels, labels.thing_ids)
    return AveragePrecision(labels.num_labels)


def reference_of(sample: Sample, labels: LabelSet, task: Task) -> Any:
    """The reference of a sample for the metric of a task, at the sample's size.

    Semantic: a map of classes (H, W). Panoptic: a map (H, W) of ids from 1, where 0 is void, and `segments_info`.
    Instance: `masks` (N, H, W), `labels`, `iscrowd` and `area`, if the sample has it; from a map of segments, only the
    things.
    Raises a ValueError if the sample does not support the task.
    """
    check_sample(task, sample)
    if task == "semantic":
        return labels.class_map(sample["segmentation_map"], sample.get("instance_id_to_semantic_id"))
    if task == "instance" and "masks" in sample:
        reference = {"masks": sample["masks"], "labels": sample["labels"], "iscrowd": crowds_of(sample)}
        return reference | ({"area": sample["area"]} if "area" in sample else {})
    segmentation, segments_info = _numbered_segments(sample, labels)
    if task == "panoptic":
        return {"segmentation": segmentation, "segments_info": segments_info}
    things = [info for info in segments_info if not labels.thing_ids or info["label_id"] in labels.thing_ids]
    return {
        "masks": segmentation == np.array([info["id"] for info in things], dtype=np.int64)[:, None, None],
        "labels": np.array([info["label_id"] for info in things], dtype=np.int64),
        "iscrowd": np.array([info["iscrowd"] for info in things], dtype=bool),
    }


def predict_batch(
    model: torch.nn.Module,
    image_processor: MaskFormerImageProcessor,
    batch: Mapping[str, Any],
    sizes: Sequence[Size],
    task: Task,
    autocast: Context = nullcontext,
) -> list[Any]:
    """Segments a batch of images.

    Args:
        model: on its device; ours, or one with outputs like transformers' own.
        image_processor: the one that prepared the batch.
        batch: `pixel_values` and `pixel_mask`.
        sizes: (height, width) of each result.
        task: what to predict.
        autocast: returns the context of the forward pass, for mixed precision.

    Returns:
        One result per image: semantic, a map of classes; panoptic, that of `post_process_panoptic_segmentation`;
        instance, that of `post_process_instance_segmentation` with `return_coco_annotation` and no score threshold,
        since average precision uses all predictions.
    """
    inputs = inputs_for(model, batch)
    with autocast():
        outputs = outputs_for(task, model, image_processor, inputs, 0.0 if task == "instance" else None)
    return segments_of(outputs, image_processor, sizes, task)


def inputs_for(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `pixel_mask` of a batch on a model's device and in its precision."""
    parameter = next(model.parameters())
    return {
        "pixel_values": batch["pixel_values"].to(parameter.device, parameter.dtype),
        "pixel_mask": batch["pixel_mask"].to(parameter.device),
    }


def segments_of(
    outputs: Any, image_processor: MaskFormerImageProcessor, sizes: Sequence[Size] | None, task: Task
) -> list[Any]:
    """Post-processes outputs of the model as `predict_batch` does."""
    if task == "semantic":
        return image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    if task == "panoptic":
        return image_processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    return image_processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes, return_coco_annotation=True
    )


def as_prediction(result: Any, task: Task) -> Any:
    """Converts a result of `predict_batch` to the input of the task's metric."""
    if task != "instance":
        return result
    return {
        "masks": result["segmentation"],
        "scores": [info["score"] for info in result["segments_info"]],
        "labels": [info["label_id"] for info in result["segments_info"]],
    }


def outputs_for(
    task: Task, model: Any, image_processor: Any, inputs: Mapping[str, Any], threshold: float | None = None
) -> Any:
    """The outputs of a model that post-processing for the task needs.

    Masks of queries that it would drop are not computed, so for instances its options have to be those of
    `instance_options`. A model that is compiled, or whose weights are loaded when it is called, is called as usual.

    Args:
        task: of the post-processing.
        model: ours, or one with outputs like transformers' own, which computes all masks; its outputs get the sizes of
            the images, without which padding would count as image.
        image_processor: provides `panoptic_thresholds`.
        inputs: of the model.
        threshold: that of the post-processing, if not its default.
    """
    is_wrapped = hasattr(model, "_orig_mod") or hasattr(model, "_hf_hook")
    if task == "semantic" or not hasattr(model, "predict") or is_wrapped or model._compiled_call_impl is not None:
        outputs = model(**inputs)
        is_of_transformers = isinstance(outputs, ModelOutput) and getattr(outputs, "image_sizes", None) is None
        if is_of_transformers and "pixel_mask" in inputs:
            sizes = sizes_in_batch(inputs["pixel_values"], inputs["pixel_mask"])
            outputs["image_sizes"], outputs["padded_sizes"] = sizes
        return outputs
    if threshold is None:
        threshold = (
            DEFAULT_INSTANCE_THRESHOLD if task == "instance" else panoptic_thresholds(image_processor)["threshold"]
        )
    return model.predict(**inputs, threshold=threshold)


def panoptic_thresholds(image_processor: Any) -> dict[str, float]:
    """The default thresholds of panoptic post-processing."""
    return DEFAULT_PANOPTIC_THRESHOLDS | (image_processor.panoptic_thresholds or {})


def instance_options(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of instance post-processing for the result of `outputs_for`.

    `top_k` is by default the number of all queries, not only of those with masks; other options that are None are
    dropped.
    """
    decoder_config = getattr(model.config, "decoder_config", None)  # a baseline has none, and no instances
    defaults = {} if decoder_config is None else {"top_k": decoder_config.num_queries}
    return defaults | {name: value for name, value in options.items() if value is not None}


def _numbered_segments(sample: Sample, labels: LabelSet) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A sample's map renumbered from 1, with 0 where there is no class; and its non-empty segments."""
    ids, positions = np.unique(sample["segmentation_map"], return_inverse=True)
    table, crowd_ids = sample["instance_id_to_semantic_id"], sample.get("crowd_ids", ())
    classes = labels.class_map(ids, table)
    has_class = classes != labels.ignore_index
    numbers = np.cumsum(has_class) * has_class
    segments_info = [
        {"id": number, "label_id": label, "iscrowd": segment_id in crowd_ids}
        for number, label, segment_id in zip(numbers.tolist(), classes.tolist(), ids.tolist(), strict=True)
        if number > 0
    ]
    return numbers.astype(np.int32)[positions].reshape(sample["segmentation_map"].shape), segments_info
