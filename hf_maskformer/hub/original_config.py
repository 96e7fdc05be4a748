"""Reads the YAML files of the paper's code: every field that affects the model is translated, or rejected."""

from pathlib import Path
from typing import Any

from transformers import DetrConfig, PreTrainedConfig, ResNetConfig, SwinConfig

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_maskformer_parts import MAX_SIZE, MaskFormerResNetConfig, MaskFormerTransformerConfig
from ..configuration_per_pixel_baseline import PerPixelBaselineConfig
from ..data.labels import LabelSet
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..training.presets import DATA_SETS, config_label_fields, label_map_settings, task_settings
from .yaml_files import flatten, read_yaml

STAGES = ["res2", "res3", "res4", "res5"]
RESNET_DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
# The fields that are read, with the default where a file does not set them.
DEFAULTS: dict[str, Any] = {
    "DATASETS.TEST": [],
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.RES4_DILATION": 1,
    "MODEL.RESNETS.RES5_MULTI_GRID": [1, 2, 4],
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STEM_TYPE": "deeplab",
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False] * 4,
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.OUT_FEATURES": STAGES,
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 20.0,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.DROPOUT": 0.1,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.ENC_LAYERS": 0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 6,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    "MODEL.MASK_FORMER.TEST.SEMANTIC_INFERENCE_METHOD": "probabilistic",  # in the first files; later always so
}
TRANSFORMER_PIXEL_DECODER = "TransformerEncoderPixelDecoder"
BASELINE_HEADS = ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"]
# The supported values of fields that have no counterpart in our configuration.
FIXED_VALUES: dict[str, list[Any]] = {
    "INPUT.FORMAT": ["RGB"],
    "MODEL.META_ARCHITECTURE": ["MaskFormer", "SemanticSegmentor"],
    "MODEL.BACKBONE.NAME": ["build_resnet_backbone", "build_resnet_deeplab_backbone", "D2SwinTransformer"],
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": [STAGES],
    "MODEL.SEM_SEG_HEAD.NORM": ["GN"],
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": ["BasePixelDecoder", TRANSFORMER_PIXEL_DECODER],
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": [False],
    "MODEL.MASK_FORMER.TEST.SEMANTIC_INFERENCE_METHOD": ["probabilistic"],
}
BASELINE_VALUES: dict[str, list[Any]] = {
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": [4],
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": [1.0],
}
RESNET_VALUES: dict[str, list[Any]] = {
    "MODEL.RESNETS.DEPTH": list(RESNET_DEPTHS),
    "MODEL.RESNETS.NORM": ["FrozenBN", "BN", "SyncBN"],
    "MODEL.RESNETS.OUT_FEATURES": [STAGES],
    "MODEL.RESNETS.NUM_GROUPS": [1],
    "MODEL.RESNETS.RES4_DILATION": [1],
    "MODEL.RESNETS.RES5_DILATION": [1],
    "MODEL.RESNETS.STEM_TYPE": ["basic", "deeplab"],
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [[False] * 4],
}
SWIN_VALUES: dict[str, list[Any]] = {
    "MODEL.SWIN.PATCH_SIZE": [4],
    "MODEL.SWIN.QK_SCALE": [None],
    "MODEL.SWIN.APE": [False],
    "MODEL.SWIN.PATCH_NORM": [True],
    "MODEL.SWIN.OUT_FEATURES": [STAGES],
}
# The sections that only the paper's code has: unknown fields there belong to another model.
OWN_SECTIONS = ("MODEL.MASK_FORMER.", "MODEL.SWIN.")


class OriginalConfig:
    """One configuration of the paper's code; `config` and `image_processor` translate it.

    Args:
        path: a YAML file, complete or with `_BASE_`, the file (relative to it) whose values it overrides.

    Raises:
        ValueError: A field, which is named, has an unsupported value, or the files are damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.values = {**DEFAULTS, **flatten(read_yaml(self.path))}
        unknown = [key for key in self.values if key.startswith(OWN_SECTIONS) and key not in DEFAULTS]
        if unknown:
            raise ValueError(
                f"{self.path} has {', '.join(unknown)}, which MaskFormer does not have. Is it another model's file?"
            )
        self._check_kinds()
        self._check_fixed_values()

    @property
    def labels(self) -> LabelSet | None:
        """The classes of a data set that the file names, if known here and equal in number."""
        given = self["DATASETS.TEST"]
        names = given if isinstance(given, list | tuple) else [given]
        for data_set in DATA_SETS.values():
            if data_set.original_name in names and data_set.num_labels == self._num_labels:
                return data_set.labels()
        return None

    def config(self, labels: LabelSet | None = None) -> MaskFormerConfig | PerPixelBaselineConfig:
        """The model's configuration. Raises a ValueError if the number of labels is not that of the file's classes."""
        if labels is not None and labels.num_labels != self._num_labels:
            raise ValueError(
                f"{labels.num_labels} classes are given, but MODEL.SEM_SEG_HEAD.NUM_CLASSES of {self.path} is "
                f"{self._num_labels}. Give all of them, in the order of the training."
            )
        fields: dict[str, Any] = {
            "backbone_config": self._swin() if self._is_swin else self._resnet(),
            "decoder_config": self._transformer(),
            "fpn_feature_size": self["MODEL.SEM_SEG_HEAD.CONVS_DIM"],
            "mask_feature_size": self["MODEL.SEM_SEG_HEAD.MASK_DIM"],
            "deep_supervision": self["MODEL.MASK_FORMER.DEEP_SUPERVISION"],
            "freeze_batch_norm": self["MODEL.RESNETS.NORM"] == "FrozenBN",
            **config_label_fields(labels or self.labels, self._num_labels),
        }
        if self._is_baseline:
            ignored = self["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"] if labels is None else labels.ignore_index
            return PerPixelBaselineConfig(semantic_loss_ignore_index=ignored, **fields)
        return MaskFormerConfig(
            mask_weight=self["MODEL.MASK_FORMER.MASK_WEIGHT"],
            dice_weight=self["MODEL.MASK_FORMER.DICE_WEIGHT"],
            no_object_weight=self["MODEL.MASK_FORMER.NO_OBJECT_WEIGHT"],
            **fields,
        )

    def image_processor(self, labels: LabelSet | None = None) -> MaskFormerImageProcessor:
        """The image processor: sizes, padding and normalisation as in the paper's inference."""
        sizes = {"shortest_edge": self["INPUT.MIN_SIZE_TEST"], "longest_edge": self["INPUT.MAX_SIZE_TEST"]}
        return MaskFormerImageProcessor(
            # There, 0 disables resizing.
            **({"size": sizes} if sizes["shortest_edge"] else {"do_resize": False}),
            size_divisor=self._size_divisor,
            image_mean=[value / 255 for value in self["MODEL.PIXEL_MEAN"]],
            image_std=[value / 255 for value in self["MODEL.PIXEL_STD"]],
            num_labels=self._num_labels,
            **task_settings(self._panoptic_thresholds),
            **label_map_settings(labels or self.labels, self["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"]),
        )

    def _check_kinds(self) -> None:
        """Rejects values of another type than the default of their field."""
        for key, default in DEFAULTS.items():
            if not _is_alike(self[key], default):
                raise ValueError(
                    f"{self.path} has {key} {str(self[key])[:60]!r}, but a value like {default!r} is expected."
                )

    def _check_fixed_values(self) -> None:
        """Rejects unsupported values, naming the field."""
        known = dict(FIXED_VALUES) | (SWIN_VALUES if self._is_swin else RESNET_VALUES)
        known["MODEL.SEM_SEG_HEAD.NAME"] = BASELINE_HEADS if self._is_baseline else ["MaskFormerHead"]
        if self._is_baseline:
            known |= BASELINE_VALUES
        if self["MODEL.SEM_SEG_HEAD.NAME"] == "PerPixelBaselineHead":
            known["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"] = ["BasePixelDecoder"]
        else:
            known |= self._known_transformer_values()
        if not self._is_swin:
            known["MODEL.RESNETS.RES2_OUT_CHANNELS"] = [4 * self["MODEL.RESNETS.WIDTH_PER_GROUP"]]
        for key, values in known.items():
            if not any(self._takes(key, value) for value in values):
                shown = " or ".join(repr(value) for value in values)
                raise ValueError(
                    f"{self.path} has {key} {self[key]!r}, but only {shown} is supported. It cannot be converted."
                )

    def _known_transformer_values(self) -> dict[str, list[Any]]:
        known: dict[str, list[Any]] = {}
        has_encoder = self["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"] == TRANSFORMER_PIXEL_DECODER
        known["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE"] = ["transformer_encoder" if has_encoder else "res5"]
        if has_encoder and self["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"] < 1:
            # Without layers, that decoder still projects its input.
            known["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"] = ["at least 1"]
        if self._transformer_in_channels(has_encoder) == self["MODEL.MASK_FORMER.HIDDEN_DIM"]:
            # It would force a projection that matching widths do not need.
            known["MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ"] = [False]
        if self["MODEL.SEM_SEG_HEAD.NAME"] == "PerPixelBaselinePlusHead":
            known["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"] = [self._num_labels]
        return known

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def _takes(self, key: str, value: Any) -> bool:
        """Whether a field has this value; lists and tuples are equivalent."""
        given = self[key]
        return (list(given) if isinstance(given, tuple) else given) == value

    @property
    def _num_labels(self) -> int:
        return self["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]

    @property
    def _is_swin(self) -> bool:
        return self["MODEL.BACKBONE.NAME"] == "D2SwinTransformer"

    @property
    def _is_baseline(self) -> bool:
        return self["MODEL.META_ARCHITECTURE"] == "SemanticSegmentor"

    @property
    def _size_divisor(self) -> int:
        divisor = self["MODEL.MASK_FORMER.SIZE_DIVISIBILITY"]
        if divisor < 0 or self._is_baseline:
            return 32 if self._is_swin else 0
        return divisor

    @property
    def _panoptic_thresholds(self) -> dict[str, float] | None:
        if not self["MODEL.MASK_FORMER.TEST.PANOPTIC_ON"]:
            return None
        return {
            "threshold": self["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD"],
            "overlap_mask_area_threshold": self["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD"],
        }

    def _swin(self) -> PreTrainedConfig:
        return SwinConfig(
            image_size=self["MODEL.SWIN.PRETRAIN_IMG_SIZE"],
            patch_size=self["MODEL.SWIN.PATCH_SIZE"],
            embed_dim=self["MODEL.SWIN.EMBED_DIM"],
            depths=list(self["MODEL.SWIN.DEPTHS"]),
            num_heads=list(self["MODEL.SWIN.NUM_HEADS"]),
            window_size=self["MODEL.SWIN.WINDOW_SIZE"],
            mlp_ratio=self["MODEL.SWIN.MLP_RATIO"],
            qkv_bias=self["MODEL.SWIN.QKV_BIAS"],
            hidden_dropout_prob=self["MODEL.SWIN.DROP_RATE"],
            attention_probs_dropout_prob=self["MODEL.SWIN.ATTN_DROP_RATE"],
            drop_path_rate=self["MODEL.SWIN.DROP_PATH_RATE"],
        )

    def _resnet(self) -> PreTrainedConfig:
        depths = RESNET_DEPTHS[self["MODEL.RESNETS.DEPTH"]]
        width = self["MODEL.RESNETS.RES2_OUT_CHANNELS"]
        fields = {
            "depths": depths,
            "hidden_sizes": [width * 2**stage for stage in range(4)],
            "embedding_size": self["MODEL.RESNETS.STEM_OUT_CHANNELS"],
            "downsample_in_bottleneck": self["MODEL.RESNETS.STRIDE_IN_1X1"],
        }
        # The plain builder supports neither of the two.
        is_deeplab = self["MODEL.BACKBONE.NAME"] == "build_resnet_deeplab_backbone"
        deep_stem = is_deeplab and self["MODEL.RESNETS.STEM_TYPE"] == "deeplab"
        dilations = list(self["MODEL.RESNETS.RES5_MULTI_GRID"]) if is_deeplab else [1, 1, 1]
        if not deep_stem and dilations == [1, 1, 1]:
            return ResNetConfig(**fields)
        return MaskFormerResNetConfig(deep_stem=deep_stem, last_stage_dilations=dilations, **fields)

    def _transformer(self) -> PreTrainedConfig | None:
        if self["MODEL.SEM_SEG_HEAD.NAME"] == "PerPixelBaselineHead":
            return None
        fields = {
            "d_model": self["MODEL.MASK_FORMER.HIDDEN_DIM"],
            "num_queries": self["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"],
            "decoder_layers": self["MODEL.MASK_FORMER.DEC_LAYERS"],
            "decoder_attention_heads": self["MODEL.MASK_FORMER.NHEADS"],
            "decoder_ffn_dim": self["MODEL.MASK_FORMER.DIM_FEEDFORWARD"],
            "dropout": self["MODEL.MASK_FORMER.DROPOUT"],
            # There, dropout also applies to attention weights and to the activations of the feed-forward network.
            "attention_dropout": self["MODEL.MASK_FORMER.DROPOUT"],
            "activation_dropout": self["MODEL.MASK_FORMER.DROPOUT"],
        }
        more = {
            "encoder_layers": self["MODEL.MASK_FORMER.ENC_LAYERS"],
            "pixel_decoder_layers": self._pixel_decoder_layers,
            "pre_norm": self["MODEL.MASK_FORMER.PRE_NORM"],
        }
        if not any(more.values()) and not self._is_baseline:
            return DetrConfig(**fields)
        if more["encoder_layers"] or more["pixel_decoder_layers"]:
            # There, encoders have the width and number of heads of the decoder.
            more["encoder_attention_heads"] = fields["decoder_attention_heads"]
            more["encoder_ffn_dim"] = fields["decoder_ffn_dim"]
        return MaskFormerTransformerConfig(**fields, **more)

    def _transformer_in_channels(self, has_encoder: bool) -> int:
        if has_encoder:
            return self["MODEL.SEM_SEG_HEAD.CONVS_DIM"]
        return 8 * self["MODEL.SWIN.EMBED_DIM" if self._is_swin else "MODEL.RESNETS.RES2_OUT_CHANNELS"]

    @property
    def _pixel_decoder_layers(self) -> int:
        if self["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"] != TRANSFORMER_PIXEL_DECODER:
            return 0
        return self["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"]


def _is_alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default, and no number is far larger than in any model."""
    if isinstance(default, list):
        # DATASETS.TEST may be written in several ways.
        return not default or (isinstance(value, list | tuple) and all(_is_alike(item, default[0]) for item in value))
    if isinstance(default, bool | str | None):
        return default is None or isinstance(value, type(default))
    types = int if isinstance(default, int) else int | float
    return isinstance(value, types) and not isinstance(value, bool) and abs(value) <= MAX_SIZE
