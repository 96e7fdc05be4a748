"""Matching and losses: costs, assignment, loss terms (paper, section 3.2).

Letters: B images, L decoder layers, Q queries, K classes, N segments in one image, M matched pairs in the batch;
H x W is the padded image, h x w = H/4 x W/4.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import is_scipy_available

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
NO_SEGMENT = -1  # in an index map: the pixel belongs to no segment
NO_LABEL = -100  # in a padded tensor of labels: there is no such segment


class MaskFormerLoss(nn.Module):
    """Matches queries to segments after every decoder layer and sums the weighted losses of all layers.

    Matching minimises class_cost * (-probability of the class) + mask_cost * focal + dice_cost * dice per image.
    Matched queries then learn the class and the mask of their segment, all others "no object". As in the paper's code,
    matching compares masks at stride 4, the mask losses at full resolution, and pixels of no segment are background.

    transformers' loss of the same name takes a matcher and divides the number of masks by the number of processes
    twice.

    Args:
        num_labels: K, without "no object".
        cross_entropy_weight, mask_weight, dice_weight: Weights of the loss terms.
        no_object_weight: Weight of "no object" in the cross-entropy.
        class_cost, mask_cost, dice_cost: Weights of the matching cost.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        cross_entropy_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        class_cost: float = 1.0,
        mask_cost: float = 20.0,
        dice_cost: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.cross_entropy_weight = cross_entropy_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        # Weight of every class; the last is "no object". The name is the one in checkpoints.
        self.register_buffer("empty_weight", torch.empty(num_labels + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        weights = torch.ones(self.num_labels + 1)
        weights[-1] = self.no_object_weight
        init.copy_(self.empty_weight, weights)

    def forward(
        self,
        class_queries_logits: Tensor,
        masks_queries_logits: Tensor,
        mask_labels: Tensor | list[Tensor],
        class_labels: Tensor | list[Tensor],
        size: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives the loss and its terms.

        Args:
            class_queries_logits: (L, B, Q, K + 1).
            masks_queries_logits: (L, B, Q, h, w).
            mask_labels: List of B tensors (N_i, H_i, W_i), or an index map (B, H, W), -1 = no segment.
            class_labels: List of B int64 tensors (N_i,), or (B, N) int64 padded with -100.
            size: (H, W) of the padded images, if known: masks of another size are then refused.

        Returns:
            The sum of all terms, and each weighted term, detached: `loss_cross_entropy`, `loss_mask`, `loss_dice` of
            the last layer, and with `_0`, `_1`, ... those of the layers before it.

        Raises:
            ValueError: The labels do not fit each other, the batch or the number of classes.
        """
        labels, masks = prepare_targets(mask_labels, class_labels, self.num_labels, size)
        if len(labels) != class_queries_logits.shape[1]:
            raise ValueError(
                f"The labels are of {len(labels)} images, but the batch has {class_queries_logits.shape[1]}."
            )
        low_resolution_masks = [downsample(image_masks, masks_queries_logits.shape[-2:]) for image_masks in masks]
        num_masks = average_over_processes(sum(len(image_labels) for image_labels in labels), self.empty_weight.device)

        terms = {}
        last_layer = len(class_queries_logits) - 1
        # Autocast would take the matrix products of matching to half precision, where areas overflow.
        with torch.autocast(class_queries_logits.device.type, enabled=False):
            for layer, (class_logits, mask_logits) in enumerate(
                zip(class_queries_logits.float(), masks_queries_logits.float(), strict=True)
            ):
                matches = self.match(class_logits, mask_logits, labels, low_resolution_masks)
                suffix = "" if layer == last_layer else f"_{layer}"
                loss_mask, loss_dice = mask_losses(*matched_masks(mask_logits, masks, matches), num_masks)
                terms[f"loss_cross_entropy{suffix}"] = self.cross_entropy_weight * self.classification_loss(
                    class_logits, labels, matches
                )
                terms[f"loss_mask{suffix}"] = self.mask_weight * loss_mask
                terms[f"loss_dice{suffix}"] = self.dice_weight * loss_dice
        loss = torch.stack(list(terms.values())).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, mask_logits: Tensor, labels: list[Tensor], masks: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Assigns segments to queries, one to one, in every image.

        Args:
            class_logits: (B, Q, K + 1), float32.
            mask_logits: (B, Q, h, w), float32.
            labels: B tensors (N_i,).
            masks: B tensors (N_i, h, w) of 0 and 1, float32.

        Returns:
            For each image the indices of the matched queries, ascending, and of their segments; min(Q, N_i) each.
        """
        matches = []
        for image_class_logits, image_mask_logits, image_labels, image_masks in zip(
            class_logits, mask_logits, labels, masks, strict=True
        ):
            class_cost = -image_class_logits.softmax(-1)[:, image_labels]
            mask_cost, dice_cost = pairwise_mask_costs(image_mask_logits.flatten(1), image_masks.flatten(1))
            cost = self.class_cost * class_cost + self.mask_cost * mask_cost + self.dice_cost * dice_cost
            matches.append(assign(cost))
        return matches

    def classification_loss(
        self, class_logits: Tensor, labels: list[Tensor], matches: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Cross-entropy over all queries (B, Q, K + 1) of the batch; a query without a match is "no object"."""
        targets = torch.full(class_logits.shape[:2], self.num_labels, device=class_logits.device)
        for image, (image_labels, (queries, segments)) in enumerate(zip(labels, matches, strict=True)):
            targets[image, queries] = image_labels[segments]
        # From the configuration, not from the buffer: a checkpoint brings its own, and half precision rounds it.
        weights = torch.ones(self.num_labels + 1, device=class_logits.device)
        weights[-1] = self.no_object_weight
        return F.cross_entropy(class_logits.transpose(1, 2), targets, weights)


def prepare_targets(
    mask_labels: Tensor | list[Tensor],
    class_labels: Tensor | list[Tensor],
    num_labels: int,
    size: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Brings both forms of labels to one: B tensors of labels (N_i,) and of masks (N_i, H, W), bool.

    Raises:
        ValueError: A label outside 0 to K - 1, an index map that points past the labels, numbers of masks and labels
            that differ, or masks of another size than the padded images.
    """
    labels = [image_labels[image_labels != NO_LABEL].long() for image_labels in class_labels]
    if len(mask_labels) != len(labels):
        raise ValueError(f"mask_labels are of {len(mask_labels)} images, but class_labels of {len(labels)}.")
    masks = [
        # transformers' image processor pads its float masks with 255, which is no part of a segment.
        segment_masks(image_masks, len(image_labels)) if image_masks.dim() == 2 else image_masks == 1
        for image_masks, image_labels in zip(mask_labels, labels, strict=True)
    ]
    for image, (image_labels, image_masks) in enumerate(zip(labels, masks, strict=True)):
        if len(image_labels) != len(image_masks):
            raise ValueError(f"Image {image} has {len(image_masks)} masks, but {len(image_labels)} labels.")
        if len(image_labels) and not 0 <= int(image_labels.min()) <= int(image_labels.max()) < num_labels:
            raise ValueError(
                f"Image {image} has the class labels {sorted(set(image_labels.tolist()))}, but the model has "
                f"{num_labels} classes (0 to {num_labels - 1}). Check id2label of the configuration against the data."
            )
    _check_size(masks, size)
    return labels, masks


def segment_masks(index_map: Tensor, num_segments: int) -> Tensor:
    """Splits an index map (H, W) into the bool masks (N, H, W) of its segments."""
    if int(index_map.max()) >= num_segments:
        raise ValueError(
            f"mask_labels point to segment {int(index_map.max())}, but the image has {num_segments} class_labels."
        )
    return index_map == torch.arange(num_segments, device=index_map.device)[:, None, None]


def _check_size(masks: list[Tensor], size: Sequence[int] | None) -> None:
    height, width = masks[0].shape[1:] if size is None else size
    for image_masks in masks:
        if tuple(image_masks.shape[1:]) != (height, width):
            raise ValueError(
                f"mask_labels are {image_masks.shape[1]} x {image_masks.shape[2]} pixels, but the padded images have "
                f"{height} x {width}. Masks must be resized and padded (with 0, or -1 in an index map) together with "
                "their images."
            )


def downsample(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour masks (N, h, w), float32, of masks (N, H, W), as the matcher of the paper's code sees them."""
    return F.interpolate(masks[None].float(), size=size, mode="nearest")[0] if len(masks) else masks.new_zeros(0, *size)


def pairwise_mask_costs(mask_logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice cost of every query (Q, P) with every segment (N, P), both (Q, N).

    A sum over pixels of the segment and one over the others is one matrix product each, so that nothing of size
    Q x N x P is held.
    """
    masks = masks.to(mask_logits.dtype)
    probabilities = mask_logits.sigmoid()
    focal_inside = FOCAL_ALPHA * focal_loss(mask_logits)
    focal_outside = (1 - FOCAL_ALPHA) * focal_loss(-mask_logits)
    focal = ((focal_inside - focal_outside) @ masks.T + focal_outside.sum(1, keepdim=True)) / mask_logits.shape[1]
    overlap = probabilities @ masks.T
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(1, keepdim=True) + masks.sum(1) + 1)
    return focal, dice


def focal_loss(logits_of_truth: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) before alpha; takes the logit inside a segment and its negative outside."""
    return (-logits_of_truth).sigmoid() ** FOCAL_GAMMA * F.softplus(-logits_of_truth)


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of least cost: indices of the rows (queries) and columns (segments) of (Q, N), on its device."""
    if is_scipy_available():
        from scipy.optimize import linear_sum_assignment
    else:
        raise ImportError("Matching needs scipy. Install it with: pip install scipy")
    # linear_sum_assignment refuses NaN and infinity, which a diverging network produces: such pairs match last.
    is_finite = cost.isfinite()
    if not is_finite.all():
        warnings.warn(
            f"{int((~is_finite).sum())} of {cost.numel()} matching costs are not finite: the network diverges. "
            "Lower the learning rate or clip the gradient.",
            stacklevel=2,
        )
        cost = torch.where(is_finite, cost, torch.finfo(torch.float32).max / 1e6)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def matched_masks(
    mask_logits: Tensor, masks: list[Tensor], matches: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Logits (M, h, w) of the matched queries of a batch (B, Q, h, w), and the masks (M, H, W) of their segments."""
    logits = torch.cat([image_logits[queries] for image_logits, (queries, _) in zip(mask_logits, matches, strict=True)])
    targets = torch.cat([image_masks[segments] for image_masks, (_, segments) in zip(masks, matches, strict=True)])
    return logits, targets


def mask_losses(mask_logits: Tensor, masks: Tensor, num_masks: float) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of matched pairs, logits (M, h, w) enlarged to their masks (M, H, W).

    Focal is the mean over pixels; both are summed over pairs and divided by `num_masks`. Without pairs both are 0 and
    still depend on the logits, so that every process has a gradient for every parameter.
    """
    if not len(masks):
        return mask_logits.sum(), mask_logits.sum()
    logits = F.interpolate(mask_logits[None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[0].flatten(1)
    inside = masks.flatten(1).to(logits.dtype)
    log_truth = F.logsigmoid(logits * (2 * inside - 1))  # of the probability of the truth: inside or outside
    error = 1 - log_truth.exp()
    focal = -(error**FOCAL_GAMMA) * log_truth
    focal_inside = (focal * inside).sum(1)
    focal_outside = focal.sum(1) - focal_inside
    focal_mean = (FOCAL_ALPHA * focal_inside + (1 - FOCAL_ALPHA) * focal_outside) / focal.shape[1]

    area, error_inside = inside.sum(1), (error * inside).sum(1)
    overlap = area - error_inside
    predicted_area = overlap + error.sum(1) - error_inside
    dice = 1 - (2 * overlap + 1) / (predicted_area + area + 1)
    return focal_mean.sum() / num_masks, dice.sum() / num_masks


def average_over_processes(count: int, device: torch.device) -> float:
    """The mean of a count over all processes, at least 1: gradients are averaged over processes too."""
    total = torch.tensor(float(count), device=device)
    num_processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        num_processes = torch.distributed.get_world_size()
    return max(float(total) / num_processes, 1.0)
