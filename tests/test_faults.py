"""What ends a training, and what it leaves behind."""

import errno
import math
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from test_training import SCENES, our_trainer
from transformers import TrainerState

from hf_maskformer import MaskFormerForInstanceSegmentation
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.generated_scenes import write_generated_scenes
from hf_maskformer.data.workers import dead_workers_named
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.training.checkpoints import is_complete, removed_if_incomplete
from hf_maskformer.training.starting_point import image_processor_for


class DyingScenes:
    """Samples of which the last kills the process that reads it."""

    labels = SCENES.labels

    def __len__(self):
        return len(SCENES)

    def __getitem__(self, index):
        if index == len(self) - 1:
            assert torch.utils.data.get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return SCENES[index]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def assert_goes_on(folder, **options):
    trainer = our_trainer(folder, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def train_until_death(folder):
    our_trainer(
        folder,
        DyingScenes(),
        max_steps=4,
        save_steps=1,
        per_device_train_batch_size=1,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=1,
        train_sampling_strategy="sequential",
    ).train()


def evaluate_until_death(folder):
    processor = image_processor_for(SCENES.labels, image_size=64)
    evaluate(our_trainer(folder).model, processor, DyingScenes(), num_workers=1)


def write_error(run, folder):
    try:
        run(folder)
    except ChildProcessError as error:
        try:
            (folder / "error").write_text(str(error))
        except RuntimeError:  # torch's own report of the death, which comes with a signal and interrupts anything, once
            (folder / "error").write_text(str(error))


def error_of(run, folder):
    # In a process of its own: torch may report a dead worker again at any later time.
    process = multiprocessing.get_context("spawn").Process(target=write_error, args=(run, folder))
    process.start()
    process.join()
    return (folder / "error").read_text()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_death_is_named_that_something_else_took_for_an_error_of_its_own(num_workers):
    def parse():
        try:
            raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")  # by torch, on a signal
        except RuntimeError as error:
            raise ValueError("a field has a wrong value") from error

    expected = (ChildProcessError, "died .DataLoader worker .pid 3.") if num_workers else (ValueError, "a field")
    with pytest.raises(expected[0], match=expected[1]), dead_workers_named(num_workers):
        parse()


def test_a_worker_that_dies_ends_the_training_with_what_to_do(tmp_path):
    error = error_of(train_until_death, tmp_path)
    assert error.startswith("One of the 1 data-loading workers died")
    assert "dataloader_num_workers" in error
    assert checkpoints(tmp_path)
    assert_goes_on(tmp_path)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_evaluation_too(tmp_path):
    assert error_of(evaluate_until_death, tmp_path).startswith("One of the 1 data-loading workers died")


@pytest.mark.parametrize("part", ["model", "optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, part):
    def full(path):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(b"{")  # what still found room
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = our_trainer(tmp_path, max_steps=4, save_steps=1)
    owner, name, place = {
        "model": (MaskFormerForInstanceSegmentation, "save_pretrained", "model.safetensors"),
        "optimizer": (torch, "save", ""),
        "state": (TrainerState, "save_to_json", ""),
    }[part]
    save = getattr(owner, name)

    def limited(value, path, **options):
        return full(Path(path) / place) if "checkpoint-2" in str(path) else save(value, path, **options)

    monkeypatch.setattr(owner, name, limited)
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written .*No space left.*checkpoint-1 is complete"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    monkeypatch.undo()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("error", [OSError, SafetensorError, RuntimeError])
def test_a_disk_that_is_full_at_the_end_is_named_with_the_way_on(tmp_path, monkeypatch, error):
    trainer = our_trainer(tmp_path, max_steps=2, save_steps=1)
    trainer.train()

    def full(*args, **options):
        raise error("PytorchStreamWriter failed: No space left on device")

    monkeypatch.setattr(MaskFormerForInstanceSegmentation, "save_pretrained", full)
    with pytest.raises(OSError, match=r"written to .*final \(.*No space left.*checkpoint-2 is complete: resume"):
        trainer.save_model(str(tmp_path / "final"))


def test_what_is_no_matter_of_the_disk_is_not_said_to_be(tmp_path, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskFormerForInstanceSegmentation, "save_pretrained", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        our_trainer(tmp_path, max_steps=1).save_model()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before_it(small_disk):
    trainer = our_trainer(small_disk, max_steps=9, save_steps=1)
    with pytest.raises(OSError, match=r"checkpoint-\d cannot be written .*checkpoint-\d is complete"):
        trainer.train()
    assert checkpoints(small_disk)
    for name in checkpoints(small_disk):
        MaskFormerForInstanceSegmentation.from_pretrained(small_disk / name)
        torch.load(small_disk / name / "optimizer.pt")


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # the last file of a checkpoint
    assert_goes_on(tmp_path)


@pytest.mark.filterwarnings("ignore:The .* cost of the matching is not finite")
def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=4, save_steps=1, save_total_limit=1)
    step = trainer.training_step

    def diverging(*args, **kwargs):
        if trainer.state.global_step == 2:
            trainer.model.class_predictor.weight.data[0, 0] = math.nan
        return step(*args, **kwargs)

    trainer.training_step = diverging
    with pytest.raises(
        ValueError,
        match=r"is not finite in step 3, .* not saved\. Start a new run from .*checkpoint-2 .*lower learning_rate",
    ):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    weights = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_a_weight_that_is_not_finite_is_not_written(tmp_path, value):
    trainer = our_trainer(tmp_path)
    trainer.model.class_predictor.bias.data[0] = value
    with pytest.raises(ValueError, match=r"class_predictor\.bias is not finite in step 0, so the model is not saved"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def damage(root, fault):
    """Spoils the second sample of four."""
    image, label_map = root / "images/train/scene_00001.png", root / "annotations/train/scene_00001.png"
    if fault == "missing":
        image.unlink()
    elif fault == "truncated":
        image.write_bytes(image.read_bytes()[:-2000])
    elif fault == "truncated map":
        label_map.write_bytes(label_map.read_bytes()[:-40])
    elif fault == "size":
        Image.open(label_map).resize((32, 32), Image.Resampling.NEAREST).save(label_map)
    elif fault == "label":
        Image.fromarray(np.full((64, 64), 77, dtype=np.uint8)).save(label_map)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"images/train/scene_00001\.png cannot be read"),
        ("truncated", r"images/train/scene_00001\.png cannot be read"),
        ("truncated map", r"annotations/train/scene_00001\.png cannot be read"),
        ("size", r"annotations/train/scene_00001\.png is 32 x 32 .*scene_00001\.png is 64 x 64"),
        ("label", r"The batch of scene_00001 cannot be built: .*contains the value 77"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_that_nobody_looked_for_is_named_in_training(tmp_path, fault, message, num_workers):
    write_generated_scenes(tmp_path / "data", num_train=4, num_val=1, image_size=(64, 64))
    dataset = SegmentationFolder(tmp_path / "data", "train")
    damage(tmp_path / "data", fault)
    trainer = our_trainer(tmp_path / "run", dataset, dataloader_num_workers=num_workers)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_label_that_nobody_looked_for_is_named_in_evaluation(tmp_path):
    write_generated_scenes(tmp_path / "data", num_train=4, num_val=1, image_size=(64, 64))
    dataset = SegmentationFolder(tmp_path / "data", "train")
    damage(tmp_path / "data", "label")
    trainer = our_trainer(tmp_path / "run", dataset, per_device_eval_batch_size=1)
    with pytest.raises(ValueError, match=r"^Sample scene_00001: A reference contains label 77"):
        trainer.evaluate(dataset)


def test_what_fails_after_the_writing_of_a_checkpoint_leaves_it(tmp_path):
    our_trainer(tmp_path, max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(OSError, match="the upload failed"), removed_if_incomplete(checkpoint, str(tmp_path)):
        raise OSError("the upload failed")
    assert is_complete(checkpoint)


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_no_full_disk(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"), removed_if_incomplete(checkpoint, str(tmp_path)):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_without_a_whole_checkpoint_the_way_on_is_to_start_anew(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    with pytest.raises(OSError, match="no earlier checkpoint: start again"), removed_if_incomplete(checkpoint, None):
        raise OSError("No space left on device")
    assert not checkpoint.exists()


def test_a_checkpoint_that_is_written_anew_is_not_whole_before_its_end(tmp_path, monkeypatch):
    our_trainer(tmp_path, max_steps=1, save_steps=1).train()
    trainer = our_trainer(tmp_path, max_steps=1, save_steps=1)

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_complete(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError("no more bytes")])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error, monkeypatch):
    monkeypatch.setattr("hf_maskformer.data.workers.time.sleep", lambda seconds: None)
    message = f"One of the 2 data-loading workers died .{error}"
    with pytest.raises(ChildProcessError, match=message), dead_workers_named(2):
        raise error
    with pytest.raises(type(error), match=str(error)), dead_workers_named(0):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."),  # of a download, say
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    ],
)
def test_errors_that_a_worker_reports_itself_pass_unchanged(error):
    with pytest.raises(type(error)) as raised, dead_workers_named(2):
        raise error
    assert raised.value is error


def test_a_death_is_named_by_the_evaluation_that_met_it():
    with (
        pytest.raises(ChildProcessError, match="One of the 3 data-loading workers"),
        dead_workers_named(2),
        dead_workers_named(3),
    ):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")


def test_a_death_is_found_behind_an_error_that_came_of_its_handling():
    def parse():
        try:
            raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")
        except RuntimeError:
            {}["missing"]

    with pytest.raises(ChildProcessError, match=r"workers died .DataLoader worker .pid 3."), dead_workers_named(1):
        parse()
