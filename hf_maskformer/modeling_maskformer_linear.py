"""Linear layers whose products are taken where they are fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_maskformer_winograd import is_exported

# Of fewer positions, to arrange the weights takes as long as the product.
MIN_POSITIONS = 64
PRODUCTS_BY_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


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
        # One image of one row of positions; with the channels of each side by side, as they are, nothing is copied.
        positions = input.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        output = F.conv2d(positions, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def convolution_pays(states: Tensor, weight: Tensor) -> bool:
    # Exported graphs are read by others: they get the plain operator.
    if is_exported() or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if type(weight) not in (Tensor, nn.Parameter):  # quantised or sharded
        return False
    if not states.dtype == weight.dtype == torch.float32:
        return False
    return PRODUCTS_BY_MKL and (torch.compiler.is_compiling() or states.numel() >= MIN_POSITIONS * states.shape[-1] > 0)
