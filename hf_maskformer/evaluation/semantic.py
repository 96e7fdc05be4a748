"""Evaluates semantic segmentation at the resolution of the ground truth, one batch at a time."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..data.check import LabelledDataset
from ..data.labels import LabelSet
from ..data.sample import Sample
from ..image_processing_maskformer import MaskFormerImageProcessor
from .mean_iou import MeanIoU


@torch.no_grad()
def evaluate_semantic(
    model: torch.nn.Module,
    image_processor: MaskFormerImageProcessor,
    dataset: LabelledDataset,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Predicts every sample, enlarges the prediction to its ground truth and counts.

    Nothing but a confusion matrix is kept. With several processes each takes its share of the samples, and all return
    the same figures of the whole data set. Shows a progress bar; the model's training mode is restored.

    Args:
        model: a `MaskFormerForInstanceSegmentation`, on its device.
        image_processor: prepares the images and post-processes the outputs.
        dataset: samples with their `labels`; the references have original size.
        batch_size: images in a batch, of each process.
        num_workers: worker processes that read and prepare.
        autocast: makes the context of each forward pass, for mixed precision.

    Returns:
        The figures of `MeanIoU.compute`.
    """
    state = PartialState()
    # Every process takes each n-th sample: unlike a distributed sampler, this counts none twice.
    indices = range(state.process_index, len(dataset), state.num_processes)
    share: Subset[Sample] = Subset(dataset, indices)  # type: ignore[arg-type]  # Subset only asks for [] and len()
    collate = partial(_collate, image_processor=image_processor, labels=dataset.labels)
    loader = DataLoader(share, batch_size, num_workers=num_workers, collate_fn=collate)
    metric = MeanIoU(dataset.labels.num_labels, dataset.labels.ignore_index)
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    for batch, references in tqdm(loader, desc="Evaluating", unit="batch", disable=not state.is_local_main_process):
        with autocast():
            outputs = model(
                pixel_values=batch["pixel_values"].to(parameter.device, parameter.dtype),
                pixel_mask=batch["pixel_mask"].to(parameter.device),
            )
        sizes = [reference.shape for reference in references]
        predictions = image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        metric.add_batch(predictions=predictions, references=references)
    model.train(was_training)
    metric.confusion_matrix = reduce(metric.confusion_matrix.to(parameter.device), reduction="sum")
    return metric.compute()


def _collate(
    samples: Sequence[Sample], image_processor: MaskFormerImageProcessor, labels: LabelSet
) -> tuple[dict[str, Any], list[np.ndarray]]:
    batch = image_processor(images=[sample["image"] for sample in samples], return_tensors="pt")
    references = [
        labels.class_map(sample["segmentation_map"], sample.get("instance_id_to_semantic_id")) for sample in samples
    ]
    return dict(batch), references
