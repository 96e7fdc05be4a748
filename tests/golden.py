"""The stored numbers of the paper's own implementation, and our model with the same weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ResNetConfig, SwinConfig

from hf_maskformer import (
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.hub.key_table import from_original

FIXTURES = Path(__file__).parent / "fixtures"
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128])
SWIN = SwinConfig(embed_dim=12, depths=[2, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=7, drop_path_rate=0.0)
DECODER = {
    "d_model": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "num_queries": 20,
    "dropout": 0.0,
}
ENCODER = {"pixel_decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
CONFIGS = {
    "resnet_semantic": {"backbone_config": RESNET, "decoder_config": {"model_type": "detr", **DECODER}},
    "swin_semantic": {"backbone_config": SWIN, "decoder_config": {"model_type": "detr", **DECODER}},
    "resnet_panoptic_enc": {
        "backbone_config": RESNET,
        "decoder_config": {"model_type": "maskformer-transformer", **DECODER, **ENCODER, "d_model": 64},
    },
    "per_pixel_baseline": {"backbone_config": RESNET},
    "per_pixel_baseline_plus": {
        "backbone_config": RESNET,
        "decoder_config": {"model_type": "maskformer-transformer", **DECODER},
    },
}


class Golden:
    """One variant: `arrays`, `meta` and the `model` with the original's weights."""

    def __init__(self, name: str) -> None:
        self.arrays = load_file(FIXTURES / name / "arrays.safetensors")
        self.meta = json.loads((FIXTURES / name / "meta.json").read_text())
        self.original_tensors = load_file(FIXTURES / name / "original_model.safetensors")
        is_baseline = name.startswith("per_pixel")
        config_class = PerPixelBaselineConfig if is_baseline else MaskFormerConfig
        model_class = PerPixelBaselineForSemanticSegmentation if is_baseline else MaskFormerForInstanceSegmentation
        feature_size = 32 if is_baseline else 64
        self.config = config_class(**CONFIGS[name], fpn_feature_size=feature_size, mask_feature_size=32, num_labels=13)
        self.model = model_class(self.config)
        self.model.load_state_dict(from_original(self.original_tensors), strict=True)

    @property
    def labels(self) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """The two images' targets on the padded canvas, as the model takes them."""
        height, width = self.meta["padded_size"]
        if isinstance(self.config, PerPixelBaselineConfig):
            label_maps = torch.full((2, height, width), 255)
            for image in (0, 1):
                label_map = self.arrays[f"target_{image}.sem_seg"]
                label_maps[image, : label_map.shape[0], : label_map.shape[1]] = label_map
            return {"labels": label_maps}
        masks = [self.arrays[f"target_{image}.masks"] for image in (0, 1)]
        return {
            "mask_labels": [
                torch.nn.functional.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1])) for mask in masks
            ],
            "class_labels": [self.arrays[f"target_{image}.labels"] for image in (0, 1)],
        }

    @property
    def pixel_mask(self) -> torch.Tensor:
        mask = torch.zeros(2, *self.meta["padded_size"], dtype=torch.int64)
        for image, (height, width) in enumerate(self.meta["image_sizes"]):
            mask[image, :height, :width] = 1
        return mask
