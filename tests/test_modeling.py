import os

import pytest
import torch
import transformers
from models import (
    NUM_LABELS,
    NUM_QUERIES,
    as_mask_list,
    resnet_config,
    swin_config,
    tiny_batch,
    tiny_config,
    tiny_model,
)

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerModel

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


def test_a_tuple_holds_the_fields_in_the_order_of_transformers():
    model = tiny_model().eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    output = model(pixel_values, return_dict=True)
    classes, masks, *_ = model(pixel_values, return_dict=False)
    assert torch.equal(classes, output.class_queries_logits)
    assert torch.equal(masks, output.masks_queries_logits)


def test_one_kind_of_label_without_the_other_is_refused():
    batch = tiny_batch()
    del batch["class_labels"]
    with pytest.raises(ValueError, match="mask_labels came without class_labels"):
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


def test_the_caller_may_pad_masks_less_than_images():
    """Padding belongs to no segment, whoever adds it."""
    model, batch = tiny_model(), as_mask_list(tiny_batch())
    batch["mask_labels"] = [masks[:, :, :64] * (torch.arange(64) < 60) for masks in batch["mask_labels"]]
    padded = {**batch, "mask_labels": [torch.nn.functional.pad(masks, (0, 32)) for masks in batch["mask_labels"]]}
    assert model(**batch).loss.item() == model(**padded).loss.item()


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
        # PreTrainedModel brings scipy along where it is installed, so that one is not ours to avoid.
        "import sys, hf_maskformer; heavy = {'datasets', 'evaluate', 'matplotlib', 'pycocotools', 'torchvision'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert os.popen(f'python -c "{code}"').read().strip() == "[]"
