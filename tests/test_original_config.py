"""Configuration files of the paper's code: what they say is read, and what nobody here can build is refused."""

import json
import os
import re

import pytest
import yaml
from golden import CONFIGS, FIXTURES
from transformers import DetrConfig, ResNetConfig

from hf_maskformer import MaskFormerConfig
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig
from hf_maskformer.configuration_per_pixel_baseline import PerPixelBaselineConfig
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.hub.original_config import OriginalConfig
from hf_maskformer.hub.yaml_files import flatten, read_yaml

# What a file has to say, because detectron2's own defaults are for other models.
SMALLEST = {
    "INPUT": {"FORMAT": "RGB", "MIN_SIZE_TEST": 512, "MAX_SIZE_TEST": 2048},
    "MODEL": {
        "META_ARCHITECTURE": "MaskFormer",
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"], "STRIDE_IN_1X1": False},
        "SEM_SEG_HEAD": {
            "NAME": "MaskFormerHead",
            "IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "NUM_CLASSES": 150,
            "CONVS_DIM": 256,
        },
    },
}


def changed(**values):
    """The smallest file with some fields changed, written as MODEL__RESNETS__DEPTH."""
    content = yaml.safe_load(yaml.safe_dump(SMALLEST))
    for key, value in values.items():
        *sections, field = key.split("__")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    return content


@pytest.fixture
def read(tmp_path):
    def read(**values):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(changed(**values)))
        return OriginalConfig(path)

    return read


@pytest.mark.parametrize("name", CONFIGS)
def test_complete_files_give_the_model_of_the_stored_numbers(name):
    is_baseline = name.startswith("per_pixel")
    sizes = {"fpn_feature_size": 32 if is_baseline else 64, "mask_feature_size": 32, "num_labels": 13}
    config_class = PerPixelBaselineConfig if is_baseline else MaskFormerConfig
    expected = config_class(**CONFIGS[name], **sizes).to_dict()
    found = OriginalConfig(FIXTURES / name / "config.yaml").config().to_dict()
    assert found == expected


def test_the_smallest_file_is_the_paper_s_resnet_50(read):
    config = read().config()
    assert isinstance(config.backbone_config, ResNetConfig)
    assert config.backbone_config.hidden_sizes == [256, 512, 1024, 2048]
    assert isinstance(config.decoder_config, DetrConfig)
    decoder = config.decoder_config
    assert (decoder.num_queries, decoder.decoder_layers, decoder.d_model, decoder.dropout) == (100, 6, 256, 0.1)
    assert (decoder.attention_dropout, decoder.activation_dropout) == (0.1, 0.1)
    assert (config.num_labels, config.mask_weight, config.no_object_weight) == (150, 20.0, 0.1)


def test_the_image_processor_gets_sizes_padding_and_normalisation(read):
    processor = read().image_processor()
    assert processor.size == {"shortest_edge": 512, "longest_edge": 2048}
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert processor.image_std == pytest.approx([0.229, 0.224, 0.225])
    assert (processor.size_divisor, processor.ignore_index, processor.num_labels) == (32, 255, 150)
    assert read(INPUT__MIN_SIZE_TEST=0).image_processor().do_resize is False


@pytest.mark.parametrize(("backbone", "divisor"), [("build_resnet_backbone", 0), ("D2SwinTransformer", 32)])
def test_a_negative_divisor_is_that_of_the_backbone(read, backbone, divisor):
    original = read(MODEL__MASK_FORMER__SIZE_DIVISIBILITY=-1, MODEL__BACKBONE__NAME=backbone)
    assert original.image_processor().size_divisor == divisor


def test_resnet_101c_has_a_deep_stem_and_dilations(read):
    deeplab = {
        "MODEL__BACKBONE__NAME": "build_resnet_deeplab_backbone",
        "MODEL__RESNETS__DEPTH": 101,
        "MODEL__RESNETS__STEM_TYPE": "deeplab",
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 128,
    }
    backbone = read(**deeplab, MODEL__RESNETS__RES5_MULTI_GRID=[1, 2, 4]).config().backbone_config
    assert isinstance(backbone, MaskFormerResNetConfig)
    assert (backbone.depths, backbone.embedding_size) == ([3, 4, 23, 3], 128)
    assert (backbone.deep_stem, backbone.last_stage_dilations) == (True, [1, 2, 4])
    # The plain builder reads neither field.
    deeplab["MODEL__BACKBONE__NAME"] = "build_resnet_backbone"
    assert not isinstance(read(**deeplab).config().backbone_config, MaskFormerResNetConfig)


def test_a_panoptic_file_gives_encoder_layers_and_thresholds(read):
    original = read(
        MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME="TransformerEncoderPixelDecoder",
        MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS=6,
        MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE="transformer_encoder",
        MODEL__MASK_FORMER__TEST={"PANOPTIC_ON": True, "OBJECT_MASK_THRESHOLD": 0.7, "OVERLAP_THRESHOLD": 0.8},
    )
    config = original.config()
    assert isinstance(config.decoder_config, MaskFormerTransformerConfig)
    assert config.decoder_config.pixel_decoder_layers == 6
    processor = original.image_processor()
    assert processor.segmentation_task == "panoptic"
    assert processor.panoptic_thresholds == {"threshold": 0.7, "overlap_mask_area_threshold": 0.8}


@pytest.mark.parametrize(
    ("field", "value", "ours"), [("PRE_NORM", True, "pre_norm"), ("ENC_LAYERS", 2, "encoder_layers")]
)
def test_what_stock_cannot_express_gets_our_own_type(read, field, value, ours):
    decoder = read(**{f"MODEL__MASK_FORMER__{field}": value}).config().decoder_config
    assert isinstance(decoder, MaskFormerTransformerConfig)
    assert getattr(decoder, ours) == value


def test_batch_norm_that_was_trained_is_not_frozen(read):
    assert read(MODEL__RESNETS__NORM="SyncBN").config().freeze_batch_norm is False


REFUSED = {
    "INPUT__FORMAT": "BGR",
    "MODEL__META_ARCHITECTURE": "PanopticFPN",
    "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__NORM": "GN",
    "MODEL__RESNETS__NUM_GROUPS": 32,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 512,
    "MODEL__RESNETS__RES5_DILATION": 2,
    "MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True],
    "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL__SEM_SEG_HEAD__NAME": "MaskFormerPlusHead",
    "MODEL__SEM_SEG_HEAD__NORM": "BN",
    "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "pixel_embedding",
    "MODEL__MASK_FORMER__TEST": {"SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": True},
    "MODEL__MASK_FORMER__TRAIN_NUM_POINTS": 12544,
    "MODEL__SWIN__USE_CHECKPOINT": True,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_model_here_has_is_refused_by_name(read, field):
    with pytest.raises(ValueError, match=field.replace("__", r"\.")):
        read(**{field: REFUSED[field]})


@pytest.mark.parametrize("field", ["APE", "QK_SCALE", "PATCH_NORM", "PATCH_SIZE"])
def test_swin_s_fields_are_read_only_with_a_swin(read, field):
    other = {f"MODEL__SWIN__{field}": {"APE": True, "QK_SCALE": 0.5, "PATCH_NORM": False, "PATCH_SIZE": 2}[field]}
    read(**other)
    with pytest.raises(ValueError, match=rf"MODEL\.SWIN\.{field}"):
        read(**other, MODEL__BACKBONE__NAME="D2SwinTransformer")


def test_a_forced_projection_is_refused_only_where_it_adds_one(read):
    read(MODEL__MASK_FORMER__ENFORCE_INPUT_PROJ=True)
    with pytest.raises(ValueError, match="ENFORCE_INPUT_PROJ"):
        read(MODEL__MASK_FORMER__ENFORCE_INPUT_PROJ=True, MODEL__MASK_FORMER__HIDDEN_DIM=2048)


def test_a_baseline_has_as_many_queries_as_classes(read):
    baseline = {
        "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselinePlusHead",
    }
    with pytest.raises(ValueError, match=r"NUM_OBJECT_QUERIES 100, but only 150"):
        read(**baseline)
    config = read(**baseline, MODEL__MASK_FORMER__NUM_OBJECT_QUERIES=150).config()
    assert config.decoder_config.num_queries == 150


def test_known_data_sets_name_their_classes_if_they_are_as_many(read):
    original = read(DATASETS__TEST=["ade20k_sem_seg_val"])
    assert original.config().id2label[2] == "sky"
    assert original.image_processor().do_reduce_labels is True
    fewer = read(DATASETS__TEST=["ade20k_sem_seg_val"], MODEL__SEM_SEG_HEAD__NUM_CLASSES=2)
    assert fewer.config().id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    "names",
    ['("ade20k_sem_seg_val", "mine")', '("ade20k_sem_seg_val",)', "['ade20k_sem_seg_val']", "[ade20k_sem_seg_val]"],
)
def test_names_of_data_sets_may_be_written_as_python_does(tmp_path, names):
    """Which is no list in yaml: detectron2 reads such texts once more."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SMALLEST))
    (tmp_path / "config.yaml").write_text(f"_BASE_: base.yaml\nDATASETS:\n  TEST: {names}\n")
    original = OriginalConfig(tmp_path / "config.yaml")
    assert original.config().id2label[2] == "sky"
    assert original.image_processor().do_reduce_labels is True


@pytest.mark.parametrize("value", [None, "None", 5, True, "...", "not_ade20k_sem_seg_val_2"])
def test_other_data_sets_have_no_classes_here(read, value):
    assert read(DATASETS__TEST=value).config().id2label[2] == "LABEL_2"


def test_sizes_of_the_augmentation_that_are_computed_are_passed_over_and_not_run(tmp_path):
    """So the paper's files write them."""
    trace = tmp_path / "trace"
    code = f"[open({str(trace)!r}, 'w')]"
    sizes = f"MIN_SIZE_TRAIN: !!python/object/apply:eval [{json.dumps(code)}]"
    (tmp_path / "base.yaml").write_text(f"{yaml.safe_dump(SMALLEST)}\n".replace("INPUT:", f"INPUT:\n  {sizes}"))
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\nMODEL: {RESNETS: {DEPTH: 101}}\n")
    original = OriginalConfig(tmp_path / "config.yaml")
    assert original.config().backbone_config.depths == [3, 4, 23, 3]
    assert original.values["INPUT.MIN_SIZE_TRAIN"] == [code]
    assert not trace.exists()


def test_files_of_the_first_version_say_how_masks_become_labels(read):
    assert read(MODEL__MASK_FORMER__TEST__SEMANTIC_INFERENCE_METHOD="probabilistic").config()
    with pytest.raises(ValueError, match="SEMANTIC_INFERENCE_METHOD 'other'"):
        read(MODEL__MASK_FORMER__TEST__SEMANTIC_INFERENCE_METHOD="other")


def test_given_classes_name_the_labels(read):
    original = read(MODEL__SEM_SEG_HEAD__NUM_CLASSES=2)
    labels = LabelSet({0: "sky", 1: "bird"}, ignore_index=9, thing_ids=(1,))
    assert original.config(labels).id2label == labels.id2label
    assert original.image_processor(labels).label_ids_to_fuse == [0]
    with pytest.raises(ValueError, match=r"1 classes are given, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES"):
        original.config(LabelSet({0: "sky"}))


def test_a_file_changes_the_values_of_its_base(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "first.yaml").write_text("MODEL: {A: 1, B: {C: 2, D: 3}}\nSEED: 5\n")
    (tmp_path / "bases" / "second.yaml").write_text("_BASE_: first.yaml\nMODEL: {B: {C: 20}}\n")
    (tmp_path / "last.yaml").write_text("_BASE_: bases/second.yaml\nMODEL: {B: {D: 30}}\n")
    assert read_yaml(tmp_path / "last.yaml") == {"MODEL": {"A": 1, "B": {"C": 20, "D": 30}}, "SEED": 5}


def test_a_circle_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match=r"circular chain of bases: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_base_names_the_file_that_wants_it(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"b\.yaml does not exist, but is the _BASE_ of .*a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "A: !!python/object/apply:os.system ['id']",
        "A: !!python/name:os.system",
        "A: !!python/object/apply:eval {args: ['1']}",
        "A: [1",
        "- 1",
        "",
        "_BASE_: https://somewhere/base.yaml",
        "_BASE_: [a.yaml]",
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_tuples_of_detectron2_are_lists_too(read, tmp_path):
    (tmp_path / "a.yaml").write_text("A: !!python/tuple [1, [2, 3]]")
    assert read_yaml(tmp_path / "a.yaml") == {"A": (1, [2, 3])}


SWIN = {
    "image_size": ("PRETRAIN_IMG_SIZE", 384),
    "embed_dim": ("EMBED_DIM", 128),
    "depths": ("DEPTHS", [2, 2, 18, 2]),
    "num_heads": ("NUM_HEADS", [4, 8, 16, 32]),
    "window_size": ("WINDOW_SIZE", 12),
    "mlp_ratio": ("MLP_RATIO", 3.0),
    "qkv_bias": ("QKV_BIAS", False),
    "hidden_dropout_prob": ("DROP_RATE", 0.01),
    "attention_probs_dropout_prob": ("ATTN_DROP_RATE", 0.02),
    "drop_path_rate": ("DROP_PATH_RATE", 0.4),
}


TRANSFORMER = {
    "d_model": ("HIDDEN_DIM", 128),
    "num_queries": ("NUM_OBJECT_QUERIES", 20),
    "decoder_layers": ("DEC_LAYERS", 3),
    "encoder_layers": ("ENC_LAYERS", 2),
    "decoder_attention_heads": ("NHEADS", 4),
    "encoder_attention_heads": ("NHEADS", 4),
    "decoder_ffn_dim": ("DIM_FEEDFORWARD", 512),
    "encoder_ffn_dim": ("DIM_FEEDFORWARD", 512),
    "dropout": ("DROPOUT", 0.2),
    "attention_dropout": ("DROPOUT", 0.2),
    "activation_dropout": ("DROPOUT", 0.2),
}


def test_every_field_of_swin_and_transformer_has_its_place(read):
    swin, transformer = dict(SWIN.values()), dict(TRANSFORMER.values())
    original = read(
        MODEL__BACKBONE={"NAME": "D2SwinTransformer"}, MODEL__SWIN=swin, MODEL__MASK_FORMER=transformer
    ).config()
    for config, fields in ((original.backbone_config, SWIN), (original.decoder_config, TRANSFORMER)):
        found = {name: getattr(config, name) for name in fields}
        assert found == {name: value for name, (_, value) in fields.items()}


def test_what_a_file_does_not_say_is_as_in_the_original(tmp_path):
    content = changed(MODEL__BACKBONE={"NAME": "D2SwinTransformer"})
    del content["INPUT"]["MAX_SIZE_TEST"], content["MODEL"]["PIXEL_STD"], content["MODEL"]["RESNETS"]["STRIDE_IN_1X1"]
    (tmp_path / "swin.yaml").write_text(yaml.safe_dump(content))
    original = OriginalConfig(tmp_path / "swin.yaml")
    config, processor = original.config(), original.image_processor()
    swin, decoder = config.backbone_config, config.decoder_config
    assert (swin.image_size, swin.embed_dim, swin.depths, swin.num_heads) == (224, 96, [2, 2, 6, 2], [3, 6, 12, 24])
    assert (swin.window_size, swin.drop_path_rate, swin.mlp_ratio, swin.qkv_bias) == (7, 0.3, 4.0, True)
    assert (config.mask_weight, config.dice_weight, config.no_object_weight) == (20, 1, 0.1)
    assert (config.deep_supervision, config.freeze_batch_norm, config.mask_feature_size) == (True, True, 256)
    assert (decoder.decoder_attention_heads, decoder.decoder_ffn_dim, decoder.dropout) == (8, 2048, 0.1)
    assert (processor.size["longest_edge"], processor.size_divisor, processor.ignore_index) == (1333, 32, 255)
    assert processor.image_std == pytest.approx([1 / 255] * 3)
    content["MODEL"]["BACKBONE"]["NAME"] = "build_resnet_deeplab_backbone"
    (tmp_path / "resnet.yaml").write_text(yaml.safe_dump(content))
    resnet = OriginalConfig(tmp_path / "resnet.yaml").config().backbone_config
    assert (resnet.downsample_in_bottleneck, resnet.deep_stem, resnet.last_stage_dilations) == (True, True, [1, 2, 4])
    assert (resnet.depths, resnet.embedding_size) == ([3, 4, 6, 3], 64)
    content["MODEL"]["MASK_FORMER"] = {"TEST": {"PANOPTIC_ON": True}}
    (tmp_path / "panoptic.yaml").write_text(yaml.safe_dump(content))
    thresholds = OriginalConfig(tmp_path / "panoptic.yaml").image_processor().panoptic_thresholds
    assert thresholds == {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


@pytest.mark.parametrize(("norm", "is_frozen"), [("FrozenBN", True), ("BN", False), ("SyncBN", False)])
def test_only_frozen_norms_are_frozen(read, norm, is_frozen):
    assert read(MODEL__RESNETS__NORM=norm).config().freeze_batch_norm is is_frozen


def test_the_value_of_unlabelled_pixels_is_that_of_the_file_or_of_the_given_classes(read):
    head = {"NAME": "PerPixelBaselineHead", "IGNORE_VALUE": 7, "NUM_CLASSES": 2}
    head = {**SMALLEST["MODEL"]["SEM_SEG_HEAD"], **head}
    original = read(MODEL__META_ARCHITECTURE="SemanticSegmentor", MODEL__SEM_SEG_HEAD=head)
    labels = LabelSet({0: "sky", 1: "bird"}, ignore_index=9)
    for given, ignored in ((None, 7), (labels, 9)):
        assert original.config(given).semantic_loss_ignore_index == ignored
        assert original.image_processor(given).ignore_index == ignored


def test_changes_of_a_base_go_down_to_the_last_level_and_a_home_may_be_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = changed(MODEL__MASK_FORMER={"TEST": {"PANOPTIC_ON": True, "OVERLAP_THRESHOLD": 0.8}})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    test = {"MODEL": {"MASK_FORMER": {"TEST": {"OBJECT_MASK_THRESHOLD": 0.7}}}}
    (tmp_path / "changes.yaml").write_text(yaml.safe_dump({"_BASE_": os.path.join("~", "base.yaml"), **test}))
    thresholds = OriginalConfig(tmp_path / "changes.yaml").image_processor().panoptic_thresholds
    assert thresholds == {"threshold": 0.7, "overlap_mask_area_threshold": 0.8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {
                "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
                "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "transformer_encoder",
            },
            "TRANSFORMER_ENC_LAYERS 0, but only 'at least 1' is supported",
        ),
        (
            {
                "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselineHead",
                "MODEL__SEM_SEG_HEAD__COMMON_STRIDE": 8,
            },
            "COMMON_STRIDE 8, but only 4 is supported",
        ),
        ({"MODEL__RESNETS__NORM": "GN"}, "MODEL.RESNETS.NORM 'GN', but only 'FrozenBN' or 'BN'"),
    ],
)
def test_a_decoder_without_layers_another_stride_and_another_norm_are_refused(read, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(**values)


def test_the_divisor_of_a_baseline_is_that_of_its_backbone(read):
    head = {**SMALLEST["MODEL"]["SEM_SEG_HEAD"], "NAME": "PerPixelBaselineHead"}
    for backbone, divisor in (("build_resnet_backbone", 0), ("D2SwinTransformer", 32)):
        original = read(
            MODEL__META_ARCHITECTURE="SemanticSegmentor",
            MODEL__BACKBONE__NAME=backbone,
            MODEL__SEM_SEG_HEAD=head,
            MODEL__MASK_FORMER__SIZE_DIVISIBILITY=16,
        )
        assert original.image_processor().size_divisor == divisor


def test_a_number_above_that_of_any_model_is_refused(read):
    with pytest.raises(ValueError, match=r"MODEL\.MASK_FORMER\.DIM_FEEDFORWARD '?1000000000000'?, but a value like"):
        read(MODEL__MASK_FORMER__DIM_FEEDFORWARD=10**12)


def test_a_mapping_that_is_used_twice_by_alias_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: &again {DEPTH: 50}\nINPUT: *again\n")
    with pytest.raises(ValueError, match="a mapping is used twice by alias"):
        read_yaml(path)


def test_every_weight_of_the_loss_and_deep_supervision_have_their_place(read):
    fields = {"MASK_WEIGHT": 5.0, "DICE_WEIGHT": 3.0, "NO_OBJECT_WEIGHT": 0.4, "DEEP_SUPERVISION": False}
    config = read(MODEL__MASK_FORMER=fields).config()
    found = (config.mask_weight, config.dice_weight, config.no_object_weight, config.deep_supervision)
    assert found == tuple(fields.values())


@pytest.mark.parametrize(("depth", "depths"), [(50, [3, 4, 6, 3]), (101, [3, 4, 23, 3]), (152, [3, 8, 36, 3])])
def test_each_depth_of_a_resnet_has_its_layers(read, depth, depths):
    assert read(MODEL__RESNETS__DEPTH=depth).config().backbone_config.depths == depths


DEEPLAB = {"MODEL__BACKBONE__NAME": "build_resnet_deeplab_backbone"}


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize("dilations", [[1, 1, 1], [1, 2, 4], (1, 2, 4)])
def test_stem_and_dilations_are_read_one_without_the_other(tmp_path, deep_stem, dilations):
    content = changed(**DEEPLAB, MODEL__RESNETS__STEM_TYPE="deeplab" if deep_stem else "basic")
    content["MODEL"]["RESNETS"]["RES5_MULTI_GRID"] = str(dilations)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    backbone = OriginalConfig(tmp_path / "config.yaml").config().backbone_config
    assert getattr(backbone, "deep_stem", False) == deep_stem
    assert getattr(backbone, "last_stage_dilations", [1, 1, 1]) == list(dilations)


SILENT = {
    ("INPUT", "FORMAT"): r"INPUT\.FORMAT 'BGR'",
    ("MODEL", "RESNETS", "OUT_FEATURES"): r"MODEL\.RESNETS\.OUT_FEATURES \['res4'\]",
    ("MODEL", "SEM_SEG_HEAD", "IN_FEATURES"): r"MODEL\.SEM_SEG_HEAD\.IN_FEATURES \['p2', 'p3', 'p4', 'p5'\]",
}


@pytest.mark.parametrize("field", SILENT)
def test_where_detectron2s_own_value_is_none_of_ours_silence_is_refused(tmp_path, field):
    content = changed()
    target = content
    for section in field[:-1]:
        target = target[section]
    del target[field[-1]]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=SILENT[field]):
        OriginalConfig(tmp_path / "config.yaml")


def test_sizes_normalisation_and_widths_that_a_file_does_not_say_are_detectron2s(tmp_path):
    content = changed()
    del content["INPUT"]["MIN_SIZE_TEST"], content["MODEL"]["PIXEL_MEAN"]
    del content["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"], content["MODEL"]["SEM_SEG_HEAD"]["CONVS_DIM"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    original = OriginalConfig(tmp_path / "config.yaml")
    config, processor = original.config(), original.image_processor()
    assert processor.size["shortest_edge"] == 800
    assert processor.image_mean == pytest.approx([103.53 / 255, 116.28 / 255, 123.675 / 255])
    assert (config.num_labels, processor.num_labels, config.fpn_feature_size) == (54, 54, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MODEL__SEM_SEG_HEAD__IN_FEATURES": ["res3", "res4", "res5"]}, r"SEM_SEG_HEAD\.IN_FEATURES"),
        ({"MODEL__RESNETS__RES4_DILATION": 2}, r"RES4_DILATION 2"),
        ({"MODEL__RESNETS__STEM_TYPE": "other", **DEEPLAB}, r"STEM_TYPE 'other'"),
        (
            {"MODEL__BACKBONE__NAME": "D2SwinTransformer", "MODEL__SWIN__OUT_FEATURES": ["res3", "res4", "res5"]},
            r"SWIN\.OUT_FEATURES",
        ),
        (
            {
                "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselineHead",
                "MODEL__SEM_SEG_HEAD__LOSS_WEIGHT": 2.0,
            },
            r"LOSS_WEIGHT 2\.0",
        ),
    ],
)
def test_more_that_no_model_here_has_is_refused_by_name(read, values, message):
    with pytest.raises(ValueError, match=message):
        read(**values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("MODEL__MASK_FORMER__DEC_LAYERS", True),
        ("MODEL__MASK_FORMER__DEC_LAYERS", 2.5),
        ("MODEL__MASK_FORMER__DEC_LAYERS", -(10**12)),
        ("MODEL__MASK_FORMER__DROPOUT", "much"),
        ("MODEL__SWIN__DEPTHS", [2, 2, "six", 2]),
        ("MODEL__PIXEL_MEAN", [1.0, None, 1.0]),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_field(read, field, value):
    with pytest.raises(ValueError, match=rf"{field.replace('__', '.')} .* but a value like .* is expected"):
        read(**{field: value})


def test_a_whole_number_may_stand_where_a_fraction_belongs(read):
    assert read(MODEL__MASK_FORMER__MASK_WEIGHT=5, MODEL__PIXEL_STD=[58, 57, 57]).config().mask_weight == 5


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ({"MODEL__BACKBONE__NAME": "D2SwinTransformer"}, 768),
        ({"MODEL__BACKBONE__NAME": "D2SwinTransformer", "MODEL__SWIN__EMBED_DIM": 192}, 1536),
        (
            {
                "MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
                "MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 1,
                "MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "transformer_encoder",
            },
            256,
        ),
    ],
)
def test_a_forced_projection_is_refused_at_the_width_of_what_it_projects(read, values, width):
    forced = {**values, "MODEL__MASK_FORMER__ENFORCE_INPUT_PROJ": True}
    read(**forced, MODEL__MASK_FORMER__HIDDEN_DIM=2048)
    with pytest.raises(ValueError, match="ENFORCE_INPUT_PROJ"):
        read(**forced, MODEL__MASK_FORMER__HIDDEN_DIM=width)


@pytest.mark.parametrize(
    "text",
    [
        "A: 2001-99-99",
        "A: !!int x",
        "A: !!bool maybe",
        "A: !!int ''",
        "A: !!timestamp x",
        "? !!python/tuple [[1]]\n: 2",
        "A: " + "[" * 3000,
    ],
)
def test_values_that_yaml_cannot_make_are_refused_with_the_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml is not a YAML file of plain data"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["{[]: 1}", "-" * 100_000 + "1", "(" * 5000, "1 +", "name", "f(1)", "\0"])
def test_a_text_that_is_no_literal_of_python_stays_a_text(text):
    assert flatten({"A": {"B": text}}) == {"A.B": text}


def test_a_configuration_nested_deeper_than_any_is_refused():
    values = {"A": 1}
    for _ in range(12):
        values = {"A": values}
    with pytest.raises(ValueError, match=r"nested more than 8 deep at A\.A\."):
        flatten(values)


def test_a_circle_by_a_roundabout_way_is_refused(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.yaml").write_text("_BASE_: ../here/a.yaml\n")
    with pytest.raises(ValueError, match="circular chain of bases"):
        read_yaml(tmp_path / "here" / "a.yaml")


def test_a_section_takes_the_place_of_an_empty_one_and_the_other_way_round(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL:\nINPUT: {FORMAT: RGB}\n")
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\nMODEL: {A: 1}\nINPUT:\n")
    assert read_yaml(tmp_path / "a.yaml") == {"MODEL": {"A": 1}, "INPUT": None}


def test_encoder_layers_count_only_where_the_pixel_decoder_has_them(read):
    config = read(MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS=6).config()
    assert type(config.decoder_config).__name__ == "DetrConfig"


def test_a_baseline_without_queries_has_no_encoder_layers(read):
    head = {**SMALLEST["MODEL"]["SEM_SEG_HEAD"], "NAME": "PerPixelBaselineHead", "TRANSFORMER_ENC_LAYERS": 6}
    head["PIXEL_DECODER_NAME"] = "TransformerEncoderPixelDecoder"
    with pytest.raises(ValueError, match="PIXEL_DECODER_NAME 'TransformerEncoderPixelDecoder'"):
        read(MODEL__META_ARCHITECTURE="SemanticSegmentor", MODEL__SEM_SEG_HEAD=head)
