"""From logits to segmentations, in the order of the paper (section 3.4): pure functions of tensors.

B images, Q queries, K labels ("no object" comes last and is not counted). Mask logits live on an h x w grid that covers
the padded image (H_p, W_p); the image fills its top left corner (H_i, W_i), the rest is padding and is cropped before
anything is resized to the requested size (H, W). Sizes are (height, width). The arithmetic is float32 for all logits.
Nothing of size Q x H x W or K x H x W is held unless requested: see `TiledMasks`.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .post_processing_maskformer_inputs import (
    ImageLogits,
    ImageSizes,
    Size,
    check_thresholds,
    checked_label_ids,
    split_batch,
)
from .post_processing_maskformer_tiles import TILE, Mode, TiledMasks

# Labels that reach this fraction of the best score anywhere in a tile are tried first; others only where these are
# weak.
_STRONG = 0.1


@torch.no_grad()
def semantic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    target_sizes: Sequence[Size] | None = None,
    mode: Mode = "paper",
) -> list[Tensor]:
    """Assigns each pixel the label with the highest score (see `semantic_scores`), one image at a time.

    Args:
        class_queries_logits: (B, Q, K + 1).
        masks_queries_logits: (B, Q, h, w).
        image_sizes: (B, 2) integers, the size of each image inside the padded batch.
        padded_sizes: (B, 2) integers, the size of the padded batch.
        target_sizes: the size of each result; without it, results have their image's size.
        mode: as in `semantic_scores`.

    Returns:
        One (H, W) int64 map of labels per image.

    Raises:
        ValueError: see `split_batch`.
    """
    images = split_batch(class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes)
    # Autocast would compute the sums over queries in half precision.
    with torch.autocast(masks_queries_logits.device.type, enabled=False):
        return [_label_map(image, mode) for image in images]


@torch.no_grad()
def semantic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    image_size: Size,
    padded_size: Size,
    target_size: Size | None = None,
    mode: Mode = "paper",
) -> Tensor:
    """Scores every label at every pixel of one image: the sum over queries of P(label) x P(pixel in mask).

    The scores are not probabilities: they sum to more than 1 where masks overlap and to less where none is.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        image_size, padded_size: as in `semantic_segmentation`, for this image.
        target_size: the size of the result; without it, image_size.
        mode: what is resized bilinearly to the target. `"paper"` resizes scores of the padded input's size, as the
            original does for semantic models; `"direct"` resizes mask logits, as it does in panoptic models, which
            gives sharper borders; `"fast"` resizes scores of the mask logits' own size, as transformers does.

    Returns:
        (K, H, W) float32.
    """
    with torch.autocast(mask_logits.device.type, enabled=False):
        probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
        masks = TiledMasks(mask_logits, ImageSizes(image_size, padded_size, target_size or image_size), mode)
        num_rows, num_columns = masks.areas().shape
        canvas = mask_logits.new_zeros(
            probabilities.shape[1], num_rows, TILE, num_columns, TILE, dtype=probabilities.dtype
        )
        places = (torch.arange(count, device=mask_logits.device) for count in (num_rows, num_columns))
        every_tile = torch.cartesian_prod(*places)
        for tiles in masks.chunks(every_tile, max(probabilities.shape)):
            scores = masks.at_pixels(masks.resized_logits(tiles).sigmoid() @ probabilities, tiles)
            canvas[:, tiles[:, 0], :, tiles[:, 1]] = scores.permute(0, 3, 1, 2)
        return masks.crop(canvas)


def _label_map(image: ImageLogits, mode: Mode) -> Tensor:
    """The label with the highest score at each pixel, (H, W) int64."""
    probabilities = image.class_logits.float().softmax(dim=-1)[:, :-1]
    masks = TiledMasks(image.mask_logits, image.sizes, mode)
    # Scores grow with every mask logit, so bounds of logits give bounds of scores.
    lowest, highest = (bound.sigmoid() @ probabilities for bound in masks.bounds())
    surest, winner = lowest.max(dim=-1)
    is_decided = (highest >= surest[..., None]).sum(dim=-1) == 1
    undecided = (~is_decided).nonzero()
    labels = [winner.new_zeros(0, TILE, TILE)]
    for tiles in masks.chunks(undecided, max(probabilities.shape)):
        labels.append(_labels_of_tiles(masks, tiles, probabilities, highest[tiles[:, 0], tiles[:, 1]]))
    return masks.paste(winner, undecided, torch.cat(labels))


def _labels_of_tiles(masks: TiledMasks, tiles: Tensor, probabilities: Tensor, highest: Tensor) -> Tensor:
    """The labels of the pixels of tiles, (n, T, T), from the highest score (n, K) of each label in each tile."""
    mask_probabilities = masks.resized_logits(tiles).sigmoid()
    is_strong = (highest >= _STRONG * highest.amax(dim=-1, keepdim=True)).any(dim=0)
    strong = is_strong.nonzero().flatten()
    scores, winners = masks.at_pixels(mask_probabilities @ probabilities[:, strong], tiles).max(dim=-1)
    labels = strong[winners]
    # In a tile where another label could beat the winner of some pixel, all labels are compared.
    is_open = highest.masked_fill(is_strong, -1).amax(dim=-1) >= scores.amin(dim=(1, 2))
    if is_open.any():
        labels[is_open] = masks.at_pixels(mask_probabilities[is_open] @ probabilities, tiles[is_open]).argmax(dim=-1)
    return labels


@torch.no_grad()
def panoptic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
    target_sizes: Sequence[Size] | None = None,
) -> list[dict[str, Any]]:
    """Assigns each pixel to at most one segment.

    A query is kept if its most probable label is not "no object" and is more probable than `threshold`. Each pixel goes
    to the kept query with the highest P(label) x P(pixel in mask). A query becomes a segment if the pixels it won make
    up at least `overlap_mask_area_threshold` of the pixels of its own mask, those where P(pixel in mask) alone reaches
    `mask_threshold`. The pixels that the other queries won stay void.

    Args:
        class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes: as in
            `semantic_segmentation`.
        threshold: probability that the label of a kept query must exceed.
        mask_threshold: lowest probability of a pixel in a query's own mask.
        overlap_mask_area_threshold: smallest fraction of its own mask that a query must win.
        label_ids_to_fuse: labels of stuff classes, such as sky: their queries form one segment per label.

    Returns:
        One dictionary per image:

        - `segmentation`: (H, W) int32, the id of the segment that owns each pixel. 0 is void, also when there is no
          segment at all.
        - `segments_info`: a list with one entry per segment, in the order of their ids: `id` (1, 2, ... without gaps),
          `label_id`, `was_fused` (the label is one of `label_ids_to_fuse`) and `score`, the probability of the label
          averaged over the pixels of the segment. For a segment of one query this is that query's probability; in a
          fused segment each query counts with the pixels it brought.

    Raises:
        ValueError: a threshold is not a number from 0 to 1, or a label id not an integer; see also `split_batch`.
    """
    labels_to_fuse = checked_label_ids(label_ids_to_fuse)
    check_thresholds(
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap_mask_area_threshold,
    )
    images = split_batch(class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes)
    with torch.autocast(masks_queries_logits.device.type, enabled=False):
        return [
            _panoptic_segments(image, threshold, mask_threshold, overlap_mask_area_threshold, labels_to_fuse)
            for image in images
        ]


class _KeptQuery(NamedTuple):
    score: float
    label_id: int
    won_area: int  # pixels that no other query claims more strongly
    mask_area: int  # pixels of its own mask

    def is_segment(self, overlap_mask_area_threshold: float) -> bool:
        # Where all probabilities are low, a query wins pixels outside its own mask, even without having one.
        if self.won_area == 0 or self.mask_area == 0:
            return False
        return self.won_area / self.mask_area >= overlap_mask_area_threshold


def _panoptic_segments(
    image: ImageLogits,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    label_ids_to_fuse: Collection[int],
) -> dict[str, Any]:
    scores, labels = image.class_logits.float().softmax(dim=-1).max(dim=-1)
    is_kept = (labels != image.class_logits.shape[-1] - 1) & (scores > threshold)
    scores, labels = scores[is_kept], labels[is_kept]
    if len(scores) == 0:
        void = torch.zeros(image.sizes.target, dtype=torch.int32, device=image.mask_logits.device)
        return {"segmentation": void, "segments_info": []}

    owners, mask_areas = _compete(image.mask_logits[is_kept], image.sizes, scores, mask_threshold)
    won_areas = torch.bincount(owners.flatten(), minlength=len(scores))

    # One copy to the host for all queries, instead of one for each number of each query.
    integers = torch.stack([labels, won_areas, mask_areas], dim=1).tolist()
    queries = [_KeptQuery(score, *row) for score, row in zip(scores.tolist(), integers, strict=True)]
    segment_ids = _number_segments(queries, overlap_mask_area_threshold, label_ids_to_fuse)
    id_of_query = torch.tensor(segment_ids, dtype=torch.int32, device=owners.device)
    return {
        "segmentation": id_of_query[owners],
        "segments_info": _describe_segments(queries, segment_ids, label_ids_to_fuse),
    }


def _compete(mask_logits: Tensor, sizes: ImageSizes, scores: Tensor, mask_threshold: float) -> tuple[Tensor, Tensor]:
    """Which of the kept queries wins each pixel, (H, W) int64, and how many pixels its own mask has, (Q,) int64."""
    # Unlike semantic scores, the logits themselves are resized: the border of a segment is sharp at the target size.
    masks = TiledMasks(mask_logits, sizes, "direct")
    lowest, highest = (bound.sigmoid() for bound in masks.bounds())
    surest, winners = (lowest * scores).max(dim=-1)
    is_rival = highest * scores >= surest[..., None]
    is_in_mask = lowest >= mask_threshold
    has_border = ~is_in_mask & (highest >= mask_threshold)
    mask_areas = (is_in_mask * masks.areas()[..., None]).sum(dim=(0, 1))

    undecided = ((is_rival.sum(dim=-1) > 1) | has_border.any(dim=-1)).nonzero()
    owners = [winners.new_zeros(0, TILE, TILE)]
    for tiles in masks.chunks(undecided, len(scores)):
        places = tiles[:, 0] * winners.shape[1] + tiles[:, 1]
        borders = has_border.flatten(0, 1).index_select(0, places)
        # Most queries do not matter in a part of the image.
        has_say = is_rival.flatten(0, 1).index_select(0, places) | borders
        queries = has_say.any(dim=0).nonzero().flatten()
        probabilities = masks.resized_logits_by_query(tiles, queries).sigmoid_()
        # Comparisons that return numbers are several times as fast as those that return bools.
        is_in_mask = torch.ge(probabilities, mask_threshold, out=torch.empty_like(probabilities))
        masks.clear_outside(is_in_mask, tiles)
        found_areas = is_in_mask.flatten(2).sum(dim=2).long()
        mask_areas.index_add_(0, queries, (found_areas * borders.index_select(1, queries)).sum(dim=0))
        owners.append(queries[_first_of_largest(probabilities.mul_(scores[queries, None, None]))])
    return masks.paste(winners, undecided, torch.cat(owners)), mask_areas


def _first_of_largest(values: Tensor) -> Tensor:
    """`argmax` over the second dimension of values (n, q, ...), which are overwritten: far faster than that."""
    num_values = values.shape[1]
    ranks = torch.arange(num_values, 0, -1, dtype=values.dtype, device=values.device)
    is_largest = values.eq_(values.amax(dim=1, keepdim=True))
    return num_values - is_largest.mul_(ranks.view(-1, *[1] * (values.ndim - 2))).amax(dim=1).long()


def _number_segments(
    queries: list[_KeptQuery], overlap_mask_area_threshold: float, label_ids_to_fuse: Collection[int]
) -> list[int]:
    """Returns the id of the segment that each query belongs to, 0 for none."""
    segment_ids = []
    num_segments = 0
    id_of_fused_label: dict[int, int] = {}
    for query in queries:
        if not query.is_segment(overlap_mask_area_threshold):
            segment_ids.append(0)
        elif query.label_id in id_of_fused_label:
            segment_ids.append(id_of_fused_label[query.label_id])
        else:
            num_segments += 1
            segment_ids.append(num_segments)
            if query.label_id in label_ids_to_fuse:
                id_of_fused_label[query.label_id] = num_segments
    return segment_ids


def _describe_segments(
    queries: list[_KeptQuery], segment_ids: list[int], label_ids_to_fuse: Collection[int]
) -> list[dict[str, Any]]:
    segments_info = []
    for segment_id in range(1, max(segment_ids) + 1):
        members = [query for query, its_id in zip(queries, segment_ids, strict=True) if its_id == segment_id]
        label_id = members[0].label_id
        score = sum(query.score * query.won_area for query in members) / sum(query.won_area for query in members)
        was_fused = label_id in label_ids_to_fuse
        segments_info.append({"id": segment_id, "label_id": label_id, "was_fused": was_fused, "score": score})
    return segments_info
