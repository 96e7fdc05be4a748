"""Weights in bfloat16 in the order in which oneDNN multiplies them, kept from pass to pass at inference on a CPU.

Where a processor has units for bfloat16 (AMX), to fold, round and arrange the weights of a ResNet-50 would take half as
long as all its products. A pass sees whether somebody has changed the weights, and then makes them anew. Parameters
and checkpoints stay as they are.
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .modeling_maskformer_winograd import HAS_ONEDNN_OPERATORS, is_traced, is_transformed

HAS_PACKING_OPERATORS = (
    HAS_ONEDNN_OPERATORS
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


PLAIN_TYPES = (Tensor, nn.Parameter)


class PackedConvolution:
    """A convolution in bfloat16.

    Args:
        convolution: Whose stride, padding and dilation it has.
        weight, bias: (O, C, k, k), and (O,) or None.
        size: Of the images to expect, (B, C, h, w); others are taken too.
    """

    def __init__(self, convolution: nn.Conv2d, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> None:
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.bfloat16(), *self.geometry, size)
        self.bias = None if bias is None else bias.bfloat16()

    def __call__(self, states: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """Takes (B, C, h, w), gives (B, O, h', w').

        The activation is "relu" or "none". With a residual like the output: the ReLU of their sum, in its memory.
        """
        arguments = (states.bfloat16(), self.weight, self.bias, *self.geometry)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(*arguments, activation, [], "")
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        return add(residual, *arguments, "add", 1.0, "relu", [], "")


class PackedLinear:
    """A linear layer in bfloat16, or several that read the same as one product: O counts the outputs of all."""

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).bfloat16()

    def __call__(self, states: Tensor) -> Tensor:
        """Takes (..., C) and gives (..., O)."""
        return torch.ops.mkldnn._linear_pointwise(states.bfloat16(), self.weight, self.bias, "none", [], "")


def infers_in_bfloat16(*tensors: Tensor | None) -> bool:
    """Whether an operation on these computes in bfloat16 on a CPU, and nobody wants gradients or its graph."""
    if is_traced() or torch.is_grad_enabled() or is_transformed():
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
        if type(tensor) not in PLAIN_TYPES:  # quantised, sharded or without values
            return False
        if tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.numel():
            return False
    return True


Made = TypeVar("Made")


class Kept:
    """What was made of tensors, and how to see that they are still the same.

    torch counts changes but those through `.data`, as averages of weights and adapters make them. So a few values are
    compared too: of a vector all, of a matrix or kernel one of each row, each in another column.
    """

    def __init__(self, sources: Sequence[Tensor | None], made: Any) -> None:
        self.made = made
        self.marks = marks(sources)
        self.samples = [sample(source) for source in sources if source is not None]
        self.seen = self._values()

    def is_current(self, sources: Sequence[Tensor | None]) -> bool:
        return self.marks == marks(sources) and self.seen == self._values()

    def _values(self) -> list[bytes]:
        return [values.tobytes() for values in self.samples]


def marks(sources: Sequence[Tensor | None]) -> list[tuple[int, int]] | None:
    """Where tensors lie and how often they were changed; None if that cannot be said."""
    found = []
    for source in sources:
        if source is not None:
            if source.is_inference():  # made in inference mode, where changes are not counted
                return None
            found.append((source.data_ptr(), source._version))
    return found


def sample(source: Tensor) -> np.ndarray:
    """Some values of a tensor, where they lie. numpy reads a few in a tenth of the time that torch takes."""
    step = 1 if source.dim() < 2 else source[0].numel() + 1
    values = source.detach().as_strided((-(-source.numel() // step),), (step,))
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


_KEPT: MutableMapping[nn.Module, Kept] = WeakKeyDictionary()


def keep(module: nn.Module, make: Callable[[], Made], *sources: Tensor | None) -> Made:
    """What `make` makes of these weights of a module, from an earlier pass if they are still the same."""
    kept = _KEPT.get(module)
    if kept is not None and kept.is_current(sources):
        return kept.made
    made = make()
    # Of weights with gaps in their memory, samples would be those of others.
    if marks(sources) is not None and all(is_dense(source) for source in sources if source is not None):
        _KEPT[module] = Kept(sources, made)
    return made


def is_dense(source: Tensor) -> bool:
    return source.is_contiguous() or source.is_contiguous(memory_format=torch.channels_last)


def forget(module: nn.Module) -> None:
    """Frees what is kept of a module and those inside, as they are to be trained."""
    for part in module.modules():
        _KEPT.pop(part, None)
