"""Segmentation maps as metrics and drawings take them in, and a quick way to count the pairs of values in two."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SegmentationMap: TypeAlias = Tensor | np.ndarray | Image.Image

WORD = 8  # flags that are looked at together, as one number of 64 bits


def to_tensors(prediction: SegmentationMap, reference: SegmentationMap) -> tuple[Tensor, Tensor]:
    """Gives two maps (H, W) of integers as tensors on the device of the prediction, uncopied where possible.

    Raises a ValueError if values are no integers or the shapes differ.
    """
    predicted = _to_tensor(prediction, "prediction")
    expected = _to_tensor(reference, "reference").to(predicted.device)
    if predicted.shape != expected.shape:
        raise ValueError(
            f"The prediction has the shape {tuple(predicted.shape)}, its reference {tuple(expected.shape)}. "
            "Resize the prediction to the reference's size."
        )
    return predicted, expected


def to_numpy(values: Any) -> np.ndarray:
    """Gives what a model or a user hands over, on any device and with or without gradients, as an array."""
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


def in_pairs(predictions: Iterable[Any], references: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Goes through a batch image by image. Raises a ValueError, before the first, if their numbers differ."""
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references.")
    return zip(predictions, references, strict=True)


def pairs_with_counts(predicted: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives pairs of values that occur at the same pixel, possibly several times, and how often each one counts.

    On a CPU neighbours with the same values are taken together, which leaves a few thousand pairs of a usual image, so
    that what follows costs next to nothing. On an accelerator these are all pixels, and the counts are None.

    Returns predicted (N,) and expected (N,) values, int32 or int64, and counts (N,), float64.
    """
    first, second = predicted.flatten(), expected.flatten()
    if first.device.type != "cpu":
        return _widen(first), _widen(second), None
    # numpy, since torch is several times slower at comparing and hands such small work to threads.
    values, others = first.numpy(), second.numpy()
    num_pixels = len(values)
    ends_run = np.zeros(-(-num_pixels // WORD) * WORD, dtype=bool)
    inner = ends_run[: max(num_pixels - 1, 0)]
    np.not_equal(values[1:], values[:-1], out=inner)
    inner |= others[1:] != others[:-1]
    ends_run[num_pixels - 1 : num_pixels] = True
    ends = _positions_of_true(ends_run)
    lengths = ends.astype(np.float64)
    lengths[1:] -= ends[:-1]
    lengths[:1] += 1
    return _widen(torch.from_numpy(values[ends])), _widen(torch.from_numpy(others[ends])), torch.from_numpy(lengths)


def _positions_of_true(flags: np.ndarray) -> np.ndarray:
    """What `np.flatnonzero` gives for flags (N,), N a multiple of `WORD`, but twice as fast where few are true."""
    words = flags.view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    places = np.flatnonzero(words[occupied].view(bool))
    return (occupied * WORD)[places >> 3] + (places & 7)


def _to_tensor(segmentation_map: SegmentationMap, role: str) -> Tensor:
    if not isinstance(segmentation_map, Tensor):
        array = np.asarray(segmentation_map)
        if array.dtype.kind not in "biu":
            raise ValueError(f"The {role} holds {array.dtype}, but ids are integers.")
        # Only what torch can share is left uncopied: it warns of read-only arrays, such as those of PIL images, and
        # refuses other byte orders and reversed axes.
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    if segmentation_map.is_floating_point() or segmentation_map.is_complex():
        raise ValueError(f"The {role} holds {segmentation_map.dtype}, but ids are integers. Take the argmax first.")
    return segmentation_map


def _widen(values: Tensor) -> Tensor:
    # Unsigned and small types cannot hold the bounds and products that follow.
    return values.to(torch.int32 if values.element_size() < 4 else torch.int64)
