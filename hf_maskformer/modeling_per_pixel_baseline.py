"""The paper's per-pixel baselines (section 4.2): MaskFormer's parts, but every pixel is classified on its own.

Letters: B images, L decoder layers, K classes, C pixel feature width; H x W is the padded image, h x w = H/4 x W/4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_per_pixel_baseline import PerPixelBaselineConfig
from .modeling_maskformer import MaskEmbedder
from .modeling_maskformer_linear import products_with_pixels
from .modeling_maskformer_pixel_level import PixelLevelModule, sizes_in_batch
from .modeling_maskformer_pretrained import MaskFormerPreTrainedModel, first_set
from .modeling_maskformer_transformer_decoder import TransformerModule
from .post_processing_per_pixel_baseline import upsample_per_pixel_logits


@dataclass
class PerPixelBaselineOutput(ModelOutput):
    """Output of `PerPixelBaselineForSemanticSegmentation`; `post_process_semantic_segmentation` takes it.

    Args:
        loss: Sum of the loss terms, if labels were given.
        logits: (B, K, h, w), before the softmax.
        hidden_states: The backbone's four feature maps, the pyramid at strides 16, 8 and 4 and, in PerPixelBaseline+,
            the queries of every decoder layer, if requested.
        attentions: In PerPixelBaseline+, L tensors (B, heads, K, H/32 * W/32), if requested.
        loss_dict: Every loss term by name, detached, if labels were given: `loss_sem_seg` and, with deep supervision,
            `loss_sem_seg_0`, `loss_sem_seg_1`, ... of the decoder layers before the last.
        image_sizes: (B, 2) int64, (height, width) of each image inside the padded batch, from `pixel_mask`.
        padded_sizes: (B, 2) int64, (H, W).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    image_sizes: Tensor | None = None
    padded_sizes: Tensor | None = None


class PixelClassifier(nn.Conv2d):
    """A linear classifier of pixel embeddings, with the initialisation of the paper's code (arXiv 1502.01852)."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:  # adapters build a layer of the same class without one
            nn.init.zeros_(self.bias)


class PerPixelBaselinePreTrainedModel(MaskFormerPreTrainedModel):
    """Loading, saving and the initialisation of the paper's code."""

    config_class = PerPixelBaselineConfig  # type: ignore[assignment]  # the parts read the fields that both have
    config: PerPixelBaselineConfig  # type: ignore[assignment]
    # The loss is a mean over the pixels of a batch: Trainer must divide it by the number of accumulated batches.
    accepts_loss_kwargs = False


class PerPixelBaselineModel(PerPixelBaselinePreTrainedModel):
    """MaskFormer's parts without its heads, under the names of its checkpoints."""

    def __init__(self, config: PerPixelBaselineConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = PixelLevelModule(config)
        memory_channels = self.pixel_level_module.decoder.memory_channels
        transformer = config.decoder_config
        if transformer is not None:
            # The classes may have been replaced since the configuration was made.
            transformer.num_queries = config.num_labels
        self.transformer_module = None if transformer is None else TransformerModule(memory_channels, transformer)
        self.post_init()


class PerPixelBaselineForSemanticSegmentation(PerPixelBaselinePreTrainedModel):
    """PerPixelBaseline or, with a `decoder_config`, PerPixelBaseline+."""

    def __init__(self, config: PerPixelBaselineConfig) -> None:
        super().__init__(config)
        self.model = PerPixelBaselineModel(config)
        num_labels: int = config.num_labels  # type: ignore[assignment]  # the configuration requires classes
        self.num_labels = num_labels
        self.classifier: PixelClassifier | None = None
        self.mask_embedder: MaskEmbedder | None = None
        if config.decoder_config is None:
            self.classifier = PixelClassifier(config.mask_feature_size, num_labels, kernel_size=1)
        else:
            self.mask_embedder = MaskEmbedder(config.decoder_config.d_model, config.mask_feature_size)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> PerPixelBaselineOutput | tuple:
        """Scores every class at every pixel, and returns the loss if labels are given.

        Args:
            pixel_values: (B, 3, H, W), RGB, normalised, padded on the right and below with 0.
            labels: (B, H, W) integers, 0 to K - 1 or `semantic_loss_ignore_index`, as in padding.
            pixel_mask: (B, H, W), 1 = image, 0 = padding. The network ignores it; it tells post-processing where each
                image ends.
            output_hidden_states, output_attentions, return_dict: As everywhere in transformers.
            kwargs: Ignored; they let callers pass what other models take.

        Raises:
            ValueError: The images do not have the backbone's number of channels, a label is not a class, or the size of
                the labels or pixel_mask does not match the images.
        """
        output_hidden_states = first_set(output_hidden_states, self.config.output_hidden_states)
        output_attentions = first_set(output_attentions, self.config.output_attentions)
        image_sizes, padded_sizes = sizes_in_batch(pixel_values, pixel_mask)
        features, (pixel_embeddings, memory, levels, _) = self.model.pixel_level_module(
            pixel_values, with_features=output_hidden_states
        )
        hidden_states, attentions = (*features, *levels), None
        if self.classifier is not None:
            logits = self.classifier(pixel_embeddings)[None]
        else:
            queries = self.model.transformer_module(memory, output_hidden_states, output_attentions)
            attentions = queries.attentions
            hidden_states = (*hidden_states, *(queries.hidden_states or ()))
            embeddings: Tensor = self.mask_embedder(queries.intermediate_states)  # type: ignore[misc]
            logits = products_with_pixels(embeddings, pixel_embeddings)

        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self._losses(
                logits if self.config.deep_supervision else logits[-1:], labels, pixel_values
            )
        output = PerPixelBaselineOutput(
            loss=loss,
            logits=logits[-1],
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions,
            loss_dict=loss_dict,
            image_sizes=image_sizes,
            padded_sizes=padded_sizes,
        )
        return output if first_set(return_dict, self.config.return_dict) else output.to_tuple()

    def _losses(self, logits: Tensor, labels: Tensor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of each layer's logits (L, B, K, h, w), upsampled to the labels; their sum and its terms."""
        self._check_labels(labels, pixel_values)
        ignore_index, labels = self.config.semantic_loss_ignore_index, labels.long()
        # The mean over labelled pixels; a batch without any has loss 0 rather than 0 / 0.
        num_pixels = (labels != ignore_index).sum().clamp(min=1)
        terms = {}
        for layer, layer_logits in enumerate(logits):
            upsampled = upsample_per_pixel_logits(layer_logits)[..., : labels.shape[-2], : labels.shape[-1]]
            loss = F.cross_entropy(upsampled, labels, ignore_index=ignore_index, reduction="sum") / num_pixels
            terms["loss_sem_seg" if layer == len(logits) - 1 else f"loss_sem_seg_{layer}"] = loss
        return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}

    def _check_labels(self, labels: Tensor, pixel_values: Tensor) -> None:
        if labels.shape != (len(pixel_values), *pixel_values.shape[-2:]):
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)}, but the images are {tuple(pixel_values.shape)}: give "
                "one label for each pixel, (B, H, W), resized and padded together with the images."
            )
        # A compiled model cannot check values.
        if torch.compiler.is_compiling():
            return
        ignore_index, num_labels = self.config.semantic_loss_ignore_index, self.num_labels
        is_unknown = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
        if is_unknown.any():
            raise ValueError(
                f"labels contain {int(labels[is_unknown][0])}, but the model has {num_labels} classes (0 to "
                f"{num_labels - 1}) and semantic_loss_ignore_index {ignore_index}. Check id2label of the "
                "configuration against the data, and ignore_index of the image processor."
            )
