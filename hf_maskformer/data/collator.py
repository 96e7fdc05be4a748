"""Turns a list of samples into a batch for the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .sample import Sample

TargetFormat = Literal["masks", "segment_map", "label_map"]
REQUIRED = ("image", "segmentation_map", "name")


@dataclass
class MaskFormerDataCollator:
    """Collates samples with an image processor, which resizes, normalises, pads and builds the targets.

    The result holds

    - `pixel_values` (B, 3, H, W) float, padded right and below,
    - `pixel_mask` (B, H, W), 1 = image,
    - `mask_labels` (B, H, W), index of the segment that owns the pixel, -1 = none,
    - `class_labels` (B, N), class of each segment, -100 where an image has fewer;

    with `target_format="label_map"`, for the per-pixel baselines, instead of the last two

    - `labels` (B, H, W), class of each pixel.

    Works in a `DataLoader`, an own training loop, and `Trainer`; that one needs `remove_unused_columns=False`, or
    it takes the samples' fields away before they arrive here.

    Args:
        image_processor: a `MaskFormerImageProcessor`, whose `do_reduce_labels` and `ignore_index` are the data set's.
        do_resize: False for samples that an augmentation has brought to size; None leaves it to the processor.
        target_format: as in `MaskFormerImageProcessor.preprocess`.
    """

    image_processor: Callable[..., Mapping[str, Any]]
    do_resize: bool | None = None
    target_format: TargetFormat = "segment_map"

    def __post_init__(self) -> None:
        if self.target_format not in get_args(TargetFormat):
            known = ", ".join(get_args(TargetFormat))
            raise ValueError(f"target_format is {self.target_format!r}; known are {known}.")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Gives the batch. Raises a ValueError that names the samples if they do not fit or cannot be processed."""
        missing = [field for field in REQUIRED if not all(field in sample for sample in samples)]
        if missing:
            raise ValueError(
                f"The samples have no {', '.join(missing)}. With Trainer, set remove_unused_columns=False, so "
                "that it leaves the fields of the samples alone."
            )
        names = ", ".join(sample["name"] for sample in samples)
        try:
            batch = self.image_processor(
                images=[sample["image"] for sample in samples],
                segmentation_maps=[sample["segmentation_map"] for sample in samples],
                instance_id_to_semantic_id=_id_tables(samples),
                target_format=self.target_format,
                do_resize=self.do_resize,
                return_tensors="pt",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The batch of {names} cannot be built: {error}") from error
        return dict(batch)


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
