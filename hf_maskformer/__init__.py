"""MaskFormer: semantic, instance and panoptic segmentation by predicting masks and their classes."""

from .configuration_maskformer import MaskFormerConfig
from .loss_maskformer import MaskFormerLoss
from .modeling_maskformer import MaskFormerForInstanceSegmentation, MaskFormerModel

__all__ = ["MaskFormerConfig", "MaskFormerForInstanceSegmentation", "MaskFormerLoss", "MaskFormerModel"]
