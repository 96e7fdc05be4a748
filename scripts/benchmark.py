"""Compares the speed of this package with transformers' own MaskFormer: same weights, one run, interleaved, medians.

    python scripts/benchmark.py forward --backbone swin-tiny --size 512
    python scripts/benchmark.py step --backbone resnet50 --json step.json
    python scripts/benchmark.py metric --repeats 20

`forward` is an evaluation pass, `step` a training step (forward, loss, backward) with deep supervision in both. A
ratio above 1 says how many times faster ours is. On a GPU the peak memory is reported too, above what both models
hold at rest.

`metric` counts 100 semantic predictions of 512 x 683 pixels with 150 classes for the mean IoU; its "stock" is numpy's
histogram, the way `evaluate`'s mean_iou counts.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MeanIoU

STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet", **STAGES},
    "resnet101": {"model_type": "resnet", "depths": [3, 4, 23, 3], **STAGES},
    "swin-tiny": {"model_type": "swin", "window_size": 7, "drop_path_rate": 0.0, **STAGES},
    "swin-base": {"drop_path_rate": 0.0, **transformers.MaskFormerConfig().backbone_config.to_dict()},
}
NUM_LABELS = 150
NUM_SEGMENTS = 15


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
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


def metric(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Mean IoU of 100 images, from what post-processing (int64) and image files (uint8) give."""
    images = 10 * [random_semantic_pair(arguments.size) for _ in range(10)]
    ours = MeanIoU(NUM_LABELS)

    def count() -> None:
        for prediction, reference in images:
            ours.add(prediction=prediction, reference=reference)

    def histogram() -> np.ndarray:
        return sum(areas_by_histogram(prediction.numpy(), reference) for prediction, reference in images)

    count()
    matrix = ours.confusion_matrix.numpy()
    # A predicted pixel counts only where the reference is not void, in both.
    areas = np.stack([matrix.diagonal(), matrix[:, :-1].sum(0), matrix.sum(1)])
    if (areas != histogram()).any():
        raise RuntimeError("The counts differ, so their times mean nothing.")
    report_long_stream(count, turns=20, images=len(images))
    return {"stock": histogram, "ours": count}


SUBCOMMANDS = {"forward": forward, "step": step, "metric": metric}


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


def random_semantic_pair(height: int) -> tuple[torch.Tensor, np.ndarray]:
    """A reference of smooth segments with a void margin, and a prediction that agrees at 9 of 10 pixels."""
    size = (height, round(height * 4 / 3))
    coarse, fine = torch.randn(1, NUM_SEGMENTS, 6, 8), torch.randn(1, NUM_SEGMENTS, size[0] // 16, size[1] // 16)
    smooth, noise = (torch.nn.functional.interpolate(field, size, mode="bicubic") for field in (coarse, fine))
    labels = torch.randint(NUM_LABELS, (NUM_SEGMENTS,))
    reference = labels[smooth[0].argmax(0)].numpy().astype(np.uint8)
    reference[: height // 20] = 255
    return labels[(smooth + 0.1 * noise)[0].argmax(0)], reference


def areas_by_histogram(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pixels of each class (3, K) where both agree, in the prediction and in the reference; void left out."""
    is_counted = reference != 255
    prediction, reference = prediction[is_counted], reference[is_counted]
    shared = prediction[prediction == reference]
    return np.stack(
        [
            np.histogram(values, bins=NUM_LABELS, range=(0, NUM_LABELS - 1))[0]
            for values in (shared, prediction, reference)
        ]
    )


def report_long_stream(run: Callable[[], object], turns: int, images: int) -> None:
    """Says how fast a long stream is and by how much it raises the most memory that the process ever held."""
    most_before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(turns):
        run()
    seconds = time.perf_counter() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_before) / 2**10
    print(f"ours   {turns * images} images, {turns * images / seconds:.0f} images/s, memory grew by {growth:.1f} MiB")


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
