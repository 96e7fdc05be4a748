"""Data sets whose samples are augmented as they are read, with random numbers that can be told in advance."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .augmentation import Augmentation
from .sample import Sample


class AugmentedDataset(Dataset[Sample]):
    """A map-style data set whose samples go through an augmentation each time they are read.

    Random numbers depend on seed, epoch and index alone: not on the number of processes or workers, nor on what was
    read before. So a training that is resumed goes on as if it had not been interrupted. The epoch is that of
    `set_epoch`, which training loops call (Accelerate's data loaders do so only in a single process; `EpochCallback`
    does it for Trainer). As long as nobody calls it, a number of torch's global generator, which a `DataLoader` seeds
    anew in each worker and epoch, takes its place.

    Args:
        dataset: a map-style data set of samples.
        augmentation: for instance `RandomScaleCropFlip`.
        seed: another seed gives other random numbers.
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
        """Says which epoch begins, also to workers that live on from the one before."""
        self._epoch.set(epoch)


class AugmentedStream(IterableDataset[Sample]):
    """A streamed data set whose samples go through an augmentation.

    Random numbers depend on seed, epoch, process, worker and the place in the worker's stream. Otherwise as
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
        """Says which epoch begins; a shuffled stream comes in another order then."""
        self._epoch.set(epoch)
        dataset: Any = self.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)


def generator_of(*key: int) -> torch.Generator:
    """A generator of random numbers of its own for each sequence of non-negative integers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class _SharedEpoch:
    """A number that worker processes see change."""

    def __init__(self) -> None:
        self._value = torch.full((), -1, dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)

    def get(self) -> int:
        epoch = int(self._value)
        return epoch if epoch >= 0 else int(torch.randint(2**62, ()))
