"""The models of the paper by name: as large as the paper's, with its classes and settings."""

import re
from pathlib import Path

import pytest
import torch
from test_scripts import load

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.configuration_maskformer_parts import MaskFormerTransformerConfig
from hf_maskformer.configuration_per_pixel_baseline import PerPixelBaselineConfig
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.hub.conversion import model_class
from hf_maskformer.training.presets import DATA_SETS, PRESETS, find_preset

MODEL_ZOO = Path(__file__).parents[1] / "docs" / "model_zoo.md"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_the_paper_s_model(name):
    config = PRESETS[name].config()
    with torch.device("meta"):
        model = model_class(config)(config)
    # Frozen batch normalisation has no parameters there.
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{parameters / 1e6:.3f}" == f"{PRESETS[name].reported_parameters:.3f}"


@pytest.mark.parametrize("name", PRESETS)
def test_config_and_image_processor_of_a_preset_go_together(name):
    preset = PRESETS[name]
    config, processor = preset.config(), preset.image_processor()
    assert config.num_labels == processor.num_labels == preset.data_set.num_labels
    assert processor.ignore_index == preset.data_set.ignore_index
    assert preset.weights_url.endswith(f"/{preset.weights_file}")
    if isinstance(config, PerPixelBaselineConfig):
        assert config.semantic_loss_ignore_index == processor.ignore_index


@pytest.mark.parametrize("name", PRESETS)
def test_sublayers_attention_and_activations_drop_out_as_in_the_paper_s_code(name):
    decoder = PRESETS[name].config().decoder_config
    if decoder is not None:
        assert (decoder.dropout, decoder.attention_dropout, decoder.activation_dropout) == (0.1, 0.1, 0.1)


def test_a_baseline_ignores_what_given_labels_ignore():
    labels = LabelSet({label: f"class {label}" for label in range(150)}, ignore_index=700)
    preset = PRESETS["ade20k-per-pixel-baseline-r50"]
    assert preset.config(labels).semantic_loss_ignore_index == preset.image_processor(labels).ignore_index == 700


@pytest.mark.parametrize(("name", "num_things"), [("coco-panoptic", 80), ("ade20k-panoptic", 100)])
def test_panoptic_presets_know_their_things(name, num_things):
    preset = PRESETS[f"{name}-r50"]
    labels = preset.data_set.labels()
    assert len(labels.thing_ids) == num_things
    fused = preset.image_processor().label_ids_to_fuse
    assert sorted([*fused, *labels.thing_ids]) == list(range(preset.data_set.num_labels))
    assert preset.image_processor().panoptic_thresholds == preset.data_set.panoptic_thresholds


def test_thresholds_survive_saving(tmp_path):
    PRESETS["ade20k-panoptic-r50"].image_processor().save_pretrained(tmp_path)
    read = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert read.panoptic_thresholds == {"threshold": 0.7, "overlap_mask_area_threshold": 0.8}


def test_only_panoptic_resnets_have_a_transformer_in_the_pixel_decoder():
    with_encoder = {
        name
        for name, preset in PRESETS.items()
        if isinstance(decoder := preset.config().decoder_config, MaskFormerTransformerConfig)
        and decoder.pixel_decoder_layers == 6
    }
    assert with_encoder == {
        f"{data}-panoptic-{backbone}" for data in ("coco", "ade20k") for backbone in ("r50", "r101")
    }


@pytest.mark.parametrize(
    ("name", "shortest", "longest", "divisor"),
    [
        ("ade20k-r50", 512, 2048, 32),
        ("ade20k-swin-large", 640, 2560, 32),
        ("ade20k-per-pixel-baseline-r50", 512, 2048, 0),
        ("coco-panoptic-swin-tiny", 800, 1333, 0),
        ("cityscapes-r101c", 1024, 2048, 32),
    ],
)
def test_images_have_the_paper_s_size_at_inference(name, shortest, longest, divisor):
    processor = PRESETS[name].image_processor()
    assert processor.size == {"shortest_edge": shortest, "longest_edge": longest}
    assert processor.size_divisor == divisor


def test_label_files_of_ade20k_count_from_one_and_panoptic_ones_do_not():
    assert PRESETS["ade20k-r50"].image_processor().do_reduce_labels
    assert not PRESETS["ade20k-panoptic-r50"].image_processor().do_reduce_labels


def test_the_ignored_value_is_that_of_the_data_set_s_files():
    others = {"ade20k-full": 65535, "mapillary-vistas": 65}
    for preset in PRESETS.values():
        (expected,) = {value for name, value in others.items() if preset.name.startswith(name)} or {255}
        assert preset.image_processor().ignore_index == expected
        config = preset.config()
        assert getattr(config, "semantic_loss_ignore_index", expected) == expected


def test_classes_without_known_names_can_be_named():
    preset = PRESETS["mapillary-vistas-r50"]
    assert preset.config().id2label[64] == "LABEL_64"
    labels = LabelSet({label: f"class {label}" for label in range(65)})
    assert preset.config(labels).id2label[64] == "class 64"
    with pytest.raises(ValueError, match=r"2 classes are given, but mapillary-vistas-r50 has 65"):
        preset.config(LabelSet({0: "a", 1: "b"}))
    with pytest.raises(ValueError, match=r"2 classes are given"):
        preset.image_processor(LabelSet({0: "a", 1: "b"}))


@pytest.mark.parametrize("name", DATA_SETS)
def test_known_names_are_as_many_as_classes(name):
    labels = DATA_SETS[name].labels()
    assert labels is None or labels.num_labels == DATA_SETS[name].num_labels


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(ValueError, match=r"no preset 'ade20k-swin-tinny'\. Similar names are ade20k-swin-tiny, "):
        find_preset("ade20k-swin-tinny")


@pytest.mark.parametrize("name", ["ade20k-r101c", "coco-panoptic-r50", "ade20k-per-pixel-baseline-plus-r50"])
def test_the_table_of_the_model_zoo_is_what_its_script_prints(name):
    assert load("model_zoo").row(PRESETS[name]) in MODEL_ZOO.read_text().splitlines()


def test_the_table_of_the_model_zoo_has_every_preset():
    assert re.findall(r"^\| `([^`]+)`", MODEL_ZOO.read_text(), flags=re.MULTILINE) == list(PRESETS)


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"no preset 'zzz'.*ade20k-full-r50.*ade20k-r50.*mapillary-vistas-r50"):
        find_preset("zzz")
