"""What post-processing takes: the logits of a batch and the sizes that turn them into pixels, image by image."""

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

Size = tuple[int, int]
MAX_EDGE = 2**16


class ImageSizes(NamedTuple):
    """Sizes as (height, width): the image fills the top left corner of the padded input, the rest is cropped."""

    image: Size
    padded: Size
    target: Size


class ImageLogits(NamedTuple):
    """What the model predicts for one image."""

    class_logits: Tensor  # (Q, K + 1)
    mask_logits: Tensor  # (Q, h, w)
    sizes: ImageSizes


def logits_and_sizes(outputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `split_batch` from a model's outputs; the input of transformers' model is 4 times the logits.

    Raises:
        ValueError: the outputs have no queries, or are not a model's outputs.
    """
    if not isinstance(outputs, ModelOutput) and not hasattr(outputs, "class_queries_logits"):
        raise ValueError(
            f"outputs is a {type(outputs).__name__}; give what the model returned, with its class_queries_logits and "
            "masks_queries_logits (not with return_dict=False)."
        )
    if not hasattr(outputs, "class_queries_logits"):
        raise ValueError(
            f"{type(outputs).__name__} holds no queries, so there are no segments in it. A per-pixel baseline does "
            'semantic segmentation only; in a pipeline, set subtask="semantic".'
        )
    class_logits, mask_logits = outputs.class_queries_logits, outputs.masks_queries_logits
    image_sizes = getattr(outputs, "image_sizes", None)
    if image_sizes is None:
        height, width = mask_logits.shape[-2:]
        input_sizes = torch.tensor([[4 * height, 4 * width]] * len(mask_logits), device="cpu")
        return class_logits, mask_logits, input_sizes, input_sizes
    return class_logits, mask_logits, image_sizes, outputs.padded_sizes


def split_batch(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    target_sizes: Sequence[Size] | None,
) -> list[ImageLogits]:
    """Splits a batch into its images.

    Raises:
        ValueError: logits that are not finite or do not belong together, or target_sizes that does not hold one
            positive (height, width) for each image.
    """
    if (
        class_queries_logits.ndim != 3
        or masks_queries_logits.ndim != 4
        or class_queries_logits.shape[:2] != masks_queries_logits.shape[:2]
    ):
        raise ValueError(
            f"The class logits have shape {tuple(class_queries_logits.shape)} and the mask logits "
            f"{tuple(masks_queries_logits.shape)}; give (batch, queries, labels + 1) and (batch, queries, height, "
            "width)."
        )
    check_finite({"class logits": class_queries_logits, "mask logits": masks_queries_logits})
    sizes = sizes_of_images(image_sizes, padded_sizes, target_sizes)
    rows = zip(class_queries_logits, masks_queries_logits, sizes, strict=True)
    return [ImageLogits(*row) for row in rows]


def sizes_of_images(image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None) -> list[ImageSizes]:
    """The sizes of each image of a batch; by default the target is the image's own.

    Raises a ValueError if target_sizes does not hold one positive (height, width) for each image.
    """
    image_size_list, padded_size_list = _as_sizes(image_sizes), _as_sizes(padded_sizes)
    try:
        targets = image_size_list if target_sizes is None else _as_sizes(target_sizes)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"target_sizes is {target_sizes}; give a list with one (height, width) per image, in whole pixels."
        ) from error
    if len(targets) != len(image_size_list):
        raise ValueError(
            f"target_sizes has {len(targets)} entries, but the batch has {len(image_size_list)} images; "
            "give one (height, width) for each image."
        )
    for index, (height, width) in enumerate(targets):
        if not (1 <= height <= MAX_EDGE and 1 <= width <= MAX_EDGE):
            raise ValueError(f"target_sizes[{index}] is ({height}, {width}); height and width must be 1 to {MAX_EDGE}.")
    return list(map(ImageSizes, image_size_list, padded_size_list, targets))


def check_thresholds(**thresholds: Any) -> None:
    """Raises a ValueError unless each is a number from 0 to 1."""
    for name, value in thresholds.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise ValueError(f"{name} is {value!r}; give a number from 0 to 1.")


def checked_label_ids(label_ids: Any) -> set[int]:
    """Label ids as a set. Raises a ValueError unless they are integers: JSON keys, as strings, would match no label."""
    ids = label_ids.tolist() if hasattr(label_ids, "tolist") else label_ids
    is_collection = isinstance(ids, Collection) and not isinstance(ids, str)
    if not is_collection or not all(isinstance(label_id, Integral) for label_id in ids):
        raise ValueError(f"label_ids_to_fuse is {label_ids!r}; give a list of label ids, which are integers.")
    return set(ids)


def check_finite(logits: Mapping[str, Tensor]) -> None:
    """Raises a ValueError for logits, by name, that contain NaN or infinity."""
    # A sum is finite only if all its terms are. It may still overflow, so only then each is checked.
    sums = torch.stack([values.sum(dtype=torch.float32) for values in logits.values()])
    for (name, values), has_finite_sum in zip(logits.items(), sums.isfinite().tolist(), strict=True):
        if not has_finite_sum and not values.isfinite().all():
            raise ValueError(
                f"The {name} contain NaN or infinity, so there is no segmentation. Check the weights and the inputs of "
                "the model; in float16, try bfloat16."
            )


def _as_sizes(sizes: Tensor | Sequence[Size]) -> list[Size]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(_whole(height), _whole(width)) for height, width in rows]


def _whole(number: Any) -> int:
    # With a fraction truncated, the result would not match the image it is meant for.
    if int(number) != number:
        raise ValueError(f"{number} is not a whole number")
    return int(number)
