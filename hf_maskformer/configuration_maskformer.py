"""The model on paper: every field changes the model or its loss, and wrong combinations fail here."""

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Swin-B, window 12, as transformers' own MaskFormer: a file without a backbone means the same model in both.
DEFAULT_BACKBONE = {
    "model_type": "swin",
    "image_size": 384,
    "embed_dim": 128,
    "depths": [2, 2, 18, 2],
    "num_heads": [4, 8, 16, 32],
    "window_size": 12,
    "drop_path_rate": 0.3,
}
NUM_FEATURE_MAPS = 4  # strides 4, 8, 16, 32
GROUP_NORM_GROUPS = 32


@strict
class MaskFormerConfig(PreTrainedConfig):
    r"""Configuration of MaskFormer (arXiv 2107.06278); reads and writes the JSON of transformers' `maskformer` type.

    Nested configurations are copied: the caller's objects are never changed.

    Args:
        backbone_config: Configuration (or its dictionary) of the backbone: `resnet`, `swin`, `maskformer-swin`, or any
            type that `AutoBackbone` builds. Four feature maps are used, strides 4 to 32. Default: Swin-B, window 12.
        decoder_config: Configuration (or its dictionary) of type `detr`: `d_model`, `decoder_layers`,
            `decoder_attention_heads`, `decoder_ffn_dim`, `num_queries`, `dropout` and the like of the transformer
            decoder. Its encoder and backbone fields mean nothing here.
        fpn_feature_size: Channels of the pixel decoder, a multiple of 32 (group normalisation).
        mask_feature_size: Channels of the pixel embeddings and of the mask embeddings (C of the paper's section 3.3).
        cross_entropy_weight: Weight of the classification loss.
        mask_weight: Weight of the focal mask loss.
        dice_weight: Weight of the dice mask loss.
        no_object_weight: Weight of the "no object" class in the cross-entropy, relative to the others.
        class_cost: Weight of the class probability in the matching cost.
        mask_cost: Weight of the focal term in the matching cost; None: `mask_weight`, as in the paper.
        dice_cost: Weight of the dice term in the matching cost; None: `dice_weight`, as in the paper.
        deep_supervision: Apply the loss after every decoder layer, as the paper does.
        freeze_batch_norm: Keep the batch normalisation of the backbone at its stored statistics, without gradient, as
            the paper does. Set it to False to train a backbone with batch normalisation from scratch.
        mask_padding: Keep the padding of a batch out of the transformer decoder: queries do not attend to it, and
            positions are normalised by the image's own size. The paper's code does neither, so weights trained without
            it predict a little differently with it.
        use_auxiliary_loss: transformers' name for `deep_supervision`; True switches that on. Always False afterwards
            and in saved files, because transformers' own class crashes on True.
        output_auxiliary_logits: Return the logits after every decoder layer but the last.
        init_std, init_xavier_std: Kept for transformers' class; the paper's initialisation, used here, has no such
            numbers.

    Raises:
        ValueError: A value or combination that no model can have; the message names field and remedy.
    """

    model_type = "maskformer"
    # Those that an attention implementation is passed on to: a ResNet refuses to be told one.
    sub_configs: ClassVar[dict[str, Any]] = {"decoder_config": AutoConfig}
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "mask_feature_size"}
    # Per-image sizes and loss terms are no predictions: Trainer must not gather them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["loss_dict", "image_sizes", "padded_sizes"]

    backbone_config: Any = None
    decoder_config: Any = None
    fpn_feature_size: int = 256
    mask_feature_size: int = 256
    cross_entropy_weight: float | int = 1.0
    mask_weight: float | int = 20.0
    dice_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    class_cost: float | int = 1.0
    mask_cost: float | int | None = None
    dice_cost: float | int | None = None
    deep_supervision: bool = True
    freeze_batch_norm: bool = True
    mask_padding: bool = False
    use_auxiliary_loss: bool | None = False
    output_auxiliary_logits: bool | None = None
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = _backbone_config(self.backbone_config)
        self.decoder_config = _decoder_config(self.decoder_config)
        if self.use_auxiliary_loss:
            if not self.deep_supervision:
                raise ValueError(
                    "use_auxiliary_loss=True and deep_supervision=False contradict each other: both switch the loss "
                    "after every decoder layer. Leave use_auxiliary_loss out."
                )
            self.use_auxiliary_loss = False
        super().__post_init__(**kwargs)
        # transformers writes these two into its files; readers of the JSON may look for them.
        self.num_attention_heads = self.decoder_config.decoder_attention_heads
        self.num_hidden_layers = self.decoder_config.decoder_layers
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from a file's content. Fields among `kwargs` outweigh it and are checked as it is."""
        own = {name for name in kwargs if name in cls.__dataclass_fields__ and not isinstance(kwargs[name], dict)}
        overrides = {name: kwargs.pop(name) for name in own}
        if overrides.get("use_auxiliary_loss"):
            overrides.setdefault("deep_supervision", True)
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def matching_costs(self) -> dict[str, float]:
        """The weights of the matching cost, with None resolved to the weight of the same loss."""
        return {
            "class_cost": self.class_cost,
            "mask_cost": self.mask_weight if self.mask_cost is None else self.mask_cost,
            "dice_cost": self.dice_weight if self.dice_cost is None else self.dice_cost,
        }

    def _check(self) -> None:
        _check_sizes(self)
        _check_weights(self)
        _check_labels(self.id2label)
        _check_decoder(self.decoder_config)
        _check_backbone(self.backbone_config)


def _nested_config(value: Any, field: str, default: dict[str, Any]) -> PreTrainedConfig:
    """A private copy of a nested configuration, whatever form the caller gave it in."""
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)
    if not isinstance(value, dict | None):
        raise ValueError(f"{field} is a {type(value).__name__}, but must be a configuration or its dictionary.")
    fields = dict(default if value is None else value)
    model_type = fields.pop("model_type", default["model_type"] if field == "decoder_config" else None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{field} has model_type {model_type!r}, which the installed transformers does not know. "
            "Give the model_type of a configuration, such as 'resnet' or 'swin' for backbone_config."
        )
    return CONFIG_MAPPING[model_type](**copy.deepcopy(fields))


def _backbone_config(value: Any) -> PreTrainedConfig:
    config = _nested_config(value, "backbone_config", DEFAULT_BACKBONE)
    stage_names = getattr(config, "stage_names", None)
    # A single output is what a backbone's configuration defaults to; nobody can mean it here.
    if stage_names is not None and len(config.out_features) == 1:
        config.out_features = list(stage_names[-NUM_FEATURE_MAPS:])
    return config


def _decoder_config(value: Any) -> PreTrainedConfig:
    config = _nested_config(value, "decoder_config", {"model_type": "detr"})
    if config.model_type != "detr":
        raise ValueError(f"decoder_config is of type {config.model_type!r}, but must be of type 'detr'.")
    # transformers' decoder normalises twice when this is set: other predictions from the same weights.
    if getattr(config, "auxiliary_loss", False):
        config.auxiliary_loss = False
    return config


def _check_sizes(config: MaskFormerConfig) -> None:
    for field in ("fpn_feature_size", "mask_feature_size"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} is {getattr(config, field)}, but must be at least 1.")
    if config.fpn_feature_size % GROUP_NORM_GROUPS:
        raise ValueError(
            f"fpn_feature_size is {config.fpn_feature_size}, but must be a multiple of {GROUP_NORM_GROUPS}, "
            "the number of groups of the pixel decoder's normalisation."
        )


def _check_weights(config: MaskFormerConfig) -> None:
    fields = ("cross_entropy_weight", "mask_weight", "dice_weight", "class_cost", "mask_cost", "dice_cost")
    for field in fields:
        value = getattr(config, field)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{field} is {value}, but must be a finite number of at least 0.")
    # At 0 an image without segments would divide 0 by 0 in the weighted mean of the cross-entropy.
    if not 0 < config.no_object_weight < float("inf"):
        raise ValueError(
            f"no_object_weight is {config.no_object_weight}, but must be a finite number above 0 (the paper's is 0.1)."
        )
    if not any(config.matching_costs.values()):
        raise ValueError(
            "class_cost, mask_cost and dice_cost are all 0, so every matching costs the same. Set one above 0."
        )


def _check_labels(id2label: Any) -> None:
    if not id2label:
        raise ValueError("id2label is empty, but a model needs at least one class. Give id2label or num_labels.")
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            f"id2label has the ids {sorted(id2label)[:10]}..., but the ids must be 0 to {len(id2label) - 1} without "
            "gaps ('no object' is added by the model and needs no id)."
        )


def _check_decoder(config: PreTrainedConfig) -> None:
    for field in ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "num_queries"):
        if getattr(config, field) < 1:
            raise ValueError(f"decoder_config.{field} is {getattr(config, field)}, but must be at least 1.")
    if config.d_model % config.decoder_attention_heads or config.d_model % 4:
        raise ValueError(
            f"decoder_config.d_model is {config.d_model}, but must be a multiple of decoder_attention_heads "
            f"({config.decoder_attention_heads}) and of 4 (sine and cosine of two coordinates)."
        )
    if config.position_embedding_type != "sine":
        raise ValueError(
            f"decoder_config.position_embedding_type is {config.position_embedding_type!r}, but MaskFormer has only "
            "'sine'."
        )


def _check_backbone(config: PreTrainedConfig) -> None:
    if config.model_type in ("swin", "maskformer-swin"):
        _check_swin(config)
    out_features = getattr(config, "out_features", None)
    if out_features is not None and len(out_features) != NUM_FEATURE_MAPS:
        raise ValueError(
            f"backbone_config.out_features is {out_features}, but the pixel decoder takes {NUM_FEATURE_MAPS} feature "
            "maps (strides 4, 8, 16, 32). Leave it out to get the last four stages."
        )


def _check_swin(config: PreTrainedConfig) -> None:
    if len(config.depths) != NUM_FEATURE_MAPS or len(config.num_heads) != NUM_FEATURE_MAPS:
        raise ValueError(
            f"backbone_config has depths {list(config.depths)} and num_heads {list(config.num_heads)}, but a Swin "
            f"backbone has {NUM_FEATURE_MAPS} stages: give {NUM_FEATURE_MAPS} numbers each."
        )
    for stage, num_heads in enumerate(config.num_heads):
        if (config.embed_dim * 2**stage) % num_heads:
            raise ValueError(
                f"backbone_config.num_heads[{stage}] is {num_heads}, which does not divide the width "
                f"{config.embed_dim * 2**stage} of that stage."
            )
    if config.use_absolute_embeddings:
        raise ValueError("backbone_config.use_absolute_embeddings is True, but MaskFormer's Swin has no such weights.")
