"""Tells data sets which epoch starts."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training data set, so that augmentations differ between epochs and are reproducible.

    Accelerate's data loaders do this for a single process only.
    """

    def __init__(self) -> None:
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that resumes within an epoch starts at a fraction.
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset: Any = getattr(kwargs["train_dataloader"], "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        # Counted here: to Trainer, a pass over a stream of unknown length is a fraction of an epoch.
        self._epoch += 1
