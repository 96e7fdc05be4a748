"""Counting semantic predictions for mean IoU."""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_maskformer import MeanIoU

from .inputs import NUM_LABELS
from .measuring import Comparison

NUM_SEGMENTS = 15


def metric(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Predictions as from post-processing (int64) and references as from image files (uint8), ten pairs in turn.

    "stock" is numpy's histogram, as in `evaluate`'s mean_iou, without its storage.
    """
    pairs = [random_semantic_pair(arguments.size) for _ in range(10)]
    images = list(itertools.islice(itertools.cycle(pairs), arguments.batch))
    predictions, references = zip(*images, strict=True)
    ours = MeanIoU(NUM_LABELS)

    def count() -> None:
        ours.add_batch(predictions=predictions, references=references)

    def histogram() -> Any:
        return sum(areas_by_histogram(prediction.numpy(), reference) for prediction, reference in images)

    count()
    matrix = ours.confusion_matrix.numpy()
    # In both, a predicted pixel counts only where the reference is not void.
    areas = np.stack([matrix.diagonal(), matrix[:, :-1].sum(0), matrix.sum(1)])
    if (areas != histogram()).any():
        raise RuntimeError("The counts differ, so their times mean nothing.")
    yield "metric", {"stock": histogram, "ours": count}


def random_semantic_pair(height: int) -> tuple[torch.Tensor, np.ndarray]:
    """A reference of smooth segments with a void margin, and a prediction that agrees on 9 of 10 pixels."""
    size = (height, round(height * 4 / 3))
    coarse, fine = torch.randn(1, NUM_SEGMENTS, 6, 8), torch.randn(1, NUM_SEGMENTS, size[0] // 16, size[1] // 16)
    smooth, noise = (F.interpolate(field, size, mode="bicubic") for field in (coarse, fine))
    labels = torch.randint(NUM_LABELS, (NUM_SEGMENTS,))
    reference = labels[smooth[0].argmax(0)].numpy().astype(np.uint8)
    reference[: height // 20] = 255
    return labels[(smooth + 0.1 * noise)[0].argmax(0)], reference


def areas_by_histogram(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pixels of each class (3, K) where both agree, in the prediction and in the reference; void excluded."""
    is_counted = reference != 255
    prediction, reference = prediction[is_counted], reference[is_counted]
    groups = (prediction[prediction == reference], prediction, reference)
    return np.stack([np.histogram(values, bins=NUM_LABELS, range=(0, NUM_LABELS - 1))[0] for values in groups])
