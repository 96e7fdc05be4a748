"""COCO's average precision of instance masks, through the optional faster-coco-eval, over a stream of images."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .segmentation_maps import in_pairs

# A run-length encoding of COCO: "size", (height, width), and "counts", compressed to text or bytes, or a list.
RunLengths: TypeAlias = Mapping[str, Any]
Masks: TypeAlias = Tensor | np.ndarray | Sequence[Any]
Size: TypeAlias = tuple[int, int]


class AveragePrecision:
    """COCO's average precision and recall of masks, over any number of images.

    The figures of COCO's own evaluation: means over the IoU thresholds 0.50 to 0.95, 101 recalls and the labels that
    the references show. Of an image and label the 100 highest scores count. A prediction that lies in a crowd region
    of its label is not counted, and neither is the region.

    Masks are kept as compressed run lengths, a few hundred bytes each, since precision needs all scores at the end. Has
    the calls of `evaluate`'s metrics: `add_batch` (or `add`) for the images, then `compute`, after which all starts
    anew. Predictions of exactly the same score in different images rank in the order in which they were added.

    Args:
        num_labels: number of labels, K.

    Attributes:
        images: what was added: for each image its `size` and, as COCO annotations without ids, its `predictions` and
            `references`.

    Raises an ImportError if faster-coco-eval is not installed.
    """

    def __init__(self, num_labels: int) -> None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}; it must be at least 1.")
        _coco()  # whoever lacks it should know before the first image
        self.num_labels = num_labels
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self.images: list[dict[str, Any]] = []

    def add(self, *, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Keeps one image.

        Both are dictionaries of tensors, arrays or lists. They hold `masks`, (N, H, W) of 0 and 1 in any type, or
        N run-length encodings of COCO; and `labels`, (N,), 0 to K - 1. The prediction has `scores`, (N,). The
        reference may have `iscrowd`, (N,), and `area`, (N,), in pixels, by which COCO sorts objects into small, medium
        and large; otherwise it is that of the mask.

        Raises a ValueError if lengths or sizes do not agree, a label is unknown, a score is not finite or a mask is
        not binary.
        """
        predicted, size = self._read_objects(prediction, "prediction")
        scores = _to_list(prediction["scores"], "scores", len(predicted), "prediction")
        if not np.isfinite(scores).all():
            raise ValueError("The prediction contains a score that is not finite. Has the model diverged?")
        for annotation, score in zip(predicted, scores, strict=True):
            annotation["score"] = float(score)

        expected, expected_size = self._read_objects(reference, "reference")
        if size and expected_size and size != expected_size:
            raise ValueError(
                f"The predicted masks are {size} (height, width), those of the reference {expected_size}. Resize the "
                "prediction to the reference's size."
            )
        for field, convert in (("iscrowd", int), ("area", float)):
            if reference.get(field) is not None:
                values = _to_list(reference[field], field, len(expected), "reference")
                for annotation, value in zip(expected, values, strict=True):
                    annotation[field] = convert(value)
        self.images.append({"size": size or expected_size or (0, 0), "predictions": predicted, "references": expected})

    def add_batch(self, *, predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> None:
        """Keeps several images, whose sizes may differ. See `add`."""
        for prediction, reference in in_pairs(predictions, references):
            self.add(prediction=prediction, reference=reference)

    def merge(self, other: "AveragePrecision") -> None:
        """Adds the images of another metric, for instance of another process."""
        if self.num_labels != other.num_labels:
            raise ValueError(f"The metrics count differently: num_labels {self.num_labels} and {other.num_labels}.")
        self.images = self.images + other.images

    def compute(self) -> dict[str, Any]:
        """Gives the figures as fractions in 0 to 1, and starts anew.

        Returns `ap`, `ap50`, `ap75` (at one IoU threshold), `ap_small`, `ap_medium`, `ap_large`; the average recalls
        `ar1`, `ar10`, `ar100` (by how many predictions of an image and label count), `ar_small`, `ar_medium`,
        `ar_large`; and `per_category`: for each label a dictionary with `ap`, `ap50` and `ap75`. A figure without a
        single reference object is NaN.
        Raises a ValueError if no reference object, other than crowd, was added.
        """
        if all(reference["iscrowd"] for image in self.images for reference in image["references"]):
            raise ValueError(
                "No reference object was added since the start or the last compute(). Call add_batch() first, and see "
                "that the references are not crowd throughout."
            )
        evaluation = self._evaluate()
        self.reset()
        return summarise(evaluation["precision"], evaluation["recall"])

    def _read_objects(self, image: Mapping[str, Any], role: str) -> tuple[list[dict[str, Any]], Size | None]:
        """Gives the objects of an image as COCO annotations, and the size of their masks, None without any."""
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
        areas = _coco().mask.area(masks) if masks else []
        annotations = [
            {"category_id": int(label), "segmentation": mask, "area": float(area), "iscrowd": 0}
            for label, mask, area in zip(labels, masks, areas, strict=True)
        ]
        return annotations, sizes.pop() if sizes else None

    def _evaluate(self) -> dict[str, np.ndarray]:
        """Runs COCO's evaluation over all images."""
        coco = _coco()
        evaluation = coco.COCOeval_faster(self._as_coco("references"), self._as_coco("predictions"), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval

    def _as_coco(self, role: str) -> Any:
        annotations = [
            {**annotation, "image_id": image_id}
            for image_id, image in enumerate(self.images)
            for annotation in image[role]
        ]
        # COCO takes the id 0 for "no match".
        for annotation_id, annotation in enumerate(annotations, start=1):
            annotation["id"] = annotation_id
        images = [
            {"id": image_id, "height": image["size"][0], "width": image["size"][1]}
            for image_id, image in enumerate(self.images)
        ]
        categories = [{"id": label, "name": str(label)} for label in range(self.num_labels)]
        return _coco().COCO({"images": images, "annotations": annotations, "categories": categories})


def summarise(precision: np.ndarray, recall: np.ndarray) -> dict[str, Any]:
    """Gives the figures of `AveragePrecision.compute` for the arrays that COCO's evaluation accumulates.

    T IoU thresholds, R recalls, K labels, A = 4 ranges of area (all, small, medium, large), M = 3 numbers of
    predictions that count (1, 10, 100). Entries without a reference object are -1.

    Shapes:
        precision: (T, R, K, A, M).
        recall: (T, K, A, M).
    """
    at50, at75 = 0, 5
    by_area = precision[..., -1]
    figures: dict[str, Any] = {
        "ap": _mean(by_area[..., 0]),
        "ap50": _mean(by_area[at50, ..., 0]),
        "ap75": _mean(by_area[at75, ..., 0]),
    }
    sizes = ("small", "medium", "large")
    figures |= {f"ap_{size}": _mean(by_area[..., index]) for index, size in enumerate(sizes, start=1)}
    figures |= {f"ar{most}": _mean(recall[:, :, 0, index]) for index, most in enumerate((1, 10, 100))}
    figures |= {f"ar_{size}": _mean(recall[:, :, index, -1]) for index, size in enumerate(sizes, start=1)}
    figures["per_category"] = {
        label: {
            "ap": _mean(by_area[:, :, label, 0]),
            "ap50": _mean(by_area[at50, :, label, 0]),
            "ap75": _mean(by_area[at75, :, label, 0]),
        }
        for label in range(precision.shape[2])
    }
    return figures


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")


def _coco() -> ModuleType:
    try:
        return import_module("faster_coco_eval")
    except ImportError as error:
        raise ImportError(
            "AveragePrecision needs faster-coco-eval, which is not installed: pip install faster-coco-eval"
        ) from error


def _to_run_lengths(masks: Masks, role: str) -> list[RunLengths]:
    """Compresses masks, or run lengths that are not compressed yet."""
    encoder = _coco().mask
    if not isinstance(masks, Tensor | np.ndarray) and all(isinstance(mask, Mapping) for mask in masks):
        return [
            encoder.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask for mask in masks
        ]
    tensor = _to_tensor(masks) if isinstance(masks, Tensor | np.ndarray) else torch.stack([*map(_to_tensor, masks)])
    if tensor.ndim != 3:
        raise ValueError(
            f"The masks of the {role} have the shape {tuple(tensor.shape)}, but (N, height, width) is due."
        )
    if tensor.dtype != torch.bool:
        is_set = tensor != 0
        if (is_set & (tensor != 1)).any():
            raise ValueError(
                f"The masks of the {role} hold values other than 0 and 1. Threshold the probabilities first."
            )
        tensor = is_set
    # The encoder reads down the columns, (H, W, N) in Fortran's order.
    return encoder.encode(np.asfortranarray(tensor.permute(1, 2, 0).cpu().numpy().view(np.uint8)))


def _to_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    # torch refuses reversed axes and other byte orders, and warns of arrays that may not be written.
    array = np.asarray(values)
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _to_list(values: Any, field: str, length: int, role: str) -> list[Any]:
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    if len(values) != length:
        raise ValueError(f"The {role} has {len(values)} {field} for {length} masks.")
    return values
