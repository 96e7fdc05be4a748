"""A GPU that is not there: tensors that say they are on one, compute on the CPU, and refuse what a GPU would refuse.

PyTorch lets a backend be written in Python, once per process, so import this in a process of its own only. Of what CUDA
refuses and waits for, this knows what this package may come upon.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten


class Backend(_DummyBackendModule):
    """What autocast asks of a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", Backend())
DEVICE = torch.device("gpu:0")

# As CUDA has it: copies cross devices, and indices may be on the CPU.
CROSSES_DEVICES = {aten.copy_.default, aten._to_copy.default}
TAKES_INDICES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# What reads values, or makes a tensor of a size that depends on them, waits for the device; so do blocking copies.
WAITS = {
    aten.bincount.default,
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
# What CUDA has for floating-point numbers only.
PRODUCTS = {aten.addmm.default, aten.baddbmm.default, aten.bmm.default, aten.convolution.default, aten.mm.default}
# Autocast, by CUDA's lists as far as a model of this package meets them.
CAST = (torch.float32, torch.bfloat16, torch.float16)
IN_LOWER_PRECISION = ("conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
IN_FLOAT32 = (
    "layer_norm",
    "group_norm",
    "softmax.int",
    "log_softmax.int",
    "nll_loss",
    "cross_entropy_loss",
    "pow.Tensor_Scalar",
    "prod",
    "binary_cross_entropy_with_logits",
)

library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
library.fallback(torch.library.fallthrough_kernel)
aten_library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")


def _cast(name: str, dtype: torch.dtype | None) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        target = dtype or torch.get_autocast_dtype(DEVICE.type)
        with torch._C._DisableAutocast():
            args, kwargs = tree_map_only(
                Tensor, lambda tensor: tensor.to(target) if tensor.dtype in CAST else tensor, (args, kwargs)
            )
            return operator(*args, **kwargs)

    aten_library.impl(name, kernel)


for names, dtype in ((IN_LOWER_PRECISION, None), (IN_FLOAT32, torch.float32)):
    for name in names:
        _cast(name, dtype)


class EmulatedTensor(Tensor):
    """A tensor on the emulated GPU, around one of the CPU."""

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "EmulatedTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device=DEVICE
        )
        tensor.on_cpu = on_cpu
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} outside of EmulatedGPU.")

    # What torch does without its dispatcher, and so not through EmulatedGPU.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)


class EmulatedGPU(TorchDispatchMode):
    """Where the emulated GPU works.

    Attributes:
        waits: how often the host waited for the device, by operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> Any:
        # Else torch.tensor(..., device=) would move data by kernels of the backend, which it does not have.
        self._lifts_on_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts_on_cpu)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        emulated = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
        target = kwargs.get("device")
        goes_to_gpu = bool(emulated) if target is None else torch.device(target).type == DEVICE.type
        if function is aten.copy_.default:
            goes_to_gpu = isinstance(args[0], EmulatedTensor)
        elif emulated and function not in CROSSES_DEVICES:
            _refuse_mixed(function, args, tensors)
            if function in PRODUCTS and not all(tensor.is_floating_point() for tensor in tensors):
                raise RuntimeError(f"{function} is not implemented for integers.")
        if (emulated and function in WAITS) or _waits(function, args, kwargs, goes_to_gpu):
            self.waits[str(function)] += 1
        if target is not None and goes_to_gpu:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(EmulatedTensor, lambda tensor: tensor.on_cpu, (args, kwargs))
        # Autocast has had its turn, by the rules for the GPU.
        with torch._C._DisableAutocast():
            results = function(*args, **kwargs)
        if not goes_to_gpu:
            return results
        known = {id(tensor.on_cpu): tensor for tensor in emulated}  # what is changed in place stays itself
        return tree_map_only(
            Tensor, lambda result: known[id(result)] if id(result) in known else EmulatedTensor(result), results
        )


def _waits(function: Any, args: Any, kwargs: Any, goes_to_gpu: bool) -> bool:
    if function in TAKES_INDICES:
        # True and false become positions first.
        return goes_to_gpu and any(index is not None and index.dtype == torch.bool for index in args[1])
    if function not in CROSSES_DEVICES or (function is aten._to_copy.default and kwargs.get("non_blocking")):
        return False
    source = args[1] if function is aten.copy_.default else args[0]
    return isinstance(source, EmulatedTensor) != goes_to_gpu and not (
        function is aten.copy_.default and args[2:] == (True,)
    )


def _refuse_mixed(function: Any, args: Any, tensors: list[Tensor]) -> None:
    if function in TAKES_INDICES and isinstance(args[0], EmulatedTensor):
        tensors = [value for value in (args[0], *args[2:3]) if isinstance(value, Tensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim() > 0]
    if strangers or (function in TAKES_INDICES and not isinstance(args[0], EmulatedTensor)):
        devices = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but got {devices}.")
