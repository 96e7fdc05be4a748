"""MaskFormer: semantic, instance and panoptic segmentation by predicting masks and their classes."""
