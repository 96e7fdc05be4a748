"""Segmentation maps as metrics and drawings take them in, and a quick way to count the pairs of values in two."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SegmentationMap: TypeAlias = Tensor | np.ndarray | Image.Image

WORD = 8  # flags that are looked at together, as one number of 64 bits
MAX_OCCUPIED = 0.9  # share of words in which a run ends, up to which runs are worth more than pixels
# torch does next to nothing with unsigned types but uint8.
_SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


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


def pairs_with_counts(images: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives pairs of values that occur at the same pixel, possibly several times, and how often each one counts.

    On a CPU neighbours with the same values are taken together, which leaves a few thousand pairs of a usual image, so
    that what follows costs next to nothing. On an accelerator, and of noise, these are all pixels, and the counts are
    None.

    Args:
        images: Predicted and expected map of each, of equal shape; at least one image, all on one device.

    Returns predicted (N,) and expected (N,) values, int32 or int64, and counts (N,), int64.
    """
    predicted, expected = ([values.flatten() for values in maps] for maps in zip(*images, strict=True))
    lengths = None
    if predicted[0].device.type == "cpu":
        # numpy, since torch is several times slower at comparing and hands such small work to threads.
        ends, lengths = _runs([values.numpy() for values in predicted], [values.numpy() for values in expected])
    if lengths is not None:
        predicted, expected = (
            [values.index_select(0, torch.from_numpy(at)) for values, at in zip(maps, ends, strict=True)]
            for maps in (predicted, expected)
        )
    return _join(predicted), _join(expected), lengths


def _runs(predicted: list[np.ndarray], expected: list[np.ndarray]) -> tuple[list[np.ndarray], Tensor | None]:
    """Finds the runs of equal pairs in maps (P_i,).

    Gives the last pixel of each run, for each map, and the lengths of all runs; None if most runs are short.
    """
    starts = np.cumsum([0, *(len(values) for values in predicted)])
    num_pixels = int(starts[-1])
    ends_run = np.empty(-(-num_pixels // WORD) * WORD, dtype=bool)
    ends_run[num_pixels:] = False
    scratch = np.empty(max(len(values) for values in predicted), dtype=bool)
    for start, stop, values, others in zip(starts[:-1], starts[1:], predicted, expected, strict=True):
        inner = ends_run[start : max(stop - 1, start)]
        np.not_equal(values[1:], values[:-1], out=inner)
        inner |= np.not_equal(others[1:], others[:-1], out=scratch[: len(inner)])
        if start < stop:
            ends_run[stop - 1] = True
    # What `np.flatnonzero(ends_run)` gives, but in half the time where few are true.
    words = ends_run.view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    if len(occupied) > MAX_OCCUPIED * len(words):
        return [], None
    places = np.flatnonzero(words[occupied].view(bool))
    ends = (occupied * WORD)[places >> 3] + (places & 7)
    lengths = torch.from_numpy(np.diff(ends, prepend=-1))
    bounds = np.searchsorted(ends, starts)
    of_maps = zip(bounds[:-1], bounds[1:], starts[:-1], strict=True)
    return [ends[first:last] - start for first, last, start in of_maps], lengths


def _to_tensor(segmentation_map: SegmentationMap, role: str) -> Tensor:
    if not isinstance(segmentation_map, Tensor):
        array = np.asarray(segmentation_map)
        if array.dtype.kind not in "biu":
            raise ValueError(f"The {role} holds {array.dtype}, but ids are integers.")
        # Only what torch can share is left uncopied: it warns of read-only arrays, such as those of PIL images, and
        # refuses other byte orders and reversed axes.
        segmentation_map = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    if segmentation_map.is_floating_point() or segmentation_map.is_complex():
        raise ValueError(f"The {role} holds {segmentation_map.dtype}, but ids are integers. Take the argmax first.")
    return segmentation_map.to(_SIGNED.get(segmentation_map.dtype, segmentation_map.dtype))


def _join(maps: list[Tensor]) -> Tensor:
    # Small types cannot hold the bounds and products that follow.
    return torch.cat([values.to(torch.int32 if values.element_size() < 4 else torch.int64) for values in maps])
