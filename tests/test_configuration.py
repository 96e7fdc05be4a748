import copy
import json
import math
import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import resnet_config, swin_config, tiny_config
from transformers import DetrConfig, ResNetConfig

from hf_maskformer import MaskFormerConfig, PerPixelBaselineConfig
from hf_maskformer.configuration_maskformer_parts import MaskFormerTransformerConfig

TRANSFORMER = {"model_type": "maskformer-transformer"}


def test_the_default_is_the_architecture_of_the_default_in_transformers():
    ours, stock = MaskFormerConfig(), transformers.MaskFormerConfig()
    for field in ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate", "image_size"):
        assert getattr(ours.backbone_config, field) == getattr(stock.backbone_config, field)
    for field in ("fpn_feature_size", "mask_feature_size", "mask_weight", "dice_weight", "no_object_weight"):
        assert getattr(ours, field) == getattr(stock, field)
    assert ours.decoder_config.to_dict() == stock.decoder_config.to_dict()


def test_saved_json_is_read_back_equal(tmp_path):
    config = tiny_config(swin_config(), deep_supervision=False, class_cost=2.0, id2label={0: "sky", 1: "road"})
    config.save_pretrained(tmp_path)
    assert MaskFormerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["num_attention_heads"], saved["num_hidden_layers"]) == ("maskformer", 2, 2)


def test_transformers_reads_our_json_and_we_read_its(tmp_path):
    tiny_config(id2label={0: "sky", 1: "road", 2: "car"}).save_pretrained(tmp_path / "ours")
    stock = transformers.MaskFormerConfig.from_pretrained(tmp_path / "ours")
    assert stock.id2label == {0: "sky", 1: "road", 2: "car"}
    assert stock.decoder_config.d_model == 16
    stock.save_pretrained(tmp_path / "stock")
    ours = MaskFormerConfig.from_pretrained(tmp_path / "stock")
    assert ours.backbone_config.hidden_sizes == resnet_config().hidden_sizes
    assert ours.deep_supervision


def test_nested_configurations_of_the_caller_are_never_changed():
    backbone, decoder = ResNetConfig(), DetrConfig(auxiliary_loss=True)
    dictionary = {"model_type": "swin", "depths": [2, 2, 6, 2]}
    before = copy.deepcopy((backbone.to_dict(), decoder.to_dict(), dictionary))
    config = MaskFormerConfig(backbone_config=backbone, decoder_config=decoder)
    config.decoder_config.num_queries = 7
    MaskFormerConfig(backbone_config=dictionary).backbone_config.depths.append(1)
    assert (backbone.to_dict(), decoder.to_dict(), dictionary) == before


def test_four_feature_maps_are_taken_from_a_backbone_that_names_none():
    config = MaskFormerConfig(backbone_config=ResNetConfig())
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]


def test_what_crashes_transformers_is_never_saved(tmp_path):
    config = MaskFormerConfig(use_auxiliary_loss=True, decoder_config=DetrConfig(auxiliary_loss=True))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["use_auxiliary_loss"] is False
    assert saved["decoder_config"]["auxiliary_loss"] is False
    assert saved["deep_supervision"] is True
    config.use_auxiliary_loss = config.decoder_config.auxiliary_loss = True
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == saved


def test_fields_given_to_from_pretrained_are_checked_and_mapped_too(tmp_path):
    tiny_config(deep_supervision=False).save_pretrained(tmp_path)
    config = MaskFormerConfig.from_pretrained(tmp_path, use_auxiliary_loss=True, mask_weight=5.0)
    assert (config.use_auxiliary_loss, config.deep_supervision, config.mask_weight) == (False, True, 5.0)
    with pytest.raises(ValueError, match="fpn_feature_size is 48"):
        MaskFormerConfig.from_pretrained(tmp_path, fpn_feature_size=48)


def test_a_dictionary_changes_fields_of_a_nested_configuration_and_is_checked_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = MaskFormerConfig.from_pretrained(tmp_path, decoder_config={"num_queries": 3, "auxiliary_loss": True})
    assert (config.decoder_config.num_queries, config.decoder_config.d_model) == (3, 16)
    assert config.decoder_config.auxiliary_loss is False
    for field, value in (("d_model", 33), ("num_queries", 0), ("decoder_layers", 0), ("decoder_attention_heads", 3)):
        with pytest.raises(ValueError, match=f"decoder_config.{'d_model' if 'heads' in field else field} is "):
            MaskFormerConfig.from_pretrained(tmp_path, decoder_config={field: value})


def test_a_dictionary_of_another_type_takes_the_place_of_a_nested_configuration(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    swin = swin_config().to_dict()
    given = {"backbone_config": swin, "decoder_config": {"model_type": "maskformer-transformer", "d_model": 32}}
    config = MaskFormerConfig.from_pretrained(tmp_path, **given)
    config.save_pretrained(tmp_path)
    for each in (config, MaskFormerConfig.from_pretrained(tmp_path)):
        assert each.backbone_config.model_type.endswith("swin")
        assert each.backbone_config.depths == swin["depths"]
        assert (each.decoder_config.model_type, each.decoder_config.d_model) == ("maskformer-transformer", 32)


@pytest.mark.parametrize("nothing", ["missing", None])
def test_a_dictionary_changes_the_default_where_a_file_has_no_nested_configuration(nothing, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    if nothing is None:
        fields |= {"backbone_config": None, "decoder_config": None}
    else:
        del fields["backbone_config"], fields["decoder_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    given = {"backbone_config": {"embed_dim": 64}, "decoder_config": {"num_queries": 7}}
    config = MaskFormerConfig.from_pretrained(tmp_path, **given)
    default = MaskFormerConfig()
    assert (config.backbone_config.embed_dim, config.decoder_config.num_queries) == (64, 7)
    assert config.backbone_config.depths == default.backbone_config.depths
    assert config.decoder_config.d_model == default.decoder_config.d_model
    (tmp_path / "config.json").write_text(json.dumps(fields | {"decoder_config": "x"}))
    with pytest.raises(ValueError, match="decoder_config is a str"):
        MaskFormerConfig.from_pretrained(tmp_path, **given)


def test_matching_costs_follow_the_loss_weights_unless_set():
    assert tiny_config(mask_weight=7.0).matching_costs == {"class_cost": 1.0, "mask_cost": 7.0, "dice_cost": 1.0}
    assert tiny_config(mask_weight=7.0, mask_cost=0).matching_costs["mask_cost"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fpn_feature_size": 48}, "fpn_feature_size is 48, but must be a multiple of 32"),
        ({"mask_feature_size": 0}, "mask_feature_size is 0, but must be 1 to 65536"),
        ({"mask_weight": -1.0}, "mask_weight is -1.0, but must be a finite number of at least 0"),
        ({"no_object_weight": 0.0}, "no_object_weight is 0.0, but must be a finite number above 0"),
        ({"cross_entropy_weight": 0, "mask_weight": 0, "dice_weight": 0}, "dice_weight are all 0, so the loss is 0"),
        ({"class_cost": 0, "mask_cost": 0, "dice_cost": 0}, "class_cost, mask_cost and dice_cost are all 0"),
        ({"use_auxiliary_loss": True, "deep_supervision": False}, "contradict each other"),
        ({"id2label": {1: "road", 2: "car"}}, "id2label has the ids .1, 2.*0 to 1 without gaps"),
        ({"id2label": {}}, "id2label is empty"),
        ({"decoder_config": {"model_type": "bert"}}, "decoder_config is of type 'bert', but must be of type 'detr'"),
        ({"decoder_config": {"model_type": "nonsense"}}, "decoder_config has model_type 'nonsense'"),
        ({"decoder_config": 3}, "decoder_config is a int, but must be a configuration or its dictionary"),
        ({"decoder_config": {"d_model": 30}}, "decoder_config.d_model is 30, but must be a multiple"),
        ({"decoder_config": {"num_queries": 0}}, "decoder_config.num_queries is 0"),
        ({"decoder_config": {"dropout": 3.0}}, "decoder_config.dropout is 3.0, but must be a probability"),
        ({"decoder_config": {"dropout": math.nan}}, "decoder_config.dropout is nan, but must be a probability"),
        ({"decoder_config": {**TRANSFORMER, "attention_dropout": -0.5}}, "decoder_config.attention_dropout is -0.5"),
        ({"decoder_config": DetrConfig(activation_dropout=1.5)}, "decoder_config.activation_dropout is 1.5"),
        ({"decoder_config": {"activation_function": "x"}}, "decoder_config.activation_function is 'x', which is unkn"),
        ({"decoder_config": {"position_embedding_type": "learned"}}, "position_embedding_type is 'learned'"),
        ({"backbone_config": {"hidden_sizes": [8]}}, "backbone_config has model_type None"),
        ({"backbone": "microsoft/resnet-50", "use_timm_backbone": False}, "names a backbone, but its configuration is"),
        (
            {"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage4"]}},
            "backbone_config.out_features is .* takes 4 feature maps",
        ),
        ({"backbone_config": {"model_type": "swin", "num_heads": [3, 5, 12, 24]}}, r"num_heads\[1\] is 5"),
        ({"backbone_config": {"model_type": "swin", "depths": [2, 2]}}, "has 4 stages"),
        ({"backbone_config": {"model_type": "swin", "drop_path_rate": 1}}, "drop_path_rate is 1, but must be a prob"),
        ({"backbone_config": {"model_type": "swin", "hidden_dropout_prob": 2.0}}, "hidden_dropout_prob is 2.0"),
        ({"backbone_config": {"model_type": "swin", "num_channels": 0}}, "num_channels is 0, but must be at least 1"),
        ({"backbone_config": {"model_type": "resnet", "hidden_act": "x"}}, "backbone_config.hidden_act is 'x', which"),
        (
            {"backbone_config": {"model_type": "resnet", "hidden_sizes": [32, 32]}},
            r"hidden_sizes \[32, 32\] and",
        ),
        ({"backbone_config": {"model_type": "swin", "use_absolute_embeddings": True}}, "use_absolute_embeddings"),
        ({"backbone_config": {"model_type": "swin", "num_heads": [3, 6, 12]}}, "has 4 stages: give 4 numbers each"),
        ({"backbone_config": {"model_type": "swin", "window_size": 0}}, "window_size is 0, but must be 1 to 64"),
        ({"backbone_config": {"model_type": "maskformer-swin", "num_heads": [3, 5, 12, 24]}}, r"num_heads\[1\] is 5"),
        (
            {"backbone_config": {"model_type": "maskformer-resnet", "hidden_sizes": [32, 32]}},
            r"hidden_sizes \[32, 32\] and depths \[3, 4, 23, 3\]",
        ),
        (
            {"backbone_config": {"model_type": "maskformer-resnet", "last_stage_dilations": [1, 0, 4]}},
            r"last_stage_dilations is \[1, 0, 4\], but must hold one number of at least 1",
        ),
        ({"backbone_config": ResNetConfig(hidden_sizes=[8, 16, 32, 70_000])}, "no number there may exceed 65536"),
        ({"class_cost": -1.0}, "class_cost is -1.0, but must be a finite number of at least 0"),
        ({"mask_cost": math.nan}, "mask_cost is nan, but must be a finite number of at least 0"),
        ({"dice_weight": math.inf}, "dice_weight is inf, but must be a finite number of at least 0"),
        ({"no_object_weight": math.nan}, "no_object_weight is nan, but must be a finite number above 0"),
        ({"decoder_config": {"decoder_ffn_dim": 0}}, "decoder_config.decoder_ffn_dim is 0, but must be at least 1"),
        ({"decoder_config": {**TRANSFORMER, "encoder_layers": -1}}, "decoder_config.encoder_layers is -1"),
        ({"decoder_config": {"d_model": 18, "decoder_attention_heads": 2}}, "d_model is 18, but must be a .* and of 4"),
        ({"decoder_config": {"decoder_attention_heads": -4}}, r"decoder_attention_heads is -4, but must be at least 1"),
        (
            {"decoder_config": {**TRANSFORMER, "encoder_layers": 1, "encoder_attention_heads": 0}},
            r"d_model is 256, but must be a multiple of encoder_attention_heads \(0\)",
        ),
    ],
)
def test_what_no_model_can_have_fails_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerConfig(**fields)


def test_a_file_tells_heads_and_layers_of_the_decoder_apart():
    saved = tiny_config(decoder_config=DetrConfig(decoder_layers=3, decoder_attention_heads=2)).to_dict()
    assert (saved["num_attention_heads"], saved["num_hidden_layers"]) == (2, 3)


def test_our_transformers_have_the_sizes_of_the_paper_s_by_default():
    ours, stock = MaskFormerTransformerConfig(), DetrConfig()
    for field in ("d_model", "num_queries", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"):
        assert getattr(ours, field) == getattr(stock, field)
    assert (ours.encoder_attention_heads, ours.encoder_ffn_dim) == (8, 2048)


def test_points_are_drawn_as_mask2former_does_by_default():
    config = MaskFormerConfig()
    assert (config.train_num_points, config.oversample_ratio, config.importance_sample_ratio) == (None, 3.0, 0.75)


def test_a_file_of_another_model_is_refused_and_one_without_a_type_is_ours(tmp_path):
    ours, baseline = tiny_config().to_dict(), PerPixelBaselineConfig().to_dict()
    with pytest.raises(ValueError, match="is for a model of type 'per-pixel-baseline', but MaskFormerConfig is for"):
        MaskFormerConfig.from_dict(baseline)
    with pytest.raises(ValueError, match="is for a model of type 'maskformer', but PerPixelBaselineConfig is for"):
        PerPixelBaselineConfig.from_dict(ours)
    untyped = {name: value for name, value in ours.items() if name != "model_type"}
    assert MaskFormerConfig.from_dict(untyped).to_dict() == ours


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_file_names_a_floating_type_by_either_name(name):
    fields = {key: value for key, value in tiny_config().to_dict().items() if key != "dtype"}
    assert MaskFormerConfig.from_dict({**fields, name: "bfloat16"}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="The dtype of the configuration is 'int8', but must be one of auto, float32"):
        MaskFormerConfig.from_dict({**fields, name: "int8"})


def test_the_name_of_a_backbone_beside_its_configuration_is_left_alone():
    for config_class in (MaskFormerConfig, PerPixelBaselineConfig):
        config = config_class(backbone="microsoft/resnet-50", backbone_config=resnet_config())
        assert config.backbone_config.hidden_sizes == resnet_config().hidden_sizes
        with pytest.raises(ValueError, match="names a backbone, but its configuration is needed"):
            config_class(backbone="microsoft/resnet-50")


def test_a_field_of_the_decoder_that_has_the_same_value_there_is_not_warned_of(caplog):
    MaskFormerConfig(num_queries=100)
    assert caplog.text == ""


def test_a_contradiction_among_fields_given_to_from_pretrained_is_refused_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contradict each other"):
        MaskFormerConfig.from_pretrained(tmp_path, use_auxiliary_loss=True, deep_supervision=False)


@pytest.mark.parametrize(("field", "value"), [("mask_weight", "heavy"), ("id2label", ["a"]), ("label2id", ["a"])])
def test_a_field_of_the_wrong_type_is_named(field, value):
    # Some versions of huggingface_hub check the type before this package does, by an error of their own.
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=field):
        MaskFormerConfig(**{field: value})


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (MaskFormerConfig, {"mask_weigth": 5.0}, "mask_weigth is not a field .* Did you mean mask_weight?"),
        (MaskFormerConfig, {"num_label": 5}, "num_label is not a field .* Did you mean num_labels?"),
        (
            MaskFormerConfig,
            {"num_queries": 50},
            "num_queries=50 has no effect here: .* of decoder_config, which has 100",
        ),
        (
            MaskFormerConfig,
            {"decoder_config": {**TRANSFORMER, "pixel_decoder_layer": 6}},
            "decoder_config.pixel_decoder_layer .* Did you mean decoder_config.pixel_decoder_layers?",
        ),
        (PerPixelBaselineConfig, {"freeze_batchnorm": False}, "Did you mean freeze_batch_norm?"),
    ],
)
def test_a_misspelt_or_misplaced_field_is_answered_by_the_right_one(config_class, fields, message, caplog):
    config_class(**fields)
    assert re.search(message, caplog.text)


def test_names_of_the_own_are_kept_and_files_of_any_version_loaded_without_a_warning(tmp_path, caplog):
    config = MaskFormerConfig(
        experiment="a", num_labels=3, attn_implementation="eager", output_attentions=True, dtype="float32"
    )
    assert (config.experiment, config.num_labels) == ("a", 3)
    transformers.MaskFormerConfig().save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    # What files of 2022 hold beside it.
    common = "add_cross_attention bad_words_ids do_sample finetuning_task is_decoder num_beams output_attentions "
    common += "output_scores pruned_heads return_dict_in_generate tie_word_embeddings top_k torchscript use_bfloat16"
    file |= dict.fromkeys(common.split()) | {"torch_dtype": "float32", "num_attention_heads": 8, "num_hidden_layers": 6}
    file["decoder_config"] |= {"scale_embedding": False, "max_position_embeddings": 1024, "num_queries": 100}
    MaskFormerConfig.from_dict(file)
    for own in (tiny_config(swin_config()), tiny_config(decoder_config=TRANSFORMER, experiment="b")):
        own.save_pretrained(tmp_path)
        assert MaskFormerConfig.from_pretrained(tmp_path).to_dict() == own.to_dict()
    PerPixelBaselineConfig(decoder_config=TRANSFORMER, num_labels=5).save_pretrained(tmp_path)
    PerPixelBaselineConfig.from_pretrained(tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("source", ["new", "changed", "saved"])
def test_labels_are_found_by_their_names(source, tmp_path):
    config = tiny_config(id2label={0: "sky", 1: "road"})
    config.save_pretrained(tmp_path)
    if source == "changed":
        tiny_config().save_pretrained(tmp_path)
        config = MaskFormerConfig.from_pretrained(tmp_path, id2label={0: "sky", 1: "road"})
    elif source == "saved":
        config = MaskFormerConfig.from_pretrained(tmp_path)
    assert config.label2id == {"sky": 0, "road": 1}


def test_classes_keep_their_names_unless_their_number_changes(tmp_path):
    tiny_config(id2label={0: "sky", 1: "road", 2: "car"}).save_pretrained(tmp_path)
    names = MaskFormerConfig.from_pretrained(tmp_path, num_labels=3).id2label
    assert names == {0: "sky", 1: "road", 2: "car"}
    nothing = {"id2label": None, "label2id": None}  # as scripts pass what they were not given
    assert MaskFormerConfig.from_pretrained(tmp_path, num_labels=3, **nothing).id2label == names
    assert MaskFormerConfig.from_pretrained(tmp_path, **nothing).id2label == names
    for given in ({"num_labels": 2}, {"num_labels": 2, **nothing}):
        assert MaskFormerConfig.from_pretrained(tmp_path, **given).id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_names_with_their_labels_are_enough(tmp_path):
    tiny_config(id2label={0: "sky", 1: "road"}).save_pretrained(tmp_path)
    config = MaskFormerConfig.from_pretrained(tmp_path, label2id={"tree": 0, "dog": 1, "cat": 2})
    for each in (config, MaskFormerConfig(label2id={"tree": 0, "dog": 1, "cat": 2})):
        assert (each.id2label, each.num_labels) == ({0: "tree", 1: "dog", 2: "cat"}, 3)
    with pytest.raises(ValueError, match="label2id has 3 names for 2 labels"):
        MaskFormerConfig(label2id={"tree": 0, "dog": 1, "cat": 1})
    with pytest.raises(ValueError, match=r"id2label has the ids \[0, 2\]"):
        MaskFormerConfig.from_pretrained(tmp_path, label2id={"tree": 0, "dog": 2})
