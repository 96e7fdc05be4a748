"""Pixel decoder: feature maps of the backbone in, one embedding per pixel at stride 4 out (paper, section 3.2).

Letters: B images, C channels of the pyramid, h x w = H/4 x W/4 for the H x W padded image.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_maskformer_parts import GROUP_NORM_GROUPS, MaskFormerTransformerConfig
from .loss_maskformer_logits import record_projection
from .modeling_maskformer_dispatch import can_overwrite, is_hooked, is_traced
from .modeling_maskformer_packing import FoldableConvolution, can_cache
from .modeling_maskformer_transformer_layers import TransformerEncoder
from .modeling_maskformer_winograd import convolve


class XavierConv2d(nn.Conv2d):
    """A convolution with the initialisation of the paper's code: weights uniform in +-sqrt(3 / fan_in), bias 0."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        convolution = FoldableConvolution(self.weight, self.bias, self.stride, self.padding, self.dilation)
        dtype = convolution.packing_dtype(states) if can_cache(self) else None
        if dtype is not None:
            return convolution(states, dtype)
        return convolve(states, *convolution[:5])


class MaskProjection(XavierConv2d):
    """The projection to the pixel embeddings, or directly to the masks of given queries.

    The map from its input to the masks is linear. So the mask embeddings of the queries and the projection fold into
    one convolution: with Q output channels instead of C followed by a product with Q x C numbers per pixel.
    """

    def forward(self, level: Tensor, mask_embeddings: Tensor | None = None) -> Tensor:
        """Takes (B, C_pyramid, h, w) and mask embeddings (B, Q, C); returns (B, C, h, w), or masks (B, Q, h, w)."""
        if mask_embeddings is None:
            pixel_embeddings = super().forward(level)
            # Where it was measured, on CPUs; and a compiled graph has its own backward pass.
            can_go_around = level.device.type == "cpu" and pixel_embeddings.requires_grad and not is_traced()
            if can_go_around and self.bias is not None and {type(self.weight), type(self.bias)} == {nn.Parameter}:
                record_projection(pixel_embeddings, level, self.weight, self.bias)
            return pixel_embeddings
        kernels = torch.einsum("bqc,cfyx->bqfyx", mask_embeddings, self.weight)
        biases = torch.einsum("bqc,c->bq", mask_embeddings, self.bias)
        # Split: torch no longer recognises an image as channels_last once it is indexed and unsqueezed.
        return torch.cat(
            [
                convolve(image, kernel, bias, padding=self.padding)
                for image, kernel, bias in zip(level.split(1), kernels, biases, strict=True)
            ]
        )


class FeaturePyramidLayer(nn.Module):
    """Adds a finer feature map of the backbone to the pyramid.

    Shapes:
        coarse: (B, C, h', w'), the pyramid so far.
        lateral: (B, C_backbone, 2h', 2w') or close to it: for odd sizes, nearest upsampling targets that of the lateral
            map.
        returns: (B, C, 2h', 2w').
    """

    def __init__(self, feature_size: int, lateral_size: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            XavierConv2d(lateral_size, feature_size, kernel_size=1, bias=False),
            nn.GroupNorm(GROUP_NORM_GROUPS, feature_size),
        )
        self.block = conv_norm_relu(feature_size, feature_size)

    def forward(self, coarse: Tensor, lateral: Tensor) -> Tensor:
        # One by one, since a call holds its inputs until it returns: at stride 4 these maps are the memory peak.
        for module in steps_of(self.proj):
            lateral = module(lateral)
        height, width = coarse.shape[-2:]
        if can_overwrite(self.proj) and lateral.shape[-2:] == (2 * height, 2 * width):
            # Each pixel of the coarse map to the four that it covers, without an upsampled copy.
            lateral.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(coarse[:, :, :, None, :, None])
            states = lateral
        else:
            states = F.interpolate(coarse, size=lateral.shape[-2:], mode="nearest").add_(lateral)
        del coarse, lateral
        for module in steps_of(self.block):
            states = module(states)
        return states


class FeaturePyramid(nn.Module):
    """Feature pyramid network, from stride 32 down to stride 4.

    Args:
        channels: Channels of the backbone's feature maps, finest first.
        feature_size: Channels C of every level.
    """

    def __init__(self, channels: Sequence[int], feature_size: int) -> None:
        super().__init__()
        self.stem = conv_norm_relu(channels[-1], feature_size)
        self.layers = nn.ModuleList(FeaturePyramidLayer(feature_size, size) for size in reversed(channels[:-1]))

    def forward(self, features: list[Tensor], with_levels: bool = True) -> list[Tensor]:
        """Takes the feature maps finest first; returns the levels after the stem, coarsest first, or the last alone.

        The list is emptied: a map that has been used need not be kept while finer ones, which are larger, are computed.
        """
        levels = [self.stem(features.pop())]
        for layer in self.layers:
            # A module's call would keep the maps that its forward has used.
            is_plain = is_only_called(layer) and not (torch.is_grad_enabled() or is_traced())
            coarse = levels[-1:] if with_levels else levels
            levels.append((layer.forward if is_plain else layer)(coarse.pop(), features.pop()))
        return levels[1:] if with_levels else levels


class PixelDecoderOutput(NamedTuple):
    """What the pixel decoder makes of the backbone's feature maps.

    Args:
        pixel_embeddings: (B, mask_feature_size, h, w); None if not requested.
        memory: (B, C', H/32, W/32), what the transformer decoder attends to: the backbone's last feature map or, with
            encoder layers, their output.
        levels: The levels of the pyramid at strides 16, 8 and 4, or the last alone if the others are not requested.
        memory_sizes: (B, 2), how many rows and columns of the memory hold an image; None if padding is treated as
            image.
    """

    pixel_embeddings: Tensor | None
    memory: Tensor
    levels: list[Tensor]
    memory_sizes: Tensor | None


class PixelDecoder(nn.Module):
    """Feature pyramid and projection to the pixel embeddings.

    In the paper's panoptic models with a ResNet, transformer encoder layers first exchange information between the
    positions of the coarsest feature map (appendix B).

    Args:
        channels: Channels of the backbone's feature maps, finest first.
        feature_size: Channels of the pyramid, and width of the encoder layers.
        mask_feature_size: Channels of the pixel embeddings.
        config: The configuration of the encoder layers; None for none.

    Shapes:
        features: four maps (B, C_i, H/s, W/s), s = 4, 8, 16, 32.
    """

    def __init__(
        self,
        channels: Sequence[int],
        feature_size: int,
        mask_feature_size: int,
        config: MaskFormerTransformerConfig | None = None,
    ) -> None:
        super().__init__()
        self.memory_channels = channels[-1] if config is None else feature_size
        self.input_projection: nn.Module | None = None
        self.encoder: nn.Module | None = None
        if config is not None:
            self.input_projection = XavierConv2d(channels[-1], feature_size, kernel_size=1)
            self.encoder = TransformerEncoder(config, feature_size, config.pixel_decoder_layers)
        self.fpn = FeaturePyramid([*channels[:-1], self.memory_channels], feature_size)
        self.mask_projection = MaskProjection(feature_size, mask_feature_size, kernel_size=3, padding=1)

    def forward(
        self,
        features: list[Tensor],
        memory_sizes: Tensor | None = None,
        with_embeddings: bool = True,
        with_levels: bool = True,
    ) -> PixelDecoderOutput:
        """Without embeddings the last projection is left to the caller, who knows the queries (`MaskProjection`).

        The list of features is emptied, so that their memory is freed if nobody else holds them.
        """
        memory = features.pop()
        if self.input_projection is not None and self.encoder is not None:
            memory = self.encoder(self.input_projection(memory), memory_sizes)
        features.append(memory)
        levels = self.fpn(features, with_levels)
        pixel_embeddings = self.mask_projection(levels[-1]) if with_embeddings else None
        return PixelDecoderOutput(pixel_embeddings, memory, levels, memory_sizes)


def steps_of(container: nn.Module) -> Iterable[nn.Module]:
    """The modules of a plain `nn.Sequential`; the container itself if its call does more."""
    return container if type(container) is nn.Sequential and is_only_called(container) else (container,)


def is_only_called(module: nn.Module) -> bool:
    """Whether a module's call does nothing but its forward: it has no hooks and is not compiled by itself."""
    return not is_hooked(module) and module._compiled_call_impl is None


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3 x 3 convolution, group normalisation, ReLU."""
    return nn.Sequential(
        XavierConv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(GROUP_NORM_GROUPS, out_channels),
        nn.ReLU(inplace=True),
    )
