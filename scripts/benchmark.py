"""Compares the speed of this package with transformers' own MaskFormer: same inputs, one run, interleaved, medians.

    python scripts/benchmark.py forward --backbone swin-tiny --size 512 --kept 20
    python scripts/benchmark.py forward --size 1024 --width 2048 --repeats 1
    python scripts/benchmark.py forward --width 384 512 640 704
    python scripts/benchmark.py forward --compile --onnx
    python scripts/benchmark.py forward --profile
    python scripts/benchmark.py forward --plot docs/images/latency.png
    python scripts/benchmark.py photo
    python scripts/benchmark.py load --backbone swin-large
    python scripts/benchmark.py step --backbone resnet50 --freeze_batch_norm --json step.json
    python scripts/benchmark.py criterion
    python scripts/benchmark.py criterion --plot docs/images/criterion.png
    python scripts/benchmark.py postprocess --threads 1
    python scripts/benchmark.py preprocess --threads 1
    python scripts/benchmark.py data --threads 1
    python scripts/benchmark.py metric --repeats 20

`SUBJECT --help` lists the options of a subject. A ratio is the speed-up of a peer over the first one of its comparison,
which is transformers ("stock"). Peak memory is the increase during a call.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks import criterion, data, images, metric, models, serving
from benchmarks.breakdown import add_breakdown
from benchmarks.inputs import NUM_QUERIES
from benchmarks.measuring import Comparison, Figures, environment, measure

from hf_maskformer.command_line import OptionParser, errors_as_messages

MODEL: dict[str, Any] = {"backbone": "resnet50", "size": 512, "bf16": False, "device": "cpu"}
LOSS: dict[str, Any] = {"size": 512, "batch": 2, "segments": 15, "bf16": False, "device": "cpu"}
FORWARD: dict[str, Any] = {"width": None, "batch": 1, "kept": None, "compile": False, "onnx": False, "plot": None}
PROFILE = {"profile": False}
Subject = Callable[[argparse.Namespace], Iterator[Comparison]]
SUBJECTS: dict[str, tuple[Subject, dict[str, Any]]] = {  # each with its options and their defaults
    "forward": (models.forward, {**MODEL, **FORWARD, **PROFILE}),
    "photo": (serving.photo, {**MODEL, "size": 640}),
    "load": (serving.load, {"backbone": "swin-large"}),
    "step": (models.step, {**MODEL, **LOSS, "freeze_batch_norm": False, **PROFILE}),
    "criterion": (criterion.criterion, {**LOSS, "points": 12544, "plot": None}),
    "postprocess": (images.postprocess, {"size": 640, "device": "cpu"}),
    "preprocess": (images.preprocess, {"batch": 8, "edges": [512, 800]}),
    "data": (data.data, {"size": 512, "batch": 8}),
    "metric": (metric.metric, {"size": 512, "batch": 100}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "backbone": {"choices": models.BACKBONES},
    "size": {"type": int, "help": "side of the square images, or height of those that are not square, in pixels"},
    "width": {"type": int, "nargs": "+", "help": "widths of the images, in turn, if not the height"},
    "edges": {"type": int, "nargs": "+", "help": "shorter edges that images are resized to, in pixels"},
    "batch": {"type": int, "help": "images per batch"},
    "segments": {"type": int, "help": "segments per image, at most 256"},
    "points": {"type": int, "help": "points per mask of the point-sampled criterion"},
    "kept": {"type": int, "help": "measure `predict` too, with a threshold that keeps this many queries, 1 to 99"},
    "freeze_batch_norm": {"action": "store_true", "help": "freeze the backbone's batch norm in both"},
    "bf16": {"action": "store_true", "help": "run everything under bfloat16 autocast"},
    "compile": {"action": "store_true", "help": "measure both under torch.compile too"},
    "onnx": {"action": "store_true", "help": "measure ONNX Runtime on the CPU too"},
    "profile": {"action": "store_true", "help": "show where the time goes, and the share of peak matmul speed"},
    "device": {"help": "cpu or cuda"},
    "plot": {"help": "measure at several sizes (criterion: and segment counts) and plot to this file (matplotlib)"},
}
PLOTS = {"forward": models.draw_latency, "criterion": criterion.draw_growth}


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    subject, _ = SUBJECTS[arguments.subject]
    device = getattr(arguments, "device", "cpu")
    figures: dict[str, Figures] = {}
    for name, peers in subject(arguments):
        figures[name] = measure(peers, arguments.repeats, device)
        if getattr(arguments, "profile", False):
            add_breakdown(figures[name], peers, device, torch.bfloat16 if arguments.bf16 else torch.float32)
        for peer, values in figures[name].items():
            columns = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
            print(f"{name:<24}{peer:<20}{columns}", flush=True)
    if arguments.json:
        settings = {**vars(arguments), "threads": torch.get_num_threads(), **environment(device)}
        Path(arguments.json).write_text(json.dumps({"settings": settings, "figures": figures}, indent=1))
    if getattr(arguments, "plot", None):
        PLOTS[arguments.subject](figures, arguments.plot)


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, (subject, defaults) in SUBJECTS.items():
        options = subjects.add_parser(name, description=inspect.getdoc(subject))
        for option, default in defaults.items():
            options.add_argument(f"--{option}", default=default, **OPTIONS[option])
        options.add_argument("--threads", type=int, default=2, help="CPU threads; 0 leaves the choice to torch")
        options.add_argument("--repeats", type=int, default=7, help="measured rounds")
        options.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    if getattr(arguments, "kept", None) not in (None, *range(1, NUM_QUERIES)):
        parser.error(f"--kept is {arguments.kept}, but must be 1 to {NUM_QUERIES - 1}.")
    return arguments


if __name__ == "__main__":
    with errors_as_messages():
        main(parse_arguments())
