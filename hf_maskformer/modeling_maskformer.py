"""MaskFormer (arXiv 2107.06278), the paper's figure 2: backbone, pixel decoder, transformer decoder, two heads.

Letters: B images, Q queries, L decoder layers, K classes, N segments in one image, D query width, C pixel feature
width; H x W is the padded image, h x w = H/4 x W/4.
"""

import torch
from torch import Tensor, nn

from .configuration_maskformer import MaskFormerConfig
from .loss_maskformer import MaskFormerLoss
from .modeling_maskformer_dispatch import is_hooked
from .modeling_maskformer_linear import products_with_pixels
from .modeling_maskformer_outputs import MaskFormerForInstanceSegmentationOutput, MaskFormerModelOutput
from .modeling_maskformer_pixel_decoder import MaskProjection
from .modeling_maskformer_pixel_level import PixelLevelModule, sizes_in_batch
from .modeling_maskformer_pretrained import MaskFormerPreTrainedModel, first_set, own_config
from .modeling_maskformer_transformer_decoder import TransformerModule


class MaskEmbedder(nn.Sequential):
    """Three-layer perceptron from a query (D) to its mask embedding (C)."""

    def __init__(self, hidden_size: int, mask_feature_size: int) -> None:
        # Each layer has its own container, the last one too, because checkpoints name it `mask_embedder.0.0`.
        super().__init__(
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden_size, mask_feature_size)),
        )


class MaskFormerModel(MaskFormerPreTrainedModel):
    """MaskFormer without its heads: pixel embeddings and decoded queries."""

    def __init__(self, config: MaskFormerConfig) -> None:
        config = own_config(config)
        super().__init__(config)
        self.pixel_level_module = PixelLevelModule(config)
        memory_channels = self.pixel_level_module.decoder.memory_channels
        self.transformer_module = TransformerModule(memory_channels, config.decoder_config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> MaskFormerModelOutput | tuple:
        """Runs backbone, pixel decoder and transformer decoder.

        Args:
            pixel_values: (B, 3, H, W), RGB, normalised, padded on the right and below with 0.
            pixel_mask: (B, H, W), 1 = image, 0 = padding. Like the paper's code, the network ignores it unless the
                configuration's `mask_padding` is set.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
            kwargs: Ignored; they let callers pass what other models take.

        Raises:
            ValueError: The images do not have the backbone's number of channels or, with `mask_padding`, pixel_mask
                does not have their shape.
        """
        output_hidden_states = first_set(output_hidden_states, self.config.output_hidden_states)
        output_attentions = first_set(output_attentions, self.config.output_attentions)
        masked = pixel_mask if self.config.mask_padding else None
        features, (pixel_embeddings, memory, levels, memory_sizes) = self.pixel_level_module(
            pixel_values, masked, with_features=output_hidden_states
        )
        queries = self.transformer_module(memory, output_hidden_states, output_attentions, memory_sizes)
        output = MaskFormerModelOutput(
            encoder_last_hidden_state=features[-1],
            pixel_decoder_last_hidden_state=pixel_embeddings,
            transformer_decoder_last_hidden_state=queries.last_hidden_state,
            encoder_hidden_states=features if output_hidden_states else None,
            pixel_decoder_hidden_states=tuple(levels) if output_hidden_states else None,
            transformer_decoder_hidden_states=queries.hidden_states,
            hidden_states=(*features, *levels, *queries.hidden_states) if output_hidden_states else None,
            attentions=queries.attentions,
            transformer_decoder_intermediate_states=queries.intermediate_states,
        )
        return output if first_set(return_dict, self.config.return_dict) else output.to_tuple()


class MaskFormerForInstanceSegmentation(MaskFormerPreTrainedModel):
    """MaskFormer for semantic, instance and panoptic segmentation; the name is transformers' own."""

    # Trainer's own `num_items_in_batch` counts tokens of `labels`, which mean nothing here.
    accepts_loss_kwargs = False

    def __init__(self, config: MaskFormerConfig) -> None:
        config = own_config(config)
        super().__init__(config)
        hidden_size = config.decoder_config.d_model
        num_labels: int = config.num_labels  # type: ignore[assignment]  # the configuration requires classes
        self.model = MaskFormerModel(config)
        self.class_predictor = nn.Linear(hidden_size, num_labels + 1)  # the last class is "no object"
        self.mask_embedder = MaskEmbedder(hidden_size, config.mask_feature_size)
        self.criterion = MaskFormerLoss(num_labels, **config.loss_settings)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: Tensor | list[Tensor] | None = None,
        class_labels: Tensor | list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | None = None,
        **kwargs: object,
    ) -> MaskFormerForInstanceSegmentationOutput | tuple:
        """Predicts Q masks and their classes for each image, and the loss if labels are given.

        Args:
            pixel_values: (B, 3, H, W), RGB, normalised, padded on the right and below with 0.
            mask_labels: List of B tensors (N_i, H, W), 1 inside the segment, which may end where pixel_mask says that
                their image does; or one integer tensor (B, H, W) with the index of the segment that owns each pixel, -1
                for none.
            class_labels: List of B int64 tensors (N_i,), or (B, N) int64 padded with -100.
            pixel_mask: (B, H, W), 1 = image, 0 = padding. It tells post-processing where each image ends; the network
                ignores it (as does the paper's code) unless the configuration's `mask_padding` is set.
            output_auxiliary_logits: Return the logits after every decoder layer but the last.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
            num_items_in_batch: (2,), the normalisers of the loss if this batch is one of several whose gradients are
                accumulated; see `MaskFormerLoss`. `MaskFormerTrainer` passes it.
            kwargs: Ignored; they let callers pass what other models take.

        Raises:
            ValueError: The images do not have the backbone's number of channels, pixel_mask does not have their shape,
                only one kind of label is given, or the labels do not match the batch (see `MaskFormerLoss`).
        """
        has_labels = mask_labels is not None
        if has_labels != (class_labels is not None):
            given, missing = ("mask_labels", "class_labels") if has_labels else ("class_labels", "mask_labels")
            raise ValueError(f"{given} was given without {missing}: give both for a loss, or neither for a prediction.")
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        pixel_embeddings = outputs.pixel_decoder_last_hidden_state
        # The last state itself, so that its gradient can be requested.
        queries = outputs.transformer_decoder_last_hidden_state[None]
        output_auxiliary_logits = first_set(output_auxiliary_logits, self.config.output_auxiliary_logits)
        if output_auxiliary_logits or (has_labels and self.config.deep_supervision):
            queries = torch.cat((outputs.transformer_decoder_intermediate_states[:-1], queries))
        class_logits = self.class_predictor(queries)  # (L, B, Q, K + 1)
        mask_embeddings = self.mask_embedder(queries)
        # The loss itself computes the masks that it needs: with gradients only the matched ones.
        shown = slice(None) if output_auxiliary_logits else slice(-1, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not has_labels):
            mask_logits = products_with_pixels(mask_embeddings[shown], pixel_embeddings)

        loss, loss_dict = None, None
        if has_labels:
            supervised = slice(None) if self.config.deep_supervision else slice(-1, None)
            loss, loss_dict = self.criterion(
                class_logits[supervised],
                None,
                mask_labels,
                class_labels,
                pixel_values.shape[-2:],
                embeddings=(mask_embeddings[supervised], pixel_embeddings),
                image_sizes=image_sizes,
                num_items_in_batch=num_items_in_batch,
            )

        auxiliary_logits = None
        if output_auxiliary_logits:
            auxiliary_logits = [
                {"masks_queries_logits": masks, "class_queries_logits": classes}
                for masks, classes in zip(mask_logits[:-1], class_logits[:-1], strict=True)
            ]
        output = MaskFormerForInstanceSegmentationOutput(
            loss=loss,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=mask_logits[-1],
            auxiliary_logits=auxiliary_logits,
            **{name: value for name, value in outputs.items() if name != "transformer_decoder_intermediate_states"},
            loss_dict=loss_dict,
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )
        return output if first_set(return_dict, self.config.return_dict) else output.to_tuple()

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, threshold: float = 0.0
    ) -> MaskFormerForInstanceSegmentationOutput:
        """Predicts the masks of only the likely queries of an image.

        Panoptic and instance segmentation use only a few queries of an image. The others are left out of the outputs,
        which `post_process_panoptic_segmentation` and `post_process_instance_segmentation` accept like those of
        `forward`, with the same result if their threshold is not lower; instances also need the same `top_k`, which by
        default is the number of queries in the outputs.

        Args:
            pixel_values, pixel_mask: As in `forward`.
            threshold: Queries are kept if one of their classes is at least this probable. With 0 all are.

        Returns:
            `class_queries_logits` (B, Q', K + 1) and `masks_queries_logits` (B, Q', h, w), in the order of the queries,
            `image_sizes` and `padded_sizes`.

        Raises:
            RuntimeError: The model is in training mode, in which predictions are random.
            ValueError: See `forward`.
        """
        if self.training:
            raise RuntimeError("The model is in training mode, in which predictions are random. Call eval() first.")
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        masked = pixel_mask if self.config.mask_padding else None
        pixel_level_module = self.model.pixel_level_module
        _, (_, memory, levels, memory_sizes) = pixel_level_module(pixel_values, masked, with_embeddings=False)
        queries = self.model.transformer_module(memory, memory_sizes=memory_sizes).last_hidden_state
        class_logits = self.class_predictor(queries)
        kept = likely_queries(class_logits, threshold)[..., None]
        mask_embeddings = self.mask_embedder(queries.take_along_dim(kept, dim=1))
        projection = pixel_level_module.decoder.mask_projection
        if isinstance(projection, MaskProjection) and not is_hooked(projection):
            mask_logits = projection(levels[-1], mask_embeddings)
        else:
            # An adapter has replaced it, or a hook reads the embeddings.
            mask_logits = torch.einsum("bqc,bchw->bqhw", mask_embeddings, projection(levels[-1]))
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=class_logits.take_along_dim(kept, dim=1),
            masks_queries_logits=mask_logits,
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )


def likely_queries(class_logits: Tensor, threshold: float) -> Tensor:
    """Indices (B, Q'), ascending, of the queries of each image one of whose classes is at least this probable.

    Q' is their largest number in an image, at least 1; other images are padded with their next most likely queries.
    """
    scores = class_logits.float().softmax(-1)[..., :-1].amax(-1)
    count = max(int((scores >= threshold).sum(1).max()), 1)
    return scores.topk(count, dim=1).indices.sort(dim=1).values
