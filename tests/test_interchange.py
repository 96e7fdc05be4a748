"""Checkpoints that go to transformers' own MaskFormer and come back, of every architecture that it can express."""

import json

import pytest
import torch
import transformers
from models import convnext_config, resnet_config, swin_config, swinv2_config, tiny_config
from transformers import ResNetConfig, SwinConfig

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerModel


def basic_resnet_config() -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 2, 1, 1], layer_type="basic")


def bottleneck_resnet_config() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 48, 64], depths=[2, 1, 1, 1], downsample_in_bottleneck=True
    )


def wide_window_swin_config() -> SwinConfig:
    """Windows larger than the last maps, and no multiple of which is any map."""
    return SwinConfig(embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=7, qkv_bias=False)


BACKBONES = [
    resnet_config,
    basic_resnet_config,
    bottleneck_resnet_config,
    swin_config,
    wide_window_swin_config,
    convnext_config,
    swinv2_config,
]
HEADS = {
    "class_predictor.weight",
    "class_predictor.bias",
    "criterion.empty_weight",
    *(f"mask_embedder.{layer}.0.{name}" for layer in range(3) for name in ("weight", "bias")),
}


def new_model(model_class, backbone):
    """With a running variance and norms that are not those of a new model, so that a lost one is seen."""
    model = model_class(tiny_config(backbone())).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1 and "criterion" not in name:
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def load(model_class, folder):
    """The model, and the names of the tensors that the folder lacked, had too many, or had in another shape."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", ["MaskFormerModel", "MaskFormerForInstanceSegmentation"])
def test_sharded_files_travel_both_ways(tmp_path, backbone, name):
    ours, stock = {
        "MaskFormerModel": (MaskFormerModel, transformers.MaskFormerModel),
        "MaskFormerForInstanceSegmentation": (
            MaskFormerForInstanceSegmentation,
            transformers.MaskFormerForInstanceSegmentation,
        ),
    }[name]
    first = new_model(ours, backbone)
    first.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    second, *differences = load(stock, tmp_path / "ours")
    assert not any(differences)
    second.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    third, *differences = load(ours, tmp_path / "stock")
    assert not any(differences)
    for folder in ("ours", "stock"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == first.state_dict().keys()
        assert len(set(index["weight_map"].values())) > 1

    pixel_values = torch.randn(2, 3, 61, 90)
    with torch.no_grad():
        outputs = [model(pixel_values, output_hidden_states=True) for model in (first, second, third)]
    for a, b, c in zip(*(output.hidden_states for output in outputs), strict=True):
        # Of the largest value: kernels differ, formulas do not.
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-6)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "base_class", [MaskFormerModel, transformers.MaskFormerModel, transformers.AutoModel], ids=lambda c: c.__module__
)
def test_the_base_model_takes_its_part_of_a_whole_checkpoint(tmp_path, backbone, base_class):
    whole = new_model(MaskFormerForInstanceSegmentation, backbone)
    whole.save_pretrained(tmp_path)
    base, missing, unexpected, mismatched = load(base_class, tmp_path)
    assert not missing
    assert not mismatched
    assert set(unexpected) == HEADS
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.model(pixel_values).transformer_decoder_last_hidden_state
        found = base(pixel_values).transformer_decoder_last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
@pytest.mark.parametrize("base_class", [MaskFormerModel, transformers.MaskFormerModel], ids=lambda c: c.__module__)
def test_a_whole_model_made_of_a_base_model_says_that_its_heads_are_new(tmp_path, backbone, base_class):
    ours = new_model(MaskFormerModel, backbone)
    ours.save_pretrained(tmp_path / "ours")
    load(base_class, tmp_path / "ours")[0].save_pretrained(tmp_path / "base")
    whole, missing, unexpected, mismatched = load(MaskFormerForInstanceSegmentation, tmp_path / "base")
    assert set(missing) == HEADS
    assert not unexpected
    assert not mismatched
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in whole.model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_a_configuration_of_transformers_makes_our_model(backbone, tmp_path):
    config = transformers.MaskFormerConfig(backbone_config=backbone(), decoder_config=tiny_config().decoder_config)
    config.id2label = {0: "sky", 1: "road"}
    for model in (MaskFormerForInstanceSegmentation(config), MaskFormerModel(config)):
        assert isinstance(model.config, MaskFormerConfig)
        assert model.config.id2label == {0: "sky", 1: "road"}
    expected = MaskFormerForInstanceSegmentation(config).eval()
    expected.save_pretrained(tmp_path)
    stock = transformers.MaskFormerConfig.from_pretrained(tmp_path)
    found = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, config=stock).eval()
    assert isinstance(found.config, MaskFormerConfig)
    pixel_values = torch.randn(1, 3, 64, 96)
    assert torch.equal(found(pixel_values).masks_queries_logits, expected(pixel_values).masks_queries_logits)
    eager = MaskFormerForInstanceSegmentation._from_config(config, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
