"""Mask logits from the embeddings of queries and pixels: of all queries for matching, of matched ones for the losses.

Letters: B images, L decoder layers, Q queries, M matched pairs of the batch, m those of one image, C pixel feature
width, F channels of the pyramid, P pixels; h x w = H/4 x W/4 for the H x W padded image.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .loss_maskformer_masks import prefers_small_chunks, rows_at_once


class Projection(NamedTuple):
    """The 3 x 3 convolution, with stride 1 and zero padding 1, that produced pixel embeddings.

    Args:
        level: Its input, (B, F, h, w).
        weight: (C, F, 3, 3).
        bias: (C,).
        version: torch's version counter of the pixel embeddings when they were made.
    """

    level: Tensor
    weight: Tensor
    bias: Tensor
    version: int


# The projection behind each tensor of pixel embeddings. Not an attribute of it, which would be saved and copied.
_PROJECTIONS = WeakTensorKeyDictionary()


def record_projection(pixel_embeddings: Tensor, level: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Records what produced pixel embeddings, so that the gradient of a loss may bypass them."""
    _PROJECTIONS[pixel_embeddings] = Projection(level, weight, bias, pixel_embeddings._version)


def pop_projection(pixel_embeddings: Tensor) -> Projection | None:
    """What produced pixel embeddings, if they are unchanged and nobody needs their gradient.

    What a hook or an adapter puts in their place has no such record; in-place changes are counted; and whoever gathers
    weights only for the backward pass, as sharding does, has a hook on the tensor. The record is removed: it keeps the
    pyramid in memory.
    """
    projection = _PROJECTIONS.pop(pixel_embeddings, None)
    is_waited_for = pixel_embeddings._backward_hooks or pixel_embeddings.retains_grad
    if projection is None or projection.version != pixel_embeddings._version or is_waited_for:
        return None
    return projection


def mask_logits_of_image(
    mask_logits: Tensor | None, embeddings: tuple[Tensor, Tensor] | None, image: int, pixels: Tensor | None
) -> Iterator[Tensor]:
    """Yields mask logits (n, P) of an image at some pixels or all (None), for the queries of a few layers at a time.

    Without logits they are computed from embeddings, at those pixels only.

    Args:
        mask_logits: (L, B, Q, h, w).
        embeddings: Of masks (L, B, Q, C) and pixels (B, C, h, w).
        image: Which one.
        pixels: (P,), positions in h * w.
    """
    queries, maps = embeddings or (cast(Tensor, mask_logits),) * 2
    num_pixels = maps.shape[-2:].numel() if pixels is None else len(pixels)
    layers_at_once = _layers_at_once(queries.shape[0], queries.shape[2], num_pixels, queries.device)
    if mask_logits is not None:
        for layers in mask_logits[:, image].flatten(2).split(layers_at_once):
            yield (layers if pixels is None else layers.index_select(2, pixels)).flatten(0, 1)
    elif embeddings is not None:
        pixel_embeddings = embeddings[1][image].flatten(1)
        if pixels is not None:
            pixel_embeddings = pixel_embeddings.index_select(1, pixels)
        for mask_embeddings in embeddings[0][:, image].split(layers_at_once):
            yield mask_embeddings.flatten(0, 1) @ pixel_embeddings


def _layers_at_once(num_layers: int, num_queries: int, num_pixels: int, device: torch.device) -> int:
    """One on a CPU, elsewhere as many as are processed at once, in parts of similar size."""
    if prefers_small_chunks(device):
        return 1
    at_most = max(1, rows_at_once(device, num_pixels) // num_queries)
    return -(-num_layers // -(-num_layers // at_most))


def matched_mask_logits(mask_embeddings: Tensor, pixel_embeddings: Tensor, counts: list[int]) -> Tensor:
    """Mask logits (M, h, w) of matched queries, differentiable.

    Args:
        mask_embeddings: (M, C), sorted by image.
        pixel_embeddings: (B, C, h, w).
        counts: How many of the M belong to each image.
    """
    projection = pop_projection(pixel_embeddings)
    # Bypassing them costs M / (B * C) of their own gradient in convolutions, and some smaller products: at a half it
    # saves a third of the time or more.
    if projection is not None and 2 * len(mask_embeddings) <= pixel_embeddings.shape[:2].numel():
        return FoldedMaskLogits.apply(mask_embeddings, pixel_embeddings.detach(), counts, *projection[:3])
    return _products(mask_embeddings, pixel_embeddings, counts)


def _products(mask_embeddings: Tensor, pixel_embeddings: Tensor, counts: list[int]) -> Tensor:
    # Image by image, so that the gradient of its pixels is one product for all layers.
    products = [
        of_image @ pixels.flatten(1)
        for of_image, pixels in zip(mask_embeddings.split(counts), pixel_embeddings.unbind(), strict=True)
    ]
    return torch.cat(products).unflatten(1, pixel_embeddings.shape[-2:])


class FoldedMaskLogits(torch.autograd.Function):
    """Mask logits whose gradient does not go through the pixel embeddings.

    Mask embeddings and the projection fold into one convolution from the pyramid to the masks of an image, with m
    output channels instead of C. The gradient is that of this convolution.

    Shapes:
        mask_embeddings: (M, C), sorted by image; `counts` says how many each image has.
        pixel_embeddings: (B, C, h, w), without gradient.
        level, weight, bias: As in `Projection`.
        returns: (M, h, w), differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask_embeddings: Tensor,
        pixel_embeddings: Tensor,
        counts: list[int],
        level: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(mask_embeddings, pixel_embeddings, level, weight, bias)
        ctx.counts = counts
        return _products(mask_embeddings, pixel_embeddings, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mask_embeddings, pixel_embeddings, level, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        of_masks = torch.empty_like(mask_embeddings) if ctx.needs_input_grad[0] else None
        of_level = torch.zeros_like(level) if needed[0] else None
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        stop = 0
        for image, count in enumerate(ctx.counts):
            if count == 0:
                continue
            rows = slice(stop, stop := stop + count)
            if of_masks is not None:
                pixels = pixel_embeddings[image].flatten(1).to(gradient.dtype)
                of_masks[rows] = gradient[rows].flatten(1) @ pixels.T
            # Folded in the precision of the weights, convolved in that of the logits, which autocast may have chosen.
            embeddings = mask_embeddings[rows].to(weight.dtype)
            kernels = (embeddings @ weight.flatten(1)).unflatten(1, weight.shape[1:])
            operands = (gradient[rows][None], level[image : image + 1].to(gradient.dtype), kernels.to(gradient.dtype))
            of_image, of_kernels, of_biases = torch.ops.aten.convolution_backward(*operands, [count], *geometry, needed)
            if of_level is not None:
                of_level[image] = of_image[0]
            if needed[1]:
                of_weight += (embeddings.T @ of_kernels.flatten(1).to(weight.dtype)).view_as(weight)
            if needed[2]:
                of_bias += embeddings.T @ of_biases.to(bias.dtype)
        return of_masks, None, None, of_level, of_weight if needed[1] else None, of_bias if needed[2] else None
