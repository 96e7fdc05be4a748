"""Writes a model as a file that runs without this package: for ONNX Runtime, or for `torch.export.load`.

    python scripts/export.py --checkpoint OUTPUT --output exported
    python scripts/export.py --checkpoint OUTPUT --output exported --task semantic
    python scripts/export.py --checkpoint OUTPUT --output exported --format torch_export --size 512 512

The folder gets model.onnx or model.pt2, config.json (the names of the labels) and preprocessor_config.json (how images
are preprocessed). docs/export.md shows how to run it.
"""

from dataclasses import dataclass, field

import torch

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.command_line import OptionParser, check_output, errors_as_messages
from hf_maskformer.evaluation.pipeline import THRESHOLDS
from hf_maskformer.export.exporting import Format, Output, export_model
from hf_maskformer.training.starting_point import model_class_of


@dataclass
class Arguments:
    checkpoint: str = field(metadata={"help": "A folder or a Hub name."})
    output: str = field(metadata={"help": "Folder for the result."})
    format: Format = field(default="onnx", metadata={"help": "What the file is for."})
    task: Output = field(
        default="logits",
        metadata={"help": "What the file computes: the model's logits, or, including post-processing, segmentations."},
    )
    size: list[int] | None = field(
        default=None, metadata={"help": "Height and width of all images, in pixels. By default any, at least 33."}
    )
    output_size: list[int] | None = field(
        default=None, metadata={"help": "Height and width of the segmentation. By default those of the image."}
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Panoptic: minimum score of a query. By default the checkpoint's, or 0.5."},
    )
    mask_threshold: float | None = field(
        default=None,
        metadata={"help": "Panoptic: minimum mask probability of a pixel. By default the checkpoint's, or 0.5."},
    )
    overlap_mask_area_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Panoptic: minimum share of its mask that a query must win. By default the checkpoint's, or 0.8."
        },
    )


def main(arguments: Arguments) -> None:
    check_output(arguments.output)
    size, output_size = as_size("size", arguments.size), as_size("output_size", arguments.output_size)
    model = model_class_of(arguments.checkpoint).from_pretrained(arguments.checkpoint, dtype=torch.float32)
    thresholds = {name: getattr(arguments, name) for name in THRESHOLDS if getattr(arguments, name) is not None}
    path = export_model(
        model,
        MaskFormerImageProcessor.from_pretrained(arguments.checkpoint),
        arguments.output,
        arguments.format,
        arguments.task,
        size=size,
        output_size=output_size,
        **thresholds,
    )
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB.")


def as_size(name: str, value: list[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    if len(value) != 2:
        raise ValueError(f"--{name} takes a height and a width, but got {value}.")
    return value[0], value[1]


if __name__ == "__main__":
    with errors_as_messages():
        main(*OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses())
