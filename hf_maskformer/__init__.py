"""MaskFormer: semantic, instance and panoptic segmentation by predicting masks and their classes."""

from typing import TYPE_CHECKING, Any

from ._torchvision import hide_broken_torchvision

hide_broken_torchvision()

from transformers import AutoConfig, AutoModelForSemanticSegmentation

from .configuration_maskformer import MaskFormerConfig
from .configuration_per_pixel_baseline import PerPixelBaselineConfig
from .image_processing_maskformer import MaskFormerImageProcessor
from .loss_maskformer import MaskFormerLoss
from .modeling_maskformer import MaskFormerForInstanceSegmentation, MaskFormerModel
from .modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation

if TYPE_CHECKING:
    from .data.collator import MaskFormerDataCollator
    from .evaluation.mean_iou import MeanIoU
    from .hub.auto_classes import register_auto_classes, register_remote_code
    from .training.trainer import MaskFormerTrainer, MaskFormerTrainingArguments

__all__ = [
    "MaskFormerConfig",
    "MaskFormerDataCollator",
    "MaskFormerForInstanceSegmentation",
    "MaskFormerImageProcessor",
    "MaskFormerLoss",
    "MaskFormerModel",
    "MaskFormerTrainer",
    "MaskFormerTrainingArguments",
    "MeanIoU",
    "PerPixelBaselineConfig",
    "PerPixelBaselineForSemanticSegmentation",
    "register_auto_classes",
    "register_remote_code",
]

# Only types that are ours alone: "maskformer" stays with transformers.
AutoConfig.register(PerPixelBaselineConfig.model_type, PerPixelBaselineConfig)
AutoModelForSemanticSegmentation.register(PerPixelBaselineConfig, PerPixelBaselineForSemanticSegmentation)

# Training and evaluation bring Trainer and its libraries along; who only predicts should not wait for them.
_SIDE_ROOMS = {
    "MaskFormerDataCollator": "data.collator",
    "MaskFormerTrainer": "training.trainer",
    "MaskFormerTrainingArguments": "training.trainer",
    "MeanIoU": "evaluation.mean_iou",
    "register_auto_classes": "hub.auto_classes",
    "register_remote_code": "hub.auto_classes",
}


def __getattr__(name: str) -> Any:
    if name not in _SIDE_ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_SIDE_ROOMS[name]}", __name__), name)
