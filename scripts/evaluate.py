"""Evaluates a checkpoint at the resolution of the ground truth: mean IoU, PQ or AP; prints a table or JSON.

    python scripts/evaluate.py --checkpoint OUTPUT --data DATA --output OUTPUT/metrics.json

The labels determine the task, unless --task does. --tta averages over scales and flips (semantic). With
--predictions FOLDER, predictions are written as PNGs of classes, in panopticapi's format, or as COCO results.

Also runs on several processes with `accelerate launch scripts/evaluate.py ...`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.command_line import OptionParser, check_output, errors_as_messages
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.labels import shorten
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.evaluation.precision import Precision, loading_options
from hf_maskformer.evaluation.prediction_writer import PredictionWriter
from hf_maskformer.evaluation.report import as_json, as_table
from hf_maskformer.evaluation.tasks import Task, check_sample, task_of_data
from hf_maskformer.training.starting_point import model_class_of, renamed_classes


@dataclass
class Arguments:
    checkpoint: str = field(metadata={"help": "A folder or a Hub name."})
    data: str = field(metadata={"help": "Folder data set; with --image_column a `datasets` folder or Hub name."})
    format: str | None = field(default=None, metadata={"help": "Layout of the data, if a folder is ambiguous."})
    split: str = field(default="val", metadata={"help": "Split to evaluate on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    classes: str | None = field(default=None, metadata={"help": "classes.json, if the data has none of its own."})
    task: Task | None = field(default=None, metadata={"help": "What to evaluate; by default that of the labels."})
    tta: bool = field(default=False, metadata={"help": "Average over scales of 0.5 to 1.75 and flips."})
    precision: Precision | None = field(
        default=None,
        metadata={"help": "By default that of the checkpoint. The int8 ones need torchao."},
    )
    batch_size: int = field(default=1, metadata={"help": "Batch size per process."})
    num_workers: int = field(default=0, metadata={"help": "Worker processes that read and preprocess images."})
    check_data: bool = field(default=True, metadata={"help": "Read every sample once beforehand."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the figures to."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of the table."})
    predictions: str | None = field(default=None, metadata={"help": "Folder to write the predictions to."})


def main(arguments: Arguments) -> None:
    # Without a GPU, Accelerate joins several processes only with cpu=True.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"--output {arguments.output} is a folder. Give a JSON file in it.")
    if arguments.output is not None:
        check_output(arguments.output, is_folder=False)
    if arguments.predictions is not None:
        check_output(arguments.predictions, "--predictions")
    dataset = open_dataset(
        arguments.data,
        arguments.split,
        arguments.image_column,
        arguments.label_column,
        arguments.classes,
        format=arguments.format,
    )
    task = arguments.task or task_of_data(dataset)
    check_sample(task, dataset[0])
    options = loading_options(arguments.precision)
    model = model_class_of(arguments.checkpoint).from_pretrained(arguments.checkpoint, **options).to(state.device)
    if model.config.num_labels != dataset.labels.num_labels:
        raise ValueError(
            f"{arguments.checkpoint} has {model.config.num_labels} classes, but {arguments.data} has "
            f"{dataset.labels.num_labels}. Evaluate a checkpoint on data with its own classes."
        )
    renamed = renamed_classes(model.config.id2label, dataset.labels)
    if renamed and state.is_main_process:
        print(f"warning: {arguments.checkpoint} names its classes differently: {shorten(renamed)}.", file=sys.stderr)
    if arguments.check_data and state.is_main_process:
        check_samples(dataset)
    image_processor = MaskFormerImageProcessor.from_pretrained(arguments.checkpoint)
    if image_processor.label_ids_to_fuse is None:  # transformers does not save it
        image_processor.label_ids_to_fuse = list(dataset.labels.stuff_ids)
    writer = None if arguments.predictions is None else PredictionWriter(arguments.predictions, task, dataset)
    figures = evaluate(
        model,
        image_processor,
        dataset,
        task,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        scale_averaging=arguments.tta,
        on_result=writer,
    )
    if state.is_main_process:
        content = json.dumps(as_json(figures, dataset.labels.id2label), indent=1)
        print(content if arguments.json else as_table(figures, dataset.labels.id2label))
        if arguments.output is not None:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(content)
    if writer is not None:  # last, since the figures are correct even if predictions overwrote each other
        writer.finish()
    state.destroy_process_group()


if __name__ == "__main__":
    with errors_as_messages():
        main(*OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses())
