"""Evaluates a model at the resolution of the ground truth, one batch at a time, over all processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from ..data.labels import LabelSet, labels_of
from ..data.sample import Sample
from ..data.workers import dead_workers_named
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..post_processing_maskformer_inputs import MAX_EDGE
from .processes import merge_over_processes
from .scale_averaging import augmented_semantic_scores
from .tasks import Context, Task, as_prediction, check_model, metric_for, predict_batch, reference_of, task_for

Numbered = tuple[int, Sample]
# The paper's scales for ADE20K, relative to the size at which an image is evaluated. (There, edges are fixed by the
# settings, which differs where the longest edge limits an image, on ADE20K beyond 4 : 1.)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    image_processor: Any,
    dataset: Any,
    task: Task | None = None,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    scale_averaging: bool = False,
    autocast: Context = nullcontext,
    on_result: Callable[[int, str, Any], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Predicts every sample at the size of its ground truth and computes the task's metric.

    No masks are gathered: each process counts its share of the samples, and all return the same figures for the whole
    data set. Batch norm statistics become those of the first process, whose model is the one that is saved. Shows a
    progress bar; the model's training mode is restored.

    Args:
        model: a `MaskFormerForInstanceSegmentation`, or for the semantic task a per-pixel baseline, on its device.
        image_processor: a `MaskFormerImageProcessor`, which prepares images and post-processes outputs, panoptic
            ones with its thresholds.
        dataset: samples with their `labels` (see `labels_of`), map-style or iterable; the references have the original
            size. With workers, an iterable one must give each worker its own share, or its samples are counted
            several times.
        task: by default the image processor's `segmentation_task`, or "semantic" if that is not set.
        batch_size: batch size per process.
        num_workers: worker processes that read and preprocess.
        scale_averaging: average predictions over scales of 0.5 to 1.75 and horizontal flips; semantic only.
        autocast: returns the context of each forward pass, for mixed precision.
        on_result: called with index, name and result (see `predict_batch`) of every sample of this process.
        should_stop: called after each batch; once it returns True, the rest of this process's share is skipped.

    Returns:
        The figures of `MeanIoU.compute`, `PanopticQuality.compute` or `AveragePrecision.compute`; none if any process
        was stopped.

    Raises:
        ValueError: there are no `labels`, or they or the model do not support the task.
        ChildProcessError: a worker process died.
    """
    task, labels = task or task_for(image_processor), labels_of(dataset)
    check_model(task, model)
    if scale_averaging and task != "semantic":
        raise ValueError(
            f"Scales are averaged for semantic segmentation, not for {task}. Leave out scale_averaging (--tta)."
        )
    state = PartialState()
    share = _share(dataset, state.process_index, state.num_processes)
    collate = partial(_collate, image_processor=image_processor, labels=labels, task=task)
    # A separate generator, so that evaluating does not change the random numbers of training.
    generator = torch.Generator()
    loader: Iterable[Any] = DataLoader(
        share, batch_size, num_workers=num_workers, collate_fn=collate, generator=generator
    )
    metric: Any = metric_for(task, labels)
    norms = (module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    broadcast([buffer for norm in norms for buffer in norm.buffers()])
    was_training, is_stopped = model.training, False
    model.eval()
    # The error of a worker's death may be raised anywhere, so the model's mode is restored inside it too.
    with dead_workers_named(num_workers):
        try:
            for samples, batch, references in tqdm(
                loader, desc="Evaluating", unit="batch", disable=not state.is_local_main_process
            ):
                sizes = [(image.height, image.width) for _, _, image in samples]
                if scale_averaging:
                    with autocast():
                        results = [_averaged(model, image_processor, image) for _, _, image in samples]
                else:
                    results = predict_batch(model, image_processor, batch, sizes, task, autocast)
                predictions = [as_prediction(result, task) for result in results]
                try:
                    metric.add_batch(predictions=predictions, references=references)
                except ValueError as error:
                    names = ", ".join(name for _, name, _ in samples)
                    raise ValueError(f"Sample {names}: {error}") from error
                if on_result is not None:
                    for (index, name, _), result in zip(samples, results, strict=True):
                        on_result(index, name, result)
                if should_stop is not None and should_stop():
                    is_stopped = True
                    break
        finally:
            model.train(was_training)
    # A part of the samples may have no figures, for instance if no object was seen yet.
    if should_stop is not None and any(gather_object([is_stopped])):
        return {}
    merge_over_processes(metric)
    return metric.compute()


def _averaged(model: torch.nn.Module, image_processor: Any, image: Image.Image) -> torch.Tensor:
    shortest = min(image_processor.resized_size((image.height, image.width)))
    edges = [max(1, round(scale * shortest)) for scale in SCALES]
    # Scales are relative to the evaluated size, which the longest edge has already limited.
    scores = augmented_semantic_scores(model, image_processor, image, shortest_edges=edges, longest_edge=MAX_EDGE)
    return scores.argmax(0)


def _share(dataset: Any, process: int, num_processes: int) -> Dataset[Numbered]:
    """Every n-th sample, with its index: unlike a distributed sampler, this repeats none."""
    kind = _Share if hasattr(dataset, "__len__") else _StreamedShare
    return kind(dataset, process, num_processes)


class _Share(Dataset[Numbered]):
    def __init__(self, dataset: Any, process: int, num_processes: int) -> None:
        self._dataset, self._indices = dataset, range(process, len(dataset), num_processes)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Numbered:
        index = self._indices[position]
        return index, self._dataset[index]


class _StreamedShare(IterableDataset[Numbered]):
    """The share of a stream whose workers read their own shards; the index is the position in the worker's stream."""

    def __init__(self, dataset: Any, process: int, num_processes: int) -> None:
        self._dataset, self._process, self._num_processes = dataset, process, num_processes

    def __iter__(self) -> Iterator[Numbered]:
        for index, sample in enumerate(self._dataset):
            if index % self._num_processes == self._process:
                yield index, sample


def _collate(
    samples: Sequence[Numbered], image_processor: MaskFormerImageProcessor, labels: LabelSet, task: Task
) -> tuple[list[tuple[int, str, Image.Image]], dict[str, Any], list[Any]]:
    references = [reference_of(sample, labels, task) for _, sample in samples]
    batch = image_processor(images=[sample["image"] for _, sample in samples], return_tensors="pt")
    return [(index, sample["name"], sample["image"]) for index, sample in samples], dict(batch), references
