"""MaskFormer (arXiv 2107.06278), the paper's figure 2: backbone, pixel decoder, transformer decoder, two heads.

Letters: B images, Q queries, L decoder layers, K classes, N segments in one image, D query width, C pixel feature
width; H x W is the padded image, h x w = H/4 x W/4.
"""

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MaskFormerConfig as StockConfig
from transformers import PreTrainedModel

from .configuration_maskformer import MaskFormerConfig
from .loss_maskformer import MaskFormerLoss
from .modeling_maskformer_feature_pyramid import switch_attention
from .modeling_maskformer_linear import products_with_pixels
from .modeling_maskformer_outputs import MaskFormerForInstanceSegmentationOutput, MaskFormerModelOutput
from .modeling_maskformer_packing import forget
from .modeling_maskformer_pixel_decoder import MaskProjection
from .modeling_maskformer_pixel_level import PixelLevelModule, sizes_in_batch
from .modeling_maskformer_transformer_decoder import TransformerModule
from .modeling_maskformer_winograd import is_hooked

MAX_PARAMETERS = 10**10  # 40 GB; the largest backbone of transformers has 7e9


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
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["TransformerDecoderLayer", "TransformerEncoderLayer", "SwinBlock", "ResNetLayer"]  # noqa: RUF012 - likewise

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As everywhere in transformers; a dictionary may name "decoder_config" and "backbone_config".

        A backbone of transformers that does not have the implementation keeps its own, as our Swin always does.
        """
        if not isinstance(attn_implementation, dict):
            attn_implementation = dict.fromkeys(("", *self.config.sub_configs), attn_implementation)
        unknown = attn_implementation.keys() - {"", *self.config.sub_configs}
        if unknown:
            parts = ", ".join(self.config.sub_configs)
            raise ValueError(f"attn_implementation names {', '.join(sorted(unknown))}, but the parts are {parts}.")
        checked = {
            part: self._check_and_adjust_attn_implementation(name, allow_all_kernels=allow_all_kernels)
            for part, name in attn_implementation.items()
        }
        # No model stands behind the decoder's configuration; transformers' setter would write to the backbone's too.
        for part, config in (("", self.config), ("decoder_config", self.config.decoder_config)):
            if part in checked and config is not None:
                config._attn_implementation_internal = checked[part]
        if "backbone_config" in checked:
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and not isinstance(module, MaskFormerPreTrainedModel):
                    switch_attention(module, checked["backbone_config"])

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the image first. transformers asks when it quantises, or checkpoints adapters."""
        encoder = self.base_model.get_submodule("pixel_level_module.encoder")
        return next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))

    def post_init(self) -> None:
        # Each model has some of them only, and wrapping policies refuse names that they do not find.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in present]
        # From a checkpoint, nothing is allocated yet: transformers builds models on the meta device first.
        num_parameters = sum(tensor.numel() for tensor in itertools.chain(self.parameters(), self.buffers()))
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"The configuration describes a model of {num_parameters:.1e} parameters, but models here have at most "
                f"{MAX_PARAMETERS:.0e}. Reduce its widths and numbers of layers."
            )
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers.

        Raises:
            OSError: There are no weights, or a file of weights is damaged or of another kind.
            ValueError: The configuration is one that no model can have.
            RuntimeError: Weights have another shape than the model's.
        """
        check_weight_indices(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if str(pretrained_model_name_or_path).endswith(".json"):
            raise OSError(f"{pretrained_model_name_or_path} is no file of weights. Name the folder that it lies in.")
        if "config" in kwargs:
            kwargs["config"] = own_config(kwargs["config"])
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # What transformers passes on of the readers of weights and of their index.
        except (SafetensorError, pickle.UnpicklingError, LookupError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise OSError(
                f"{pretrained_model_name_or_path} cannot be loaded ({reason}). Are its weights damaged or cut "
                "off? Then download them again."
            ) from error

    def train(self, mode: bool = True) -> Any:
        if mode:
            forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # what moves a model to another device or type
        forget(self)
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)  # as torch may swap tensors, which it refuses while something is kept of them
        return super().load_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every module knows its own initialisation; transformers calls this for those that no checkpoint has filled.
        reset_parameters = getattr(module, "reset_parameters", None)
        if reset_parameters is not None:
            reset_parameters()


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
            pixel_mask: (B, H, W), 1 = image, 0 = padding. Like the paper's code, the network does not read it unless
                the configuration's `mask_padding` is set.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
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
        num_labels: int = config.num_labels  # type: ignore[assignment]  # the configuration insists on classes
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
                does not read it (nor does the paper's code) unless the configuration's `mask_padding` is set.
            output_auxiliary_logits: Return the logits after every decoder layer but the last.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
            num_items_in_batch: (2,), by what the loss is divided if this batch is one of several whose gradients are
                added up; see `MaskFormerLoss`. `MaskFormerTrainer` gives it.

        Raises:
            ValueError: Only one kind of label is given, the labels do not fit the batch (see `MaskFormerLoss`), or
                pixel_mask has another shape than the images.
        """
        has_labels = mask_labels is not None
        if has_labels != (class_labels is not None):
            given, missing = ("mask_labels", "class_labels") if has_labels else ("class_labels", "mask_labels")
            raise ValueError(f"{given} came without {missing}: give both for a loss, or neither for a prediction.")
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
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
        # The loss computes the masks that it needs by itself: with gradient only those that matched.
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
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        masked = pixel_mask if self.config.mask_padding else None
        pixel_level_module = self.model.pixel_level_module
        _, (_, memory, levels, memory_sizes) = pixel_level_module(pixel_values, masked, with_embeddings=False)
        queries = self.model.transformer_module(memory, image_sizes=memory_sizes).last_hidden_state
        class_logits = self.class_predictor(queries)
        kept = likely_queries(class_logits, threshold)[..., None]
        mask_embeddings = self.mask_embedder(queries.take_along_dim(kept, dim=1))
        projection = pixel_level_module.decoder.mask_projection
        if isinstance(projection, MaskProjection) and not is_hooked(projection):
            mask_logits = projection(levels[-1], mask_embeddings)
        else:
            # An adapter has taken its place, or somebody looks at the embeddings.
            mask_logits = torch.einsum("bqc,bchw->bqhw", mask_embeddings, projection(levels[-1]))
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=class_logits.take_along_dim(kept, dim=1),
            masks_queries_logits=mask_logits,
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )


def own_config(config: Any) -> Any:
    """A configuration of transformers' MaskFormer, as `AutoConfig` gives it, as one of ours; others as they are."""
    if not isinstance(config, StockConfig):
        return config
    own = MaskFormerConfig.from_dict(config.to_dict())
    if config._attn_implementation is not None:
        own._attn_implementation = config._attn_implementation
    return own


def likely_queries(class_logits: Tensor, threshold: float) -> Tensor:
    """Indices (B, Q'), ascending, of the queries of each image one of whose classes is at least this probable.

    Q' is their largest number in an image, at least 1; other images are filled up with their next likely queries.
    """
    scores = class_logits.float().softmax(-1)[..., :-1].amax(-1)
    count = max(int((scores >= threshold).sum(1).max()), 1)
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def check_weight_indices(folder: Any, subfolder: str) -> None:
    """Checks that each index of a folder's weights names files of this folder; transformers would read any others.

    Raises an OSError; does nothing where no folder is given.
    """
    if not isinstance(folder, str | os.PathLike):
        return
    for path in Path(folder, subfolder).glob("*.index*.json"):  # a variant's name stands in between
        try:
            names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise OSError(f"{path} is no index of weights ({str(error)[:200]}). Download it again.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise OSError(f"{path} names {str(name)[:200]!r}, which is no file of its folder; do not trust it.")


def first_set(value: bool | None, default: bool | None) -> bool:
    """An argument of a call, or the configuration's field where it is None."""
    return bool(default if value is None else value)
