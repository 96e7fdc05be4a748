"""Linear layers and mask logits, with products computed by the fastest library."""

import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_maskformer_dispatch import (
    HAS_MKL_AND_ONEDNN,
    is_exporting,
    is_plain,
    is_transformed,
    register_operator,
)
from .modeling_maskformer_packing import can_cache, computes_in_bfloat16, linear_in_bfloat16


def is_intel_processor() -> bool:
    """Whether the CPU is Intel's, according to /proc/cpuinfo or, where there is none, by `platform.processor()`."""
    try:
        with open("/proc/cpuinfo") as file:
            description = file.read(1000)
    except OSError:
        description = platform.processor()
    return "GenuineIntel" in description


IS_MKL_SLOW = HAS_MKL_AND_ONEDNN and not is_intel_processor()
# With fewer positions, repacking the weights takes as long as the product.
MIN_POSITIONS = 64


class Linear(nn.Linear):
    """`torch.nn.Linear`, on a CPU in bfloat16 with packed weights, and in float32 as a convolution with a 1 x 1 kernel.

    On processors other than Intel's, MKL does not use everything they support: on an AMD Zen 5 the convolution takes
    less than half the time, forward and backward; on a Zen 4 it takes the same. On Intel's it would take longer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Takes (..., C) and returns (..., O)."""
        if can_cache(self) and computes_in_bfloat16(input, self.weight, self.bias):
            return linear_in_bfloat16(input, (self.weight,), () if self.bias is None else (self.bias,))
        if not convolution_pays(input, self.weight):
            return super().forward(input)
        if torch.compiler.is_compiling():
            return torch.ops.hf_maskformer.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def project(layers: Sequence[nn.Module], states: Tensor) -> Sequence[Tensor]:
    """Applies linear layers to the same states; at inference in bfloat16 as one product, since they are narrow.

    Takes (..., C) and returns (..., O) of each layer.
    """
    # A layer may have been replaced.
    plain = [layer for layer in layers if isinstance(layer, Linear) and type(layer).forward is Linear.forward]
    if len(plain) == len(layers) and all(map(can_cache, plain)):
        weights = [layer.weight for layer in plain]
        biases = [layer.bias for layer in plain if layer.bias is not None]
        if len(biases) in (0, len(layers)) and computes_in_bfloat16(states, *weights, *biases):
            return linear_in_bfloat16(states, weights, biases).split([len(weight) for weight in weights], -1)
    return [layer(states) for layer in layers]


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` as a convolution."""
    # One image of one row of positions; already in channels_last layout, so nothing is copied.
    positions = states.reshape(1, 1, -1, states.shape[-1]).permute(0, 3, 1, 2)
    output = F.conv2d(positions, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*states.shape[:-1], len(weight))


def convolution_pays(states: Tensor, weight: Tensor) -> bool:
    """Whether a product of states (..., C) and a matrix (O, C) is faster as a 1 x 1 convolution."""
    if not IS_MKL_SLOW or not is_plain(states, weight):
        return False
    if torch.compiler.is_compiling():
        return not torch.is_grad_enabled() and not is_transformed()
    return reaches_onednn(states)


def reaches_onednn(states: Tensor) -> bool:
    """Whether torch delegates a 1 x 1 convolution at these positions (..., C) to oneDNN, and this pays off."""
    return torch.get_num_threads() > 1 and states.numel() >= MIN_POSITIONS * states.shape[-1] > 0


def products_with_pixels(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """Dot products of mask embeddings, after each layer, and pixel embeddings (paper, section 3.3).

    Takes (L, B, Q, C) and (B, C, h, w); returns (L, B, Q, h, w).
    """
    is_fixed = not (torch.is_grad_enabled() or is_transformed() or is_exporting())
    if is_fixed and computes_in_bfloat16(embeddings, pixel_embeddings):
        embeddings, pixel_embeddings = embeddings.bfloat16(), pixel_embeddings.bfloat16()
        products = products_one_by_one
    elif is_fixed and convolution_pays(pixel_embeddings.movedim(1, -1), embeddings):
        products = products_by_convolutions
    else:
        return torch.einsum("lbqc,bchw->lbqhw", embeddings, pixel_embeddings)
    if torch.compiler.is_compiling():
        return torch.ops.hf_maskformer.products_with_pixels(embeddings, pixel_embeddings)
    return products(embeddings, pixel_embeddings)


def products_one_by_one(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """`products_with_pixels` by one product per layer and image: batched, torch would copy the pixels."""
    logits = _output_of_products(embeddings, pixel_embeddings)
    for of_layer, of_queries in zip(logits, embeddings, strict=True):
        for of_image, queries, image in zip(of_layer, of_queries, pixel_embeddings, strict=True):
            torch.mm(queries, image.flatten(1), out=of_image.flatten(1))
    return logits


def products_by_convolutions(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """`products_with_pixels`, by one convolution per layer and image with the embeddings of its queries as kernels."""
    logits = _output_of_products(embeddings, pixel_embeddings)
    if not logits.numel():
        return logits
    for of_layer, kernels in zip(logits, embeddings[..., None, None], strict=True):
        # Split: torch no longer recognises an image as channels_last once it is indexed and unsqueezed.
        for of_image, kernel, image in zip(of_layer, kernels, pixel_embeddings.split(1), strict=True):
            of_image.copy_(F.conv2d(image, kernel)[0])
    return logits


def linear_for_compiler(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiled graph calls: a visible convolution would make the compiler change the layouts around it."""
    if not reaches_onednn(states):
        return F.linear(states, weight, bias)
    return linear(states, weight, bias).contiguous()


def products_for_compiler(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """What a compiled graph calls: the compiler neither unrolls the loop over images nor specialises on it."""
    if embeddings.dtype == torch.bfloat16:
        return products_one_by_one(embeddings, pixel_embeddings)
    if not reaches_onednn(pixel_embeddings.movedim(1, -1)):
        return torch.einsum("lbqc,bchw->lbqhw", embeddings, pixel_embeddings).contiguous()
    return products_by_convolutions(embeddings, pixel_embeddings)


def _output_of_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


def _output_of_products(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    return embeddings.new_empty(*embeddings.shape[:3], *pixel_embeddings.shape[2:])


register_operator(
    "linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor", linear_for_compiler, _output_of_linear
)
register_operator(
    "products_with_pixels(Tensor embeddings, Tensor pixel_embeddings) -> Tensor",
    products_for_compiler,
    _output_of_products,
)
