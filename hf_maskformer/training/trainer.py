"""`Trainer` with the paper's parameter groups, its loss terms in the log and evaluation by the task's own metric."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerState, TrainingArguments, default_data_collator
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length, sort_checkpoints
from transformers.utils import logging

from ..data.collator import MaskFormerDataCollator
from ..data.workers import DEAD_WORKER, dead_workers_named
from ..evaluation.evaluation import evaluate
from ..evaluation.report import scalars
from ..evaluation.tasks import MAIN_FIGURES, TASKS, Task, check_model
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..loss_maskformer import count_items
from .epochs import EpochCallback
from .interruption import EXIT_INTERRUPTED, InterruptionCallback
from .pictures import PictureCallback
from .schedules import check_schedule, learning_rate_schedule
from .starting_point import target_format

logger = logging.get_logger(__name__)

BACKBONE = "pixel_level_module.encoder."
PYRAMID = "pixel_level_module.encoder.levels."  # new layers on top of a pretrained vision transformer
# Never decayed, as in the paper's code: norms, embeddings, Swin's position bias; nor what other backbones have of it.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
UNDECAYED_NAMES = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "position_embeddings",
    "cls_token",
    "register_tokens",
    "lambda1",
    "layer_scale_parameter",
)


@dataclass
class MaskFormerTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the paper's recipe for a ResNet-50.

    AdamW with learning rate 1e-4 and weight decay 1e-4, a tenth of the learning rate for the backbone, the gradient of
    the whole model clipped to norm 0.01, and a learning rate that falls to 0 as (1 - step / steps)^0.9. For a Swin
    backbone the paper takes learning_rate 6e-5, weight_decay 0.01 and backbone_learning_rate_factor 1.
    """

    backbone_learning_rate_factor: float = field(
        default=0.1,
        metadata={"help": "The backbone's share of learning_rate; the paper: 1 for Swin."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate; the paper: 6e-5 for Swin."})
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay of AdamW, except norms and embeddings; the paper: 0.01 for Swin."}
    )
    max_grad_norm: float = field(default=0.01, metadata={"help": "Norm to which the whole gradient is clipped."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Shape of the learning rate's decay."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the scheduler; for 'polynomial' default power 0.9, end 0."}
    )
    paper_schedule: str | None = field(
        default=None,
        metadata={
            "help": "'poly' or 'steps': the schedule of the paper's code, in place of lr_scheduler_type; warm-up "
            "(warmup_steps) is multiplied in. 'steps' divides the learning rate by 10 at lr_milestones."
        },
    )
    warmup_factor: float = field(
        default=1e-6, metadata={"help": "Share of learning_rate at which the warm-up of paper_schedule begins."}
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: [2 / 3], metadata={"help": "Of paper_schedule 'steps', as shares of the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the samples' fields are what the collator reads."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Metric of the best checkpoint; default mean_iou, pq or ap, by the task."}
    )
    max_nonfinite_losses: int = field(
        default=3, metadata={"help": "Batches in a row with a loss of NaN or infinity that end training; 0: never."}
    )
    num_pictures: int = field(
        default=4, metadata={"help": "Samples drawn in TensorBoard after each evaluation, if it is among report_to."}
    )

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: Trainer would remove image and segmentation_map from the samples."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint must be False: MaskFormerTrainer saves a checkpoint on SIGTERM by itself."
            )
        if self.paper_schedule is not None:
            check_schedule(self.paper_schedule, self.warmup_factor, self.lr_milestones)
        # Trainer takes the loss by default, which evaluation does not compute. The task is known to the trainer only.
        self.takes_main_figure = self.metric_for_best_model is None
        if self.takes_main_figure and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = MAIN_FIGURES["semantic"]
        super().__post_init__()
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"power": 0.9, "lr_end": 0.0}
        # Pinned memory speeds up copies to an accelerator; without one torch warns at every epoch.
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False


class MaskFormerTrainer(Trainer):
    """Thin subclass of `Trainer`; the model also trains with `Trainer` itself.

    What differs: the optimiser's parameter groups (`parameter_groups`), every loss term by name in the log, batch norm
    that is synchronised over the processes of several GPUs (unless it is frozen), an end when the loss stays NaN or
    infinite, checkpoints that are whole or not there and one on SIGTERM, and `evaluate`, which gives the metric of the
    image processor's `segmentation_task` at the resolution of the ground truth without ever gathering masks. Under
    gradient accumulation the loss is that of the whole batch, whereas `Trainer` takes the mean of the losses of its
    parts, in which a segment weighs more the fewer there are beside it. Pass the image processor as `processing_class`
    and data sets of samples (see `hf_maskformer.data.sample.Sample`); without `data_collator`, a
    `MaskFormerDataCollator` makes the batches. With "tensorboard" in report_to, it shows pictures of predictions.
    """

    args: MaskFormerTrainingArguments
    processing_class: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.processing_class, MaskFormerImageProcessor):
            raise ValueError(
                f"processing_class is {self.processing_class!r}, but evaluation needs a MaskFormerImageProcessor."
            )
        model: Any = self.accelerator.unwrap_model(self.model)
        check_model(self.task, model)
        # Trainer's own default stacks the fields of samples, which have images of all sizes.
        if self.data_collator is default_data_collator and kwargs.get("data_collator") is None:
            self.data_collator = MaskFormerDataCollator(self.processing_class, target_format=target_format(model))
        if self.args.takes_main_figure and self.args.metric_for_best_model is not None:
            self.args.metric_for_best_model = MAIN_FIGURES[self.task]
        self._check_metric_for_best_model()
        self.add_callback(EpochCallback())
        self._interruption = InterruptionCallback()
        self.add_callback(self._interruption)
        self._add_pictures()
        # Statistics of a few images per process are too noisy to train with; CPUs have no synchronised form.
        if self.args.world_size > 1 and self.args.device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # The model is given `num_items_in_batch` that mean something to it, see below.
        self.model_accepts_loss_kwargs = True
        self._loss_terms: dict[str, Tensor] = {}
        self._step_of_first_term = 0
        self._terms_of_batch: dict[str, Tensor] = {}
        self._num_nonfinite = 0

    @property
    def task(self) -> Task:
        """What is evaluated: the `segmentation_task` of the image processor, "semantic" where it does not say."""
        return self.processing_class.segmentation_task or "semantic"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Builds the optimiser that the arguments name, over `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model, self.args.learning_rate, self.args.weight_decay, self.args.backbone_learning_rate_factor
            )
            self.optimizer = optimizer_class(groups, **optimizer_kwargs)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the schedule of `paper_schedule`, or else the one that `lr_scheduler_type` names."""
        if self.lr_scheduler is None and self.args.paper_schedule is not None:
            factor = learning_rate_schedule(
                self.args.paper_schedule,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.warmup_factor,
                self.args.lr_milestones,
            )
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None  # Trainer builds it first
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `Trainer` does.

        On SIGTERM it saves a checkpoint after the step under way and raises SystemExit(75) (`EXIT_INTERRUPTED`); an
        evaluation under way is given up.

        Args:
            resume_from_checkpoint: a folder; True for the last checkpoint that is whole; "auto" for that too, but to
                start anew if there is none.
            args, kwargs: as in `Trainer.train`.

        Raises:
            OSError: `output_dir` cannot be written.
            ValueError: the checkpoint is not whole.
            ChildProcessError: a process that reads data died.
        """
        if self.args.should_save:
            _check_writable(Path(self.args.output_dir or "."))
        if resume_from_checkpoint is True or resume_from_checkpoint == "auto":
            # Trainer says of True that there is none.
            resume_from_checkpoint = _last_whole_checkpoint(self.args.output_dir) or resume_from_checkpoint is True
        if isinstance(resume_from_checkpoint, str) and not _is_whole(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is no whole checkpoint: it is not there, or its writing was cut off. "
                f"{_way_on(self.args.output_dir)}."
            )
        with dead_workers_named(self.args.dataloader_num_workers), self._interruption:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._interruption.is_ending:
            self._end_interrupted()
        return result

    def _end_interrupted(self) -> None:
        logger.warning(
            f"SIGTERM ended the training after step {self.state.global_step}. {_way_on(self.args.output_dir)}."
        )
        raise SystemExit(EXIT_INTERRUPTED)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """The epoch in which training goes on, and how many of its batches were used: of a stream, pass and batches."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is not None and self.train_dataset is not None and not has_length(self.train_dataset):
            # Trainer takes a stream for endless, but begins anew where it ends; `epoch` counts passes.
            saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            passes, share = divmod(saved.epoch or 0.0, 1)
            epochs = int(passes)
            if not self.args.ignore_data_skip:
                batches = round(share * saved.max_steps) * self.args.gradient_accumulation_steps
        return epochs, batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step of the optimiser; none where a stream ends before there are enough of them.

        `Trainer` would add the gradient of such a rest to that of the first step after it.
        """
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (batch_samples, num_items_in_batch) if len(batch_samples) == num_batches else ([], None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and image processor. Raises a ValueError, and writes nothing, if a weight is NaN or infinite."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"{name} is not finite in step {self.state.global_step}, so the model is not saved. "
                    f"{_way_on(self.args.output_dir)}, with a lower learning_rate, a smaller max_grad_norm or in "
                    "higher precision."
                )
        if self.is_fsdp_enabled and not _internal_call:
            # What from_pretrained reads, also where checkpoints are saved in the shards of the processes.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        # A full disk is an OSError where Python writes, but not where safetensors and torch do.
        except (OSError, SafetensorError, RuntimeError) as error:
            # What follows the writing, such as an upload, or what happens meanwhile is no matter of the disk.
            if _is_whole(folder) or str(error).startswith(DEAD_WORKER):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} cannot be written ({error}) and was removed. See that there is room; save_total_limit "
                f"bounds how much checkpoints take. {_way_on(self.args.output_dir)}."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What follows is the state, which says that the checkpoint is whole: with the parts of all processes.
        self.accelerator.wait_for_everyone()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; its terms are remembered for the next line of the log."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if outputs.loss is None:
            raise ValueError(
                f"{type(self.model).__name__} has no loss for a batch of {', '.join(inputs)}: these are no targets of "
                'its kind. Set target_format of MaskFormerDataCollator: "segment_map" for MaskFormer, "label_map" for '
                "the per-pixel baselines."
            )
        if model.training:
            if not self._loss_terms:
                self._step_of_first_term = self.state.global_step
            # As Trainer does with the loss: without the numbers of the whole batch, each part has a loss of its own.
            share = 1 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
            self._terms_of_batch = outputs.loss_dict
            for name, term in outputs.loss_dict.items():
                term = share * term.mean()  # one per GPU in DataParallel
                self._loss_terms[name] = self._loss_terms.get(name, 0.0) + term
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one batch; raises a ValueError if too many losses in a row are NaN or infinite."""
        loss = super().training_step(*args, **kwargs)
        # Matching waits for the model in every step and Trainer looks at the loss too: this costs no time.
        self._num_nonfinite = 0 if loss.isfinite() else self._num_nonfinite + 1
        if self._num_nonfinite and self._num_nonfinite == self.args.max_nonfinite_losses:
            terms = ", ".join(f"{name} {term.mean().item():.4g}" for name, term in self._terms_of_batch.items())
            raise ValueError(
                f"The loss was not finite for {self._num_nonfinite} batches in a row, the last in step "
                f"{self.state.global_step + 1}: {terms}. Go on from an earlier checkpoint with a lower learning_rate, "
                "a smaller max_grad_norm or in higher precision; max_nonfinite_losses says how many are let pass."
            )
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The normalisers of one step of the optimiser (`count_items`), over all its batches and all processes."""
        has_labels = all("class_labels" in batch for batch in batch_samples)
        # DataParallel would tear the two numbers apart, so each of its batches has a loss of its own.
        if not batch_samples or not has_labels or self.args.n_gpu > 1:
            return None
        config: Any = self.accelerator.unwrap_model(self.model).config
        counts = [
            count_items(batch["class_labels"], config.decoder_config.num_queries, config.no_object_weight)
            for batch in batch_samples
        ]
        return self.accelerator.reduce(torch.stack(counts).sum(0).to(device), reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last line that reported the loss, over steps and processes."""
        if "loss" in logs and self._loss_terms:
            num_steps = max(self.state.global_step - self._step_of_first_term, 1)
            means = torch.stack(list(self._loss_terms.values())) / num_steps
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= {name: round(mean, 4) for name, mean in zip(self._loss_terms, means.tolist(), strict=True)}
            self._loss_terms = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates the task of the image processor by `hf_maskformer.evaluation.evaluation.evaluate`.

        Args:
            eval_dataset: samples with their `labels`, or a dictionary of such data sets; default that of the trainer.
            ignore_keys: without meaning here, since no outputs are gathered.
            metric_key_prefix: begins the names of the figures; for a dictionary followed by the data set's name.

        Returns:
            The figures of the task's metric but those of single classes, fractions in 0 to 1: `eval_mean_iou`, ...,
            `eval_pq`, ... or `eval_ap`, ..., for another `metric_key_prefix` under that. What the data give no figure
            for is left out.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            parts = [
                self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, dataset in eval_dataset.items()
            ]
            return {name: value for part in parts for name, value in part.items()}
        figures = evaluate(
            self._whole_model(),
            self.processing_class,
            eval_dataset,
            self.task,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            autocast=self.accelerator.autocast,
            should_stop=lambda: self.is_in_train and self._interruption.is_asked,
        )
        if self.is_in_train and self._interruption.agree_to_end():
            assert self.model is not None
            self._save_checkpoint(self.model, None)
            self._end_interrupted()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scalars(figures).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _whole_model(self) -> nn.Module:
        """The model that a process can run by itself, whatever the others do: under FSDP2 a copy of all shards."""
        model: Any = self.accelerator.unwrap_model(self.model)
        is_sharded = isinstance(model, FSDPModule)
        if not is_sharded:
            return model
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        whole = type(model).__mro__[2](model.config)  # FSDP2 puts two classes of its own in front
        whole.load_state_dict(weights)
        return whole.to(self.args.device)

    def _check_metric_for_best_model(self) -> None:
        metric = self.args.metric_for_best_model
        if metric in ("loss", "eval_loss"):
            raise ValueError(
                f"metric_for_best_model is the loss, which evaluation does not compute. Use {MAIN_FIGURES[self.task]}."
            )
        other = {MAIN_FIGURES[task]: task for task in TASKS if task != self.task}
        name = (metric or "").removeprefix("eval_")
        if name in other:
            raise ValueError(
                f"metric_for_best_model is {metric}, a figure of {other[name]} segmentation, but segmentation_task of "
                f"the image processor is {self.task}. Use {MAIN_FIGURES[self.task]}."
            )

    def _add_pictures(self) -> None:
        boards = [each for each in self.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
        # The first process alone draws them, which it cannot with a share of the weights.
        is_sharded = self.is_fsdp_enabled
        if boards and not is_sharded and self.args.num_pictures > 0 and hasattr(self.eval_dataset, "__len__"):
            dataset = self.eval_dataset
            if isinstance(dataset, dict):
                dataset = next(iter(dataset.values()))
            self.add_callback(PictureCallback(dataset, self.processing_class, boards[0], self.args.num_pictures))


def _is_whole(checkpoint: str | Path) -> bool:
    # Trainer writes the state last. A power failure may still lose what was written before it: a file of safetensors
    # says how long it is, and a file of torch is a zip archive, whose directory comes at its end.
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for suffix in ("*.pt", "*.pth") for path in folder.glob(suffix))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written ({error}). Nothing was trained; name another.") from error


def _last_whole_checkpoint(folder: str | None) -> str | None:
    checkpoints = sort_checkpoints(folder) if folder and Path(folder).is_dir() else []
    return next(filter(_is_whole, reversed(checkpoints)), None)


def _way_on(folder: str | None) -> str:
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint is None:
        return "There is no earlier checkpoint: start anew"
    return f"{checkpoint} is whole: go on from there by resume_from_checkpoint"


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_learning_rate_factor: float
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into backbone and the rest, each with and without weight decay.

    Norms, embeddings and Swin's position bias are not decayed; biases of other layers are, as in the paper's code.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_decayed = not isinstance(module, (*NORMS, nn.Embedding)) and name not in UNDECAYED_NAMES
                is_backbone = BACKBONE in f"{module_name}." and PYRAMID not in f"{module_name}."
                groups.setdefault((is_backbone, is_decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (backbone_learning_rate_factor if is_backbone else 1.0),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        # The backbone last: Trainer logs the learning rate of the first group.
        for (is_backbone, is_decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
