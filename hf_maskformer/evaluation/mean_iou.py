"""Mean intersection over union of semantic segmentation, from one streaming confusion matrix."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .segmentation_maps import SegmentationMap, flag_run_ends, in_pairs, pairs_with_counts, to_tensors

# Pixels that are counted at once.
PIXELS_AT_ONCE = 2**20

T = TypeVar("T")
R = TypeVar("R")


class MeanIoU:
    """Mean IoU, mean and overall pixel accuracy, and the figures of each class, over any number of images.

    Stores counts only, so memory does not grow with the images. Has the interface of `evaluate`'s metrics: `add_batch`
    (or `add`) for the images, then `compute`, which also resets. Classes that do not occur in the references are left
    out of the means.

    Pixels whose reference is `ignore_index` are not counted. Elsewhere a prediction that is not a class (void,
    `ignore_index`, outside 0 to K - 1) is a false negative for the reference's class and a false positive for none.

    Args:
        num_labels: number of classes, K.
        ignore_index: label of reference pixels that are not counted.

    Attributes:
        confusion_matrix: (K, K + 1) int64 on the device of the inputs. Row: class of the reference; column: predicted
            class, the last one for no class.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; it must be at least 1.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.confusion_matrix = torch.zeros(self.num_labels, self.num_labels + 1, dtype=torch.int64, device="cpu")

    def add(self, *, prediction: SegmentationMap, reference: SegmentationMap) -> None:
        """Adds one image.

        Both are (H, W) integers, as tensor, array or single-channel PIL image; the reference holds 0 to K - 1 and
        `ignore_index`. Raises a ValueError if their shapes differ, values are not integers or a reference label is
        unknown.
        """
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Iterable[SegmentationMap], references: Iterable[SegmentationMap]) -> None:
        """Adds several images, whose sizes may differ; on the CPU with two threads if torch may use them.

        See `add`. If it raises an error, none of them counts.
        """
        images = [to_tensors(*maps) for maps in in_pairs(predictions, references)]
        # Small images are counted several at a time, to save the overhead of many short steps.
        is_on_cpu = all(predicted.device.type == "cpu" for predicted, _ in images)
        num_pixels = sum(predicted.numel() for predicted, _ in images)
        num_parts = min(max(1, -(-num_pixels // PIXELS_AT_ONCE)), len(images)) if is_on_cpu else len(images)
        parts = [images[index::num_parts] for index in range(num_parts)]
        matrix = self.confusion_matrix
        flags = _one_ahead(flag_run_ends, parts) if is_on_cpu else map(flag_run_ends, parts)
        for part, ends_run in zip(parts, flags, strict=True):
            counted = self._count(part, ends_run)
            # Not in place, so that a matrix created in inference mode can be updated outside of it.
            matrix = matrix.to(counted.device) + counted
        self.confusion_matrix = matrix

    def merge(self, other: "MeanIoU") -> None:
        """Adds the counts of another metric, for instance of another process."""
        if (self.num_labels, self.ignore_index) != (other.num_labels, other.ignore_index):
            raise ValueError(
                f"The metrics do not match: num_labels {self.num_labels} and {other.num_labels}, ignore_index "
                f"{self.ignore_index} and {other.ignore_index}."
            )
        self.confusion_matrix = self.confusion_matrix + other.confusion_matrix.to(self.confusion_matrix.device)

    def compute(self) -> dict[str, Any]:
        """Returns the figures as fractions in 0 to 1, and resets.

        Returns `mean_iou`, `mean_accuracy`, `overall_accuracy` (share of correct pixels) and
        `frequency_weighted_iou` (weighted by pixels in the references) as floats, and `per_category_iou` and
        `per_category_accuracy` as float64 arrays (K,), NaN for a class that does not occur in the references.
        Raises a ValueError if no pixel was counted.
        """
        matrix = self.confusion_matrix.cpu().numpy()
        if not matrix.any():
            raise ValueError(
                "No labelled pixel was counted since the start or the last compute(). Call add_batch() first, and "
                "check that not all reference pixels are ignore_index."
            )
        self.reset()
        return summarise(matrix)

    def _count(self, images: Sequence[tuple[Tensor, Tensor]], ends_run: np.ndarray | None) -> Tensor:
        """Returns the confusion matrix of a few images on one device; `ends_run` is that of `flag_run_ends`."""
        predicted: Any
        expected: Any
        predicted, expected, counts = pairs_with_counts(images, ends_run)
        if predicted.device.type == "cpu":
            # The code below works for both, but numpy has less overhead in so many small steps.
            predicted, expected = predicted.numpy(), expected.numpy()
        is_ignored = expected == self.ignore_index
        is_unknown = (expected != expected.clip(0, self.num_labels - 1)) > is_ignored
        if is_unknown.any():
            raise ValueError(
                f"A reference contains label {int(expected[is_unknown][0])}, but there are {self.num_labels} labels (0 "
                f"to {self.num_labels - 1}) and ignore_index is {self.ignore_index}. Set num_labels and ignore_index "
                "to those of the data set, and reduce its labels first if they count from 1."
            )
        # Predictions that are not a class go to the last column, ignored pixels to an extra last row.
        rows, columns = (values.clip(-1, self.num_labels) for values in (expected, predicted))
        columns[columns < 0] = self.num_labels
        rows[is_ignored] = self.num_labels
        size = self.num_labels + 1
        places = rows * size + columns
        places = (torch.from_numpy(places) if isinstance(places, np.ndarray) else places).long()
        if counts is None:
            counts = torch.ones_like(places)
        matrix = counts.new_zeros(size * size).scatter_add_(0, places, counts)
        return matrix.view(size, size)[:-1]


def _one_ahead(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Like `map`, but a thread computes the next item while the caller uses a result, if torch may use two."""
    if len(items) < 2 or torch.get_num_threads() == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(function, items[0])
        for item in items[1:]:
            result = coming.result()
            coming = thread.submit(function, item)
            yield result
        yield coming.result()


def summarise(confusion_matrix: np.ndarray) -> dict[str, Any]:
    """Returns the figures of `MeanIoU.compute` from a confusion matrix (K, K + 1) with at least one count."""
    num_labels = len(confusion_matrix)
    right = confusion_matrix.diagonal()
    expected = confusion_matrix.sum(axis=1)
    union = expected + confusion_matrix[:, :num_labels].sum(axis=0) - right
    is_present = expected > 0
    iou = np.divide(right, union, out=np.full(num_labels, np.nan), where=is_present)
    accuracy = np.divide(right, expected, out=np.full(num_labels, np.nan), where=is_present)
    return {
        "mean_iou": float(iou[is_present].mean()),
        "mean_accuracy": float(accuracy[is_present].mean()),
        "overall_accuracy": float(right.sum() / expected.sum()),
        "frequency_weighted_iou": float((iou * expected)[is_present].sum() / expected.sum()),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }
