"""Focal and dice loss of matched masks on points sampled anew in every step, instead of all pixels.

Letters: M masks, m of them processed at once, P points; h x w is the size of the logits, H x W of the image.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss_maskformer_masks import mask_losses, rows_at_once
from .loss_maskformer_targets import Targets, are_owned, masks_at

# Logits at sampled points processed at once: 16 MiB.
MANY_POINTS = 2**22


@dataclass
class PointSampling:
    """Focal and dice loss, and matching costs, on points sampled anew in every step instead of all pixels.

    Matching samples pixels of the logits uniformly (or uses all, if they are few). The losses sample points anywhere:
    for each mask the most uncertain ones (logits near 0) of a larger set of candidates, and some without selection. A
    point has the bilinearly interpolated logit, and belongs to the segment that owns the pixel it falls into.

    Mask2Former samples for each mask separately, and for matching in each image after each layer. Here all layers and
    images share the pixels for matching, and the masks of an image share the candidates: what one mask or one cost sees
    has the same distribution, so that the expected loss and gradient are the same.

    If void is ignored, its points are never uncertain, and those sampled without selection are left out afterwards:
    what is predicted there changes neither which points are chosen nor their loss.

    Args:
        num_points: P, points per mask.
        oversample_ratio: Number of candidates, as a multiple of P.
        importance_sample_ratio: The fraction of P that is chosen by uncertainty.
    """

    num_points: int
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    @property
    def num_candidates(self) -> int:
        return int(self.oversample_ratio * self.num_points)

    @property
    def num_uncertain(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    @property
    def num_drawn(self) -> int:
        """Candidates, followed by the points that are used without selection."""
        return self.num_candidates + self.num_points - self.num_uncertain

    def choose_pixels(self, pixels: Tensor) -> Tensor | None:
        """Samples P positions in a list of pixels, ascending, for matching; None means all."""
        if len(pixels) <= self.num_points:
            return None
        return torch.randperm(len(pixels), device=pixels.device)[: self.num_points].sort().values

    def choose_points(self, logits: Tensor, counted: Tensor | None = None) -> Tensor:
        """Which P of the sampled points each mask uses, (m, P), by its logits there, (m, `num_drawn`).

        Points that do not count, (`num_drawn`,) bool, are chosen last, whatever their logits are.
        """
        certainty = logits[:, : self.num_candidates].abs()
        if counted is not None:
            certainty.masked_fill_(~counted[: self.num_candidates], float("inf"))
        # Read as integers, non-negative floats keep their order, and topk takes two thirds of the time on a CPU.
        order = certainty.view(torch.int32)
        uncertain = order.topk(self.num_uncertain, dim=1, largest=False, sorted=False).indices
        others = torch.arange(self.num_candidates, self.num_drawn, device=logits.device)
        return torch.cat((uncertain, others.expand(len(logits), -1)), dim=1)


@torch.no_grad()
def sampled_mask_losses(
    logits: Tensor,
    sampling: PointSampling,
    counts: list[int],
    segments: Tensor,
    targets: Targets,
    ignores_void: bool,
    focal_weight: float | None,
    dice_weight: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss on sampled points, a few masks at a time, and their gradient: as `dense_mask_losses`.

    Takes logits (M, h, w) sorted by image, of which image i has `counts[i]`, and the segment of each, (M,). The focal
    loss is the mean over points.
    """
    focal, dice = logits.new_zeros(2, len(logits), dtype=torch.float32)
    gradient = None if focal_weight is None else torch.empty_like(logits, dtype=torch.float32)
    masks_per_draw = max(1, MANY_POINTS // sampling.num_drawn)
    masks_per_chunk = rows_at_once(logits.device, sampling.num_points)
    ends = itertools.accumulate(counts)
    for end, count, masks in zip(ends, counts, targets.masks, strict=True):
        is_owned = are_owned(masks).flatten() if ignores_void else None
        for start in range(end - count, end, masks_per_draw):
            stop = min(start + masks_per_draw, end)
            positions = torch.rand(2, sampling.num_drawn, dtype=torch.float32, device=logits.device)
            points = Points(positions, logits.shape[-2:])
            pixels = _pixels_at(positions, targets.size)
            counted = None if is_owned is None else is_owned[pixels]
            at_points = points(logits[start:stop].float())
            for first in range(0, stop - start, masks_per_chunk):
                chunk = at_points[first : first + masks_per_chunk]
                rows = slice(start + first, start + first + len(chunk))
                chosen = sampling.choose_points(chunk, counted)
                logits_at_chosen = chunk.gather(1, chosen)
                focal[rows], dice[rows] = mask_losses(
                    logits_at_chosen,
                    masks_at(masks, segments[rows], pixels).gather(1, chosen),
                    None if counted is None else counted[chosen],
                    focal_weight,
                    dice_weight,
                )
                if gradient is not None:
                    chunk.zero_().scatter_(1, chosen, logits_at_chosen)
            if gradient is not None:
                gradient[start:stop] = points.transposed(at_points)
    return focal, dice, gradient


class Points:
    """Bilinear interpolation of (m, h, w) at P points, and its transpose, for all m at once.

    A point depends on four pixels. Maps are transposed so that the m values of a pixel are contiguous: each point is
    then a weighted sum of four rows, several times faster on a CPU than torch's `grid_sample`.

    Args:
        positions: (2, P) float32, y and x in 0 to 1.
        low_size: (h, w).
    """

    def __init__(self, positions: Tensor, low_size: Sequence[int]) -> None:
        (top, bottom, down), (left, right, along) = (
            _neighbours(position, length) for position, length in zip(positions, low_size, strict=True)
        )
        self.low_size = tuple(low_size)
        row_length = low_size[1]
        self.corners = torch.stack(
            [row * row_length + column for row in (top, bottom) for column in (left, right)], dim=1
        )  # (P, 4)
        self.weights = torch.stack([y * x for y in (1 - down, down) for x in (1 - along, along)], dim=1)

    def __call__(self, maps: Tensor) -> Tensor:
        rows = maps.flatten(1).T.contiguous()
        return F.embedding_bag(self.corners, rows, per_sample_weights=self.weights, mode="sum").T.contiguous()

    def transposed(self, values: Tensor) -> Tensor:
        """(m, P) -> (m, h, w). Each pixel is a weighted sum of the points around it."""
        corners, order = self.corners.flatten().sort(stable=True)
        num_pixels = self.low_size[0] * self.low_size[1]
        starts = torch.searchsorted(corners, torch.arange(num_pixels, device=corners.device))
        rows, weights = values.T.contiguous(), self.weights.flatten()[order]
        sums = F.embedding_bag(order // 4, rows, starts, per_sample_weights=weights, mode="sum")
        return sums.T.unflatten(1, self.low_size)


def _neighbours(positions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `length` pixels around each position in 0 to 1, and the weight of the second."""
    exact = (positions * length - 0.5).clamp_(0, length - 1)
    first = exact.long()
    return first, (first + 1).clamp_(max=length - 1), exact - first


def _pixels_at(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions in the flattened image of the pixels that points (2, P), y and x in 0 to 1, fall into."""
    # Random numbers stay so far below 1 that no product is rounded up to the height or width itself.
    rows, columns = ((position * length).long() for position, length in zip(positions, size, strict=True))
    return rows * size[1] + columns
