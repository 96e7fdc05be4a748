"""From the logits of models that classify pixels to label maps (section 4.2): pure functions of tensors.

B images, K labels, h x w = H/4 x W/4 for the padded input of H x W. Sizes are (height, width).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .post_processing_maskformer_inputs import Size, check_finite, sizes_of_images


@torch.no_grad()
def per_pixel_segmentation(
    logits: Tensor, image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None = None
) -> list[Tensor]:
    """Assigns each pixel the label with the highest logit, upsampled in the original's order.

    Args:
        logits: (B, K, h, w).
        image_sizes, padded_sizes, target_sizes: as in `semantic_segmentation`.

    Returns:
        One (H, W) int64 map of labels per image.

    Raises:
        ValueError: logits are not a batch or not finite, or target_sizes does not match the batch.
    """
    return [logits.argmax(dim=0) for logits in _at_targets(logits, image_sizes, padded_sizes, target_sizes)]


@torch.no_grad()
def per_pixel_scores(
    logits: Tensor, image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None = None
) -> list[Tensor]:
    """Returns the probability of each label at each pixel: the softmax of what `per_pixel_segmentation` compares.

    Args and errors: as there.

    Returns:
        One (K, H, W) float32 tensor per image.
    """
    return [logits.softmax(dim=0) for logits in _at_targets(logits, image_sizes, padded_sizes, target_sizes)]


def _at_targets(
    logits: Tensor, image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None
) -> Iterator[Tensor]:
    if logits.ndim != 4:
        raise ValueError(f"The logits have shape {tuple(logits.shape)}; give (batch, labels, height, width).")
    check_finite({"logits": logits})
    sizes = sizes_of_images(image_sizes, padded_sizes, target_sizes)
    return (per_pixel_logits(of_image, size.image, size.target) for of_image, size in zip(logits, sizes, strict=True))


def per_pixel_logits(logits: Tensor, image_size: Size, target_size: Size) -> Tensor:
    """Resizes the logits (K, h, w) of one image to its target, (K, H, W) float32: upsamples, crops, resizes."""
    height, width = image_size
    upsampled = upsample_per_pixel_logits(logits[None])[..., :height, :width]
    if target_size != image_size:
        upsampled = F.interpolate(upsampled, size=target_size, mode="bilinear", align_corners=False)
    return upsampled[0]


def upsample_per_pixel_logits(logits: Tensor) -> Tensor:
    """Upsamples (B, K, h, w) by 4, in float32: to the size of the input, or up to 3 pixels more, as in the original.

    Unlike MaskFormer's masks, which are resized to exactly the size of the input.
    """
    return F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
