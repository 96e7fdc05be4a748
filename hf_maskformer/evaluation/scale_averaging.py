"""Test-time augmentation: the mean of predictions at several scales, mirrored too, as in the paper's "m.s." results.

K labels; H x W the size of the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..image_processing_maskformer import MaskFormerImageProcessor
from ..post_processing_maskformer import semantic_scores

ADE20K_EDGES = (256, 384, 512, 640, 768, 896)


@torch.no_grad()
def augmented_semantic_scores(
    model: torch.nn.Module,
    image_processor: MaskFormerImageProcessor,
    image: Image.Image,
    *,
    shortest_edges: Sequence[int] = ADE20K_EDGES,
    longest_edge: int = 3584,
    flip: bool = True,
) -> Tensor:
    """Averages the scores of an image over scales, and over the image and its mirror image.

    One prediction at a time, each brought to the size of the image and turned back before it is added: a few times
    K x H x W numbers are held, whatever the number of scales.

    Args:
        model: a `MaskFormerForInstanceSegmentation`, on its device.
        image_processor: normalises the images; its `size` gives way to the scales.
        image: RGB.
        shortest_edges: the shortest edge of each scale, in pixels; by default those of the paper for ADE20K. For
            Cityscapes it has 512 to 1792 in steps of 256, with longest_edge=4096.
        longest_edge: the most that the other edge may have.
        flip: whether to mirror the image at every scale too.

    Returns:
        (K, H, W) float32; its `argmax(0)` is the segmentation.

    Raises:
        ValueError: there is no scale.
    """
    if not shortest_edges:
        raise ValueError("shortest_edges is empty; give the shortest edge of at least one scale.")
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    total: Any = 0
    for shortest_edge in shortest_edges:
        size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        total = total + _scores(model, image_processor, image, size)
        if flip:
            total += _scores(model, image_processor, mirrored, size).flip(-1)
    return total / (len(shortest_edges) * (2 if flip else 1))


def _scores(
    model: torch.nn.Module, image_processor: MaskFormerImageProcessor, image: Image.Image, size: dict[str, int]
) -> Tensor:
    parameter = next(model.parameters())
    inputs = image_processor(images=image, size=size, return_tensors="pt")
    outputs = model(
        pixel_values=inputs["pixel_values"].to(parameter.device, parameter.dtype),
        pixel_mask=inputs["pixel_mask"].to(parameter.device),
    )
    (image_size,), (padded_size,) = outputs.image_sizes.tolist(), outputs.padded_sizes.tolist()
    return semantic_scores(
        outputs.class_queries_logits[0],
        outputs.masks_queries_logits[0],
        tuple(image_size),
        tuple(padded_size),
        (image.height, image.width),
    )
