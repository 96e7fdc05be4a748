"""Focal and dice loss of matched masks, on all pixels without storing them.

Letters: M masks, m of them processed at once, P pixels or points; h x w is the size of the logits, H x W of the image.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss_maskformer_targets import masks_at

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0  # the closed-form gradients below assume an exponent of 2

# A pixel with this logit adds nothing to a sum over pixels outside: neither its probability, 2e-35, nor its focal loss.
NEGLIGIBLE_LOGIT = -80.0
# Pixels processed at once: few enough for a CPU's cache, enough to keep a GPU busy.
CHUNK_SIZE_CPU, CHUNK_SIZE_GPU = 2**19, 2**23
BLOCK_SIZE = 32


def prefers_small_chunks(device: torch.device) -> bool:
    """Whether few pixels at a time are fastest, as on a CPU; on a GPU each operation may take longer to launch."""
    return device.type == "cpu"


def rows_at_once(device: torch.device, num_pixels: int) -> int:
    """How many masks of so many pixels are processed at once."""
    return max(1, (CHUNK_SIZE_CPU if prefers_small_chunks(device) else CHUNK_SIZE_GPU) // num_pixels)


@dataclass
class MasksOfSegment:
    """Consecutive rows of logits that are matched to one segment, by one decoder layer each.

    Args:
        rows: Their place among the M masks.
        inside: (P,) pixels of the segment, as positions in the flattened H x W image.
        left_out: Pixels that do not count, likewise; None if all do.
    """

    rows: slice
    inside: Tensor
    left_out: Tensor | None = None


@dataclass
class MasksOfImage:
    """Consecutive rows of logits that are matched to segments of one image.

    Args:
        rows: Their place among the M masks.
        segments: (M,), the segment of each of the M masks.
        masks: Those of the image, as in `Targets`.
        counted: (P,) bool, pixels that count; None if all do.
    """

    rows: slice
    segments: Tensor
    masks: Tensor
    counted: Tensor | None = None


class WithGradient(torch.autograd.Function):
    """A sum of mask losses whose gradient is already known: it is computed while their pixels are at hand.

    Shapes:
        logits: (M, h, w), any floating type.
        total: The sum, without gradient.
        gradient: Of the sum with respect to the logits, float32; None if not needed.
        returns: the sum, differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, total: Tensor, gradient: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * total_gradient).to(ctx.dtype), None, None


@torch.no_grad()
def dense_mask_losses(
    logits: Tensor,
    groups: Iterable[MasksOfSegment | MasksOfImage],
    size: tuple[int, int],
    focal_weight: float | None,
    dice_weight: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss on all H x W pixels, with logits upsampled bilinearly, a few masks at a time.

    The gradient at h x w is computed along the way, on a CPU while the pixels of a mask are in the cache, and nothing
    of size H x W outlives its mask.

    Takes logits (M, h, w) of any floating type, computed in float32. Returns focal (mean over pixels) and dice of each
    mask, (M,), and the gradient of their weighted sum with respect to the logits, None without `focal_weight`.
    """
    focal, dice = logits.new_zeros(2, len(logits), dtype=torch.float32)
    gradient = None if focal_weight is None else torch.empty_like(logits, dtype=torch.float32)
    upsampling = BilinearUpsampling(logits.shape[-2:], size, logits.device)
    masks_per_chunk = rows_at_once(logits.device, size[0] * size[1])
    for group in groups:
        for start in range(group.rows.start, group.rows.stop, masks_per_chunk):
            rows = slice(start, min(start + masks_per_chunk, group.rows.stop))
            pixels = upsampling(logits[rows].float()).flatten(1)
            if isinstance(group, MasksOfSegment):
                focal[rows], dice[rows] = _losses_of_segment(pixels, group, focal_weight, dice_weight)
            else:
                inside = masks_at(group.masks, group.segments[rows])
                focal[rows], dice[rows] = mask_losses(pixels, inside, group.counted, focal_weight, dice_weight)
            if gradient is not None:
                gradient[rows] = upsampling.transposed(pixels.unflatten(1, size))
    return focal, dice, gradient


def _losses_of_segment(
    logits: Tensor, group: MasksOfSegment, focal_weight: float | None, dice_weight: float
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of a few masks of one segment, (m, P) -> (m,) each; `logits` are overwritten by the gradient.

    A segment owns few pixels of an image: all pixels are treated as outside except those inside, which are gathered
    first and treated separately, so that no mask is ever built.

    Without `focal_weight` there is no gradient, and `logits` become meaningless.
    """
    num_pixels = logits.shape[1]
    logits_inside = logits.index_select(1, group.inside)
    logits.index_fill_(1, group.inside, NEGLIGIBLE_LOGIT)
    if group.left_out is not None:
        logits.index_fill_(1, group.left_out, NEGLIGIBLE_LOGIT)
        num_pixels = max(num_pixels - len(group.left_out), 1)

    # Outside, the error is the probability p; focal loss is p^2 * softplus(logit).
    p, negative_log = logits.sigmoid(), F.softplus(logits)
    p_squared = p * p
    focal_outside = torch.linalg.vecdot(p_squared, negative_log)
    area_outside = p.sum(1)
    # Inside, the error is 1 - p, computed from the negated logit because subtraction would lose precision.
    p_inside, error, negative_log_inside = (
        logits_inside.sigmoid(),
        (-logits_inside).sigmoid(),
        F.softplus(-logits_inside),
    )
    focal_inside = (error * error * negative_log_inside).sum(1)
    overlap = p_inside.sum(1)

    focal = (FOCAL_ALPHA * focal_inside + (1 - FOCAL_ALPHA) * focal_outside) / num_pixels
    numerator = 2 * overlap + 1
    denominator = overlap + area_outside + len(group.inside) + 1
    if focal_weight is not None:
        per_pixel = focal_weight / num_pixels
        by_area = (dice_weight * numerator / denominator**2)[:, None]
        by_overlap = (2 * dice_weight / denominator)[:, None]
        # Outside: d focal = p^2 * (2 * (1 - p) * softplus + p), d p = p - p^2; in place: this is memory-bound.
        focal_gradient = negative_log.addcmul_(p, negative_log, value=-1)
        torch.add(p, focal_gradient, alpha=2, out=focal_gradient).mul_(p_squared)
        torch.sub(p, p_squared, out=logits).mul_(by_area).add_(focal_gradient, alpha=(1 - FOCAL_ALPHA) * per_pixel)
        inside = error * error * (2 * p_inside * negative_log_inside + error) * (-FOCAL_ALPHA * per_pixel)
        inside += p_inside * error * (by_area - by_overlap)
        logits.index_copy_(1, group.inside, inside)
    return focal, 1 - numerator / denominator


class BilinearUpsampling:
    """Bilinear upsampling of (m, h, w) to (m, H, W), as two products with small matrices, and its transpose.

    Both are several times faster than torch's on a CPU, above all the transpose, which is the backward pass.
    """

    def __init__(self, low_size: Sequence[int], size: Sequence[int], device: torch.device) -> None:
        self.rows = _interpolation(low_size[0], size[0], device)
        self.columns = _interpolation(low_size[1], size[1], device)

    def __call__(self, maps: Tensor) -> Tensor:
        return self.rows(self.columns(maps.mT).mT)

    def transposed(self, maps: Tensor) -> Tensor:
        return self.columns.transposed(self.rows.transposed(maps).mT).mT


class Interpolation:
    """Linear interpolation of the rows of (m, n, P) to (m, N, P).

    A row depends on two, so the matrix is split into blocks of 32 rows with the few columns that each needs. The last
    block is padded with rows of 0, which are cropped from the result.
    """

    def __init__(self, low_length: int, length: int, device: torch.device) -> None:
        # torch's own weights: (N, n). On the host, where the window can be read without waiting for the device.
        identity = torch.eye(low_length, dtype=torch.float32, device="cpu")[None]
        matrix = F.interpolate(identity, length, mode="linear", align_corners=False)[0].T
        self.low_length, self.length, self.num_missing = low_length, length, -length % BLOCK_SIZE
        blocks = F.pad(matrix, (0, 0, 0, self.num_missing)).view(-1, BLOCK_SIZE, low_length)
        is_needed = blocks.ne(0).any(1).int()  # (blocks, n)
        first = is_needed.argmax(1)
        window = int((low_length - is_needed.flip(1).argmax(1) - first).max())
        starts = first.clamp(max=low_length - window)
        sources = starts[:, None] + torch.arange(window, device="cpu")  # (blocks, window)
        self.weights = blocks.gather(2, sources[:, None].expand(-1, BLOCK_SIZE, -1)).to(device)
        self.sources = sources.to(device)

    def __call__(self, maps: Tensor) -> Tensor:
        windows = maps.index_select(1, self.sources.flatten()).unflatten(1, self.sources.shape)
        return (self.weights @ windows).flatten(1, 2)[:, : self.length]

    def transposed(self, maps: Tensor) -> Tensor:
        if self.num_missing:
            maps = F.pad(maps, (0, 0, 0, self.num_missing))
        windows = (self.weights.mT @ maps.unflatten(1, (-1, BLOCK_SIZE))).flatten(1, 2)
        sums = windows.new_zeros(len(maps), self.low_length, maps.shape[2])
        return sums.index_add_(1, self.sources.flatten(), windows)


@functools.lru_cache(maxsize=64)
def _interpolation(low_length: int, length: int, device: torch.device) -> Interpolation:
    return Interpolation(low_length, length, device)


def mask_losses(
    logits: Tensor, inside: Tensor, counted: Tensor | None, focal_weight: float | None, dice_weight: float
) -> tuple[Tensor, Tensor]:
    """As `plain_mask_losses`; `logits` (M, P) are overwritten by the gradient.

    Without `focal_weight` there is no gradient, and `logits` become meaningless. `counted` may be the same for all
    masks, (P,).
    """
    sign = inside.float().mul_(2).sub_(1)
    logits *= sign  # now those of the truth
    # Each from its own logit: 1 - truth would lose the precision of a small error.
    truth, error, negative_log = logits.sigmoid(), logits.neg().sigmoid_(), F.softplus(logits.neg_())
    focal_factor = sign.mul(FOCAL_ALPHA - 0.5).add_(0.5).mul_(error).mul_(error)
    probabilities, slope = torch.where(inside, truth, error), truth * error  # derivative with respect to the logit
    num_points: int | Tensor = logits.shape[1]
    if counted is not None:  # pixels inside always count
        for factor in (focal_factor, probabilities, slope):
            factor *= counted
        num_points = counted.sum(-1).clamp(min=1)
    focal = torch.linalg.vecdot(focal_factor, negative_log) / num_points
    numerator = 2 * torch.linalg.vecdot(probabilities, inside.float()) + 1
    denominator = probabilities.sum(1) + inside.sum(1) + 1
    if focal_weight is not None:
        by_area, by_overlap = dice_weight * numerator / denominator**2, dice_weight / denominator
        dice_slope = torch.addcmul((by_area - by_overlap)[:, None], sign, by_overlap[:, None], value=-1)
        per_point = (-focal_weight / num_points * torch.ones_like(focal))[:, None]
        torch.mul(truth, negative_log, out=logits).mul_(2).add_(error).mul_(focal_factor).mul_(sign).mul_(per_point)
        logits.addcmul_(slope, dice_slope)
    return focal, 1 - numerator / denominator


def plain_mask_losses(logits: Tensor, inside: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Focal (mean over pixels) and dice loss of each mask, (M,), by definition.

    Args:
        logits: (M, P).
        inside: (M, P) bool, whether a pixel belongs to the segment.
        counted: (M, P) bool, pixels that count; None if all do.
    """
    log_truth = F.logsigmoid(torch.where(inside, logits, -logits))  # log-probability of the truth
    error = 1 - log_truth.exp()
    focal = torch.where(inside, -FOCAL_ALPHA, FOCAL_ALPHA - 1) * error**FOCAL_GAMMA * log_truth
    probabilities = torch.where(inside, 1 - error, error)
    if counted is not None:
        focal, probabilities = focal * counted, probabilities * counted
    num_pixels = logits.shape[1] if counted is None else counted.sum(1).clamp(min=1)
    dice = 1 - (2 * (probabilities * inside).sum(1) + 1) / (probabilities.sum(1) + inside.sum(1) + 1)
    return focal.sum(1) / num_pixels, dice
