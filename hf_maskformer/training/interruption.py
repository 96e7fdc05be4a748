"""Ends a run that the system asks to end, after a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_INTERRUPTED = 75  # "temporary failure, try again" among the codes of sysexits.h


class InterruptionCallback(TrainerCallback):
    """Lets a training end after the step in which SIGTERM arrives, with a checkpoint and without an evaluation.

    Listens inside its own `with` block only. transformers' `enable_jit_checkpoint` waits for three seconds, on each
    process by its own clock, and saves within a step, where random numbers are already drawn: processes could save
    different steps, and what is resumed would not be what was interrupted.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_ending = False
        self._handler_before: Any = None

    def __enter__(self) -> None:
        self.is_asked = self.is_ending = False
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:  # Python lets no other thread do so
            self._handler_before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._handler_before or signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Workers that read data inherit this and so outlive the signal, which often goes to all processes of a run.
        self.is_asked = True

    def agree_to_end(self) -> bool:
        """Whether any process was asked. To be called by all of them, so that all end after the same step."""
        state = PartialState()
        self.is_ending = self.is_asked
        if state.num_processes > 1:
            is_asked = torch.tensor(float(self.is_asked), device=state.device)
            torch.distributed.all_reduce(is_asked)
            self.is_ending = is_asked.item() > 0
        return self.is_ending

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agree_to_end():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_ending:  # an epoch cut short, whose checkpoint is written
            control.should_save = control.should_evaluate = False
