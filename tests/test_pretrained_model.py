"""What users of any `PreTrainedModel` do with theirs."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import infer_auto_device_map
from models import (
    ARCHITECTURES,
    convnext_config,
    masks,
    resnet_config,
    swin_config,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from transformers import AttentionInterface, Dinov2Config, Trainer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> MaskFormerForInstanceSegmentation:
    return ARCHITECTURES[request.param]().eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96)


def test_attention_can_be_switched_and_stays_the_same(model, pixel_values, transformers_log):
    outputs = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == model.config.decoder_config._attn_implementation == name
        with torch.no_grad():
            outputs[name] = model(pixel_values, output_attentions=True)
    assert transformers_log.text == ""
    for left, right in zip(*(output.attentions for output in outputs.values()), strict=True):
        torch.testing.assert_close(left, right)
    left, right = (output.masks_queries_logits for output in outputs.values())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.fixture
def counted_attention():
    """A function of the user's own in transformers' interface, and the names of the modules that called it."""
    callers = []

    def counted(module, query, key, value, attention_mask, **kwargs):
        callers.append(type(module).__name__)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counted", counted)
    yield callers
    AttentionInterface._global_mapping.pop("counted")


def test_a_registered_attention_function_is_the_one_that_runs(model, pixel_values, counted_attention):
    expected = masks(model, pixel_values)
    assert counted_attention == []
    model.set_attn_implementation("counted")
    torch.testing.assert_close(masks(model, pixel_values), expected)
    assert counted_attention == ["Attention"] * sum(type(module).__name__ == "Attention" for module in model.modules())


def padded_batch() -> dict[str, torch.Tensor]:
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    pixel_mask[0, :, 40:] = 0
    return {"pixel_values": torch.randn(2, 3, 64, 96), "pixel_mask": pixel_mask}


@pytest.mark.parametrize("name", ["eager", "counted", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_attention_keeps_padding_out(name, counted_attention):
    model, batch = tiny_model(mask_padding=True).eval(), padded_batch()
    expected = model(**batch).class_queries_logits
    assert not torch.allclose(model(batch["pixel_values"]).class_queries_logits, expected)
    model.set_attn_implementation(name)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.testing.assert_close(model(**batch).class_queries_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("mask_padding", [False, True])
def test_compiled_flex_attention_gives_the_same(mask_padding):
    model, batch = tiny_model(mask_padding=mask_padding).eval(), padded_batch()
    with torch.no_grad():
        expected = model(**batch).class_queries_logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**batch).class_queries_logits, expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_runs_without_a_mask_only(monkeypatch):
    """Its kernels take none: calls with one go to SDPA. A stand-in tells which calls it gets."""
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model, batch = tiny_model(mask_padding=True).eval(), padded_batch()
    expected = model(**batch).class_queries_logits
    model.config.decoder_config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(**batch).class_queries_logits, expected)
    assert seen == [None, None]  # the self-attention of two layers


@pytest.mark.skipif(is_flash_attn_2_available(), reason="Flash attention is installed.")
def test_flash_attention_that_is_not_installed_is_refused_by_transformers(tmp_path):
    model = tiny_model()
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")
    assert model.config.decoder_config._attn_implementation != "flash_attention_2"
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_an_unknown_attention_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    with pytest.raises(ValueError, match="names backbon_config, but the parts are backbone_config, decoder_config"):
        model.set_attn_implementation({"backbon_config": "eager"})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nonsense"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, attn_implementation="nonsense")


def dinov2_model(**arguments) -> MaskFormerForInstanceSegmentation:
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
    return MaskFormerForInstanceSegmentation._from_config(tiny_config(backbone), **arguments)


def attention_of_parts(model) -> tuple[str, str]:
    backbone = next(module for module in model.model.pixel_level_module.encoder.modules() if hasattr(module, "config"))
    return model.config.decoder_config._attn_implementation or "sdpa", backbone.config._attn_implementation


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("eager", ("eager", "eager")),
        ("sdpa", ("sdpa", "sdpa")),
        ("flex_attention", ("flex_attention", "flex_attention")),
        ({"backbone_config": "eager"}, ("sdpa", "eager")),
        ({"decoder_config": "eager"}, ("eager", "sdpa")),
    ],
)
def test_a_backbone_of_transformers_follows_however_attention_is_chosen(requested, expected, tmp_path):
    model = dinov2_model()
    model.save_pretrained(tmp_path)
    assert attention_of_parts(model) == ("sdpa", "sdpa")
    model.set_attn_implementation(requested)
    loaded = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, attn_implementation=requested)
    for switched in (model, loaded, dinov2_model(attn_implementation=requested)):
        assert attention_of_parts(switched) == expected


def test_a_backbone_without_the_attention_keeps_its_own(tmp_path):
    model = tiny_model(convnext_config())
    model.save_pretrained(tmp_path)
    before = attention_of_parts(model)[1]
    model.set_attn_implementation("flex_attention")
    loaded = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert attention_of_parts(model) == attention_of_parts(loaded) == ("flex_attention", before)


def test_the_trainer_can_turn_on_gradient_checkpointing(model, tmp_path):
    """Layers of backbone and decoder then run once more for the backward pass, and the step is the same."""
    images = [{name: tensor[0] for name, tensor in tiny_batch(1).items()} for _ in range(2)]
    steps, runs = [], []
    for enable in (False, True):
        trained = copy.deepcopy(model)
        count = []
        for layer in (first_backbone_layer(trained), trained.model.transformer_module.decoder.layers[0]):
            leaf = next(module for module in layer.modules() if not list(module.children()))
            leaf.register_forward_hook(lambda *_, count=count: count.append(1))
        arguments = TrainingArguments(
            tmp_path, max_steps=1, gradient_checkpointing=enable, report_to=[], save_strategy="no", use_cpu=True
        )
        Trainer(trained, arguments, train_dataset=images).train()
        steps.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
        runs.append(len(count))
    assert runs == [2, 4]
    torch.testing.assert_close(*steps)


def first_backbone_layer(model):
    modules = model.model.pixel_level_module.encoder.modules()
    return next(module for module in modules if type(module).__name__ in ("SwinBlock", "ResNetLayer"))


def test_a_model_that_lies_partly_on_disk_predicts_the_same_and_can_be_saved(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path / "model")
    offloaded = MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.4 * model.get_memory_footprint())},
        offload_folder=tmp_path / "offload",
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    expected = masks(model, pixel_values)
    torch.testing.assert_close(masks(offloaded, pixel_values), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="offloaded modules"):
        offloaded.save_pretrained(tmp_path / "again")
    again = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "again", device_map="auto")
    torch.testing.assert_close(masks(again, pixel_values), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    half = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, dtype=dtype).train()
    assert {p.dtype for p in half.parameters()} == {dtype}
    batch = tiny_batch()
    output = half(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)})
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


def test_copies_predict_the_same(model, pixel_values):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(masks(again, pixel_values), masks(model, pixel_values))


def test_configurations_survive_copies_and_json(model):
    config = model.config
    assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()
    assert MaskFormerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert "MaskFormerConfig" in repr(config)
    assert config.to_json_string(use_diff=False) != config.to_json_string(use_diff=True)


def test_return_dict_may_come_from_the_configuration(pixel_values, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, return_dict=False)
    assert isinstance(model(pixel_values), tuple)
    assert len(model(pixel_values, return_dict=True).keys()) == len(model(pixel_values))


def test_parameters_are_counted_and_ties_are_none(model):
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters() == total
    assert model.num_parameters(only_trainable=True) == trainable
    model.tie_weights()
    assert model.num_parameters() == total


def test_the_log_names_the_tensors_that_are_new_for_other_classes(tmp_path, transformers_log):
    tiny_model().save_pretrained(tmp_path)
    MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    for name in ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"):
        assert name in transformers_log.text
    assert transformers_log.text.count("MISMATCH") >= 3
    assert "mask_embedder" not in transformers_log.text


@pytest.mark.parametrize("size", [(31, 45), (641, 333)])
def test_any_size_is_taken(model, size):
    assert masks(model, torch.randn(1, 3, *size)).shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))


def test_initialisation_of_the_backbones_is_that_of_the_paper():
    """ResNet: normal, by the number of outputs. Swin: normal with deviation 0.02 for linear layers and bias tables."""
    resnet = tiny_config(resnet_config()).backbone_config
    resnet.hidden_sizes, resnet.embedding_size = [64, 64, 64, 64], 64
    encoder = tiny_model(resnet).model.pixel_level_module.encoder
    stem = next(m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 7 * 7)) ** 0.5, rel=0.05)

    swin = swin_config()
    swin.embed_dim = 64
    block = tiny_model(swin).model.pixel_level_module.encoder.model.encoder.layers[0].blocks[0]
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 6
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    assert block.attention.self.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)


def test_no_layer_of_a_backbone_of_transformers_is_cut_in_two():
    model = tiny_model(convnext_config())
    names = {"ConvNextLayer", "TransformerDecoderLayer"}
    layers = [name for name, module in model.named_modules() if type(module).__name__ in names]
    assert len(layers) > 4
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        max_memory = {0: int(share * model.get_memory_footprint()), "cpu": "1GB"}
        places = infer_auto_device_map(model, max_memory, no_split_module_classes=list(model._no_split_modules))
        assert not [name for name in places if any(name.startswith(f"{layer}.") for layer in layers)]


@pytest.mark.parametrize("name", ["resnet", "swin", "encoders"])
def test_wrapping_policies_find_the_layers_that_must_stay_whole(name):
    model = ARCHITECTURES[name]()
    present = {type(module).__name__ for module in model.modules()}
    assert "TransformerDecoderLayer" in model._no_split_modules
    assert present.issuperset(model._no_split_modules)
