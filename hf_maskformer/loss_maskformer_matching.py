"""Which query is matched to which segment: matching costs and bipartite matching (paper, section 3.2).

Letters: B images, L decoder layers, Q queries, N segments in one image, P pixels or points.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import is_scipy_available

from .loss_maskformer_masks import FOCAL_ALPHA, NEGLIGIBLE_LOGIT, rows_at_once

# Far above every finite cost, and still exact enough in float32 for the sums of the assignment.
NON_FINITE_COST = 1e6
# From about this many costs on, the assignments take milliseconds, and threads are worth starting.
MIN_COSTS_FOR_THREADS = 2**18
# Matrix products with a column count that fills vector registers are up to three times faster on a CPU.
REGISTER_SIZE = 16

Match = tuple[list[int], list[int]]


def pairwise_mask_costs(mask_logits: Tensor, masks: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Focal and dice cost of every query (Q, P) with every segment (N, P), both (Q, N), float32.

    A sum over pixels of the segment and one over the others is one matrix product each, so that nothing of size Q x N x
    P is held; queries are processed a few at a time, so that little of size Q x P is.

    Args:
        mask_logits: (Q, P), any floating type.
        masks: (N, P) bool.
        left_out: (P,) bool, pixels that do not count; None if all do.
    """
    num_pixels = mask_logits.shape[1]
    num_counted = num_pixels if left_out is None else (~left_out).sum().clamp(min=1)
    num_segments = len(masks)
    inside = F.pad(masks.float(), (0, 0, 0, -num_segments % REGISTER_SIZE)).T.contiguous()  # (P, N and a few zeros)
    focal, overlap, area = [], [], []
    for logits in mask_logits.split(rows_at_once(mask_logits.device, num_pixels)):
        logits = logits.float()
        if left_out is not None:
            logits = logits.masked_fill(left_out, NEGLIGIBLE_LOGIT)
        probabilities, negative_log = logits.sigmoid(), F.softplus(logits)
        focal_outside = (probabilities * probabilities).mul_(negative_log).mul_(1 - FOCAL_ALPHA)
        # Inside, with p of the opposite sign: (1 - p)^2 * softplus(-logit), where softplus(-x) = softplus(x) - x.
        error = 1 - probabilities
        focal_inside = negative_log.sub_(logits).mul_(error).mul_(error)
        difference = torch.add(-focal_outside, focal_inside, alpha=FOCAL_ALPHA)
        focal.append(torch.addmm(focal_outside.sum(1, keepdim=True), difference, inside))
        overlap.append(probabilities @ inside)
        area.append(probabilities.sum(1, keepdim=True))
    dice = 1 - (2 * torch.cat(overlap) + 1) / (torch.cat(area) + inside.sum(0) + 1)
    return torch.cat(focal)[:, :num_segments] / num_counted, dice[:, :num_segments]


def assign(costs: Tensor, num_segments: list[int]) -> list[list[Match]]:
    """The minimum-cost assignments of all decoder layers and images.

    Args:
        costs: (L, B, Q, N) on the CPU, finite.
        num_segments: How many of the N columns each image has.

    Returns:
        For each layer and image the matched queries, ascending, and their segments; min(Q, N_i) each.
    """
    if is_scipy_available():
        from scipy.optimize import linear_sum_assignment
    else:
        raise ImportError("Matching needs scipy. Install it with: pip install scipy")
    problems = [
        costs[layer, image, :, : num_segments[image]].numpy() for layer, image in product(*map(range, costs.shape[:2]))
    ]
    if costs.numel() < MIN_COSTS_FOR_THREADS:
        solutions = [linear_sum_assignment(problem) for problem in problems]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            solutions = list(pool.map(linear_sum_assignment, problems))
    matches = [(queries.tolist(), segments.tolist()) for queries, segments in solutions]
    return [matches[start : start + costs.shape[1]] for start in range(0, len(matches), costs.shape[1])]


def finite_costs(costs: Tensor, are_finite: dict[str, bool], reported: set[str]) -> Tensor:
    """Costs in which those that are not finite match last; each term that has any is reported once.

    Args:
        costs: Any shape, on the CPU.
        are_finite: For each term of the costs, whether all of it is.
        reported: Names of the terms that were reported before; added to.
    """
    if all(are_finite.values()):
        return costs
    for name in [name for name, is_finite in are_finite.items() if not is_finite and name not in reported]:
        reported.add(name)
        warnings.warn(
            f"The {name} of the matching is not finite for some queries: the network diverges. Lower the learning "
            "rate or clip the gradient. This is reported once.",
            stacklevel=2,
        )
    return costs.nan_to_num(NON_FINITE_COST, NON_FINITE_COST, NON_FINITE_COST)
