"""Describes a training run without running it: settings, model, optimiser, length, memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..image_processing_maskformer import MaskFormerImageProcessor
from .arguments import MaskFormerTrainingArguments
from .parameter_groups import BACKBONE, PYRAMID, parameter_groups
from .presets import Config, model_class
from .recipe_options import training_arguments

FLOAT32 = 4  # bytes


def describe_run(
    title: str,
    config: Config,
    parsed: Sequence[Any],
    sources: Mapping[str, str],
    num_images: int | None = None,
    image_processor: MaskFormerImageProcessor | None = None,
) -> str:
    """A human-readable report.

    Args:
        title: its first line.
        config: of the model.
        parsed: the dataclasses of options, one of them `MaskFormerTrainingArguments`.
        sources: where the value of each option comes from (`parse_with_recipe`); others have their defaults.
        num_images: images of the training data, if known.
        image_processor: that of the model, if known.
    """
    training = training_arguments(parsed)
    # The meta device computes nothing and allocates no memory.
    with torch.device("meta"):
        model = model_class(config)(config)
    sections = (
        [title],
        _table(("setting", "value", "from"), [*_settings(parsed, sources), *_of_model(config, image_processor)]),
        _optimiser(training, model),
        _length(training, num_images),
        _memory(model),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _settings(parsed: Sequence[Any], sources: Mapping[str, str]) -> list[tuple[str, str, str]]:
    # Options that affect the result are listed even if neither recipe nor command line sets them.
    shown: tuple[str, ...] = ("seed", "lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon")
    rows = []
    for arguments in parsed:
        if getattr(arguments, "augmentation", "") is None:  # these are used in its place
            shown += ("image_size", "min_scale", "max_scale", "crop", "change_colors")
        for field in fields(arguments):
            if field.name not in (*sources, *shown) or field.name in ("preset", "dry_run"):
                continue
            value = getattr(arguments, field.name)
            if field.name == "lr_scheduler_type" and getattr(arguments, "paper_schedule", None):
                continue
            rows.append((field.name, _text(value), sources.get(field.name, "default")))
    order = ["command line", "paper", "computed", "package", "default"]
    return sorted(rows, key=lambda row: order.index(row[2]))


def _of_model(config: Config, image_processor: MaskFormerImageProcessor | None) -> list[tuple[str, str, str]]:
    values: dict[str, Any] = {"classes": config.num_labels, "backbone": config.backbone_config.model_type}
    if config.decoder_config is not None:
        values["queries"] = config.decoder_config.num_queries
    processor: Any = image_processor
    if processor is not None:
        values |= {
            "task": processor.segmentation_task,
            "shorter side at evaluation": processor.size["shortest_edge"],
            "longer side at most": processor.size["longest_edge"],
            "batches padded to multiples of": processor.size_divisor,
            "ignored value of label maps": processor.ignore_index,
            "0 in label maps ignored": processor.do_reduce_labels,
        }
    return [(name, _text(value), "model") for name, value in values.items()]


def _optimiser(training: MaskFormerTrainingArguments, model: nn.Module) -> list[str]:
    groups = parameter_groups(
        model, training.learning_rate, training.weight_decay, training.backbone_learning_rate_factor
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows: list[tuple[str, ...]] = []
    for group in groups:
        first = names[id(group["params"][0])]
        is_backbone = BACKBONE in first and PYRAMID not in first
        rows.append(
            (
                "backbone" if is_backbone else "rest",
                str(len(group["params"])),
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                f"{group['lr']:g}",
                f"{group['weight_decay']:g}",
                first,
            )
        )
    name = getattr(training.optim, "value", training.optim)
    return [
        f"Optimiser {name}; the gradient of the whole model is clipped to norm {training.max_grad_norm:g}.",
        *_table(("group", "tensors", "parameters", "learning rate", "decay", "such as"), rows),
    ]


def _length(training: MaskFormerTrainingArguments, num_images: int | None) -> list[str]:
    devices = training.world_size * max(training.n_gpu, 1)
    at_once, parts = training.per_device_train_batch_size, training.gradient_accumulation_steps
    images = at_once * devices * parts
    lines = [f"{images} images per step: {at_once} on each of {devices} device(s), accumulated {parts} time(s)."]
    if training.paper_schedule == "steps" and training.max_steps > 0:
        falls = ", ".join(f"{round(share * training.max_steps):,}" for share in training.lr_milestones)
        lines.append(f"The learning rate falls to a tenth at step {falls}.")
    if training.max_steps > 0:
        steps = f"{training.max_steps:,} steps, {training.max_steps * images:,} images"
        if num_images is None:
            lines.append(f"{steps}; the number of epochs needs --data.")
        else:
            epochs = training.max_steps * images / num_images
            lines.append(f"{steps}: {epochs:.1f} epochs of {num_images:,} images.")
    elif num_images is None:
        lines.append(f"{training.num_train_epochs:g} epochs; the number of steps needs --data.")
    else:
        steps = -(-num_images // images) * training.num_train_epochs
        lines.append(f"{training.num_train_epochs:g} epochs of {num_images:,} images, about {steps:,.0f} steps.")
    return lines


def _memory(model: nn.Module) -> list[str]:
    parameters = list(model.parameters())
    weights = FLOAT32 * sum(tensor.numel() for tensor in [*parameters, *model.buffers()])
    trainable = FLOAT32 * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    rows = [
        ("weights, float32", _mib(weights)),
        ("gradients, float32", _mib(trainable)),
        ("AdamW's two moments, float32", _mib(2 * trainable)),
        ("in total, on each device", _mib(weights + 3 * trainable)),
    ]
    left_out = (
        "Not included: activations, which grow with batch and image size and dominate in training, the masks of the "
        "loss, communication buffers between processes, and the overhead of the libraries."
    )
    return [*_table(("memory", "MiB"), rows), left_out]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
