"""Test-time augmentation: the mean of predictions at several scales, with flips, as in the paper's "m.s." results.

K labels; H x W the size of the image.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, get_args

import torch
from torch import Tensor

from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..image_processing_maskformer_images import read_image, size_of
from ..modeling_maskformer_pixel_level import sizes_in_batch
from ..post_processing_maskformer import semantic_scores
from ..post_processing_maskformer_inputs import Size
from ..post_processing_maskformer_tiles import Mode
from ..post_processing_per_pixel_baseline import per_pixel_logits
from .tasks import inputs_for

ADE20K_EDGES = (256, 384, 512, 640, 768, 896)


@torch.no_grad()
def augmented_semantic_scores(
    model: torch.nn.Module,
    image_processor: MaskFormerImageProcessor,
    image: Any,
    *,
    shortest_edges: Sequence[int] = ADE20K_EDGES,
    longest_edge: int = 3584,
    flip: bool = True,
    mode: Mode | None = None,
) -> Tensor:
    """Averages the scores of an image over scales and horizontal flips.

    For a per-pixel baseline the logits are averaged, as in the original, and their softmax is returned.

    Predictions are made one at a time, each resized to the image and flipped back before it is added: memory is a few
    times K x H x W numbers, whatever the number of scales.

    Args:
        model: a `MaskFormerForInstanceSegmentation` or a `PerPixelBaselineForSemanticSegmentation`, on its device.
        image_processor: normalises the images; resizes them to its `size`, from which the scales are made.
        image: in any form that the image processor accepts.
        shortest_edges: the shortest edge at each scale, in pixels; by default those of the paper for ADE20K. For
            Cityscapes it uses 512 to 1792 in steps of 256, with longest_edge=4096.
        longest_edge: upper bound on the other edge.
        flip: whether to flip the image at every scale too.
        mode: what is resized, as in `semantic_scores`; by default `"direct"` if the image processor's task is panoptic,
            as in the original, and `"paper"` otherwise. Baselines support `"paper"` only.

    Returns:
        (K, H, W) float32; its `argmax(0)` is the segmentation.

    Raises:
        ValueError: there is no scale, the model does not have the mode, or it is from another package.
    """
    if not shortest_edges:
        raise ValueError("shortest_edges is empty; pass the shortest edge of at least one scale.")
    if mode is None:
        mode = "direct" if image_processor.segmentation_task == "panoptic" else "paper"
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}.")
    is_baseline = is_per_pixel_baseline(model)
    if is_baseline and mode != "paper":
        raise ValueError(f'A per-pixel baseline has no masks to resize, so its mode is "paper", not {mode!r}.')
    photograph = read_image(image, 0)
    target_size = size_of(photograph)
    # As in the original, the scales are made from the image at its usual evaluation size.
    inputs = image_processor(images=photograph, do_rescale=False, do_normalize=False)
    height, width = _size_of_image(inputs)
    pixels = inputs["pixel_values"][0, :, :height, :width].to(photograph.dtype)
    image_processor = copy(image_processor)
    image_processor.pad_size = None  # scales have their own sizes
    total: Any = 0
    for shortest_edge in shortest_edges:
        size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        inputs = image_processor(images=pixels, size=size, do_resize=True, return_tensors="pt")
        total = total + _scores(model, inputs, target_size, mode)
        if flip:
            # Padding stays on the right.
            _, width = _size_of_image(inputs)
            inputs["pixel_values"][..., :width] = inputs["pixel_values"][..., :width].flip(-1)
            total += _scores(model, inputs, target_size, mode).flip(-1)
    mean = total / (len(shortest_edges) * (2 if flip else 1))
    return mean.softmax(dim=0) if is_baseline else mean


def _size_of_image(inputs: Mapping[str, Any]) -> Size:
    """(height, width) of the only image in a batch, without padding."""
    ((height, width),) = sizes_in_batch(inputs["pixel_values"], inputs["pixel_mask"])[0].tolist()
    return height, width


def _scores(model: torch.nn.Module, inputs: Mapping[str, Any], target_size: Size, mode: Mode) -> Tensor:
    """Scores, or logits of a baseline, (K, H, W), of one image."""
    outputs = model(**inputs_for(model, inputs))
    if not hasattr(outputs, "image_sizes"):
        raise ValueError(
            f"{type(model).__name__} does not report the image size without padding; use a "
            "MaskFormerForInstanceSegmentation or a PerPixelBaselineForSemanticSegmentation of this package."
        )
    (image_size,), (padded_size,) = outputs.image_sizes.tolist(), outputs.padded_sizes.tolist()
    if is_per_pixel_baseline(model):
        return per_pixel_logits(outputs.logits[0], tuple(image_size), target_size)
    logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
    return semantic_scores(*logits, tuple(image_size), tuple(padded_size), target_size, mode)
