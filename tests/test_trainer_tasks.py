"""The trainer on every task: its metric, its best checkpoint, its end when the loss diverges, its pictures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_per_pixel_baseline import KINDS, tiny_baseline
from test_training import SCENES, arguments, our_trainer, scenes_model
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.evaluation.compute_metrics import ComputeMetrics
from hf_maskformer.evaluation.prediction import Prediction
from hf_maskformer.evaluation.tasks import FIGURES, MAIN_FIGURES, TASKS, metric_for, reference_of
from hf_maskformer.training import pictures
from hf_maskformer.training.pictures import PictureCallback, _as_id_map, drawn_data
from hf_maskformer.training.starting_point import image_processor_for

PANOPTIC = GeneratedScenes(4, image_size=(64, 64), task="panoptic")


class InstanceScenes:
    """The things of drawn scenes as masks."""

    labels = SCENES.labels

    def __len__(self):
        return len(PANOPTIC)

    def __getitem__(self, index):
        sample = PANOPTIC[index]
        return {"image": sample["image"], "name": sample["name"], **reference_of(sample, self.labels, "instance")}


DATA = {"semantic": SCENES, "panoptic": PANOPTIC, "instance": InstanceScenes()}


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_by_the_task_decides_for_the_best_checkpoint(tmp_path, task):
    trainer = our_trainer(
        tmp_path,
        DATA[task],
        task=task,
        eval_dataset=DATA[task],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    name = f"eval_{MAIN_FIGURES[task]}"
    scores = [line[name] for line in trainer.state.log_history if name in line]
    assert len(scores) == 2
    assert trainer.state.best_metric == max(scores)
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("task", TASKS)
def test_the_weights_of_the_highest_figure_are_those_at_the_end(tmp_path, monkeypatch, task):
    figures = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr("hf_maskformer.training.trainer.evaluate", lambda *_, **__: {MAIN_FIGURES[task]: next(figures)})
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"task": task, "eval_dataset": DATA[task], "load_best_model_at_end": True, "learning_rate": 1e-2}
    trainer = our_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.state.best_metric == 0.3
    best, last = (
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / f"checkpoint-{step}").class_predictor.weight
        for step in (2, 3)
    )
    assert torch.equal(trainer.model.class_predictor.weight, best)
    assert not torch.equal(best, last)


def test_a_metric_of_another_task_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"is mean_iou, a figure of semantic .* is panoptic\. Use pq"):
        our_trainer(tmp_path, PANOPTIC, task="panoptic", eval_dataset=PANOPTIC, metric_for_best_model="mean_iou")


def test_labels_that_do_not_allow_the_task_are_named(tmp_path):
    for data in (DATA["instance"], {"semantic": SCENES, "instance": DATA["instance"]}):
        with pytest.raises(ValueError, match="has masks, which may overlap"):
            our_trainer(tmp_path, eval_dataset=data)
        with pytest.raises(ValueError, match="has masks, which may overlap"):
            our_trainer(tmp_path).evaluate(data)


def test_without_a_collator_the_image_processor_makes_the_batches(tmp_path):
    trainer = MaskFormerTrainer(
        model=scenes_model(),
        args=MaskFormerTrainingArguments(**arguments(tmp_path)),
        train_dataset=SCENES,
        processing_class=image_processor_for(SCENES.labels, image_size=64),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_losses_that_stay_nonfinite_end_training_with_step_and_terms(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=9)
    forward, calls = trainer.model.forward, []

    def diverging(**batch):
        calls.append(1)
        outputs = forward(**batch)
        # The second is not the first of three in a row.
        if len(calls) not in (1, 3):
            outputs.loss = outputs.loss + math.nan  # the gradient stays finite
            outputs.loss_dict["loss_dice"] = outputs.loss_dict["loss_dice"] * math.inf
        return outputs

    trainer.model.forward = diverging
    with pytest.raises(ValueError, match=r"3 batches in a row, the last in step 6: .*loss_dice inf.*learning_rate"):
        trainer.train()
    assert len(calls) == 6


@pytest.mark.filterwarnings("ignore:The .* cost of the matching is not finite")
def test_weights_that_became_nan_end_training_too(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=9)
    trainer.model.class_predictor.weight.data.fill_(math.nan)
    for _ in range(2):  # the second training of a trainer too
        with pytest.raises(ValueError, match=r"the last in step 3: .*loss_cross_entropy nan"):
            trainer.train()


def test_a_loss_of_your_own_is_watched_too(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=9)
    trainer.compute_loss = lambda model, inputs, **_: 0 * model.class_predictor.weight.sum() + math.nan
    with pytest.raises(ValueError, match="3 batches in a row, the last in step 3"):
        trainer.train()


class Stream(IterableDataset):
    labels = SCENES.labels

    def __init__(self, data=SCENES):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(4))


class Writer:
    def __init__(self):
        self.images = {}

    def add_image(self, tag, picture, step, dataformats):
        self.images[tag, step] = picture


@pytest.mark.parametrize("task", TASKS)
def test_pictures_go_to_tensorboard_and_nowhere_else(tmp_path, task):
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = Writer()
    processor = image_processor_for(SCENES.labels, image_size=64, task=task)
    callback = PictureCallback(DATA[task], processor, board, num_pictures=2)
    model = scenes_model().train()
    state = SimpleNamespace(is_world_process_zero=True, global_step=5)
    callback.on_evaluate(None, state, None, model=model)
    assert set(board.tb_writer.images) == {("eval/scene_00000", 5), ("eval/scene_00001", 5)}
    assert all(picture.ndim == 3 and picture.std() > 0 for picture in board.tb_writer.images.values())
    assert model.training
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("eval_dataset", [{}, {"stream": Stream()}])
def test_data_of_which_no_sample_can_be_picked_has_no_pictures(tmp_path, eval_dataset):
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    trainer = MaskFormerTrainer(
        model=scenes_model(),
        args=MaskFormerTrainingArguments(**arguments(tmp_path)),
        train_dataset=SCENES,
        eval_dataset=eval_dataset,
        processing_class=image_processor_for(SCENES.labels, image_size=64),
        callbacks=[board],
    )
    assert not any(isinstance(each, PictureCallback) for each in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_process_without_all_weights_draws_nothing(sharding):
    trainer = SimpleNamespace(eval_dataset=SCENES, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    assert drawn_data(trainer) is SCENES
    setattr(trainer, sharding, True)
    assert drawn_data(trainer) is None


def test_the_smallest_of_overlapping_objects_is_drawn_on_top():
    large, small = np.ones((2, 3), dtype=bool), np.array([[0, 1, 0], [0, 0, 0]], dtype=bool)
    for masks, number in (([large, small], 2), ([small, large], 1)):
        truth = _as_id_map({"masks": np.array(masks), "labels": [0, 0]}, (2, 3))
        assert truth["segmentation"].tolist() == [[3 - number, number, 3 - number], [3 - number] * 3]


def test_tensorboard_reads_the_pictures_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 1, "num_pictures": 2}
    our_trainer(tmp_path, **options).train()
    [path] = tmp_path.rglob("events.out.*")
    events = accumulator.EventAccumulator(str(path)).Reload()
    assert events.Tags()["images"] == ["eval/scene_00000", "eval/scene_00001"]
    assert [picture.step for picture in events.Images("eval/scene_00000")] == [1, 2]


def plain_trainer(tmp_path, task, dataset, kind=Trainer, target_format="segment_map", model=None):
    processor = image_processor_for(SCENES.labels, image_size=64, task=task)
    metrics = ComputeMetrics(processor, SCENES.labels)
    options = {"batch_eval_metrics": True, "remove_unused_columns": False, "per_device_eval_batch_size": 3}
    return kind(
        model=model or scenes_model(),
        args=TrainingArguments(**arguments(tmp_path, **options)),
        eval_dataset=dataset,
        data_collator=MaskFormerDataCollator(processor, target_format=target_format),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.logits,
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_plain_trainer_takes_ready_made_metrics(tmp_path, task):
    trainer = plain_trainer(tmp_path, task, DATA[task])
    theirs = trainer.evaluate()
    ours = our_trainer(tmp_path, task=task, model=trainer.model, eval_dataset=DATA[task]).evaluate()
    # Scenes need no resizing, so that both count the same pixels.
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, abs=1e-6), name


class PerfectTrainer(Trainer):
    """Predicts what the labels say."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        labels = inputs["mask_labels"], inputs["class_labels"]
        num_queries, num_labels = labels[1].shape[1], self.model.config.num_labels
        class_logits = torch.nn.functional.one_hot(labels[1].where(labels[1] >= 0, num_labels), num_labels + 1)
        mask_logits = torch.full((len(labels[1]), num_queries, 64, 64), -50.0)
        for image, masks in zip(mask_logits, labels[0], strict=True):
            masks = masks if masks.ndim == 3 else masks == torch.arange(num_queries)[:, None, None]
            image[: len(masks)][masks] = 50.0
        return None, (class_logits * 50.0, mask_logits), labels


@pytest.mark.parametrize(
    ("data", "task", "target_format"),
    [*((task, task, "segment_map") for task in TASKS), ("panoptic", "instance", "masks")],
)
def test_ready_made_metrics_see_all_that_the_plain_trainer_was_given(tmp_path, data, task, target_format):
    # Of the data the last batch is smaller, and has more segments than images.
    trainer = plain_trainer(tmp_path, task, DATA[data], PerfectTrainer, target_format)
    assert trainer.evaluate()[f"eval_{MAIN_FIGURES[task]}"] == pytest.approx(1.0)
    trainer.preprocess_logits_for_metrics = None  # nor is anything left of what it saw before
    if isinstance(trainer.data_collator([DATA[data][0]])["mask_labels"], list):
        with pytest.raises(ValueError, match=r"has 1 masks, but \d labels\. .* preprocess_logits_for_metrics=metrics"):
            trainer.evaluate()


def test_ready_made_metrics_refuse_lists_of_masks_on_several_processes(monkeypatch):
    metrics = ComputeMetrics(image_processor_for(SCENES.labels, 64), SCENES.labels, "instance")
    outputs = torch.zeros(1, 2, 9), torch.zeros(1, 2, 16, 16)
    labels = [torch.ones(2, 64, 64, dtype=torch.bool)], torch.tensor([[0, 1]])
    metrics.logits(outputs, labels)
    state = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("hf_maskformer.evaluation.compute_metrics.PartialState", lambda: state)
    metrics.logits(outputs, (torch.zeros(1, 64, 64), labels[1]))
    with pytest.raises(ValueError, match="in one process, or with MaskFormerTrainer"):
        metrics.logits(outputs, labels)


@pytest.mark.parametrize("data", ["instance", "panoptic"])
@pytest.mark.parametrize("config", [None, {"dispatch_batches": False}])
def test_the_plain_trainer_loses_no_mask_of_a_stream_without_a_word(tmp_path, config, data):
    trainer = Trainer(
        model=scenes_model(),
        args=TrainingArguments(**arguments(tmp_path, remove_unused_columns=False, accelerator_config=config)),
        train_dataset=Stream(DATA[data]),
        data_collator=MaskFormerDataCollator(image_processor_for(SCENES.labels, 64, task=data), target_format="masks"),
    )
    if config is None:
        with pytest.raises(ValueError, match=r"Image 0 has 2 masks, but \d labels\. .* dispatch_batches=False"):
            trainer.train()
    else:
        trainer.train()


@pytest.mark.parametrize("decoder_config", KINDS)
def test_the_plain_trainer_takes_ready_made_metrics_of_a_per_pixel_baseline(tmp_path, decoder_config):
    model = tiny_baseline(decoder_config, id2label=SCENES.labels.id2label)
    trainer = plain_trainer(tmp_path, "semantic", SCENES, target_format="label_map", model=model)
    theirs, ours = trainer.evaluate(), our_trainer(tmp_path, model=trainer.model, eval_dataset=SCENES).evaluate()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, abs=1e-6), name
    trainer.compute_metrics = ComputeMetrics(image_processor_for(SCENES.labels, 64), SCENES.labels, "panoptic")
    with pytest.raises(ValueError, match="baseline has no segments, so its task is semantic, not panoptic"):
        trainer.evaluate()


def test_ready_made_metrics_say_what_trainer_and_task_must_be():
    processor = image_processor_for(SCENES.labels, 64)
    with pytest.raises(ValueError, match="Set batch_eval_metrics=True"):
        ComputeMetrics(processor, SCENES.labels)(EvalPrediction(predictions=(), label_ids=()))
    with pytest.raises(ValueError, match="task is 'boxes'; it must be one of semantic, instance, panoptic"):
        ComputeMetrics(processor, SCENES.labels, "boxes")


@pytest.mark.parametrize("task", TASKS)
def test_ready_made_metrics_read_the_collators_targets(task):
    """A prediction that is its own reference is perfect, so that targets, ids and labels agree."""
    metrics = ComputeMetrics(image_processor_for(SCENES.labels, 64), SCENES.labels, task)
    batch = MaskFormerDataCollator(metrics._image_processor)([DATA[task][0], DATA[task][1]])
    metric = metric_for(task, SCENES.labels)
    for index, (masks, classes) in enumerate(zip(batch["mask_labels"], batch["class_labels"], strict=True)):
        reference = metrics._reference(masks, classes)
        truth = reference_of(DATA[task][index], SCENES.labels, task)
        prediction = truth if task != "instance" else {**truth, "scores": np.ones(len(truth["labels"]))}
        metric.add(prediction=prediction, reference=reference)
    figures = metric.compute()
    assert figures[MAIN_FIGURES[task]] == pytest.approx(1.0)
    assert {name for name in figures if not name.startswith("per_category")} == set(FIGURES[task])


@pytest.mark.parametrize("void", [None, 255, -100])  # as a baseline's labels say it, None for a MaskFormer
def test_void_counts_for_nothing_in_ready_made_metrics(void):
    metrics = ComputeMetrics(image_processor_for(SCENES.labels, 32), SCENES.labels)
    index_map = torch.zeros(1, 32, 32, dtype=torch.int32)
    index_map[:, 16:] = -1
    num_labels = SCENES.labels.num_labels
    if void is not None:
        logits = torch.zeros(1, num_labels, 8, 8)
        logits[:, 0] = 5.0
        given = EvalPrediction(predictions=logits, label_ids=index_map.long().masked_fill(index_map < 0, void))
    else:
        class_logits = torch.zeros(1, 1, num_labels + 1)
        class_logits[..., 0] = 9.0
        logits = class_logits, torch.full((1, 1, 8, 8), 5.0)
        given = EvalPrediction(predictions=logits, label_ids=(index_map, torch.tensor([[0, 1, -100]])))
    figures = metrics(given, compute_result=True)
    assert figures["mean_iou"] == figures["overall_accuracy"] == 1


def test_ready_made_metrics_take_what_trainer_gives_without_preprocessing():
    metrics = ComputeMetrics(image_processor_for(SCENES.labels, 64), SCENES.labels)
    batch = MaskFormerDataCollator(metrics._image_processor)([SCENES[0], SCENES[1]])
    logits, figures = (torch.randn(2, 5, 9), torch.randn(2, 5, 16, 16)), []
    targets = (batch["mask_labels"], batch["class_labels"])
    for predictions in (logits, list(logits), (*logits, torch.randn(2, 5, 9))):
        figures.append(metrics(EvalPrediction(predictions=predictions, label_ids=targets), compute_result=True))
    assert figures[0] == figures[1] == figures[2]


class Board(TensorBoardCallback):
    """TensorBoard, which need not be installed, as far as pictures go."""

    def __init__(self):
        self.tb_writer = Writer()

    def on_train_begin(self, *args, **kwargs):
        pass

    on_log = on_train_end = on_train_begin


def trainer_with_board(tmp_path, eval_dataset, **options):
    board = Board()
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, **options}
    trainer = MaskFormerTrainer(
        model=scenes_model(),
        args=MaskFormerTrainingArguments(**arguments(tmp_path, **options)),
        train_dataset=SCENES,
        eval_dataset=eval_dataset,
        processing_class=image_processor_for(SCENES.labels, image_size=64),
        callbacks=[board],
    )
    return trainer, board.tb_writer.images


@pytest.mark.parametrize("data", ["one", "several", "stream"])
def test_an_evaluation_shows_the_samples_of_the_first_data_set_if_it_has_a_length(tmp_path, data):
    eval_dataset = {"one": SCENES, "several": {"a": SCENES, "b": SCENES}, "stream": Stream()}[data]
    trainer, images = trainer_with_board(tmp_path, eval_dataset, num_pictures=9)
    trainer.train()
    assert set(images) == (set() if data == "stream" else {(f"eval/scene_0000{i}", 1) for i in range(4)})


def test_no_pictures_are_drawn_where_none_are_wanted_or_by_other_processes_than_the_first(tmp_path):
    trainer, images = trainer_with_board(tmp_path, SCENES, num_pictures=0)
    trainer.train()
    assert images == {}
    board = Board()
    callback = PictureCallback(SCENES, image_processor_for(SCENES.labels, image_size=64), board, num_pictures=1)
    callback.on_evaluate(None, SimpleNamespace(is_world_process_zero=False, global_step=5), None, model=scenes_model())
    assert board.tb_writer.images == {}
    board.tb_writer = None  # before the training begins
    callback.on_evaluate(None, SimpleNamespace(is_world_process_zero=True, global_step=0), None, model=scenes_model())


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_legend_names_what_truth_or_prediction_has(task, monkeypatch):
    labels = LabelSet({label: f"class {label}" for label in range(4)}, ignore_index=200)
    truth = np.array([[0, 1], [200, 0]], dtype=np.uint8).repeat(32, axis=0).repeat(32, axis=1)
    sample = {"image": Image.new("RGB", (64, 64)), "segmentation_map": truth, "name": "a"}
    if task == "panoptic":
        sample |= {"segmentation_map": truth.astype(np.int32) % 199, "instance_id_to_semantic_id": {0: 0, 1: 1}}
    segments = [] if task == "semantic" else [{"id": 1, "label_id": 3, "score": 1.0}]
    predicted = Prediction(np.full((64, 64), 3 if task == "semantic" else 1), segments)
    monkeypatch.setattr(pictures, "predict", lambda *_: predicted)
    shown = []
    monkeypatch.setattr(pictures, "draw_comparison", lambda *args: shown.append(args))
    pictures.picture_of(None, image_processor_for(labels, image_size=64, task=task), sample, labels)
    ((image, panels, legend),) = shown
    assert image is sample["image"]
    assert [name for name, _ in legend] == ["class 0", "class 1", "class 3"]
    assert [title for title, _ in panels] == ["ground truth", "prediction"]
    colours = [
        len(set(panel.get_flattened_data() if hasattr(panel, "get_flattened_data") else panel.getdata()))
        for _, panel in panels
    ]
    assert colours[0] > colours[1]  # three regions and one


def test_objects_keep_their_classes_in_pictures():
    masks = np.zeros((2, 2, 3), dtype=bool)
    masks[0, 0], masks[1, 1] = True, True
    truth = _as_id_map({"masks": masks, "labels": [5, 3]}, (2, 3))
    assert truth["segmentation"].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert truth["segments_info"] == [{"id": 1, "label_id": 5}, {"id": 2, "label_id": 3}]


def test_losses_that_are_not_finite_are_let_pass_if_told_so(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=5, max_nonfinite_losses=0)
    forward = trainer.model.forward

    def diverging(**batch):
        outputs = forward(**batch)
        outputs.loss = outputs.loss + math.nan if trainer.state.global_step else outputs.loss
        return outputs

    trainer.model.forward = diverging
    trainer.train()
    assert trainer.state.global_step == 5
