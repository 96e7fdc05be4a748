"""Weights in bfloat16 in the order in which oneDNN multiplies them, kept from pass to pass at inference on a CPU.

Where a processor has units for bfloat16 (AMX), to fold, round and arrange the weights of a ResNet-50 would take half as
long as all its products. Each pass looks whether weights have changed, see `Kept`, and then makes them anew. Parameters
and checkpoints stay as they are.
"""

import ctypes
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .modeling_maskformer_winograd import (
    HAS_ONEDNN_OPERATORS,
    PLAIN_TYPES,
    add_convolution,
    is_hooked,
    is_traced,
    is_transformed,
)

HAS_PACKING_OPERATORS = (
    HAS_ONEDNN_OPERATORS
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


class PackedConvolution:
    """A convolution in bfloat16.

    Args:
        weight, bias: (O, C, k, k), and (O,) or None.
        stride, padding, dilation: As of `torch.nn.Conv2d`.
        size: Of the images to expect, (B, C, h, w); others are taken too.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, size: Sequence[int]
    ) -> None:
        self.geometry = (stride, padding, dilation)
        arrange = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = arrange(weight.bfloat16(), padding, stride, dilation, 1, size)
        self.bias = None if bias is None else bias.bfloat16()

    def __call__(self, states: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """Takes (B, C, h, w), gives (B, O, h', w').

        The activation is "relu" or "none". With a residual like the output: the ReLU of their sum, in its memory.
        """
        states = states.bfloat16()
        if residual is not None:
            return add_convolution(residual, states, self.weight, self.bias, *self.geometry)
        stride, padding, dilation = self.geometry
        convolution = torch.ops.mkldnn._convolution_pointwise
        return convolution(states, self.weight, self.bias, padding, stride, dilation, 1, activation, [], "")

    def adds_to(self, residual: Tensor) -> bool:
        """Whether a residual has the type and layout of the output, so that the sum can take its memory."""
        is_plain = type(residual) is Tensor and residual.dtype == torch.bfloat16
        return is_plain and residual.is_contiguous(memory_format=torch.channels_last)


class PackedLinear:
    """A linear layer in bfloat16, or several that read the same as one product: O counts the outputs of all."""

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).bfloat16()

    def __call__(self, states: Tensor) -> Tensor:
        """Takes (..., C) and gives (..., O)."""
        return torch.ops.mkldnn._linear_pointwise(states.bfloat16(), self.weight, self.bias, "none", [], "")


def packs(module: nn.Module, states: Tensor, *weights: Tensor | None) -> bool:
    """Whether a layer packs its weights for these states, see `infers_in_bfloat16`.

    Not where its call has hooks, which may bring the weights and take them away again, and not with processes beside
    it, which may hold a part of the weights each. Nor in training: gradient checkpointing runs without gradient too.
    """
    if module.training or not infers_in_bfloat16(states, *weights) or is_hooked(module):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def infers_in_bfloat16(*tensors: Tensor | None) -> bool:
    """Whether an operation on these computes in bfloat16 on a CPU, and nobody wants gradients or its graph."""
    if is_traced() or torch.is_grad_enabled() or is_transformed():
        return False
    # Tools that count or record operators have to see plain ones.
    if torch._C._len_torch_dispatch_stack() or not torch._C._get_mkldnn_enabled():
        return False
    return computes_in_bfloat16(*tensors)


def computes_in_bfloat16(*tensors: Tensor | None) -> bool:
    """Whether an operation on these computes in bfloat16 on a CPU, by autocast too."""
    if not HAS_PACKING_OPERATORS:
        return False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        dtypes = (torch.bfloat16, torch.float32)
    # A plain loop, since layers ask this hundreds of times in a pass.
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
            return False
        if tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.numel():
            return False
    return True


Made = TypeVar("Made")


class Kept:
    """What was made of weights and settings, and how to see that they are still the same.

    torch counts most changes of a tensor. It does not count those through `.data` and of optimisers with `fused=True`,
    so a few values are compared too: of a vector all, of a matrix or kernel at least one of each row, each in another
    column than that of the row before.
    """

    def __init__(self, made: Any, settings: tuple, weights: Sequence[Tensor | None]) -> None:
        self.made = made
        self.settings = settings
        self.marks = marks(weights)
        self.samples = [sample(weight) for weight in weights if weight is not None]
        self.seen = self._values()

    def is_current(self, settings: tuple, weights: Sequence[Tensor | None]) -> bool:
        # The marks first: they say that the memory of the samples is still that of the weights.
        return self.settings == settings and self.marks == marks(weights) and self.seen == self._values()

    def _values(self) -> list[bytes]:
        return [values.tobytes() for values in self.samples]


def marks(weights: Sequence[Tensor | None]) -> list[tuple] | None:
    """Where weights lie, what they are and how often they were changed; None if that cannot be said."""
    found = []
    for weight in weights:
        if weight is not None:
            if weight.is_inference():  # made in inference mode, where changes are not counted
                return None
            found.append((weight.data_ptr(), weight._version, weight.dtype, weight.shape))
    return found


def sample(weight: Tensor) -> np.ndarray:
    """Some values of a tensor where they lie, without a part in the memory: others may want to free it.

    numpy reads a few values in a tenth of the time that torch takes.
    """
    step = 1 if weight.dim() < 2 else max(weight[0].numel() - 1, 1)
    size = weight.element_size()
    memory: Any = (ctypes.c_char * (weight.numel() * size)).from_address(weight.data_ptr())
    return np.ndarray(-(-weight.numel() // step), f"V{size}", memory, strides=(step * size,))


_KEPT: MutableMapping[nn.Module, Kept] = WeakKeyDictionary()


def keep(module: nn.Module, make: Callable[[], Made], settings: tuple, *weights: Tensor | None) -> Made:
    """What `make` makes of a module's settings and weights, from an earlier pass if they are still the same."""
    kept = _KEPT.get(module)
    if kept is not None and kept.is_current(settings, weights):
        return kept.made
    made = make()
    # Of weights with gaps in their memory, samples would be those of others.
    if marks(weights) is not None and all(is_dense(weight) for weight in weights if weight is not None):
        _KEPT[module] = Kept(made, settings, weights)
    return made


def is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def forget(module: nn.Module) -> None:
    """Frees what is kept of a module and those inside."""
    for part in module.modules() if _KEPT else ():
        _KEPT.pop(part, None)
