"""Ends a run on SIGTERM, after saving a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_INTERRUPTED = 75  # "temporary failure, try again" among the codes of sysexits.h


class InterruptionCallback(TrainerCallback):
    """Ends training after the step in which SIGTERM arrives, with a checkpoint and without an evaluation.

    Handles the signal only inside its own `with` block. transformers' `enable_jit_checkpoint` waits for three seconds,
    on each process's own clock, and saves within a step, where random numbers are already drawn: processes could save
    different steps, and a resumed run would differ from the interrupted one.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_ending = False
        self._handler_before: Any = None

    def __enter__(self) -> None:
        self.is_asked = self.is_ending = False
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:  # Python allows this in no other thread
            self._handler_before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._handler_before or signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Data-loading workers inherit this and so survive the signal, which often goes to all processes of a run.
        self.is_asked = True

    def agree_to_end(self) -> bool:
        """Whether any process got the signal. All of them must call this, so that all end after the same step."""
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
        if self.is_ending:  # a truncated epoch, whose checkpoint is already written
            control.should_save = control.should_evaluate = False
