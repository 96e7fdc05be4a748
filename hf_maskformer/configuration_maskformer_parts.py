"""Nested configurations: transformers' own, and ours for what its MaskFormer cannot express.

Our own types are known only to this file. A checkpoint that needs one therefore makes transformers' class fail, instead
of loading with weights missing.
"""

import copy
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, ResNetConfig, TimmBackboneConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
from transformers.utils import logging

logger = logging.get_logger(__name__)

NUM_FEATURE_MAPS = 4  # strides 4, 8, 16, 32
GROUP_NORM_GROUPS = 32
# Far above any model; a file that asks for more would exhaust memory, or time, before its first tensor is read.
MAX_SIZE = 2**16
MAX_LAYERS = 512
MAX_NESTING = 8
MAX_WINDOW = 64  # a table for each pair of pixels in a window
# More points than a mask has pixels add nothing, and each takes memory.
MAX_POINTS = 2**20
MAX_OVERSAMPLING = 100
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Plain vision transformers: all feature maps have the stride of the patches, so a pyramid is built on the last.
PLAIN_BACKBONES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
# Names that every configuration accepts besides its fields.
PASSED_ON = ("num_labels", "torch_dtype", "attn_implementation", "experts_implementation", "output_attentions")


@strict
class MaskFormerTransformerConfig(PreTrainedConfig):
    r"""Configuration of the transformers of a MaskFormer, with fields that transformers' type `detr` lacks.

    Args:
        d_model: Width of the queries.
        num_queries: Number of queries, and thus of predicted masks.
        pixel_decoder_layers: Encoder layers on the stride-32 features inside the pixel decoder; the queries then attend
            to their output. 6 in the paper's panoptic models with a ResNet. Their width is `fpn_feature_size`.
        encoder_layers: Encoder layers between the features and the decoder.
        encoder_attention_heads, encoder_ffn_dim: Of every encoder layer, of both kinds.
        decoder_layers, decoder_attention_heads, decoder_ffn_dim: Of the decoder.
        pre_norm: Normalise the input of every sublayer instead of its output.
        dropout: On every sublayer's output.
        attention_dropout: On the attention weights.
        activation_dropout: Inside the feed-forward networks.
        activation_function: Of the feed-forward networks.
    """

    model_type = "maskformer-transformer"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model"}

    d_model: int = 256
    num_queries: int = 100
    pixel_decoder_layers: int = 0
    encoder_layers: int = 0
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    pre_norm: bool = False
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    activation_function: str = "relu"


@strict
class MaskFormerResNetConfig(ResNetConfig):
    r"""Configuration of a ResNet with the changes that the paper's ResNet-101c has (section 4.1, after DeepLab).

    Args:
        deep_stem: Three 3x3 convolutions instead of one 7x7; the first two have `embedding_size` / 2 channels.
        last_stage_dilations: Dilation of the 3x3 convolution in each layer of the last stage, which keeps its stride.
    """

    model_type = "maskformer-resnet"

    embedding_size: int = 128
    depths: list[int] | tuple[int, ...] | None = (3, 4, 23, 3)
    deep_stem: bool = True
    last_stage_dilations: list[int] | tuple[int, ...] = (1, 2, 4)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.last_stage_dilations = list(self.last_stage_dilations)
        depth = list(self.depths or [])[-1]
        if len(self.last_stage_dilations) != depth or min(self.last_stage_dilations) < 1:
            raise ValueError(
                f"last_stage_dilations is {self.last_stage_dilations}, but must hold one number of at least 1 for each "
                f"of the {depth} layers of the last stage. {[1] * depth} is a plain ResNet."
            )


@strict
class SimpleFeaturePyramidConfig(PreTrainedConfig):
    r"""Configuration of a plain vision transformer whose last feature map is turned into a pyramid (arXiv 2203.16527).

    Args:
        backbone_config: Configuration (or its dictionary) of the vision transformer. Default: DINOv2-B.
    """

    model_type = "maskformer-simple-feature-pyramid"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    backbone_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers builds every configuration with its defaults when it saves one.
        default = {"model_type": PLAIN_BACKBONES[0]}
        self.backbone_config = nested_config(self.backbone_config, "backbone_config.backbone_config", default)
        if self.backbone_config.model_type not in PLAIN_BACKBONES:
            raise ValueError(
                f"backbone_config.backbone_config is of type {self.backbone_config.model_type!r}, but a pyramid needs "
                f"one of {', '.join(PLAIN_BACKBONES)}. Other backbones have their own: give them directly."
            )
        super().__post_init__(**kwargs)


OWN_TYPES: dict[str, type[PreTrainedConfig]] = {
    config_class.model_type: config_class
    for config_class in (MaskFormerTransformerConfig, MaskFormerResNetConfig, SimpleFeaturePyramidConfig)
}


def is_of_type(config: PreTrainedConfig | None, config_class: type[PreTrainedConfig]) -> bool:
    """Whether there is a configuration and it is of this type of our own.

    The model checks this instead of `isinstance`: transformers imports code that came with a checkpoint twice, once for
    the configuration and once for the model.
    """
    return config is not None and config.model_type == config_class.model_type


def nested_config(value: Any, field: str, default: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Returns a private copy of a nested configuration, in whatever form the caller gave it.

    Args:
        value: A configuration, its dictionary with a `model_type`, or None for the default.
        field: Its name, for messages.
        default: What None means.

    Raises:
        ValueError: It is something else, of an unknown type, or has an invalid value.
    """
    if isinstance(value, PreTrainedConfig):
        check_fields(value.to_dict(), field)
        _check_values(value, field)
        return copy.deepcopy(value)
    if not isinstance(value, dict | None):
        raise ValueError(f"{field} is a {type(value).__name__}, but must be a configuration or its dictionary.")
    fields = copy.deepcopy(default or {} if value is None else value)
    check_fields(fields, field)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in OWN_TYPES.keys() | CONFIG_MAPPING.keys():
        raise ValueError(
            f"{field} has model_type {model_type!r}, which the installed transformers does not know. "
            "Give the model_type of a configuration, such as 'resnet' or 'swin' for backbone_config."
        )
    config_class = OWN_TYPES[model_type] if model_type in OWN_TYPES else CONFIG_MAPPING[model_type]
    with errors_as_value_errors(field):
        config = config_class(**fields)
    if model_type in OWN_TYPES:
        warn_of_misspelt_fields(config, fields, f"{field}.")
    _check_values(config, field)
    return config


def _check_values(config: PreTrainedConfig, field: str) -> None:
    """Raises a ValueError for what would fail only in the model, or in its first training step."""
    for name, value in vars(config).items():
        where = f"{field}.{name}"
        # NaN is a number here, and a flag is not.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if "dropout" in name and is_number and not 0 <= value <= 1:
            raise ValueError(f"{where} is {value}, but must be a probability.")
        # Drop path divides what it keeps by the keep probability.
        if name == "drop_path_rate" and is_number and not 0 <= value < 1:
            raise ValueError(f"{where} is {value}, but must be a probability below 1.")
        if name in ("hidden_act", "activation_function") and isinstance(value, str) and value not in ACT2FN:
            raise ValueError(f"{where} is {value!r}, which is unknown. Known are {', '.join(sorted(ACT2FN))}.")
        if name == "num_channels" and isinstance(value, int) and value < 1:
            raise ValueError(f"{where} is {value}, but must be at least 1.")


@contextmanager
def errors_as_value_errors(source: str) -> Iterator[None]:
    """Turns whatever error a configuration's class raises for a wrong type into a ValueError."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise ValueError(f"{source} has a field of a wrong type or value ({problem}). Correct or remove it.") from error


def check_fields(fields: dict[str, Any], source: str) -> None:
    """Checks what a file holds before it becomes a configuration.

    Raises:
        ValueError: A field would replace a method, or holds a number far above that of any model; `source` names it.
    """
    for name, value in fields.items():
        where = f"{source}.{name}"
        if callable(getattr(PreTrainedConfig, str(name), None)):
            raise ValueError(f"{where} is the name of a method, not of a field. Remove it.")
        if str(name) in ATTENTION_FIELDS and "/" in str(value):
            raise ValueError(f"{where} is {value!r}, code of the Hub, which no file may request. Remove it.")
        highest = max((abs(number) for number in _numbers(value, where)), default=0)
        if highest > MAX_SIZE:
            raise ValueError(f"{where} is {str(value)[:60]}, but no number there may exceed {MAX_SIZE}.")
        # num_hidden_layers, depths, num_encoder_blocks and the like.
        if (
            any(part in str(name) for part in ("layers", "depth", "blocks"))
            and sum(_numbers(value, where)) > MAX_LAYERS
        ):
            raise ValueError(f"{where} is {str(value)[:60]}, but there may be at most {MAX_LAYERS} layers in all.")


def _numbers(value: Any, where: str, depth: int = 0) -> Iterator[float]:
    """The numbers in a field."""
    if depth > MAX_NESTING:
        raise ValueError(f"{where} is nested more than {MAX_NESTING} deep, as no configuration is.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item, where, depth + 1)


def warn_of_misspelt_fields(config: PreTrainedConfig, given: Iterable[str], prefix: str = "") -> None:
    """Warns of given names that are almost, but not quite, fields of a configuration.

    transformers keeps any name as an attribute, and files may hold names from other versions: none is rejected.
    """
    known = {*config.__dataclass_fields__, *config.attribute_map, *PASSED_ON}
    for name in given:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if nearest and nearest != [name]:
            logger.warning(
                f"{prefix}{name} is not a field of {type(config).__name__} and has no effect. Did you mean "
                f"{prefix}{nearest[0]}?"
            )


def warn_of_misplaced_fields(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Warns of names that are fields of `decoder_config` and have a different value there."""
    decoder = config.decoder_config
    fields = set() if decoder is None else decoder.__dataclass_fields__.keys() - config.__dataclass_fields__.keys()
    for name in given.keys() & fields - {"model_type", "num_attention_heads", "num_hidden_layers"}:  # written by both
        value = given[name]
        if getattr(decoder, name) != value:
            logger.warning(
                f"{name}={value} has no effect here: it is a field of decoder_config, which has "
                f"{getattr(decoder, name)}. Set it there."
            )


def make_backbone_config(value: Any, default: dict[str, Any]) -> PreTrainedConfig:
    """Builds a backbone configuration with four feature maps from what the user gave (None: the default).

    A plain vision transformer is wrapped in a `SimpleFeaturePyramidConfig`. Raises a ValueError for anything but a
    backbone, or for one that cannot give the pixel decoder its four maps.
    """
    config = nested_config(value, "backbone_config", default)
    _check_is_backbone(config)
    # As a file gives them: some backbones of transformers add lists to their own tuples.
    for name in config.__dataclass_fields__:
        if isinstance(getattr(config, name, None), tuple):
            setattr(config, name, list(getattr(config, name)))
    if config.model_type == "timm_wrapper":
        # AutoConfig turns a timm model into a classifier.
        config = TimmBackboneConfig(backbone=config.architecture)
    if config.model_type in PLAIN_BACKBONES:
        config = SimpleFeaturePyramidConfig(backbone_config=config)
    if config.model_type == SimpleFeaturePyramidConfig.model_type:
        return config
    stage_names = getattr(config, "stage_names", None)
    # A backbone's configuration defaults to a single output; nobody can mean that here.
    if stage_names is not None and len(config.out_features) == 1:
        stages = [name for name in stage_names if name != "stem"]
        config.out_features = stages[-NUM_FEATURE_MAPS:]
    if config.model_type == "timm_backbone" and len(config.out_indices) == 1:
        config.out_indices = list(range(-NUM_FEATURE_MAPS, 0))
    if config.model_type in ("swin", "maskformer-swin"):
        _check_swin(config)
    if config.model_type in ("resnet", MaskFormerResNetConfig.model_type):
        _check_resnet(config)
    out_features = getattr(config, "out_features", None)
    if out_features is not None and len(out_features) != NUM_FEATURE_MAPS:
        raise ValueError(
            f"backbone_config.out_features is {out_features}, but the pixel decoder takes {NUM_FEATURE_MAPS} feature "
            "maps (strides 4, 8, 16, 32). Leave it out to get the last four stages."
        )
    return config


def _check_is_backbone(config: PreTrainedConfig) -> None:
    """Raises a ValueError for a transformers type that is not a backbone; others are left to `AutoBackbone`."""
    is_other = config.model_type in CONFIG_MAPPING_NAMES.keys() - MODEL_FOR_BACKBONE_MAPPING_NAMES.keys()
    is_other &= config.model_type != "timm_wrapper" and "AutoBackbone" not in (getattr(config, "auto_map", None) or {})
    if is_other or config.model_type == MaskFormerTransformerConfig.model_type:
        inner = getattr(config, "backbone_config", None)
        remedy = "Give its own backbone_config." if inner is not None else "docs/architectures.md lists some."
        raise ValueError(f"backbone_config is of type {config.model_type!r}, which is not a backbone. {remedy}")


def refuse_backbone_by_name(backbone_config: Any, fields: Mapping[str, Any]) -> None:
    """Raises a ValueError where transformers would look up the backbone's configuration by its name.

    The name alone would be stored as a field without effect, beside the default backbone.
    """
    name = fields.get("backbone")
    if name is not None and backbone_config is None:
        raise ValueError(
            f"backbone={name!r} names a backbone, but its configuration is needed: give "
            f"backbone_config=AutoConfig.from_pretrained({name!r}), or, for a timm model, "
            f"TimmBackboneConfig(backbone={name!r})."
        )


def _check_resnet(config: PreTrainedConfig) -> None:
    if len(config.hidden_sizes) != len(config.depths):
        raise ValueError(
            f"backbone_config has hidden_sizes {list(config.hidden_sizes)} and depths {list(config.depths)}, but each "
            "stage has one of each: give equally many."
        )


def _check_swin(config: PreTrainedConfig) -> None:
    if len(config.depths) != NUM_FEATURE_MAPS or len(config.num_heads) != NUM_FEATURE_MAPS:
        raise ValueError(
            f"backbone_config has depths {list(config.depths)} and num_heads {list(config.num_heads)}, but a Swin "
            f"backbone has {NUM_FEATURE_MAPS} stages: give {NUM_FEATURE_MAPS} numbers each."
        )
    if not 1 <= config.window_size <= MAX_WINDOW:
        raise ValueError(f"backbone_config.window_size is {config.window_size}, but must be 1 to {MAX_WINDOW}.")
    for stage, num_heads in enumerate(config.num_heads):
        if num_heads < 1 or (config.embed_dim * 2**stage) % num_heads:
            raise ValueError(
                f"backbone_config.num_heads[{stage}] is {num_heads}, which does not divide the width "
                f"{config.embed_dim * 2**stage} of that stage."
            )
    if config.use_absolute_embeddings:
        raise ValueError("backbone_config.use_absolute_embeddings is True, but MaskFormer's Swin has no such weights.")


def check_num_labels(num_labels: Any) -> None:
    """Raises a ValueError for an invalid number of labels, before names are generated for them."""
    if num_labels is not None and (not isinstance(num_labels, int) or not 1 <= num_labels <= MAX_SIZE):
        raise ValueError(f"num_labels is {str(num_labels)[:60]!r}, but must be an integer from 1 to {MAX_SIZE}.")


def check_labels(id2label: Any) -> None:
    """Raises a ValueError unless there are labels, with the ids 0 to K - 1."""
    if not id2label:
        raise ValueError("id2label is empty, but a model needs at least one class. Give id2label or num_labels.")
    if sorted(id2label) != list(range(len(id2label))):
        more = "..." if len(id2label) > 10 else ""
        raise ValueError(
            f"id2label has the ids {sorted(id2label)[:10]}{more}, but the ids must be 0 to "
            f"{len(id2label) - 1} without gaps ('no object' is added by the model and needs no id)."
        )


def check_loss(settings: Mapping[str, Any]) -> None:
    """Raises a ValueError for invalid settings of the loss, by their names in `MaskFormerLoss`."""
    for name, known in (("void_in_loss", ("background", "ignore")), ("matching", ("bipartite", "fixed"))):
        if settings[name] not in known:
            raise ValueError(f"{name} is {settings[name]!r}, but must be {known[0]!r} or {known[1]!r}.")
    weights = ("cross_entropy_weight", "mask_weight", "dice_weight")
    costs = ("class_cost", "mask_cost", "dice_cost")
    for name in (*weights, *costs):
        if not _is_number(settings[name]) or settings[name] < 0:
            raise ValueError(f"{name} is {settings[name]}, but must be a finite number of at least 0.")
    # At 0 an image without segments would divide 0 by 0 in the weighted mean of the cross-entropy.
    if not _is_number(settings["no_object_weight"]) or settings["no_object_weight"] <= 0:
        raise ValueError(
            f"no_object_weight is {settings['no_object_weight']}, but must be a finite number above 0 (the paper's is "
            "0.1)."
        )
    if not any(settings[name] for name in weights):
        raise ValueError(
            "cross_entropy_weight, mask_weight and dice_weight are all 0, so the loss is 0. Set one above 0."
        )
    if not any(settings[name] for name in costs):
        raise ValueError(
            "class_cost, mask_cost and dice_cost are all 0, so every matching costs the same. Set one above 0."
        )
    num_points, oversample_ratio = settings["train_num_points"], settings["oversample_ratio"]
    if num_points is not None and (not isinstance(num_points, int) or not 1 <= num_points <= MAX_POINTS):
        raise ValueError(
            f"train_num_points is {num_points}, but must be a whole number from 1 to {MAX_POINTS}, or None to compare "
            "all pixels."
        )
    if not _is_number(oversample_ratio) or not 1 <= oversample_ratio <= MAX_OVERSAMPLING:
        raise ValueError(f"oversample_ratio is {oversample_ratio}, but must be a number from 1 to {MAX_OVERSAMPLING}.")
    if not _is_number(settings["importance_sample_ratio"]) or not 0 <= settings["importance_sample_ratio"] <= 1:
        raise ValueError(f"importance_sample_ratio is {settings['importance_sample_ratio']}, but must be from 0 to 1.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_sizes(config: PreTrainedConfig) -> None:
    """Raises a ValueError for widths and numbers of heads for which the model cannot be built."""
    for field in ("fpn_feature_size", "mask_feature_size"):
        if not 1 <= getattr(config, field) <= MAX_SIZE:
            raise ValueError(f"{field} is {getattr(config, field)}, but must be 1 to {MAX_SIZE}.")
    if config.fpn_feature_size % GROUP_NORM_GROUPS:
        raise ValueError(
            f"fpn_feature_size is {config.fpn_feature_size}, but must be a multiple of {GROUP_NORM_GROUPS}, "
            "the number of groups of the pixel decoder's normalisation."
        )
    transformer = config.decoder_config
    if transformer is not None:
        _check_transformer(transformer)
    if isinstance(transformer, MaskFormerTransformerConfig) and transformer.pixel_decoder_layers:
        heads = transformer.encoder_attention_heads
        _check_heads(config.fpn_feature_size, heads, "fpn_feature_size", "decoder_config.encoder_attention_heads")


def _check_transformer(config: PreTrainedConfig) -> None:
    for field in ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "num_queries"):
        if getattr(config, field) < 1:
            raise ValueError(f"decoder_config.{field} is {getattr(config, field)}, but must be at least 1.")
    _check_heads(config.d_model, config.decoder_attention_heads, "decoder_config.d_model", "decoder_attention_heads")
    if config.model_type == "detr" and config.position_embedding_type != "sine":
        raise ValueError(
            f"decoder_config.position_embedding_type is {config.position_embedding_type!r}, but MaskFormer has only "
            "'sine'."
        )
    if isinstance(config, MaskFormerTransformerConfig):
        for field in ("pixel_decoder_layers", "encoder_layers"):
            if getattr(config, field) < 0:
                raise ValueError(f"decoder_config.{field} is {getattr(config, field)}, but must be at least 0.")
        if config.encoder_layers:
            heads = config.encoder_attention_heads
            _check_heads(config.d_model, heads, "decoder_config.d_model", "encoder_attention_heads")


def _check_heads(width: int, num_heads: int, width_field: str, heads_field: str) -> None:
    if num_heads < 1 or width % num_heads or width % 4:
        raise ValueError(
            f"{width_field} is {width}, but must be a multiple of {heads_field} ({num_heads}) and of 4 (sine and "
            "cosine of two coordinates)."
        )
