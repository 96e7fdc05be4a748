"""The models of the paper's tables and model zoo by name: architecture, classes, loss.

Two small tables, of data sets and of backbones, and one row for each model that combines them. The loss weights are the
paper's for all, which are the defaults of the configurations.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import DetrConfig, PreTrainedConfig, ResNetConfig, SwinConfig

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig
from ..configuration_per_pixel_baseline import PerPixelBaselineConfig
from ..data.labels import LabelSet
from ..data.layouts import named_labels
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..modeling_maskformer import MaskFormerForInstanceSegmentation
from ..modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation

Config = MaskFormerConfig | PerPixelBaselineConfig
Model = MaskFormerForInstanceSegmentation | PerPixelBaselineForSemanticSegmentation

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/maskformer"


@dataclass(frozen=True)
class DataSet:
    """What a model must know about the data it is trained on.

    Attributes:
        title: its display name.
        original_name: its validation split in the paper's code.
        folder: its folder in the model zoo.
        num_labels: number of classes.
        test_size: shortest and longest edge, in pixels, to which images are scaled.
        size_divisor: batches are padded to multiples of this.
        ignore_index: value of unlabelled pixels in the label maps.
        do_reduce_labels: whether label maps count from 1 and 0 is unlabelled.
        label_names: file with names and thing ids; without one, classes are called LABEL_0, LABEL_1, ...
        panoptic_thresholds: for a panoptic data set, the paper's post-processing thresholds.
    """

    title: str
    original_name: str
    folder: str
    num_labels: int
    test_size: tuple[int, int]
    size_divisor: int = 32
    ignore_index: int = 255
    do_reduce_labels: bool = False
    label_names: str | None = None
    panoptic_thresholds: dict[str, float] | None = None

    @property
    def task(self) -> str:
        """What a model learns from it."""
        return "semantic" if self.panoptic_thresholds is None else "panoptic"

    @property
    def metric(self) -> str:
        """The metric of its results."""
        return {"semantic": "mIoU", "panoptic": "PQ"}[self.task]

    def labels(self) -> LabelSet | None:
        """Its classes, or None if their names are not known here."""
        if self.label_names is None:
            return None
        named = named_labels(self.label_names)
        return LabelSet(named.id2label, self.ignore_index, self.do_reduce_labels, named.thing_ids)


def _thresholds(object_threshold: float, overlap_threshold: float) -> dict[str, float]:
    return {"threshold": object_threshold, "overlap_mask_area_threshold": overlap_threshold}


DATA_SETS = {
    "ade20k": DataSet(
        title="ADE20K",
        original_name="ade20k_sem_seg_val",
        folder="semantic-ade20k",
        num_labels=150,
        test_size=(512, 2048),
        do_reduce_labels=True,
        label_names="ade20k",
    ),
    "coco-stuff-10k": DataSet(
        title="COCO-Stuff-10k",
        original_name="coco_2017_test_stuff_10k_sem_seg",
        folder="semantic-coco-stuff-10k",
        num_labels=171,
        test_size=(640, 2560),
        label_names="coco_stuff_10k",
    ),
    "ade20k-full": DataSet(
        title="ADE20K-Full",
        original_name="ade20k_full_sem_seg_val",
        folder="semantic-ade20k-full",
        num_labels=847,
        test_size=(512, 2048),
        ignore_index=65535,
        label_names="ade20k_full",
    ),
    "cityscapes": DataSet(
        title="Cityscapes",
        original_name="cityscapes_fine_sem_seg_val",
        folder="semantic-cityscapes",
        num_labels=19,
        test_size=(1024, 2048),
        label_names="cityscapes",
    ),
    "mapillary-vistas": DataSet(
        title="Mapillary Vistas",
        original_name="mapillary_vistas_sem_seg_val",
        folder="semantic-mapillary-vistas",
        num_labels=65,
        test_size=(2048, 2048),
        ignore_index=65,
    ),
    "coco-panoptic": DataSet(
        title="COCO panoptic",
        original_name="coco_2017_val_panoptic",
        folder="panoptic-coco",
        num_labels=133,
        test_size=(800, 1333),
        size_divisor=0,
        label_names="coco_panoptic",
        panoptic_thresholds=_thresholds(0.8, 0.8),
    ),
    "ade20k-panoptic": DataSet(
        title="ADE20K panoptic",
        original_name="ade20k_panoptic_val",
        folder="panoptic-ade20k",
        num_labels=150,
        test_size=(640, 2560),
        label_names="ade20k",
        panoptic_thresholds=_thresholds(0.7, 0.8),
    ),
}

_WINDOW_7 = {"window_size": 7, "image_size": 224, "drop_path_rate": 0.3}
_WINDOW_12 = {"window_size": 12, "image_size": 384, "drop_path_rate": 0.3}
BACKBONES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "r50": (ResNetConfig, {"depths": [3, 4, 6, 3]}),
    "r101": (ResNetConfig, {"depths": [3, 4, 23, 3]}),
    "r101c": (MaskFormerResNetConfig, {"depths": [3, 4, 23, 3], "embedding_size": 128}),
    "swin-tiny": (SwinConfig, {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], **_WINDOW_7}),
    "swin-small": (SwinConfig, {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], **_WINDOW_7}),
    "swin-base": (SwinConfig, {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], **_WINDOW_12}),
    "swin-large": (SwinConfig, {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], **_WINDOW_12}),
}
MASKFORMER, BASELINE, BASELINE_PLUS = "", "per-pixel-baseline", "per-pixel-baseline-plus"
# transformers' defaults set only the first of them.
DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
PIXEL_DECODER_LAYERS = 6  # of the panoptic models with a ResNet, which alone have a transformer in the pixel decoder


@dataclass(frozen=True)
class Preset:
    """One model of the paper's model zoo; `config` and `image_processor` build its two parts.

    Attributes:
        data_set_name: of its data, in `DATA_SETS`.
        method: which of the paper's three architectures.
        reported, reported_multi_scale: mIoU or PQ in percent as reported by the paper's authors for their weights, the
            second with multi-scale and flip test-time augmentation.
        reported_parameters: millions, counted in the paper's own implementation.
        weights_url: where the authors' weights are.
    """

    name: str
    data_set_name: str
    backbone: str
    method: str
    reported: float
    reported_multi_scale: float | None
    reported_parameters: float
    weights_url: str

    @property
    def data_set(self) -> DataSet:
        """What it must know of its data."""
        return DATA_SETS[self.data_set_name]

    @property
    def weights_file(self) -> str:
        """File name of the authors' weights."""
        return self.weights_url.rpartition("/")[2]

    @property
    def test_size(self) -> tuple[int, int]:
        """Shortest and longest edge at inference."""
        # The authors trained their largest semantic models on ADE20K at a different size.
        if self.name in ("ade20k-swin-base", "ade20k-swin-large"):
            return 640, 2560
        return self.data_set.test_size

    def config(self, labels: LabelSet | None = None) -> Config:
        """The model's configuration.

        Args:
            labels: other class names. Raises a ValueError if their number is not that of the preset.
        """
        names = config_label_fields(self._labels(labels), self.data_set.num_labels)
        config_class, fields = BACKBONES[self.backbone]
        backbone = config_class(**fields)
        if self.method == MASKFORMER:
            decoder: PreTrainedConfig = DetrConfig(**DROPOUT)
            if self.data_set.task == "panoptic" and self.backbone in ("r50", "r101"):
                decoder = MaskFormerTransformerConfig(pixel_decoder_layers=PIXEL_DECODER_LAYERS, **DROPOUT)
            return MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **names)
        queries = MaskFormerTransformerConfig(num_queries=self.data_set.num_labels, **DROPOUT)
        return PerPixelBaselineConfig(
            backbone_config=backbone,
            decoder_config=queries if self.method == BASELINE_PLUS else None,
            semantic_loss_ignore_index=self.data_set.ignore_index if labels is None else labels.ignore_index,
            **names,
        )

    def model(self, labels: LabelSet | None = None) -> Model:
        """The model with random weights; `labels` as in `config`."""
        config = self.config(labels)
        return model_class(config)(config)

    def image_processor(self, labels: LabelSet | None = None) -> MaskFormerImageProcessor:
        """The model's image processor; `labels` as in `config`."""
        return MaskFormerImageProcessor(**self.image_processor_settings(self._labels(labels)))

    def image_processor_settings(self, labels: LabelSet | None) -> dict[str, Any]:
        """The settings of that image processor, for any number of classes."""
        shortest, longest = self.test_size
        return {
            "size": {"shortest_edge": shortest, "longest_edge": longest},
            # The baselines' batches are only padded to a common size.
            "size_divisor": self.data_set.size_divisor if self.method == MASKFORMER else 0,
            "num_labels": self.data_set.num_labels if labels is None else labels.num_labels,
            **task_settings(self.data_set.panoptic_thresholds),
            **label_map_settings(labels, self.data_set.ignore_index),
        }

    def _labels(self, labels: LabelSet | None) -> LabelSet | None:
        if labels is not None and labels.num_labels != self.data_set.num_labels:
            raise ValueError(
                f"{labels.num_labels} classes are given, but {self.name} has {self.data_set.num_labels}. Give the "
                "classes of its own data set, in its order."
            )
        return labels or self.data_set.labels()


def model_class(config: Config) -> Any:
    """The class of the model that a configuration describes."""
    if isinstance(config, PerPixelBaselineConfig):
        return PerPixelBaselineForSemanticSegmentation
    return MaskFormerForInstanceSegmentation


def config_label_fields(labels: LabelSet | None, num_labels: int) -> dict[str, Any]:
    """The fields of a configuration that hold its classes, named LABEL_i if no names are given."""
    if labels is None:
        return {"num_labels": num_labels}
    return {"id2label": labels.id2label, "label2id": {name: label for label, name in labels.id2label.items()}}


def task_settings(panoptic_thresholds: dict[str, float] | None) -> dict[str, Any]:
    """The settings of an image processor that say what its model is for; only panoptic ones have thresholds."""
    if panoptic_thresholds is None:
        return {"segmentation_task": "semantic"}
    return {"segmentation_task": "panoptic", "panoptic_thresholds": panoptic_thresholds}


def label_map_settings(labels: LabelSet | None, ignore_index: int) -> dict[str, Any]:
    """The settings of an image processor that say how to read label maps, and which classes are stuff."""
    if labels is None:
        return {"ignore_index": ignore_index}
    return {
        "ignore_index": labels.ignore_index,
        "do_reduce_labels": labels.do_reduce_labels,
        "label_ids_to_fuse": list(labels.stuff_ids) if labels.thing_ids else None,
    }


# Reported mIoU or PQ, the same multi-scale, reported millions of parameters; the authors' weights.
_ROWS: dict[str, dict[tuple[str, str], tuple[float, float | None, float, str, str]]] = {
    "ade20k": {
        (BASELINE, "r50"): (39.2, 40.9, 31.034, "per_pixel_baseline_R50_bs16_160k", "1043f3"),
        (BASELINE_PLUS, "r50"): (41.9, 42.9, 41.229, "per_pixel_baseline_plus_R50_bs16_160k", "833630"),
        (MASKFORMER, "r50"): (44.5, 46.7, 41.255, "maskformer_R50_bs16_160k", "d8dbeb"),
        (MASKFORMER, "r101"): (45.5, 47.2, 60.195, "maskformer_R101_bs16_160k", "1aeb94"),
        (MASKFORMER, "r101c"): (46.0, 48.1, 60.318, "maskformer_R101c_bs16_160k", "b432ea"),
        (MASKFORMER, "swin-tiny"): (46.7, 48.8, 41.757, "maskformer_swin_tiny_bs16_160k", "8657a5"),
        (MASKFORMER, "swin-small"): (49.8, 51.0, 63.075, "maskformer_swin_small_bs16_160k", "528157"),
        (MASKFORMER, "swin-base"): (52.7, 53.9, 101.829, "maskformer_swin_base_IN21k_384_bs16_160k_res640", "45388b"),
        (MASKFORMER, "swin-large"): (54.1, 55.6, 211.576, "maskformer_swin_large_IN21k_384_bs16_160k_res640", "aefa3b"),
    },
    "coco-stuff-10k": {
        (BASELINE, "r50"): (32.4, 34.4, 31.039, "per_pixel_baseline_R50_bs32_60k", "275ab0"),
        (BASELINE_PLUS, "r50"): (34.2, 35.8, 41.234, "per_pixel_baseline_plus_R50_bs32_60k", "1fa920"),
        (MASKFORMER, "r50"): (37.1, 38.9, 41.260, "maskformer_R50_bs32_60k", "cb03eb"),
        (MASKFORMER, "r101"): (38.1, 39.8, 60.200, "maskformer_R101_bs32_60k", "eb19bb"),
        (MASKFORMER, "r101c"): (38.0, 39.3, 60.323, "maskformer_R101c_bs32_60k", "bffd25"),
    },
    "ade20k-full": {
        (BASELINE, "r50"): (12.4, None, 31.213, "per_pixel_baseline_R50_bs16_200k", "9f66a9"),
        (BASELINE_PLUS, "r50"): (13.9, None, 41.407, "per_pixel_baseline_plus_R50_bs16_200k", "4d31f2"),
        (MASKFORMER, "r50"): (16.0, None, 41.434, "maskformer_R50_bs16_200k", "f4e3f6"),
        (MASKFORMER, "r101"): (16.8, None, 60.374, "maskformer_R101_bs16_200k", "88df33"),
        (MASKFORMER, "r101c"): (17.4, None, 60.497, "maskformer_R101c_bs16_200k", "75d34e"),
    },
    "cityscapes": {
        (MASKFORMER, "r101"): (78.5, 80.3, 60.161, "maskformer_R101_bs16_90k", "38c00c"),
        (MASKFORMER, "r101c"): (79.7, 81.4, 60.284, "maskformer_R101c_bs16_90k", "4f8ff9"),
    },
    "mapillary-vistas": {
        (MASKFORMER, "r50"): (53.1, 55.4, 41.233, "maskformer_R50_bs16_300k", "f3fc73"),
    },
    "coco-panoptic": {
        (MASKFORMER, "r50"): (46.5, None, 45.012, "maskformer_panoptic_R50_bs64_554k", "6f60dc"),
        (MASKFORMER, "r101"): (47.6, None, 63.952, "maskformer_panoptic_R101_bs64_554k", "57b049"),
        (MASKFORMER, "swin-tiny"): (47.7, None, 41.753, "maskformer_panoptic_swin_tiny_bs64_554k", "539394"),
        (MASKFORMER, "swin-small"): (49.7, None, 63.071, "maskformer_panoptic_swin_small_bs64_554k", "5bf6b1"),
        (MASKFORMER, "swin-base"): (51.8, None, 101.825, "maskformer_panoptic_swin_base_IN21k_384_bs64_554k", "4b7f49"),
        (MASKFORMER, "swin-large"): (
            52.7,
            None,
            211.571,
            "maskformer_panoptic_swin_large_IN21k_384_bs64_554k",
            "7505c4",
        ),
    },
    "ade20k-panoptic": {
        (MASKFORMER, "r50"): (34.7, None, 45.016, "maskformer_panoptic_R50_bs16_720k", "7aa977"),
        (MASKFORMER, "r101"): (35.7, None, 63.956, "maskformer_panoptic_R101_bs16_720k", "0b3cc8"),
    },
}


def _presets() -> Iterator[Preset]:
    for data_set, rows in _ROWS.items():
        for (method, backbone), (reported, multi_scale, parameters, folder, identifier) in rows.items():
            name = "-".join(part for part in (data_set, method, backbone) if part)
            url = f"{WEIGHTS_URL}/{DATA_SETS[data_set].folder}/{folder}/model_final_{identifier}.pkl"
            yield Preset(name, data_set, backbone, method, reported, multi_scale, parameters, url)


PRESETS: dict[str, Preset] = {preset.name: preset for preset in _presets()}


def find_preset(name: str) -> Preset:
    """Finds a preset. Raises a ValueError that lists similar names if there is none with this name."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=5, cutoff=0.4) or sorted(PRESETS)
        raise ValueError(f"There is no preset {name!r}. Similar names are {', '.join(close)}.")
    return PRESETS[name]
