"""The random numbers of augmented data sets: which are the same and which differ."""

import numpy as np
import pytest
import torch
from models import tiny_config
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.augmented import AugmentedDataset, AugmentedStream
from hf_maskformer.training.epochs import EpochCallback


class Numbered:
    """Samples that carry nothing but their index."""

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"name": str(index)}


class Stream(IterableDataset):
    """The same as a stream, of which each worker reads all."""

    epoch = None

    def __iter__(self):
        return iter(Numbered()[index] for index in range(8))

    def set_epoch(self, epoch):
        self.epoch = epoch


def note_draw(sample, generator=None):
    """Stands for an augmentation: notes the random number that it would use."""
    return {**sample, "draw": int(torch.randint(2**40, (), generator=generator))}


def draws(dataset, epoch=None, **options):
    """The draws of one epoch, in the order of the samples."""
    if epoch is not None:
        dataset.set_epoch(epoch)
    samples = DataLoader(dataset, batch_size=None, **options)
    return [sample["draw"] for sample in sorted(samples, key=lambda sample: int(sample["name"]))]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_draws_depend_on_neither_workers_nor_order_nor_the_global_generator(num_workers):
    torch.manual_seed(num_workers)
    dataset = AugmentedDataset(Numbered(), note_draw, seed=3)
    dataset.set_epoch(5)
    expected = [dataset[index]["draw"] for index in range(8)]
    assert draws(AugmentedDataset(Numbered(), note_draw, seed=3), 5, num_workers=num_workers, shuffle=True) == expected


def test_every_sample_epoch_and_seed_has_numbers_of_its_own():
    found = set()
    for seed in (0, 1):
        dataset = AugmentedDataset(Numbered(), note_draw, seed)
        found |= {draw for epoch in range(3) for draw in draws(dataset, epoch)}
    assert len(found) == 2 * 3 * 8


def test_workers_that_live_on_see_the_epoch_change():
    dataset = AugmentedDataset(Numbered(), note_draw)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([sample["draw"] for sample in loader])
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_an_epoch_the_global_generator_decides(num_workers):
    dataset = AugmentedDataset(Numbered(), note_draw)
    torch.manual_seed(0)
    first, second = (draws(dataset, num_workers=num_workers) for _ in range(2))
    torch.manual_seed(0)
    assert draws(dataset, num_workers=num_workers) == first
    assert len({*first, *second}) == 16


def test_the_end_of_a_data_set_is_its_end():
    assert len(list(AugmentedDataset([{"name": "a"}], note_draw))) == 1
    last = AugmentedDataset(Numbered(), note_draw)
    last.set_epoch(0)
    assert last[-1]["draw"] == last[7]["draw"]


def test_a_stream_draws_anew_in_each_worker_epoch_and_process(monkeypatch):
    found = []
    for process in ("0", "1"):
        monkeypatch.setenv("RANK", process)
        stream = AugmentedStream(Stream(), note_draw)
        for epoch in range(2):
            found += draws(stream, epoch, num_workers=2)
    assert len(found) == len(set(found)) == 2 * 2 * 16
    assert stream.dataset.epoch == 1


def test_a_stream_repeats_its_draws():
    assert draws(AugmentedStream(Stream(), note_draw, 4), 2) == draws(AugmentedStream(Stream(), note_draw, 4), 2)
    assert draws(AugmentedStream(Stream(), note_draw, 4), 2) != draws(AugmentedStream(Stream(), note_draw, 5), 2)


DRAWN: list[tuple[str, int]] = []


def note_and_keep(sample, generator=None):
    DRAWN.append((sample["name"], note_draw(sample, generator)["draw"]))
    return sample


class Images(Numbered):
    def __getitem__(self, index):
        segmentation_map = np.zeros((32, 32), dtype=np.uint8)
        return {"image": Image.new("RGB", (32, 32)), "segmentation_map": segmentation_map, "name": str(index)}


def train(output_dir, trainer_class=MaskFormerTrainer, max_steps=6, resume=False):
    DRAWN.clear()
    processor = MaskFormerImageProcessor(do_resize=False)
    trainer = trainer_class(
        model=MaskFormerForInstanceSegmentation(tiny_config(num_labels=2)),
        args=MaskFormerTrainingArguments(
            output_dir=str(output_dir),
            per_device_train_batch_size=2,
            max_steps=max_steps,
            save_steps=3,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=AugmentedDataset(Images(4), note_and_keep),
        data_collator=MaskFormerDataCollator(processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-3") if resume else None)
    return list(DRAWN)


def test_a_training_that_is_resumed_draws_what_it_would_have_drawn(tmp_path):
    whole = train(tmp_path)
    assert len(set(whole)) == 12  # three epochs of four samples
    resumed = train(tmp_path, resume=True)
    # Three steps are done, one and a half epochs; the second epoch is read from its start and the first half skipped.
    assert resumed[-6:] == whole[-6:]


def test_plain_trainer_draws_anew_in_each_epoch(tmp_path):
    assert len(set(train(tmp_path, Trainer))) == 12


def test_the_callback_tells_the_data_set_the_epoch():
    class Loader:
        dataset = Stream()

    class State:
        epoch = 3.5

    callback, epochs = EpochCallback(), []
    callback.on_train_begin(None, State(), None)
    for _ in range(2):
        callback.on_epoch_begin(None, State(), None, train_dataloader=Loader())
        epochs.append(Loader.dataset.epoch)
    assert epochs == [3, 4]
