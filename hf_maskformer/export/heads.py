"""What an exported graph computes: the logits, or with post-processing inside, tensors whose shapes the input fixes.

B images without padding, of H x W pixels; Q queries, K labels; h x w the grid of the mask logits. The graphs have no
branch on values, so they hold Q x H x W numbers per image, which `post_processing_maskformer` avoids.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling_maskformer import MaskFormerForInstanceSegmentation
from ..modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation
from ..post_processing_maskformer_inputs import Size
from ..post_processing_per_pixel_baseline import upsample_per_pixel_logits


class Logits(nn.Module):
    """Pixel values (B, 3, H, W) to class logits (B, Q, K + 1) and mask logits (B, Q, h, w)."""

    output_names: tuple[str, ...] = ("class_queries_logits", "masks_queries_logits")

    def __init__(self, model: MaskFormerForInstanceSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values, return_dict=True)
        return outputs.class_queries_logits, outputs.masks_queries_logits


class PerPixelLogits(nn.Module):
    """Pixel values (B, 3, H, W) to logits (B, K, h, w) of a per-pixel baseline."""

    output_names: tuple[str, ...] = ("logits",)

    def __init__(self, model: PerPixelBaselineForSemanticSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.model(pixel_values, return_dict=True).logits,)


class Semantic(nn.Module):
    """Pixel values (B, 3, H, W) to the label of each pixel, (B, H, W) int64, in the order of the paper.

    Args:
        logits: A `Logits` or `PerPixelLogits`.
        output_size: (height, width) that the scores are resized to; by default they keep the size of the input.
    """

    output_names: tuple[str, ...] = ("labels",)

    def __init__(self, logits: Logits | PerPixelLogits, output_size: Size | None = None) -> None:
        super().__init__()
        self.logits = logits
        self.output_size = output_size

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        height, width = pixel_values.shape[-2:]
        if isinstance(self.logits, PerPixelLogits):
            scores = upsample_per_pixel_logits(*self.logits(pixel_values))[..., :height, :width]
        else:
            class_logits, mask_logits = self.logits(pixel_values)
            probabilities = class_logits.float().softmax(-1)[..., :-1]
            masks = sigmoid(resize(mask_logits.float(), (height, width)))
            scores = torch.einsum("bqk,bqhw->bkhw", probabilities, masks)
        if self.output_size is not None:
            scores = resize(scores, self.output_size)
        return (scores.argmax(1),)


class Panoptic(nn.Module):
    """Pixel values (B, 3, H, W) to segments, as `panoptic_segmentation` returns them.

    Args:
        logits: A `Logits`.
        threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse: As in `panoptic_segmentation`; fixed
            in the graph.
        output_size: (height, width) that the mask logits are resized to, from the size of the input, which they keep by
            default.

    Shapes of what it returns:
        segmentation: (B, H, W) int32, the id of the segment that owns each pixel, 0 for void.
        segment_ids: (B, Q) int32, the id of the segment of each query, 0 for none; those of one fused segment share it.
        labels: (B, Q) int64, the most probable label of each query, K for "no object".
        scores: (B, Q) float32, its probability.
    """

    is_fused: Tensor
    output_names: tuple[str, ...] = ("segmentation", "segment_ids", "labels", "scores")

    def __init__(
        self,
        logits: Logits,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] = (),
        output_size: Size | None = None,
    ) -> None:
        super().__init__()
        self.logits = logits
        self.threshold = threshold
        self.mask_threshold = mask_threshold
        self.overlap_mask_area_threshold = overlap_mask_area_threshold
        self.output_size = output_size
        labels = torch.arange(logits.model.class_predictor.out_features)
        # As there, ids that are not labels of the model have no effect.
        self.register_buffer("is_fused", torch.isin(labels, torch.tensor([*label_ids_to_fuse], dtype=torch.long)))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        class_logits, mask_logits = self.logits(pixel_values)
        scores, labels = class_logits.float().softmax(-1).max(-1)
        is_kept = (labels != class_logits.shape[-1] - 1) & (scores > self.threshold)
        masks = resize(mask_logits.float(), pixel_values.shape[-2:])
        if self.output_size is not None:
            masks = resize(masks, self.output_size)
        masks = sigmoid(masks)
        # No query that is left out wins a pixel of one that is kept.
        claims = torch.where(is_kept[..., None, None], scores[..., None, None] * masks, -1.0)
        owners = claims.argmax(1)  # (B, H, W)
        queries = torch.arange(mask_logits.shape[1], device=owners.device)
        won_areas = (owners[:, None] == queries[:, None, None]).flatten(2).sum(-1)
        mask_areas = (masks >= self.mask_threshold).flatten(2).sum(-1)
        overlap = won_areas / mask_areas.clamp(min=1)
        is_segment = is_kept & (won_areas > 0) & (mask_areas > 0) & (overlap >= self.overlap_mask_area_threshold)
        segment_ids = self._number_segments(is_segment, labels, queries)
        segmentation = segment_ids.gather(1, owners.flatten(1)).view_as(owners)
        return segmentation.int(), segment_ids.int(), labels, scores

    def _number_segments(self, is_segment: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Ids from 1 in the order of the queries, (B, Q); queries of a fused label share the id of the first."""
        is_alike = (labels[:, :, None] == labels[:, None, :]) & self.is_fused[labels][:, :, None]
        is_alike = (is_alike & is_segment[:, None, :]) | (queries[:, None] == queries)
        first = torch.where(is_alike, queries, queries.shape[0]).amin(-1)
        numbers = (is_segment & (first == queries)).long().cumsum(-1)
        return numbers.gather(1, first) * is_segment


def resize(logits: Tensor, size: Size | torch.Size) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def sigmoid(logits: Tensor) -> Tensor:
    """ONNX Runtime's own loses digits below -11, and all at -18, which decide who wins pixels that no query claims."""
    small = (-logits.abs()).exp()
    return torch.where(logits >= 0, 1.0, small) / (1.0 + small)
