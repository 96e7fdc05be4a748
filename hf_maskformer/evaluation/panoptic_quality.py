"""Panoptic quality (Kirillov et al., 2019), as defined by COCO's panopticapi, from streaming counts."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .segmentation_maps import check_fields, flag_run_ends, in_pairs, pairs_with_counts, to_tensors

VOID = 0


class PanopticQuality:
    """Panoptic, segmentation and recognition quality of all, thing and stuff labels, over any number of images.

    A predicted segment matches a reference segment of its label if their IoU is above 0.5, ignoring pixels that are
    void in the reference. Segments without a match are false positives and false negatives, except that a predicted
    segment with more than half of its pixels in void or crowd of its label is not counted, and neither is a crowd
    segment of the reference.

    Stores sums only, so memory does not grow with the images. Has the interface of `evaluate`'s metrics: `add_batch`
    (or `add`) for the images, then `compute`, which also resets.

    Args:
        num_labels: number of labels, K.
        thing_ids: labels with countable instances; the others are stuff. Only the means depend on them.

    Attributes:
        totals: (K, 4) float64 on the CPU. For each label the sum of the IoUs of matched pairs, and the numbers of true
            positives (matched pairs), false positives and false negatives.
    """

    def __init__(self, num_labels: int, thing_ids: Collection[int]) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; it must be at least 1.")
        self.num_labels = num_labels
        self.thing_ids = frozenset(int(label) for label in thing_ids)
        for label in self.thing_ids:
            if not 0 <= label < num_labels:
                raise ValueError(
                    f"thing_ids contains {label}, but there are {num_labels} labels (0 to {num_labels - 1})."
                )
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.totals = torch.zeros(self.num_labels, 4, dtype=torch.float64, device="cpu")

    def add(self, *, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Adds one image.

        Both are dictionaries as returned by panoptic post-processing: `segmentation`, (H, W) integers, the segment id
        of each pixel (0 is void), as tensor, array or single-channel PIL image; and `segments_info`, a list of
        dictionaries with the `id` (from 1) and the `label_id` (0 to K - 1) of each segment. A segment of the reference
        may have `iscrowd`. Pixels are counted on the device of the predicted map.

        Raises a ValueError if the shapes of the maps differ, values are not integers, an id is in the map but not in
        the list or the reverse, an id is listed twice or a label is unknown.
        """
        predicted = self._read_segments(prediction, "prediction")
        expected = self._read_segments(reference, "reference")
        maps = to_tensors(prediction["segmentation"], reference["segmentation"])
        areas = _shared_areas(*maps, predicted, expected)
        # Not in place, so that totals created in inference mode can be updated outside of it.
        self.totals = self.totals + torch.from_numpy(_match(areas, predicted, expected, self.num_labels))

    def add_batch(self, *, predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> None:
        """Adds several images, whose sizes may differ. See `add`."""
        for prediction, reference in in_pairs(predictions, references):
            self.add(prediction=prediction, reference=reference)

    def merge(self, other: "PanopticQuality") -> None:
        """Adds the counts of another metric, for instance of another process."""
        if (self.num_labels, self.thing_ids) != (other.num_labels, other.thing_ids):
            raise ValueError(
                f"The metrics do not match: num_labels {self.num_labels} and {other.num_labels}, thing_ids "
                f"{sorted(self.thing_ids)} and {sorted(other.thing_ids)}."
            )
        self.totals = self.totals + other.totals.to(self.totals.device)

    def compute(self) -> dict[str, Any]:
        """Returns the figures as fractions in 0 to 1, and resets.

        Returns `pq`, `sq` and `rq`, means over the labels with any counts; `pq_things`, `pq_stuff` and so on, over
        those of one kind (NaN if there are none); and `per_category`: for each label a dictionary with `pq`, `sq`,
        `rq` (NaN if it has no counts), `tp`, `fp` and `fn`.
        Raises a ValueError if no segment was counted.
        """
        totals = self.totals.cpu().numpy()
        if not totals.any():
            raise ValueError(
                "No segment was counted since the start or the last compute(). Call add_batch() first, and check "
                "that not all references are void."
            )
        self.reset()
        return summarise(totals, self.thing_ids)

    def _read_segments(self, image: Mapping[str, Any], role: str) -> "_Segments":
        ids: list[int] = []
        labels: list[int] = []
        check_fields(image, role, ("segmentation", "segments_info"))
        for segment in image["segments_info"]:
            check_fields(segment, f"segments_info of the {role}", ("id", "label_id"))
            segment_id, label = int(segment["id"]), int(segment["label_id"])
            if segment_id <= VOID:
                raise ValueError(f"The {role} lists a segment with id {segment_id}; ids count from 1, and 0 is void.")
            if not 0 <= label < self.num_labels:
                raise ValueError(
                    f"Segment {segment_id} of the {role} has label {label}, but there are {self.num_labels} labels (0 "
                    f"to {self.num_labels - 1}). Map the ids of the data set to these first."
                )
            ids.append(segment_id)
            labels.append(label)
        if len(set(ids)) < len(ids):
            twice = next(segment_id for segment_id in ids if ids.count(segment_id) > 1)
            raise ValueError(f"The {role} lists id {twice} twice. Give every segment its own id.")
        is_crowd = [bool(segment.get("iscrowd", False)) for segment in image["segments_info"]]
        return _Segments(role, np.array(ids, np.int64), np.array(labels, np.int64), np.array(is_crowd, bool))


class _Segments(NamedTuple):
    """The listed properties of the N segments of one map, in list order."""

    role: str
    ids: np.ndarray  # (N,)
    labels: np.ndarray  # (N,)
    is_crowd: np.ndarray  # (N,)


def _shared_areas(predicted_map: Tensor, expected_map: Tensor, predicted: _Segments, expected: _Segments) -> np.ndarray:
    """Counts the pixels of each pair of segments: (E + 1, P + 1), with void in row and column 0."""
    images = [(predicted_map, expected_map)]
    predicted_ids, expected_ids, counts = pairs_with_counts(images, flag_run_ends(images))
    columns, rows = _positions(predicted_ids, predicted), _positions(expected_ids, expected)
    shape = (len(expected.ids) + 1, len(predicted.ids) + 1)
    pairs = torch.bincount(rows * shape[1] + columns, counts, minlength=shape[0] * shape[1])
    areas = pairs.view(shape).cpu().numpy().astype(np.int64)
    for segments, totals in ((predicted, areas.sum(0)), (expected, areas.sum(1))):
        without_pixels = segments.ids[totals[1:] == 0]
        if len(without_pixels):
            raise ValueError(
                f"The {segments.role} lists segment {without_pixels[0]}, which has no pixel in its map. Leave it out."
            )
    return areas


def _positions(ids: Tensor, segments: _Segments) -> Tensor:
    """Returns for each id its position in the list of segments, from 1, and 0 for void."""
    listed = np.concatenate([[VOID], segments.ids])
    order = listed.argsort()
    ascending, positions = (torch.from_numpy(values).to(ids.device) for values in (listed[order], order))
    ids = ids.long()
    nearest = torch.searchsorted(ascending, ids).clamp_(max=len(listed) - 1)
    is_unlisted = ascending[nearest] != ids
    if is_unlisted.any():
        raise ValueError(
            f"The map of the {segments.role} contains id {int(ids[is_unlisted][0])}, which its segments_info does not "
            "list. Add its entry, or set the pixels to 0 if they are void."
        )
    return positions[nearest]


def _match(areas: np.ndarray, predicted: _Segments, expected: _Segments, num_labels: int) -> np.ndarray:
    """Returns what one image adds to `PanopticQuality.totals`, from the pixels of each pair (E + 1, P + 1)."""
    shared, in_void = areas[1:, 1:], areas[0, 1:]
    expected_areas, predicted_areas = areas[1:].sum(1), areas[:, 1:].sum(0)
    iou = shared / (expected_areas[:, None] + (predicted_areas - in_void) - shared)
    # Above one half a segment has at most one match, so no assignment is needed.
    is_match = (iou > 0.5) & (expected.labels[:, None] == predicted.labels) & ~expected.is_crowd[:, None]
    rows, columns = is_match.nonzero()

    in_crowd = np.zeros_like(in_void)
    # As in panopticapi, only the last listed crowd segment of a label counts. COCO has one per image and label.
    crowd_of_label = {label: row for row, label in enumerate(expected.labels) if expected.is_crowd[row]}
    for label, row in crowd_of_label.items():
        in_crowd += np.where(predicted.labels == label, shared[row], 0)
    is_excused = (in_void + in_crowd) / predicted_areas > 0.5

    is_false_positive = ~is_match.any(0) & ~is_excused
    is_false_negative = ~is_match.any(1) & ~expected.is_crowd
    labels = expected.labels[rows]
    sums = [
        np.bincount(labels, iou[rows, columns], minlength=num_labels),
        np.bincount(labels, minlength=num_labels),
        np.bincount(predicted.labels[is_false_positive], minlength=num_labels),
        np.bincount(expected.labels[is_false_negative], minlength=num_labels),
    ]
    return np.stack(sums, axis=1).astype(np.float64)


def summarise(totals: np.ndarray, thing_ids: Collection[int]) -> dict[str, Any]:
    """Returns the figures of `PanopticQuality.compute` from sums (K, 4) that are not all 0."""
    iou_sums, *counts = totals.T
    tp, fp, fn = counts
    was_counted = tp + fp + fn > 0
    nowhere = np.full(len(totals), np.nan)
    denominators = tp + fp / 2 + fn / 2
    scores = {
        "pq": np.divide(iou_sums, denominators, out=nowhere.copy(), where=was_counted),
        "sq": np.divide(iou_sums, np.maximum(tp, 1), out=nowhere.copy(), where=was_counted),
        "rq": np.divide(tp, denominators, out=nowhere.copy(), where=was_counted),
    }
    is_thing = np.isin(np.arange(len(totals)), list(thing_ids))
    figures: dict[str, Any] = {}
    for suffix, is_meant in (
        ("", was_counted),
        ("_things", was_counted & is_thing),
        ("_stuff", was_counted & ~is_thing),
    ):
        for name, values in scores.items():
            figures[name + suffix] = float(values[is_meant].mean()) if is_meant.any() else float("nan")
    figures["per_category"] = {
        label: {name: float(values[label]) for name, values in scores.items()}
        | {name: int(values[label]) for name, values in zip(("tp", "fp", "fn"), counts, strict=True)}
        for label in range(len(totals))
    }
    return figures
