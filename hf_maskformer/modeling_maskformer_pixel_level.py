"""The paper's pixel-level module: from an image to the feature maps of a backbone and to pixel embeddings.

Letters: B images; H x W is the padded image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_maskformer_parts import MaskFormerTransformerConfig, errors_as_value_errors, is_of_type
from .modeling_maskformer_dispatch import is_exporting, is_transformed
from .modeling_maskformer_feature_pyramid import SimpleFeaturePyramid, build_transformers_backbone
from .modeling_maskformer_pixel_decoder import PixelDecoder, PixelDecoderOutput
from .modeling_maskformer_resnet import ResNetBackbone
from .modeling_maskformer_swin import SwinBackbone

STRIDES = (4, 8, 16, 32)  # of the backbone's feature maps
OWN_BACKBONES: dict[str, type[nn.Module]] = {
    "resnet": ResNetBackbone,
    "maskformer-resnet": ResNetBackbone,
    "swin": SwinBackbone,
    "maskformer-swin": SwinBackbone,
    "maskformer-simple-feature-pyramid": SimpleFeaturePyramid,
}


class PixelLevelModule(nn.Module):
    """Backbone and pixel decoder.

    Shapes:
        pixel_values: (B, 3, H, W).
        returns: the backbone's four feature maps, or the last alone, and what the pixel decoder makes of them.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.encoder = build_backbone(config.backbone_config)
        self.num_channels = getattr(config.backbone_config, "num_channels", None)  # of images; not all backbones say
        self.freeze_batch_norm = config.freeze_batch_norm
        transformer = config.decoder_config
        has_encoder = is_of_type(transformer, MaskFormerTransformerConfig) and transformer.pixel_decoder_layers > 0
        self.decoder = PixelDecoder(
            self.encoder.channels,
            config.fpn_feature_size,
            config.mask_feature_size,
            transformer if has_encoder else None,
        )
        self.train(self.training)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        with_embeddings: bool = True,
        with_features: bool = False,
    ) -> tuple[tuple[Tensor, ...], PixelDecoderOutput]:
        """With a `pixel_mask` (B, H, W), transformer encoder layers ignore the padding.

        Without features the pixel decoder frees each map of the backbone but the last once it has used it, and likewise
        the levels of the pyramid, which are then not among its outputs.

        Raises a ValueError unless these are images with the backbone's number of channels.
        """
        check_images(pixel_values, self.num_channels)
        # Convolutions are fastest in channels_last layout; what follows keeps it.
        is_safe = self._is_safe_with_channels_last(pixel_values)
        images = pixel_values.contiguous(memory_format=torch.channels_last) if is_safe else pixel_values
        is_of_transformers = isinstance(self.encoder, PreTrainedModel)
        # A list of our own: the pixel decoder empties it.
        features = list(transformers_feature_maps(self.encoder, images) if is_of_transformers else self.encoder(images))
        del images
        memory_sizes = None
        if pixel_mask is not None:
            memory_sizes = covered_part(*sizes_in_batch(pixel_values, pixel_mask), features[-1].shape[-2:])
        returned = tuple(features) if with_features else (features[-1],)
        return returned, self.decoder(features, memory_sizes, with_embeddings, with_levels=with_features)

    def _is_safe_with_channels_last(self, pixel_values: Tensor) -> bool:
        if is_transformed():  # torch.vmap does not support this layout
            return False
        if pixel_values.is_cuda or not torch.is_grad_enabled():
            return True
        # On a CPU, torch 2.13 corrupts memory in the backward pass of some narrow convolutions in that layout: strided
        # 1 x 1 ones, which third-party backbones may have, and dilated ones in bfloat16.
        if pixel_values.device.type != "cpu" or not isinstance(self.encoder, ResNetBackbone):
            return False
        is_single = pixel_values.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return is_single or not self.encoder.is_dilated

    def train(self, mode: bool = True) -> "PixelLevelModule":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # Here rather than once: loading replaces the parameters, then calls eval().
                    module.eval().requires_grad_(False)
        return self


def build_backbone(config: PreTrainedConfig) -> Any:
    """The backbone of a configuration: one of ours, or what `AutoBackbone` builds. All have `channels`.

    Raises:
        ValueError: There is no such backbone.
    """
    own = OWN_BACKBONES.get(config.model_type)
    # Each type has its own rules for its fields, some of which only its modules know.
    with errors_as_value_errors("backbone_config"):
        return build_transformers_backbone(config) if own is None else own(config)


def transformers_feature_maps(backbone: PreTrainedModel, pixel_values: Tensor) -> Sequence[Tensor]:
    """The feature maps of a backbone that is not ours, whose strides show only in the maps.

    Raises:
        ValueError: The image is too small for it, or its strides are not 4, 8, 16 and 32.
    """
    height, width = pixel_values.shape[-2:]
    if min(height, width) < STRIDES[-1]:
        raise ValueError(
            f"pixel_values are {height} x {width} pixels, but a {type(backbone).__name__} needs at least "
            f"{STRIDES[-1]} each way. Pad them: size_divisor={STRIDES[-1]} of the image processor."
        )
    feature_maps = backbone(pixel_values).feature_maps
    heights = [feature_map.shape[-2] for feature_map in feature_maps]
    # Sides that are not divisible may be rounded either way.
    fits = [height // stride <= found <= -(-height // stride) for found, stride in zip(heights, STRIDES, strict=False)]
    if len(fits) != len(STRIDES) or not all(fits):
        found = tuple(round(height / found) for found in heights)
        raise ValueError(
            f"The feature maps of {type(backbone).__name__} have the strides {found}, but the pixel decoder needs "
            f"{STRIDES}. Choose other out_features in backbone_config, or another backbone."
        )
    return feature_maps


def check_images(pixel_values: Tensor, num_channels: int | None) -> None:
    """Raises a ValueError unless this is a batch of images with so many channels.

    oneDNN's own error does not say what is wrong.
    """
    if is_exporting():
        return
    shape = tuple(pixel_values.shape)
    # One by one and not with `in`, which fails for symbolic sizes, as under torch.compile.
    if len(shape) != 4 or any(side == 0 for side in shape) or (num_channels or shape[1]) != shape[1]:
        hint = " The image processor makes such a batch." if num_channels in (3, None) else ""
        raise ValueError(
            f"pixel_values have the shape {shape}, but the model takes (images, {num_channels or 'channels'}, height, "
            f"width), none of them 0.{hint}"
        )


def sizes_in_batch(pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(height, width) of each image without and with its padding, both (B, 2) int64.

    Images lie at the top left, so the numbers of the mask's rows and columns that hold any image give the size. Raises
    a ValueError for a mask whose shape does not match the images.
    """
    shape = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if pixel_mask is not None and pixel_mask.shape != shape:
        raise ValueError(
            f"pixel_mask has the shape {tuple(pixel_mask.shape)}, but the images are {tuple(pixel_values.shape)}: give "
            f"one number for each pixel, {shape}, 1 in the image and 0 in its padding."
        )
    # Not from a list of numbers: to copy it to a GPU, the host would wait for everything queued there.
    batch_size, device = pixel_values.shape[0], pixel_values.device
    lengths = [torch.full((batch_size,), side, dtype=torch.int64, device=device) for side in pixel_values.shape[-2:]]
    padded_sizes = torch.stack(lengths, dim=1)
    if pixel_mask is None:
        return padded_sizes, padded_sizes
    is_image = pixel_mask.bool()
    return torch.stack((is_image.any(2).sum(1), is_image.any(1).sum(1)), dim=1), padded_sizes


def covered_part(image_sizes: Tensor, padded_sizes: Tensor, size: Sequence[int]) -> Tensor:
    """How many rows and columns of a feature map of this size hold at least a pixel of each image, (B, 2) int64."""
    scaled = torch.stack([lengths * length for lengths, length in zip(image_sizes.unbind(1), size, strict=True)], dim=1)
    return (scaled + padded_sizes - 1) // padded_sizes
