"""When the network may take fast paths of its own, and its operators for compiled graphs.

The fast paths need plain tensors on a CPU, and no transform and no exported graph. Those that cache weights or
overwrite an input also require that nobody reads intermediate results: no gradient, hook or tool that counts operators.
They are taken where all of this is known to hold; elsewhere torch's own are.

One of them is to work in place. A module may do so if nobody else reads its input (`can_overwrite`), and if its caller
owns the input: the output of a module known to return new memory, as any module may have been replaced by one that
keeps its output.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# On x86-64 torch delegates float32 matrix products to MKL and convolutions to oneDNN.
HAS_MKL_AND_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
# Others are quantised, sharded or without values.
PLAIN_TYPES = (Tensor, nn.Parameter)
# Operators of torch's compiler: to repack the weights of a convolution, here for many strips of an image, to add to a
# residual, and to read the repacked weights.
HAS_ONEDNN_OPERATORS = HAS_MKL_AND_ONEDNN and all(
    hasattr(torch.ops.mkldnn, name)
    for name in (
        "_reorder_convolution_weight",
        "_convolution_pointwise",
        "_convolution_pointwise_",
        "data_ptr",
        "_nbytes",
    )
)
_LIBRARIES: list[torch.library.Library] = []


def is_plain(states: Tensor, weight: Tensor) -> bool:
    """Whether these are plain float32 tensors on a CPU, for which torch has oneDNN and its operators."""
    # GPU libraries have it built in, and exported graphs are for other runtimes: they get the plain operator.
    if is_exporting() or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if type(states) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        return False
    return HAS_ONEDNN_OPERATORS and states.dtype == weight.dtype == torch.float32


def is_inference() -> bool:
    """Whether nobody needs gradients, or a graph or count of plain operators."""
    if torch.is_grad_enabled() or is_exporting() or is_transformed():
        return False
    # A compiled graph checks when it runs.
    return torch.compiler.is_compiling() or has_plain_dispatch()


def has_plain_dispatch() -> bool:
    """Whether no tool intercepts the operators and oneDNN is not disabled."""
    return not torch._C._len_torch_dispatch_stack() and torch._C._get_mkldnn_enabled()


def is_transformed() -> bool:
    """Whether `torch.vmap`, `torch.func.grad` and the like are active, or forward-mode differentiation.

    They have to see plain operators; the operators of this package have no rules for them.
    """
    functorch = torch._C._functorch
    # By type, since torch's compiler does not treat a stack without interpreters as None.
    is_in_function = isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)
    return is_in_function or torch.autograd.forward_ad._current_level >= 0


def can_overwrite(module: nn.Module) -> bool:
    """Whether nobody but a module itself reads its intermediate results, as backward passes and hooks do."""
    if torch.is_grad_enabled() or is_traced() or is_transformed():
        return False
    return not any(map(is_hooked, module.modules()))


def is_hooked(module: nn.Module) -> bool:
    """Whether others take part in a module's call, as offloading and tools that inspect a model do."""
    # Not by attributes: a missing one takes a module longer than all the rest, and hundreds of modules are checked.
    own = vars(module)
    has_hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or nn.modules.module._has_any_global_hook()
    return bool(has_hooks or "forward" in own or "_hf_hook" in own)


def is_traced() -> bool:
    """Whether a graph is being recorded, in which loops over parts of a map would be unrolled for one size."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether a graph is being recorded for other runtimes, which holds only torch's own operators."""
    # Not `torch.compiler.is_exporting()`, which in torch 2.11 is true in every graph that is being compiled.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def is_for_any_size(size: Sequence[int]) -> bool:
    """Whether a graph is being compiled with a dynamic height or width."""
    if not torch.compiler.is_compiling() or is_exporting():
        return False
    # Here, as it imports all of sympy.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(length) for length in size)


def without_view(feature_map: Tensor) -> Tensor:
    """(B, C, h, w), contiguous in graphs for any size.

    Inductor cannot sort the strides of a view with channels last, for a convolution or a backward pass.
    """
    return feature_map.contiguous() if is_for_any_size(feature_map.shape[-2:]) else feature_map


def register_operator(
    schema: str,
    function: Callable[..., Tensor],
    output: Callable[..., Tensor],
    key: str = "CPU",
    gradient: tuple[Callable[..., None], Callable[..., tuple]] | None = None,
) -> None:
    """Registers a function as an operator for compiled graphs; `output` is its fake implementation.

    Plain `torch.library.custom_op` would do, but takes longer per call than a small convolution.

    Args:
        key: Its dispatch key: for CPUs, or `CompositeExplicitAutograd` for every device.
        gradient: `setup_context` and `backward`, as in a `torch.autograd.Function`.
    """
    name = schema.partition("(")[0]
    if hasattr(torch.ops.hf_maskformer, name):  # by copies of these files that a checkpoint brought along
        return
    library = torch.library.Library("hf_maskformer", "FRAGMENT")
    _LIBRARIES.append(library)  # its operator is removed with it
    library.define(schema)
    library.impl(name, function, key)
    torch.library.register_fake(f"hf_maskformer::{name}", output, lib=library)
    if gradient is not None:
        setup_context, backward = gradient
        torch.library.register_autograd(f"hf_maskformer::{name}", backward, setup_context=setup_context, lib=library)
