"""Configuration of the paper's per-pixel baselines."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_maskformer_parts import MaskFormerTransformerConfig, check_sizes, nested_config
from .configuration_with_code import ConfigWithCode

# Saved instead of None, for which transformers' MaskFormer would build a decoder with random weights.
NO_DECODER = {"model_type": "maskformer-no-decoder"}


@strict
class PerPixelBaselineConfig(ConfigWithCode):
    r"""Configuration of PerPixelBaseline and PerPixelBaseline+ (arXiv 2107.06278, section 4.2).

    Both classify every pixel and have MaskFormer's backbone and pixel decoder. PerPixelBaseline has a linear classifier
    on the pixel embeddings; PerPixelBaseline+ has MaskFormer's transformer decoder with one query per class, whose
    masks are the class scores.

    Nested configurations are copied: the caller's objects are never changed.

    Args:
        backbone_config: As in `MaskFormerConfig`. Default: ResNet-50.
        decoder_config: None for PerPixelBaseline; for PerPixelBaseline+ the configuration (or its dictionary) of type
            `maskformer-transformer`. Its `num_queries` is always the number of classes.
        fpn_feature_size: Channels of the pixel decoder, a multiple of 32 (group normalisation).
        mask_feature_size: Channels of the pixel embeddings.
        semantic_loss_ignore_index: Label of pixels that the loss ignores.
        deep_supervision: In PerPixelBaseline+, apply the loss after every decoder layer, as the paper does.
        freeze_batch_norm: As in `MaskFormerConfig`.

    Raises:
        ValueError: A value or combination is invalid; the message names the field and the remedy.
    """

    model_type = "per-pixel-baseline"
    default_backbone: ClassVar[dict[str, Any]] = {"model_type": "resnet"}
    files_of_auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_per_pixel_baseline.PerPixelBaselineConfig",
        "AutoModelForSemanticSegmentation": "modeling_per_pixel_baseline.PerPixelBaselineForSemanticSegmentation",
    }

    fpn_feature_size: int = 256
    mask_feature_size: int = 256
    semantic_loss_ignore_index: int = 255
    deep_supervision: bool = True
    freeze_batch_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.decoder_config == NO_DECODER:
            self.decoder_config = None
        if self.decoder_config is not None:
            self.decoder_config = nested_config(self.decoder_config, "decoder_config")
            if not isinstance(self.decoder_config, MaskFormerTransformerConfig):
                raise ValueError(
                    f"decoder_config is of type {self.decoder_config.model_type!r}, but must be of type "
                    f"{MaskFormerTransformerConfig.model_type!r}."
                )
        super().__post_init__(**kwargs)
        num_labels: int = self.num_labels  # type: ignore[assignment]  # there are labels
        if self.decoder_config is not None:
            self.decoder_config.num_queries = num_labels
        check_sizes(self)
        if self.semantic_loss_ignore_index in range(num_labels):
            raise ValueError(
                f"semantic_loss_ignore_index is {self.semantic_loss_ignore_index}, which is also one of the "
                f"{num_labels} classes. Choose a larger number, such as 65535, here and in the image processor."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved."""
        fields = super().to_dict()
        if fields["decoder_config"] is None:
            fields["decoder_config"] = dict(NO_DECODER)
        return fields


def is_per_pixel_baseline(model: Any) -> bool:
    """Whether a model is one of the baselines, by its configuration, which adapters and compilers around it expose."""
    return getattr(getattr(model, "config", None), "model_type", None) == PerPixelBaselineConfig.model_type
