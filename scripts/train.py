r"""Trains a MaskFormer on labelled images and evaluates it by mean IoU, PQ or AP, depending on the labels.

From scratch, on a folder with images/{train,val}, annotations/{train,val} and classes.json:

    python scripts/train.py --config scripts/configs/small.json --data DATA --image_size 256 --output_dir OUTPUT

Fine-tuning a checkpoint on columns of a `datasets` data set, with the processes of `accelerate config`:

    accelerate launch scripts/train.py --checkpoint facebook/maskformer-swin-tiny-ade --reinitialize_head true \
        --data USER/NAME --image_column image --label_column label --classes classes.json --output_dir OUTPUT

With the recipe of one of the paper's models (docs/reproducing.md); --dry_run prints what would be done:

    accelerate launch scripts/train.py --preset ade20k-r50 --data DATA --backbone_weights resnet50.pth \
        --output_dir OUTPUT

With --resume_from_checkpoint auto the same command starts or resumes a run. On SIGTERM a run saves a checkpoint and
exits with code 75 (docs/distributed.md).

Folders in the other layouts of docs/data.md are recognised; --format resolves ambiguities.

Every option of transformers' TrainingArguments works too: --max_steps, --eval_strategy, --bf16, --report_to, ...;
--help_all lists them. --push_to_hub true --hub_model_id user/name publishes the result (docs/publishing.md).
"""

import gc
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.command_line import check_output, errors_as_messages
from hf_maskformer.data.augmentation import PAPER_AUGMENTATIONS, Augmentation, RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset, AugmentedStream
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.evaluation.tasks import Task, check_sample, task_of_data
from hf_maskformer.training.checkpoints import check_is_new
from hf_maskformer.training.checks import check_reports
from hf_maskformer.training.dry_run import describe_run
from hf_maskformer.training.model_arguments import ModelArguments
from hf_maskformer.training.recipe_options import parse_with_recipe
from hf_maskformer.training.run_card import figures_of_weights
from hf_maskformer.training.starting_point import target_format


@dataclass
class DataArguments:
    data: str | None = field(
        default=None, metadata={"help": "Folder data set; with --image_column a `datasets` folder or Hub name."}
    )
    format: str | None = field(default=None, metadata={"help": "Layout of the data, if a folder is ambiguous."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="val", metadata={"help": "Split to evaluate on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    classes: str | None = field(default=None, metadata={"help": "classes.json, if the data has none of its own."})
    task: Task | None = field(
        default=None, metadata={"help": "What to evaluate, and the checkpoint's task; by default that of the labels."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the training columns; needs --max_steps."})
    check_data: bool = field(default=True, metadata={"help": "Read every sample once before training."})
    image_size: int = field(default=512, metadata={"help": "Shorter side at evaluation, and side of the crops."})
    min_scale: float = field(default=0.5, metadata={"help": "Smallest scale in training, relative to image_size."})
    max_scale: float = field(default=2.0, metadata={"help": "Largest scale in training, relative to image_size."})

    crop: bool = field(default=True, metadata={"help": "Train on random crops; false: on whole images, as evaluated."})
    change_colors: bool = field(default=True, metadata={"help": "Change colours at random in training."})
    augmentation: str | None = field(
        default=None,
        metadata={"help": f"The paper's, replacing size, scales and crop above, for {', '.join(PAPER_AUGMENTATIONS)}."},
    )

    dry_run: bool = field(default=False, metadata={"help": "Print settings, optimiser, length and memory, and exit."})

    def __post_init__(self) -> None:
        if self.data is None and not self.dry_run:
            raise ValueError("Give --data, a folder or name in one of the layouts of docs/data.md.")
        if self.image_size * self.min_scale < 1:
            raise ValueError(
                f"--image_size is {self.image_size} and --min_scale {self.min_scale}: images would have no pixel left."
            )

    def open(self, split: str, streaming: bool = False) -> Any:
        assert self.data is not None  # only a dry run works without it
        return open_dataset(
            self.data,
            split,
            self.image_column,
            self.label_column,
            self.classes,
            format=self.format,
            streaming=streaming,
        )

    def card(self) -> dict[str, Any]:
        """The model card's fields about the data; for a local folder only its own name."""
        assert self.data is not None  # as above
        path = Path(self.data)
        source = {"dataset": path.absolute().name} if path.exists() else {"dataset_tags": self.data}
        return {**source, "split": self.eval_split}

    def build_augmentation(self) -> Augmentation:
        if self.augmentation is None:
            return RandomScaleCropFlip.from_scales(
                self.image_size, self.min_scale, self.max_scale, self.change_colors, self.crop
            )
        if self.augmentation not in PAPER_AUGMENTATIONS:
            known = ", ".join(PAPER_AUGMENTATIONS)
            raise ValueError(f"augmentation is {self.augmentation!r}; it must be one of {known}.")
        augmentation = PAPER_AUGMENTATIONS[self.augmentation]
        if isinstance(augmentation, RandomScaleCropFlip) and not self.change_colors:
            return replace(augmentation, change_colors=False)  # the others never do
        return augmentation

    def training_processor(self, image_processor: MaskFormerImageProcessor) -> MaskFormerImageProcessor:
        """The image processor for training. The paper's code pads smaller images to the size of its crops."""
        augmentation = self.build_augmentation()
        if self.augmentation is None or not isinstance(augmentation, RandomScaleCropFlip):
            return image_processor
        assert augmentation.crop_size is not None  # as all of the paper's
        divisor = image_processor.size_divisor or 1  # the patch size of a plain vision transformer
        height, width = (math.ceil(edge / divisor) * divisor for edge in augmentation.crop_size)
        return MaskFormerImageProcessor.from_dict(
            image_processor.to_dict(), pad_size={"height": height, "width": width}
        )


def main(model_arguments: ModelArguments, data: DataArguments, training: MaskFormerTrainingArguments) -> None:
    model_arguments.check()
    if data.streaming and training.max_steps <= 0:
        raise ValueError("The length of a stream is unknown. Give --max_steps.")
    output = output_of(data, training)
    check_reports(training.report_to)
    train_dataset, eval_dataset = data.open(data.train_split, data.streaming), data.open(data.eval_split)
    labels, task = train_dataset.labels, data.task or task_of_data(eval_dataset)
    model_arguments.check_data(eval_dataset, data.task)
    model_arguments.planned_config(labels)  # raises for a checkpoint with other classes
    check_sample(task, eval_dataset[0])
    with training.main_process_first(desc="data check"):
        if data.check_data and training.process_index == 0:
            if not data.streaming:
                check_samples(train_dataset)
            check_samples(eval_dataset)

    if training.process_index == 0 and not training.resume_from_checkpoint and (output / "config.json").is_file():
        print(
            f"warning: {output} already holds a model, which this run replaces, removing its metrics.json. Choose "
            "another folder with --output_dir to keep it.",
            file=sys.stderr,
        )
    if data.streaming:
        train_dataset = train_dataset.shuffle(training.seed)
    set_seed(training.seed)
    model = model_arguments.model(labels)
    image_processor = model_arguments.image_processor(labels, data.image_size, model, task)
    assert image_processor is not None  # it takes labels

    augmented = AugmentedStream if data.streaming else AugmentedDataset
    trainer = MaskFormerTrainer(
        model=model,
        args=training,
        train_dataset=augmented(train_dataset, data.build_augmentation(), training.seed),
        eval_dataset=eval_dataset,
        data_collator=MaskFormerDataCollator(
            data.training_processor(image_processor), do_resize=False, target_format=target_format(model)
        ),
        processing_class=image_processor,
    )
    resume = training.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model()
    trainer.save_state()
    if trainer.state.global_step > trainer.first_step:
        trainer.save_metrics("train", result.metrics)
        if training.process_index == 0:
            (output / "metrics.json").unlink(missing_ok=True)  # written by evaluate.py for the previous model
    elif training.process_index == 0:
        print(f"Training was already complete: {trainer.first_step} steps.", file=sys.stderr)
    metrics = figures_of_weights(trainer.state, training.load_best_model_at_end) or trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)
    card = data.card()
    trainer.create_model_card(**card)
    if training.push_to_hub:
        trainer.push_to_hub(**card)
    if training.process_index == 0:
        print(f"The model is in {output}.")


def output_of(data: DataArguments, training: MaskFormerTrainingArguments) -> Path:
    """The folder for the results. Raises a ValueError if training cannot write them there."""
    assert training.output_dir is not None  # as transformers fills it in
    output = Path(training.output_dir)
    check_output(output, "--output_dir")
    if not training.resume_from_checkpoint:
        check_is_new(output)
    if data.data is not None and output.resolve() == Path(data.data).resolve():
        raise ValueError(f"--output_dir is {output}, the folder of the data. Choose another.")
    return output


def leave_processes() -> None:
    """Destroys the process group once no training objects are left.

    torch joins the threads that send gradients when their last reference is gone. If that is the trained model, or at
    the interpreter's exit, both may deadlock.
    """
    gc.collect()
    PartialState().destroy_process_group()


def dry_run(
    model_arguments: ModelArguments, data: DataArguments, training: MaskFormerTrainingArguments, sources: dict[str, str]
) -> None:
    model_arguments.check(is_training=False)
    output_of(data, training)
    train_dataset = None if data.data is None else data.open(data.train_split, data.streaming)
    labels = None if train_dataset is None else train_dataset.labels
    if labels is not None:
        model_arguments.check_data(data.open(data.eval_split), data.task)
    num_images = None if train_dataset is None or data.streaming else len(train_dataset)
    config = model_arguments.planned_config(labels)
    image_processor = model_arguments.image_processor(labels, data.image_size)
    arguments = (model_arguments, data, training)
    if training.process_index == 0:
        print(describe_run(model_arguments.title, config, arguments, sources, num_images, image_processor))


Arguments = tuple[ModelArguments, DataArguments, MaskFormerTrainingArguments]


def parse_arguments(command_line: list[str] | None = None) -> tuple[Arguments, dict[str, str]]:
    return parse_with_recipe((ModelArguments, DataArguments, MaskFormerTrainingArguments), command_line, __doc__)


if __name__ == "__main__":
    with errors_as_messages():
        arguments, sources = parse_arguments()
        if arguments[1].dry_run:
            dry_run(*arguments, sources)
        else:
            code = None
            try:
                main(*arguments)
            except SystemExit as end:  # interrupted, in all processes
                code = end.code
            leave_processes()
            sys.exit(code)
