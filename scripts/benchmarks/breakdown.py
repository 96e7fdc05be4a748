"""Where the time of a call goes, and how close it comes to the peak speed of the hardware."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .measuring import Figures, Peers, time_once

# Kinds of operator by parts of their names; the first match counts.
KINDS = {
    "attention": ("scaled_dot_product", "softmax"),
    "convolutions": ("conv",),
    "products": ("mm", "linear"),
    "norms": ("norm",),
    "copies": ("copy_", "cat", "index", "gather", "roll"),
}
PEAK_SIZE, PEAK_REPEATS = 2048, 10


def add_breakdown(figures: Figures, peers: Peers, device: str, dtype: torch.dtype) -> None:
    """Adds to the figures of each peer the shares of its time by kind of operator, and the share of peak speed.

    The peak is that of a large matrix product. A peer's share is the first peer's work divided by the peer's time: one
    that needs fewer multiplications may exceed 1. A peer that does not run in torch has no shares of its time.
    """
    peak = products_per_second(device, dtype)
    first = next(iter(peers.values()))
    with OperationCounter() as counter:
        first()
    for name, run in peers.items():
        figures[name]["of_peak"] = counter.total / (figures[name]["median_ms"] / 1000) / peak
        figures[name].update(shares(run, device))


class OperationCounter(TorchDispatchMode):
    """Counts multiplications and additions; torch's own counter fails for modules called without gradients."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def shares(run: Callable[[], object], device: str) -> dict[str, float]:
    """Each kind's share of the operators' time."""
    is_cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
    times = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "others")
        times[kind] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    total = sum(times.values())
    return {f"{kind}_share": time / total for kind, time in times.items()} if total else {}


def products_per_second(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions per second in a product of two large square matrices."""
    factor = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype)
    fastest = min(time_once(lambda: factor @ factor, device)[0] for _ in range(PEAK_REPEATS))
    return 2 * PEAK_SIZE**3 / (fastest / 1000)
