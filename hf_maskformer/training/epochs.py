"""Tells data sets which epoch begins."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training data set, so that augmentations differ between epochs and can be repeated.

    Accelerate's data loaders do this for a single process only.
    """

    def __init__(self) -> None:
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A training that goes on within an epoch begins at a fraction.
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset: Any = getattr(kwargs["train_dataloader"], "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(self._epoch)
        # Counted here: the passes over a stream, whose length nobody knows, are fractions of an epoch to Trainer.
        self._epoch += 1
