"""`TrainingArguments` with the paper's recipe as defaults."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..evaluation.tasks import MAIN_FIGURES
from .schedules import check_schedule

# Schedules that depend on an evaluation figure.
FOLLOWING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

logger = logging.get_logger(__name__)


@dataclass
class MaskFormerTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the paper's recipe for a ResNet-50.

    AdamW with learning rate 1e-4 and weight decay 1e-4, a tenth of the learning rate for the backbone, the gradient of
    the whole model clipped to norm 0.01, and a learning rate that decays to 0 as (1 - step / steps)^0.9. For a Swin
    backbone the paper uses learning_rate 6e-5, weight_decay 0.01 and backbone_learning_rate_factor 1.
    """

    backbone_learning_rate_factor: float = field(
        default=0.1,
        metadata={"help": "Factor on learning_rate for the backbone; the paper: 1 for Swin."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate; the paper: 6e-5 for Swin."})
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay, except for norms and embeddings; the paper: 0.01 for Swin."}
    )
    max_grad_norm: float = field(default=0.01, metadata={"help": "Norm to which the full model gradient is clipped."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Learning rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the scheduler; by default power 0.9, end 0 for 'polynomial'."}
    )
    paper_schedule: str | None = field(
        default=None,
        metadata={
            "help": "'poly' or 'steps': the schedule of the paper's code, in place of lr_scheduler_type, multiplied by "
            "the warm-up (warmup_steps). 'steps' divides the learning rate by 10 at lr_milestones."
        },
    )
    warmup_factor: float = field(
        default=1e-6, metadata={"help": "Fraction of learning_rate at which the warm-up of paper_schedule starts."}
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: [2 / 3], metadata={"help": "For paper_schedule 'steps', as fractions of the run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the collator reads the samples' fields."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When to publish: 'end' in one commit; the others upload the whole output_dir at each save."},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric that selects the best checkpoint; default mean_iou, pq or ap, if load_best_model_at_end, "
            "save_strategy 'best' or the schedule needs one."
        },
    )
    max_nonfinite_losses: int = field(
        default=3, metadata={"help": "Stop after this many consecutive batches with a NaN or infinite loss; 0: never."}
    )
    num_pictures: int = field(
        default=4,
        metadata={"help": "Samples drawn for the model card, and in TensorBoard if in report_to; 0: none."},
    )

    def __post_init__(self) -> None:
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: Trainer would remove image and segmentation_map from the samples."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint must be False: MaskFormerTrainer itself saves a checkpoint on SIGTERM."
            )
        if self.label_smoothing_factor or self.neftune_noise_alpha:
            raise ValueError("label_smoothing_factor and neftune_noise_alpha do not apply here. Leave them out.")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval do not apply here: evaluation uses the precision of training. "
                "Leave them out."
            )
        if not 0 <= self.backbone_learning_rate_factor < math.inf:
            raise ValueError(
                f"backbone_learning_rate_factor is {self.backbone_learning_rate_factor}, but must be finite and at "
                "least 0: it multiplies learning_rate for the backbone."
            )
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; set at least 1, or leave it out to train by epochs.")
        if self.paper_schedule is not None:
            check_schedule(self.paper_schedule, self.warmup_factor, self.lr_milestones)
        # Trainer's default is the loss, which evaluation does not compute. Only the trainer knows the task.
        self.takes_main_figure = self.metric_for_best_model is None
        follows_figure = self.lr_scheduler_type in FOLLOWING_SCHEDULES
        if self.takes_main_figure and (self.load_best_model_at_end or self.save_strategy == "best" or follows_figure):
            self.metric_for_best_model = MAIN_FIGURES["semantic"]
        super().__post_init__()
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            logger.warning(
                f"eval_steps is {self.eval_steps}, but save_steps {self.save_steps}. If the best evaluation has no "
                "checkpoint, it cannot be loaded. Set save_steps to eval_steps, or save_strategy to 'best'."
            )
        # If one process reads a stream for all, it concatenates batches, which then need equal numbers of segments.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False
        self.complete_scheduler_kwargs()
        # Pinned memory speeds up copies to an accelerator; without one torch warns at every epoch.
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False

    def complete_scheduler_kwargs(self) -> None:
        """Adds the defaults of `lr_scheduler_type` to `lr_scheduler_kwargs`, in place of those of another type."""
        polynomial = {"power": 0.9, "lr_end": 0.0}
        # torch's default is for a loss, which should fall.
        following = {"mode": "max" if self.greater_is_better else "min"}
        given: Any = self.lr_scheduler_kwargs or {}  # already parsed from a string
        if given in (polynomial, following):
            given = {}
        if self.lr_scheduler_type == "polynomial":
            given = polynomial | given
        if self.lr_scheduler_type in FOLLOWING_SCHEDULES:
            if self.metric_for_best_model is None:  # the type was set later, after the task's figure is chosen
                raise ValueError(
                    f"lr_scheduler_type {self.lr_scheduler_type} follows metric_for_best_model, which is None. Set it "
                    "when the arguments are created."
                )
            given = following | given
        self.lr_scheduler_kwargs = given

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles the arguments into training_args.bin, which hub_strategy "every_save" uploads.
        return self.__dict__ | {"hub_token": None}
