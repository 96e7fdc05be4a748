"""Trains a MaskFormer on labelled images and evaluates it by mean IoU, PQ or AP, as the labels say.

From scratch, on a folder with images/{train,val}, annotations/{train,val} and classes.json:

    python scripts/train.py --config scripts/configs/small.json --data DATA --image_size 256 --output_dir OUTPUT

Fine-tuning a checkpoint on columns of a `datasets` data set, on all processes of `accelerate config`:

    accelerate launch scripts/train.py --checkpoint facebook/maskformer-swin-tiny-ade --reinitialize_head true \
        --data USER/NAME --image_column image --label_column label --classes classes.json --output_dir OUTPUT

A folder in another layout of docs/data.md is recognised; where it can be read in two ways, --format says how.

Every option of transformers' TrainingArguments works too: --max_steps, --eval_strategy, --bf16, --report_to, ...
"""

from dataclasses import dataclass, field

from transformers import AutoConfig, HfArgumentParser, set_seed

from hf_maskformer import MaskFormerDataCollator, MaskFormerTrainer, MaskFormerTrainingArguments
from hf_maskformer.command_line import errors_as_messages
from hf_maskformer.data.augmentation import PAPER_AUGMENTATIONS, Augmentation, RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset, AugmentedStream
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.evaluation.tasks import TASKS, check_sample, task_of_data
from hf_maskformer.training.starting_point import (
    image_processor_for,
    model_class_of,
    model_on_backbone,
    new_model,
    pretrained_model,
    target_format,
)


@dataclass
class ModelArguments:
    checkpoint: str | None = field(default=None, metadata={"help": "Checkpoint to fine-tune: a folder or a Hub name."})
    backbone: str | None = field(default=None, metadata={"help": "Pretrained backbone of a new model: as above."})
    config: str | None = field(default=None, metadata={"help": "Configuration of a model with random weights."})
    reinitialize_head: bool = field(
        default=False, metadata={"help": "Replace the class predictor if the checkpoint has other classes."}
    )

    def __post_init__(self) -> None:
        if [self.checkpoint, self.backbone, self.config].count(None) != 2:
            raise ValueError(
                "Give one of --checkpoint (to fine-tune), --backbone (a new model on a pretrained backbone) and "
                "--config (to train from scratch)."
            )

    def check(self) -> None:
        """Finds a misspelt name before the data are read."""
        if self.backbone is None:
            model_class_of(self.checkpoint or self.config)
        else:
            AutoConfig.from_pretrained(self.backbone)

    def model(self, labels: LabelSet):
        if self.config is not None:
            return new_model(self.config, labels)
        if self.backbone is not None:
            return model_on_backbone(self.backbone, labels)
        return pretrained_model(self.checkpoint, labels, self.reinitialize_head)


@dataclass
class DataArguments:
    data: str = field(metadata={"help": "Folder data set; with --image_column a `datasets` folder or Hub name."})
    format: str | None = field(default=None, metadata={"help": "Layout of the data, where a folder leaves it open."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="val", metadata={"help": "Split to evaluate on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps."})
    classes: str | None = field(default=None, metadata={"help": "classes.json, if the data has none of its own."})
    task: str | None = field(
        default=None,
        metadata={"help": "What to evaluate and save as the checkpoint's task; the labels tell.", "choices": TASKS},
    )
    streaming: bool = field(default=False, metadata={"help": "Train on columns as they come; needs --max_steps."})
    check_data: bool = field(default=True, metadata={"help": "Read every sample once before training."})
    image_size: int = field(default=512, metadata={"help": "Shorter side at evaluation, and side of the crops."})
    min_scale: float = field(default=0.5, metadata={"help": "Smallest scale in training, relative to image_size."})
    max_scale: float = field(default=2.0, metadata={"help": "Largest scale in training, relative to image_size."})

    change_colors: bool = field(default=True, metadata={"help": "Change colours at random in training."})
    augmentation: str | None = field(
        default=None,
        metadata={"help": f"In place of the four above, the paper's for {', '.join(PAPER_AUGMENTATIONS)}."},
    )

    def open(self, split: str, streaming: bool = False):
        return open_dataset(
            self.data,
            split,
            self.image_column,
            self.label_column,
            self.classes,
            format=self.format,
            streaming=streaming,
        )

    def build_augmentation(self) -> Augmentation:
        if self.augmentation is None:
            return RandomScaleCropFlip.from_scales(self.image_size, self.min_scale, self.max_scale, self.change_colors)
        if self.augmentation not in PAPER_AUGMENTATIONS:
            known = ", ".join(PAPER_AUGMENTATIONS)
            raise ValueError(f"augmentation is {self.augmentation!r}; known are {known}.")
        return PAPER_AUGMENTATIONS[self.augmentation]


def main(model_arguments: ModelArguments, data: DataArguments, training: MaskFormerTrainingArguments) -> None:
    model_arguments.check()
    train_dataset, eval_dataset = data.open(data.train_split, data.streaming), data.open(data.eval_split)
    labels, task = train_dataset.labels, data.task or task_of_data(eval_dataset)
    check_sample(task, eval_dataset[0])
    with training.main_process_first(desc="data check"):
        if data.check_data and training.process_index == 0:
            if not data.streaming:
                check_samples(train_dataset)
            check_samples(eval_dataset)

    set_seed(training.seed)
    model = model_arguments.model(labels)
    image_processor = image_processor_for(labels, data.image_size, model_arguments.checkpoint, model, task)

    augmented = AugmentedStream if data.streaming else AugmentedDataset
    trainer = MaskFormerTrainer(
        model=model,
        args=training,
        train_dataset=augmented(train_dataset, data.build_augmentation(), training.seed),
        eval_dataset=eval_dataset,
        data_collator=MaskFormerDataCollator(image_processor, do_resize=False, target_format=target_format(model)),
        processing_class=image_processor,
    )
    resume = training.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)


if __name__ == "__main__":
    with errors_as_messages():
        main(
            *HfArgumentParser(
                (ModelArguments, DataArguments, MaskFormerTrainingArguments)
            ).parse_args_into_dataclasses()
        )
