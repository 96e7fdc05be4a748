"""How the paper trained each model of `presets`, as options of `scripts/train.py`.

Two small tables again: what depends on the data set, and what on the kind of backbone. All values are the paper's,
except for `PACKAGE_OPTIONS`, which do not change the result.
"""

from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ..data.labels import LabelSet, shorten
from ..image_processing_maskformer import MaskFormerImageProcessor
from .presets import PRESETS, Preset
from .schedules import ScheduleName

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DataRecipe:
    """What depends on the data set.

    Attributes:
        batch_size: images per optimiser step, over all processes.
        steps: number of optimiser steps.
        augmentation: its name in `PAPER_AUGMENTATIONS`.
        schedule: learning rate schedule, see `schedules`.
        milestones: for "steps", where the learning rate is divided by 10, as fractions of the run.
    """

    batch_size: int
    steps: int
    augmentation: str
    schedule: ScheduleName = "poly"
    milestones: tuple[float, ...] = ()


@dataclass(frozen=True)
class BackboneRecipe:
    """What depends on the kind of backbone; `warmup_factor` is the initial fraction of the learning rate."""

    learning_rate: float
    weight_decay: float
    backbone_learning_rate_factor: float
    warmup_steps: int
    warmup_factor: float


DATA_RECIPES = {
    "ade20k": DataRecipe(16, 160_000, "ade20k"),
    "ade20k-full": DataRecipe(16, 200_000, "ade20k"),
    "cityscapes": DataRecipe(16, 90_000, "cityscapes"),
    "coco-stuff-10k": DataRecipe(32, 60_000, "coco-stuff-10k"),
    "mapillary-vistas": DataRecipe(16, 300_000, "mapillary-vistas"),
    "coco-panoptic": DataRecipe(64, 554_400, "coco-panoptic", "steps", (369_600 / 554_400,)),
    "ade20k-panoptic": DataRecipe(16, 720_000, "ade20k-640"),
}
RESNET = BackboneRecipe(1e-4, 1e-4, 0.1, warmup_steps=0, warmup_factor=1.0)
SWIN = BackboneRecipe(6e-5, 0.01, 1.0, warmup_steps=1500, warmup_factor=1e-6)
# Ten steps of warm-up that start at the full learning rate: no warm-up at all, but so it is in the paper's code.
RESNET_COCO_PANOPTIC = BackboneRecipe(1e-4, 1e-4, 0.1, warmup_steps=10, warmup_factor=1.0)
# Models that the authors trained at a different size from the others on the same data.
AUGMENTATIONS = {
    "ade20k-swin-base": "ade20k-640",
    "ade20k-swin-large": "ade20k-640",
    "coco-panoptic-swin-large": "coco-panoptic-1000",
}
MAX_GRAD_NORM = 0.01

# Evaluation and checkpoint intervals, which do not affect the final weights, those that are reported.
PACKAGE_OPTIONS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 5000,
    "save_strategy": "steps",
    "save_steps": 5000,
    "save_total_limit": 3,
    "logging_steps": 50,
    "dataloader_num_workers": 4,
}
# Default limit of the batch size on a device; --per_device_train_batch_size overrides it.
MAX_IMAGES_PER_DEVICE = 2


@dataclass(frozen=True)
class Recipe:
    """The training of one model of the paper."""

    preset: Preset
    data: DataRecipe
    backbone: BackboneRecipe

    @property
    def augmentation(self) -> str:
        """Name of the augmentation in `PAPER_AUGMENTATIONS`."""
        return AUGMENTATIONS.get(self.preset.name, self.data.augmentation)

    def options(self) -> dict[str, Any]:
        """The paper's settings, as options of `scripts/train.py`."""
        schedule: dict[str, Any] = {"paper_schedule": self.data.schedule}
        if self.data.milestones:
            schedule["lr_milestones"] = list(self.data.milestones)
        return {
            "image_size": self.preset.test_size[0],
            "augmentation": self.augmentation,
            "max_steps": self.data.steps,
            "learning_rate": self.backbone.learning_rate,
            "backbone_learning_rate_factor": self.backbone.backbone_learning_rate_factor,
            "weight_decay": self.backbone.weight_decay,
            "max_grad_norm": MAX_GRAD_NORM,
            **schedule,
            "warmup_steps": self.backbone.warmup_steps,
            "warmup_factor": self.backbone.warmup_factor,
            "bf16": False,
            "fp16": False,
        }


def recipe_of(preset: Preset) -> Recipe:
    """The recipe of a preset."""
    name = preset.data_set_name
    resnet = RESNET_COCO_PANOPTIC if name == "coco-panoptic" else RESNET
    return Recipe(preset, DATA_RECIPES[name], SWIN if preset.backbone.startswith("swin") else resnet)


RECIPES: dict[str, Recipe] = {name: recipe_of(preset) for name, preset in PRESETS.items()}


def accumulation(batch_size: int, devices: int, per_device: int | None, steps: int | None) -> tuple[int, int]:
    """Returns the batch size per device and the gradient accumulation steps.

    Args:
        batch_size: images per optimiser step, over all devices.
        devices: the number of devices.
        per_device, steps: values that are already given. Both together override `batch_size`.

    Raises:
        ValueError: the batch size is not divisible; the message says which values are possible.
    """
    if per_device is not None and steps is not None:
        return per_device, steps
    if batch_size % devices:
        fitting = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
        raise ValueError(
            f"The recipe has {batch_size} images per step, which is not divisible by {devices} processes. Start "
            f"{_listed(fitting)} processes, or set both --per_device_train_batch_size and "
            "--gradient_accumulation_steps for another number of images."
        )
    share = batch_size // devices
    option = "per_device_train_batch_size" if steps is None else "gradient_accumulation_steps"
    given = per_device if steps is None else steps
    if given is None:
        per_device = max(count for count in range(1, MAX_IMAGES_PER_DEVICE + 1) if share % count == 0)
        return per_device, share // per_device
    if given < 1 or share % given:
        fitting = [count for count in range(1, share + 1) if share % count == 0]
        raise ValueError(
            f"The recipe has {batch_size} images per step, {share} for each of {devices} process(es), which is not "
            f"divisible by --{option} {given}. Set it to {_listed(fitting)}; or set both "
            "--per_device_train_batch_size and --gradient_accumulation_steps for another number of images."
        )
    return (given, share // given) if steps is None else (share // given, given)


def recipe_image_processor(
    preset: Preset, labels: LabelSet | None, image_size: int, checkpoint: str | None = None
) -> MaskFormerImageProcessor:
    """The image processor of a preset for data with these classes.

    Args:
        preset: the preset.
        labels: the classes; None stands for the preset's own.
        image_size: shorter side at evaluation; the limit of the longer one keeps the preset's ratio.
        checkpoint: the one that is fine-tuned, whose normalisation and padding are kept.
    """
    settings = preset.image_processor_settings(preset.data_set.labels() if labels is None else labels)
    shortest, longest = preset.test_size
    settings["size"] = {"shortest_edge": image_size, "longest_edge": round(longest * image_size / shortest)}
    if checkpoint is None:
        return MaskFormerImageProcessor(**settings)
    del settings["size_divisor"]
    return MaskFormerImageProcessor.from_pretrained(checkpoint, **settings)


def check_data(preset: Preset, dataset: Any, is_fine_tuning: bool = False) -> None:
    """Checks before training that a data set matches a preset.

    Args:
        preset: the preset.
        dataset: a map-style data set of samples, with `labels`.
        is_fine_tuning: whether training starts from a whole checkpoint, for which other classes are allowed.

    Raises:
        ValueError: it has another number of classes, or another kind of segments than the preset learns.
    """
    count, expected = dataset.labels.num_labels, preset.data_set.num_labels
    if count != expected and not is_fine_tuning:
        raise ValueError(
            f"The data has {count} classes, but {preset.name} is a model for the {expected} of "
            f"{preset.data_set.title}. Give that data set as --data; or give --checkpoint, to fine-tune a whole model "
            "with this recipe on other classes."
        )
    _warn_of_other_names(preset, dataset.labels)
    sample = dataset[0]
    has_segments = "instance_id_to_semantic_id" in sample
    if preset.data_set.task == "panoptic" and not has_segments:
        raise ValueError(
            f"{preset.name} is for panoptic segmentation, but {sample['name']} has no segments with classes. Use "
            "panoptic data (--format coco-panoptic, or columns with segments_info; see docs/data.md)."
        )
    if preset.data_set.task == "semantic" and (has_segments or "masks" in sample):
        raise ValueError(
            f"{preset.name} is for semantic segmentation, one mask per class, but {sample['name']} has one mask per "
            "object. Use data with maps of classes (see docs/data.md), or a panoptic preset."
        )


def _warn_of_other_names(preset: Preset, labels: LabelSet) -> None:
    known = preset.data_set.labels()
    if known is None or known.num_labels != labels.num_labels:
        return
    others = [
        f"class {label} is {labels.id2label[label]!r} in the data and {name!r} there"
        for label, name in known.id2label.items()
        # Some files list synonyms.
        if name not in (labels.id2label[label], labels.id2label[label].partition(",")[0].strip())
    ]
    if others:
        logger.warning(
            f"The data has as many classes as {preset.data_set.title}, but other names ({shorten(others)}). Results "
            "are comparable with the paper's only if the classes are the same."
        )


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
