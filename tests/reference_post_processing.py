"""Slow, obvious post-processing of one image to compare with, and random images for it."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR_TIE = 1e-5  # far above what the order of float32 operations changes


@dataclass
class Case:
    """A random image and what the model says about it."""

    class_logits: Tensor  # (Q, K + 1)
    mask_logits: Tensor  # (Q, h, w)
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    target_size: tuple[int, int]

    def batch(self) -> tuple:
        """The arguments of the functions for batches."""
        sizes = torch.tensor([self.image_size]), torch.tensor([self.padded_size])
        return self.class_logits[None], self.mask_logits[None], *sizes


def random_case(seed: int) -> Case:
    """Smooth, saturated or noisy masks, masks of one pixel, nothing but "no object", half precision, other strides."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    queries, labels, height, width = pick(1, 8), pick(1, 5), pick(1, 12), pick(1, 12)
    padded = tuple(max(1, 4 * side - pick(0, 3) * pick(0, 1)) for side in (height, width))
    image = tuple(pick(max(1, side // 3), side) if pick(0, 1) else side for side in padded)
    target = tuple((side, pick(1, side), pick(side, 3 * side), pick(1, 100))[pick(0, 3)] for side in image)
    class_logits = torch.randn(queries, labels + 1, generator=generator) * pick(0, 8)
    masks = torch.randn(queries, height, width, generator=generator) * (0.3, 2, 8, 30)[pick(0, 3)]
    if pick(0, 2):
        coarse = torch.randn(1, queries, 3, 3, generator=generator) * (1, 5, 20)[pick(0, 2)]
        masks = F.interpolate(coarse, size=(height, width), mode="bilinear")[0] + 0.01 * masks
    kind = pick(0, 9)
    if kind == 0:
        class_logits[:, -1] += 30
    elif kind == 1:
        masks = masks - 30
        masks[:, pick(0, height - 1), pick(0, width - 1)] = 30 + torch.rand(queries, generator=generator)
    elif kind == 2:
        class_logits, masks = class_logits.bfloat16(), masks.half()
    elif kind == 3:
        masks = masks.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return Case(class_logits, masks, image, padded, target)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def image_logits(case: Case) -> Tensor:
    """Mask logits at the size of the image, (Q, H_i, W_i)."""
    return resize(case.mask_logits.float(), case.padded_size)[:, : case.image_size[0], : case.image_size[1]]


def semantic(case: Case, mode: str) -> Tensor:
    """Scores (K, H, W)."""
    labels = case.class_logits.float().softmax(-1)[:, :-1]
    if mode == "paper":
        return resize(torch.einsum("qk,qhw->khw", labels, image_logits(case).sigmoid()), case.target_size)
    if mode == "direct":
        return torch.einsum("qk,qhw->khw", labels, resize(image_logits(case), case.target_size).sigmoid())
    scores = torch.einsum("qk,qhw->khw", labels, case.mask_logits.float().sigmoid())
    return resample_covered_part(scores, case)


def resample_covered_part(scores: Tensor, case: Case) -> Tensor:
    """Bilinear resizing of that part of a grid that the image covers, which may end between two grid points."""
    for axis in (0, 1):
        grid, target = scores.shape[axis + 1], case.target_size[axis]
        covered = case.image_size[axis] * grid / case.padded_size[axis]
        last = -int(-covered // 1) - 1
        rows = []
        for position in range(target):
            source = min(max((position + 0.5) * covered / target - 0.5, 0), last)
            low = int(source)
            high = min(low + 1, last)
            lines = scores.select(axis + 1, low), scores.select(axis + 1, high)
            rows.append(lines[0] + (source - low) * (lines[1] - lines[0]))
        scores = torch.stack(rows, dim=axis + 1)
    return scores


@dataclass
class PanopticReference:
    segmentation: Tensor
    segments: list[tuple[int, int]]  # id and label
    is_clear: bool  # no pixel and no decision is a near tie


def panoptic(case: Case, threshold: float, mask_threshold: float, overlap: float, stuff: set[int]) -> PanopticReference:
    all_scores, all_labels = case.class_logits.float().softmax(-1).max(-1)
    probabilities = resize(image_logits(case), case.target_size).sigmoid()
    kept = [
        query
        for query, (score, label) in enumerate(zip(all_scores.tolist(), all_labels.tolist(), strict=True))
        if label != case.class_logits.shape[-1] - 1 and score > threshold
    ]
    segmentation = torch.zeros(case.target_size, dtype=torch.int32)
    segments: list[tuple[int, int]] = []
    if not kept:
        return PanopticReference(segmentation, segments, True)
    competing = torch.stack([all_scores[query] * probabilities[query] for query in kept])
    owner = competing.argmax(0)
    is_clear = bool((abs(probabilities - mask_threshold) > NEAR_TIE).all())
    if len(kept) > 1:
        best, second = competing.topk(2, dim=0).values
        is_clear &= bool((best - second > NEAR_TIE * best).all())
    for place, query in enumerate(kept):
        won = owner == place
        mask = probabilities[query] >= mask_threshold
        if won.sum() == 0 or mask.sum() == 0 or won.sum() / mask.sum() < overlap:
            continue
        label = int(all_labels[query])
        known = [number for number, its_label in segments if its_label == label and label in stuff]
        number = known[0] if known else len(segments) + 1
        if not known:
            segments.append((number, label))
        segmentation[won] = number
    return PanopticReference(segmentation, segments, is_clear)


@dataclass
class InstanceReference:
    masks: list[Tensor]
    labels: list[int]
    scores: list[float]
    is_clear: bool

    def id_map(self, target_size: tuple[int, int]) -> Tensor:
        ids = torch.zeros(target_size, dtype=torch.int32)
        for number in range(len(self.masks), 0, -1):
            ids[self.masks[number - 1]] = number
        return ids


def instances(case: Case, threshold: float, mask_threshold: float, top_k: int, min_area: int) -> InstanceReference:
    labels = case.class_logits.float().softmax(-1)[:, :-1]
    probabilities = resize(image_logits(case), case.target_size).sigmoid()
    candidates = [
        (labels[query, label].item(), query, label) for query in range(len(labels)) for label in range(labels.shape[1])
    ]
    candidates.sort(key=lambda candidate: -candidate[0])
    is_clear = bool((abs(probabilities - mask_threshold) > NEAR_TIE).all())
    if top_k < len(candidates):
        is_clear &= candidates[top_k - 1][0] - candidates[top_k][0] > NEAR_TIE
    found = []
    for score, query, label in candidates[:top_k]:
        mask = probabilities[query] >= mask_threshold
        if mask.sum() < max(1, min_area):
            continue
        score *= probabilities[query][mask].mean().item()
        is_clear &= abs(score - threshold) > NEAR_TIE
        if score >= threshold:
            found.append((score, label, mask))
    found.sort(key=lambda instance: -instance[0])
    scores = [score for score, _, _ in found]
    is_clear &= all(first - second > NEAR_TIE for first, second in itertools.pairwise(scores))
    return InstanceReference([mask for _, _, mask in found], [label for _, label, _ in found], scores, is_clear)
