"""Converts segmentation maps for metrics and drawing, and counts the pairs of values in two maps quickly."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SegmentationMap: TypeAlias = Tensor | np.ndarray | Image.Image

WORD = 8  # flags that are checked together, as one 64-bit number
MAX_OCCUPIED = 0.9  # share of words in which a run ends, up to which counting runs is faster than counting pixels
# torch supports hardly any operation on unsigned types other than uint8.
_SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def to_tensors(prediction: SegmentationMap, reference: SegmentationMap) -> tuple[Tensor, Tensor]:
    """Returns two maps (H, W) of integers as tensors on the device of the prediction, without copying if possible.

    Raises a ValueError if values are not integers or the shapes differ.
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
    """Converts tensors, on any device and with or without gradients, and anything array-like to an array."""
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


def check_fields(fields: Any, role: str, names: Sequence[str]) -> None:
    """Raises a ValueError unless the dictionary of a prediction or reference has these fields."""
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"The {role} has no {', '.join(missing)}, but {', '.join(map(str, fields))}.")


def in_pairs(predictions: Iterable[Any], references: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Iterates over a batch image by image. Raises a ValueError, before the first, if their numbers differ."""
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(references)} references. Give one of each."
        )
    return zip(predictions, references, strict=True)


def flag_run_ends(images: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray | None:
    """Flags the pixels at which a run of equal pairs ends: the first step of `pairs_with_counts`.

    Takes half of its time and releases the GIL meanwhile.

    Args:
        images: Predicted and expected map of each, of equal shape; at least one image, all on one device.

    Returns bool, padded with False to whole words; None on an accelerator.
    """
    if images[0][0].device.type != "cpu":
        return None
    num_pixels = sum(predicted.numel() for predicted, _ in images)
    ends_run = np.empty(-(-num_pixels // WORD) * WORD, dtype=bool)
    ends_run[num_pixels:] = False
    scratch = np.empty(max(predicted.numel() for predicted, _ in images), dtype=bool)
    start = 0
    for predicted, expected in images:
        # numpy, since torch compares several times slower and uses threads for such small work.
        values, others, stop = predicted.numpy().ravel(), expected.numpy().ravel(), start + predicted.numel()
        inner = ends_run[start : max(stop - 1, start)]
        np.not_equal(values[1:], values[:-1], out=inner)
        inner |= np.not_equal(others[1:], others[:-1], out=scratch[: len(inner)])
        if start < stop:
            ends_run[stop - 1] = True
        start = stop
    return ends_run


def pairs_with_counts(
    images: Sequence[tuple[Tensor, Tensor]], ends_run: np.ndarray | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the pairs of values at the same pixels, possibly repeated, and the count of each.

    On a CPU neighbours with the same values are merged, which leaves a few thousand pairs for a typical image, so that
    what follows costs next to nothing. On an accelerator, and for noise, every pixel is a pair, and the counts are
    None.

    Args:
        images: As for `flag_run_ends`.
        ends_run: Its result.

    Returns predicted (N,) and expected (N,) values, int32 or int64, and counts (N,), int64.
    """
    predicted, expected = ([values.flatten() for values in maps] for maps in zip(*images, strict=True))
    ends = None if ends_run is None else _places(ends_run)
    if ends is None:
        return _join(predicted), _join(expected), None
    starts = np.cumsum([0, *(len(values) for values in predicted)])
    bounds = np.searchsorted(ends, starts)
    at = [
        torch.from_numpy(ends[first:last] - start)
        for first, last, start in zip(bounds[:-1], bounds[1:], starts[:-1], strict=True)
    ]
    predicted, expected = (
        [values.index_select(0, places) for values, places in zip(maps, at, strict=True)]
        for maps in (predicted, expected)
    )
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[:1] += 1
    return _join(predicted), _join(expected), torch.from_numpy(lengths)


def _places(flags: np.ndarray) -> np.ndarray | None:
    """Where flags, padded to whole words, are true, if these are few: `np.flatnonzero` in half the time."""
    words = flags.view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    if len(occupied) > MAX_OCCUPIED * len(words):
        return None
    places = np.flatnonzero(words[occupied].view(bool))
    left_out = (occupied - np.arange(len(occupied))) * WORD
    return places + left_out[places >> 3]


def _to_tensor(segmentation_map: SegmentationMap, role: str) -> Tensor:
    if not isinstance(segmentation_map, Tensor):
        array = np.asarray(segmentation_map)
        if array.dtype.kind not in "biu":
            raise ValueError(f"The {role} holds {array.dtype}, but ids are integers.")
        segmentation_map = shared_tensor(array)
    if segmentation_map.is_floating_point() or segmentation_map.is_complex():
        raise ValueError(f"The {role} holds {segmentation_map.dtype}, but ids are integers. Take the argmax first.")
    return segmentation_map.to(_SIGNED.get(segmentation_map.dtype, segmentation_map.dtype)).contiguous()


def shared_tensor(array: np.ndarray) -> Tensor:
    """A tensor from any array, copied only where torch cannot share memory.

    torch rejects other byte orders and reversed axes, and warns about read-only arrays, such as those of PIL images.
    """
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _join(maps: list[Tensor]) -> Tensor:
    # Small types cannot hold the bounds and products computed later.
    return torch.cat([values.to(torch.int32 if values.element_size() < 4 else torch.int64) for values in maps])
