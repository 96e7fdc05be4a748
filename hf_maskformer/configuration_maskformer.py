"""The model on paper: every field changes the model or its loss, and wrong combinations fail here."""

from typing import Any, ClassVar, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_maskformer_parts import MaskFormerTransformerConfig, check_loss, check_sizes, nested_config
from .configuration_with_code import ConfigWithCode

DETR = {"model_type": "detr"}
LOSS_FIELDS = (  # besides the matching costs
    "cross_entropy_weight",
    "mask_weight",
    "dice_weight",
    "no_object_weight",
    "void_in_loss",
    "matching",
    "train_num_points",
    "oversample_ratio",
    "importance_sample_ratio",
)


@strict
class MaskFormerConfig(ConfigWithCode):
    r"""Configuration of MaskFormer (arXiv 2107.06278); reads and writes the JSON of transformers' `maskformer` type.

    Nested configurations are copied: the caller's objects are never changed.

    Args:
        backbone_config: Configuration (or its dictionary) of the backbone: `resnet`, `swin`, `maskformer-swin`,
            `maskformer-resnet` (the paper's ResNet-101c), or any type that `AutoBackbone` builds. Four feature maps are
            used, strides 4 to 32; a plain vision transformer gets a pyramid. Default: Swin-B, window 12.
        decoder_config: Configuration (or its dictionary) of type `detr`: `d_model`, `decoder_layers`,
            `decoder_attention_heads`, `decoder_ffn_dim`, `num_queries`, `dropout` and the like of the transformer
            decoder; its encoder and backbone fields are ignored here. Or of type `maskformer-transformer` for a model
            with transformer encoders or pre-norm, which transformers' class does not have.
        fpn_feature_size: Channels of the pixel decoder, a multiple of 32 (group normalisation).
        mask_feature_size: Channels of the pixel embeddings and of the mask embeddings (C of the paper's section 3.3).
        cross_entropy_weight: Weight of the classification loss.
        mask_weight: Weight of the focal mask loss.
        dice_weight: Weight of the dice mask loss.
        no_object_weight: Weight of the "no object" class in the cross-entropy, relative to the others.
        class_cost: Weight of the class probability in the matching cost.
        mask_cost: Weight of the focal term in the matching cost; None means `mask_weight`, as in the paper.
        dice_cost: Weight of the dice term in the matching cost; None means `dice_weight`, as in the paper.
        void_in_loss: How matching and losses treat void pixels (-1 in an index map, covered by no mask in a list,
            padding): as "background" of every mask, as in the paper, or not at all ("ignore").
        matching: "bipartite" assigns segments to queries by cost; "fixed", the paper's ablation, assigns class i to
            query i and needs as many queries as classes.
        train_num_points: Points sampled per mask for matching and mask losses; None uses all pixels, as the paper does.
            Mask2Former uses 12544.
        oversample_ratio: How many times as many candidates are drawn, from which the most uncertain are chosen.
        importance_sample_ratio: Fraction of the points chosen by uncertainty.
        deep_supervision: Apply the loss after every decoder layer, as the paper does.
        freeze_batch_norm: Freeze the statistics and parameters of the backbone's batch normalisation, as the paper
            does. Set it to False to train a backbone with batch normalisation from scratch.
        mask_padding: Mask the padding of a batch in the transformer decoder: queries do not attend to it, and positions
            are normalised by the image's own size. The paper's code does neither, so weights trained without it predict
            slightly differently with it.
        use_auxiliary_loss: transformers' name for `deep_supervision`; True enables it. Always False afterwards and in
            saved files, because transformers' own class crashes on True.
        output_auxiliary_logits: Return the logits after every decoder layer but the last.
        init_std, init_xavier_std: Kept for transformers' class; the paper's initialisation, used here, has no such
            parameters.

    Raises:
        ValueError: A value or combination is invalid; the message names the field and the remedy.
    """

    model_type = "maskformer"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "mask_feature_size"}
    # Swin-B, window 12, as in transformers' own MaskFormer: a file without a backbone means the same model in both.
    default_backbone: ClassVar[dict[str, Any]] = {
        "model_type": "swin",
        "image_size": 384,
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
        "drop_path_rate": 0.3,
    }
    files_of_auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_maskformer.MaskFormerConfig",
        "AutoModel": "modeling_maskformer.MaskFormerModel",
        "AutoModelForImageSegmentation": "modeling_maskformer.MaskFormerForInstanceSegmentation",
        "AutoModelForInstanceSegmentation": "modeling_maskformer.MaskFormerForInstanceSegmentation",
        "AutoModelForUniversalSegmentation": "modeling_maskformer.MaskFormerForInstanceSegmentation",
    }

    fpn_feature_size: int = 256
    mask_feature_size: int = 256
    cross_entropy_weight: float | int = 1.0
    mask_weight: float | int = 20.0
    dice_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    class_cost: float | int = 1.0
    mask_cost: float | int | None = None
    dice_cost: float | int | None = None
    void_in_loss: Literal["background", "ignore"] = "background"
    matching: Literal["bipartite", "fixed"] = "bipartite"
    train_num_points: int | None = None
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    deep_supervision: bool = True
    freeze_batch_norm: bool = True
    mask_padding: bool = False
    use_auxiliary_loss: bool | None = False
    output_auxiliary_logits: bool | None = None
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.decoder_config = _decoder_config(self.decoder_config)
        if self.use_auxiliary_loss:
            if not self.deep_supervision:
                raise ValueError(
                    "use_auxiliary_loss=True and deep_supervision=False contradict each other: both control the loss "
                    "after every decoder layer. Omit use_auxiliary_loss."
                )
            self.use_auxiliary_loss = False
        super().__post_init__(**kwargs)
        # transformers writes these two into its files; readers of the JSON may look for them.
        self.num_attention_heads = self.decoder_config.decoder_attention_heads
        self.num_hidden_layers = self.decoder_config.decoder_layers
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `ConfigWithCode`; `use_auxiliary_loss=True` enables `deep_supervision`."""
        if kwargs.get("use_auxiliary_loss"):
            kwargs.setdefault("deep_supervision", True)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_backbone(cls, backbone: str | PreTrainedConfig, **fields: Any) -> Self:
        """Builds a configuration around a backbone.

        Args:
            backbone: Its configuration, or a folder or Hub name that holds one, such as "microsoft/resnet-50".
            fields: The other fields of the configuration.
        """
        config = AutoConfig.from_pretrained(backbone) if isinstance(backbone, str) else backbone
        return cls(backbone_config=config, **fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved; a Swin backbone has the type that transformers gives it in its own files."""
        fields = super().to_dict()
        # Auxiliary losses enabled later have no effect here, and break transformers' class.
        fields["use_auxiliary_loss"] = False
        if "auxiliary_loss" in fields["decoder_config"]:
            fields["decoder_config"]["auxiliary_loss"] = False
        # Under the other name, transformers' MaskFormerModel misses the backbone's tensors in a full checkpoint.
        if fields["backbone_config"]["model_type"] == "swin":
            fields["backbone_config"]["model_type"] = "maskformer-swin"
        return fields

    @property
    def matching_costs(self) -> dict[str, float]:
        """The weights of the matching cost, with None resolved to the weight of the corresponding loss."""
        return {
            "class_cost": self.class_cost,
            "mask_cost": self.mask_weight if self.mask_cost is None else self.mask_cost,
            "dice_cost": self.dice_weight if self.dice_cost is None else self.dice_cost,
        }

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The arguments of `MaskFormerLoss`, by name."""
        return {name: getattr(self, name) for name in LOSS_FIELDS} | self.matching_costs

    def _check(self) -> None:
        check_loss(self.loss_settings)
        check_sizes(self)
        if self.matching == "fixed" and self.decoder_config.num_queries != self.num_labels:
            raise ValueError(
                "matching='fixed' gives every class its own query, but decoder_config.num_queries is "
                f"{self.decoder_config.num_queries} and there are {self.num_labels} labels. Set num_queries to "
                f"{self.num_labels}."
            )


def _decoder_config(value: Any) -> PreTrainedConfig:
    # transformers' own files may leave the type out.
    config = nested_config(
        {"model_type": "detr", **value} if isinstance(value, dict) else value, "decoder_config", DETR
    )
    if config.model_type not in ("detr", MaskFormerTransformerConfig.model_type):
        raise ValueError(
            f"decoder_config is of type {config.model_type!r}, but must be of type 'detr' or "
            f"{MaskFormerTransformerConfig.model_type!r}."
        )
    # transformers' decoder normalises twice when this is set, so the same weights predict differently.
    if getattr(config, "auxiliary_loss", False):
        config.auxiliary_loss = False
    return config
