"""Compares the speed of this package with transformers' own MaskFormer: same weights, one run, interleaved, medians.

    python scripts/benchmark.py forward --backbone swin-tiny --size 512
    python scripts/benchmark.py step --backbone resnet50 --json step.json
    python scripts/benchmark.py criterion
    python scripts/benchmark.py criterion --plot docs/images/criterion.png

`forward` is an evaluation pass, `step` a training step (forward, loss, backward) with deep supervision in both.
`criterion` is the loss and its gradient alone, from the embeddings of queries and pixels on: mask logits, matching and
losses after 6 decoder layers in both, on all pixels and on sampled points in ours. A ratio above 1 says how many times
faster ours is. Peak memory is what a run holds at most above what was held before it: on a GPU what its allocator
says, for `criterion` on a CPU the sum of torch's allocations and releases, from a run of its own.
"""

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher
from transformers.models.maskformer.modeling_maskformer import MaskFormerLoss as StockLoss

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerLoss

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet", **STAGES},
    "resnet101": {"model_type": "resnet", "depths": [3, 4, 23, 3], **STAGES},
    "swin-tiny": {"model_type": "swin", "window_size": 7, "drop_path_rate": 0.0, **STAGES},
    "swin-base": {"drop_path_rate": 0.0, **transformers.MaskFormerConfig().backbone_config.to_dict()},
}
NUM_LABELS = 150
NUM_QUERIES = 100


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.plot:
        plot_growth(arguments)
        return
    peers = SUBCOMMANDS[arguments.subcommand](arguments)
    figures = measure(peers, arguments.repeats, arguments.device)
    if arguments.subcommand == "criterion" and arguments.device == "cpu":
        for name, run in peers.items():
            figures[name]["peak_mib"] = peak_cpu_memory(run)
    for name in figures:
        figures[name]["ratio"] = figures["stock"]["median_ms"] / figures[name]["median_ms"]
    report = {"settings": {**vars(arguments), **versions()}, **figures}
    for name in figures:
        print(f"{name:<12}", "  ".join(f"{key} {value:.2f}" for key, value in figures[name].items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def forward(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """An evaluation pass of each model."""
    stock, ours = (model.eval() for model in build_models(arguments, deep_supervision=False))
    pixel_values = random_images(arguments)
    check_equal(stock, ours, pixel_values)

    def run(model: torch.nn.Module) -> None:
        with torch.no_grad(), autocast(arguments):
            model(pixel_values)

    return {"stock": lambda: run(stock), "ours": lambda: run(ours)}


def step(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Forward, loss and backward. Each model gets its own best form of the targets."""
    stock, ours = (model.train() for model in build_models(arguments, deep_supervision=True))
    pixel_values = random_images(arguments)
    index_map, labels = random_segments(arguments)
    masks = [
        (image == torch.arange(arguments.segments, device=image.device)[:, None, None]).float() for image in index_map
    ]

    def run(model: torch.nn.Module, **inputs: Any) -> None:
        model.zero_grad()
        with autocast(arguments):
            loss = model(pixel_values, **inputs).loss
        loss.backward()

    # Without hidden states transformers crashes under deep supervision; with them it has one more layer than ours.
    return {
        "stock": lambda: run(stock, mask_labels=masks, class_labels=list(labels), output_hidden_states=True),
        "ours": lambda: run(ours, mask_labels=index_map, class_labels=labels),
    }


def criterion(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Mask logits, matching, losses and their gradient with respect to embeddings and class logits."""
    batch, side, layers = arguments.batch, arguments.size // 4, 6
    index_map, labels = random_segments(arguments)
    masks = [
        (image == torch.arange(arguments.segments, device=image.device)[:, None, None]).float() for image in index_map
    ]
    mask_embeddings = torch.randn(layers, batch, NUM_QUERIES, 256, device=arguments.device) / 16
    pixel_embeddings = torch.randn(batch, 256, side, side, device=arguments.device)
    class_logits = torch.randn(layers, batch, NUM_QUERIES, NUM_LABELS + 1, device=arguments.device)
    inputs = [tensor.requires_grad_() for tensor in (mask_embeddings, pixel_embeddings, class_logits)]

    stock_weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    matcher = MaskFormerHungarianMatcher(cost_class=1.0, cost_dice=1.0, cost_mask=20.0)
    stock = StockLoss(NUM_LABELS, matcher, stock_weights, eos_coef=0.1).to(arguments.device)
    ours = {
        "ours": MaskFormerLoss(NUM_LABELS).to(arguments.device),
        "ours-points": MaskFormerLoss(NUM_LABELS, train_num_points=arguments.points).to(arguments.device),
    }

    def mask_logits() -> torch.Tensor:
        return torch.einsum("lbqc,bchw->lbqhw", mask_embeddings, pixel_embeddings)

    def stock_loss() -> torch.Tensor:
        *auxiliary, last = (
            {"masks_queries_logits": masks, "class_queries_logits": classes}
            for masks, classes in zip(mask_logits(), class_logits, strict=True)
        )
        terms = stock(**last, mask_labels=masks, class_labels=list(labels), auxiliary_predictions=auxiliary)
        return sum(stock_weights[name.rstrip("_0123456789")] * term for name, term in terms.items())

    def our_loss(loss: MaskFormerLoss) -> torch.Tensor:
        with torch.no_grad():
            logits = mask_logits()
        return loss(class_logits, logits, index_map, labels, embeddings=(mask_embeddings, pixel_embeddings))[0]

    def run(loss: Callable[[], torch.Tensor]) -> None:
        with autocast(arguments):
            total = loss()
        total.backward()
        for tensor in inputs:  # at the end, so that every run begins with the same memory
            tensor.grad = None

    # At 100 segments stock's criterion would take 12 GB, so the plot goes without it.
    if not arguments.plot and not torch.isclose(
        stock_loss(), our_loss(ours["ours"]), rtol=1e-2 if arguments.bf16 else 1e-4
    ):
        raise RuntimeError("The losses differ, so their times mean nothing.")
    return {
        "stock": lambda: run(stock_loss),
        **{name: functools.partial(run, functools.partial(our_loss, loss)) for name, loss in ours.items()},
    }


SUBCOMMANDS = {"forward": forward, "step": step, "criterion": criterion}


def plot_growth(arguments: argparse.Namespace) -> None:
    """Draws the processor time of our criterion against the number of pixels and of segments, and prints it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sweeps = (("size", (256, 384, 512, 640, 768)), ("segments", (5, 15, 30, 50, 75, 100)))
    for axis, (setting, steps) in zip(axes, sweeps, strict=True):
        times: dict[str, list[float]] = {}
        for value in steps:
            peers = criterion(argparse.Namespace(**{**vars(arguments), setting: value}))
            del peers["stock"]
            for name, run in peers.items():
                run()  # warms up
                times.setdefault(name, []).append(min(processor_time(run) for _ in range(arguments.repeats)))
            print(setting, value, "  ".join(f"{name} {1000 * values[-1]:.0f} ms" for name, values in times.items()))
        positions = [value**2 / 1e6 for value in steps] if setting == "size" else steps
        for name, values in times.items():
            axis.plot(positions, values, marker="o", label=name)
        axis.set(
            xlabel="megapixels per image" if setting == "size" else "segments per image",
            ylabel="processor seconds",
            ylim=0,
        )
    axes[0].legend()
    figure.savefig(arguments.plot, dpi=110)


def processor_time(run: Callable[[], object]) -> float:
    """Seconds that all threads of a run were at work, whatever else the machine did."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_cpu_memory(run: Callable[[], object]) -> float:
    """The most MiB that torch's allocator held during a run, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0)) / 2**20


def build_models(arguments: argparse.Namespace, deep_supervision: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """transformers' model and ours with the same random weights."""
    # Batch norm trains in transformers, so ours must not save that work here.
    config = MaskFormerConfig(
        backbone_config=BACKBONES[arguments.backbone],
        num_labels=NUM_LABELS,
        deep_supervision=deep_supervision,
        freeze_batch_norm=not deep_supervision,
    )
    ours = MaskFormerForInstanceSegmentation(config)
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        stock = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
            folder, use_auxiliary_loss=deep_supervision
        )
    return stock.to(arguments.device), ours.to(arguments.device)


def check_equal(stock: torch.nn.Module, ours: torch.nn.Module, pixel_values: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = (model(pixel_values).masks_queries_logits for model in (stock, ours))
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    # GPUs round products to TF32 where they may.
    if difference > (1e-2 if pixel_values.is_cuda else 1e-4):
        raise RuntimeError(f"The models differ by {difference:.1e} of the largest logit, so their times mean nothing.")


def measure(peers: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Any]:
    """Median time of each peer over rounds in which all take turns, so that a slow moment hits all alike."""
    is_cuda = device.startswith("cuda")
    times: dict[str, list[float]] = {name: [] for name in peers}
    memory: dict[str, float] = {}
    for turn in range(repeats + 1):  # the first round warms up
        for name, run in peers.items():
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
                at_rest = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if is_cuda:
                torch.cuda.synchronize()
                memory[name] = (torch.cuda.max_memory_allocated() - at_rest) / 2**20
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "median_ms": statistics.median(values),
            "fastest_ms": min(values),
            **({"peak_mib": memory[name]} if is_cuda else {}),
        }
        for name, values in times.items()
    }


def random_images(arguments: argparse.Namespace) -> torch.Tensor:
    return torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)


def random_segments(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectangular segments as an index map (B, H, W), and their labels (B, N)."""
    # Every segment owns a cell or more of a 16 x 16 grid.
    cells = torch.stack([torch.randperm(256) for _ in range(arguments.batch)]) % arguments.segments
    cells = cells.view(-1, 1, 16, 16).float()
    index_map = torch.nn.functional.interpolate(cells, size=(arguments.size, arguments.size))[:, 0].long()
    labels = torch.randint(NUM_LABELS, (arguments.batch, arguments.segments))
    return index_map.to(arguments.device), labels.to(arguments.device)


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    device_type = torch.device(arguments.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=arguments.bf16)


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device_name": device}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subcommand", choices=SUBCOMMANDS)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, default=512, help="side of the square images, in pixels")
    parser.add_argument("--batch", type=int, default=None, help="images; default 1 for forward, 2 for the others")
    parser.add_argument("--segments", type=int, default=15, help="segments per image, at most 256")
    parser.add_argument("--points", type=int, default=12544, help="points per mask of the point-sampled criterion")
    parser.add_argument("--plot", help="criterion: draw processor time against pixels and segments (needs matplotlib)")
    parser.add_argument("--bf16", action="store_true", help="run both under bfloat16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 0 leaves the choice to torch")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (1 if arguments.subcommand == "forward" else 2)
    if arguments.plot and arguments.subcommand != "criterion":
        parser.error("--plot is for criterion.")
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
