"""How every benchmark measures: time with all peers taking turns, memory in a separate call."""

import ctypes
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from transformers.utils import is_torchvision_available

Peers = Mapping[str, Callable[[], object]]
Comparison = tuple[str, Peers]  # a name, and what is compared under it
Figures = dict[str, dict[str, float]]


def measure(peers: Peers, repeats: int, device: str = "cpu") -> Figures:
    """Times and peak memory of each peer, and its speed-up over the first peer.

    All peers take turns in each round, so that a slow moment affects all of them.

    Returns:
        For each peer `median_ms` and `fastest_ms` of the rounds; `processor_ms`, the lowest CPU time of all threads in
        a round, whatever else the machine did; `peak_mib` if available; `ratio`, of the medians.
    """
    memory: dict[str, float | None] = {}
    for name, run in peers.items():
        run()  # warms up
        memory[name] = peak_memory(run, device)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, run in peers.items():
            rounds[name].append(time_once(run, device))
    figures: Figures = {}
    for name, times in rounds.items():
        elapsed, at_work = zip(*times, strict=True)
        figures[name] = {
            "median_ms": statistics.median(elapsed),
            "fastest_ms": min(elapsed),
            "processor_ms": min(at_work),
        }
        peak = memory[name]
        if peak is not None:
            figures[name]["peak_mib"] = peak
    first = next(iter(figures.values()))["median_ms"]
    for values in figures.values():
        values["ratio"] = first / values["median_ms"]
    return figures


def time_once(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time of a call, and CPU time of all threads of this process, in milliseconds."""
    synchronize(device)
    start, start_at_work = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - start_at_work)


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """The peak memory of a call in MiB, above what was allocated before.

    On a GPU that is what torch's allocator hands out; otherwise the memory of the process, including numpy's and
    Pillow's, which is available on Linux only: elsewhere it is None.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated() / 2**20
        run()
        return torch.cuda.max_memory_allocated() / 2**20 - at_rest
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that was not returned would be reused first, uncounted
    clear.write_text("5")  # resets the peak
    at_rest = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - at_rest


def process_memory(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at the peak."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 2**10


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, str | None]:
    """What the figures depend on: versions and the processor or GPU. torchvision counts only if it imports."""
    is_cuda = device.startswith("cuda")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision") if is_torchvision_available() else None,
        "transformers": transformers.__version__,
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
    }
