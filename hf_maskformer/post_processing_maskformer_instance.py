"""From logits to instances, which may overlap. Letters and sizes as in `post_processing_maskformer`.

N instances. A mask is a small part of the image, so it is stored as the tiles that it touches, n of T x T pixels in
all.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .post_processing_maskformer_inputs import ImageLogits, Size, check_thresholds, split_batch
from .post_processing_maskformer_rle import encode_tiles
from .post_processing_maskformer_tiles import TILE, TiledMasks

Form = Literal["id_map", "masks", "rle"]


@torch.no_grad()
def instance_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float | None = None,
    target_sizes: Sequence[Size] | None = None,
    form: Form = "id_map",
    top_k: int | None = None,
    min_area: int = 1,
) -> list[dict[str, Any]]:
    """Finds instances, which may overlap, in descending order of score.

    Every label of every query is a candidate; the `top_k` most probable are considered. The mask of an instance
    consists of the pixels where P(pixel in mask), of mask logits resized to the target, reaches `mask_threshold`. Its
    score is P(label) x the mean of P(pixel in mask) over the mask.

    Args:
        class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes: as in
            `semantic_segmentation`.
        threshold: lowest score of an instance.
        mask_threshold: lowest probability of a pixel in the mask.
        overlap_mask_area_threshold: in an id map, the smallest fraction of its mask that must stay visible under
            instances with higher scores; pixels of those dropped become void. None keeps all.
        form: of `segmentation`, see below.
        top_k: number of candidates, by default that of queries.
        min_area: minimum number of pixels of a mask. One without pixels is never an instance.

    Returns:
        One dictionary per image:

        - `segmentation`: as `"id_map"`, (H, W) int32 with the id of the highest-scoring instance at each pixel and 0
          for void; as `"masks"`, (N, H, W) bool; as `"rle"`, N dictionaries in the run-length encoding of COCO, as
          pycocotools takes them: `size`, [H, W], and `counts`, a string.
        - `segments_info`: a list with one entry per instance, in descending order of score: `id` (1, 2, ...),
          `label_id`, `was_fused` (False) and `score`.

    Raises:
        ValueError: top_k is not a whole number of at least 1, a threshold is not a number from 0 to 1, or the form is
            unknown; see also `split_batch`.
    """
    check_thresholds(threshold=threshold, mask_threshold=mask_threshold)
    if overlap_mask_area_threshold is not None:
        check_thresholds(overlap_mask_area_threshold=overlap_mask_area_threshold)
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; give one of {', '.join(get_args(Form))}.")
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(
            f"top_k is {top_k!r}; give a whole number of at least 1, or None for as many candidates as queries."
        )
    images = split_batch(class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes)
    results: list[dict[str, Any]] = []
    for image in images:
        with torch.autocast(masks_queries_logits.device.type, enabled=False):
            instances = _find_instances(image, threshold, mask_threshold, top_k, max(1, min_area))
        segmentation: Any
        if form == "id_map":
            segmentation, is_kept = _id_map(instances, overlap_mask_area_threshold)
        else:
            is_kept = torch.ones_like(instances.scores, dtype=torch.bool)
            segmentation = instances.run_lengths() if form == "rle" else instances.masks()
        labels, scores = instances.labels[is_kept].tolist(), instances.scores[is_kept].tolist()
        segments_info = [
            {"id": number, "label_id": label, "was_fused": False, "score": score}
            for number, (label, score) in enumerate(zip(labels, scores, strict=True), start=1)
        ]
        results.append({"segmentation": segmentation, "segments_info": segments_info})
    return results


class _Instances(NamedTuple):
    """The instances of one image, in descending order of score, and the tiles that their masks touch.

    Several labels of one query are several instances of one mask, whose tiles are stored once. There are M masks, in
    the order of the highest-scoring instance of each.
    """

    tiling: TiledMasks
    scores: Tensor  # (N,)
    labels: Tensor  # (N,) int64
    areas: Tensor  # (N,) int64, in pixels
    masks_of_instances: Tensor  # (N,) int64: which mask an instance has
    surest: Tensor  # (M,) int64: the highest-scoring instance of a mask
    masks_of_tiles: Tensor  # (n,) int64: to which mask a tile belongs
    tiles: Tensor  # (n, 2) int64: its row and column
    pixels: Tensor  # (n, T, T) bool: which of its pixels belong to the mask

    def masks(self) -> Tensor:
        """(N, H, W) bool."""
        masks = self.tiling.spread(len(self.surest), self.masks_of_tiles, self.tiles, self.pixels)
        return masks if len(self.surest) == len(self.scores) else masks[self.masks_of_instances]

    def run_lengths(self) -> list[dict[str, Any]]:
        """N dictionaries as pycocotools takes them: `size`, [H, W], and `counts`, a string."""
        size = self.tiling.target_size
        counts = encode_tiles(len(self.surest), self.masks_of_tiles, self.tiles, self.pixels, size)
        return [{"size": list(size), "counts": counts[mask]} for mask in self.masks_of_instances.tolist()]

    def owners(self) -> Tensor:
        """The number of the highest-scoring instance at each pixel, N where there is none, (H, W) int32."""
        num_rows, num_columns = self.tiling.areas().shape
        nobody = len(self.scores)
        # The other instances of a mask lie below its highest-scoring one.
        claims = torch.where(self.pixels, self.surest.int()[self.masks_of_tiles, None, None], nobody).flatten(1)
        canvas = claims.new_full((num_rows * num_columns, TILE**2), nobody)
        places = self.tiles[:, 0] * num_columns + self.tiles[:, 1]
        canvas.scatter_reduce_(0, places[:, None].expand_as(claims), claims, "amin")
        return self.tiling.crop(canvas.view(num_rows, num_columns, TILE, TILE).transpose(1, 2))


def _find_instances(
    image: ImageLogits, threshold: float, mask_threshold: float, top_k: int | None, min_area: int
) -> _Instances:
    probabilities = image.class_logits.float().softmax(dim=-1)[:, :-1]
    num_queries, num_labels = probabilities.shape
    top_k = min(num_queries if top_k is None else top_k, probabilities.numel())
    scores, candidates = probabilities.flatten().topk(top_k)
    # A mean probability is at most 1, so what is already below the threshold stays there.
    candidates, scores = candidates[scores >= threshold], scores[scores >= threshold]
    queries, mask_of_candidate = (candidates // num_labels).unique(return_inverse=True)
    tiling = TiledMasks(image.mask_logits[queries], image.sizes, "direct")

    _, highest = tiling.bounds()
    touched = (highest.sigmoid() >= mask_threshold).nonzero()
    # For each tile separately: accumulating thousands one by one would lose the fourth digit in a large image.
    areas, sums = queries.new_zeros(len(queries)), torch.zeros_like(highest, dtype=scores.dtype)
    pixels = [areas.new_zeros(0, TILE, TILE, dtype=torch.bool)]
    for chunk in tiling.chunks(touched, 1):
        tiles, owners = chunk[:, :2], chunk[:, 2]
        mask_probabilities = tiling.resized_logits_of(owners, tiles).sigmoid_()
        is_in_mask = mask_probabilities >= mask_threshold
        tiling.clear_outside(is_in_mask[:, None], tiles)
        areas.index_add_(0, owners, is_in_mask.sum(dim=(1, 2)))
        sums[chunk.unbind(1)] = mask_probabilities.mul_(is_in_mask).sum(dim=(1, 2))
        pixels.append(is_in_mask)

    scores = scores * (sums.sum(dim=(0, 1)) / areas.clamp(min=1))[mask_of_candidate]
    is_found = (scores >= threshold) & (areas[mask_of_candidate] >= min_area)
    order = scores.masked_fill(~is_found, -1).argsort(descending=True, stable=True)[: int(is_found.sum())]
    masks_of_instances = mask_of_candidate[order]
    no_instance = torch.full_like(queries, len(order))
    numbers = torch.arange(len(order), device=order.device)
    surest, masks = no_instance.scatter_reduce(0, masks_of_instances, numbers, "amin").sort()
    surest = surest[surest < len(order)]
    number_of_mask = masks.argsort()
    masks_of_tiles = number_of_mask[touched[:, 2]]
    # Masks without an instance come last.
    found_tiles = (masks_of_tiles < len(surest)).nonzero().flatten()
    return _Instances(
        tiling,
        scores[order],
        (candidates % num_labels)[order],
        areas[masks_of_instances],
        number_of_mask[masks_of_instances],
        surest,
        masks_of_tiles[found_tiles],
        touched[found_tiles, :2],
        torch.cat(pixels).index_select(0, found_tiles),
    )


def _id_map(instances: _Instances, overlap_mask_area_threshold: float | None) -> tuple[Tensor, Tensor]:
    """Ids from 1 of the instances that are visible enough, (H, W) int32, and which these are, (N,) bool."""
    owners = instances.owners()
    num_instances = len(instances.scores)
    is_kept = torch.ones(num_instances, dtype=torch.bool, device=owners.device)
    if overlap_mask_area_threshold is not None:
        visible = torch.bincount(owners.flatten(), minlength=num_instances + 1)[:num_instances]
        is_kept = visible >= overlap_mask_area_threshold * instances.areas
    id_of_owner = torch.cat([is_kept.cumsum(0) * is_kept, is_kept.new_zeros(1, dtype=torch.int64)])
    return id_of_owner.int()[owners], is_kept
