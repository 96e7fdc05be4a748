"""Linear layers whose products are taken where they are fastest."""

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


def linear_for_compiler(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiled graph calls: a convolution in sight of the compiler would have it rearrange all around it."""
    if not states.numel():
        return F.linear(states, weight, bias)
    return linear(states, weight, bias).contiguous()


def _register_operator() -> None:
    if hasattr(torch.ops.hf_maskformer, "linear"):  # a copy of this file that a checkpoint brought along
        return
    library = torch.library.Library("hf_maskformer", "FRAGMENT")
    _LIBRARIES.append(library)  # it takes its operator along when it goes
    library.define("linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", linear_for_compiler, "CPU")

    def output_of_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return states.new_empty(*states.shape[:-1], weight.shape[0])

    torch.library.register_fake("hf_maskformer::linear", output_of_linear, lib=library)


_LIBRARIES: list[torch.library.Library] = []
_register_operator()
