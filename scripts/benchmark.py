"""Compares the speed of this package with transformers' own MaskFormer: same weights, one run, interleaved, medians.

    python scripts/benchmark.py forward --backbone swin-tiny --size 512
    python scripts/benchmark.py step --backbone resnet50 --json step.json

    python scripts/benchmark.py postprocess
    python scripts/benchmark.py preprocess

`forward` is an evaluation pass, `step` a training step (forward, loss, backward) with deep supervision in both. A
ratio above 1 says how many times faster ours is. On a GPU the peak memory is reported too, above what both models
hold at rest.

`postprocess` turns the logits of one image (input 640 x 640, 100 queries, 150 classes, 20 confident segments) into
segmentations of 1024 x 1365; "naive" is the paper's order written down with whole tensors. `preprocess` makes a batch
of 8 images of 480 x 640, with and without maps of 20 segments. On Linux `postprocess` also reports by how much the peak
of the process's memory rises in one call. Their ratios are to the first peer of each comparison, ours.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.models.maskformer.image_processing_pil_maskformer import (
    MaskFormerImageProcessorPil as StockImageProcessor,
)

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet", **STAGES},
    "resnet101": {"model_type": "resnet", "depths": [3, 4, 23, 3], **STAGES},
    "swin-tiny": {"model_type": "swin", "window_size": 7, "drop_path_rate": 0.0, **STAGES},
    "swin-base": {"drop_path_rate": 0.0, **transformers.MaskFormerConfig().backbone_config.to_dict()},
}
NUM_LABELS = 150
NUM_QUERIES = 100
NUM_SEGMENTS = 15
INPUT_SIZE, TARGET_SIZE = (640, 640), (1024, 1365)  # of postprocess
BATCH_SIZES = ((512, 2048), (800, 1333))  # of preprocess, shortest and longest edge


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.subcommand in COMPARISONS:
        compare(arguments)
        return
    peers = SUBCOMMANDS[arguments.subcommand](arguments)
    figures = measure(peers, arguments.repeats, arguments.device)
    figures["ratio"] = figures["stock"]["median_ms"] / figures["ours"]["median_ms"]
    report = {"settings": {**vars(arguments), **versions()}, **figures}
    for name in ("stock", "ours"):
        print(f"{name:<6}", "  ".join(f"{key} {value:.1f}" for key, value in figures[name].items()))
    print(f"ratio  {figures['ratio']:.2f}")
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
    masks = [(image == torch.arange(NUM_SEGMENTS, device=image.device)[:, None, None]).float() for image in index_map]

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


SUBCOMMANDS = {"forward": forward, "step": step}


def postprocess(arguments: argparse.Namespace) -> dict[str, dict[str, Callable[[], object]]]:
    """What each kind of post-processing is compared with."""
    class_logits, mask_logits = (logits.to(arguments.device) for logits in confident_scene())
    outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    stock, ours = StockImageProcessor(), MaskFormerImageProcessor()
    options = {"target_sizes": [TARGET_SIZE]}

    def naive() -> torch.Tensor:
        labels = class_logits[0].softmax(-1)[:, :-1]
        masks = F.interpolate(mask_logits, size=INPUT_SIZE, mode="bilinear")[0].sigmoid()
        scores = torch.einsum("qk,qhw->khw", labels, masks)
        return F.interpolate(scores[None], size=TARGET_SIZE, mode="bilinear")[0].argmax(0)

    def semantic(mode: str) -> Callable[[], object]:
        return lambda: ours.post_process_semantic_segmentation(outputs, mode=mode, **options)

    return {
        "semantic": {
            "paper": semantic("paper"),
            "direct": semantic("direct"),
            "fast": semantic("fast"),
            "stock": lambda: stock.post_process_semantic_segmentation(outputs, **options),
            "naive": naive,
        },
        "panoptic": {
            "ours": lambda: ours.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set(), **options),
            "stock": lambda: stock.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set(), **options),
        },
        **{
            f"instance{suffix}": {
                "ours": lambda flags=flags: ours.post_process_instance_segmentation(outputs, **options, **flags),
                "stock": lambda flags=flags: stock.post_process_instance_segmentation(outputs, **options, **flags),
            }
            for suffix, flags in (
                ("", {}),
                (", masks", {"return_binary_maps": True}),
                (", run lengths", {"return_coco_annotation": True}),
            )
        },
    }


def preprocess(arguments: argparse.Namespace) -> dict[str, dict[str, Callable[[], object]]]:
    """Batches with and without targets at two common sizes. Ours makes index maps; "ours, masks" what stock makes."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (8, 60, 80, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC) for pixels in coarse]
    # 4 x 5 rectangles, each with an id of its own
    maps = [np.arange(20, dtype=np.uint8).reshape(4, 5).repeat(120, 0).repeat(128, 1)] * len(images)
    stock_forms = {"stock": StockImageProcessor}
    try:  # an installed torchvision that does not fit torch is common
        from transformers import MaskFormerImageProcessor as TorchvisionImageProcessor

        TorchvisionImageProcessor()
        stock_forms["stock, torchvision"] = TorchvisionImageProcessor
    except Exception as error:
        print(f"Without transformers' torchvision form: {str(error).strip().splitlines()[0]}")
    comparisons: dict[str, dict[str, Callable[[], object]]] = {}
    for shortest, longest in BATCH_SIZES:
        size = {"shortest_edge": shortest, "longest_edge": longest}
        processors = {name: form(size=size) for name, form in stock_forms.items()}
        ours = MaskFormerImageProcessor(size=size)
        comparisons[f"images {shortest}"] = {"ours": partial(ours, images)} | {
            name: partial(processor, images, return_tensors="pt") for name, processor in processors.items()
        }
        comparisons[f"images and maps {shortest}"] = {
            "ours": partial(ours, images, maps, target_format="segment_map"),
            "ours, masks": partial(ours, images, maps),
            **{name: partial(processor, images, maps, return_tensors="pt") for name, processor in processors.items()},
        }
        batches = [run() for run in (comparisons[f"images and maps {shortest}"][name] for name in ("ours", "stock"))]
        targets, stock_targets = (sum(each.nbytes for each in batch["mask_labels"]) / 2**20 for batch in batches)
        print(f"targets at {shortest}: {targets:.1f} MiB, stock {stock_targets:.1f} MiB")
    return comparisons


COMPARISONS = {"postprocess": postprocess, "preprocess": preprocess}


def compare(arguments: argparse.Namespace) -> None:
    """Prints the figures of every comparison, with the ratio of each peer to its first."""
    report: dict[str, Any] = {"settings": {**vars(arguments), **versions()}}
    for name, peers in COMPARISONS[arguments.subcommand](arguments).items():
        # First of all, before the allocator keeps what it once had.
        memory = (
            {peer: peak_memory(run) for peer, run in peers.items()} if arguments.subcommand == "postprocess" else {}
        )
        figures = measure(peers, arguments.repeats, arguments.device)
        for peer, values in figures.items():
            if memory.get(peer) is not None:
                values.setdefault("peak_mib", memory[peer])
            values["ratio"] = values["median_ms"] / figures[next(iter(peers))]["median_ms"]
            print(f"{name:<22} {peer:<20}", "  ".join(f"{key} {value:.2f}" for key, value in values.items()))
        report[name] = figures
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def peak_memory(run: Callable[[], object]) -> float | None:
    """By how many MiB the memory of the process rises at most during one call; None where Linux's files are missing."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts again from here

    def read(field: str) -> float:
        return int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10

    at_rest = read("VmRSS")
    run()
    return read("VmHWM") - at_rest


def confident_scene(num_segments: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, Q, K + 1) and (1, Q, h, w) of a model that is sure of wavy regions around random centres."""
    height, width = (side // 4 for side in INPUT_SIZE)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.rand(num_segments, 2, 1, 1) * torch.tensor([height, width])[:, None, None]
    distances = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2).sqrt()
    waves = F.interpolate(torch.randn(1, num_segments, 12, 12), size=(height, width), mode="bicubic")[0]
    distances = distances + 6 * waves
    nearest, second = distances.topk(2, dim=0, largest=False).values
    margins = torch.where(distances == nearest, second, nearest) - distances
    noise = torch.randn(NUM_QUERIES, height, width)
    mask_logits = 0.5 * noise - 8
    mask_logits[:num_segments] = margins.clamp(-9, 9) + 0.3 * noise[:num_segments]
    class_logits = torch.randn(NUM_QUERIES, NUM_LABELS + 1)
    class_logits[num_segments:, -1] += 12
    class_logits[range(num_segments), torch.randperm(NUM_LABELS)[:num_segments]] += 11
    order = torch.randperm(NUM_QUERIES)
    return class_logits[None, order], mask_logits[None, order]


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
    cells = torch.randint(NUM_SEGMENTS, (arguments.batch, 1, 8, 8)).float()
    index_map = torch.nn.functional.interpolate(cells, size=(arguments.size, arguments.size))[:, 0].long()
    labels = torch.randint(NUM_LABELS, (arguments.batch, NUM_SEGMENTS))
    return index_map.to(arguments.device), labels.to(arguments.device)


def autocast(arguments: argparse.Namespace) -> torch.autocast:
    device_type = torch.device(arguments.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=arguments.bf16)


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device_name": device}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subcommand", choices=[*SUBCOMMANDS, *COMPARISONS])
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, default=512, help="side of the square images, in pixels")
    parser.add_argument("--batch", type=int, default=None, help="images; default 1 for forward, 2 for step")
    parser.add_argument("--bf16", action="store_true", help="run both under bfloat16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 0 leaves the choice to torch")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (2 if arguments.subcommand == "step" else 1)
    return arguments


if __name__ == "__main__":
    main(parse_arguments())
