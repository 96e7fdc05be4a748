import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from models import (
    NUM_LABELS,
    NUM_QUERIES,
    as_mask_list,
    convnext_config,
    resnet_config,
    swin_config,
    swinv2_config,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerModel
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig
from hf_maskformer.modeling_maskformer_pixel_level import covered_part
from hf_maskformer.modeling_maskformer_swin import SwinBlock
from hf_maskformer.modeling_maskformer_transformer_layers import sine_positions

BACKBONES = [resnet_config, swin_config]
STOCK_TOLERANCE = 1e-4  # of the largest value: kernels differ, formulas do not


def no_complaint(loading_info):
    return not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def assert_equal_outputs(ours, stock, fields):
    for field in fields:
        a, b = getattr(ours, field), getattr(stock, field)
        for left, right in zip([a] if torch.is_tensor(a) else a, [b] if torch.is_tensor(b) else b, strict=True):
            assert (left - right).abs().max() <= STOCK_TOLERANCE * right.abs().max().clamp(min=1e-6)


HIDDEN = [
    "encoder_last_hidden_state",
    "pixel_decoder_last_hidden_state",
    "transformer_decoder_last_hidden_state",
    "encoder_hidden_states",
    "pixel_decoder_hidden_states",
    "transformer_decoder_hidden_states",
    "hidden_states",
]
LOGITS = ["class_queries_logits", "masks_queries_logits"]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("ours", "stock", "fields"),
    [
        (MaskFormerForInstanceSegmentation, transformers.MaskFormerForInstanceSegmentation, LOGITS + HIDDEN),
        (MaskFormerModel, transformers.MaskFormerModel, HIDDEN),
    ],
)
def test_checkpoints_travel_to_transformers_and_back(tmp_path, backbone, ours, stock, fields):
    pixel_values = torch.randn(2, 3, 61, 90)
    first = ours(tiny_config(backbone())).eval()
    first.save_pretrained(tmp_path / "ours")
    second, loading_info = stock.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert no_complaint(loading_info)
    second.save_pretrained(tmp_path / "stock")
    third, loading_info = ours.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert no_complaint(loading_info)
    with torch.no_grad():
        outputs = [model.eval()(pixel_values, output_hidden_states=True) for model in (first, second, third)]
    assert_equal_outputs(outputs[0], outputs[1], fields)
    assert_equal_outputs(outputs[2], outputs[1], fields)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_that_transformers_made_is_read(tmp_path, backbone):
    stock = transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(**{**tiny_config(backbone()).to_dict(), "num_labels": NUM_LABELS})
    ).eval()
    stock.save_pretrained(tmp_path)
    ours, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert no_complaint(loading_info)
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_equal_outputs(ours(pixel_values), stock(pixel_values), LOGITS)


def test_the_same_tensor_names_as_a_checkpoint_of_transformers(tmp_path):
    from safetensors import safe_open

    for name, model_class in (("ours", MaskFormerForInstanceSegmentation), ("stock", None)):
        config = tiny_config(swin_config())
        if model_class is None:
            config = transformers.MaskFormerConfig(**config.to_dict())
            model_class = transformers.MaskFormerForInstanceSegmentation
        model_class(config).save_pretrained(tmp_path / name)
    shapes = []
    for name in ("ours", "stock"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            shapes.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_last_queries_have_a_gradient_by_whatever_name(is_trained):
    model = tiny_model(resnet_config()).train(is_trained)
    batch = tiny_batch()
    output = model(**batch if is_trained else {"pixel_values": batch["pixel_values"]}, output_hidden_states=True)
    states = (
        output.transformer_decoder_last_hidden_state,
        output.transformer_decoder_hidden_states[-1],
        output.hidden_states[-1],
    )
    target = output.loss if is_trained else output.class_queries_logits.sum()
    first, *others = torch.autograd.grad(target, states)
    assert first.any()
    assert all(torch.equal(first, other) for other in others)


def test_output_shapes_and_sizes_inside_the_batch():
    pixel_mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    pixel_mask[0, :50, :96] = 1
    pixel_mask[1, :64, :33] = 1
    output = tiny_model().eval()(torch.randn(2, 3, 64, 96), pixel_mask=pixel_mask)
    assert output.class_queries_logits.shape == (2, NUM_QUERIES, NUM_LABELS + 1)
    assert output.masks_queries_logits.shape == (2, NUM_QUERIES, 16, 24)
    assert output.image_sizes.tolist() == [[50, 96], [64, 33]]
    assert output.padded_sizes.tolist() == [[64, 96], [64, 96]]
    assert output.loss is None
    assert output.loss_dict is None


def test_without_a_pixel_mask_images_fill_the_batch():
    output = tiny_model().eval()(torch.randn(1, 3, 40, 56))
    assert output.image_sizes.tolist() == output.padded_sizes.tolist() == [[40, 56]]


def test_loss_terms_by_name_add_up_and_logits_are_detached():
    output = tiny_model()(**tiny_batch())
    names = {f"loss_{term}{layer}" for term in ("cross_entropy", "mask", "dice") for layer in ("", "_0")}
    assert output.loss_dict.keys() == names
    assert output.loss.item() == pytest.approx(sum(term.item() for term in output.loss_dict.values()), rel=1e-6)
    assert not output.masks_queries_logits.requires_grad
    assert not any(term.requires_grad for term in output.loss_dict.values())


def test_without_labels_the_logits_carry_gradient():
    assert tiny_model()(torch.randn(1, 3, 64, 64)).masks_queries_logits.requires_grad


def test_without_deep_supervision_only_the_last_layer_has_a_loss():
    output = tiny_model(deep_supervision=False)(**tiny_batch())
    assert output.loss_dict.keys() == {"loss_cross_entropy", "loss_mask", "loss_dice"}
    assert output.auxiliary_logits is None


def test_auxiliary_logits_are_those_of_the_layers_before_the_last():
    model = tiny_model().eval()
    output = model(torch.randn(1, 3, 64, 64), output_auxiliary_logits=True)
    assert len(output.auxiliary_logits) == 1
    assert output.auxiliary_logits[0]["masks_queries_logits"].shape == output.masks_queries_logits.shape
    assert not torch.equal(output.auxiliary_logits[0]["masks_queries_logits"], output.masks_queries_logits)


@pytest.mark.parametrize("output_hidden_states", [False, True])
def test_a_tuple_begins_with_the_fields_of_transformers_in_their_order(tmp_path, output_hidden_states):
    model, pixel_values = tiny_model().eval(), torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        options = {"return_dict": False, "output_hidden_states": output_hidden_states}
        pairs = [
            (model(pixel_values, **options), stock(pixel_values, **options)),
            (model.model(pixel_values, **options), stock.model(pixel_values, **options)),
        ]
    for ours, theirs in pairs:
        for left, right in zip(ours, theirs, strict=False):
            if isinstance(right, tuple):  # several maps, which count what is not returned in their own ways
                assert left[-1].shape == right[-1].shape
            else:
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        assert len(ours) > len(theirs) >= 3


@torch.no_grad()
def test_hidden_states_of_the_queries_begin_with_zeros_and_end_with_the_norm():
    model = tiny_model().eval()
    output = model.model(torch.randn(2, 3, 64, 96), output_hidden_states=True)
    first, *inside, last = output.transformer_decoder_hidden_states
    assert first.shape == (2, NUM_QUERIES, 16)
    assert not first.any()
    of_layers = output.transformer_decoder_intermediate_states
    assert len(inside) == len(of_layers) - 1 == 1
    assert torch.equal(model.model.transformer_module.decoder.layernorm(inside[0]), of_layers[0])
    assert torch.equal(last, of_layers[1])


def test_one_kind_of_label_without_the_other_is_refused():
    batch = tiny_batch()
    del batch["class_labels"]
    with pytest.raises(ValueError, match="mask_labels was given without class_labels"):
        tiny_model()(**batch)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_index_map_and_list_of_masks_give_the_same_loss_and_gradient(backbone):
    model, batch = tiny_model(backbone()), tiny_batch()
    gradients = []
    for labels in (batch, as_mask_list(batch)):
        model.zero_grad()
        model(**labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_loss_does_not_change_when_segments_are_listed_in_another_order():
    model, batch = tiny_model(), as_mask_list(tiny_batch())
    shuffled = {
        **batch,
        "mask_labels": [masks.flip(0) for masks in batch["mask_labels"]],
        "class_labels": [labels.flip(0) for labels in batch["class_labels"]],
    }
    assert model(**shuffled).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_the_loss_does_not_change_when_images_come_in_another_order():
    model, batch = tiny_model(), tiny_batch()
    flipped = {name: tensor.flip(0) for name, tensor in batch.items()}
    assert model(**flipped).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_an_image_predicts_the_same_alone_and_beside_another_of_its_size():
    model = tiny_model(swin_config()).eval()
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        together = model(pixel_values).masks_queries_logits[1]
        alone = model(pixel_values[1:]).masks_queries_logits[0]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [lambda batch: batch, as_mask_list])
def test_masks_of_another_size_than_the_padded_images_are_refused(form):
    """Transformers would resize predictions to them, where padding and shift cannot be told apart."""
    batch = form(tiny_batch(size=(16, 24)))
    batch["pixel_values"] = torch.randn(2, 3, 64, 96)
    message = r"mask_labels of image 0 are 16 x 24 pixels, but the padded images have 64 x 96"
    with pytest.raises(ValueError, match=message):
        tiny_model()(**batch)


def smaller_image_in_batch():
    """The second image ends 16 columns before the batch, and so may its masks."""
    batch = tiny_batch()
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    pixel_mask[1, :, 80:] = 0
    batch["mask_labels"][1, :, 80:] = -1
    return as_mask_list(batch) | {"pixel_mask": pixel_mask}


def test_masks_in_a_list_may_end_where_their_image_does():
    model, batch = tiny_model().eval(), smaller_image_in_batch()
    expected = model(**batch).loss.item()
    batch["mask_labels"][1] = batch["mask_labels"][1][..., :80]
    assert model(**batch).loss.item() == expected


@pytest.mark.parametrize("size", [(64, 50), (10, 80), (64, 90), (1, 1), (0, 0)])
def test_masks_in_a_list_that_end_elsewhere_are_refused(size):
    batch = smaller_image_in_batch()
    batch["mask_labels"][1] = torch.ones(2, *size)
    message = f"image 1 are {size[0]} x {size[1]} pixels, but the padded images have 64 x 96, and .* has 64 x 80"
    with pytest.raises(ValueError, match=message):
        tiny_model()(**batch)


@pytest.mark.parametrize("shape", [(1, 32, 48), (1, 64, 192), (2, 64, 96), (64, 96), (1, 1, 64, 96)])
def test_a_pixel_mask_of_another_shape_than_the_images_is_refused(shape):
    model, pixel_values = tiny_model().eval(), torch.randn(1, 3, 64, 96)
    for call in (model, model.predict):
        with pytest.raises(ValueError, match=re.escape(f"pixel_mask has the shape {shape}, but the images are")):
            call(pixel_values, pixel_mask=torch.ones(shape))


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
@pytest.mark.parametrize("shape", [(1, 1, 64, 96), (1, 4, 64, 96), (1, 64, 96, 3), (3, 64, 96), (0, 3, 64, 96)])
def test_what_is_no_batch_of_the_images_of_the_model_is_refused(shape, backbone):
    model = tiny_model(backbone()).eval()
    message = re.escape(f"pixel_values have the shape {shape}, but the model takes (images, 3, height, width)")
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))
    with torch.no_grad():
        for call in (model, model.predict):
            with pytest.raises(ValueError, match=message):
                call(torch.randn(shape))


def test_more_segments_than_queries_and_images_without_any_train():
    model, batch = tiny_model(), tiny_batch()
    batch["mask_labels"][0] = torch.arange(64 * 96).view(64, 96) % (NUM_QUERIES + 3)
    batch["mask_labels"][1] = -1
    batch["class_labels"] = torch.zeros(2, NUM_QUERIES + 3, dtype=torch.int64)
    batch["class_labels"][1] = -100
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_has_a_finite_loss_near_that_of_float32(tmp_path, dtype):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path)
    half = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, dtype=dtype)
    batch_in_half = {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    assert half(**batch_in_half).loss.item() == pytest.approx(model.eval()(**batch).loss.item(), rel=0.1)


def test_dropout_and_stochastic_depth_act_in_training_only():
    swin = swin_config()
    swin.drop_path_rate = 0.5
    config = tiny_config(swin)
    config.decoder_config.dropout = 0.5
    model, pixel_values = MaskFormerForInstanceSegmentation(config), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        trained = [model.train()(pixel_values).masks_queries_logits for _ in range(2)]
        evaluated = [model.eval()(pixel_values).masks_queries_logits for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*evaluated)


def test_stochastic_depth_keeps_the_mean():
    block = SwinBlock(swin_config(), dim=8, num_heads=1, shift=0, drop_path=0.25).train()
    update = block._drop_path(torch.ones(4000, 1, 1, 1))
    assert update.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert update.mean().item() == pytest.approx(1, abs=0.05)


def test_positions_are_exact_in_half_precision(tmp_path):
    """Rounded once at the end; computed in half precision they would be off by 0.02."""
    exact = sine_positions((30, 40), 64, torch.device("cpu"))
    tiny_model().save_pretrained(tmp_path)
    half = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert exact.dtype == torch.float32
    assert half(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).masks_queries_logits.dtype == torch.bfloat16


def test_files_of_2022_are_read(tmp_path):
    """A pickled state dictionary, and a configuration with the fields of its time."""
    model = tiny_model(swin_config())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = model.config.to_dict()
    for field in (
        "deep_supervision",
        "freeze_batch_norm",
        "class_cost",
        "mask_cost",
        "dice_cost",
        "transformers_version",
    ):
        del config[field]
    del config["backbone_config"]["out_features"], config["backbone_config"]["out_indices"]
    config |= {"torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    loaded, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert no_complaint(loading_info)
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(pixel_values).masks_queries_logits
        assert torch.equal(loaded(pixel_values).masks_queries_logits, expected)


def test_auto_classes_keep_giving_the_model_of_transformers(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(tmp_path)
    assert type(model) is transformers.MaskFormerForInstanceSegmentation


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_is_frozen_only_if_asked_for(freeze):
    model = tiny_model(freeze_batch_norm=freeze).train()
    norm = model.model.pixel_level_module.encoder.embedder.embedder.normalization
    before = norm.running_mean.clone()
    model(**tiny_batch()).loss.backward()
    assert torch.equal(norm.running_mean, before) == freeze
    assert (norm.weight.grad is None) == freeze


def test_batch_norm_stays_frozen_after_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path).train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) > 0
    assert all(".normalization." in name for name in frozen)
    model(**tiny_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_statistics_of_a_file_without_their_counter_are_kept(tmp_path):
    model = tiny_model()
    for name, values in model.named_buffers():
        if "running" in name:
            values.uniform_(1.0, 2.0)
    weights = {name: values for name, values in model.state_dict().items() if "num_batches_tracked" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.rpartition(".")[2] for name in loading_info["missing_keys"]} == {"num_batches_tracked"}
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()))


def test_every_trainable_parameter_has_a_gradient_even_without_any_segment():
    model, batch = tiny_model(swin_config()).train(), tiny_batch()
    batch["mask_labels"].fill_(-1)
    batch["class_labels"].fill_(-100)
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_gives_the_same_gradient(backbone):
    model, batch = tiny_model(backbone()).train(), tiny_batch()
    gradients = []
    for enable in (False, True):
        if enable:
            model.model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("convert", [lambda model: model, torch.nn.SyncBatchNorm.convert_sync_batchnorm])
def test_gradient_checkpointing_counts_the_statistics_of_a_batch_once(use_reentrant, convert):
    model, batches = convert(tiny_model(freeze_batch_norm=False).train()), [tiny_batch(), tiny_batch()]
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for batch in batches:
        for each in (model, checkpointed):
            each(**batch).loss.backward()
    torch.testing.assert_close(dict(checkpointed.named_buffers()), dict(model.named_buffers()))
    assert any(name.endswith("num_batches_tracked") and count == 2 for name, count in checkpointed.named_buffers())


def test_eager_and_sdpa_attention_agree(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = [
            MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, attn_implementation=name)(pixel_values)
            for name in ("eager", "sdpa")
        ]
    torch.testing.assert_close(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits, rtol=1e-4, atol=1e-4)


def test_attention_weights_say_where_each_query_looked():
    output = tiny_model().eval()(torch.randn(1, 3, 64, 96), output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(1, 2, NUM_QUERIES, 2 * 3)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(1, 2, NUM_QUERIES))


def test_another_number_of_classes_is_refused_unless_asked_for(tmp_path):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, num_labels=9)
    model, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = {name for name, *_ in loading_info["mismatched_keys"]}
    assert new == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    assert model.criterion.empty_weight.tolist() == pytest.approx([1.0] * 9 + [0.1])
    kept = {name: tensor for name, tensor in saved.state_dict().items() if name not in new}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_initialisation_is_that_of_the_original():
    """Bounds and spreads of the paper's code, read off a model large enough for statistics."""
    config = tiny_config(swin_config(), fpn_feature_size=128, mask_feature_size=128)
    config.decoder_config.d_model = 128
    model = MaskFormerForInstanceSegmentation(config)
    attention = model.model.transformer_module.decoder.layers[0].self_attn
    packed_bound = (6 / (128 + 3 * 128)) ** 0.5  # query, key and value are one matrix there
    assert attention.q_proj.weight.abs().max().item() == pytest.approx(packed_bound, rel=0.01)
    assert attention.out_proj.weight.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)
    assert attention.q_proj.bias.abs().max() == 0
    projection = model.model.pixel_level_module.decoder.mask_projection
    assert projection.weight.abs().max().item() == pytest.approx((3 / (128 * 9)) ** 0.5, rel=0.01)
    assert model.model.transformer_module.queries_embedder.weight.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("size", [(31, 45), (33, 1), (97, 64)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_input_size_works(backbone, size):
    output = tiny_model(backbone()).eval()(torch.randn(1, 3, *size))
    assert output.masks_queries_logits.shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))
    assert output.masks_queries_logits.isfinite().all()


def test_importing_the_package_loads_none_of_the_heavy_libraries():
    code = (
        # transformers' own base classes bring scipy and torchvision along where they are installed: not ours to avoid.
        "import sys, hf_maskformer; heavy = {'datasets', 'evaluate', 'matplotlib', 'pycocotools'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("error", ["RuntimeError('operator nms does not exist')", "ImportError('no libc10.so')"])
@pytest.mark.parametrize("transformers_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_torchvision_that_does_not_import_counts_as_absent(tmp_path, transformers_first, error):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}")
    code = "import transformers; transformers.utils.is_torchvision_available();" if transformers_first else ""
    code += "import hf_maskformer, transformers; print(transformers.utils.is_torchvision_available())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.strip() == "False"
    assert "treated as absent" in done.stderr


def padded_batch(image_size: tuple[int, int], padded_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The same random image, whatever the padding."""
    pixel_values, pixel_mask = torch.zeros(1, 3, *padded_size), torch.zeros(1, *padded_size, dtype=torch.int64)
    height, width = image_size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    pixel_values[..., :height, :width], pixel_mask[..., :height, :width] = image, 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_padding_has_no_part_in_the_decoder(attention):
    decoder = tiny_model(mask_padding=True, attn_implementation=attention).eval().model.transformer_module
    features = torch.randn(1, 64, 2, 3)
    padded = torch.full((1, 64, 4, 5), 9.0)
    padded[:, :, :2, :3] = features
    alone, in_batch = decoder(features), decoder(padded, output_attentions=True, memory_sizes=torch.tensor([[2, 3]]))
    torch.testing.assert_close(in_batch.last_hidden_state, alone.last_hidden_state)
    is_padding = torch.ones(4, 5, dtype=torch.bool)
    is_padding[:2, :3] = False
    assert all((weights[..., is_padding.flatten()] == 0).all() for weights in in_batch.attentions)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_padding_is_left_out_in_half_precision_too(attention):
    decoder = tiny_model(mask_padding=True, attn_implementation=attention).bfloat16().eval().model.transformer_module
    features = torch.randn(1, 64, 2, 3, dtype=torch.bfloat16)
    padded = torch.full((1, 64, 4, 5), 9.0, dtype=torch.bfloat16)
    padded[:, :, :2, :3] = features
    alone, in_batch = decoder(features), decoder(padded, memory_sizes=torch.tensor([[2, 3]]))
    assert in_batch.last_hidden_state.dtype == torch.bfloat16
    torch.testing.assert_close(in_batch.last_hidden_state, alone.last_hidden_state, rtol=0, atol=0.1)  # of about 1


def test_masked_padding_needs_a_mask_and_changes_nothing_without_padding():
    plain, masking = tiny_model().eval(), tiny_model(mask_padding=True).eval()
    masking.load_state_dict(plain.state_dict())
    full = padded_batch((64, 96), (64, 96))
    torch.testing.assert_close(masking(**full).class_queries_logits, plain(**full).class_queries_logits)
    batch = padded_batch((40, 50), (64, 96))
    unmasked = batch["pixel_values"]
    torch.testing.assert_close(masking(unmasked).class_queries_logits, plain(unmasked).class_queries_logits)
    assert not torch.allclose(masking(**batch).class_queries_logits, plain(**batch).class_queries_logits)


def test_masked_padding_is_saved_with_the_configuration(tmp_path):
    tiny_config(mask_padding=True).save_pretrained(tmp_path)
    assert MaskFormerConfig.from_pretrained(tmp_path).mask_padding is True
    assert tiny_config().mask_padding is False


def test_a_position_with_any_pixel_of_the_image_is_image():
    found = covered_part(torch.tensor([[33, 64], [1, 96]]), torch.tensor([[64, 96], [64, 96]]), (2, 3))
    assert found.tolist() == [[2, 2], [1, 3]]


class NumbersFromTheHost(TorchFunctionMode):
    """Notes what makes tensors of the host's numbers: to copy them to a GPU the host waits until it is idle."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tensor", "as_tensor", "new_tensor", "from_numpy"):
            self.found.append(args)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_a_pass_copies_no_numbers_to_the_device(backbone, mask_padding):
    model = tiny_model(backbone(), mask_padding=mask_padding).eval()
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    pixel_mask[1, 40:] = 0
    with NumbersFromTheHost() as numbers:
        outputs = model(torch.randn(2, 3, 64, 96), pixel_mask=pixel_mask)
    assert numbers.found == []
    assert outputs.padded_sizes.tolist() == [[64, 96], [64, 96]]
    assert outputs.image_sizes.tolist() == [[64, 96], [40, 96]]


def test_frozen_norms_have_no_gradient_before_train_is_called():
    norms = [module for module in tiny_model(freeze_batch_norm=True).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)


def test_attention_weights_are_those_before_dropout_in_training_too():
    transformer = MaskFormerTransformerConfig(
        d_model=16, num_queries=6, decoder_layers=2, dropout=0.0, attention_dropout=0.5
    )
    model = tiny_model(decoder_config=transformer).train()
    for weights in model(torch.randn(2, 3, 64, 96), output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("shape", [(2, 3, 0, 64), (2, 3, 64, 0), (0, 3, 64, 64)])
def test_images_without_pixels_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values have the shape .* none of them 0"):
        tiny_model().eval()(torch.zeros(shape))


@pytest.mark.parametrize("backbone", [convnext_config, swinv2_config])
@pytest.mark.parametrize("size", [(75, 101), (97, 66)])
@torch.no_grad()
def test_backbones_of_transformers_may_round_sides_down_or_up(backbone, size):
    assert tiny_model(backbone()).eval()(torch.randn(1, 3, *size)).masks_queries_logits.isfinite().all()


@pytest.mark.parametrize("kind", ["swin", "deep stem"])
@torch.no_grad()
def test_images_of_other_channels_are_taken(kind):
    backbone = (
        swin_config()
        if kind == "swin"
        else MaskFormerResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 3], deep_stem=True)
    )
    backbone.num_channels = 5
    assert tiny_model(backbone).eval()(torch.randn(1, 5, 64, 64)).masks_queries_logits.shape[-2:] == (16, 16)


@torch.no_grad()
def test_an_image_of_the_smallest_size_passes_a_backbone_of_transformers():
    assert tiny_model(swinv2_config(), fpn_feature_size=64).eval()(
        torch.randn(1, 3, 32, 32)
    ).masks_queries_logits.shape[-2:] == (8, 8)


def test_a_swin_without_biases_has_none():
    config = swin_config()
    config.qkv_bias = False
    names = [name for name, _ in tiny_model(config).named_parameters()]
    assert not [name for name in names if name.endswith((".query.bias", ".key.bias", ".value.bias"))]
