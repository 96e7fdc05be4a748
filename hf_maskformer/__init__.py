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
    from .evaluation.average_precision import AveragePrecision
    from .evaluation.mean_iou import MeanIoU
    from .evaluation.panoptic_quality import PanopticQuality
    from .hub.auto_classes import register_auto_classes, register_remote_code
    from .training.arguments import MaskFormerTrainingArguments
    from .training.trainer import MaskFormerTrainer

__all__ = [
    "AveragePrecision",
    "MaskFormerConfig",
    "MaskFormerDataCollator",
    "MaskFormerForInstanceSegmentation",
    "MaskFormerImageProcessor",
    "MaskFormerLoss",
    "MaskFormerModel",
    "MaskFormerTrainer",
    "MaskFormerTrainingArguments",
    "MeanIoU",
    "PanopticQuality",
    "PerPixelBaselineConfig",
    "PerPixelBaselineForSemanticSegmentation",
    "register_auto_classes",
    "register_remote_code",
]

# Only our own model types: "maskformer" remains transformers'.
AutoConfig.register(PerPixelBaselineConfig.model_type, PerPixelBaselineConfig)
AutoModelForSemanticSegmentation.register(PerPixelBaselineConfig, PerPixelBaselineForSemanticSegmentation)

# Training and evaluation import Trainer and its libraries; prediction alone should not wait for them.
_LAZY_MODULES = {
    "AveragePrecision": "evaluation.average_precision",
    "MaskFormerDataCollator": "data.collator",
    "MaskFormerTrainer": "training.trainer",
    "MaskFormerTrainingArguments": "training.arguments",
    "MeanIoU": "evaluation.mean_iou",
    "register_auto_classes": "hub.auto_classes",
    "register_remote_code": "hub.auto_classes",
    "PanopticQuality": "evaluation.panoptic_quality",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-maskformer")
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY_MODULES[name]}", __name__), name)
