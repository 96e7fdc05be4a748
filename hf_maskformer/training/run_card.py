"""The model card of a training run, from what the trainer knows: data, recipe, hardware, loss, figures, pictures."""

import platform
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub import EvalResult
from transformers import TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..evaluation.tasks import MAIN_FIGURES, Task
from ..hub.model_card import CARD_FILE, Picture, describe, inherited_licence, make_card, starting_point
from .pictures import drawn_data, write_pictures

METRIC_NAMES = {"mean_iou": "mean IoU", "pq": "PQ", "ap": "AP"}
UNNAMED_DATA = "data that it does not name"
LOSS_CURVE = "loss_curve.png"
MAX_ROWS = 10  # of the loss table
# Arguments shown in a card, if they are not None, False or empty.
SHOWN_ARGUMENTS = (
    "learning_rate",
    "backbone_learning_rate_factor",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "paper_schedule",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "lr_milestones",
    "warmup_steps",
    "warmup_factor",
    "bf16",
    "fp16",
    "seed",
)
# Those of them without meaning under each paper_schedule.
MEANINGLESS_ARGUMENTS = {
    None: ("lr_milestones", "warmup_factor"),
    "poly": ("lr_milestones", "lr_scheduler_type", "lr_scheduler_kwargs"),
    "steps": ("lr_scheduler_type", "lr_scheduler_kwargs"),
}

logger = logging.get_logger(__name__)


def write_run_card(
    trainer: Any,
    *,
    name: str,
    licence: str | None = None,
    tags: Sequence[str] = (),
    begun_with: str | None = None,
    data_ids: Sequence[str] = (),
    data_names: Sequence[str] = (),
    split: str | None = None,
) -> None:
    """Writes README.md into the output folder of a trainer, with the loss curve and pictures next to it.

    Args:
        trainer: a `MaskFormerTrainer`.
        name: what the examples load.
        licence: chosen by the owner; see `inherited_licence`, also for the ValueError.
        tags: further Hub tags.
        begun_with: the checkpoint from which training started; by default what the model was loaded from.
        data_ids: Hub names of the data.
        data_names: their display names; by default `data_ids`.
        split: the split that was evaluated.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    start = starting_point(begun_with or model.name_or_path)
    licence_fields, licence_text = inherited_licence(start, licence)
    task: Task = trainer.task
    data_name = ", ".join(data_names or data_ids) or UNNAMED_DATA
    metrics = figures_of_weights(trainer.state, trainer.args.load_best_model_at_end)
    card = make_card(
        model.config,
        task,
        name,
        origin=f"{describe(model.config, task)}, trained on {data_name}.",
        licence=licence_fields,
        licence_text=licence_text,
        results=eval_results(metrics, task, data_name, data_ids[0] if data_ids else "other", split),
        results_text=results_text(metrics, data_name, split),
        training_text=training_text(trainer, data_name, start.name, write_loss(trainer.state.log_history, folder)),
        pictures=_pictures(trainer, model, folder),
        tags=tags,
        base_model=start.base_model,
        datasets=list(data_ids) or None,
    )
    card.save(folder / CARD_FILE)


def figures_of_weights(state: TrainerState, is_best_loaded: bool) -> dict[str, float]:
    """The figures measured with the final weights of a training run, and with no others.

    Args:
        state: of the trainer. Evaluations after training take precedence over those during it.
        is_best_loaded: whether training ends by loading its best checkpoint.
    """
    ends = _ends(state)
    after = state.log_history[ends[-1] + 1 :] if ends else state.log_history
    for entries, step in ((after, state.global_step), (state.log_history, step_of_weights(state, is_best_loaded))):
        figures = {
            name: value
            for entry in entries
            if entry.get("step") == step
            for name, value in entry.items()
            if name.startswith("eval_")
        }
        if figures:
            return figures
    return {}


def step_of_weights(state: TrainerState, is_best_loaded: bool) -> int:
    """The step of the final weights of a training run; see `figures_of_weights`."""
    # Not the step of the best evaluation, which may have left no checkpoint.
    loaded = state.best_model_checkpoint if is_best_loaded and _ends(state) else None
    step = None if loaded is None else Path(loaded).name.rpartition("-")[2]
    return int(step) if step and step.isdecimal() else state.global_step


def _ends(state: TrainerState) -> list[int]:
    """The positions in the log at which training runs ended."""
    return [index for index, entry in enumerate(state.log_history) if "train_runtime" in entry]


def _pictures(trainer: Any, model: Any, folder: Path) -> list[Picture]:
    dataset = drawn_data(trainer)
    if dataset is None:
        return []
    return write_pictures(model, trainer.processing_class, dataset, trainer.args.num_pictures, folder)


def eval_results(
    metrics: Mapping[str, float], task: Task, data_name: str, data_id: str, split: str | None
) -> list[Any]:
    """The main figure of each evaluation, as entries of a card's metadata.

    Args:
        metrics: as returned by `MaskFormerTrainer.evaluate`, of one or several data sets.
        task: what was evaluated.
        data_name, data_id: display name and machine-readable name of the data.
        split: the split that was evaluated, if known.
    """
    figure = MAIN_FIGURES[task]
    results = []
    for key, value in metrics.items():
        prefix = key.removesuffix(f"_{figure}")
        if prefix == key:
            continue
        part = prefix.removeprefix("eval").strip("_")  # which `evaluate` prepends for data sets in a dictionary
        results.append(
            EvalResult(
                task_type="image-segmentation",
                task_name=f"{task.capitalize()} segmentation",
                dataset_type=data_id,
                dataset_name=f"{data_name}, {part}" if part else data_name,
                dataset_split=split,
                metric_type=figure,
                metric_name=METRIC_NAMES[figure],
                metric_value=round(value, 4),
            )
        )
    return results


def results_text(metrics: Mapping[str, float], data_name: str, split: str | None) -> str:
    """All figures of an evaluation as a table, or a note that there was none."""
    if not metrics:
        return "These weights were not evaluated."
    where = data_name + (f", split `{split}`" if split else "")
    rows = "\n".join(f"| {name.removeprefix('eval_')} | {100 * value:.2f} |" for name, value in sorted(metrics.items()))
    return (
        f"Measured at the resolution of the ground truth on {where}, in percent:\n\n| figure | |\n| --- | --- |\n{rows}"
    )


def training_text(trainer: Any, data_name: str, start_name: str | None, loss: str) -> str:
    """Data, recipe, hardware and versions; `loss` is the text about the loss."""
    args, state = trainer.args, trainer.state
    begins = "random weights" if start_name is None else f"`{start_name}`"
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * max(args.n_gpu, 1)
    length = f"{state.global_step:,} steps of {images} images"
    if trainer.train_dataset is None or has_length(trainer.train_dataset):  # unknown for a stream
        length += f" ({state.epoch or 0:.4g} epochs)"
    step = step_of_weights(state, args.load_best_model_at_end)
    chosen = "" if step == state.global_step else f" The weights are those of step {step:,}, the best evaluation."
    hidden = MEANINGLESS_ARGUMENTS[args.paper_schedule]
    values = args.to_dict()
    # Zero is equal to False, but a value.
    shown = {
        name: values[name]
        for name in SHOWN_ARGUMENTS
        if name not in hidden and values[name] is not None and values[name] is not False and values[name] != {}
    }
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in shown.items())
    size = trainer.processing_class.size
    return "\n\n".join(
        [
            f"Trained on {data_name}, starting from {begins}, for {length}.{chosen}",
            f"| argument | value |\n| --- | --- |\n{rows}\n| image size at evaluation | {size} |",
            "All arguments are in `training_args.json`.",
            f"Hardware: {hardware(args)}.{_duration(trainer)}",
            f"Versions: torch {torch.__version__}, transformers {transformers.__version__}, "
            f"accelerate {accelerate.__version__}.",
            loss,
        ]
    )


def hardware(args: Any) -> str:
    """The devices of a training run, in words."""
    processes = f"{args.world_size} processes, each on " if args.world_size > 1 else ""
    if args.device.type == "cuda":
        count = f"{args.n_gpu} x " if args.n_gpu > 1 else ""
        return f"{processes}{count}{torch.cuda.get_device_name(args.device)}"
    return f"{processes}{args.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_loss(history: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Draws the loss curve into `folder` and returns the text that shows it: the picture, or else a table."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    (folder / LOSS_CURVE).unlink(missing_ok=True)  # of an earlier training
    if not points:
        return "The loss was not logged."
    if len(points) > 1 and _draw(points, folder / LOSS_CURVE):
        return f"![Training loss by step]({LOSS_CURVE})\n\nThe last logged loss is {points[-1][1]:.4g}."
    chosen = [points[round(i * (len(points) - 1) / max(MAX_ROWS - 1, 1))] for i in range(MAX_ROWS)]
    rows = "\n".join(f"| {step:,} | {loss:.4g} |" for step, loss in dict(chosen).items())
    return f"| step | training loss |\n| --- | --- |\n{rows}"


def _draw(points: Sequence[tuple[int, float]], path: Path) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("The model card shows the loss as a table; with matplotlib it would show a curve.")
        return False
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return True


def _duration(trainer: Any) -> str:
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    if not seconds or trainer.first_step == trainer.state.global_step:
        return ""
    # The time before the checkpoint is unknown.
    what = f"The last part of the training, after step {trainer.first_step:,}," if trainer.first_step else "Training"
    return f" {what} took {timedelta(seconds=round(seconds[-1]))} (h:mm:ss)."
