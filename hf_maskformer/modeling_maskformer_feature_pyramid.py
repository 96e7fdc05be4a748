"""A pyramid for plain vision transformers (arXiv 2203.16527, section 3): strides 4 to 32 from the last map alone.

Letters: B images, p side of a patch in pixels, C width of the transformer; H x W is the padded image.
"""

import contextlib
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from .configuration_maskformer_parts import SimpleFeaturePyramidConfig


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of each pixel of (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Plain vision transformer with a pyramid on its last feature map.

    The maps have the strides p/4, p/2, p and 2p: 4 to 32 for patches of 16 pixels. The paper's convolutions on each
    level are left to the pixel decoder, which has them anyway.

    Args:
        config: Holds the configuration of the vision transformer.

    Shapes:
        pixel_values: (B, 3, H, W); H and W are multiples of p.
        returns: maps with C/4, C/2, C and C channels.
    """

    def __init__(self, config: SimpleFeaturePyramidConfig) -> None:
        super().__init__()
        self.patch_size: int = config.backbone_config.patch_size
        self.backbone = build_transformers_backbone(config.backbone_config)
        # From its pre-training on masked images; distributed training would wait for its gradient.
        self.backbone.embeddings.mask_token.requires_grad_(False)
        dim = self.backbone.channels[-1]
        self.channels = [dim // 4, dim // 2, dim, dim]
        self.levels = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2),
                    ChannelNorm(dim // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, ceil_mode=True),
            )
        )

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Raises a ValueError for images that are not a whole number of patches."""
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values are {height} x {width} pixels, but this backbone splits images into whole patches of "
                f"{self.patch_size} x {self.patch_size}. Pad to a multiple of that: size_divisor={self.patch_size} of "
                "the image processor."
            )
        last_map = self.backbone(pixel_values).feature_maps[-1]
        return [level(last_map) for level in self.levels]


def build_transformers_backbone(config: PreTrainedConfig) -> Any:
    """A backbone from transformers, with the attention implementation of its configuration if it has that."""
    requested = config._attn_implementation
    # With one that it does not have, building it would fail.
    config._attn_implementation = None
    backbone = AutoBackbone.from_config(config)
    if requested is not None:
        switch_attention(backbone, requested)
    return backbone


def switch_attention(backbone: PreTrainedModel, implementation: str) -> None:
    """Sets the attention implementation of a backbone that has it; others keep theirs."""
    with contextlib.suppress(ValueError):
        backbone.set_attn_implementation(implementation)
