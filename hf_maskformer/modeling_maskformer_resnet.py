"""ResNet backbone (arXiv 1512.03385) as MaskFormer uses it; the names are those of checkpoints of transformers' ResNet.

Our own code because transformers has neither the deep stem nor the dilated last stage of the paper's ResNet-101c, and
no gradient checkpointing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_maskformer_parts import MaskFormerResNetConfig, is_of_type
from .modeling_maskformer_dispatch import can_overwrite, is_exporting, is_hooked, is_traced
from .modeling_maskformer_packing import FoldableConvolution, can_cache
from .modeling_maskformer_winograd import convolve

BOTTLENECK_REDUCTION = 4


class Convolution(nn.Conv2d):
    """A convolution without bias, with Kaiming initialisation (arXiv 1502.01852) by fan-out."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        is_strided = self.kernel_size == (1, 1) and self.stride != (1, 1)
        if is_strided and input.device.type == "cpu" and torch.is_grad_enabled():
            # On a CPU, torch 2.13 corrupts memory in the backward pass of such convolutions, if their input has fewer
            # than 16 channels, in channels_last layout. Without padding, only the pixels taken here matter.
            # Pooling over single pixels takes them, and keeps the layout of the gradient, which slicing does not.
            return F.conv2d(F.avg_pool2d(input, 1, self.stride), self.weight, self.bias)
        return super().forward(input)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose reset keeps statistics that were loaded from a checkpoint."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def reset_running_stats(self) -> None:
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)
        init.zeros_(self.num_batches_tracked)


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and, unless None, an activation.

    At inference on a CPU the norm is folded into the weights, which are far fewer than the pixels. Not on a GPU, where
    each of the small operations that this takes in each pass is one more launch. And not with gradients, which would
    differ from the paper's code more than necessary: summing in another order puts some ReLU on the other side of zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        activation: str | None = "relu",
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.convolution = Convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.normalization = BatchNorm(out_channels)
        self.activation = None if activation is None else activation_in_place(activation)

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Takes (B, C, h, w), returns (B, O, h', w').

        With a residual like the output, which nobody else reads: the ReLU of their sum, perhaps in place.
        """
        convolution, norm = self.convolution, self.normalization
        is_fixed = not (norm.training or torch.is_grad_enabled()) and states.device.type == "cpu"
        if is_fixed and is_untouched(convolution) and is_untouched(norm):
            geometry = (convolution.stride, convolution.padding, convolution.dilation)
            of_norm = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            fixed = FoldableConvolution(convolution.weight, None, *geometry, of_norm, norm.eps)
            dtype = fixed.packing_dtype(states) if can_cache(self) else None
            if dtype is not None:
                if residual is not None and not is_traced():
                    return fixed.packed(states, dtype)(states, residual=residual)
                if residual is None and type(self.activation) is nn.ReLU and not is_hooked(self.activation):
                    return fixed(states, dtype, "relu")
                states = fixed(states, dtype)
            else:
                weight, bias = fixed.folded()
                states = convolve(states, weight, bias, *geometry)
        else:
            states = self._normalized(convolution(states))
        if residual is not None:
            return states.add_(residual).relu_()
        return states if self.activation is None else self.activation(states)

    def _normalized(self, states: Tensor) -> Tensor:
        norm: Any = self.normalization  # or what takes its place on several GPUs
        if not (norm.training and is_recomputed()):
            return norm(states)
        # The running statistics already include this batch.
        momentum, counter = norm.momentum, norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None if counter is None else counter.clone()
        try:
            return norm(states)
        finally:
            norm.momentum, norm.num_batches_tracked = momentum, counter


class ResNetLayer(GradientCheckpointingLayer):
    """A residual layer: two 3x3 convolutions (type basic), or 1x1, 3x3 and 1x1 with a quarter of the channels inside.

    Args:
        config: Of type `resnet` or `maskformer-resnet`.
        in_channels, out_channels: Channels of input and output.
        stride: Of the 3x3 convolution (the first one), or with `downsample_in_bottleneck` of the 1x1 before it.
        dilation: Of the 3x3 convolutions.
    """

    def __init__(
        self, config: PreTrainedConfig, in_channels: int, out_channels: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = ConvNorm(in_channels, out_channels, kernel_size=1, stride=stride, activation=None)
        if config.layer_type == "basic":
            self.layer = nn.Sequential(
                ConvNorm(in_channels, out_channels, 3, stride, dilation),
                ConvNorm(out_channels, out_channels, 3, dilation=dilation, activation=None),
            )
        else:
            inside = out_channels // BOTTLENECK_REDUCTION
            strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            self.layer = nn.Sequential(
                ConvNorm(in_channels, inside, 1, strides[0]),
                ConvNorm(inside, inside, 3, strides[1], dilation),
                ConvNorm(inside, out_channels, 1, activation=None),
            )
        self.activation = activation_in_place(config.hidden_act)

    def forward(self, states: Tensor, owns_residual: bool = False) -> Tensor:
        """Takes (B, C, h, w), returns (B, O, h', w'), perhaps overwriting the residual if it owns that."""
        residual = states if self.shortcut is None else self.shortcut(states)
        *others, last = self.layer
        if owns_residual and type(self.activation) is nn.ReLU and type(last) is ConvNorm:
            for convolution in others:
                states = convolution(states)
            return last(states, residual)
        return self.activation(self.layer(states).add_(residual))


class ResNetStage(nn.Module):
    def __init__(
        self, config: PreTrainedConfig, in_channels: int, out_channels: int, stride: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ResNetLayer(
                config,
                in_channels if index == 0 else out_channels,
                out_channels,
                stride if index == 0 else 1,
                dilation,
            )
            for index, dilation in enumerate(dilations)
        )

    def forward(self, states: Tensor) -> Tensor:
        is_private = states.device.type == "cpu" and can_overwrite(self)
        is_of_layer = False
        for layer in self.layers:
            # A layer, or its shortcut, may have been replaced by a module that keeps its output.
            is_plain = type(layer) is ResNetLayer
            is_own = is_plain and (is_of_layer if layer.shortcut is None else type(layer.shortcut) is ConvNorm)
            states = layer(states, owns_residual=True) if is_private and is_own else layer(states)
            is_of_layer = is_plain
        return states


class ResNetStem(nn.Module):
    """The image to a quarter of its size, by one 7x7 or three 3x3 convolutions (deep stem) and max-pooling."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        channels, activation = config.embedding_size, config.hidden_act
        if is_of_type(config, MaskFormerResNetConfig) and config.deep_stem:
            inside = channels // 2
            self.embedder: nn.Module = nn.Sequential(
                ConvNorm(config.num_channels, inside, 3, stride=2, activation=activation),
                ConvNorm(inside, inside, 3, activation=activation),
                ConvNorm(inside, channels, 3, activation=activation),
            )
        else:
            self.embedder = ConvNorm(config.num_channels, channels, 7, stride=2, activation=activation)
        self.pooler = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.pooler(self.embedder(pixel_values))


class ResNetEncoder(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        dilations = [[1] * depth for depth in config.depths]
        if is_of_type(config, MaskFormerResNetConfig):
            dilations[-1] = list(config.last_stage_dilations)
        in_channels = [config.embedding_size, *config.hidden_sizes]
        strides = [2 if config.downsample_in_first_stage else 1] + [2] * (len(config.depths) - 1)
        self.stages = nn.ModuleList(
            ResNetStage(config, *arguments)
            for arguments in zip(in_channels[:-1], config.hidden_sizes, strides, dilations, strict=True)
        )


class ResNetBackbone(nn.Module):
    """Image to four feature maps.

    Args:
        config: Of type `resnet` or `maskformer-resnet`; `out_features` names the stages whose output is returned.

    Shapes:
        pixel_values: (B, 3, H, W), any size.
        returns: four maps (B, C_i, ~H / s, ~W / s), for common configurations s = 4, 8, 16, 32.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.out_features = list(config.out_features)
        sizes = dict(zip(config.stage_names, [config.embedding_size, *config.hidden_sizes], strict=True))
        self.channels = [sizes[name] for name in self.out_features]
        self.embedder = ResNetStem(config)
        self.encoder = ResNetEncoder(config)
        self.is_dilated = is_of_type(config, MaskFormerResNetConfig) and max(config.last_stage_dilations) > 1

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        states = self.embedder(pixel_values)
        outputs = {"stem": states}
        for index, stage in enumerate(self.encoder.stages, start=1):
            outputs[f"stage{index}"] = states = stage(states)
        *others, last = (outputs[name] for name in self.out_features)
        if pixel_values.device.type == "cpu" and not (torch.is_grad_enabled() or is_exporting()):
            # oneDNN's ReLU turns NaN into 0, so that a damaged image would have results like any other.
            nan_if_damaged = pixel_values.sum((1, 2, 3), dtype=torch.float32) * 0
            last = last + nan_if_damaged[:, None, None, None].to(last.dtype)
        return [*others, last]


def activation_in_place(name: str) -> nn.Module:
    """An activation that may overwrite its input, which nobody else reads here."""
    return nn.ReLU(inplace=True) if name == "relu" else ACT2FN[name]


def is_recomputed() -> bool:
    """Whether this forward runs within a backward pass, as gradient checkpointing repeats it there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_untouched(module: nn.Module) -> bool:
    """Whether a module's call does what its class does: adapters replace modules."""
    return type(module) in (Convolution, BatchNorm, nn.SyncBatchNorm) and not is_hooked(module)
