"""Weights repacked into oneDNN's layout, cached across forward passes at inference on a CPU.

Folding, rounding and repacking the weights of a ResNet-50 takes an eighth of a forward pass in float32, and where a
processor has bfloat16 units (AMX) half as long as all products. Each pass checks whether weights have changed
(`CacheEntry`) and if so repacks them. Parameters and checkpoints are not modified.
"""

import ctypes
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .modeling_maskformer_dispatch import (
    HAS_ONEDNN_OPERATORS,
    PLAIN_TYPES,
    has_plain_dispatch,
    is_hooked,
    is_inference,
    register_operator,
)
from .modeling_maskformer_winograd import (
    WINOGRAD_GEOMETRY,
    cached_winograd_pays,
    convolve,
    transformed_kernel,
    winograd,
)

HAS_BFLOAT16_OPERATORS = (
    HAS_ONEDNN_OPERATORS
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


# For how many sizes of feature maps a convolution caches its weights.
MAX_SIZES = 256


class FoldableConvolution(NamedTuple):
    """A convolution and optionally the batch normalisation after it, which at inference scales and shifts each channel.

    Args:
        weight, bias: (O, C, k, k), and (O,) or None; with a norm None.
        stride, padding, dilation: As in `torch.nn.Conv2d`.
        norm: Its weight, bias, running mean and variance, or empty.
        eps: Of the norm, or None without one.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    norm: Sequence[Tensor] = ()
    eps: float | None = None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution with the norm folded in."""
        if self.eps is None:
            return self.weight, self.bias
        weight, bias, mean, variance = self.norm
        dtype = self.weight.dtype
        # Half precision rounds only the product, as in the norm itself.
        precise = torch.promote_types(dtype, torch.float32)
        scale = weight.to(precise) * torch.rsqrt(variance.to(precise) + self.eps)
        return (self.weight * scale[:, None, None, None]).to(dtype), (bias - mean * scale).to(dtype)

    def finite(self) -> tuple[Tensor, Tensor | None]:
        """As `folded`; raises a ValueError for NaN and infinity, which oneDNN's ReLU would hide: NaN becomes 0."""
        weight, bias = self.folded()
        for values in (weight, bias):
            # A sum is finite only if all its terms are. It may still overflow, so only then each is checked.
            if values is not None and not values.sum().isfinite() and not values.isfinite().all():
                raise ValueError(
                    f"A convolution with weight {tuple(weight.shape)}, including the norm after it if any, is not "
                    "finite, so the predictions of this model are meaningless. Load another checkpoint."
                )
        return weight, bias

    def packing_dtype(self, states: Tensor) -> torch.dtype | None:
        """The dtype in which packed weights apply to these states (B, C, h, w); None if they are not to be packed."""
        return packing_dtype(states, self.weight, self.bias, *self.norm) if states.dim() == 4 else None

    def __call__(self, states: Tensor, dtype: torch.dtype, activation: str = "none") -> Tensor:
        """Takes (B, C, h, w), returns (B, O, h', w') in this dtype; the activation is "relu" or "none"."""
        if torch.compiler.is_compiling():
            weight, bias, *geometry, norm, eps = self
            return torch.ops.hf_maskformer.convolve(states, weight, bias, *geometry, norm, eps, dtype, activation)
        return self.packed(states, dtype)(states, activation)

    def packed(self, states: Tensor, dtype: torch.dtype) -> "PackedConvolution | PackedWinograd":
        """Reused from an earlier pass where possible."""
        geometry = (tuple(self.stride), tuple(self.padding), tuple(self.dilation))
        weights = (self.bias, *self.norm)
        is_plain = dtype == torch.float32 and geometry == WINOGRAD_GEOMETRY
        if is_plain and cached_winograd_pays(states, self.weight):
            by_winograd = partial(PackedWinograd, self)
            return cached(by_winograd, PackedWinograd, self.eps, self.weight, *weights)
        # The weight layout of some 1 x 1 convolutions depends on the size of the feature map. In that of another size
        # they take ten times as long, as they repack the weights in each pass.
        by_size: dict[Sequence[int], PackedConvolution] = cached(
            dict, dtype, (geometry, self.eps), self.weight, *weights
        )
        packed = by_size.get(states.shape)
        if packed is None:
            packed = PackedConvolution(self, dtype, states.shape)
            # Few layouts serve all sizes, mostly one.
            packed = next((other for other in list(by_size.values()) if other.is_arranged_as(packed)), packed)
            if len(by_size) >= MAX_SIZES:
                by_size.clear()
            by_size[states.shape] = packed
        return packed


class PackedConvolution:
    """A convolution in bfloat16 or float32.

    Args:
        convolution: What to pack.
        dtype: Of inputs, weights and outputs.
        size: Of the expected inputs, (B, C, h, w); others work too, perhaps slowly.
    """

    def __init__(self, convolution: FoldableConvolution, dtype: torch.dtype, size: Sequence[int]) -> None:
        weight, bias = convolution.finite()
        _, _, stride, padding, dilation, *_ = convolution
        self.dtype = dtype
        self.geometry = (stride, padding, dilation)
        arrange = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = arrange(weight.to(dtype), padding, stride, dilation, 1, size)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)

    def __call__(self, states: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """Takes (B, C, h, w), returns (B, O, h', w').

        The activation is "relu" or "none". With a residual: the ReLU of their sum, in place if it has the dtype and
        layout of the output.
        """
        if residual is not None and not self._adds_to(residual):
            return self(states).add_(residual).relu_()
        states = states.to(self.dtype)
        stride, padding, dilation = self.geometry
        arguments = (states, self.weight, self.bias, padding, stride, dilation, 1)
        if residual is not None:
            # Sum and ReLU fused into the write: a separate output would need new memory, and be read again.
            return torch.ops.mkldnn._convolution_pointwise_.binary(residual, *arguments, "add", 1.0, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise(*arguments, activation, [], "")

    def is_arranged_as(self, other: "PackedConvolution") -> bool:
        """Whether the weights for another size have the same layout; both are of the same convolution."""
        return np.array_equal(memory_of(self.weight), memory_of(other.weight))

    def _adds_to(self, residual: Tensor) -> bool:
        is_plain = type(residual) is Tensor and residual.dtype == self.dtype
        return is_plain and residual.is_contiguous(memory_format=torch.channels_last)


class PackedWinograd:
    """A Winograd convolution in float32 with a 3 x 3 kernel, which is stored transformed."""

    def __init__(self, convolution: FoldableConvolution) -> None:
        weight, bias = convolution.finite()
        self.kernel = transformed_kernel(weight)
        self.bias = None if bias is None else bias.detach().clone()

    def __call__(self, states: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """As `PackedConvolution`, but the sum with a residual is not in place."""
        states = winograd(states, self.kernel, self.bias)
        if residual is not None:
            return states.add_(residual).relu_()
        return states.relu_() if activation == "relu" else states


class PackedLinear:
    """A linear layer in bfloat16, or several of the same input as one product: O counts the outputs of all.

    Args:
        weights, biases: (O', C) and (O',) of each, or no biases.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(list(weights)).bfloat16())
        self.bias = torch.cat(list(biases)).bfloat16() if biases else None

    def __call__(self, states: Tensor) -> Tensor:
        """Takes (..., C) and returns (..., O)."""
        return torch.ops.mkldnn._linear_pointwise(states.bfloat16(), self.weight, self.bias, "none", [], "")


def linear_in_bfloat16(states: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Takes (..., C), and weights (O', C) and biases (O',) of each of some layers, or no biases; returns (..., O)."""
    if torch.compiler.is_compiling():
        return torch.ops.hf_maskformer.linear_in_bfloat16(states, weights, biases)
    return packed_linear(weights, biases)(states)


def packed_linear(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> PackedLinear:
    """Reused from an earlier pass where possible."""
    return cached(partial(PackedLinear, weights, biases), (PackedLinear, len(weights)), None, *weights, *biases)


def can_cache(module: nn.Module) -> bool:
    """Whether anything derived from a module's weights may be cached.

    Not where its call has hooks, which may load and offload the weights, nor in distributed runs, whose processes may
    each hold a shard of the weights. Nor in training: gradient checkpointing also runs without gradients.
    """
    if module.training or not is_inference() or is_hooked(module):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def computes_in_bfloat16(states: Tensor, *weights: Tensor | None) -> bool:
    """Whether an operation on these computes in bfloat16 on a CPU, also under autocast."""
    return packing_dtype(states, *weights) == torch.bfloat16


def packing_dtype(states: Tensor, *weights: Tensor | None) -> torch.dtype | None:
    """bfloat16 or float32, if an operation on these computes in it on a CPU, also under autocast, with oneDNN."""
    dtype = states.dtype
    dtypes: tuple[torch.dtype, ...] = (dtype,)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        dtypes = (dtype, torch.float32)
        if dtype == torch.float32:
            return None
    if not (HAS_BFLOAT16_OPERATORS if dtype == torch.bfloat16 else HAS_ONEDNN_OPERATORS and dtype == torch.float32):
        return None
    # A plain loop, since layers call this hundreds of times per pass.
    for tensor in (states, *weights):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided:
            return None
        if tensor.dtype not in dtypes or not tensor.is_cpu or not tensor.numel():
            return None
    return dtype


Made = TypeVar("Made")


class CacheEntry:
    """A result of settings and weights, and how to tell whether these are still the same.

    torch counts most changes of a tensor, but not those through `.data` or by optimisers with `fused=True`, so a few
    values are compared too: all of a vector; of a matrix or kernel the first row (output) and at least one value of
    each other, in another column than in the row before.
    """

    value: Any

    def __init__(self, settings: Any, weights: Sequence[Tensor | None]) -> None:
        self.settings = settings
        self.fingerprints = fingerprints(weights)
        self.samples = [values for weight in weights if weight is not None for values in samples(weight)]
        self.seen = self._values()

    def is_current(self, weights: Sequence[Tensor | None]) -> bool:
        # The fingerprints first: they ensure that the memory of the samples is still that of the weights.
        return self.fingerprints == fingerprints(weights) and self.seen == self._values()

    def _values(self) -> list[bytes]:
        return [values.tobytes() for values in self.samples]


def fingerprints(weights: Sequence[Tensor | None]) -> list[tuple]:
    """Addresses, dtypes, layouts and version counters of weights; inference mode has no counter."""
    return [
        (
            weight.data_ptr(),
            -1 if weight.is_inference() else weight._version,
            weight.dtype,
            weight.shape,
            weight.stride(),
        )
        for weight in weights
        if weight is not None
    ]


def samples(weight: Tensor) -> list[np.ndarray]:
    """Views of some values of a tensor that do not own its memory: others may want to free it.

    numpy reads a few values in a tenth of the time that torch takes.
    """
    size, count = weight.element_size(), weight.numel()
    memory: Any = (ctypes.c_char * (count * size)).from_address(weight.data_ptr())
    row = count if weight.dim() < 2 else weight[0].numel()
    found = [np.ndarray(row, f"V{size}", memory)]
    if row < count:
        step = max(row - 1, 1)
        found.append(np.ndarray(-(-count // step), f"V{size}", memory, strides=(step * size,)))
    return found


def memory_of(packed: Tensor) -> np.ndarray:
    """The bytes of weights that oneDNN has repacked, while these exist: torch itself does not expose them."""
    count = torch.ops.mkldnn._nbytes(packed)
    return np.frombuffer((ctypes.c_ubyte * count).from_address(torch.ops.mkldnn.data_ptr(packed)), np.uint8)


# By the first weight, with which an entry is freed, and by kind.
_CACHE: MutableMapping[Tensor, dict[Any, CacheEntry]] = WeakIdKeyDictionary()


def cached(make: Callable[[], Made], kind: Any, settings: Any, weight: Tensor, *weights: Tensor | None) -> Made:
    """The result of `make` for settings and weights, from an earlier pass if they are still the same.

    Only the last one of each kind is cached.
    """
    all_weights = (weight, *weights)
    of_weight = _CACHE.get(weight, {})
    entry = of_weight.get(kind)
    if entry is not None:
        if not entry.is_current(all_weights):
            of_weight.clear()  # of other kinds too, which may never be requested again
        elif entry.settings == settings:
            return entry.value
    if not all(is_watched(weight) for weight in all_weights if weight is not None):
        return make()
    # Recorded first, so that the next pass sees what somebody changes meanwhile.
    entry = CacheEntry(settings, all_weights)
    entry.value = make()
    _CACHE.setdefault(weight, {})[kind] = entry
    return entry.value


def is_watched(weight: Tensor) -> bool:
    """Whether changes of a weight can be detected: inference mode does not count them, and gaps would be sampled."""
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return is_dense and not weight.is_inference()


def clear_cache(module: nn.Module) -> None:
    """Frees what is cached of the weights of a module and its submodules."""
    for weight in module.parameters() if _CACHE else ():
        _CACHE.pop(weight, None)


def linear_in_graph(states: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """What a compiled graph calls for `linear_in_bfloat16`.

    Does not check whether a graph is being compiled, which is true in all threads while one compiles.
    """
    if has_plain_dispatch() and states.numel():
        return packed_linear(weights, biases)(states)
    bias = torch.cat(list(biases)).bfloat16() if biases else None
    return F.linear(states.bfloat16(), torch.cat(list(weights)).bfloat16(), bias)


def convolve_in_graph(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    norm: Sequence[Tensor],
    eps: float | None,
    dtype: torch.dtype,
    activation: str,
) -> Tensor:
    """What a compiled graph calls for a `FoldableConvolution` and its activation."""
    convolution = FoldableConvolution(weight, bias, tuple(stride), tuple(padding), tuple(dilation), norm, eps)
    if has_plain_dispatch() and states.numel():
        output = convolution.packed(states, dtype)(states, activation)
    else:
        weight, bias = convolution.folded()
        bias = None if bias is None else bias.to(dtype)
        output = convolve(states.to(dtype), weight.to(dtype), bias, *convolution[2:5])
        output = output.relu_() if activation == "relu" else output
    return output.contiguous(memory_format=torch.channels_last)


def _output_of_linear(states: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return states.new_empty(*states.shape[:-1], sum(weight.shape[0] for weight in weights), dtype=torch.bfloat16)


def _output_of_convolution(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *settings: Any,
) -> Tensor:
    size = []
    axes = zip(states.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    for length, kernel, step, pad, dilate in axes:
        size.append((length + 2 * pad - dilate * (kernel - 1) - 1) // step + 1)
    _, _, dtype, _ = settings
    return states.new_empty(states.shape[0], *size, weight.shape[0], dtype=dtype).permute(0, 3, 1, 2)


register_operator(
    "linear_in_bfloat16(Tensor states, Tensor[] weights, Tensor[] biases) -> Tensor",
    linear_in_graph,
    _output_of_linear,
)
register_operator(
    "convolve(Tensor states, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, Tensor[] norm, "
    "float? eps, ScalarType dtype, str activation) -> Tensor",
    convolve_in_graph,
    _output_of_convolution,
)
