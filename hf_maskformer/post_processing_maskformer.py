"""From logits to segmentations, in the order of the paper (section 3.4): pure functions of tensors.

B images, Q queries, K labels ("no object" comes last and is not counted). Mask logits live on an h x w grid that covers
the padded image (H_p, W_p); the image fills its top left corner (H_i, W_i), the rest is padding and is cropped before
anything is resized to the size asked for (H, W). Sizes are (height, width). The arithmetic is float32 for all logits.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


class ImageLogits(NamedTuple):
    """What the model says about one image, and the sizes that turn it into pixels of that image."""

    class_logits: Tensor  # (Q, K + 1)
    mask_logits: Tensor  # (Q, h, w)
    image_size: Size
    padded_size: Size
    target_size: Size


@torch.no_grad()
def semantic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    target_sizes: Sequence[Size] | None = None,
) -> list[Tensor]:
    """Gives each pixel the label with the highest score (see `semantic_scores`), one image at a time.

    Args:
        class_queries_logits: (B, Q, K + 1).
        masks_queries_logits: (B, Q, h, w).
        image_sizes: (B, 2) integers, the size of each image inside the padded batch.
        padded_sizes: (B, 2) integers, the size of the padded batch.
        target_sizes: the size of each result; without it, results have their image's size.

    Returns:
        One (H, W) int64 map of labels per image.

    Raises:
        ValueError: target_sizes does not hold one positive (height, width) for each image.
    """
    images = _split_batch(class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes)
    return [semantic_scores(*image).argmax(dim=0) for image in images]


def semantic_scores(
    class_logits: Tensor, mask_logits: Tensor, image_size: Size, padded_size: Size, target_size: Size | None = None
) -> Tensor:
    """Scores every label at every pixel of one image: the sum over queries of P(label) x P(pixel in mask).

    The scores are not probabilities: they sum to more than 1 where masks overlap and to less where none is. They are
    computed at the padded size and only then resized, since a sum of resized sigmoids is not a resized sum.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        image_size, padded_size: as in `semantic_segmentation`, for this image.
        target_size: the size of the result; without it, image_size.

    Returns:
        (K, H, W) float32.
    """
    # Autocast would take the sum over queries to half precision.
    with torch.autocast(mask_logits.device.type, enabled=False):
        label_probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
        mask_probabilities = _image_mask_logits(mask_logits, image_size, padded_size).sigmoid()
        scores = torch.einsum("qk,qhw->khw", label_probabilities, mask_probabilities)
    return _resize(scores, target_size or image_size)


@torch.no_grad()
def per_pixel_segmentation(
    logits: Tensor, image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None = None
) -> list[Tensor]:
    """Gives each pixel the class with the highest logit, for models that classify pixels (section 4.2).

    Args:
        logits: (B, K, h, w).
        image_sizes, padded_sizes, target_sizes: as in `semantic_segmentation`.

    Returns:
        One (H, W) int64 map of labels per image.

    Raises:
        ValueError: target_sizes does not hold one positive (height, width) for each image.
    """
    images = _split_batch(logits, logits, image_sizes, padded_sizes, target_sizes)
    label_maps = []
    for image in images:
        height, width = image.image_size
        enlarged = enlarge_per_pixel_logits(image.mask_logits[None])[0, :, :height, :width]
        label_maps.append(_resize(enlarged, image.target_size).argmax(dim=0))
    return label_maps


def enlarge_per_pixel_logits(logits: Tensor) -> Tensor:
    """Enlarges (B, K, h, w) four times, to float32: the size of the input, or up to 3 pixels more, as in the original.

    Unlike MaskFormer's masks, which are brought to exactly the size of the input.
    """
    return F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)


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
    """Gives each pixel to at most one segment.

    A query is kept if its most probable label is not "no object" and is more probable than `threshold`. Each pixel goes
    to the kept query with the highest P(label) x P(pixel in mask). A query becomes a segment if the pixels it won make
    up at least `overlap_mask_area_threshold` of the pixels of its own mask, those where P(pixel in mask) alone reaches
    `mask_threshold`. The pixels that the other queries won stay void.

    Args:
        class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes: as in
            `semantic_segmentation`.
        threshold: probability that the label of a kept query must exceed.
        mask_threshold: probability from which on a pixel counts as part of a query's own mask.
        overlap_mask_area_threshold: smallest part of its own mask that a query must win.
        label_ids_to_fuse: labels of uncountable stuff, such as sky: their queries form one segment per label.

    Returns:
        One dictionary per image:

        - `segmentation`: (H, W) int32, the id of the segment that owns each pixel. 0 is void, also when there is no
          segment at all.
        - `segments_info`: a list with one entry per segment, in the order of their ids: `id` (1, 2, ... without gaps),
          `label_id`, `was_fused` (the label is one of `label_ids_to_fuse`) and `score`, the probability of the label
          averaged over the pixels of the segment. For a segment of one query this is that query's probability; in a
          fused segment each query counts with the pixels it brought.

    Raises:
        ValueError: target_sizes does not hold one positive (height, width) for each image.
    """
    images = _split_batch(class_queries_logits, masks_queries_logits, image_sizes, padded_sizes, target_sizes)
    return [
        _panoptic_segments(image, threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse)
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
        void = torch.zeros(image.target_size, dtype=torch.int32, device=image.mask_logits.device)
        return {"segmentation": void, "segments_info": []}

    # Unlike semantic scores, the logits themselves are resized: the border of a segment is sharp at the target size.
    mask_logits = _image_mask_logits(image.mask_logits[is_kept], image.image_size, image.padded_size)
    probabilities = _resize(mask_logits, image.target_size).sigmoid()
    mask_areas = (probabilities >= mask_threshold).flatten(1).sum(dim=1)
    owners = probabilities.mul_(scores[:, None, None]).argmax(dim=0)
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


def _number_segments(
    queries: list[_KeptQuery], overlap_mask_area_threshold: float, label_ids_to_fuse: Collection[int]
) -> list[int]:
    """Gives the id of the segment that each query belongs to, 0 for none."""
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


def _split_batch(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    image_sizes: Tensor,
    padded_sizes: Tensor,
    target_sizes: Sequence[Size] | None,
) -> Iterator[ImageLogits]:
    """Checks the target sizes and gives the images one by one."""
    image_size_list = [(height, width) for height, width in image_sizes.tolist()]
    padded_size_list = [(height, width) for height, width in padded_sizes.tolist()]
    targets = image_size_list
    if target_sizes is not None:
        targets = [(int(height), int(width)) for height, width in target_sizes]
    if len(targets) != len(image_size_list):
        raise ValueError(
            f"target_sizes has {len(targets)} entries, but the batch has {len(image_size_list)} images; "
            "give one (height, width) for each image."
        )
    for index, (height, width) in enumerate(targets):
        if height < 1 or width < 1:
            raise ValueError(f"target_sizes[{index}] is ({height}, {width}); height and width must be positive.")
    rows = zip(class_queries_logits, masks_queries_logits, image_size_list, padded_size_list, targets, strict=True)
    return (ImageLogits(*row) for row in rows)


def _image_mask_logits(mask_logits: Tensor, image_size: Size, padded_size: Size) -> Tensor:
    """Upsamples mask logits (Q, h, w) to the padded size and cuts the padding off: (Q, H_i, W_i) float32."""
    return _resize(mask_logits.float(), padded_size)[:, : image_size[0], : image_size[1]]


def _resize(maps: Tensor, size: Size) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
