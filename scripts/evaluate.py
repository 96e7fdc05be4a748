"""Evaluates a checkpoint by mean IoU at the resolution of the ground truth; prints a table and writes JSON.

    python scripts/evaluate.py --checkpoint OUTPUT --data DATA --output OUTPUT/metrics.json

Runs on all processes of `accelerate launch scripts/evaluate.py ...` too.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.command_line import errors_as_messages
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.labels import shorten
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.evaluation.report import as_json, as_table
from hf_maskformer.evaluation.semantic import evaluate_semantic
from hf_maskformer.training.starting_point import model_class_of, renamed_classes


@dataclass
class Arguments:
    checkpoint: str = field(metadata={"help": "A folder or a Hub name."})
    data: str = field(metadata={"help": "Folder data set; with --image_column a `datasets` folder or Hub name."})
    format: str | None = field(default=None, metadata={"help": "Layout of the data, where a folder leaves it open."})
    split: str = field(default="val", metadata={"help": "Split to evaluate on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    classes: str | None = field(default=None, metadata={"help": "classes.json, if the data has none of its own."})
    batch_size: int = field(default=1, metadata={"help": "Images in a batch, of each process."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes that read and prepare images."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the figures to."})


def main(arguments: Arguments) -> None:
    state = PartialState()
    dataset = open_dataset(
        arguments.data,
        arguments.split,
        arguments.image_column,
        arguments.label_column,
        arguments.classes,
        format=arguments.format,
    )
    model = model_class_of(arguments.checkpoint).from_pretrained(arguments.checkpoint).to(state.device)
    if model.config.num_labels != dataset.labels.num_labels:
        raise ValueError(
            f"{arguments.checkpoint} has {model.config.num_labels} classes, but {arguments.data} has "
            f"{dataset.labels.num_labels}. Evaluate a checkpoint on data with its own classes."
        )
    renamed = renamed_classes(model.config.id2label, dataset.labels)
    if renamed and state.is_main_process:
        print(f"warning: {arguments.checkpoint} names its classes otherwise: {shorten(renamed)}.", file=sys.stderr)
    if state.is_main_process:
        check_samples(dataset)
    image_processor = MaskFormerImageProcessor.from_pretrained(arguments.checkpoint)
    figures = evaluate_semantic(
        model, image_processor, dataset, batch_size=arguments.batch_size, num_workers=arguments.num_workers
    )
    if state.is_main_process:
        print(as_table(figures, dataset.labels.id2label))
        if arguments.output is not None:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(json.dumps(as_json(figures, dataset.labels.id2label), indent=1))


if __name__ == "__main__":
    with errors_as_messages():
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
