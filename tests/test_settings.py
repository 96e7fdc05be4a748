"""Each setting of a configuration reaches the part that it is about."""

import pytest
import torch
import transformers
from models import swin_config, tiny_config, tiny_model

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerModel
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig
from hf_maskformer.modeling_maskformer_swin import PatchEmbedding, SwinBackbone, SwinBlock, SwinStage
from hf_maskformer.modeling_maskformer_transformer_decoder import TransformerDecoderLayer
from hf_maskformer.modeling_maskformer_transformer_layers import Attention


def changed(config, **fields):
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def config_with_decoder(**fields):
    config = tiny_config()
    changed(config.decoder_config, **fields)
    return config


@pytest.mark.parametrize(
    "config",
    [
        *(
            tiny_config(changed(swin_config(), **{name: value}))
            for name, value in (
                ("layer_norm_eps", 0.5),
                ("hidden_act", "relu"),
                ("mlp_ratio", 2.0),
                ("qkv_bias", False),
            )
        ),
        config_with_decoder(activation_function="gelu"),
        config_with_decoder(pre_norm=True),  # which only types of this package have
    ],
    ids=["layer_norm_eps", "hidden_act", "mlp_ratio", "qkv_bias", "activation_function", "pre_norm"],
)
def test_settings_mean_what_they_mean_in_transformers(config, tmp_path):
    model, pixel_values = MaskFormerForInstanceSegmentation(config).eval(), torch.randn(1, 3, 64, 96)
    model.save_pretrained(tmp_path)
    stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = model(pixel_values), stock(pixel_values)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_stochastic_depth_grows_from_the_first_block_to_the_last():
    stages = SwinBackbone(changed(swin_config(), drop_path_rate=0.5)).model.encoder.layers
    rates = [block.drop_path for stage in stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@torch.no_grad()
def test_stochastic_depth_acts_without_gradient_too():
    config = changed(swin_config(), drop_path_rate=1 - 1e-6)
    stage, states = SwinStage(config, 3, [config.drop_path_rate]), torch.randn(2, 4, 4, 64)
    assert torch.equal(stage.train()(states)[0], states)
    evaluated = stage.eval()(states)[0]
    assert not torch.equal(evaluated, states)
    with torch.enable_grad():  # not in place
        torch.testing.assert_close(stage(states)[0], evaluated)


@pytest.mark.parametrize("name", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_a_swin_drops_what_its_sublayers_give(name):
    block = SwinBlock(changed(swin_config(), **{name: 1.0}), 8, 2, shift=0, drop_path=0.0)
    module = block.attention.output if name.startswith("attention") else block.output
    states = torch.randn(1, 4, 4, module.dense.in_features)
    assert not module.train()(states).any()
    assert module.eval()(states).all()


def test_a_swin_drops_patches_and_what_its_feed_forward_network_gives():
    config = changed(swin_config(), hidden_dropout_prob=1.0)
    block = SwinBlock(config, 8, 1, shift=0, drop_path=0.0).train()
    assert not block._feed_forward(torch.randn(1, 4, 4, 8)).any()
    assert block.intermediate(torch.randn(1, 4, 4, 8)).all()
    assert not PatchEmbedding(config).train()(torch.randn(1, 3, 16, 16)).any()


def test_attention_of_the_decoder_drops_in_training_only():
    model = MaskFormerForInstanceSegmentation(config_with_decoder(attention_dropout=0.5))
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        trained = [model.train()(pixel_values).class_queries_logits for _ in range(2)]
        evaluated = [model.eval()(pixel_values).class_queries_logits for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*evaluated)


def test_the_feed_forward_network_drops_in_training_only():
    model = MaskFormerForInstanceSegmentation(config_with_decoder(activation_dropout=1.0))
    layer, hidden = model.model.transformer_module.decoder.layers[0], []
    layer.fc2.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    for is_training in (True, False):
        layer.train(is_training).feed_forward(torch.randn(1, 6, 16))
    assert not hidden[0].any()
    assert hidden[1].any()


@pytest.mark.parametrize("is_inside", [False, True])
def test_each_dropout_of_a_decoder_layer_acts_in_its_place(is_inside):
    config = MaskFormerTransformerConfig(
        d_model=16, dropout=1.0 - is_inside, attention_dropout=0.0, activation_dropout=1.0 * is_inside, pre_norm=True
    )
    layer, states = TransformerDecoderLayer(config).train(), torch.randn(2, 6, 16)
    torch.nn.init.normal_(layer.fc2.bias)
    assert torch.equal(layer.feed_forward(states), states + layer.fc2.bias if is_inside else states)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_of_attention_is_its_own(implementation):
    config = MaskFormerTransformerConfig(d_model=16, dropout=0.0, attention_dropout=1.0)
    config._attn_implementation = implementation
    attention, states = Attention(config, 16, 2).train(), torch.randn(2, 6, 16)
    torch.nn.init.normal_(attention.out_proj.bias)
    update, _ = attention(states, states, states)
    torch.testing.assert_close(update, attention.out_proj.bias.expand(2, 6, 16))


def test_encoder_and_decoder_have_widths_of_their_own():
    transformer = MaskFormerTransformerConfig(
        d_model=16, num_queries=6, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=40
    )
    module = tiny_model(decoder_config=transformer).model.transformer_module
    assert [part.layers[0].fc1.out_features for part in (module.encoder, module.decoder)] == [24, 40]


def test_all_convolutions_of_a_dilated_layer_are_dilated():
    config = MaskFormerResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 2],
        layer_type="basic",
        last_stage_dilations=[2, 4],
    )
    stage = tiny_model(config).model.pixel_level_module.encoder.encoder.stages[-1]
    dilations = [[part.convolution.dilation for part in layer.layer] for layer in stage.layers]
    assert dilations == [[(2, 2), (2, 2)], [(4, 4), (4, 4)]]


@pytest.mark.parametrize(("name", "value"), [("oversample_ratio", 5.0), ("importance_sample_ratio", 0.25)])
def test_ratios_of_points_reach_the_criterion(name, value):
    points = tiny_model(train_num_points=7, **{name: value}).criterion.point_sampling
    assert getattr(points, name) == value


@pytest.mark.parametrize(
    ("model_class", "option", "name"),
    [
        (MaskFormerModel, "output_hidden_states", "encoder_hidden_states"),
        (MaskFormerForInstanceSegmentation, "output_hidden_states", "encoder_hidden_states"),
        (MaskFormerForInstanceSegmentation, "output_attentions", "attentions"),
        (MaskFormerForInstanceSegmentation, "output_auxiliary_logits", "auxiliary_logits"),
    ],
)
def test_the_configuration_says_what_is_returned_unless_the_call_does(model_class, option, name):
    model = model_class(tiny_config(attn_implementation="eager")).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    assert getattr(model(pixel_values), name) is None
    setattr(model.config, option, True)
    assert getattr(model(pixel_values), name) is not None
    assert getattr(model(pixel_values, **{option: False}), name) is None


@pytest.mark.parametrize("model_class", [MaskFormerModel, MaskFormerForInstanceSegmentation])
def test_the_configuration_may_ask_for_tuples(model_class):
    model = model_class(tiny_config(return_dict=False)).eval()
    assert isinstance(model(torch.randn(1, 3, 64, 64)), tuple)


def test_a_configuration_of_transformers_keeps_its_attention():
    names = ("backbone_config", "decoder_config", "fpn_feature_size", "mask_feature_size")
    fields = tiny_config().to_dict()
    config = transformers.MaskFormerConfig(**{name: fields[name] for name in names})
    config._attn_implementation = "eager"
    assert MaskFormerModel(config).config._attn_implementation == "eager"


def test_stochastic_depth_leaves_out_a_block_for_whole_images_each_by_itself():
    block = SwinBlock(swin_config(), dim=8, num_heads=2, shift=0, drop_path=0.5).train()
    factors = block._drop_path(torch.ones(64, 3, 4, 8)).flatten(1)
    assert torch.equal(factors, factors[:, :1].expand_as(factors))
    assert set(factors[:, 0].tolist()) == {0.0, 2.0}
