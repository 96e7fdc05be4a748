"""COCO's average precision of instance masks, as a streaming metric.

Masks are compared by faster-coco-eval, which is optional, or by pycocotools if only that is installed.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .recall_and_precision import AREAS, RECALLS, THRESHOLDS, curve, is_outside, match
from .segmentation_maps import check_fields, in_pairs, shared_tensor

# A COCO RLE: "size", (height, width), and "counts", compressed to text or bytes, or a list.
RunLengths: TypeAlias = Mapping[str, Any]
Masks: TypeAlias = Tensor | np.ndarray | Sequence[Any]
Size: TypeAlias = tuple[int, int]

MAX_DETECTIONS = (1, 10, 100)  # maximum numbers of predictions per image and label
# What is stored of a prediction: bits say whether it is a hit (true positive) or a false alarm (false positive) in each
# area range and at each IoU threshold, `rank` how many of its image and label have a higher score.
BITS = (np.uint8, len(AREAS) * len(THRESHOLDS) // 8)
RECORD = np.dtype(
    [("score", "<f8"), ("label", "<u4"), ("rank", "u1"), ("is_true_positive", *BITS), ("is_false_positive", *BITS)]
)


class AveragePrecision:
    """COCO's average precision and recall of masks, over any number of images.

    The figures of COCO's own evaluation: means over the IoU thresholds 0.50 to 0.95, 101 recalls and the labels that
    occur in the references. The 100 highest scores per image and label count. A prediction that matches a crowd region
    of its label is not counted, and neither is the region.

    No mask is stored: predictions are matched with their image's objects at once, and 23 bytes are kept of each that
    counts, since precision needs all scores at the end. Has the interface of `evaluate`'s metrics: `add_batch` (or
    `add`) for the images, then `compute`, which also resets. Predictions with exactly the same score in different
    images are ranked in the order in which they were added.

    Args:
        num_labels: number of labels, K.

    Attributes:
        num_objects: (K, 4) int64, the non-crowd reference objects by label and area range: all, small, medium, large.
        records: what is stored of the predictions, 23 bytes each, in the order in which they were added.

    Raises an ImportError if neither faster-coco-eval nor pycocotools can be imported.
    """

    def __init__(self, num_labels: int) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; it must be at least 1.")
        _mask_functions()  # fails before the first image if it is missing
        self.num_labels = num_labels
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.num_objects = np.zeros((self.num_labels, len(AREAS)), dtype=np.int64)
        self.records = bytearray()

    def add(self, *, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Adds one image.

        Both are dictionaries of tensors, arrays or lists. They hold `masks`, (N, H, W) of 0 and 1 in any type, or
        N COCO RLEs; and `labels`, (N,), 0 to K - 1. The prediction has `scores`, (N,). The reference may have
        `iscrowd`, (N,), and `area`, (N,), in pixels, by which COCO divides objects into small, medium and large;
        by default it is that of the mask.

        Raises a ValueError if lengths or sizes do not match, a label is unknown, a score is not finite or a mask is
        not binary.
        """
        check_fields(prediction, "prediction", ("masks", "labels", "scores"))
        check_fields(reference, "reference", ("masks", "labels"))
        masks, labels, areas, size = self._read_objects(prediction, "prediction")
        scores = np.array(_to_list(prediction["scores"], "scores", len(masks), "prediction"), dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("The prediction contains a score that is not finite. Has the model diverged?")

        true_masks, true_labels, true_areas, true_size = self._read_objects(reference, "reference")
        if size and true_size and size != true_size:
            raise ValueError(
                f"The predicted masks are {size} (height, width), those of the reference {true_size}. Resize the "
                "prediction to the reference's size."
            )
        is_crowd = np.zeros(len(true_masks), dtype=bool)
        if reference.get("iscrowd") is not None:
            is_crowd = np.array(_to_list(reference["iscrowd"], "iscrowd", len(true_masks), "reference"), dtype=bool)
        if reference.get("area") is not None:
            true_areas = np.array(_to_list(reference["area"], "area", len(true_masks), "reference"), dtype=np.float64)

        outside = is_outside(true_areas)
        order = np.argsort(-scores, kind="stable")
        added = bytearray()
        for label in np.unique(labels):
            found = order[labels[order] == label][: MAX_DETECTIONS[-1]]
            expected = np.flatnonzero(true_labels == label)
            ious = np.zeros((len(found), 0))
            if expected.size:
                crowd = is_crowd[expected].tolist()
                ious = _mask_functions().iou(
                    [masks[each] for each in found.tolist()], [true_masks[each] for each in expected.tolist()], crowd
                )
            is_true_positive, is_false_positive = match(ious, outside[:, expected], is_crowd[expected], areas[found])
            records = np.zeros(len(found), dtype=RECORD)
            records["score"], records["label"], records["rank"] = scores[found], label, range(len(found))
            records["is_true_positive"] = np.packbits(is_true_positive.reshape(len(found), -1), axis=1)
            records["is_false_positive"] = np.packbits(is_false_positive.reshape(len(found), -1), axis=1)
            added += records.tobytes()
        self.records += added
        np.add.at(self.num_objects, true_labels, (~(outside | is_crowd)).T)

    def add_batch(self, *, predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> None:
        """Adds several images, whose sizes may differ. See `add`."""
        for prediction, reference in in_pairs(predictions, references):
            self.add(prediction=prediction, reference=reference)

    def merge(self, other: "AveragePrecision") -> None:
        """Adds the images of another metric, for instance of another process."""
        if self.num_labels != other.num_labels:
            raise ValueError(f"The metrics do not match: num_labels {self.num_labels} and {other.num_labels}.")
        self.num_objects = self.num_objects + other.num_objects
        self.records = self.records + other.records

    def compute(self) -> dict[str, Any]:
        """Returns the figures as fractions in 0 to 1, and resets.

        Returns `ap`, `ap50`, `ap75` (at one IoU threshold), `ap_small`, `ap_medium`, `ap_large`; the average recalls
        `ar1`, `ar10`, `ar100` (by the number of predictions per image and label), `ar_small`, `ar_medium`,
        `ar_large`; and `per_category`: for each label a dictionary with `ap`, `ap50` and `ap75`. A figure without any
        reference object is NaN.
        Raises a ValueError if no non-crowd reference object was added.
        """
        if not self.num_objects.any():
            raise ValueError(
                "No reference object was added since the start or the last compute(). Call add_batch() first, and "
                "check that not all references are crowd."
            )
        precision, recall = self._curves()
        self.reset()
        return summarise(precision, recall)

    def _read_objects(
        self, image: Mapping[str, Any], role: str
    ) -> tuple[list[RunLengths], np.ndarray, np.ndarray, Size | None]:
        """Returns the masks of an image, their labels, areas and size; the size is None without masks."""
        masks = _to_run_lengths(image["masks"], role)
        sizes = {tuple(mask["size"]) for mask in masks}
        if len(sizes) > 1:
            raise ValueError(f"The {role} has masks of several sizes, {sorted(sizes)}; all must have the image's size.")
        labels = _to_list(image["labels"], "labels", len(masks), role)
        for label in labels:
            if label not in range(self.num_labels):
                raise ValueError(
                    f"The {role} contains label {label}, but there are {self.num_labels} labels (0 to "
                    f"{self.num_labels - 1}). Map the ids of the data set to these first."
                )
        areas = _mask_functions().area(masks) if masks else []
        labels_array = np.array(labels, dtype=np.int64)
        return masks, labels_array, np.array(areas, dtype=np.float64), sizes.pop() if sizes else None

    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        """The arguments of `summarise`."""
        num_areas, num_thresholds = len(AREAS), len(THRESHOLDS)
        precision = np.full((num_thresholds, len(RECALLS), self.num_labels, num_areas), -1.0)
        recall = np.full((num_thresholds, self.num_labels, num_areas, len(MAX_DETECTIONS)), -1.0)
        records = np.frombuffer(self.records, dtype=RECORD)
        records = records[np.argsort(-records["score"], kind="stable")]
        for label in np.flatnonzero(self.num_objects[:, 0]):
            own = records[records["label"] == label]
            is_true_positive, is_false_positive = (
                np.unpackbits(own[name], axis=1).astype(bool).reshape(-1, num_areas, num_thresholds)
                for name in ("is_true_positive", "is_false_positive")
            )
            for area in np.flatnonzero(self.num_objects[label]):
                num_objects = self.num_objects[label, area]
                precision[:, :, label, area] = curve(is_true_positive[:, area], is_false_positive[:, area], num_objects)
                for index, most in enumerate(MAX_DETECTIONS):
                    recall[:, label, area, index] = is_true_positive[own["rank"] < most, area].sum(0) / num_objects
        return precision, recall


def summarise(precision: np.ndarray, recall: np.ndarray) -> dict[str, Any]:
    """Returns the figures of `AveragePrecision.compute` from the curves of each label and area range.

    T IoU thresholds, R recalls, K labels, A = 4 area ranges (all, small, medium, large), M = 3 maximum numbers of
    predictions (1, 10, 100). Entries without a reference object are -1.

    Shapes:
        precision: (T, R, K, A), for the largest M.
        recall: (T, K, A, M).
    """
    figures: dict[str, Any] = _average_precisions(precision[..., 0])
    sizes = ("small", "medium", "large")
    figures |= {f"ap_{size}": _mean(precision[..., index]) for index, size in enumerate(sizes, start=1)}
    figures |= {f"ar{most}": _mean(recall[:, :, 0, index]) for index, most in enumerate(MAX_DETECTIONS)}
    figures |= {f"ar_{size}": _mean(recall[:, :, index, -1]) for index, size in enumerate(sizes, start=1)}
    figures["per_category"] = {
        label: _average_precisions(precision[:, :, label, 0]) for label in range(precision.shape[2])
    }
    return figures


def _average_precisions(precision: np.ndarray) -> dict[str, float]:
    """Over all IoU thresholds, the first dimension, and at 0.50 and 0.75 alone."""
    return {"ap": _mean(precision), "ap50": _mean(precision[0]), "ap75": _mean(precision[5])}


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def _mask_functions() -> Any:
    """The module of functions of masks, which both libraries call `mask`."""
    try:
        return import_module("faster_coco_eval").mask
    except ImportError as error:  # it is missing, or damaged, which the error says
        with suppress(ImportError):
            return import_module("pycocotools.mask")
        raise ImportError(
            "AveragePrecision needs faster-coco-eval or pycocotools, and neither can be imported: pip install "
            "faster-coco-eval"
        ) from error


def _to_run_lengths(masks: Masks, role: str) -> list[RunLengths]:
    """Encodes masks, or uncompressed RLEs, as compressed RLEs."""
    encoder = _mask_functions()
    if not isinstance(masks, Tensor | np.ndarray) and all(isinstance(mask, Mapping) for mask in masks):
        return [
            encoder.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask for mask in masks
        ]
    tensor = _to_tensor(masks) if isinstance(masks, Tensor | np.ndarray) else torch.stack([*map(_to_tensor, masks)])
    if tensor.ndim != 3:
        raise ValueError(
            f"The masks of the {role} have the shape {tuple(tensor.shape)}; it must be (N, height, width)."
        )
    if tensor.dtype != torch.bool:
        is_set = tensor != 0
        if (is_set & (tensor != 1)).any():
            raise ValueError(
                f"The masks of the {role} hold values other than 0 and 1. Threshold the probabilities first."
            )
        tensor = is_set
    # The encoder takes (H, W, N) in Fortran order.
    return encoder.encode(np.asfortranarray(tensor.permute(1, 2, 0).cpu().numpy().view(np.uint8)))


def _to_tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else shared_tensor(np.asarray(values))


def _to_list(values: Any, field: str, length: int, role: str) -> list[Any]:
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(values) != length:
        raise ValueError(f"The {role} has {len(values)} {field} for {length} masks.")
    return values
