"""Parses the command line of a training run, which overrides the recipe of `--preset`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..command_line import OptionParser
from .arguments import MaskFormerTrainingArguments
from .presets import find_preset
from .recipes import PACKAGE_OPTIONS, RECIPES, accumulation

PAPER, PACKAGE, COMPUTED, COMMAND_LINE = "paper", "package", "computed", "command line"
# An option of the recipe is overridden not only by itself on the command line, but also by options that conflict.
YIELDS_TO = {
    "max_steps": ("num_train_epochs",),
    **dict.fromkeys(("paper_schedule", "warmup_factor", "lr_milestones"), ("lr_scheduler_type",)),
    "augmentation": ("image_size", "min_scale", "max_scale", "crop"),
}
# The other options of transformers, except those with our own default, are shown by --help_all.
EVERYDAY = ("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "warmup_steps", "report_to")

logger = logging.get_logger(__name__)


def parse_with_recipe(
    dataclasses: Sequence[Any], command_line: Sequence[str] | None = None, description: str | None = None
) -> tuple[tuple[Any, ...], dict[str, str]]:
    """Parses options into dataclasses, one of which is `MaskFormerTrainingArguments`.

    Args:
        dataclasses: as for `HfArgumentParser`.
        command_line: the options; by default those of this process. With `--preset`, missing options have the values
            of its recipe, and gradients are accumulated to its batch size.
        description: the beginning of the help.

    Returns:
        The dataclasses, and for each option that differs from its default, where its value comes from.

    Raises:
        ValueError: there is no such preset, or its batch size is not divisible by the number of processes.
    """
    given = given_options(dataclasses, command_line)
    shown = {*EVERYDAY, *MaskFormerTrainingArguments.__annotations__}
    hidden = {field.name for field in fields(TrainingArguments)} - shown
    parser = OptionParser(dataclasses, hidden, description=description)
    sources: dict[str, str] = {}
    if given.get("preset") is not None:
        recipe = RECIPES[find_preset(given["preset"]).name]
        for options, source in ((recipe.options(), PAPER), (PACKAGE_OPTIONS, PACKAGE)):
            options = {
                name: value
                for name, value in options.items()
                if not any(other in given for other in (name, *YIELDS_TO.get(name, ())))
            }
            parser.set_defaults(**options)
            sources |= dict.fromkeys(options, source)
        training = training_arguments(parser.parse_args_into_dataclasses(command_line))
        batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
        # Without a launcher, Trainer splits a batch over all GPUs of the machine.
        devices = training.world_size * max(training.n_gpu, 1)
        computed = accumulation(recipe.data.batch_size, devices, *(given.get(name) for name in batch))
        parser.set_defaults(**dict(zip(batch, computed, strict=True)))
        sources |= dict.fromkeys(batch, COMPUTED)
    parsed = parser.parse_args_into_dataclasses(command_line)
    if "preset" in given:
        _warn_of_departures(training_arguments(parsed), recipe.data.batch_size, devices)
        beside = [f"--{name}" for name in YIELDS_TO["augmentation"] if name in given]
        if beside and "augmentation" not in given:
            logger.warning(
                f"{', '.join(beside)}: the recipe's augmentation {recipe.augmentation!r} is replaced by --image_size, "
                "--min_scale, --max_scale and --crop as a whole; see --dry_run for their values."
            )
    unused = [f"--{name}" for name in YIELDS_TO["augmentation"] if name in given and name != "image_size"]
    if unused and given.get("augmentation") is not None:
        logger.warning(f"{', '.join(unused)}: ignored, as the augmentation {given['augmentation']!r} has its own.")
    return parsed, sources | dict.fromkeys(given, COMMAND_LINE)


def given_options(dataclasses: Sequence[Any], command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that are given on a command line, without defaults."""
    parser = OptionParser(dataclasses, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return vars(parser.parse_known_args(command_line)[0])


def training_arguments(parsed: Sequence[Any]) -> MaskFormerTrainingArguments:
    """Those among the dataclasses of options."""
    return next(arguments for arguments in parsed if isinstance(arguments, MaskFormerTrainingArguments))


def _warn_of_departures(training: MaskFormerTrainingArguments, batch_size: int, devices: int) -> None:
    images = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
    if images != batch_size:
        logger.warning(f"A step has {images} images, but the paper's learning rate is for {batch_size}.")
    if 0 < training.max_steps <= training.warmup_steps and training.warmup_factor < 1:
        logger.warning(
            f"Training ends after {training.max_steps} steps, within the {training.warmup_steps:g} of the warm-up: "
            "the learning rate stays very low. Set --warmup_steps for a short run."
        )
