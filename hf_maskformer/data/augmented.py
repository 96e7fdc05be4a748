"""Data sets whose samples are augmented as they are read, with reproducible random numbers."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .augmentation import Augmentation
from .sample import Sample


class AugmentedDataset(Dataset[Sample]):
    """A map-style data set whose samples are augmented each time they are read.

    Random numbers depend on seed, epoch and index alone: not on the number of processes or workers, nor on what was
    read before. So a resumed run continues as if it had not been interrupted. The epoch is that of `set_epoch`, which
    training loops call (Accelerate's data loaders do so only in a single process; `EpochCallback` does it for Trainer).
    Until it is called, a number from torch's global generator, which a `DataLoader` reseeds in each worker and epoch,
    takes its place.

    Args:
        dataset: a map-style data set of samples.
        augmentation: for instance `RandomScaleCropFlip`.
        seed: seed of the random numbers.
    """

    def __init__(self, dataset: Dataset[Sample], augmentation: Augmentation, seed: int = 0) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self._epoch = _SharedEpoch()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's base class leaves the length out

    def __getitem__(self, index: int) -> Sample:
        generator = generator_of(self.seed, self._epoch.get(), range(len(self))[index])
        return self.augmentation(self.dataset[index], generator)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that begins, also in persistent workers."""
        self._epoch.set(epoch)


class AugmentedStream(IterableDataset[Sample]):
    """A streamed data set whose samples go through an augmentation.

    Random numbers depend on seed, epoch, process, worker and the position in the worker's stream. Otherwise like
    `AugmentedDataset`.
    """

    def __init__(self, dataset: IterableDataset[Sample], augmentation: Augmentation, seed: int = 0) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self._epoch = _SharedEpoch()
        # Set by torchrun and accelerate launch.
        self._process = int(os.environ.get("RANK", "0"))

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        key = (self.seed, self._epoch.get(), self._process, 0 if worker is None else worker.id)
        for position, sample in enumerate(self.dataset):
            yield self.augmentation(sample, generator_of(*key, position))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that begins; a shuffled stream is reshuffled."""
        self._epoch.set(epoch)
        dataset: Any = self.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)


def generator_of(*key: int) -> torch.Generator:
    """A separate random number generator for each sequence of non-negative integers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class _SharedEpoch:
    """An epoch number shared with worker processes."""

    def __init__(self) -> None:
        self._value = torch.full((), -1, dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)

    def get(self) -> int:
        epoch = int(self._value)
        return epoch if epoch >= 0 else int(torch.randint(2**62, ()))
