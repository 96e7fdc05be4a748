import json
from pathlib import Path

import pytest
import torch
from golden import Golden
from models import NUM_LABELS, resnet_config, tiny_config, tiny_model
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.evaluation.semantic import evaluate_semantic
from hf_maskformer.hub.key_table import to_original
from hf_maskformer.training.starting_point import image_processor_for, new_model, pretrained_model
from hf_maskformer.training.trainer import parameter_groups

SCENES = GeneratedScenes(4, image_size=(64, 64))
OTHER_LABELS = LabelSet({0: "sky", 1: "road"})


def arguments(tmp_path, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, **options}
    return {"output_dir": str(tmp_path), "report_to": "none", "disable_tqdm": True, "use_cpu": True, **options}


def scenes_model(**fields):
    return tiny_model(id2label=SCENES.labels.id2label, freeze_batch_norm=False, **fields)


def our_trainer(tmp_path, dataset=SCENES, model=None, **options):
    image_processor = image_processor_for(SCENES.labels, image_size=64)
    return MaskFormerTrainer(
        model=model or scenes_model(),
        args=MaskFormerTrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=dataset,
        eval_dataset=SCENES,
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


def test_every_loss_term_is_logged_and_they_add_up(tmp_path):
    trainer = our_trainer(tmp_path)
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


def test_evaluation_counts_every_sample_once_at_its_own_size():
    model = scenes_model()
    image_processor = image_processor_for(SCENES.labels, image_size=48)
    dataset = Subset(SCENES, range(3))
    dataset.labels = SCENES.labels
    figures = [evaluate_semantic(model, image_processor, dataset, batch_size=size) for size in (1, 2)]
    assert figures[0]["mean_iou"] == pytest.approx(figures[1]["mean_iou"], abs=1e-3)
    assert model.training


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
    assert "class_predictor.weight" in caplog.text


def test_a_checkpoint_whose_classes_have_other_names_is_kept_with_a_warning(tmp_path, caplog):
    saved = tiny_model(id2label={0: "water", 1: "land"})
    saved.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="hf_maskformer.training.starting_point"):
        model = pretrained_model(str(tmp_path), OTHER_LABELS)
    assert torch.equal(model.class_predictor.weight, saved.class_predictor.weight)
    assert "class 0 was 'water' and is now 'sky'" in caplog.text


def test_the_small_configuration_is_a_model_for_any_classes():
    model = new_model(str(Path(__file__).parents[1] / "scripts" / "configs" / "small.json"), OTHER_LABELS)
    assert not model.config.freeze_batch_norm  # it is for training from scratch
    assert json.loads(json.dumps(model.config.to_dict()))["model_type"] == "maskformer"


def test_a_missing_configuration_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        new_model("nowhere.json", OTHER_LABELS)
