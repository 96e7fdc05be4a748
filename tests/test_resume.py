"""A training that is ended at any moment and started again gives the model of an undisturbed one."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_config
from test_training import SCENES, arguments, our_trainer
from torch.utils.data import IterableDataset
from transformers import DetrConfig, TrainerCallback, TrainerState

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset, AugmentedStream
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.training.starting_point import image_processor_for

MAX_STEPS = 24
NINE = GeneratedScenes(9, image_size=(64, 64))


class Stream(IterableDataset):
    labels = NINE.labels

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        order = random.Random(self.epoch).sample(range(9), 9)
        return (NINE[index] for index in order)

    def set_epoch(self, epoch):
        self.epoch = epoch


def trainer_with_chance(folder, is_stream, **options):
    """Where everything that can be random is: the order of samples, their augmentation, dropout, points of the loss."""
    torch.manual_seed(1)
    decoder = DetrConfig(
        d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, num_queries=6, dropout=0.1
    )
    config = tiny_config(
        decoder_config=decoder, id2label=NINE.labels.id2label, freeze_batch_norm=False, train_num_points=64
    )
    augmentation = RandomScaleCropFlip.from_scales(64, 0.5, 2.0)
    options = {"per_device_train_batch_size": 2, "save_steps": 3, "save_total_limit": 2, **options}
    if is_stream:  # five batches, of which four make two steps
        options = {"gradient_accumulation_steps": 2, **options}
    processor = image_processor_for(NINE.labels, image_size=64)
    return MaskFormerTrainer(
        model=MaskFormerForInstanceSegmentation(config),
        args=MaskFormerTrainingArguments(**arguments(folder, **{"max_steps": MAX_STEPS, **options})),
        train_dataset=AugmentedStream(Stream(), augmentation) if is_stream else AugmentedDataset(NINE, augmentation),
        eval_dataset=SCENES,
        data_collator=MaskFormerDataCollator(processor, do_resize=False),
        processing_class=processor,
    )


class Signal(TrainerCallback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, number, steps_from_here):
        self.number, self.steps_left = number, steps_from_here

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps_left -= 1
        if self.steps_left == 0:
            os.kill(os.getpid(), self.number)


def kill_when_opening(folder, which):
    """Kills this process when it opens a file under `folder` for the given time: within a checkpoint."""
    num_opened = 0

    def hook(event, values):
        nonlocal num_opened
        if event == "open" and str(values[0]).startswith(f"{folder}/checkpoint-"):
            num_opened += 1
            if num_opened == which:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(folder, is_stream, kind, when):
    torch.set_num_threads(1)
    trainer = trainer_with_chance(folder, is_stream)
    if kind == "file":
        kill_when_opening(folder, when)
    elif kind is not None:
        trainer.add_callback(Signal(kind, when))
    trainer.train(resume_from_checkpoint="auto")
    torch.save(trainer.model.state_dict(), folder / "weights.pt")
    trainer.state.save_to_json(folder / "state.json")


def run_in_a_process(folder, is_stream, kind=None, when=0):
    context = multiprocessing.get_context("forkserver")  # imports once for all
    context.set_forkserver_preload(["test_resume"])
    process = context.Process(target=run, args=(folder, is_stream, kind, when))
    process.start()
    process.join()
    return process.exitcode


def losses(state):
    return {line["step"]: line["loss"] for line in state.log_history if "loss" in line}


def steps_saved(folder):
    return [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]


@pytest.mark.slow
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_run_that_is_ended_a_dozen_times_gives_the_undisturbed_model(tmp_path, is_stream):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert run_in_a_process(whole, is_stream) == 0
    draw = random.Random(4 + is_stream)
    kinds = 4 * [signal.SIGKILL, signal.SIGTERM, "file"]
    for kind in draw.sample(kinds, len(kinds)):
        # Mostly short of the next checkpoint, so that a dozen fit into the run.
        when = draw.randint(1, 12) if kind == "file" else draw.randint(1, 3)
        before = max(steps_saved(ended), default=0)
        code = run_in_a_process(ended, is_stream, kind, when)
        if kind == signal.SIGTERM:
            assert code == 75
            assert max(steps_saved(ended)) == before + when or before + when > MAX_STEPS
        else:
            assert code == -signal.SIGKILL
    assert not (ended / "weights.pt").exists()
    assert run_in_a_process(ended, is_stream) == 0

    expected, found = (losses(TrainerState.load_from_json(folder / "state.json")) for folder in (whole, ended))
    assert list(found) == list(expected) == list(range(1, MAX_STEPS + 1))
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6)
    expected, found = (torch.load(folder / "weights.pt") for folder in (whole, ended))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("is_stream", [False, True])
def test_sigterm_ends_a_run_with_a_checkpoint_from_which_it_goes_on_as_if_undisturbed(tmp_path, is_stream):
    weights = []
    options = {"max_steps": 7, "save_strategy": "no", "eval_strategy": "epoch"}
    for steps in (0, 5):  # in the third epoch
        trainer = trainer_with_chance(tmp_path, is_stream, **options)
        if steps:
            trainer.add_callback(Signal(signal.SIGTERM, steps))
            handler = signal.getsignal(signal.SIGTERM)
            with pytest.raises(SystemExit) as ended:
                trainer.train()
            assert ended.value.code == 75
            assert signal.getsignal(signal.SIGTERM) == handler
            assert [line["step"] for line in trainer.state.log_history if "eval_mean_iou" in line][-1:] != [5]
            assert steps_saved(tmp_path) == [5]
            trainer = trainer_with_chance(tmp_path, is_stream, **options)
        trainer.train(resume_from_checkpoint="auto")
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_stream_is_another_in_each_pass_and_its_rest_is_left_out(tmp_path):
    trainer = trainer_with_chance(tmp_path, is_stream=True, max_steps=6, save_strategy="no")
    seen, num_batches = [], 0
    step = trainer.training_step

    def counted(*args, **kwargs):
        nonlocal num_batches
        num_batches += 1
        return step(*args, **kwargs)

    trainer.training_step = counted
    stream = trainer.train_dataset.dataset
    stream.set_epoch = lambda epoch: (seen.append(epoch), setattr(stream, "epoch", epoch))
    trainer.train()
    assert list(dict.fromkeys(seen)) == [0, 1, 2]
    assert num_batches == 6 * 2


def test_a_training_gives_sigterm_back_to_whom_it_belonged(tmp_path):
    before = signal.signal(signal.SIGTERM, handler := lambda *arguments: None)
    try:
        our_trainer(tmp_path, max_steps=1).train()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_within_an_evaluation_gives_it_up(tmp_path):
    read = []

    class Interrupting:
        labels = SCENES.labels

        def __len__(self):
            return len(SCENES)

        def __getitem__(self, index):
            read.append(index)
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return SCENES[index]

    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1, "save_strategy": "no"}
    trainer = our_trainer(tmp_path, eval_dataset=Interrupting(), max_steps=3, **options)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 75
    assert read == [0, 0, 1]  # the first one when the trainer was made too
    assert steps_saved(tmp_path) == [1]
    assert not any("eval_mean_iou" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("due", [{"eval_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "epoch"}])
def test_sigterm_leaves_out_the_evaluation_that_is_due(tmp_path, due):
    read = []

    class Counted:
        labels = SCENES.labels

        def __len__(self):
            return len(SCENES)

        def __getitem__(self, index):
            read.append(index)
            return SCENES[index]

    trainer = our_trainer(tmp_path, eval_dataset=Counted(), max_steps=3, save_strategy="no", **due)
    trainer.add_callback(Signal(signal.SIGTERM, 2))
    read.clear()
    with pytest.raises(SystemExit):
        trainer.train()
    assert read == []
    assert steps_saved(tmp_path) == [2]


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_script_ends_on_sigterm_with_its_own_exit_code(tmp_path, num_workers):
    """The signal goes to the workers too, as a scheduler sends it."""
    scripts = Path(__file__).parents[1] / "scripts"
    write = "from hf_maskformer.data.generated_scenes import write_generated_scenes as write; import sys; "
    write += "write(sys.argv[1], num_train=4, num_val=2, image_size=(64, 64))"
    subprocess.run([sys.executable, "-c", write, tmp_path / "data"], check=True)
    tiny_config(freeze_batch_norm=False).save_pretrained(tmp_path / "config")
    command = [sys.executable, scripts / "train.py", f"--config={tmp_path / 'config'}", f"--data={tmp_path / 'data'}"]
    command += [f"--output_dir={tmp_path / 'run'}", "--image_size=64", "--max_steps=100000", "--save_strategy=no"]
    command += ["--logging_steps=1", "--use_cpu=true", "--report_to=none", f"--dataloader_num_workers={num_workers}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors[-2000:]
    assert "SIGTERM ended training after step" in errors
    assert len(steps_saved(tmp_path / "run")) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_of_which_a_file_is_cut_off_is_never_taken(tmp_path, file):
    our_trainer(tmp_path, max_steps=3, save_steps=1).train()
    path = tmp_path / "checkpoint-3" / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a complete checkpoint.*checkpoint-2 is complete"):
        our_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer = our_trainer(tmp_path, max_steps=4, save_steps=4)
    steps = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (steps.append(trainer.state.global_step), step(*args, **kwargs))[1]
    trainer.train(resume_from_checkpoint="auto")
    assert steps == [2, 3]


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-9 does not exist\. Name a folder checkpoint-N"):
        our_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_auto_starts_anew_where_there_is_no_checkpoint(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1


def test_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    trainer = our_trainer(tmp_path / "run")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OSError, match=r"output_dir .*run is not writable .*Nothing was trained"):
        trainer.train()


def test_output_on_a_read_only_disk_is_refused_before_training(tmp_path):
    options = ["-t", "tmpfs", "-o", "size=1m,ro", "tmpfs"]
    trainer = our_trainer(tmp_path / "run")
    if subprocess.run(["mount", *options, tmp_path / "run"], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        with pytest.raises(OSError, match=r"Read-only file system.*Nothing was trained"):
            trainer.train()
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)


def test_full_determinism_gives_equal_bits(tmp_path):
    runs = []
    try:
        for _ in range(2):
            trainer = trainer_with_chance(tmp_path, False, max_steps=6, save_strategy="no", full_determinism=True)
            assert torch.are_deterministic_algorithms_enabled()
            trainer.train()
            runs.append((losses(trainer.state), trainer.model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], tensor) for name, tensor in runs[0][1].items())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_run_that_was_complete_stays_as_it_is(tmp_path, is_stream):
    options = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}  # in the middle of an epoch
    trainer = trainer_with_chance(tmp_path, is_stream, **options)
    trainer.train()
    again = trainer_with_chance(tmp_path, is_stream, **options)
    again.train(resume_from_checkpoint="auto")
    assert (again.first_step, again.state.global_step) == (3, 3)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_run_that_is_made_longer_gives_the_model_of_the_longer_run(tmp_path, is_stream):
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = trainer_with_chance(tmp_path / "whole", is_stream, max_steps=7, **options)
    whole.train()
    trainer_with_chance(tmp_path, is_stream, max_steps=3, **options).train()  # to the middle of the second pass
    trainer = trainer_with_chance(tmp_path, is_stream, max_steps=7, **options)
    trainer.train(resume_from_checkpoint="auto")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("in_evaluation", [False, True])
def test_a_trainer_that_was_ended_evaluates_all_samples(tmp_path, in_evaluation):
    class Interrupting:
        labels, signals = SCENES.labels, []

        def __len__(self):
            return len(SCENES)

        def __getitem__(self, index):
            while self.signals:
                os.kill(os.getpid(), self.signals.pop())
            return SCENES[index]

    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Interrupting()} if in_evaluation else {}
    trainer = our_trainer(tmp_path, max_steps=3, per_device_eval_batch_size=1, **options)
    if in_evaluation:
        Interrupting.signals.append(signal.SIGTERM)
    else:
        trainer.add_callback(Signal(signal.SIGTERM, 1))
    with pytest.raises(SystemExit):
        trainer.train()
    expected = evaluate(trainer.model, trainer.processing_class, SCENES)["mean_iou"]
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(expected)


def test_a_checkpoint_is_whole_once_all_processes_have_written_their_parts(tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path, max_steps=1, save_steps=1)
    written = []
    monkeypatch.setattr(
        trainer.accelerator,
        "wait_for_everyone",
        lambda: written.append({path.name for path in tmp_path.glob("checkpoint-1/*")}),
    )
    trainer.train()
    assert any("rng_state.pth" in names and "trainer_state.json" not in names for names in written)


def test_the_card_of_a_resumed_run_says_of_which_part_its_time_is(tmp_path):
    trainer_with_chance(tmp_path, False, max_steps=3).train()
    trainer = trainer_with_chance(tmp_path, False, max_steps=5)
    trainer.train(resume_from_checkpoint="auto")
    trainer.create_model_card()
    assert "The last part of the training, after step 3, took 0:0" in (tmp_path / "README.md").read_text()
    trainer = trainer_with_chance(tmp_path, False, max_steps=5)
    trainer.train(resume_from_checkpoint="auto")
    trainer.create_model_card()
    assert " took " not in (tmp_path / "README.md").read_text()


def test_a_checkpoint_of_another_run_with_other_classes_is_named(tmp_path):
    trainer_with_chance(tmp_path, False, max_steps=3).train()
    trainer = trainer_with_chance(tmp_path, False, max_steps=5)
    trainer.model.config.id2label = {0: "one", 1: "two"}
    with pytest.raises(ValueError, match=r"checkpoint-3 is from another run: .* this one the 2 classes one, two"):
        trainer.train(resume_from_checkpoint="auto")


def test_a_checkpoint_of_another_optimiser_is_named(tmp_path):
    trainer_with_chance(tmp_path, False, max_steps=3).train()
    with pytest.raises(ValueError, match=r"checkpoint-3 was trained with optim=adamw_torch.*, whose state sgd cannot"):
        trainer_with_chance(tmp_path, False, max_steps=5, optim="sgd").train(resume_from_checkpoint="auto")
    for optimizer in ("adamw_torch", "adamw_torch_fused"):
        trainer = trainer_with_chance(tmp_path, False, max_steps=5, optim=optimizer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert trainer.state.global_step == 5


def test_a_checkpoint_of_transformers_trainer_is_named(tmp_path):
    trainer = trainer_with_chance(tmp_path, False, max_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / "training_args.json").write_text("[")
    trainer.train(resume_from_checkpoint="auto")  # which does not need it
    (tmp_path / "checkpoint-3" / "training_args.json").unlink()
    torch.save({}, tmp_path / "checkpoint-3" / "training_args.bin")
    with pytest.raises(ValueError, match=r"checkpoint-3 is from transformers' Trainer.* Start a new run"):
        trainer.train(resume_from_checkpoint="auto")


def test_a_stream_that_is_too_short_for_a_step_is_an_error(tmp_path):
    trainer = trainer_with_chance(tmp_path, True, gradient_accumulation_steps=8)
    with pytest.raises(ValueError, match="Nothing was trained: the stream has fewer than the 8 batches"):
        trainer.train()
    trainer_with_chance(tmp_path, True, max_steps=3).train()
    trainer = trainer_with_chance(tmp_path, True, max_steps=5, gradient_accumulation_steps=8)
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer.train(resume_from_checkpoint="auto")


def test_a_trainer_that_was_ended_can_go_on_itself(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Signal(signal.SIGTERM, 1))
    with pytest.raises(SystemExit):
        trainer.train()
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 3


def test_sigterm_within_an_evaluation_that_has_seen_no_object_yet_gives_it_up(tmp_path):
    class Interrupting:
        labels, in_training = SCENES.labels, False

        def __len__(self):
            return 2

        def __getitem__(self, index):
            if self.in_training:
                os.kill(os.getpid(), signal.SIGTERM)
            nothing = {"masks": np.zeros((0, 64, 64), dtype=bool), "labels": [], "iscrowd": []}
            return {"image": SCENES[index]["image"], "name": "sky", **nothing}

    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1, "save_strategy": "no"}
    trainer = our_trainer(tmp_path, task="instance", eval_dataset=Interrupting(), **options)
    Interrupting.in_training = True
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 75
    assert steps_saved(tmp_path) == [1]


def test_the_last_checkpoint_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        our_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_the_classes_in_another_order_is_named(tmp_path):
    trainer_with_chance(tmp_path, False, max_steps=3).train()
    trainer = trainer_with_chance(tmp_path, False, max_steps=5)
    names = list(trainer.model.config.id2label.values())
    trainer.model.config.id2label = dict(enumerate(reversed(names)))
    with pytest.raises(ValueError, match="checkpoint-3 is from another run"):
        trainer.train(resume_from_checkpoint="auto")
