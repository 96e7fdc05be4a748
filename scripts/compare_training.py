"""Trains transformers' MaskFormer and this package's from scratch with the same budget, evaluating both in between.

    python scripts/compare_training.py --config scripts/configs/small.json --data DATA --minutes 30 --plot curves.png

Both start from the same random weights, read the same augmented batches, and have the same optimiser, learning rates,
matching costs and loss weights, with deep supervision if the configuration has it. They take many short turns, so that
a slow moment affects both. The budget is time or steps; its clock counts training, including data loading, but not
evaluation. Both are evaluated in the same way, by this package with each model's weights, so that the curves differ by
training alone. The --json file is updated after each evaluation.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from benchmarks.measuring import environment, synchronize
from benchmarks.models import freeze_batch_norm_of_stock, stock_of
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_maskformer import MaskFormerDataCollator, MaskFormerForInstanceSegmentation
from hf_maskformer.command_line import OptionParser, errors_as_messages
from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.data.workers import dead_workers_named
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.evaluation.tasks import MAIN_FIGURES, task_of_data
from hf_maskformer.training.parameter_groups import parameter_groups
from hf_maskformer.training.schedules import POWER, warmup
from hf_maskformer.training.starting_point import image_processor_for, new_model

TURNS_PER_EVALUATION = 10
# Settings that transformers does not have, and the values that match its behaviour.
OURS_ALONE = {"train_num_points": None, "void_in_loss": "background", "matching": "bipartite", "mask_padding": False}


@dataclass
class Arguments:
    config: str = field(metadata={"help": "Configuration of the model: a file, a folder or a Hub name."})
    data: str = field(metadata={"help": "Folder data set."})
    minutes: float | None = field(default=None, metadata={"help": "Budget of each model: minutes of training."})
    max_steps: int | None = field(default=None, metadata={"help": "Or: training steps."})
    num_evaluations: int = field(default=8, metadata={"help": "Evaluations after the initial one, evenly spaced."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="val", metadata={"help": "Split to evaluate on."})
    image_size: int = field(default=512, metadata={"help": "Shorter side at evaluation, and side of the crops."})
    batch_size: int = field(default=8, metadata={"help": "Images per batch."})
    num_workers: int = field(default=0, metadata={"help": "Data-loading workers for each model."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate after the warm-up; decays to 0 as for ADE20K."})
    backbone_learning_rate_factor: float = field(default=0.1, metadata={"help": "Factor on it for the backbone."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the rate rises from 0."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay, except for norms and embeddings."})
    max_grad_norm: float = field(default=0.01, metadata={"help": "Norm to which the full model gradient is clipped."})
    bf16: bool = field(default=False, metadata={"help": "Train and evaluate under bfloat16 autocast."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    plot: str | None = field(default=None, metadata={"help": "File to plot the curves to (matplotlib)."})

    def __post_init__(self) -> None:
        budgets = [budget for budget in (self.minutes, self.max_steps) if budget is not None]
        if len(budgets) != 1 or budgets[0] <= 0:
            raise ValueError("Give one positive budget: --minutes or --max_steps.")
        if not 1 <= self.num_evaluations <= (self.max_steps or self.num_evaluations):
            raise ValueError(f"--num_evaluations is {self.num_evaluations}; it must be 1 to the number of steps.")
        for file in (self.json, self.plot):
            if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
                raise ValueError(f"{file} cannot be written: it is a folder, or its folder does not exist.")
        if self.plot is not None and Path(self.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot is {self.plot}, but must end in .png, .svg or .pdf.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)


class Run:
    """A model in training, with a clock that is paused while others train.

    Args:
        name: Of the model, for messages.
        model: The model in training mode, on its device.
        loss: The loss of a batch.
        batches: An endless iterator of batches.
        arguments: Budget, rates and device.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        loss: Callable[[dict[str, Any]], torch.Tensor],
        batches: Iterator[dict[str, Any]],
        arguments: Arguments,
    ) -> None:
        self.name, self.model, self.loss, self.batches, self.arguments = name, model, loss, batches, arguments
        groups = parameter_groups(
            model, arguments.learning_rate, arguments.weight_decay, arguments.backbone_learning_rate_factor
        )
        self.optimizer = torch.optim.AdamW(groups)
        self.rates = [group["lr"] for group in groups]
        self.steps = 0
        self.seconds = 0.0

    def train(self, share: float) -> None:
        """Trains until this share of the budget is spent.

        Raises a ValueError if the loss is not finite.
        """
        before, start = self.seconds, time.perf_counter()
        while self.spent() < share:
            self.step()
            synchronize(self.arguments.device)
            self.seconds = before + time.perf_counter() - start

    def spent(self) -> float:
        """The share of the budget that is spent."""
        if self.arguments.max_steps is not None:
            return self.steps / self.arguments.max_steps
        assert self.arguments.minutes is not None  # one of both is given
        return self.seconds / (60 * self.arguments.minutes)

    def step(self) -> None:
        factor = warmup(self.steps, self.arguments.warmup_steps, 0.0) * (1 - self.spent()) ** POWER
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.loss(next(self.batches))
        if not loss.isfinite():
            raise ValueError(f"The loss of {self.name} is {loss.item()} at step {self.steps}. Lower --learning_rate.")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.steps += 1


def main(arguments: Arguments) -> None:
    if arguments.plot:
        import matplotlib  # noqa: F401 - fails now if it is missing, not after minutes of training
    train_dataset = open_dataset(arguments.data, arguments.train_split)
    eval_dataset = open_dataset(arguments.data, arguments.eval_split)
    task = task_of_data(eval_dataset)
    metric = MAIN_FIGURES[task]
    set_seed(arguments.seed)
    ours = new_model(arguments.config, train_dataset.labels)
    if not isinstance(ours, MaskFormerForInstanceSegmentation):
        raise ValueError(f"{arguments.config} describes a {type(ours).__name__}, which transformers does not have.")
    ignored = [name for name, value in OURS_ALONE.items() if getattr(ours.config, name) != value]
    if ignored:
        raise ValueError(f"{arguments.config} sets {', '.join(ignored)}, which transformers ignores. Leave it out.")
    image_processor = image_processor_for(train_dataset.labels, arguments.image_size, model=ours, task=task)
    runs = start_runs(ours, train_dataset, image_processor, arguments)
    for dataset in (train_dataset, eval_dataset):
        check_samples(dataset)
    curves: dict[str, list[dict[str, float]]] = {run.name: [] for run in runs}
    print(f"{'model':<14}{'minutes':>8}{'steps':>8}{metric:>12}", flush=True)
    num_turns = TURNS_PER_EVALUATION * arguments.num_evaluations
    with dead_workers_named(arguments.num_workers):
        for turn in range(num_turns + 1):  # turn 0 trains nothing
            for run in runs if turn % 2 else reversed(runs):
                run.train(turn / num_turns)
            if turn % TURNS_PER_EVALUATION:
                continue
            for run in runs:
                figures = evaluate(
                    as_ours(run.model, arguments),
                    image_processor,
                    eval_dataset,
                    task,
                    batch_size=arguments.batch_size,
                    num_workers=arguments.num_workers,
                    autocast=arguments.autocast,
                )
                point = {"minutes": run.seconds / 60, "steps": run.steps, metric: figures[metric]}
                curves[run.name].append(point)
                print(f"{run.name:<14}{point['minutes']:>8.1f}{run.steps:>8}{point[metric]:>12.4f}", flush=True)
            write_figures(curves, arguments)
    if arguments.plot:
        draw_curves(curves, metric, arguments.plot)


def start_runs(
    ours: MaskFormerForInstanceSegmentation, dataset: Any, image_processor: Any, arguments: Arguments
) -> tuple[Run, Run]:
    """Our model, and transformers' with its weights; each gets the same targets in its own best form."""
    stock = stock_of(ours).train().to(arguments.device)
    if ours.config.freeze_batch_norm:
        freeze_batch_norm_of_stock(stock)
    ours = ours.train().to(arguments.device)

    def loss_of_stock(batch: dict[str, Any]) -> torch.Tensor:
        inputs = send_to_device(batch, arguments.device)
        inputs["mask_labels"] = [masks.float() for masks in inputs["mask_labels"]]
        inputs["class_labels"] = [labels[labels >= 0] for labels in inputs["class_labels"]]
        with arguments.autocast():
            # Without hidden states transformers crashes under deep supervision.
            return stock(**inputs, output_hidden_states=stock.config.use_auxiliary_loss).loss

    def loss_of_ours(batch: dict[str, Any]) -> torch.Tensor:
        with arguments.autocast():
            return ours(**send_to_device(batch, arguments.device)).loss

    stock_batches = endless_batches(dataset, image_processor, "masks", arguments)
    our_batches = endless_batches(dataset, image_processor, "segment_map", arguments)
    return (
        Run("transformers", stock, loss_of_stock, stock_batches, arguments),
        Run("this package", ours, loss_of_ours, our_batches, arguments),
    )


def endless_batches(
    dataset: Any, image_processor: Any, target_format: Any, arguments: Arguments
) -> Iterator[dict[str, Any]]:
    """Endless epochs whose order and augmentation depend on the seed alone."""
    if len(dataset) < arguments.batch_size:
        raise ValueError(f"{arguments.data} has {len(dataset)} training images, so --batch_size cannot be larger.")
    augmented = AugmentedDataset(
        dataset, RandomScaleCropFlip.from_scales(arguments.image_size, 0.5, 2.0, True, True), arguments.seed
    )
    loader: DataLoader[Any] = DataLoader(
        augmented,
        arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
        collate_fn=MaskFormerDataCollator(image_processor, do_resize=False, target_format=target_format),
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    return itertools.chain.from_iterable(epoch_of(loader, augmented, epoch) for epoch in itertools.count())


def epoch_of(loader: DataLoader[Any], augmented: AugmentedDataset, epoch: int) -> Iterator[dict[str, Any]]:
    augmented.set_epoch(epoch)
    yield from loader


def as_ours(model: Any, arguments: Arguments) -> MaskFormerForInstanceSegmentation:
    """This package's model with these weights."""
    if isinstance(model, MaskFormerForInstanceSegmentation):
        return model
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return MaskFormerForInstanceSegmentation.from_pretrained(folder).to(arguments.device)


def write_figures(curves: dict[str, list[dict[str, float]]], arguments: Arguments) -> None:
    if arguments.json:
        settings = {**vars(arguments), "threads": torch.get_num_threads(), **environment(arguments.device)}
        Path(arguments.json).write_text(json.dumps({"settings": settings, "curves": curves}, indent=1))


def draw_curves(curves: dict[str, list[dict[str, float]]], metric: str, path: str) -> None:
    """Draws the metric against the time and the steps of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit in zip(axes, ("minutes", "steps"), strict=True):
        for name, points in curves.items():
            axis.plot([point[unit] for point in points], [point[metric] for point in points], marker="o", label=name)
        axis.set(xlabel=f"{unit} of training", ylim=0, xlim=0)
    axes[0].set(ylabel=f"{metric} on validation")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with errors_as_messages():
        main(*OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses())
