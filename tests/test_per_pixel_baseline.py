"""The per-pixel baselines: the paper's stored numbers, and all that a model of this package does."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from golden import Golden
from models import resnet_config, swin_config
from test_parity import LOSS_TOLERANCE, assert_close, check_gradients, check_semantic_results

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.hub.key_table import from_original, to_original
from hf_maskformer.post_processing_per_pixel_baseline import per_pixel_segmentation
from hf_maskformer.training.model_arguments import ModelArguments
from hf_maskformer.training.starting_point import image_processor_for, new_model, pretrained_model

NUM_LABELS = 4
TRANSFORMER = {
    "model_type": "maskformer-transformer",
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
}
VARIANTS = ["per_pixel_baseline", "per_pixel_baseline_plus"]
KINDS = [None, TRANSFORMER]


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def tiny_baseline(decoder_config=None, **fields) -> PerPixelBaselineForSemanticSegmentation:
    fields = {"num_labels": NUM_LABELS, **fields} if "id2label" not in fields else fields
    config = PerPixelBaselineConfig(
        backbone_config=resnet_config(),
        decoder_config=decoder_config,
        fpn_feature_size=32,
        mask_feature_size=16,
        **fields,
    )
    return PerPixelBaselineForSemanticSegmentation(config)


def batch_of_labels() -> dict[str, torch.Tensor]:
    labels = torch.randint(NUM_LABELS, (2, 64, 96))
    labels[:, :10] = 255
    return {"pixel_values": torch.randn(2, 3, 64, 96), "labels": labels}


def stored_logits(golden: Golden, prefix: str) -> torch.Tensor:
    name = "pred_masks" if golden.meta["name"].endswith("plus") else "logits"
    return golden.arrays[f"{prefix}.{name}"]


def test_activations_and_logits(golden: Golden) -> None:
    with torch.no_grad():
        output = golden.model.eval()(golden.arrays["pixel_values"], output_hidden_states=True)
    *backbone, level_3, level_2, _ = output.hidden_states[:7]
    for stage, feature_map in enumerate(backbone, start=2):
        assert_close(feature_map, golden.arrays[f"act.backbone.res{stage}"])
    assert_close(level_3, golden.arrays["act.pixel_decoder.layer_3"])
    assert_close(level_2, golden.arrays["act.pixel_decoder.layer_2"])
    if golden.config.decoder_config is not None:
        for index, queries in enumerate(output.hidden_states[8:10]):
            assert_close(queries.transpose(0, 1), golden.arrays[f"act.decoder.layer_{index}"])
        assert_close(output.hidden_states[-1], golden.arrays["act.decoder.hs_normed"][-1])
    assert_close(output.logits, stored_logits(golden, "eval"))


def test_logits_of_an_image_whose_sides_are_no_multiple_of_32(golden: Golden) -> None:
    with torch.no_grad():
        output = golden.model.eval()(golden.arrays["odd.pixel_values"])
    assert_close(output.logits, stored_logits(golden, "odd"))


def test_every_loss_term_and_their_sum(golden: Golden) -> None:
    output = golden.model.train()(golden.arrays["pixel_values"], **golden.labels)
    terms = {name: float(term) for name, term in output.loss_dict.items()}
    assert terms == pytest.approx(golden.meta["losses_weighted"], rel=LOSS_TOLERANCE)
    assert output.loss.item() == pytest.approx(golden.meta["loss_total"], rel=LOSS_TOLERANCE)


def test_gradients_of_every_parameter(golden: Golden) -> None:
    check_gradients(golden)


def test_from_the_photograph_to_the_semantic_result(golden: Golden) -> None:
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=golden.meta["size_divisibility"])
    batch = processor([golden.arrays[f"image_{image}"] for image in (0, 1)], return_tensors="pt")
    with torch.no_grad():
        outputs = golden.model.eval()(**batch)
    check_semantic_results(golden, processor, outputs)


def test_the_key_table_is_two_way(golden: Golden) -> None:
    back = to_original(from_original(golden.original_tensors))
    assert back.keys() == golden.original_tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in golden.original_tensors.items())


def test_the_processor_gives_the_labels_of_the_loss(golden: Golden) -> None:
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0, ignore_index=255)
    maps = [golden.arrays[f"target_{image}.sem_seg"] for image in (0, 1)]
    batch = processor(
        [golden.arrays[f"image_{image}"] for image in (0, 1)], maps, target_format="label_map", return_tensors="pt"
    )
    assert batch.keys() == {"pixel_values", "pixel_mask", "labels"}
    assert torch.equal(batch["labels"], golden.labels["labels"])


@pytest.mark.parametrize("decoder_config", KINDS)
def test_a_round_trip_through_the_auto_classes(decoder_config, tmp_path) -> None:
    model, pixel_values = tiny_baseline(decoder_config).eval(), torch.randn(1, 3, 61, 90)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PerPixelBaselineConfig)
    assert config.to_json_string() == model.config.to_json_string()
    again, loading_info = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(again) is PerPixelBaselineForSemanticSegmentation
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("decoder_config", KINDS)
def test_transformers_stops_with_an_error_instead_of_predicting_nonsense(decoder_config, tmp_path) -> None:
    tiny_baseline(decoder_config).save_pretrained(tmp_path)
    with pytest.raises((ValueError, KeyError), match="maskformer-"):
        transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)


def test_queries_are_as_many_as_classes() -> None:
    config = PerPixelBaselineConfig(decoder_config=TRANSFORMER, num_labels=9)
    assert config.decoder_config.num_queries == 9
    assert PerPixelBaselineConfig.from_dict(config.to_dict(), num_labels=5).decoder_config.num_queries == 5


@pytest.mark.parametrize("decoder_config", KINDS)
def test_every_parameter_trains_and_ignored_pixels_do_not_count(decoder_config) -> None:
    model, batch = tiny_baseline(decoder_config).train(), batch_of_labels()
    loss = model(**batch).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # The mean over labelled pixels is the one over the two halves of them.
    halves = [batch["labels"].clone(), batch["labels"].clone()]
    halves[0][:, :37], halves[1][:, 37:] = 255, 255
    parts = [model(batch["pixel_values"], half).loss for half in halves]
    assert sum(parts).item() / 2 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("decoder_config", KINDS)
def test_a_batch_without_any_label_has_no_loss_and_a_gradient(decoder_config) -> None:
    model, batch = tiny_baseline(decoder_config).train(), batch_of_labels()
    batch["labels"].fill_(255)
    output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_deep_supervision_is_a_choice() -> None:
    terms = tiny_baseline(TRANSFORMER, deep_supervision=False)(**batch_of_labels()).loss_dict
    assert terms.keys() == {"loss_sem_seg"}


def test_a_label_that_is_no_class_is_refused() -> None:
    batch = batch_of_labels()
    batch["labels"][0, 20, 20] = NUM_LABELS
    with pytest.raises(ValueError, match=r"labels contain 4, but the model has 4 classes .*_index 255. Check"):
        tiny_baseline()(**batch)
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 32, 96\), but"):
        tiny_baseline()(batch["pixel_values"], batch["labels"][:, :32])
    with pytest.raises(ValueError, match=r"pixel_mask has the shape \(2, 32, 96\), but"):
        tiny_baseline()(batch["pixel_values"], pixel_mask=torch.ones(2, 32, 96))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 300}, "semantic_loss_ignore_index is 255, which is also one of the 300 classes"),
        ({"decoder_config": {"model_type": "detr"}}, "decoder_config is of type 'detr'"),
        ({"fpn_feature_size": 48}, "fpn_feature_size is 48"),
        ({"id2label": {1: "road", 2: "car"}}, r"id2label has the ids \[1, 2\]"),
        ({"num_labels": -1}, "num_labels is '-1', but must be an integer from 1 to 65536"),
    ],
)
def test_what_no_model_can_have_fails_at_construction(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        PerPixelBaselineConfig(**fields)


@pytest.mark.parametrize("decoder_config", KINDS)
def test_the_trainer_and_the_metric_take_it_as_it_is(decoder_config, tmp_path) -> None:
    scenes = GeneratedScenes(4, image_size=(64, 64))
    processor = image_processor_for(scenes.labels, image_size=64)
    trainer = MaskFormerTrainer(
        model=tiny_baseline(decoder_config, id2label=scenes.labels.id2label, freeze_batch_norm=False),
        args=MaskFormerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            backbone_learning_rate_factor=1.0,
            max_grad_norm=1.0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=scenes,
        eval_dataset=scenes,
        data_collator=MaskFormerDataCollator(processor, target_format="label_map"),
        processing_class=processor,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < trainer.evaluate()["eval_mean_iou"] <= 1
    trainer.save_model()
    again = pretrained_model(str(tmp_path), scenes.labels)
    assert type(again) is PerPixelBaselineForSemanticSegmentation


@pytest.mark.parametrize("decoder_config", KINDS)
def test_other_classes_need_a_word(decoder_config, tmp_path) -> None:
    tiny_baseline(decoder_config).save_pretrained(tmp_path)
    labels = LabelSet({0: "sky", 1: "road"}, ignore_index=200)
    with pytest.raises(ValueError, match="has 4 classes, but the data has 2"):
        pretrained_model(str(tmp_path), labels)
    model = pretrained_model(str(tmp_path), labels, reinitialize_head=True)
    assert model.config.num_labels == 2
    assert model.config.semantic_loss_ignore_index == 200
    assert new_model(str(tmp_path), labels)(torch.randn(1, 3, 64, 64)).logits.shape[1] == 2


@pytest.mark.parametrize("decoder_config", KINDS)
def test_attention_can_be_switched(decoder_config) -> None:
    model, pixel_values = tiny_baseline(decoder_config).eval(), torch.randn(1, 3, 64, 96)
    outputs = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(pixel_values).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [48, 49, 51])
def test_logits_are_enlarged_four_times_and_cut_whatever_the_size(width: int) -> None:
    """As the original does; to exactly the size of the input, borders would lie elsewhere."""
    logits, size = torch.randn(1, NUM_LABELS, 16, -(-width // 4)), torch.tensor([[64, width]])
    (label_map,) = per_pixel_segmentation(logits, size, size)
    enlarged = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")[0, :, :64, :width]
    assert torch.equal(label_map, enlarged.argmax(0))


def test_scores_are_the_softmax_of_the_logits_at_the_target() -> None:
    logits = torch.randn(2, NUM_LABELS, 16, 12)
    sizes = {"image_sizes": torch.tensor([[64, 48], [50, 40]]), "padded_sizes": torch.tensor([[64, 48]] * 2)}
    outputs, processor = SimpleNamespace(logits=logits, **sizes), MaskFormerImageProcessor()
    targets = [(64, 48), (70, 31)]
    maps = processor.post_process_semantic_segmentation(outputs, targets)
    both = processor.post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
    enlarged = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")
    cropped = torch.nn.functional.interpolate(enlarged[1:, :, :50, :40], (70, 31), mode="bilinear")
    for label_map, result, expected in zip(maps, both, (enlarged[0], cropped[0]), strict=True):
        assert torch.equal(result.segmentation, label_map)
        torch.testing.assert_close(result.segmentation_scores, expected.softmax(0))
    with pytest.raises(ValueError, match="its mode is \"paper\", not 'fast'"):
        processor.post_process_semantic_segmentation(outputs, mode="fast")
    with pytest.raises(ValueError, match=r"logits have shape \(4, 16, 12\); give \(batch, labels, height, width\)"):
        per_pixel_segmentation(logits[0], **sizes)
    logits[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="The logits contain NaN or infinity"):
        per_pixel_segmentation(logits, **sizes)


def test_more_than_255_classes_are_planned_as_they_are_built(tmp_path) -> None:
    tiny_baseline(num_labels=300, semantic_loss_ignore_index=65535).config.save_pretrained(tmp_path)
    labels = LabelSet({label: f"class {label}" for label in range(300)}, ignore_index=65535)
    arguments = ModelArguments(config=str(tmp_path))
    planned = arguments.planned_config(labels)
    assert planned.num_labels == 300
    assert planned.to_dict() == arguments.model(labels).config.to_dict()


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, MaskFormerTrainer])
def test_accumulated_batches_have_the_loss_of_one(trainer_class, tmp_path) -> None:
    scenes = GeneratedScenes(4, image_size=(64, 64))
    processor = image_processor_for(scenes.labels, image_size=64)
    losses = []
    for steps in (1, 4):
        torch.manual_seed(0)
        trainer = trainer_class(
            model=tiny_baseline(id2label=scenes.labels.id2label),
            args=MaskFormerTrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4 // steps,
                gradient_accumulation_steps=steps,
                logging_steps=1,
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=scenes,
            data_collator=MaskFormerDataCollator(processor, target_format="label_map"),
            processing_class=processor,
        )
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    # Up to how many pixels of each image are labelled.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_gradient_checkpointing_and_swin() -> None:
    config = PerPixelBaselineConfig(
        backbone_config=swin_config(), decoder_config=TRANSFORMER, fpn_feature_size=32, mask_feature_size=16
    )
    model = PerPixelBaselineForSemanticSegmentation(config).train()
    gradients = []
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": torch.randint(2, (1, 64, 64))}
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_mean_the_same(dtype):
    model, batch = tiny_baseline(), batch_of_labels()
    expected = model(**batch).loss.item()
    assert model(batch["pixel_values"], batch["labels"].to(dtype)).loss.item() == expected


@pytest.mark.parametrize("size", [(61, 90), (33, 50)])
@pytest.mark.parametrize("decoder_config", KINDS)
def test_the_loss_is_that_of_the_enlarged_logits_whatever_the_size(decoder_config, size):
    """Logits of odd sizes reach beyond the image when they are enlarged four times; what does is cut off."""
    model, labels = tiny_baseline(decoder_config).eval(), torch.randint(NUM_LABELS, (2, *size))
    labels[:, :10] = 255
    output = model(torch.randn(2, 3, *size), labels)
    enlarged = torch.nn.functional.interpolate(output.logits, scale_factor=4, mode="bilinear")
    expected = torch.nn.functional.cross_entropy(enlarged[..., : size[0], : size[1]], labels, ignore_index=255)
    assert output.loss_dict["loss_sem_seg"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("label", [-1, -100, NUM_LABELS])
def test_a_label_below_0_is_refused_like_one_above_the_classes(label):
    batch = batch_of_labels()
    batch["labels"][1, 40, 50] = label
    with pytest.raises(ValueError, match=f"labels contain {label}, but the model has 4 classes"):
        tiny_baseline()(**batch)


@pytest.mark.parametrize("change", [lambda labels: labels[:1], lambda labels: labels[:, None]])
def test_labels_of_another_number_of_images_are_refused(change):
    batch = batch_of_labels()
    with pytest.raises(ValueError, match="give one label for each pixel"):
        tiny_baseline()(batch["pixel_values"], change(batch["labels"]))


@pytest.mark.parametrize("decoder_config", KINDS)
def test_what_is_not_asked_for_is_not_returned(decoder_config):
    model, pixel_values = tiny_baseline(decoder_config).eval(), torch.randn(1, 3, 64, 96)
    plain = model(pixel_values)
    assert plain.hidden_states is None
    assert plain.attentions is None
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == (7 if decoder_config is None else 10)
    if decoder_config is not None:
        assert [weights.shape for weights in output.attentions] == [(1, 2, NUM_LABELS, 2 * 3)] * 2
    logits, *_ = model(pixel_values, return_dict=False)
    assert torch.equal(logits, plain.logits)


def test_classes_replaced_in_a_configuration_have_a_query_each():
    config = tiny_baseline(TRANSFORMER).config
    config.id2label = {label: str(label) for label in range(7)}
    output = PerPixelBaselineForSemanticSegmentation(config).eval()(torch.randn(1, 3, 64, 64))
    assert output.logits.shape[1] == 7
