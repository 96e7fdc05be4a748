"""Segments an image, a folder of images or an image at a URL.

    python scripts/predict.py --checkpoint facebook/maskformer-swin-tiny-ade --input photo.jpg --output segments

For every image NAME the output folder gets NAME_labels.png (the segment of each pixel), NAME_segments.json (a
description of the segments) and NAME_overlay.png (for viewing). Unreadable images in a folder are skipped; the exit
code is then 1. --json prints the segments of all images, their files and the skipped images.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.command_line import OptionParser, check_output, errors_as_messages
from hf_maskformer.evaluation.pipeline import THRESHOLDS
from hf_maskformer.evaluation.precision import Precision, loading_options
from hf_maskformer.evaluation.prediction import predict, read_images, write_prediction
from hf_maskformer.evaluation.tasks import Task, task_for
from hf_maskformer.training.starting_point import model_class_of


@dataclass
class Arguments:
    checkpoint: str = field(metadata={"help": "A folder or a Hub name."})
    input: str = field(metadata={"help": "An image, a folder of images, or an http(s) URL."})
    output: str = field(metadata={"help": "Folder for the results."})
    task: Task | None = field(
        default=None, metadata={"help": "What to predict; by default the task of the checkpoint."}
    )
    json: bool = field(default=False, metadata={"help": "Print the results as JSON."})
    precision: Precision | None = field(
        default=None,
        metadata={"help": "By default that of the checkpoint. The int8 ones need torchao."},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Instance and panoptic: minimum score of a query. By default the checkpoint's."}
    )
    mask_threshold: float | None = field(
        default=None, metadata={"help": "Instance and panoptic: minimum mask probability of a pixel. By default 0.5."}
    )
    overlap_mask_area_threshold: float | None = field(
        default=None,
        metadata={"help": "Minimum share of its mask that must be on top. By default the checkpoint's for panoptic."},
    )


def main(arguments: Arguments) -> None:
    if Path(arguments.input).is_dir() and Path(arguments.input).resolve() == Path(arguments.output).resolve():
        raise ValueError(
            f"The results would be among the images in {arguments.input}. Choose another folder with --output."
        )
    check_output(arguments.output)
    thresholds = {name: getattr(arguments, name) for name in THRESHOLDS if getattr(arguments, name) is not None}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = loading_options(arguments.precision)
    model = model_class_of(arguments.checkpoint).from_pretrained(arguments.checkpoint, **options).to(device).eval()
    image_processor = MaskFormerImageProcessor.from_pretrained(arguments.checkpoint)
    task = arguments.task or task_for(image_processor)
    images: list[dict[str, Any]] = []
    failed: list[Path] = []
    for name, image in tqdm(read_images(arguments.input, failed), desc="Segmenting", unit="image"):
        prediction = predict(model, image_processor, image, task, **thresholds)
        files = write_prediction(prediction, image, model.config.id2label, task, Path(arguments.output), name)
        if arguments.json:
            content = json.loads(files[1].read_text())
            images.append({"name": name, "files": [str(file) for file in files], **content})
    if arguments.json:
        print(json.dumps({"images": images, "skipped": [str(path) for path in failed]}, indent=1))
    if failed:
        raise ValueError(
            f"Images that could not be read: {len(failed)}, see above. The other results are in {arguments.output}."
        )
    if not arguments.json:
        print(f"The results are in {arguments.output}.")


if __name__ == "__main__":
    with errors_as_messages():
        main(*OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses())
