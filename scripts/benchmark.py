"""Compares the speed of this package with transformers' own MaskFormer: same weights, one run, interleaved, medians.

    python scripts/benchmark.py forward --backbone swin-tiny --size 512
    python scripts/benchmark.py step --backbone resnet50 --json step.json
    python scripts/benchmark.py data --threads 1 --batch 8

`forward` is an evaluation pass, `step` a training step (forward, loss, backward) with deep supervision in both, `data`
makes a batch of drawn scenes on disk: reading, the paper's augmentation for ADE20K and collation, where transformers
has its image processor. A ratio above 1 says how many times faster ours is. On a GPU the peak memory is reported too,
above what both models hold at rest.
"""

import argparse
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
from PIL import Image

from hf_maskformer import (
    MaskFormerConfig,
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
)
from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import generator_of
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.generated_scenes import write_generated_scenes

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
    for name in peers:
        print(f"{name:<7}", "  ".join(f"{key} {value:.1f}" for key, value in figures[name].items()))
    print(f"ratio   {figures['ratio']:.2f}")
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


def data(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A batch from files. Reading and augmentation are ours in both; each makes its own targets of the samples."""
    augmentation = RandomScaleCropFlip.from_scales(arguments.size, 0.5, 2.0)
    collate = MaskFormerDataCollator(MaskFormerImageProcessor(ignore_index=255), do_resize=False)
    stock = transformers.MaskFormerImageProcessor(ignore_index=255, do_resize=False)
    folder = TemporaryDirectory()
    write_generated_scenes(Path(folder.name), arguments.batch, 1, image_size=(arguments.size, arguments.size * 4 // 3))
    # Photographs are stored as JPEG, which is faster to read than PNG.
    for path in (Path(folder.name) / "images/train").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    scenes = SegmentationFolder(folder.name, "train")

    def read() -> list[dict[str, Any]]:
        # The folder lives as long as this function, which holds it.
        assert folder.name
        return [augmentation(scenes[index], generator_of(index)) for index in range(arguments.batch)]

    def run_stock() -> object:
        samples = read()
        maps = [sample["segmentation_map"] for sample in samples]
        return stock([sample["image"] for sample in samples], segmentation_maps=maps, return_tensors="pt")

    return {"stock": run_stock, "ours": lambda: collate(read()), "reading": read}


SUBCOMMANDS = {"forward": forward, "step": step, "data": data}


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
    parser.add_argument("subcommand", choices=SUBCOMMANDS)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, default=512, help="side of the square images, in pixels")
    parser.add_argument("--batch", type=int, default=None, help="images; default 1, for step 2")
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
