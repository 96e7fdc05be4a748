"""Linear layers and mask logits, whose products are taken where they are fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_maskformer_winograd import HAS_MKL_AND_ONEDNN, is_exported

# Of fewer positions, to arrange the weights takes as long as the product.
MIN_POSITIONS = 64


class Linear(nn.Linear):
    """`torch.nn.Linear`, on a CPU in float32 as a convolution with a kernel of 1 x 1.

    On x86-64 torch leaves matrix products in float32 to MKL, and convolutions to oneDNN. Where the processor is not
    Intel's, MKL does not use all that it can do: on an AMD Zen 5 the convolution takes less than half the time, forward
    and backward; elsewhere it takes the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Takes (..., C) and gives (..., O)."""
        if not convolution_pays(input, self.weight):
            return super().forward(input)
        if torch.compiler.is_compiling():
            return torch.ops.hf_maskformer.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by a convolution."""
    # One image of one row of positions; with the channels of each side by side, as they are, nothing is copied.
    positions = states.reshape(1, 1, -1, states.shape[-1]).permute(0, 3, 1, 2)
    output = F.conv2d(positions, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*states.shape[:-1], len(weight))


def convolution_pays(states: Tensor, weight: Tensor) -> bool:
    # Exported graphs are read by others: they get the plain operator.
    if is_exported() or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if type(weight) not in (Tensor, nn.Parameter):  # quantised or sharded
        return False
    if not states.dtype == weight.dtype == torch.float32 or not HAS_MKL_AND_ONEDNN:
        return False
    if torch.compiler.is_compiling():
        return not torch.is_grad_enabled()
    return states.numel() >= MIN_POSITIONS * states.shape[-1] > 0


def products_with_pixels(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """Products of the embeddings of queries, after each layer, and pixels (paper, section 3.3).

    Takes (L, B, Q, C) and (B, C, h, w); gives (L, B, Q, h, w), contiguous on a CPU.
    """
    if not convolution_pays(pixel_embeddings.movedim(1, -1), embeddings):
        return torch.einsum("lbqc,bchw->lbqhw", embeddings, pixel_embeddings)
    if torch.compiler.is_compiling():
        return torch.ops.hf_maskformer.products_with_pixels(embeddings, pixel_embeddings)
    return products_by_convolutions(embeddings, pixel_embeddings)


def products_by_convolutions(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """`products_with_pixels`, by one convolution per image with the embeddings of all its queries as kernels."""
    kernels = embeddings.transpose(0, 1).flatten(1, 2)[..., None, None]  # (B, L * Q, C, 1, 1)
    # Split, since of a part that gets its first dimension back torch no longer sees that it is channels_last.
    pairs = zip(pixel_embeddings.split(1), kernels, strict=True)
    # Masks one after the other, as products of matrices give them.
    logits = torch.cat([F.conv2d(image, kernel).contiguous() for image, kernel in pairs])
    return logits.unflatten(1, (len(embeddings), -1)).transpose(0, 1).contiguous()


def linear_for_compiler(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiled graph calls: a convolution in sight of the compiler would have it rearrange all around it."""
    if not states.numel():
        return F.linear(states, weight, bias)
    return linear(states, weight, bias).contiguous()


def products_for_compiler(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
    """What a compiled graph calls: the compiler neither unrolls the loop over images nor asks for their number."""
    if not (pixel_embeddings.numel() and embeddings.numel()):
        return torch.einsum("lbqc,bchw->lbqhw", embeddings, pixel_embeddings)
    return products_by_convolutions(embeddings, pixel_embeddings)


def _register_operators() -> None:
    if hasattr(torch.ops.hf_maskformer, "linear"):  # a copy of this file that a checkpoint brought along
        return
    library = torch.library.Library("hf_maskformer", "FRAGMENT")
    _LIBRARIES.append(library)  # it takes its operators along when it goes
    library.define("linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
    library.define("products_with_pixels(Tensor embeddings, Tensor pixel_embeddings) -> Tensor")
    library.impl("linear", linear_for_compiler, "CPU")
    library.impl("products_with_pixels", products_for_compiler, "CPU")

    def output_of_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return states.new_empty(*states.shape[:-1], weight.shape[0])

    def output_of_products(embeddings: Tensor, pixel_embeddings: Tensor) -> Tensor:
        return embeddings.new_empty(*embeddings.shape[:3], *pixel_embeddings.shape[2:])

    torch.library.register_fake("hf_maskformer::linear", output_of_linear, lib=library)
    torch.library.register_fake("hf_maskformer::products_with_pixels", output_of_products, lib=library)


_LIBRARIES: list[torch.library.Library] = []
_register_operators()
