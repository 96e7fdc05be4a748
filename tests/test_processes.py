"""Several processes train the model that one process would, and count every sample once."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from functools import partial
from queue import Empty

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, merge_fsdp_weights
from models import ARCHITECTURES, tiny_batch, tiny_model
from safetensors.torch import load_file
from test_loss_distribution import collate, images
from test_per_pixel_baseline import KINDS, batch_of_labels, tiny_baseline
from test_resume import Signal, kill_when_opening, trainer_with_chance
from test_trainer_tasks import InstanceScenes
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.evaluation.compute_metrics import ComputeMetrics
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.training.starting_point import image_processor_for

STEPS = 20
BATCH = 8  # images of a step, over all processes
# Two of each kind in a row, so that the halves of a batch differ in their segments; the second kind has none.
IMAGES = [image for image in images() for _ in range(2)]
FIVE = GeneratedScenes(5, image_size=(64, 64))  # evaluated: a number that no number of processes divides


def trainer_of(folder, num_processes=1, accumulation=1, train_dataset=None, **options):
    torch.manual_seed(1)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH // (num_processes * accumulation),
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        **options,
    }
    arguments = MaskFormerTrainingArguments(**arguments)
    if "ACCELERATE_USE_FSDP" in os.environ:
        # Accelerate shards on accelerators only; torch, which does it, on CPUs too.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return MaskFormerTrainer(
        model=tiny_model(id2label=FIVE.labels.id2label),  # no dropout, frozen batch norm
        args=arguments,
        train_dataset=train_dataset or IMAGES,
        eval_dataset=FIVE,
        data_collator=collate,
        processing_class=image_processor_for(FIVE.labels, image_size=64),
    )


def run_of(trainer, checkpoint=None):
    """The loss and the terms of every step, and the weights at the end."""
    trainer.train(checkpoint)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses = [line["loss"] for line in lines]
    terms = [line[name] for line in lines for name in sorted(line) if name.startswith("loss_")]
    weights = trainer.accelerator.get_state_dict(trainer.model)  # of shards on the first process only
    return losses, terms, {name: tensor.numpy() for name, tensor in weights.items()}


def replicated(folder, num_processes):
    """All at once and in two parts; then figures, and the steps of a training whose last batch is short."""
    trainer = trainer_of(folder, num_processes)
    runs = [run_of(trainer), run_of(trainer_of(folder, num_processes, accumulation=2))]
    # Ten images: the second batch is short, or some process has none.
    uneven = trainer_of(folder, num_processes, train_dataset=images() + images() + images()[:2], max_steps=4)
    uneven.train()
    return runs, trainer.evaluate(), uneven.state.global_step, plain_figures(trainer)


def plain_figures(trainer, dataset=FIVE):
    """What transformers' trainer gathers of all processes and counts with ready-made metrics."""
    metrics = ComputeMetrics(trainer.processing_class, FIVE.labels, "semantic" if dataset is FIVE else "instance")
    plain = Trainer(
        model=trainer.accelerator.unwrap_model(trainer.model),
        args=TrainingArguments(
            trainer.args.output_dir,
            batch_eval_metrics=True,
            remove_unused_columns=False,
            per_device_eval_batch_size=2,
            use_cpu=True,
            report_to="none",
        ),
        eval_dataset=dataset,
        data_collator=MaskFormerDataCollator(trainer.processing_class),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.logits,
    )
    return plain.evaluate()


def sharded(folder, num_processes):
    """Saves shards and goes on from them; how the model was cut comes along."""
    options = {"save_strategy": "steps", "save_steps": 10}
    trainer = trainer_of(folder, num_processes, **options)
    runs = [run_of(trainer)]
    units = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
    figures = trainer.evaluate()
    trainer.save_model(_internal_call=True)  # as before it is published
    trainer.save_model(str(folder / "final"))
    # From step 10 on: losses of the first steps come from the state.
    runs.append(run_of(trainer_of(folder, num_processes, **options), str(folder / "checkpoint-10")))
    runs.append(run_of(trainer_of(folder, num_processes, accumulation=2)))
    return runs, figures, units


def with_own_statistics(folder, num_processes):
    trainer = trainer_of(folder, num_processes)
    means = [buffer for name, buffer in trainer.model.named_buffers() if name.endswith("running_mean")]
    for buffer in means:
        buffer.fill_(PartialState().process_index)
    trainer.evaluate()
    return [buffer.unique().tolist() for buffer in means]


def plain_figures_of_instances(folder, num_processes):
    try:
        return plain_figures(trainer_of(folder, num_processes), InstanceScenes())
    except ValueError as error:
        return {"refused": str(error)}


class Asked(TrainerCallback):
    """The system asks this process to end, in the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder, num_processes):
    trainer = trainer_of(folder, num_processes, max_steps=5)
    if PartialState().process_index == 1:
        trainer.add_callback(Asked())
    try:
        trainer.train()
    except SystemExit as end:
        return end.code, trainer.state.global_step
    return None


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def all_architectures(folder, num_processes):
    """Names those of which a step leaves no parameter without gradient, which DDP refuses in the step after it."""
    batches = {name: tiny_batch(size=(64, 64)) for name in ARCHITECTURES}
    models = {name: make() for name, make in ARCHITECTURES.items()}
    models |= {name: tiny_baseline(kind) for name, kind in zip(("baseline", "baseline+"), KINDS, strict=True)}
    batches |= {name: batch_of_labels() for name in ("baseline", "baseline+")}
    for name, model in models.items():
        model = DistributedDataParallel(model.train(), find_unused_parameters=False)
        for _ in range(2):
            model(**batches[name]).loss.backward()
    return list(models)


def with_chance(folder, num_processes, is_stream, kind=None, rank=0, when=0):
    """Trains with augmentation, dropout and points drawn at random; ended on one process, as in `test_resume`."""
    trainer = trainer_with_chance(folder, is_stream, max_steps=12)
    if PartialState().process_index == rank and kind == "file":
        kill_when_opening(folder, when)
    elif PartialState().process_index == rank and kind is not None:
        trainer.add_callback(Signal(kind, when))
    trainer.train("auto")
    losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    return losses, {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}


class GlooOfOneThread(torch.distributed.ProcessGroupGloo):
    """One after the other, as all of its operations are begun here anyway.

    Where two threads end operations at the same instant, torch 2.13 notes the name of both in one string without a
    lock. If a name is longer than 15 letters, as when shards are gathered, both free what was there: a process that
    shards on a CPU may end with a segmentation fault. torch takes no options for gloo.
    """

    def __init__(self, store, rank, size, timeout, enable_reconfigure=False):  # the last, which is off, from torch 2.14
        options = self._Options()
        options._devices = [self.create_default_device()]
        options._timeout = timeout
        options._threads = 1
        super().__init__(store, rank, size, options)


def _run(rank, num_processes, folder, rendezvous, environment, function, queue):
    faulthandler.enable()
    torch.distributed.distributed_c10d.ProcessGroupGloo = GlooOfOneThread
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",  # Accelerate asks for it, nobody connects to it
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    torch.set_num_threads(1)
    # A rendezvous in a file: no port that another run of the tests could hold.
    store = torch.distributed.FileStore(rendezvous, num_processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    try:
        queue.put((rank, function(folder, num_processes)))
        torch.distributed.barrier()
    except Exception:
        queue.put((rank, traceback.format_exc()))
    finally:
        torch.distributed.destroy_process_group()


def run(function, num_processes, folder, **environment):
    """What the function gives on each process, in their order; None if one is killed, which ends the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_processes"])
    queue = context.Queue()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        arguments = (num_processes, folder, f"{place}/rendezvous", environment, function, queue)
        processes = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(num_processes)]
        try:
            for process in processes:
                process.start()
            results = {}
            end, error = time.monotonic() + 240, None
            while len(results) < num_processes:
                with contextlib.suppress(Empty):
                    rank, result = queue.get(timeout=0.2)
                    results[rank] = result
                    if isinstance(result, str) and error is None:
                        # Of a process that was killed, others may hear before we do.
                        end, error = time.monotonic() + 10, result
                codes = [process.exitcode for process in processes]
                if -signal.SIGKILL in codes:
                    return None
                if any(code is not None and rank not in results for rank, code in enumerate(codes)):
                    end = min(end, time.monotonic() + 10)  # what it gave, if anything, is on its way
                assert time.monotonic() < end, f"exit codes {codes}\n{error}"
            assert error is None, error
            return [results[rank] for rank in range(num_processes)]
        finally:
            for process in processes:
                process.join(timeout=10 if len(results) == num_processes else 0)
                process.kill()
                process.join()


def assert_same_run(found, expected):
    (found_losses, found_terms, found_weights), (expected_losses, expected_terms, expected_weights) = found, expected
    assert found_losses == pytest.approx(expected_losses, abs=1e-5)
    assert len(found_terms) >= 6 * len(found_losses)  # of each decoder layer
    assert found_terms == pytest.approx(expected_terms, abs=1.1e-4)  # rounded to four digits
    assert found_weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert found_weights[name] == pytest.approx(weight, abs=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("alone"))
    return run_of(trainer), trainer.evaluate()


def assert_same_figures(found, expected):
    for name in ("eval_mean_iou", "eval_overall_accuracy", "eval_frequency_weighted_iou"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("accumulation", [2, 8])
def test_one_process_trains_the_same_model_in_parts(tmp_path, alone, accumulation):
    assert_same_run(run_of(trainer_of(tmp_path, accumulation=accumulation)), alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_train_the_model_of_one(tmp_path, alone, num_processes):
    results = run(replicated, num_processes, tmp_path)
    assert len(results) == num_processes
    for runs, figures, uneven_steps, figures_of_plain_trainer in results:
        for found in runs:
            assert_same_run(found, alone[0])
        assert_same_figures(figures, alone[1])
        assert_same_figures(figures_of_plain_trainer, alone[1])
        assert uneven_steps == 4


@pytest.mark.slow
def test_the_plain_trainer_refuses_to_join_lists_of_masks_of_processes(tmp_path):
    for figures in run(plain_figures_of_instances, 2, tmp_path):
        assert "Evaluate masks that may overlap in one process" in figures["refused"]


@pytest.mark.slow
def test_statistics_of_batch_norm_are_those_of_the_first_process_in_evaluation(tmp_path):
    for means in run(with_own_statistics, 2, tmp_path):
        assert means
        assert all(mean == [0.0] for mean in means)


@pytest.mark.slow
def test_sharded_processes_train_the_model_of_one(tmp_path, alone):
    results = run(sharded, 2, tmp_path, **FSDP2)
    runs, _, units = results[0]
    for found in runs:
        assert_same_run(found, alone[0])
    for _, figures, _ in results:
        assert_same_figures(figures, alone[1])
    # Cut where it may be cut: at each layer of the decoder and each block of the backbone.
    for part in ("transformer_module.decoder.layers.0", "encoder.stages.3.layers.0"):
        assert any(name.endswith(part) for name in units), units

    expected = {name: torch.from_numpy(weight) for name, weight in runs[0][-1].items()}
    merge_fsdp_weights(str(tmp_path / "checkpoint-20/pytorch_model_fsdp_0"), str(tmp_path / "merged"))
    for folder in ("final", "merged", "."):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "final/config.json").read_text())["architectures"] == [
        "MaskFormerForInstanceSegmentation"
    ]
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "final")
    figures = evaluate(model, image_processor_for(FIVE.labels, image_size=64), FIVE)
    assert figures["mean_iou"] == pytest.approx(alone[1]["eval_mean_iou"], abs=1e-6)


@pytest.mark.slow
def test_no_architecture_has_a_parameter_that_a_step_does_not_use(tmp_path):
    assert len(run(all_architectures, 2, tmp_path)[0]) == len(ARCHITECTURES) + len(KINDS)


@pytest.mark.slow
def test_processes_of_which_one_is_asked_to_end_do_so_together(tmp_path):
    assert run(interrupted, 2, tmp_path) == [(75, 3), (75, 3)]
    assert (tmp_path / "checkpoint-3" / "rng_state_1.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("is_stream", [False, True])
def test_processes_of_which_one_is_killed_go_on_as_if_undisturbed(tmp_path, is_stream):
    whole = run(partial(with_chance, is_stream=is_stream), 2, tmp_path / "whole")
    # Before the first checkpoint, after it, and while each of them writes its part of one.
    for kind, rank, when in ((signal.SIGKILL, 0, 2), (signal.SIGKILL, 1, 5), ("file", 1, 1), ("file", 0, 4)):
        assert run(partial(with_chance, is_stream=is_stream, kind=kind, rank=rank, when=when), 2, tmp_path) is None
    assert any(tmp_path.glob("checkpoint-*"))
    ended = run(partial(with_chance, is_stream=is_stream), 2, tmp_path)
    for (found_losses, found_weights), (losses, weights) in zip(ended, whole, strict=True):
        assert list(found_losses) == list(range(1, 13))
        assert found_losses == pytest.approx(losses, abs=1e-6)
        for name, weight in weights.items():
            assert found_weights[name] == pytest.approx(weight, abs=1e-6), name
