"""`Trainer` with the paper's parameter groups, logging of all loss terms, and evaluation by the task's metric."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerState, default_data_collator
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils import logging

from ..data.collator import MaskFormerDataCollator
from ..data.workers import dead_workers_named
from ..evaluation.evaluation import evaluate
from ..evaluation.report import scalars
from ..evaluation.tasks import MAIN_FIGURES, Task, check_model, task_for
from ..hub.publishing import BROKEN_OFF_BEFORE, explained_errors, publish
from ..loss_maskformer import count_items
from .arguments import MaskFormerTrainingArguments
from .checkpoints import (
    check_writable,
    checkpoint_to_resume,
    how_to_resume,
    how_to_start_over,
    named_if_not_written,
    removed_if_incomplete,
)
from .checks import (
    check_checkpoint,
    check_classes,
    check_eval_classes,
    check_eval_data,
    check_length,
    check_metric_for_best_model,
    check_parts,
    check_weights,
)
from .epochs import EpochCallback
from .interruption import EXIT_INTERRUPTED, InterruptionCallback
from .loss_terms import LossTerms
from .parameter_groups import parameter_groups
from .pictures import PictureCallback, drawn_data
from .run_card import figures_of_weights, write_run_card
from .schedules import learning_rate_schedule
from .starting_point import target_format

logger = logging.get_logger(__name__)


class MaskFormerTrainer(Trainer):
    """Thin subclass of `Trainer`; the model also trains with `Trainer` itself.

    What differs: the optimiser's parameter groups (`parameter_groups`), every loss term by name in the log, batch norm
    synchronised over the processes of several GPUs (unless it is frozen), an early stop if the loss stays NaN or
    infinite, atomic checkpoints and one on SIGTERM, and `evaluate`, which computes the metric of the image processor's
    `segmentation_task` at the resolution of the ground truth without ever gathering masks. Under gradient accumulation
    the loss is that of the whole batch, whereas `Trainer` averages the losses of the micro-batches, in which a segment
    weighs more the fewer there are. (For a per-pixel baseline it is the average here too.) Pass the image processor as
    `processing_class` and data sets of samples (see `hf_maskformer.data.sample.Sample`); without `data_collator`, a
    `MaskFormerDataCollator` is used. With "tensorboard" in report_to, it shows pictures of predictions.
    """

    args: MaskFormerTrainingArguments
    processing_class: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_parts(self)
        model: Any = self.accelerator.unwrap_model(self.model)
        check_model(self.task, model)
        check_classes(model, self.train_dataset, getattr(self.data_collator, "image_processor", self.processing_class))
        is_dict = isinstance(self.eval_dataset, dict)
        # Trainer's own default stacks the fields of samples, which have images of all sizes.
        if self.data_collator is default_data_collator and kwargs.get("data_collator") is None:
            self.data_collator = MaskFormerDataCollator(self.processing_class, target_format=target_format(model))
        if self.args.takes_main_figure and self.args.metric_for_best_model is not None:
            of_data = f"{next(iter(self.eval_dataset))}_" if is_dict and self.eval_dataset else ""
            self.args.metric_for_best_model = of_data + MAIN_FIGURES[self.task]
        is_own = type(self).evaluate is MaskFormerTrainer.evaluate  # an override may have other data and figures
        for eval_dataset in self.eval_dataset.values() if is_dict else [self.eval_dataset]:
            check_eval_classes(self.train_dataset, eval_dataset)
            if is_own:
                check_eval_data(self.task, eval_dataset)
        if is_own:
            check_metric_for_best_model(self.args.metric_for_best_model, self.task, self.eval_dataset)
        self.add_callback(EpochCallback())
        self._interruption = InterruptionCallback()
        self.add_callback(self._interruption)
        self._add_pictures()
        # Statistics of a few images per process are too noisy to train with; SyncBatchNorm does not support CPUs.
        if self.args.world_size > 1 and self.args.device.type != "cpu":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # The model is given a `num_items_in_batch` of its own form, see below.
        self.model_accepts_loss_kwargs = True
        # Reset by each training run.
        self._loss_terms, self._num_nonfinite = LossTerms(), 0
        # The step from which the last training run resumed; 0 if it started from scratch.
        self.first_step = 0

    @property
    def task(self) -> Task:
        """What is evaluated."""
        return task_for(self.processing_class)

    @property
    def _has_stream(self) -> bool:
        return self.train_dataset is not None and not has_length(self.train_dataset)

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None  # the arguments have a default for it
        return Path(self.args.output_dir)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or self._folder.absolute().name

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Builds the optimiser that the arguments name, or `optimizer_cls_and_kwargs`, over `parameter_groups`.

        Learning rates and weight decay are always those of the arguments.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, optimizer_kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
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
        self.args.complete_scheduler_kwargs()  # the type may have changed, as in a hyperparameter search
        if self.args.lr_scheduler_type == "polynomial":
            # transformers divides by the number of steps after the warm-up, which may be 0 in a short run.
            num_training_steps = max(num_training_steps, self.args.get_warmup_steps(num_training_steps) + 1)
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:  # unexpected or missing arguments
            raise ValueError(
                f"lr_scheduler_kwargs {self.args.lr_scheduler_kwargs} do not match lr_scheduler_type "
                f"{self.args.lr_scheduler_type} ({error})."
            ) from error

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `Trainer` does.

        On SIGTERM it saves a checkpoint after the current step and raises SystemExit(75) (`EXIT_INTERRUPTED`); a
        running evaluation is aborted.

        Args:
            resume_from_checkpoint: a folder; True for the last complete checkpoint; "auto" likewise, but starting from
                scratch if there is none. From that of the last step, the model is loaded and no step is trained.
            args, kwargs: as in `Trainer.train`.

        Raises:
            OSError: `output_dir` is not writable.
            ValueError: the checkpoint is incomplete, or from a model with other classes or another optimiser; or there
                are too few images for one step.
            ChildProcessError: a data-loading worker died.
        """
        check_length(self.train_dataset, self.args)
        if self.args.should_save:
            check_writable(Path(self.args.output_dir or "."))
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            check_checkpoint(resume_from_checkpoint, self.accelerator.unwrap_model(self.model), self.args)
        with dead_workers_named(self.args.dataloader_num_workers), self._interruption:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._interruption.is_ending:
            self._end_interrupted()
        if self._has_stream and self.state.global_step == self.first_step < self.state.max_steps:
            raise ValueError(
                f"Nothing was trained: the stream has fewer than the {self.args.gradient_accumulation_steps} batches "
                "of a step. Lower gradient_accumulation_steps or per_device_train_batch_size."
            )
        return result

    def _end_interrupted(self) -> None:
        logger.warning(
            f"SIGTERM ended training after step {self.state.global_step}. {how_to_resume(self.args.output_dir)}."
        )
        self.is_in_train = False  # which Trainer does not reset on exceptions
        raise SystemExit(EXIT_INTERRUPTED)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """The epoch (for a stream, the pass) in which training resumes, and how many of its batches were used."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self.first_step = self.state.global_step
        # An earlier run may have ended between two log entries, or because of non-finite losses; or in its first step,
        # after which auto_find_batch_size restarts.
        self._loss_terms, self._num_nonfinite = LossTerms(), 0
        if checkpoint is not None and self.first_step >= max_steps:
            return num_train_epochs, 0  # within an epoch, Trainer would train another step
        if checkpoint is not None and self._has_stream:
            # Trainer treats a stream as endless and restarts it at its end; `epoch` counts passes.
            saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            passes, share = divmod(saved.epoch or 0.0, 1)
            epochs = int(passes)
            if not self.args.ignore_data_skip:
                batches = round(share * saved.max_steps) * self.args.gradient_accumulation_steps
        return epochs, batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimiser step; none if a stream ends before there are enough of them.

        `Trainer` would add the gradient of such a remainder to that of the next step.
        """
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (batch_samples, num_items_in_batch) if len(batch_samples) == num_batches else ([], None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model, image processor and arguments, the latter also as training_args.json, without the Hub token.

        With `push_to_hub`, `Trainer` publishes what it saves; here only if `hub_strategy` is not "end".

        Raises:
            ValueError: a weight is NaN or infinite; nothing is written.
            OSError: writing fails, as on a full disk.
        """
        assert self.model is not None
        check_weights(self.model, self.state.global_step, self.args.output_dir)
        folder = self._folder if output_dir is None else Path(output_dir)
        is_checkpoint = _internal_call and output_dir is not None
        if self.is_fsdp_enabled and not is_checkpoint:
            # The format that from_pretrained reads, even if checkpoints are saved as one shard per process.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        # For a checkpoint, the error of `_save_checkpoint` says more.
        with nullcontext() if is_checkpoint else named_if_not_written(folder, self.args.output_dir):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "training_args.json").write_text(self.args.to_json_string())
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call and self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with removed_if_incomplete(folder, self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state is written next and marks the checkpoint as complete, so all processes must be done.
        self.accelerator.wait_for_everyone()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; its terms are stored for the next log entry."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        if outputs.loss is None:
            raise ValueError(
                f"{type(self.model).__name__} has no loss for a batch of {', '.join(inputs)}: it needs other targets. "
                'Set target_format of MaskFormerDataCollator: "segment_map" for MaskFormer, "label_map" for '
                "the per-pixel baselines."
            )
        if model.training:
            # As Trainer does with the loss: without the counts of the whole batch, each micro-batch has its own loss.
            share = 1 if num_items_in_batch is not None else 1 / self.current_gradient_accumulation_steps
            self._loss_terms.add(outputs.loss_dict, share, self.state.global_step)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trains on one batch; raises a ValueError if too many losses in a row are NaN or infinite."""
        loss = super().training_step(*args, **kwargs)
        # This costs no time: Trainer itself waits here for the loss, to keep NaN out of its log.
        self._num_nonfinite = 0 if loss.isfinite() else self._num_nonfinite + 1
        if self._num_nonfinite and self._num_nonfinite == self.args.max_nonfinite_losses:
            raise ValueError(
                f"The loss was not finite for {self._num_nonfinite} batches in a row, the last in step "
                f"{self.state.global_step + 1}: {self._loss_terms.of_last_batch()}. "
                f"{how_to_start_over(self.args.output_dir)}. max_nonfinite_losses is the limit."
            )
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The normalisers of one optimiser step (`count_items`), over all its batches and all processes."""
        has_labels = all("class_labels" in batch for batch in batch_samples)
        # DataParallel would scatter the two numbers, so each of its batches has its own loss.
        if not batch_samples or not has_labels or self.args.n_gpu > 1:
            return None
        config: Any = self.accelerator.unwrap_model(self.model).config
        counts = [
            count_items(batch["class_labels"], config.decoder_config.num_queries, config.no_object_weight)
            for batch in batch_samples
        ]
        return self.accelerator.reduce(torch.stack(counts).sum(0).to(device), reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last entry with the loss, over steps and processes."""
        if "loss" in logs and self._loss_terms:
            logs |= self._loss_terms.take_means(self.state.global_step, self.accelerator)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates the task of the image processor with `hf_maskformer.evaluation.evaluation.evaluate`.

        Args:
            eval_dataset: samples with their `labels`, or a dictionary of such data sets; default that of the trainer.
                A string selects one from the trainer's dictionary.
            ignore_keys: unused, since no outputs are gathered.
            metric_key_prefix: prefix of the figures' names; for a dictionary followed by the data set's name.

        Returns:
            The figures of the task's metric except those of single classes, fractions in 0 to 1: `eval_mean_iou`, ...,
            `eval_pq`, ... or `eval_ap`, ..., with `metric_key_prefix` as their prefix. Figures that are undefined for
            the data are left out.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            name = eval_dataset
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if name not in known:
                raise ValueError(f"There is no eval_dataset {name!r}; the names are: {', '.join(known) or 'none'}.")
            eval_dataset = known[name]
        if isinstance(eval_dataset, dict):
            parts = [
                self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, dataset in eval_dataset.items()
            ]
            return {name: value for part in parts for name, value in part.items()}
        if eval_dataset is None:
            raise ValueError("There is nothing to evaluate on. Pass eval_dataset to evaluate or to the trainer.")
        check_eval_classes(self.train_dataset, eval_dataset)
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

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a ValueError: the masks of all images together do not fit into memory."""
        raise ValueError(
            "MaskFormerTrainer gathers no masks. For figures, call evaluate(dataset, metric_key_prefix='test'); for "
            "segments, use predict of hf_maskformer.evaluation.prediction or a pipeline."
        )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        split: str | None = None,
    ) -> None:
        """Writes README.md into `output_dir`: figures, recipe, hardware, loss, `num_pictures` pictures, licence.

        Args:
            license: Hub identifier; by default that of the checkpoint from which training started.
            tags: further Hub tags.
            model_name: what the examples load; by default `hub_model_id` or the name of `output_dir`.
            finetuned_from: what training started from; by default what the model was loaded from.
            dataset_tags: Hub names of the data.
            dataset: their display names.
            split: the split that was evaluated.
            language, tasks, dataset_args: unused.

        Raises:
            ValueError: training started from weights of the paper's authors, and `license` is not theirs.
        """
        if self.is_world_process_zero():
            write_run_card(
                self,
                name=model_name or self.args.hub_model_id or self._folder.absolute().name,
                licence=license,
                tags=[*_as_list(tags), *_as_list(self.accelerator.unwrap_model(self.model).model_tags)],
                begun_with=finetuned_from,
                data_ids=_as_list(dataset_tags),
                data_names=_as_list(dataset),
                split=split,
            )

    def init_hf_repo(self, *arguments: Any, **options: Any) -> None:
        """Creates the repository of `push_to_hub`, before training.

        Raises:
            PermissionError: there is no token, it has expired, or it has no write access.
            ConnectionError: the Hub cannot be reached.
        """
        with explained_errors(self._repo_id, BROKEN_OFF_BEFORE):
            super().init_hf_repo(*arguments, **options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the model, writes its card and publishes everything in one commit with `publish`; errors are its own.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload; otherwise a future is returned.
            token: default `hub_token`, or that of `hf auth login`.
            revision: branch; default `hub_revision`, or "main".
            private: whether a new repository is private; default `hub_private_repo`.
            kwargs: of `create_model_card`.

        Returns:
            The commit on the first process, None on the others.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = self._repo_id
        figures = figures_of_weights(self.state, self.args.load_best_model_at_end)
        if figures:
            self.save_metrics("eval", figures)
        self.create_model_card(**{"model_name": repo_id, **kwargs})
        self._finish_current_push()
        arguments: dict[str, Any] = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        if not blocking:
            return HfApi().run_as_future(publish, self._folder, repo_id, **arguments)
        return publish(self._folder, repo_id, **arguments)

    def _whole_model(self) -> nn.Module:
        """A model that each process can run independently of the others: under FSDP2 an unsharded copy."""
        model: Any = self.accelerator.unwrap_model(self.model)
        is_sharded = isinstance(model, FSDPModule)
        if not is_sharded:
            return model
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        whole = type(model).__mro__[2](model.config)  # FSDP2 prepends two classes of its own
        whole.load_state_dict(weights)
        return whole.to(self.args.device)

    def _add_pictures(self) -> None:
        boards = [each for each in self.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
        dataset = drawn_data(self)
        if boards and dataset is not None and self.args.num_pictures > 0:
            self.add_callback(PictureCallback(dataset, self.processing_class, boards[0], self.args.num_pictures))


def _as_list(names: str | list[str] | set[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or ())
