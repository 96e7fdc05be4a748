"""Collates a list of samples into a batch for the model."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..image_processing_maskformer_images import resize_nearest, zeros
from ..loss_maskformer_targets import NO_LABEL
from .sample import Sample, crowds_of, required_fields

TargetFormat = Literal["masks", "segment_map", "label_map"]


@dataclass
class MaskFormerDataCollator:
    """Collates samples with an image processor, which resizes, normalises, pads and builds the targets.

    The result holds

    - `pixel_values` (B, 3, H, W) float, padded right and below,
    - `pixel_mask` (B, H, W), 1 = image,
    - `mask_labels` (B, H, W), index of the segment that owns the pixel, -1 = none; for samples with masks, which may
      overlap, and with `target_format="masks"` a list of (N_i, H, W) bool,
    - `class_labels` (B, N), class of each segment, -100 where an image has fewer;

    with `target_format="label_map"`, for the per-pixel baselines, instead of the last two

    - `labels` (B, H, W), class of each pixel.

    Empty segments and crowds are left out, with their labels. All samples of a batch must have the same form.

    Works in a `DataLoader`, your own training loop, and `Trainer`; the latter needs `remove_unused_columns=False`, or
    it drops the samples' fields before they arrive here.

    Args:
        image_processor: a `MaskFormerImageProcessor`, whose `do_reduce_labels` and `ignore_index` match the data set.
        do_resize: False for samples that an augmentation has already resized; None leaves it to the processor.
        target_format: as in `MaskFormerImageProcessor.preprocess`; samples with masks always give masks.
    """

    image_processor: Callable[..., Mapping[str, Any]]
    do_resize: bool | None = None
    target_format: TargetFormat = "segment_map"

    def __post_init__(self) -> None:
        if self.target_format not in get_args(TargetFormat):
            known = ", ".join(get_args(TargetFormat))
            raise ValueError(f"target_format is {self.target_format!r}; it must be one of {known}.")
        if any(kind.__module__.startswith("transformers.models.") for kind in type(self.image_processor).__mro__):
            raise ValueError(
                f"The image processor is a {type(self.image_processor).__name__} of transformers. Pass a "
                "MaskFormerImageProcessor of hf_maskformer, which builds targets in other forms too."
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Returns the batch. Raises a ValueError naming the samples if they do not match or cannot be processed."""
        # Anything indexable will do, such as a data set.
        is_list = hasattr(samples, "__len__") and hasattr(samples, "__getitem__") and not isinstance(samples, Mapping)
        if not is_list or len(samples) == 0 or not isinstance(samples[0], Mapping):
            raise ValueError(f"The batch is {reprlib.repr(samples)}; pass a list of samples, such as [dataset[0]].")
        form = _common_form(samples)
        names = ", ".join(sample["name"] for sample in samples)
        try:
            batch = self._from_masks(samples) if form == "masks" else self._from_maps(samples)
        except (KeyError, TypeError, ValueError) as error:
            for sample in samples if len(samples) > 1 else ():
                self([sample])  # if a single one is at fault, the error names it alone
            raise ValueError(f"The batch of {names} cannot be built: {error}") from error
        if isinstance(batch.get("class_labels"), list):
            # As one tensor: when Accelerate dispatches a stream, it slices each tensor in a list as if it were the
            # batch. There would then be fewer masks than labels, which the loss rejects.
            batch["class_labels"] = torch.nn.utils.rnn.pad_sequence(batch["class_labels"], True, NO_LABEL)
        return batch

    def _from_maps(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = self.image_processor(
            images=[sample["image"] for sample in samples],
            segmentation_maps=[self._without_crowds(sample) for sample in samples],
            instance_id_to_semantic_id=_id_tables(samples),
            target_format=self.target_format,
            do_resize=self.do_resize,
            return_tensors="pt",
        )
        return dict(batch)

    def _without_crowds(self, sample: Sample) -> np.ndarray:
        segmentation_map = sample["segmentation_map"]
        if not sample.get("crowd_ids"):
            return segmentation_map
        ignore_index = getattr(self.image_processor, "ignore_index", None)
        if ignore_index is None:
            raise ValueError("there are crowds, but the image processor has no ignore_index to mark their pixels with.")
        # int64, since the dtype of the map may be too narrow for the value.
        return np.where(np.isin(segmentation_map, sample["crowd_ids"]), ignore_index, segmentation_map.astype(np.int64))

    def _from_masks(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if self.target_format == "label_map":
            raise ValueError("masks may overlap, so they give no label_map. Train on data with segmentation maps.")
        images = [sample["image"] for sample in samples]
        batch = dict(self.image_processor(images=images, do_resize=self.do_resize, return_tensors="pt"))
        batch["mask_labels"], batch["class_labels"] = [], []
        for sample, pixel_mask in zip(samples, batch["pixel_mask"], strict=True):
            masks, labels = _visible_objects(sample, pixel_mask, getattr(self.image_processor, "num_labels", None))
            batch["mask_labels"].append(masks)
            batch["class_labels"].append(labels)
        return batch


def _common_form(samples: Sequence[Sample]) -> str:
    form = "masks" if "masks" in samples[0] else "segmentation_map"
    missing = [field for field in required_fields(samples[0]) if not all(field in sample for sample in samples)]
    if missing and len({"masks" in sample for sample in samples}) > 1:
        raise ValueError(
            f"Samples with masks and samples with a segmentation map cannot share a batch: {', '.join(missing)} is "
            f"missing in {', '.join(sample['name'] for sample in samples if missing[0] not in sample)}."
        )
    if missing:
        raise ValueError(
            f"The samples have no {', '.join(missing)}, but have {', '.join(samples[0]) or 'nothing'}. Open the data "
            "with a reader of hf_maskformer.data, such as SegmentationColumns for a `datasets` data set, or rename the "
            "fields (docs/data.md). With transformers' Trainer, set remove_unused_columns=False, which keeps them."
        )
    return form


def _visible_objects(
    sample: Sample, pixel_mask: torch.Tensor, num_labels: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks (N_i, H, W) of a sample, resized and padded to the batch, and their labels (N_i,)."""
    image = sample["image"]
    if sample["masks"].shape[1:] != (image.height, image.width):
        raise ValueError(
            f"the masks of {sample['name']} have shape {sample['masks'].shape}, but its image is {image.height} x "
            f"{image.width} (height x width)."
        )
    labels = torch.as_tensor(sample["labels"], dtype=torch.int64, device="cpu")
    if num_labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < num_labels:
        raise ValueError(f"{sample['name']} has the labels {labels.tolist()}, but num_labels is {num_labels}.")
    is_trained = ~crowds_of(sample)
    height, width = int(pixel_mask[:, 0].sum()), int(pixel_mask[0].sum())
    fitted = resize_nearest(np.asarray(sample["masks"])[is_trained], (height, width))
    is_visible = fitted.any(axis=(1, 2))
    masks = zeros((int(is_visible.sum()), *pixel_mask.shape), torch.bool)
    masks.numpy()[:, :height, :width] = fitted[is_visible]
    return masks, labels[torch.from_numpy(is_trained)][torch.from_numpy(is_visible)]


def _id_tables(samples: Sequence[Sample]) -> list[dict[int, int]] | None:
    tables = [sample.get("instance_id_to_semantic_id") for sample in samples]
    without = [sample["name"] for sample, table in zip(samples, tables, strict=True) if table is None]
    if len(without) == len(samples):
        return None
    if without:
        raise ValueError(
            f"instance_id_to_semantic_id is missing in {', '.join(without)} but given in other samples of the batch. "
            "Give it for all samples or for none."
        )
    return tables  # type: ignore[return-value]  # none of them is None here
