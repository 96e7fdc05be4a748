"""Checks with which a trainer reports errors early: in the data, in the arguments, in what it would save."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MaskFormerForInstanceSegmentation as StockModel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import has_length

from ..data.labels import labels_of, shorten
from ..evaluation.tasks import FIGURES, MAIN_FIGURES, TASKS, Task, check_sample
from ..image_processing_maskformer import MaskFormerImageProcessor
from .arguments import MaskFormerTrainingArguments
from .checkpoints import how_to_resume, how_to_start_over


def check_parts(trainer: Any) -> None:
    """Raises a ValueError if a `MaskFormerTrainer` was given objects that it cannot use, or would ignore."""
    if not isinstance(trainer.args, MaskFormerTrainingArguments):
        raise ValueError(
            f"args are {type(trainer.args).__name__}. Pass MaskFormerTrainingArguments, which have the same fields "
            "and some more."
        )
    if trainer.compute_metrics is not None:
        raise ValueError(
            "MaskFormerTrainer has its own evaluation, without compute_metrics. Leave it out; or use transformers' "
            "Trainer with hf_maskformer.evaluation.compute_metrics.ComputeMetrics."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("The model computes its own loss, without compute_loss_func. Leave it out.")
    if not isinstance(trainer.processing_class, MaskFormerImageProcessor):
        kind = type(trainer.processing_class)
        raise ValueError(
            f"processing_class is of type {kind.__module__}.{kind.__qualname__}, but evaluation needs a "
            "MaskFormerImageProcessor of hf_maskformer."
        )
    if any(isinstance(module, StockModel) for module in trainer.model.modules()):  # adapters may be around it
        raise ValueError(
            "The model is transformers' MaskFormerForInstanceSegmentation. Use that of hf_maskformer, or call "
            "hf_maskformer.register_auto_classes() before an Auto class loads it."
        )
    if trainer.train_dataset is not None and any(hasattr(module, "_orig_mod") for module in trainer.model.modules()):
        raise ValueError(
            "The model, or a part of it, is the result of torch.compile, which puts _orig_mod into the names of its "
            "weights: from_pretrained would find none of them in a checkpoint. Set torch_compile=True in the arguments "
            "instead, or compile in place: model.model.compile()."
        )


def check_classes(model: Any, dataset: Any, image_processor: Any) -> None:
    """Raises a ValueError if the classes of a data set, if known, do not match the model or the image processor."""
    try:
        labels = labels_of(dataset)
    except ValueError:
        return  # training does not need them
    if model.config.num_labels != labels.num_labels:
        raise ValueError(
            f"The model has {model.config.num_labels} classes, but train_dataset has {labels.num_labels}. Load the "
            "model with these: pretrained_model(checkpoint, train_dataset.labels, reinitialize_head=True) of "
            "hf_maskformer.training.starting_point."
        )
    if labels.do_reduce_labels != bool(image_processor.do_reduce_labels):
        raise ValueError(
            f"The image processor has do_reduce_labels={image_processor.do_reduce_labels}, but train_dataset "
            f"{labels.do_reduce_labels}, so all class ids would be off by one. Build the image processor with "
            "image_processor_for(train_dataset.labels, ...) of hf_maskformer.training.starting_point."
        )


def check_eval_data(task: Task, eval_dataset: Any) -> None:
    """Raises a ValueError if a data set does not say which classes it has, or its labels do not support the task."""
    if eval_dataset is None:
        return
    labels_of(eval_dataset)
    if hasattr(eval_dataset, "__len__") and len(eval_dataset) > 0:
        check_sample(task, eval_dataset[0])


def check_eval_classes(train_dataset: Any, eval_dataset: Any) -> None:
    """Raises a ValueError if two data sets give the same class different ids, as far as their classes are known.

    COCO files of different splits may list other categories, or the same ones in another order.
    """
    try:
        trained, evaluated = ([*labels_of(each).id2label.items()] for each in (train_dataset, eval_dataset))
    except ValueError:
        return
    # Exact names first: ADE20K-Full has both a postbox and a post box.
    places = {_spelt_alike(name): label for label, name in trained} | {name: label for label, name in trained}
    for label, name in evaluated:
        place = places.get(name, places.get(_spelt_alike(name), label))
        if place != label:
            raise ValueError(
                f"{name!r} is class {label} in eval_dataset, but class {place} in train_dataset, so it would be "
                "evaluated as another one. Open both with the same classes (--classes classes.json): categories of "
                "COCO files are then matched by name."
            )


def _spelt_alike(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def check_length(dataset: Any, args: MaskFormerTrainingArguments) -> None:
    """Raises a ValueError for a data set smaller than a batch, if incomplete batches are dropped."""
    if dataset is None or not has_length(dataset):
        return
    batch_size = args.train_batch_size * args.world_size
    if len(dataset) < (batch_size if args.dataloader_drop_last else 1):
        raise ValueError(
            f"train_dataset has {len(dataset)} samples, but a batch {batch_size}, and dataloader_drop_last is "
            f"{args.dataloader_drop_last}: there is nothing to train on. Lower per_device_train_batch_size."
        )


def check_checkpoint(checkpoint: str, model: Any, args: MaskFormerTrainingArguments) -> None:
    """Raises a ValueError if a checkpoint is from a model with other classes, or from another optimiser."""
    _check_optimizer(checkpoint, args)
    path = Path(checkpoint, "config.json")
    if not path.is_file():  # adapters, which fail to load if they do not fit
        return
    try:
        trained = json.loads(path.read_text(encoding="utf-8")).get("id2label")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {how_to_resume(str(Path(checkpoint).parent))}.") from error
    names, own = list((trained or {}).values()), list(model.config.id2label.values())
    if trained is not None and names != own:
        raise ValueError(
            f"{checkpoint} is from another run: its model has the {len(names)} classes {shorten(names)}, this one "
            f"the {len(own)} classes {shorten(own)}. Choose another output_dir, or remove its checkpoints."
        )


def _check_optimizer(checkpoint: str, args: MaskFormerTrainingArguments) -> None:
    try:
        trained = json.loads(Path(checkpoint, "training_args.json").read_text(encoding="utf-8")).get("optim")
    except FileNotFoundError:
        if Path(checkpoint, "training_args.bin").is_file() and Path(checkpoint, "optimizer.pt").is_file():
            raise ValueError(
                f"{checkpoint} is from transformers' Trainer, whose optimiser has other parameter groups. Start a "
                "new run with its weights: MaskFormerForInstanceSegmentation.from_pretrained(checkpoint)."
            ) from None
        return
    except (OSError, ValueError, AttributeError):  # damaged; without it, torch's own error remains
        return
    # All variants of AdamW have the same state.
    if trained is not None and _kind(trained) != _kind(str(args.to_dict()["optim"])):
        raise ValueError(
            f"{checkpoint} was trained with optim={trained}, whose state {args.to_dict()['optim']} cannot use. "
            f"Set optim={trained}, or start a new run with the weights of this checkpoint."
        )


def _kind(optimizer: str) -> str:
    return "adamw" if optimizer in ("adamw_torch", "adamw_torch_fused") else optimizer


def check_metric_for_best_model(metric: str | None, task: Task, eval_dataset: Any) -> None:
    """Raises a ValueError for the loss, the main figure of another task, and anything but a figure of the task."""
    if metric is None:
        return
    if metric in ("loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model is the loss, which evaluation does not compute. Use {MAIN_FIGURES[task]}."
        )
    other = {MAIN_FIGURES[each]: each for each in TASKS if each != task}
    name = metric.removeprefix("eval_")
    if name in other:
        raise ValueError(
            f"metric_for_best_model is {metric}, a figure of {other[name]} segmentation, but segmentation_task of "
            f"the image processor is {task}. Use {MAIN_FIGURES[task]}."
        )
    figures = FIGURES[task]
    if isinstance(eval_dataset, dict):
        figures = tuple(f"{data}_{figure}" for data in eval_dataset for figure in figures)
    if name not in figures:
        raise ValueError(f"metric_for_best_model is {metric}, but evaluation gives {shorten(figures, limit=30)}.")


def check_reports(report_to: str | list[str] | None) -> None:
    """Raises a ValueError for unknown reporting integrations, and an ImportError for ones that are not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            raise ValueError(f"--report_to {name} is unknown; use one of {', '.join(INTEGRATION_TO_CALLBACK)} or none.")
        # transformers does not say whether the first two are available.
        if name not in ("flyte", "azure_ml", "none", "all", *get_available_reporting_integrations()):
            raise ImportError(f"--report_to {name}: it is not installed. Install it, or use --report_to none.")


def check_weights(model: nn.Module, step: int, output_dir: str | None) -> None:
    """Raises a ValueError that names the step and how to continue, if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{name} is not finite in step {step}, so the model is not saved. {how_to_start_over(output_dir)}."
            )
