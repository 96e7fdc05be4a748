"""Outputs of the models.

Letters: B images, Q queries, L decoder layers, K classes, D query width, C pixel feature width; H x W is the padded
image, h x w = H/4 x W/4.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class MaskFormerModelOutput(ModelOutput):
    """Output of `MaskFormerModel`.

    Args:
        encoder_last_hidden_state: (B, C_backbone, H/32, W/32), the backbone's last feature map.
        pixel_decoder_last_hidden_state: (B, C, h, w), the pixel embeddings.
        transformer_decoder_last_hidden_state: (B, Q, D), the queries after the last layer.
        encoder_hidden_states: The backbone's four feature maps, if requested.
        pixel_decoder_hidden_states: The pyramid at strides 16, 8 and 4, if requested.
        transformer_decoder_hidden_states: L + 1 tensors (B, Q, D), if requested: zeros, every layer's output but the
            last before the norm, and `transformer_decoder_last_hidden_state`.
        hidden_states: The three above in one tuple, if requested.
        attentions: L tensors (B, heads, Q, H/32 * W/32), if requested: the cross-attention weights.
        transformer_decoder_intermediate_states: (L, B, Q, D), every layer's output after the norm all layers share.
    """

    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    transformer_decoder_intermediate_states: Tensor | None = None


@dataclass
class MaskFormerForInstanceSegmentationOutput(ModelOutput):
    """Output of `MaskFormerForInstanceSegmentation`; the image processor's `post_process_*` methods take it.

    Args:
        loss: Sum of the weighted loss terms, if labels were given.
        class_queries_logits: (B, Q, K + 1); the last class is "no object".
        masks_queries_logits: (B, Q, h, w), before the sigmoid. Detached if labels were given: the loss has its own.
        auxiliary_logits: One dictionary with the two logits for each decoder layer but the last, if requested.
        encoder_last_hidden_state: This and all that follow up to `attentions` as in `MaskFormerModelOutput`. On a CPU
            the gradient of the loss may bypass the pixel embeddings: to see it, hook them in the model, not here.
        loss_dict: Every weighted loss term by name, detached, if labels were given: `loss_cross_entropy`,
            `loss_mask`, `loss_dice` for the last layer, the same with `_0`, `_1`, ... for the layers before it.
        image_sizes: (B, 2) int64, (height, width) of each image inside the padded batch, from `pixel_mask`.
        padded_sizes: (B, 2) int64, (H, W).
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    image_sizes: Tensor | None = None
    padded_sizes: Tensor | None = None
