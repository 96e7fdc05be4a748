"""Matching and losses: costs, assignment, loss terms (paper, section 3.2).

Letters: B images, L decoder layers, Q queries, K classes, N segments in one image, M matched pairs of the batch,
C pixel feature width; H x W is the padded image, h x w = H/4 x W/4.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_maskformer_parts import check_loss
from .loss_maskformer_logits import mask_logits_of_image, matched_mask_logits
from .loss_maskformer_masks import (
    MasksOfImage,
    MasksOfSegment,
    WithGradient,
    dense_mask_losses,
    prefers_small_chunks,
)
from .loss_maskformer_matching import Match, assign, finite_costs, pairwise_mask_costs
from .loss_maskformer_points import PointSampling, sampled_mask_losses
from .loss_maskformer_targets import (
    NO_LABEL,
    Targets,
    are_owned,
    checked_labels,
    copy_to_host,
    host_check_tensors,
    masks_at,
    pixels_at_stride,
    pixels_of_segment,
    prepare_targets,
    void_pixels,
)


class MaskFormerLoss(nn.Module):
    """Matches queries to segments after every decoder layer and sums the weighted losses of all layers.

    Matching minimises class_cost * (-probability of the class) + mask_cost * focal + dice_cost * dice per image.
    Matched queries then learn the class and the mask of their segment, all others "no object". As in the paper's code,
    matching compares masks at stride 4, the mask losses at full resolution, and void pixels are background.

    The mask terms are divided by the number of masks, the class term by the sum of the class weights of its queries.
    Over processes whose gradients are averaged, both are those of the whole batch, so that it does not matter how
    images are distributed over processes. Without gradients, each process divides by its own numbers and waits for no
    other.

    transformers' loss of the same name takes a matcher and divides the number of masks by the number of processes
    twice.

    Args:
        num_labels: K, without "no object".
        cross_entropy_weight, mask_weight, dice_weight: Weights of the loss terms.
        no_object_weight: Weight of "no object" in the cross-entropy, above 0.
        class_cost, mask_cost, dice_cost: Weights of the matching cost.
        void_in_loss: What void pixels are: "background" of every mask, or ignored ("ignore").
        matching: "bipartite", or "fixed": query i is matched to class i.
        train_num_points, oversample_ratio, importance_sample_ratio: Compare masks on sampled points (`PointSampling`)
            instead of all pixels.

    Raises:
        ValueError: An argument is invalid.
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
        void_in_loss: str = "background",
        matching: str = "bipartite",
        train_num_points: int | None = None,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        check_loss(
            {
                "cross_entropy_weight": cross_entropy_weight,
                "mask_weight": mask_weight,
                "dice_weight": dice_weight,
                "no_object_weight": no_object_weight,
                "class_cost": class_cost,
                "mask_cost": mask_cost,
                "dice_cost": dice_cost,
                "void_in_loss": void_in_loss,
                "matching": matching,
                "train_num_points": train_num_points,
                "oversample_ratio": oversample_ratio,
                "importance_sample_ratio": importance_sample_ratio,
            }
        )
        self.num_labels = num_labels
        self.cross_entropy_weight = cross_entropy_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        self.ignores_void = void_in_loss == "ignore"
        self.is_matching_fixed = matching == "fixed"
        self.point_sampling = (
            None
            if train_num_points is None
            else PointSampling(train_num_points, oversample_ratio, importance_sample_ratio)
        )
        self.reported_terms: set[str] = set()
        # Weight of every class; the last is "no object". The name is the one in checkpoints.
        self.register_buffer("empty_weight", torch.empty(num_labels + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        weights = torch.ones(self.num_labels + 1)
        weights[-1] = self.no_object_weight
        init.copy_(self.empty_weight, weights)

    # The assignment runs on the host: a compiled model breaks its graph here instead of tracing it.
    @torch.compiler.disable
    def forward(
        self,
        class_queries_logits: Tensor,
        masks_queries_logits: Tensor | None,
        mask_labels: Tensor | list[Tensor],
        class_labels: Tensor | list[Tensor],
        size: Sequence[int] | None = None,
        *,
        embeddings: tuple[Tensor, Tensor] | None = None,
        image_sizes: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms.

        Args:
            class_queries_logits: (L, B, Q, K + 1).
            masks_queries_logits: (L, B, Q, h, w). None with `embeddings`.
            mask_labels: List of B tensors (N_i, H_i, W_i), or an index map (B, H, W), -1 = no segment. Integer masks
                are inside where they are not 0; floating-point masks are 1 inside, 0 outside, or 255 (padding).
            class_labels: List of B int64 tensors (N_i,), or (B, N) int64 padded with -100.
            size: (H, W) of the padded images, if known; otherwise that of the largest masks.
            embeddings: Mask embeddings (L, B, Q, C) and pixel embeddings (B, C, h, w), whose products are the mask
                logits. Those of all queries are then never held at once, or computed for pixels that matching does not
                use; those of the matched queries are recomputed, with gradients. If logits are given too, matching uses
                them as they are.
            image_sizes: (B, 2), (height, width) of each image without its padding, if known: masks in lists that end
                neither there nor where the batch does are then rejected. Otherwise the largest must have the size of
                the batch, and smaller ones are assumed to end where their image does.
            num_items_in_batch: (2,), what `count_items` returns for the whole batch, if this is only a part of it
                (gradient accumulation), over all processes.

        Returns:
            The sum of all terms, and each weighted term, detached: `loss_cross_entropy`, `loss_mask`, `loss_dice` of
            the last layer, and with `_0`, `_1`, ... those of the layers before it.

        Raises:
            ValueError: The labels do not match each other, the batch or the number of classes; or there are neither
                mask logits nor embeddings.
        """
        if masks_queries_logits is None and embeddings is None:
            raise ValueError("Give masks_queries_logits, or the embeddings that they are products of.")
        num_layers, batch_size, num_queries = class_queries_logits.shape[:3]
        if self.is_matching_fixed and num_queries != self.num_labels:
            raise ValueError(
                f"matching='fixed' gives every class its own query, but there are {num_queries} queries and "
                f"{self.num_labels} classes. Give as many queries, or set matching='bipartite'."
            )
        _check_num_items(num_items_in_batch)
        is_by_segment = self.point_sampling is None and prefers_small_chunks(class_queries_logits.device)
        targets = prepare_targets(
            mask_labels,
            class_labels,
            batch_size,
            size,
            class_queries_logits.device,
            is_by_segment,
            image_sizes,
        )
        num_masks, class_weight = self._normalisers(targets.labels, num_queries, num_items_in_batch)
        matches, starts = self.match(class_queries_logits, masks_queries_logits, targets, embeddings)
        pairs = matched_pairs(matches)
        device = class_queries_logits.device
        pairs_on_host = torch.tensor(pairs, dtype=torch.long, device="cpu").view(-1, 4)
        images, segments, layers, queries = pairs_on_host.to(device, non_blocking=True).T
        counts = [sum(len(layer_matches[image][0]) for layer_matches in matches) for image in range(batch_size)]
        if embeddings is not None:
            mask_logits = matched_mask_logits(embeddings[0][layers, images, queries], embeddings[1], counts)
        else:
            mask_logits = cast(Tensor, masks_queries_logits)[layers, images, queries]

        # Autocast would compute products in half precision, where areas overflow.
        with torch.autocast(class_queries_logits.device.type, enabled=False):
            cross_entropy = self.cross_entropies(
                class_queries_logits.float(), targets.labels, layers, images, queries, segments
            )
            cross_entropy = self.cross_entropy_weight * cross_entropy / class_weight
            needs_gradient = torch.is_grad_enabled() and mask_logits.requires_grad
            weights = self.mask_weight if needs_gradient else None, self.dice_weight
            if self.point_sampling is None:
                groups: Iterator[MasksOfSegment | MasksOfImage] = (
                    self.masks_of_segments(pairs, targets, starts)
                    if is_by_segment
                    else self.masks_of_images(counts, segments, targets)
                )
                focal, dice, gradient = dense_mask_losses(mask_logits, groups, targets.size, *weights)
            else:
                focal, dice, gradient = sampled_mask_losses(
                    mask_logits, self.point_sampling, counts, segments, targets, self.ignores_void, *weights
                )
            mask_loss = self.mask_weight * focal.sum() + self.dice_weight * dice.sum()
            loss = cross_entropy.sum() + WithGradient.apply(mask_logits, mask_loss, gradient) / num_masks

            mask_terms = torch.stack((self.mask_weight * focal, self.dice_weight * dice)) / num_masks
            mask_terms = mask_terms.new_zeros(2, num_layers).index_add_(1, layers, mask_terms)
            terms = torch.cat((cross_entropy.detach()[None], mask_terms))
        return loss, named_terms(terms)

    def _normalisers(self, labels: Tensor, num_queries: int, num_items: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalisers of this process's mask terms and class term; `num_items` as in `forward`."""
        # Gradients are averaged over processes, so the normalisers are averages too.
        num_averaged = num_processes()
        if num_items is None:
            num_items = count_items(labels, num_queries, self.no_object_weight)
            if torch.is_grad_enabled():
                num_items = sum_over_processes(num_items)
            else:  # a validation loss may be computed by one process alone, which must not wait for the others
                num_averaged = 1
        return num_items[0].clamp(min=1) / num_averaged, num_items[1] / num_averaged

    @torch.no_grad()
    def match(
        self,
        class_logits: Tensor,
        mask_logits: Tensor | None,
        targets: Targets,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[list[Match]], list[list[int]]]:
        """Assigns segments to queries, one to one, after every layer and in every image.

        Args:
            class_logits: (L, B, Q, K + 1).
            mask_logits: (L, B, Q, h, w), or None with `embeddings`, see `forward`.
            targets: The segments.
            embeddings: Of masks (L, B, Q, C) and pixels (B, C, h, w).

        Returns:
            For each layer and image the matched queries, and their segments; min(Q, N_i) each. And the targets'
            `starts`, copied to the host along the way.
        """
        facts = targets.starts, *host_check_tensors(targets)
        if self.is_matching_fixed:
            starts, *checks = copy_to_host(*facts)
            labels = checked_labels(targets, self.num_labels, *checks)
            matches = [_fixed_match(image, image_labels) for image, image_labels in enumerate(labels)]
            return [matches] * len(class_logits), starts.tolist()
        costs = self.matching_costs(class_logits, mask_logits, targets, embeddings)
        total = torch.stack(list(costs.values())).sum(0)
        is_finite = torch.stack([cost.isfinite().all() for cost in costs.values()])
        # Here, once per step, the host waits for the device; all work that could be queued has been.
        starts, *checks, host_costs, are_finite = copy_to_host(*facts, total, is_finite)
        num_segments = [len(labels) for labels in checked_labels(targets, self.num_labels, *checks)]
        terms = dict(zip(costs, are_finite.tolist(), strict=True))
        return assign(
            finite_costs(torch.from_numpy(host_costs), terms, self.reported_terms), num_segments
        ), starts.tolist()

    @torch.no_grad()
    def matching_costs(
        self,
        class_logits: Tensor,
        mask_logits: Tensor | None,
        targets: Targets,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Each weighted term of the cost of every query with every segment, (L, B, Q, N) float32."""
        num_queries, num_segments = class_logits.shape[2], targets.labels.shape[1]
        labels = targets.labels.clamp(0, self.num_labels - 1)  # columns past an image's labels are never used
        class_cost = (
            -class_logits.float()
            .softmax(-1)
            .gather(3, labels[None, :, None].expand(len(class_logits), -1, num_queries, -1))
        )
        focal_cost, dice_cost = class_cost.new_zeros(2, *class_cost.shape)
        low_size = cast(Tensor, mask_logits if embeddings is None else embeddings[1]).shape[-2:]
        pixels = pixels_at_stride(targets.size, low_size, class_logits.device)
        chosen = None if self.point_sampling is None else self.point_sampling.choose_pixels(pixels)
        if chosen is not None:
            pixels = pixels[chosen]
        for image, image_masks in enumerate(targets.masks):
            count = num_segments if image_masks.dim() == 2 else min(len(image_masks), num_segments)
            masks = masks_at(image_masks, torch.arange(count, device=pixels.device), pixels)
            left_out = ~are_owned(image_masks).flatten()[pixels] if self.ignores_void else None
            costs = []
            for logits in mask_logits_of_image(mask_logits, embeddings, image, chosen):
                # Autocast would compute the sums in half precision, where areas overflow.
                with torch.autocast(class_logits.device.type, enabled=False):
                    costs.append(torch.stack(pairwise_mask_costs(logits, masks, left_out)))
            focal_cost[:, image, :, :count], dice_cost[:, image, :, :count] = torch.cat(costs, 1).unflatten(
                1, (-1, num_queries)
            )
        return {
            "class cost": self.class_cost * class_cost,
            "mask cost": self.mask_cost * focal_cost,
            "dice cost": self.dice_cost * dice_cost,
        }

    def cross_entropies(
        self,
        class_logits: Tensor,
        labels: Tensor,
        layers: Tensor,
        images: Tensor,
        queries: Tensor,
        segments: Tensor,
    ) -> Tensor:
        """The weighted sum of the cross-entropies of each layer, (L,); a query without a match is "no object"."""
        classes = torch.full(class_logits.shape[:3], self.num_labels, device=class_logits.device)
        classes[layers, images, queries] = labels[images, segments]
        # From the configuration, not from the buffer: a checkpoint brings its own, and half precision rounds it.
        weights = class_logits.new_ones(self.num_labels + 1)
        weights[-1] = self.no_object_weight
        entropies = F.cross_entropy(class_logits.flatten(0, 2), classes.flatten(), weights, reduction="none")
        return entropies.view(len(class_logits), -1).sum(1)

    def masks_of_segments(
        self, pairs: list[tuple[int, int, int, int]], targets: Targets, starts: list[list[int]]
    ) -> Iterator[MasksOfSegment]:
        """The matched rows, sorted by image and segment, with the pixels of each segment, computed lazily."""
        stop = 0
        for image, pairs_of_image in groupby(pairs, key=lambda pair: pair[0]):
            void = void_pixels(targets, image, starts[image]) if self.ignores_void else None
            for segment, rows in groupby(pairs_of_image, key=lambda pair: pair[1]):
                start, stop = stop, stop + sum(1 for _ in rows)
                inside = pixels_of_segment(targets, image, segment, starts[image])
                yield MasksOfSegment(slice(start, stop), inside, void)

    def masks_of_images(self, counts: list[int], segments: Tensor, targets: Targets) -> Iterator[MasksOfImage]:
        """The matched rows, sorted by image, `counts[i]` of image i; the segment of each, (M,), is given."""
        for stop, count, masks in zip(accumulate(counts), counts, targets.masks, strict=True):
            counted = are_owned(masks).flatten() if self.ignores_void else None
            yield MasksOfImage(slice(stop - count, stop), segments, masks, counted)


def count_items(class_labels: Tensor | Sequence[Tensor], num_queries: int, no_object_weight: float) -> Tensor:
    """The normalisers of the losses: the number of masks and the sum of the class weights of all queries, (2,).

    Both are known before matching. For a batch in several parts, or on several processes, add up the parts' numbers.

    Args:
        class_labels: List of B tensors (N_i,), or (B, N) padded with -100.
        num_queries: Q.
        no_object_weight: Weight of a query without a segment; one with a segment weighs 1.
    """
    num_segments = torch.stack([labels.ne(NO_LABEL).sum() for labels in class_labels])
    matched = num_segments.clamp(max=num_queries)
    class_weight = matched + no_object_weight * (num_queries - matched)
    return torch.stack((num_segments.sum().float(), class_weight.sum().float()))


def matched_pairs(matches: list[list[Match]]) -> list[tuple[int, int, int, int]]:
    """(image, segment, layer, query) of each matched pair, grouped by segment: those of one share its pixels."""
    return sorted(
        (image, segment, layer, query)
        for layer, layer_matches in enumerate(matches)
        for image, image_matches in enumerate(layer_matches)
        for query, segment in zip(*image_matches, strict=True)
    )


def named_terms(terms: Tensor) -> dict[str, Tensor]:
    """The loss terms (3, L) by name: the last layer's without a suffix, those of earlier layers with their index."""
    suffixes = [*(f"_{layer}" for layer in range(terms.shape[1] - 1)), ""]
    return {
        f"{name}{suffix}": terms[row, layer]
        for layer, suffix in enumerate(suffixes)
        for row, name in enumerate(("loss_cross_entropy", "loss_mask", "loss_dice"))
    }


def _check_num_items(num_items: Any) -> None:
    # Only its shape: to check values, the host would wait for the device.
    if num_items is not None and (not isinstance(num_items, Tensor) or num_items.shape != (2,)):
        raise ValueError(
            f"num_items_in_batch is {num_items}, but must be a tensor of two numbers: what "
            "hf_maskformer.loss_maskformer.count_items returns for the whole batch."
        )


def sum_over_processes(numbers: Tensor) -> Tensor:
    if num_processes() > 1:
        torch.distributed.all_reduce(numbers)
    return numbers


def num_processes() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def _fixed_match(image: int, labels: list[int]) -> Match:
    """Query i for class i."""
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(
            f"Image {image} has several segments of the classes {repeated}, but with matching='fixed' each class has a "
            "single query. Give one mask per class (semantic targets), or set matching='bipartite'."
        )
    return labels, list(range(len(labels)))
