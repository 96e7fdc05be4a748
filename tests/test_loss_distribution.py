"""The gradient does not depend on how a batch is spread over processes and gradient accumulation."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import as_mask_list, tiny_batch, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_maskformer import MaskFormerImageProcessor, MaskFormerTrainer, MaskFormerTrainingArguments
from hf_maskformer.loss_maskformer import count_items

TOLERANCE = 1e-5  # relative L2 per tensor
FLOOR = 1e-6  # of the total norm: some true gradients are zero
# Segments of each image: unequal over any way to split them, and one image has none.
NUM_SEGMENTS = (2, 0, 2, 1)


def images() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = tiny_batch(batch_size=4, size=(64, 64))
    for image, count in enumerate(NUM_SEGMENTS):
        batch["class_labels"][image, count:] = -100
        batch["mask_labels"][image][batch["mask_labels"][image] >= count] = -1
    return [{name: values[image] for name, values in batch.items()} for image in range(4)]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def seeded_model():
    torch.manual_seed(1)
    return tiny_model()  # no dropout, frozen batch norm


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_of_the_big_batch() -> dict[str, torch.Tensor]:
    model = seeded_model().train()
    model(**collate(images())).loss.backward()
    return gradients(model)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor, in units of the tolerance."""
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return max(
        float((found[name] - gradient).norm() / (TOLERANCE * gradient.norm() + FLOOR * total))
        for name, gradient in expected.items()
    )


class GradientOfTheFirstStep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = gradients(model)


def gradient_of_a_trainer(folder: Path, accumulation: int, batch_size: int, is_plain: bool = False):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    callback = GradientOfTheFirstStep()
    common = {"model": seeded_model(), "train_dataset": images(), "data_collator": collate, "callbacks": [callback]}
    if is_plain:
        trainer = Trainer(args=TrainingArguments(**options), **common)
    else:
        processor = MaskFormerImageProcessor()
        trainer = MaskFormerTrainer(args=MaskFormerTrainingArguments(**options), processing_class=processor, **common)
    trainer.train()
    return callback.gradients, trainer.state.log_history


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_big_batch(tmp_path, accumulation):
    found, logs = gradient_of_a_trainer(tmp_path, accumulation, 4 // accumulation)
    assert distance(found, gradient_of_the_big_batch()) < 1
    line = next(entry for entry in logs if "loss" in entry)
    terms = [value for name, value in line.items() if name.startswith("loss_")]
    assert sum(terms) == pytest.approx(line["loss"], rel=1e-3)
    assert line["loss"] == pytest.approx(seeded_model().train()(**collate(images())).loss.item(), rel=1e-4)


def test_the_plain_trainer_takes_the_mean_over_micro_batches(tmp_path):
    """As docs/loss.md says: each micro-batch is divided by its own numbers."""
    found, _ = gradient_of_a_trainer(tmp_path, accumulation=2, batch_size=2, is_plain=True)
    model = seeded_model().train()
    for start in (0, 2):
        (model(**collate(images()[start : start + 2])).loss / 2).backward()
    assert distance(found, gradients(model)) < 1
    assert distance(found, gradient_of_the_big_batch()) > 1000


def test_an_own_loop_gives_the_model_the_numbers_of_the_whole_batch():
    model, config = seeded_model().train(), seeded_model().config
    parts = [collate(images()[start : start + 2]) for start in (0, 2)]
    num_items = sum(
        count_items(part["class_labels"], config.decoder_config.num_queries, config.no_object_weight) for part in parts
    )
    for part in parts:
        model(**part, num_items_in_batch=num_items).loss.backward()
    assert distance(gradients(model), gradient_of_the_big_batch()) < 1


def test_what_the_losses_are_divided_by_is_counted_before_matching():
    """3 queries; 2, 5 and 0 segments: 7 masks; 2 + 3 queries match and 4 weigh a tenth."""
    labels = torch.tensor([[1, 1, -100, -100, -100], [0, 1, 2, 3, 0], [-100] * 5])
    expected = pytest.approx([7, 2 + 3 + 4 * 0.1])
    assert count_items(labels, num_queries=3, no_object_weight=0.1).tolist() == expected
    in_list_form = [row[row != -100] for row in labels]
    assert count_items(in_list_form, num_queries=3, no_object_weight=0.1).tolist() == expected


def _bare_loop(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(seeded_model().train())
    share = 4 // world_size
    # Lists of masks, whose number of images differs from that of the segments.
    batch = as_mask_list(collate(images()[rank * share : (rank + 1) * share]))
    accelerator.backward(model(**batch).loss)
    return gradients(accelerator.unwrap_model(model))


def _plain_trainer(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    return gradient_of_a_trainer(folder, accumulation=1, batch_size=4 // world_size, is_plain=True)[0]


def _our_trainer(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    return gradient_of_a_trainer(folder, accumulation=4 // world_size, batch_size=1)[0]


LOOPS = (_bare_loop, _plain_trainer, _our_trainer)


def _run_process(rank: int, world_size: int, folder: Path, queue: multiprocessing.Queue) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",  # Accelerate asks for it, nobody connects to it
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    # A rendezvous in a file: no port that another run of the tests could hold.
    store = torch.distributed.FileStore(str(folder / "rendezvous"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for loop in LOOPS:
        found = loop(rank, world_size, folder)
        queue.put({name.removeprefix("module."): gradient.numpy() for name, gradient in found.items()})
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_with_unequal_segments_give_the_gradient_of_the_big_batch(tmp_path, world_size):
    """A bare Accelerate loop, the plain Trainer, and ours with gradient accumulation, one after the other."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_run_process, args=(rank, world_size, tmp_path, queue)) for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        results = [queue.get(timeout=120) for _ in range(world_size * len(LOOPS))]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    expected = gradient_of_the_big_batch()
    for found in results:
        assert distance({name: torch.from_numpy(gradient) for name, gradient in found.items()}, expected) < 1
