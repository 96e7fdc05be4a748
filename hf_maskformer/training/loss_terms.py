"""Averages the loss terms between two log entries."""

from accelerate import Accelerator
from torch import Tensor, stack


class LossTerms:
    """Sums every term by name, and resets the sums when their means are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._first_step = 0
        self._last: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, terms: dict[str, Tensor], share: float, step: int) -> None:
        """Adds the terms of a batch, which makes up a share of the batch of an optimiser step."""
        if not self._sums:
            self._first_step = step
        self._last = terms
        for name, term in terms.items():
            # Under DataParallel a term has one value per GPU.
            self._sums[name] = self._sums.get(name, 0.0) + share * term.mean()

    def take_means(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each term over the optimiser steps since the last call and over processes."""
        means = stack(list(self._sums.values())) / max(step - self._first_step, 1)
        means = accelerator.reduce(means, reduction="mean")
        names = list(self._sums)
        self._sums = {}
        return {name: round(mean, 4) for name, mean in zip(names, means.tolist(), strict=True)}

    def of_last_batch(self) -> str:
        return ", ".join(f"{name} {term.mean().item():.4g}" for name, term in self._last.items())
