"""Two opt-in ways to make transformers' Auto classes and pipelines find this package's classes."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_per_pixel_baseline import PerPixelBaselineConfig
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..modeling_maskformer import MaskFormerForInstanceSegmentation, MaskFormerModel
from ..modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation

SEGMENTATION_CLASSES = (
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
)


class MaskFormerImageProcessorPil(MaskFormerImageProcessor):
    """The name under which transformers looks for its processor without torchvision; loads our only one."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return MaskFormerImageProcessor.from_pretrained(*args, **kwargs)


def register_auto_classes() -> None:
    """Makes transformers' Auto classes and pipelines use this package's model and processor for type `maskformer`.

    This affects the whole process and every `maskformer` checkpoint, so it belongs in applications, not in libraries.
    transformers' own classes are unchanged when used by name. Calling it again has no effect.
    """
    AutoConfig.register(MaskFormerConfig.model_type, MaskFormerConfig, exist_ok=True)
    AutoModel.register(MaskFormerConfig, MaskFormerModel, exist_ok=True)
    for auto_class in SEGMENTATION_CLASSES:
        auto_class.register(MaskFormerConfig, MaskFormerForInstanceSegmentation, exist_ok=True)
    # AutoImageProcessor.register would load transformers' own backends first, with a warning if torchvision is missing.
    image_processors = {"torchvision": MaskFormerImageProcessor, "pil": MaskFormerImageProcessorPil}
    IMAGE_PROCESSOR_MAPPING.register(MaskFormerConfig, image_processors, exist_ok=True)  # type: ignore[arg-type]


def register_remote_code() -> None:
    """Makes everything that is saved or pushed from now on include this package's modelling files.

    Such a checkpoint runs with `trust_remote_code=True` where this package is not installed, through every Auto class.
    Without that argument, transformers loads it into its own MaskFormer, if that can express the model. Call it before
    `save_pretrained`, `push_to_hub` or training; save the image processor too, since it has its own files.
    """
    MaskFormerConfig.register_for_auto_class()
    MaskFormerModel.register_for_auto_class()
    MaskFormerForInstanceSegmentation.register_for_auto_class("AutoModelForUniversalSegmentation")
    MaskFormerImageProcessor.register_for_auto_class()
    PerPixelBaselineConfig.register_for_auto_class()
    PerPixelBaselineForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
