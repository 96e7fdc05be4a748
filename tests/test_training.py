import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from golden import Golden
from huggingface_hub import ModelCard
from models import NUM_LABELS, convnext_config, resnet_config, swin_config, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_per_pixel_baseline import tiny_baseline
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    ResNetForImageClassification,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet, labels_of
from hf_maskformer.evaluation import evaluation
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.evaluation.tasks import FIGURES, check_model
from hf_maskformer.hub.key_table import to_original
from hf_maskformer.modeling_maskformer_outputs import MaskFormerForInstanceSegmentationOutput
from hf_maskformer.modeling_maskformer_pixel_level import sizes_in_batch
from hf_maskformer.training.checks import check_eval_classes, check_length
from hf_maskformer.training.loss_terms import LossTerms
from hf_maskformer.training.parameter_groups import parameter_groups
from hf_maskformer.training.pictures import write_pictures
from hf_maskformer.training.starting_point import (
    check_backbone,
    image_processor_for,
    load_backbone_weights,
    model_class_of,
    model_on_backbone,
    new_model,
    pretrained_model,
    renamed_classes,
    target_format,
)

SCENES = GeneratedScenes(4, image_size=(64, 64))
OTHER_LABELS = LabelSet({0: "sky", 1: "road"})


def arguments(tmp_path, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, **options}
    return {"output_dir": str(tmp_path), "report_to": "none", "disable_tqdm": True, "use_cpu": True, **options}


def scenes_model(**fields):
    return tiny_model(id2label=SCENES.labels.id2label, freeze_batch_norm=False, **fields)


def our_trainer(
    tmp_path, dataset=SCENES, model=None, task="semantic", eval_dataset=SCENES, kind=MaskFormerTrainer, **options
):
    image_processor = image_processor_for(SCENES.labels, image_size=64, task=task)
    return kind(
        model=scenes_model() if model is None else model,
        args=MaskFormerTrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=MaskFormerDataCollator(image_processor),
        processing_class=image_processor,
    )


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_loss_falls_on_a_few_scenes(tmp_path, task):
    scenes = GeneratedScenes(2, image_size=(64, 64), task=task)
    trainer = our_trainer(
        tmp_path, scenes, max_steps=25, learning_rate=3e-3, backbone_learning_rate_factor=1.0, max_grad_norm=1.0
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("options", [{}, {"max_steps": 3, "logging_steps": 3}, {"gradient_accumulation_steps": 2}])
def test_every_loss_term_is_logged_and_they_add_up(tmp_path, options):
    trainer = our_trainer(tmp_path, **options)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = {name: value for name, value in line.items() if name.startswith("loss_")}
    assert terms.keys() == {f"loss_{t}{layer}" for t in ("cross_entropy", "mask", "dice") for layer in ("", "_0")}
    assert sum(terms.values()) == pytest.approx(line["loss"], rel=1e-3)


def test_a_run_saves_what_from_pretrained_reads(tmp_path):
    trainer = our_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    image_processor = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert model.config.id2label == SCENES.labels.id2label
    assert image_processor.size == {"shortest_edge": 64, "longest_edge": 256}
    assert image_processor.label_ids_to_fuse == [0, 1, 2]  # the textures; shapes are countable
    batch = trainer.data_collator([SCENES[0]])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).masks_queries_logits
        assert torch.equal(model(**batch).masks_queries_logits, expected)


def test_evaluation_during_training_decides_for_the_best_checkpoint(tmp_path):
    trainer = our_trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    trainer.train()
    scores = [entry["eval_mean_iou"] for entry in trainer.state.log_history if "eval_mean_iou" in entry]
    assert len(scores) == 2
    assert trainer.state.best_metric == max(scores)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.1, 0.5, 0.3, 0.4], 0.5), ([0.1, 0.2, 0.9, 0.3], 0.2), ([0.9, 0.2, 0.3, 0.4], 0.4)],
    ids=["best saved", "best not saved", "none loaded"],
)
def test_the_card_has_the_figures_of_the_checkpoint_that_was_loaded(tmp_path, monkeypatch, scores, expected):
    figures = iter([{"mean_iou": score} for score in scores])
    monkeypatch.setattr("hf_maskformer.training.trainer.evaluate", lambda *_, **__: next(figures))
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = our_trainer(tmp_path, max_steps=4, load_best_model_at_end=True, num_pictures=0, **saving)
    trainer.train()
    trainer.create_model_card()
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert result.metric_value == expected


def test_the_plain_trainer_trains_too(tmp_path):
    image_processor = image_processor_for(SCENES.labels, image_size=64)
    trainer = Trainer(
        model=scenes_model(),
        args=TrainingArguments(**arguments(tmp_path, remove_unused_columns=False)),
        train_dataset=SCENES,
        eval_dataset=SCENES,
        data_collator=MaskFormerDataCollator(image_processor),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_same_seed_gives_the_same_run(tmp_path):
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        trainer = our_trainer(tmp_path)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    weights = []
    for stops_at in (None, 2):
        torch.manual_seed(1)
        model, folder = scenes_model(), tmp_path / str(stops_at)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "model": model}
        trainer = our_trainer(folder, **options)
        trainer.train()
        if stops_at is not None:
            torch.manual_seed(1)
            trainer = our_trainer(folder, **{**options, "model": scenes_model()})
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stops_at}"))
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-6, msg=name)


def test_a_training_may_run_in_a_thread_which_hears_no_signals(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(our_trainer(tmp_path).train).result().global_step == 2


def test_synchronised_batch_norm_is_the_same_model():
    """What the trainer does on several GPUs leaves names, frozen statistics and predictions as they are."""
    for model in (scenes_model(), tiny_model()):
        before, pixel_values = model.state_dict(), torch.randn(1, 3, 64, 64)
        expected = model.eval()(pixel_values).masks_queries_logits
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert model.state_dict().keys() == before.keys()
        assert torch.equal(model.eval()(pixel_values).masks_queries_logits, expected)
        norms = [m for m in model.train().modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        assert len(norms) > 0
        assert all(norm.training != model.config.freeze_batch_norm for norm in norms)


def test_terms_of_an_attempt_whose_batch_did_not_fit_are_not_logged(tmp_path):
    class OutOfMemory(MaskFormerTrainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if len(inputs["pixel_values"]) > 1:
                raise RuntimeError("CUDA out of memory.")
            return loss

    trainer = our_trainer(tmp_path, kind=OutOfMemory, auto_find_batch_size=True)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = [value for name, value in line.items() if name.startswith("loss_")]
    assert sum(terms) == pytest.approx(line["loss"], rel=1e-3)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No parameter of the model has requires_grad=True"):
        our_trainer(tmp_path, model=scenes_model().requires_grad_(False)).train()


def test_removing_the_columns_that_the_collator_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        MaskFormerTrainingArguments(**arguments(tmp_path, remove_unused_columns=True))


def test_one_step_of_the_optimiser_equals_that_of_the_original(golden: Golden):
    """Its parameter groups, full-model clipping at 0.01 and AdamW, from the stored gradient on."""
    backbone_factor = 0.1 if golden.config.backbone_config.model_type == "resnet" else 1.0
    learning_rates, decays = zip(*golden.meta["param_groups"].values(), strict=True)
    model = Golden(golden.meta["name"]).model.train()
    groups = parameter_groups(model, max(learning_rates), max(decays), backbone_factor)
    optimizer = torch.optim.AdamW(groups, lr=max(learning_rates))
    model(golden.arrays["pixel_values"], **golden.labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()

    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = to_original({name: torch.tensor(settings[id(p)]).expand(3, 2) for name, p in named.items()})
    for name, expected in golden.meta["param_groups"].items():
        assert ours[name][0].tolist() == pytest.approx(expected), name

    after = to_original({name: p.detach() for name, p in model.named_parameters()})
    stored_names = [name for name in golden.arrays if name.startswith("after_step.")]
    assert len(stored_names) > 10
    for name in (stored_name.removeprefix("after_step.") for stored_name in stored_names):
        weight, learning_rate = after[name].flatten(), golden.meta["param_groups"][name][0]
        indices = torch.arange(64) * weight.numel() // 64 if weight.numel() > 64 else torch.arange(weight.numel())
        # A step is about as long as the learning rate.
        assert (weight[indices] - golden.arrays[f"after_step.{name}"]).abs().max() < 0.01 * learning_rate, name


class FixedModel(torch.nn.Module):
    """Predicts class 1 everywhere, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, pixel_mask):
        sizes, padded = sizes_in_batch(pixel_values, pixel_mask)
        class_logits = torch.tensor([0.0, 9.0, 0.0]).expand(len(pixel_values), 1, 3)
        mask_logits = torch.full((len(pixel_values), 1, 8, 8), 9.0)
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=class_logits, masks_queries_logits=mask_logits, image_sizes=sizes, padded_sizes=padded
        )


class SizedSamples(list):
    """Images of 8 x 8 and 10 x 6 and 8 x 4, of which 16, 15 and 8 pixels are of class 1; the others are of class 0."""

    labels = OTHER_LABELS

    def __init__(self):
        for name, (height, width), rows in (("a", (8, 8), 2), ("b", (10, 6), 2.5), ("c", (8, 4), 2)):
            segmentation_map = np.zeros((height, width), dtype=np.uint8)
            segmentation_map.flat[: int(rows * width)] = 1
            image = Image.new("RGB", (width, height))
            self.append({"image": image, "segmentation_map": segmentation_map, "name": name})


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_evaluation_counts_every_pixel_of_every_sample_once(batch_size):
    processor = image_processor_for(OTHER_LABELS, image_size=16)
    figures = evaluate(FixedModel(), processor, SizedSamples(), batch_size=batch_size)
    assert figures["overall_accuracy"] == pytest.approx((16 + 15 + 8) / (64 + 60 + 32))
    assert figures["per_category_iou"].tolist() == pytest.approx([0, 39 / 156])


def test_processes_share_the_samples_and_count_none_twice(monkeypatch):
    """Two processes, one after the other; their counts add up to those of one process."""
    processor = image_processor_for(OTHER_LABELS, image_size=16)
    counts = []
    monkeypatch.setattr(evaluation, "merge_over_processes", lambda metric: counts.append(metric.confusion_matrix))
    evaluate(FixedModel(), processor, SizedSamples())
    for index in range(2):
        state = SimpleNamespace(process_index=index, num_processes=2, is_local_main_process=False)
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        evaluate(FixedModel(), processor, SizedSamples())
    assert torch.equal(counts[0], counts[1] + counts[2])


def test_panoptic_samples_are_evaluated_by_the_labels_of_their_segments():
    model = scenes_model()
    processor = image_processor_for(SCENES.labels, image_size=64)
    panoptic = GeneratedScenes(2, image_size=(64, 64), task="panoptic")
    semantic_view = GeneratedScenes(2, image_size=(64, 64), task="semantic")
    figures = [evaluate(model, processor, scenes, "semantic")["mean_iou"] for scenes in (panoptic, semantic_view)]
    assert figures[0] == figures[1] > 0


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_restores_the_mode_of_the_model(mode):
    model = scenes_model().train(mode)
    evaluate(model, image_processor_for(SCENES.labels, image_size=64), SCENES)
    assert model.training == mode


def test_a_dictionary_of_data_sets_is_evaluated_one_by_one(tmp_path):
    trainer = our_trainer(tmp_path)
    assert {"eval_a_mean_iou", "eval_b_mean_iou"} < trainer.evaluate({"a": SCENES, "b": SCENES}).keys()


def test_one_of_several_data_sets_is_evaluated_by_its_name(tmp_path):
    trainer = our_trainer(tmp_path, eval_dataset={"a": SCENES, "b": SCENES})
    assert trainer.evaluate("a")["eval_mean_iou"] == trainer.evaluate(SCENES)["eval_mean_iou"]
    with pytest.raises(ValueError, match="There is no eval_dataset 'c'; the names are: a, b"):
        trainer.evaluate("c")
    with pytest.raises(ValueError, match="There is no eval_dataset 'a'; the names are: none"):
        our_trainer(tmp_path).evaluate("a")


def test_the_trainer_uses_the_groups_of_the_paper(tmp_path):
    trainer = our_trainer(tmp_path)
    groups = trainer.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.0),
        (1e-4, 1e-4),
        (pytest.approx(1e-5), 0.0),
        (pytest.approx(1e-5), 1e-4),
    ]
    assert sum(p.numel() for group in groups for p in group["params"]) == trainer.model.num_parameters(
        only_trainable=True
    )


def test_rates_and_weight_decay_are_those_of_the_arguments(tmp_path):
    options = {"learning_rate": 1e-2, "weight_decay": 0.05, "backbone_learning_rate_factor": 0.5}
    groups = our_trainer(tmp_path, **options).create_optimizer().param_groups
    rates_and_decays = [(group["lr"], group["weight_decay"]) for group in groups]
    assert rates_and_decays == [(1e-2, 0.0), (1e-2, 0.05), (5e-3, 0.0), (5e-3, 0.05)]


def test_evaluation_has_the_batches_and_workers_of_the_arguments(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("hf_maskformer.training.trainer.evaluate", lambda *_, **options: asked.append(options) or {})
    our_trainer(tmp_path, per_device_eval_batch_size=3, dataloader_num_workers=2).evaluate()
    assert (asked[0]["batch_size"], asked[0]["num_workers"]) == (3, 2)


def test_what_is_new_on_top_of_a_vision_transformer_learns_at_the_full_rate():
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
    model = tiny_model(backbone)
    groups = parameter_groups(model, 1e-4, 1e-4, backbone_learning_rate_factor=0.1)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    trained = {name: group_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    rates, decays = ({name: group[key] for name, group in trained.items()} for key in ("lr", "weight_decay"))
    is_pretrained = {name: "encoder.backbone." in name for name in rates}
    assert 0 < sum(is_pretrained.values()) < len(rates)
    assert all(rates[name] == pytest.approx(1e-5 if is_pretrained[name] else 1e-4) for name in rates)
    # Tokens, positions and scales of layers are no weights of layers.
    undecayed = {name.rpartition(".")[2] for name, decay in decays.items() if is_pretrained[name] and decay == 0}
    assert undecayed == {"cls_token", "position_embeddings", "lambda1", "weight", "bias"}
    decayed = {name for name, decay in decays.items() if is_pretrained[name] and decay}
    assert decayed
    assert not any("norm" in name for name in decayed)


def test_the_defaults_are_the_recipe_of_the_paper(tmp_path):
    args = MaskFormerTrainingArguments(**arguments(tmp_path))
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-4, 1e-4, 0.01)
    assert (args.warmup_factor, args.lr_milestones) == (1e-6, [2 / 3])
    trainer = our_trainer(tmp_path)
    scheduler = trainer.create_scheduler(num_training_steps=100, optimizer=trainer.create_optimizer())
    for _ in range(50):
        trainer.optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-4 * 0.5**0.9)


def test_one_argument_of_the_schedule_leaves_the_others_as_they_are(tmp_path):
    for given in ({"lr_end": 0.0}, '{"lr_end": 0.0}', None):
        args = MaskFormerTrainingArguments(**arguments(tmp_path, lr_scheduler_kwargs=given))
        assert args.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 0.0}
    args = MaskFormerTrainingArguments(**arguments(tmp_path, lr_scheduler_kwargs={"power": 2}))
    assert args.lr_scheduler_kwargs == {"power": 2, "lr_end": 0.0}


def rates_of(trainer, steps=4):
    """The learning rates of a training that is not done."""
    trainer.optimizer = trainer.lr_scheduler = None
    scheduler = trainer.create_scheduler(num_training_steps=steps, optimizer=trainer.create_optimizer())
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    return rates


def test_another_schedule_has_its_own_defaults(tmp_path):
    polynomial = [1e-4 * (1 - step / 4) ** 0.9 for step in range(4)]
    linear = [1e-4 * (1 - step / 4) for step in range(4)]
    trainer = our_trainer(tmp_path)
    assert rates_of(trainer) == pytest.approx(polynomial)
    trainer.args.set_lr_scheduler(name="linear")
    assert rates_of(trainer) == pytest.approx(linear)
    trainer.args = replace(trainer.args, lr_scheduler_type="polynomial")
    assert rates_of(trainer) == pytest.approx(polynomial)
    trainer.args = replace(trainer.args, lr_scheduler_type="linear")
    assert rates_of(trainer) == pytest.approx(linear)
    trainer.args.lr_scheduler_type = "reduce_lr_on_plateau"
    with pytest.raises(ValueError, match="follows metric_for_best_model, which is None"):
        rates_of(trainer)
    following = MaskFormerTrainingArguments(**arguments(tmp_path, lr_scheduler_type="greedy", eval_strategy="epoch"))
    trainer.args = replace(following, lr_scheduler_type="linear")
    assert rates_of(trainer) == pytest.approx(linear)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_the_figure_take_a_higher_one_for_better(tmp_path, monkeypatch, name):
    figures = iter([0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr("hf_maskformer.training.trainer.evaluate", lambda *_, **__: {"mean_iou": next(figures)})
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    # The lowest rate that GreedyLR has by default lies above this one.
    trainer = our_trainer(
        tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs={"patience": 0, "min_lr": 0.0}, **options
    )
    trainer.train()
    assert trainer.state.best_metric == 0.4
    assert trainer.lr_scheduler.get_last_lr()[0] >= 1e-4
    args = MaskFormerTrainingArguments(
        **arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs={"mode": "min"}, eval_strategy="epoch")
    )
    assert args.lr_scheduler_kwargs == {"mode": "min"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor and neftune_noise_alpha do not apply"),
        ({"neftune_noise_alpha": 5.0}, "label_smoothing_factor and neftune_noise_alpha do not apply"),
        ({"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval do not apply"),
        ({"fp16_full_eval": True}, "bf16_full_eval and fp16_full_eval do not apply"),
        ({"backbone_learning_rate_factor": -1.0}, "backbone_learning_rate_factor is -1.0, but must be finite"),
        ({"backbone_learning_rate_factor": float("nan")}, "backbone_learning_rate_factor is nan"),
        ({"backbone_learning_rate_factor": float("inf")}, "backbone_learning_rate_factor is inf"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint must be False: MaskFormerTrainer itself saves"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"max_steps": 0}, "max_steps is 0; set at least 1"),
        ({"max_steps": -2}, "max_steps is -2; set at least 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerTrainingArguments(**arguments(tmp_path, **options))


@pytest.mark.parametrize(("saving", "is_warned"), [({"save_steps": 4}, True), ({"save_steps": 2}, False), ({}, False)])
def test_evaluations_without_a_checkpoint_are_warned_of_where_the_best_is_to_be_kept(
    tmp_path, saving, is_warned, caplog
):
    saving = {"save_strategy": "steps" if saving else "best"} | saving
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **saving}
    MaskFormerTrainingArguments(**arguments(tmp_path, **options))
    assert ("it cannot be loaded" in caplog.text) == is_warned


@pytest.mark.parametrize(
    "options",
    [{"lr_scheduler_kwargs": {"powr": 2}}, {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {}}],
)
def test_arguments_that_a_schedule_lacks_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs .* do not match lr_scheduler_type .* argument"):
        our_trainer(tmp_path, **options).train()


@pytest.mark.parametrize("options", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
def test_fewer_images_than_a_batch_are_an_error_where_the_rest_is_left_out(tmp_path, options):
    options |= {"per_device_train_batch_size": 8}
    trainer = our_trainer(tmp_path, dataloader_drop_last=True, **options)
    with pytest.raises(
        ValueError, match="train_dataset has 4 samples, but a batch 8, and dataloader_drop_last is True"
    ):
        trainer.train()
    our_trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match="train_dataset has 0 samples"):
        our_trainer(tmp_path, dataset=Subset(SCENES, []), **options).train()


def test_every_process_reads_a_stream_itself_unless_told_otherwise(tmp_path):
    for given, expected in ((None, False), ({"dispatch_batches": True}, True), ({"split_batches": True}, False)):
        args = MaskFormerTrainingArguments(**arguments(tmp_path, accelerator_config=given))
        assert args.accelerator_config.dispatch_batches is expected


def test_a_batch_is_that_of_all_processes(tmp_path, monkeypatch):
    args = MaskFormerTrainingArguments(**arguments(tmp_path, dataloader_drop_last=True))
    check_length(SCENES, args)
    monkeypatch.setattr(MaskFormerTrainingArguments, "world_size", property(lambda self: 3))
    with pytest.raises(ValueError, match="train_dataset has 4 samples, but a batch 6"):
        check_length(SCENES, args)


def test_evaluation_gives_its_figures_alone(tmp_path):
    trainer = our_trainer(tmp_path)
    trainer.train()
    assert trainer.evaluate(metric_key_prefix="test").keys() == {f"test_{figure}" for figure in FIGURES["semantic"]}


def test_the_trainer_says_at_once_what_does_not_fit_together(tmp_path):
    class OwnEvaluation(MaskFormerTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs)

    def trainer(kind=MaskFormerTrainer, **changes):
        return kind(
            **{
                "model": scenes_model(),
                "args": MaskFormerTrainingArguments(**arguments(tmp_path)),
                "train_dataset": SCENES,
                "processing_class": image_processor_for(SCENES.labels, image_size=64),
                **changes,
            }
        )

    trainer()
    with pytest.raises(ValueError, match=r"args are TrainingArguments\. Pass MaskFormerTrainingArguments"):
        trainer(args=TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="has its own evaluation, without compute_metrics"):
        trainer(compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="The model has 2 classes, but train_dataset has 8"):
        trainer(model=tiny_model(id2label={0: "sky", 1: "road"}))
    processor = image_processor_for(replace(SCENES.labels, do_reduce_labels=True), image_size=64)
    with pytest.raises(ValueError, match="has do_reduce_labels=True, but train_dataset False"):
        trainer(processing_class=processor)
    other = GeneratedScenes(2, image_size=(64, 64))
    names = list(other.labels.id2label.values())
    other.labels = replace(other.labels, id2label=dict(enumerate([names[1], names[0], *names[2:]])))
    message = f"'{names[1]}' is class 0 in eval_dataset, but class 1 in train_dataset"
    for eval_dataset in (other, {"same": SCENES, "other": other}):
        with pytest.raises(ValueError, match=message):
            trainer(eval_dataset=eval_dataset)
        with pytest.raises(ValueError, match=message):
            trainer().evaluate(eval_dataset)
    with pytest.raises(ValueError, match=message):
        trainer(OwnEvaluation, eval_dataset=other)
    for alike in ([name.upper() for name in names], names[:2], [f"LABEL_{label}" for label in range(len(names))]):
        other.labels = replace(other.labels, id2label=dict(enumerate(alike)), thing_ids=())
        trainer(eval_dataset=other)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer().evaluate()
    # An evaluation of one's own may give other figures, and take other data.
    figure = {"args": MaskFormerTrainingArguments(**arguments(tmp_path, metric_for_best_model="mine"))}
    panoptic = {"processing_class": image_processor_for(SCENES.labels, image_size=64, task="panoptic")}
    for changes, message in ((figure, "metric_for_best_model is mine"), (panoptic, "which does not tell panoptic")):
        trainer(OwnEvaluation, eval_dataset=SCENES, **changes)
        with pytest.raises(ValueError, match=message):
            trainer(eval_dataset=SCENES, **changes)


def test_two_classes_of_nearly_one_name_are_no_other_order_of_classes(tmp_path):
    postboxes = GeneratedScenes(2, image_size=(64, 64))
    names = ["postbox", "Post box", *list(postboxes.labels.id2label.values())[2:]]
    postboxes.labels = replace(postboxes.labels, id2label=dict(enumerate(names)))
    check_eval_classes(postboxes, postboxes)
    moved = GeneratedScenes(2, image_size=(64, 64))
    for other in ([names[1], names[0], *names[2:]], [*names[2:], *names[:2]]):
        moved.labels = replace(postboxes.labels, id2label=dict(enumerate(other)))
        with pytest.raises(ValueError, match=r"but class [0-9]+ in train_dataset"):
            check_eval_classes(postboxes, moved)


def test_classes_in_another_order_are_found_in_another_spelling_too():
    names = list(SCENES.labels.id2label.values())
    other = GeneratedScenes(2, image_size=(64, 64))
    other.labels = replace(other.labels, id2label=dict(enumerate(name.upper() for name in reversed(names))))
    with pytest.raises(ValueError, match=f"'{names[-1].upper()}' is class 0 in .* class {len(names) - 1} in"):
        check_eval_classes(SCENES, other)


def test_a_part_of_a_data_set_has_its_classes_and_what_has_none_says_what_to_do(tmp_path):
    trainer = our_trainer(tmp_path)
    part = Subset(SCENES, [0, 1])
    assert labels_of(part) == labels_of(Subset(part, [0])) == SCENES.labels
    check_samples(part)
    first_two = GeneratedScenes(2, image_size=(64, 64))
    assert trainer.evaluate(part)["eval_mean_iou"] == trainer.evaluate(first_two)["eval_mean_iou"]
    with pytest.raises(ValueError, match=r"of type list, does not say which classes it has\. Open it with a reader"):
        trainer.evaluate([SCENES[0]])
    with pytest.raises(ValueError, match=r"of type ConcatDataset, does not say which classes it has"):
        our_trainer(tmp_path, eval_dataset=ConcatDataset([SCENES, SCENES]))


def test_the_trainer_says_at_once_what_its_evaluation_needs(tmp_path):
    args = MaskFormerTrainingArguments(**arguments(tmp_path))
    for other in (None, MaskFormerImageProcessorPil()):
        name = f"{type(other).__module__}.{type(other).__name__}"
        with pytest.raises(ValueError, match=f"processing_class is of type {name}, but"):
            MaskFormerTrainer(model=scenes_model(), args=args, train_dataset=SCENES, processing_class=other)
    scenes_model().save_pretrained(tmp_path / "model")
    stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "model")
    for model in (stock, get_peft_model(stock, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=r"is transformers' MaskFormerForInstanceSegmentation\. Use that of"):
            our_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="metric_for_best_model is the loss"):
        our_trainer(tmp_path, metric_for_best_model="eval_loss")
    with pytest.raises(ValueError, match="metric_for_best_model is miou, but evaluation gives mean_iou, mean_acc"):
        our_trainer(tmp_path, metric_for_best_model="miou")
    for data in (SCENES, {"a": SCENES, "b": SCENES}):
        trainer = our_trainer(tmp_path, eval_dataset=data, save_strategy="best", eval_strategy="steps")
        assert trainer.args.metric_for_best_model == ("mean_iou" if data is SCENES else "a_mean_iou")
    with pytest.raises(ValueError, match="without compute_loss_func"):
        MaskFormerTrainer(
            scenes_model(), args, processing_class=MaskFormerImageProcessor(), compute_loss_func=lambda *_: 0
        )


def test_models_whose_weights_the_compiler_renamed_are_not_trained(tmp_path):
    model, with_part = torch.compile(scenes_model(), backend="eager"), scenes_model()
    with pytest.raises(ValueError, match="which puts _orig_mod into the names of its weights"):
        our_trainer(tmp_path, model=model)
    assert "eval_mean_iou" in our_trainer(tmp_path, dataset=None, model=model).evaluate()
    with_part.model = torch.compile(with_part.model, backend="eager")
    # Older versions of accelerate cannot unwrap it and raise the other error first.
    with pytest.raises((ValueError, AttributeError), match="_orig_mod"):
        our_trainer(tmp_path, model=with_part)


def test_a_model_that_is_compiled_in_place_trains_and_loads(tmp_path):
    model = scenes_model()
    model.model.compile(backend="eager")
    trainer = our_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    trainer.save_model()
    _, loading = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_best_checkpoint_may_be_that_of_any_figure_of_any_data_set(tmp_path):
    several = {"a": SCENES, "b": SCENES}
    figures = (
        (SCENES, "mean_accuracy"),
        (SCENES, "eval_mean_iou"),
        (several, "b_mean_iou"),
        (several, "eval_a_mean_iou"),
    )
    for eval_dataset, figure in figures:
        our_trainer(tmp_path, eval_dataset=eval_dataset, metric_for_best_model=figure)
    with pytest.raises(ValueError, match="metric_for_best_model is mean_iou, but evaluation gives a_mean_iou"):
        our_trainer(tmp_path, eval_dataset=several, metric_for_best_model="mean_iou")


def test_an_optimiser_that_is_given_is_the_one_that_trains(tmp_path):
    trainer = our_trainer(tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"momentum": 0.5})
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert all(group["momentum"] == 0.5 for group in optimizer.param_groups)
    assert len({group["lr"] for group in optimizer.param_groups}) == 2  # that of the backbone is its own


@pytest.mark.parametrize("warmup_steps", [1, 2, 5])
def test_a_training_may_end_with_or_within_its_warm_up(tmp_path, warmup_steps):
    trainer = our_trainer(tmp_path, max_steps=2, warmup_steps=warmup_steps)
    trainer.train()
    assert trainer.state.global_step == 2


def test_masks_are_not_gathered_for_predictions(tmp_path):
    with pytest.raises(ValueError, match=r"gathers no masks\. For figures, call evaluate"):
        our_trainer(tmp_path).predict(SCENES)


def test_adapters_around_a_baseline_train_as_it_does(tmp_path):
    adapted = get_peft_model(tiny_baseline(), LoraConfig(r=2, target_modules=r".*convolution"))
    assert target_format(adapted) == "label_map"
    with pytest.raises(ValueError, match="A per-pixel baseline has no segments"):
        check_model("panoptic", adapted)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    ResNetForImageClassification(resnet_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has model_type 'resnet', but must have 'maskformer' or 'per-pixel-baseline'"):
        pretrained_model(str(tmp_path), OTHER_LABELS, reinitialize_head=True)


@pytest.mark.parametrize("checkpoint", ["outputs/no/such/checkpoint", "no_such_folder"])
def test_a_checkpoint_that_does_not_exist_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"^{checkpoint} is not a folder with a config.json"):
        pretrained_model(checkpoint, OTHER_LABELS)


def test_a_configuration_file_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.cached_files", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"configs/smal\.json does not exist\. Name a configuration file"):
        pretrained_model("configs/smal.json", OTHER_LABELS)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    model = tiny_model(id2label=OTHER_LABELS.id2label)
    tensors = {name: t for name, t in model.state_dict().items() if "queries_embedder" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(ValueError, match=r"such as model\.transformer_module\.queries_embedder\.weight"):
        pretrained_model(str(tmp_path), OTHER_LABELS)


@pytest.mark.parametrize("name", ["resnet", "swin", "convnext", "dinov2"])
def test_a_new_model_on_a_pretrained_backbone_has_its_weights(name, tmp_path):
    config, classifier = {
        "resnet": (resnet_config(), ResNetForImageClassification),
        "swin": (swin_config(), SwinForImageClassification),
        "convnext": (convnext_config(), ConvNextForImageClassification),
        "dinov2": (
            Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14),
            Dinov2ForImageClassification,
        ),
    }[name]
    pretrained = classifier(config)
    pretrained.save_pretrained(tmp_path)
    model = model_on_backbone(str(tmp_path), OTHER_LABELS)
    assert model.config.id2label == OTHER_LABELS.id2label
    there = {id_of(tensor) for tensor in pretrained.base_model.state_dict().values() if tensor.dim() > 1}
    encoder = model.model.pixel_level_module.encoder.state_dict()
    here = [t for name, t in encoder.items() if t.dim() > 1 and t.is_floating_point() and "levels" not in name]
    assert len(here) > 5
    assert all(id_of(tensor) in there for tensor in here)


def id_of(tensor):
    return tuple(tensor.shape), float(tensor.double().sum())


def test_a_backbone_whose_weights_are_not_all_there_is_refused(tmp_path):
    pretrained = ResNetForImageClassification(resnet_config())
    tensors = {name: t for name, t in pretrained.state_dict().items() if "stages.2" not in name}
    pretrained.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(ValueError, match=r"lacks weights of the backbone.*encoder\.stages\.2"):
        model_on_backbone(str(tmp_path), OTHER_LABELS)


def test_targets_of_the_other_kind_of_model_are_refused_with_the_remedy(tmp_path):
    trainer = our_trainer(tmp_path)
    trainer.data_collator = MaskFormerDataCollator(trainer.processing_class, target_format="label_map")
    with pytest.raises(ValueError, match=r"has no loss for a batch of .*labels.*Set target_format"):
        trainer.train()


def test_a_new_model_takes_the_names_of_the_data(tmp_path):
    tiny_config(resnet_config()).save_pretrained(tmp_path)
    assert new_model(str(tmp_path), OTHER_LABELS).config.id2label == {0: "sky", 1: "road"}
    assert new_model(str(tmp_path / "config.json"), OTHER_LABELS).config.label2id == {"sky": 0, "road": 1}


def test_a_checkpoint_of_other_classes_is_refused_unless_asked_for(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {NUM_LABELS} classes, but the data has 2. Pass reinitialize_head"):
        pretrained_model(str(tmp_path), OTHER_LABELS)
    logger = "hf_maskformer.training.starting_point"
    with caplog.at_level("WARNING", logger=logger):
        model = pretrained_model(str(tmp_path), OTHER_LABELS, reinitialize_head=True)
    assert model.class_predictor.out_features == 3
    assert "replaced by a random one: class_predictor.bias, class_predictor.weight." in caplog.text


def test_a_checkpoint_whose_classes_have_other_names_is_kept_with_a_warning(tmp_path, caplog):
    saved = tiny_model(id2label={0: "water", 1: "land"})
    saved.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="hf_maskformer.training.starting_point"):
        model = pretrained_model(str(tmp_path), OTHER_LABELS)
    assert torch.equal(model.class_predictor.weight, saved.class_predictor.weight)
    assert "class 0 is 'water' there but 'sky' in the data" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="hf_maskformer.training.starting_point"):
        model = pretrained_model(str(tmp_path), OTHER_LABELS, reinitialize_head=True)
    assert "replaced by a random one: class_predictor.weight, class_predictor.bias." in caplog.text
    assert not torch.equal(model.class_predictor.weight, saved.class_predictor.weight)
    assert torch.equal(model.mask_embedder.state_dict()["0.0.weight"], saved.mask_embedder.state_dict()["0.0.weight"])


def test_classes_that_share_a_name_are_the_same_in_a_checkpoint_and_in_the_data():
    names = {0: "screen", 1: "screen"}
    assert not renamed_classes(names, LabelSet({0: "screen (0)", 1: "screen (1)"}))
    assert renamed_classes(names, LabelSet({0: "screen", 1: "monitor"})) == [
        "class 1 is 'screen' there but 'monitor' in the data"
    ]


def test_the_small_configuration_is_a_model_for_any_classes():
    model = new_model(str(Path(__file__).parents[1] / "scripts" / "configs" / "small.json"), OTHER_LABELS)
    assert not model.config.freeze_batch_norm  # it is for training from scratch
    assert json.loads(json.dumps(model.config.to_dict()))["model_type"] == "maskformer"


def test_maps_are_read_as_the_labels_say(tmp_path):
    labels = LabelSet({0: "sky", 1: "road"}, ignore_index=200, do_reduce_labels=True)
    our_processor = image_processor_for(OTHER_LABELS, 16)
    our_processor.save_pretrained(tmp_path)
    for checkpoint in (None, str(tmp_path)):  # which may be of other data
        processor = image_processor_for(labels, 16, checkpoint)
        label_map = np.array([[0, 1], [2, 200]]).repeat(8, axis=0).repeat(8, axis=1)
        batch = processor([Image.new("RGB", (16, 16))], label_map, target_format="label_map", return_tensors="pt")
        # Classes count from 0, and both 0 and 200 are void.
        assert batch["labels"][0, :16:8, :16:8].tolist() == [[200, 0], [1, 200]]


def test_images_for_a_plain_vision_transformer_are_padded_to_whole_patches():
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    model = scenes_model(backbone=backbone)
    processor = image_processor_for(SCENES.labels, image_size=64, model=model)
    batch = MaskFormerDataCollator(processor)([SCENES[0]])
    assert batch["pixel_values"].shape[-2:] == (70, 70)
    assert model(**batch).loss.isfinite()


def test_a_missing_configuration_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        new_model("nowhere.json", OTHER_LABELS)


def test_every_line_of_the_log_has_the_terms_of_its_own_steps(tmp_path):
    faster = {"learning_rate": 3e-3, "backbone_learning_rate_factor": 1.0, "max_grad_norm": 1.0}
    trainer = our_trainer(tmp_path, max_steps=4, **faster)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        terms = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert terms == pytest.approx(line["loss"], rel=1e-3)


def test_a_second_training_of_a_trainer_logs_its_own_terms_only(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=3, logging_steps=2, save_strategy="no")
    for _ in range(2):  # the terms of the third step come into no line
        trainer.train()
        line = next(line for line in trainer.state.log_history if "loss" in line)
        terms = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert terms == pytest.approx(line["loss"], rel=1e-3)


def test_the_terms_of_a_baseline_add_up_where_batches_are_accumulated(tmp_path):
    trainer = MaskFormerTrainer(
        model=tiny_baseline(id2label=SCENES.labels.id2label),
        args=MaskFormerTrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2)),
        train_dataset=SCENES,
        processing_class=image_processor_for(SCENES.labels, image_size=64),
    )
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    terms = sum(value for name, value in line.items() if name.startswith("loss_"))
    assert terms == pytest.approx(line["loss"], rel=1e-3)


def test_an_evaluation_between_two_lines_of_the_log_takes_none_of_their_terms(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    terms_of = [
        (line.get("loss", 0.0), sum(value for name, value in line.items() if name.startswith("loss_")))
        for line in trainer.state.log_history
    ]
    assert len(terms_of) == 4  # the loss, two evaluations and the end
    for loss, terms in terms_of:
        assert terms == pytest.approx(loss, rel=1e-3)


def test_pictures_of_a_card_leave_the_model_in_its_mode(tmp_path):
    for mode in (True, False):
        model = scenes_model().train(mode)
        write_pictures(model, image_processor_for(SCENES.labels, image_size=64), SCENES, 1, tmp_path)
        assert model.training == mode


def test_evaluation_has_the_precision_of_the_training(tmp_path):
    trainer = our_trainer(tmp_path, bf16=True)
    dtypes = []
    trainer.model.class_predictor.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.evaluate()
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        (
            Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=16),
            "register_tokens",
        ),
        (convnext_config(), "layer_scale_parameter"),
    ],
    ids=["registers", "convnext"],
)
def test_tokens_and_scales_of_other_backbones_do_not_decay(backbone, name):
    model = tiny_model(backbone)
    groups = parameter_groups(model, 1e-4, 1e-4, backbone_learning_rate_factor=0.1)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = [decays[id(p)] for full_name, p in model.named_parameters() if full_name.endswith(name)]
    assert found
    assert set(found) == {0.0}


def test_parameters_that_are_frozen_are_in_no_group():
    model = scenes_model()
    model.model.pixel_level_module.encoder.requires_grad_(False)
    groups = parameter_groups(model, 1e-4, 1e-4, backbone_learning_rate_factor=0.1)
    assert [group["lr"] for group in groups] == [1e-4, 1e-4]
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_a_new_baseline_ignores_what_the_data_ignore(tmp_path):
    tiny_baseline().save_pretrained(tmp_path)
    labels = LabelSet({0: "sky", 1: "road"}, ignore_index=7)
    assert new_model(str(tmp_path), labels).config.semantic_loss_ignore_index == 7


# Beside the norm, what transformers calls otherwise in memory.
@pytest.mark.parametrize("part", ["layernorm_before", "attention.self.query", "attention.output.dense", "intermediate"])
def test_a_swin_whose_weights_are_not_all_there_is_refused(tmp_path, part):
    SwinForImageClassification(swin_config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    part = f"layers.2.blocks.1.{part}"
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of the backbone.*{part}"):
        model_on_backbone(str(tmp_path), OTHER_LABELS)


def test_a_backbone_of_another_width_is_refused(tmp_path):
    wider = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 128], depths=[1, 1, 1, 1])
    ResNetForImageClassification(wider).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of the backbone or has them in another shape: .*stages\.3"):
        load_backbone_weights(tiny_model(), str(tmp_path))


def test_a_damaged_configuration_is_not_taken_for_a_misspelt_name(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"The configuration of {tmp_path} cannot be read .*not a valid JSON"):
        model_class_of(str(tmp_path))
    with pytest.raises(ValueError, match=f"The configuration of {tmp_path} cannot be read .*not a valid JSON"):
        check_backbone(str(tmp_path))


def test_what_can_be_no_name_of_the_hub_is_called_so():
    with pytest.raises(FileNotFoundError, match=r"cannot be read as a name on the Hub .*Check the spelling"):
        model_class_of("outputs/run/checkpoint")


def test_a_misspelt_backbone_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"rnx is not a folder .* Check the spelling"):
        check_backbone("rnx")


@pytest.mark.parametrize("make_model", [tiny_model, tiny_baseline])
def test_a_whole_model_is_not_taken_for_a_backbone(make_model, tmp_path):
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} is a whole model .* not a backbone. Give it as --checkpoint"):
        check_backbone(str(tmp_path))


def test_default_names_of_classes_are_no_other_names():
    assert renamed_classes({0: "LABEL_0", 1: "LABEL_1"}, OTHER_LABELS) == []
    assert len(renamed_classes({0: "LABEL_0", 1: "street"}, OTHER_LABELS)) == 2


def test_a_semantic_image_processor_fuses_every_class_and_others_what_is_known_as_stuff():
    things = replace(OTHER_LABELS, thing_ids=(1,))
    fused = {
        (labels.thing_ids, task): image_processor_for(labels, 16, task=task).label_ids_to_fuse
        for labels in (OTHER_LABELS, things)
        for task in ("semantic", "panoptic")
    }
    assert fused == {
        ((), "semantic"): [0, 1],
        ((), "panoptic"): [],
        ((1,), "semantic"): [0],
        ((1,), "panoptic"): [0],
    }
    assert image_processor_for(OTHER_LABELS, 16).num_labels == 2


def test_a_task_that_the_model_does_not_do_is_refused_with_the_image_processor():
    with pytest.raises(ValueError, match="A per-pixel baseline has no segments"):
        image_processor_for(OTHER_LABELS, 16, model=tiny_baseline(), task="panoptic")


def test_save_strategy_best_takes_the_main_figure_and_a_given_one_stays(tmp_path):
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
    assert MaskFormerTrainingArguments(**arguments(tmp_path, **options)).metric_for_best_model == "mean_iou"
    options["metric_for_best_model"] = "mean_accuracy"
    assert MaskFormerTrainingArguments(**arguments(tmp_path, **options)).metric_for_best_model == "mean_accuracy"


def test_the_loss_comes_with_the_outputs_if_asked_for(tmp_path):
    trainer = our_trainer(tmp_path)
    batch = trainer.data_collator([SCENES[0]])
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    assert torch.equal(loss, outputs.loss)


def test_batches_that_are_torn_apart_for_several_gpus_have_losses_of_their_own(tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path)
    batches = [trainer.data_collator([SCENES[0]])]
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) is not None
    monkeypatch.setattr(MaskFormerTrainingArguments, "n_gpu", 2, raising=False)
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) is None


def test_terms_of_several_gpus_are_averaged():
    terms = LossTerms()
    for both in ([1.0, 3.0], [2.0, 6.0]):  # as DataParallel gives them
        terms.add({"loss_mask": torch.tensor(both)}, 0.5, step=0)
    assert terms.take_means(1, Accelerator(cpu=True)) == {"loss_mask": 3.0}
