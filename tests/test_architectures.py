"""Architectures of which no numbers are stored, against a plain reading of the paper's code in PyTorch's own layers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import convnext_config, swin_config, swinv2_config, tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import BeitConfig, ConvNextConfig, Dinov2Config, DINOv3ViTConfig, ResNetConfig, SwinConfig, ViTConfig

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation
from hf_maskformer.configuration_maskformer_parts import (
    MaskFormerResNetConfig,
    MaskFormerTransformerConfig,
    SimpleFeaturePyramidConfig,
)
from hf_maskformer.hub.key_table import from_original, to_original
from hf_maskformer.modeling_maskformer_resnet import Convolution, ResNetStem
from hf_maskformer.modeling_maskformer_swin import SwinBackbone
from hf_maskformer.modeling_maskformer_transformer_layers import sine_positions

TRANSFORMER = {
    "model_type": "maskformer-transformer",
    "d_model": 16,
    "num_queries": 6,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "dropout": 0.0,
}


def deep_resnet_config() -> MaskFormerResNetConfig:
    return MaskFormerResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 3])


def lively_model(backbone=None, **transformer: object) -> MaskFormerForInstanceSegmentation:
    """Random weights whose norms and biases matter too."""
    model = MaskFormerForInstanceSegmentation(tiny_config(backbone, decoder_config={**TRANSFORMER, **transformer}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_read = "criterion" not in name and "encoder.model.layernorm" not in name
            if tensor.is_floating_point() and tensor.dim() == 1 and is_read:
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model.eval()


def close(ours: Tensor, reference: Tensor) -> bool:
    return bool((ours - reference).abs().max() <= 1e-5 * reference.abs().max())


class PlainTransformer:
    """The transformer of the paper's code (that of DETR), read from weights with the original's names."""

    def __init__(self, weights: dict[str, Tensor], num_heads: int, pre_norm: bool) -> None:
        self.weights, self.num_heads, self.pre_norm = weights, num_heads, pre_norm

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = nn.MultiheadAttention(query.shape[-1], self.num_heads, batch_first=True)
        prefix = f"{name}."
        state = {key.removeprefix(prefix): w for key, w in self.weights.items() if key.startswith(prefix)}
        attention.load_state_dict(state)
        return attention(query, key, value)[0]

    def norm(self, name: str, states: Tensor) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def feed_forward(self, layer: str, states: Tensor) -> Tensor:
        for index in (1, 2):
            name = f"{layer}.linear{index}"
            states = F.linear(states, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
            states = states.relu() if index == 1 else states
        return states

    def encode(self, prefix: str, num_layers: int, image: Tensor, positions: Tensor) -> Tensor:
        for index in range(num_layers):
            layer = f"{prefix}.layers.{index}"
            if self.pre_norm:
                normed = self.norm(f"{layer}.norm1", image)
                at = normed + positions
                image = image + self.attend(f"{layer}.self_attn", at, at, normed)
                image = image + self.feed_forward(layer, self.norm(f"{layer}.norm2", image))
            else:
                at = image + positions
                image = self.norm(f"{layer}.norm1", image + self.attend(f"{layer}.self_attn", at, at, image))
                image = self.norm(f"{layer}.norm2", image + self.feed_forward(layer, image))
        return self.norm(f"{prefix}.norm", image) if self.pre_norm else image

    def decode(self, prefix: str, num_layers: int, image: Tensor, positions: Tensor, where: Tensor) -> list[Tensor]:
        queries, outputs = torch.zeros_like(where).expand(len(image), -1, -1), []
        for index in range(num_layers):
            layer = f"{prefix}.layers.{index}"
            if self.pre_norm:
                normed = self.norm(f"{layer}.norm1", queries)
                queries = queries + self.attend(f"{layer}.self_attn", normed + where, normed + where, normed)
                at = self.norm(f"{layer}.norm2", queries) + where
                queries = queries + self.attend(f"{layer}.multihead_attn", at, image + positions, image)
                queries = queries + self.feed_forward(layer, self.norm(f"{layer}.norm3", queries))
            else:
                at = queries + where
                queries = self.norm(f"{layer}.norm1", queries + self.attend(f"{layer}.self_attn", at, at, queries))
                update = self.attend(f"{layer}.multihead_attn", queries + where, image + positions, image)
                queries = self.norm(f"{layer}.norm2", queries + update)
                queries = self.norm(f"{layer}.norm3", queries + self.feed_forward(layer, queries))
            outputs.append(self.norm(f"{prefix}.norm", queries))
        return outputs


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_transformer_encoder_and_decoder(encoder_layers: int, pre_norm: bool) -> None:
    # One number of heads, as in the original.
    model = lively_model(encoder_layers=encoder_layers, pre_norm=pre_norm, encoder_attention_heads=2)
    features = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        ours = model.model.transformer_module(features).intermediate_states
        weights = to_original(model.state_dict())
        plain = PlainTransformer(weights, num_heads=2, pre_norm=pre_norm)
        name = "sem_seg_head.predictor"
        projected = F.conv2d(features, weights[f"{name}.input_proj.weight"], weights[f"{name}.input_proj.bias"])
        image, positions = projected.flatten(2).transpose(1, 2), sine_positions((3, 5), 16, torch.device("cpu"))
        image = plain.encode(f"{name}.transformer.encoder", encoder_layers, image, positions)
        where = weights[f"{name}.query_embed.weight"]
        reference = plain.decode(f"{name}.transformer.decoder", 2, image, positions, where)
    assert close(ours, torch.stack(reference))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_transformer_encoder_of_the_pixel_decoder(pre_norm: bool) -> None:
    model = lively_model(pixel_decoder_layers=3, pre_norm=pre_norm)
    features = [torch.randn(2, channels, 8 * size, 4 * size) for channels, size in ((8, 8), (16, 4), (32, 2), (64, 1))]
    with torch.no_grad():
        pixel_embeddings, memory, *_ = model.model.pixel_level_module.decoder([*features])
        weights = to_original(model.state_dict())
        name = "sem_seg_head.pixel_decoder"
        projected = F.conv2d(features[-1], weights[f"{name}.input_proj.weight"], weights[f"{name}.input_proj.bias"])
        plain = PlainTransformer(weights, num_heads=4, pre_norm=pre_norm)
        image, positions = projected.flatten(2).transpose(1, 2), sine_positions((8, 4), 32, torch.device("cpu"))
        image = plain.encode(f"{name}.transformer.encoder", 3, image, positions)
        image = image.transpose(1, 2).unflatten(2, (8, 4))
        assert close(memory, image)

        level = None
        for index, lateral in zip((4, 3, 2, 1), (image, *features[2::-1]), strict=True):
            if level is not None:
                adapted = F.conv2d(lateral, weights[f"{name}.adapter_{index}.weight"])
                lateral = group_norm(weights, f"{name}.adapter_{index}.norm", adapted)
                lateral = lateral + F.interpolate(level, size=lateral.shape[-2:], mode="nearest")
            level = F.conv2d(lateral, weights[f"{name}.layer_{index}.weight"], padding=1)
            level = group_norm(weights, f"{name}.layer_{index}.norm", level).relu()
        features_of_masks = F.conv2d(
            level, weights[f"{name}.mask_features.weight"], weights[f"{name}.mask_features.bias"], padding=1
        )
    assert close(pixel_embeddings, features_of_masks)


def group_norm(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    return F.group_norm(states, 32, weights[f"{name}.weight"], weights[f"{name}.bias"])


@torch.no_grad()
def test_all_of_a_deep_stem_has_the_activation_of_the_configuration() -> None:
    config, states = deep_resnet_config(), torch.randn(2, 3, 32, 32)
    config.hidden_act = "gelu"
    for part in ResNetStem(config).eval().embedder:
        states = part(states)
        assert -0.2 < states.min() < 0  # where ReLU gives 0


def test_deep_stem_and_dilated_last_stage() -> None:
    """Three convolutions, pooling; stages of bottlenecks whose last one has dilations 1, 2, 4 and keeps its stride."""
    model = lively_model(deep_resnet_config())
    weights, pixel_values = to_original(model.state_dict()), torch.randn(2, 3, 64, 96)

    def convolve(name: str, states: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        states = F.conv2d(states, weight, None, stride, weight.shape[-1] // 2 * dilation, dilation)
        norm = [weights[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(states, *norm, eps=1e-5)

    with torch.no_grad():
        ours = model.model.pixel_level_module.encoder(pixel_values)
        states = convolve("backbone.stem.conv1", pixel_values, stride=2).relu()
        states = convolve("backbone.stem.conv3", convolve("backbone.stem.conv2", states).relu()).relu()
        states = F.max_pool2d(states, 3, 2, 1)
        for stage, dilations in ((2, [1]), (3, [1]), (4, [1]), (5, [1, 2, 4])):
            for index, dilation in enumerate(dilations):
                name, stride = f"backbone.res{stage}.{index}", 2 if index == 0 and stage > 2 else 1
                inside = convolve(f"{name}.conv1", states).relu()
                inside = convolve(f"{name}.conv2", inside, stride, dilation).relu()
                has_shortcut = f"{name}.shortcut.weight" in weights
                residual = convolve(f"{name}.shortcut", states, stride) if has_shortcut else states
                states = (convolve(f"{name}.conv3", inside) + residual).relu()
            assert close(ours[stage - 2], states)


@pytest.mark.parametrize("backbone", [deep_resnet_config, swin_config])
def test_names_travel_to_the_original_and_back(backbone) -> None:
    model = lively_model(backbone(), pixel_decoder_layers=2, encoder_layers=1, pre_norm=True)
    tensors = model.state_dict()
    back = from_original(to_original(tensors))
    assert back.keys() == tensors.keys()
    counters = {name for name in tensors if name.endswith("num_batches_tracked")}
    assert all(torch.equal(back[name], tensors[name]) for name in tensors.keys() - counters)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("downsampling", [{}, {"downsample_in_first_stage": True}, {"downsample_in_bottleneck": True}])
def test_our_resnet_is_the_resnet_of_transformers(layer_type: str, downsampling: dict[str, bool]) -> None:
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 2, 1, 2],
        layer_type=layer_type,
        hidden_act="silu",
        out_features=["stem", "stage2", "stage3", "stage4"],
        **downsampling,
    )
    ours = MaskFormerForInstanceSegmentation(tiny_config(config)).model.pixel_level_module.encoder.eval()
    stock = transformers.AutoBackbone.from_config(config).eval()
    stock.load_state_dict(ours.state_dict())
    pixel_values = torch.randn(1, 3, 61, 90)
    with torch.no_grad():
        for a, b in zip(ours(pixel_values), stock(pixel_values).feature_maps, strict=True):
            assert close(a, b)
    assert ours.channels == stock.channels
    # Gradients too, in the layout in which the model trains and in the plain one.
    stock_maps = stock(pixel_values).feature_maps
    sum((features**2).sum() for features in stock_maps).backward()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours.zero_grad()
        sum((features**2).sum() for features in ours(pixel_values.contiguous(memory_format=layout))).backward()
        for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
            assert not a.requires_grad or close(a.grad, b.grad)


@pytest.mark.parametrize("channels", [3, 8, 12])
def test_a_narrow_convolution_with_a_stride_leaves_memory_alone(channels: int) -> None:
    """torch's own ends the process within a few of these."""
    convolution = Convolution(channels, 16, 1, stride=2, bias=False)
    for batch_size, height, width in itertools.product((1, 2, 3), (7, 33, 60, 66), (9, 32, 47, 64)):
        states, gradients = torch.randn(batch_size, channels, height, width, requires_grad=True), []
        side_by_side = states.contiguous(memory_format=torch.channels_last)
        side_by_side.register_hook(gradients.append)
        output = convolution(side_by_side)
        torch.testing.assert_close(output, F.conv2d(states, convolution.weight, stride=2))
        output.sum().backward()
        expected = convolution.weight.sum(0).expand_as(states[0, :, ::2, ::2])
        torch.testing.assert_close(states.grad[-1, :, ::2, ::2], expected)
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_resnet_trains_with_channels_side_by_side_unless_dilated_in_half_precision(
    dilation: int, dtype: torch.dtype
) -> None:
    """The backward pass of torch's narrow dilated convolutions writes beyond its memory in the other one, on a CPU."""
    backbone = MaskFormerResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], last_stage_dilations=[dilation]
    )
    model, is_channels_last = tiny_model(backbone).train(), []
    model.model.pixel_level_module.encoder.register_forward_pre_hook(
        lambda module, inputs: is_channels_last.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    batch = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(**batch).loss.backward()
    model.to(dtype)(batch["pixel_values"].to(dtype))
    assert is_channels_last == [dilation == 1 or dtype == torch.float32] * 2


def test_a_backbone_of_transformers_trains_without_channels_side_by_side() -> None:
    """It may have the convolutions whose backward pass in that layout writes beyond its memory on a CPU."""
    model, is_channels_last = tiny_model(convnext_config()), []
    model.model.pixel_level_module.encoder.register_forward_pre_hook(
        lambda module, inputs: is_channels_last.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    pixel_values = torch.randn(1, 3, 32, 64)
    model(pixel_values)
    with torch.no_grad():
        model(pixel_values)
    assert is_channels_last == [False, True]


OTHER_BACKBONES = {
    "convnext": convnext_config,
    "swinv2": swinv2_config,
    "dinov2": lambda: Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14),
    "dinov3_vit": lambda: DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16
    ),
}


@pytest.mark.parametrize("name", OTHER_BACKBONES)
def test_other_backbones_train_and_survive_a_round_trip(name: str, tmp_path) -> None:
    model = tiny_model(OTHER_BACKBONES[name]())
    side = 14 * 6 if name == "dinov2" else 96
    batch = tiny_batch(size=(side, side))
    model.train()(**batch).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # transformers' ConvNeXt and Swinv2 have norms that no feature map depends on.
    assert all("norm" in name for name in without)
    model.save_pretrained(tmp_path)
    again, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model.eval()(batch["pixel_values"]).masks_queries_logits
        assert torch.equal(again(batch["pixel_values"]).masks_queries_logits, expected)
    assert expected.shape[-2:] == (24, 24)  # of 6 patches of 14 pixels as of 96 pixels at stride 4


@pytest.mark.parametrize("layers", ["pixel_decoder_layers", "encoder_layers"])
@torch.no_grad()
def test_masked_padding_has_no_part_in_the_encoders(layers: str) -> None:
    config = tiny_config(decoder_config={**TRANSFORMER, layers: 2}, mask_padding=True)
    model = MaskFormerForInstanceSegmentation(config).eval().model
    sizes = ((8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3))
    maps = [torch.randn(1, *size) for size in sizes]
    padded = [F.pad(each, (0, 2 * each.shape[3] // 3, 0, each.shape[2]), value=9.0) for each in maps]
    found = []
    for features, image_sizes in ((maps, None), (padded, torch.tensor([[2, 3]]))):
        memory = model.pixel_level_module.decoder(features, image_sizes).memory
        if layers == "encoder_layers":
            found.append(model.transformer_module(memory, memory_sizes=image_sizes).last_hidden_state)
        else:
            found.append(memory[:, :, :2, :3])
    torch.testing.assert_close(*found)


def test_a_backbone_without_the_four_strides_is_refused() -> None:
    beit = BeitConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=64)
    with pytest.raises(ValueError, match=r"BeitBackbone have the strides \(16, 16, 16, 16\), but .* \(4, 8, 16, 32\)"):
        tiny_model(beit)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"takes 4 feature maps"):
        tiny_config(ConvNextConfig(depths=[1, 1, 1], hidden_sizes=[8, 16, 32]))


@pytest.mark.parametrize(("height", "width"), [(31, 45), (45, 31)])
def test_an_image_too_small_for_a_backbone_is_refused_with_the_remedy(height: int, width: int) -> None:
    message = rf"{height} x {width} pixels, but a ConvNextBackbone needs at least 32.*size_divisor=32"
    with pytest.raises(ValueError, match=message):
        tiny_model(convnext_config())(torch.randn(1, 3, height, width))


@torch.no_grad()
@pytest.mark.parametrize(("channels", "is_projected"), [(8, True), (16, False), (32, True)])
def test_features_of_another_width_than_the_queries_are_projected(channels: int, is_projected: bool) -> None:
    """As in the paper's code, those of the same width are not."""
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, channels], depths=[1, 1, 1, 1])
    backbone.layer_type = "basic"
    model = tiny_model(backbone).eval()
    assert model.config.decoder_config.d_model == 16
    assert (model.model.transformer_module.input_projection is not None) == is_projected
    assert model(torch.randn(1, 3, 32, 64)).class_queries_logits.isfinite().all()


def test_a_plain_vision_transformer_gets_four_strides() -> None:
    config = tiny_config(OTHER_BACKBONES["dinov3_vit"]())
    assert isinstance(config.backbone_config, SimpleFeaturePyramidConfig)
    pyramid = MaskFormerForInstanceSegmentation(config).model.pixel_level_module.encoder
    maps = pyramid(torch.randn(1, 3, 64, 112))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 28), (8, 14), (4, 7), (2, 4)]
    assert [m.shape[1] for m in maps] == pyramid.channels == [8, 16, 32, 32]


def test_images_that_are_no_whole_number_of_patches_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"96 x 100 pixels, but .* patches of 14 x 14.*size_divisor=14"):
        tiny_model(OTHER_BACKBONES["dinov2"]())(torch.randn(1, 3, 96, 100))


def test_a_configuration_in_one_line(tmp_path) -> None:
    ResNetConfig(depths=[3, 4, 23, 3]).save_pretrained(tmp_path)
    assert MaskFormerConfig.from_backbone(str(tmp_path), num_labels=7).backbone_config.depths == [3, 4, 23, 3]
    assert MaskFormerConfig.from_backbone(ConvNextConfig()).backbone_config.out_features[0] == "stage1"


def test_a_backbone_is_built_of_the_defaults_that_transformers_gives_it() -> None:
    small = ConvNextConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64))  # its defaults are tuples too
    assert tiny_model(small).model.pixel_level_module.encoder.channels == [8, 16, 32, 64]


@pytest.mark.parametrize(
    ("config", "remedy"),
    [(tiny_config(), "Give its own backbone_config"), (ViTConfig(), r"docs/architectures\.md lists some")],
)
def test_what_is_no_backbone_is_refused(config, remedy) -> None:
    with pytest.raises(ValueError, match=f"is of type '{config.model_type}', which is not a backbone. {remedy}"):
        MaskFormerConfig.from_backbone(config)


def test_a_configuration_derived_from_a_backbone_s_is_one_too() -> None:
    class OwnSwinConfig(SwinConfig):
        pass

    own = OwnSwinConfig(**swin_config().to_dict())
    assert type(tiny_model(own).model.pixel_level_module.encoder) is SwinBackbone


def test_our_nested_types_are_written_and_read(tmp_path) -> None:
    config = tiny_config(deep_resnet_config(), decoder_config={**TRANSFORMER, "pixel_decoder_layers": 3})
    config.save_pretrained(tmp_path)
    read = MaskFormerConfig.from_pretrained(tmp_path)
    assert isinstance(read.backbone_config, MaskFormerResNetConfig)
    assert isinstance(read.decoder_config, MaskFormerTransformerConfig)
    assert read.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_config": {**TRANSFORMER, "pixel_decoder_layers": -1}}, "pixel_decoder_layers is -1"),
        ({"decoder_config": {**TRANSFORMER, "encoder_layers": 1, "encoder_attention_heads": 3}}, "d_model is 16"),
        (
            {"decoder_config": {**TRANSFORMER, "pixel_decoder_layers": 1, "encoder_attention_heads": 3}},
            "fpn_feature_size is 32, but must be a multiple of decoder_config.encoder_attention_heads",
        ),
        (
            {"backbone_config": {"model_type": "maskformer-resnet", "last_stage_dilations": [1, 2]}},
            r"last_stage_dilations is \[1, 2\], but must hold one number .* of the 3 layers",
        ),
        (
            {
                "backbone_config": {
                    "model_type": "maskformer-simple-feature-pyramid",
                    "backbone_config": ConvNextConfig(),
                }
            },
            "is of type 'convnext', but a pyramid needs one of dinov2",
        ),
    ],
)
def test_what_no_model_can_have_fails_at_construction(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        MaskFormerConfig(**{"fpn_feature_size": 32, **fields})


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(deep_resnet_config()),
        tiny_config(OTHER_BACKBONES["dinov2"]()),
        tiny_config(decoder_config={**TRANSFORMER, "pixel_decoder_layers": 1}),
    ],
    ids=["deep stem", "pyramid", "encoder"],
)
def test_what_transformers_cannot_express_stops_it(config: MaskFormerConfig, tmp_path) -> None:
    """Also in a process that has imported this package."""
    MaskFormerForInstanceSegmentation(config).save_pretrained(tmp_path)
    for stock in (
        transformers.MaskFormerForInstanceSegmentation,
        transformers.MaskFormerModel,
        transformers.AutoConfig,
        transformers.AutoModel,
        transformers.AutoModelForInstanceSegmentation,
        transformers.AutoModelForUniversalSegmentation,
    ):
        with pytest.raises((ValueError, KeyError), match="maskformer-"):
            stock.from_pretrained(tmp_path)
