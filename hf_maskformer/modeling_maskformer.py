"""MaskFormer (arXiv 2107.06278), the paper's figure 2: backbone, pixel decoder, transformer decoder, two heads.

Letters: B images, Q queries, L decoder layers, K classes, N segments in one image, D query width, C pixel feature
width; H x W is the padded image, h x w = H/4 x W/4.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_maskformer import MaskFormerConfig
from .configuration_maskformer_parts import MaskFormerTransformerConfig, is_of_type
from .loss_maskformer import MaskFormerLoss
from .modeling_maskformer_feature_pyramid import SimpleFeaturePyramid
from .modeling_maskformer_pixel_decoder import MaskProjection, PixelDecoder, PixelDecoderOutput
from .modeling_maskformer_resnet import ResNetBackbone
from .modeling_maskformer_swin import SwinBackbone
from .modeling_maskformer_transformer_decoder import TransformerModule

STRIDES = (4, 8, 16, 32)  # of the backbone's feature maps
OWN_BACKBONES: dict[str, type[nn.Module]] = {
    "resnet": ResNetBackbone,
    "maskformer-resnet": ResNetBackbone,
    "swin": SwinBackbone,
    "maskformer-swin": SwinBackbone,
    "maskformer-simple-feature-pyramid": SimpleFeaturePyramid,
}


@dataclass
class MaskFormerModelOutput(ModelOutput):
    """Output of `MaskFormerModel`.

    Args:
        encoder_last_hidden_state: (B, C_backbone, H/32, W/32), the backbone's last feature map.
        pixel_decoder_last_hidden_state: (B, C, h, w), the pixel embeddings.
        transformer_decoder_last_hidden_state: (B, Q, D), the queries after the last layer.
        encoder_hidden_states: The backbone's four feature maps, if asked for.
        pixel_decoder_hidden_states: The pyramid at strides 16, 8 and 4, if asked for.
        transformer_decoder_hidden_states: L + 1 tensors (B, Q, D), if asked for: zeros, every layer's output but the
            last before the norm, and `transformer_decoder_last_hidden_state`.
        hidden_states: The three above in one tuple, if asked for.
        attentions: L tensors (B, heads, Q, H/32 * W/32) if asked for: where each query looked.
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
        auxiliary_logits: One dictionary with the two logits for each decoder layer but the last, if asked for.
        encoder_last_hidden_state, pixel_decoder_last_hidden_state, transformer_decoder_last_hidden_state,
        encoder_hidden_states, pixel_decoder_hidden_states, transformer_decoder_hidden_states, hidden_states,
        attentions: As in `MaskFormerModelOutput`.
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


class PixelLevelModule(nn.Module):
    """Backbone and pixel decoder.

    Shapes:
        pixel_values: (B, 3, H, W).
        returns: the backbone's four feature maps, and what the pixel decoder makes of them.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.encoder = build_backbone(config.backbone_config)
        self.freeze_batch_norm = config.freeze_batch_norm
        transformer = config.decoder_config
        has_encoder = is_of_type(transformer, MaskFormerTransformerConfig) and transformer.pixel_decoder_layers > 0
        self.decoder = PixelDecoder(
            self.encoder.channels,
            config.fpn_feature_size,
            config.mask_feature_size,
            transformer if has_encoder else None,
        )
        self.train(self.training)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, with_embeddings: bool = True
    ) -> tuple[Sequence[Tensor], PixelDecoderOutput]:
        """With a `pixel_mask` (B, H, W), transformer encoder layers leave the padding out."""
        # Convolutions are fastest with the channels of a pixel side by side; what follows keeps that layout. On a CPU,
        # torch 2.13 corrupts memory in the backward pass of such convolutions in bfloat16.
        if pixel_values.is_cuda or not torch.is_grad_enabled():
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        if isinstance(self.encoder, PreTrainedModel):
            features = foreign_feature_maps(self.encoder, pixel_values)
        else:
            features = self.encoder(pixel_values)
        memory_sizes = None
        if pixel_mask is not None:
            memory_sizes = covered_part(*sizes_in_batch(pixel_values, pixel_mask), features[-1].shape[-2:])
        return features, self.decoder(features, memory_sizes, with_embeddings)

    def train(self, mode: bool = True) -> "PixelLevelModule":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # Here rather than once: loading replaces the parameters, then calls eval().
                    module.eval().requires_grad_(False)
        return self


class MaskEmbedder(nn.Module):
    """Three-layer perceptron from a query (D) to its mask embedding (C)."""

    def __init__(self, hidden_size: int, mask_feature_size: int) -> None:
        super().__init__()
        sizes = (hidden_size, hidden_size, hidden_size, mask_feature_size)
        for index, (size, next_size) in enumerate(itertools.pairwise(sizes)):
            # Each layer sits in a container of its own because checkpoints name it `mask_embedder.0.0`.
            self.add_module(str(index), nn.Sequential(nn.Linear(size, next_size)))

    def forward(self, queries: Tensor) -> Tensor:
        for index, layer in enumerate(self.children()):
            queries = layer(queries) if index == 0 else layer(queries.relu())
        return queries


class MaskFormerPreTrainedModel(PreTrainedModel):
    """Loading, saving and the initialisation of the paper's code."""

    config_class = MaskFormerConfig
    config: MaskFormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - the base class declares a list
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerDecoderLayer", "TransformerEncoderLayer", "SwinBlock", "ResNetLayer"]  # noqa: RUF012 - likewise

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As everywhere in transformers: "eager" or "sdpa".

        It holds for MaskFormer's transformers, and for a backbone of transformers that has it; Swin has its own.
        """
        by_part = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        checked = self.get_correct_attn_implementation(by_part.get("decoder_config", by_part.get("", "sdpa")))
        # transformers expects a model behind every nested configuration, and every backbone to have every attention.
        self.config._attn_implementation = checked
        for module in self.modules():
            if not isinstance(module, PreTrainedModel) or isinstance(module, MaskFormerPreTrainedModel):
                continue
            if checked == "eager" or module._supports_sdpa:
                module.set_attn_implementation(checked, allow_all_kernels)

    def post_init(self) -> None:
        # Each model has some of them only, and wrapping policies refuse names that they do not find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in present]
        super().post_init()

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: images have no vocabulary. Accelerate asks before it shards a model, and peft before it trains one."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every module knows its own initialisation; transformers calls this for those that no checkpoint has filled.
        reset_parameters = getattr(module, "reset_parameters", None)
        if reset_parameters is not None:
            reset_parameters()


class MaskFormerModel(MaskFormerPreTrainedModel):
    """MaskFormer without its heads: pixel embeddings and decoded queries."""

    def __init__(self, config: MaskFormerConfig) -> None:
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
            pixel_mask: (B, H, W), 1 = image, 0 = padding. Like the paper's code, the network does not read it unless
                the configuration's `mask_padding` is set.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
        """
        output_hidden_states = first_set(output_hidden_states, self.config.output_hidden_states)
        output_attentions = first_set(output_attentions, self.config.output_attentions)
        masked = pixel_mask if self.config.mask_padding else None
        features, (pixel_embeddings, memory, levels, memory_sizes) = self.pixel_level_module(pixel_values, masked)
        queries = self.transformer_module(memory, output_hidden_states, output_attentions, memory_sizes)
        output = MaskFormerModelOutput(
            encoder_last_hidden_state=features[-1],
            pixel_decoder_last_hidden_state=pixel_embeddings,
            transformer_decoder_last_hidden_state=queries.last_hidden_state,
            attentions=queries.attentions,
            transformer_decoder_intermediate_states=queries.intermediate_states,
        )
        if output_hidden_states:
            output.encoder_hidden_states = tuple(features)
            output.pixel_decoder_hidden_states = tuple(levels)
            output.transformer_decoder_hidden_states = queries.hidden_states
            output.hidden_states = (*features, *levels, *queries.hidden_states)
        return output if first_set(return_dict, self.config.return_dict) else output.to_tuple()


class MaskFormerForInstanceSegmentation(MaskFormerPreTrainedModel):
    """MaskFormer for semantic, instance and panoptic segmentation; the name is transformers' own."""

    # Trainer's own `num_items_in_batch` counts tokens of `labels`, which mean nothing here.
    accepts_loss_kwargs = False

    def __init__(self, config: MaskFormerConfig) -> None:
        super().__init__(config)
        hidden_size = config.decoder_config.d_model
        num_labels: int = config.num_labels  # type: ignore[assignment]  # the configuration insists on classes
        self.model = MaskFormerModel(config)
        self.class_predictor = nn.Linear(hidden_size, num_labels + 1)  # the last class is "no object"
        self.mask_embedder = MaskEmbedder(hidden_size, config.mask_feature_size)
        self.criterion = MaskFormerLoss(
            num_labels,
            cross_entropy_weight=config.cross_entropy_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            **config.matching_costs,
            void_in_loss=config.void_in_loss,
            matching=config.matching,
            train_num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
        )
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
            mask_labels: List of B tensors (N_i, H, W), 1 inside the segment; or one integer tensor (B, H, W) with the
                index of the segment that owns each pixel, -1 for none.
            class_labels: List of B int64 tensors (N_i,), or (B, N) int64 padded with -100.
            pixel_mask: (B, H, W), 1 = image, 0 = padding. It tells post-processing where each image ends; the network
                does not read it (nor does the paper's code) unless the configuration's `mask_padding` is set.
            output_auxiliary_logits: Return the logits after every decoder layer but the last.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
            num_items_in_batch: (2,), by what the loss is divided if this batch is one of several whose gradients are
                added up; see `MaskFormerLoss`. `MaskFormerTrainer` gives it.

        Raises:
            ValueError: Only one kind of label is given, or the labels do not fit the batch (see `MaskFormerLoss`).
        """
        has_labels = mask_labels is not None
        if has_labels != (class_labels is not None):
            given, missing = ("mask_labels", "class_labels") if has_labels else ("class_labels", "mask_labels")
            raise ValueError(f"{given} came without {missing}: give both for a loss, or neither for a prediction.")
        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        pixel_embeddings = outputs.pixel_decoder_last_hidden_state
        queries = outputs.transformer_decoder_intermediate_states
        output_auxiliary_logits = first_set(output_auxiliary_logits, self.config.output_auxiliary_logits)
        if not (output_auxiliary_logits or (has_labels and self.config.deep_supervision)):
            queries = queries[-1:]
        class_logits = self.class_predictor(queries)  # (L, B, Q, K + 1)
        mask_embeddings = self.mask_embedder(queries)
        # The loss needs all masks for matching only; those that matched it computes again, with gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not has_labels):
            mask_logits = torch.einsum("lbqc,bchw->lbqhw", mask_embeddings, pixel_embeddings)

        loss, loss_dict = None, None
        if has_labels:
            supervised = slice(None) if self.config.deep_supervision else slice(-1, None)
            loss, loss_dict = self.criterion(
                class_logits[supervised],
                mask_logits[supervised],
                mask_labels,
                class_labels,
                pixel_values.shape[-2:],
                embeddings=(mask_embeddings[supervised], pixel_embeddings),
                num_items_in_batch=num_items_in_batch,
            )

        auxiliary_logits = None
        if output_auxiliary_logits:
            auxiliary_logits = [
                {"masks_queries_logits": masks, "class_queries_logits": classes}
                for masks, classes in zip(mask_logits[:-1], class_logits[:-1], strict=True)
            ]
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
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
        """Predicts the masks of the likely queries of an image, and of no others.

        Panoptic and instance segmentation look at a few queries of an image only. The others are left out of the
        outputs, which `post_process_panoptic_segmentation` and `post_process_instance_segmentation` take as they take
        those of `forward`, with the same result if their threshold is not lower; instances need the same `top_k` too,
        which by default is the number of queries in the outputs.

        Args:
            pixel_values, pixel_mask: As in `forward`.
            threshold: Queries stay if one of their classes is at least this probable. With 0 all do.

        Returns:
            `class_queries_logits` (B, Q', K + 1) and `masks_queries_logits` (B, Q', h, w), in the order of the queries,
            `image_sizes` and `padded_sizes`.

        Raises:
            RuntimeError: The model is in training mode, in which predictions are random.
        """
        if self.training:
            raise RuntimeError("The model is in training mode, in which predictions are random. Call eval() first.")
        masked = pixel_mask if self.config.mask_padding else None
        pixel_level_module = self.model.pixel_level_module
        _, (_, memory, levels, memory_sizes) = pixel_level_module(pixel_values, masked, with_embeddings=False)
        queries = self.model.transformer_module(memory, image_sizes=memory_sizes).last_hidden_state
        class_logits = self.class_predictor(queries)
        kept = likely_queries(class_logits, threshold)[..., None]
        mask_embeddings = self.mask_embedder(queries.take_along_dim(kept, dim=1))
        projection = pixel_level_module.decoder.mask_projection
        if isinstance(projection, MaskProjection):
            mask_logits = projection(levels[-1], mask_embeddings)
        else:
            # An adapter has taken its place.
            mask_logits = torch.einsum("bqc,bchw->bqhw", mask_embeddings, projection(levels[-1]))
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=class_logits.take_along_dim(kept, dim=1),
            masks_queries_logits=mask_logits,
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )


def likely_queries(class_logits: Tensor, threshold: float) -> Tensor:
    """Indices (B, Q'), ascending, of the queries of each image one of whose classes is at least this probable.

    Q' is their largest number in an image, at least 1; other images are filled up with their next likely queries.
    """
    scores = class_logits.float().softmax(-1)[..., :-1].amax(-1)
    count = max(int((scores >= threshold).sum(1).max()), 1)
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def build_backbone(config: PreTrainedConfig) -> Any:
    """The backbone of a configuration: one of ours, or what `AutoBackbone` builds. All have `channels`."""
    own = OWN_BACKBONES.get(config.model_type)
    return AutoBackbone.from_config(config) if own is None else own(config)


def foreign_feature_maps(backbone: PreTrainedModel, pixel_values: Tensor) -> Sequence[Tensor]:
    """The feature maps of a backbone that is not ours, whose strides only its maps tell.

    Raises:
        ValueError: The image is too small for it, or its strides are not 4, 8, 16 and 32.
    """
    height, width = pixel_values.shape[-2:]
    if min(height, width) < STRIDES[-1]:
        raise ValueError(
            f"pixel_values are {height} x {width} pixels, but a {type(backbone).__name__} needs at least "
            f"{STRIDES[-1]} each way. Pad them: size_divisor={STRIDES[-1]} of the image processor."
        )
    feature_maps = backbone(pixel_values).feature_maps
    heights = [feature_map.shape[-2] for feature_map in feature_maps]
    # Sides that do not divide are rounded either way.
    fits = [height // stride <= found <= -(-height // stride) for found, stride in zip(heights, STRIDES, strict=False)]
    if len(fits) != len(STRIDES) or not all(fits):
        found = tuple(round(height / found) for found in heights)
        raise ValueError(
            f"The feature maps of {type(backbone).__name__} have the strides {found}, but the pixel decoder needs "
            f"{STRIDES}. Choose other out_features in backbone_config, or another backbone."
        )
    return feature_maps


def sizes_in_batch(pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(height, width) of each image without and with its padding, both (B, 2) int64.

    Images lie at the top left, so the mask's rows and columns that hold any image give the size.
    """
    padded_sizes = torch.tensor(pixel_values.shape[-2:], device=pixel_values.device).repeat(len(pixel_values), 1)
    if pixel_mask is None:
        return padded_sizes, padded_sizes
    is_image = pixel_mask.bool()
    return torch.stack((is_image.any(2).sum(1), is_image.any(1).sum(1)), dim=1), padded_sizes


def covered_part(image_sizes: Tensor, padded_sizes: Tensor, size: Sequence[int]) -> Tensor:
    """How many rows and columns of a feature map of this size hold at least a pixel of each image, (B, 2) int64."""
    scaled = image_sizes * torch.tensor(size, device=image_sizes.device)
    return (scaled + padded_sizes - 1) // padded_sizes


def first_set(value: bool | None, default: bool | None) -> bool:
    """An argument of a call, or the configuration's field where it is None."""
    return bool(default if value is None else value)
