"""Memory does not grow with the length of a run, and gradient checkpointing saves what it promises."""

import ctypes
import gc
import platform
import random
from pathlib import Path

import pytest
import torch
from models import swin_config, tiny_batch, tiny_config, tiny_model
from transformers import DetrConfig, ResNetConfig, SwinConfig

from hf_maskformer import MaskFormerForInstanceSegmentation
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.training.starting_point import image_processor_for

MIB = 2**20
only_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc for the memory")


def resident() -> int:
    """Bytes of this process in memory, but for what its allocator has free and keeps: pieces of no use to others."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def num_tensors() -> int:
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


def varying_sizes(count):
    """Sizes of which the largest comes early, so that what the allocator keeps is there before it is measured."""
    draw = random.Random(0)
    return [(256, 256), (256, 256)] + [(32 * draw.randint(2, 8), 32 * draw.randint(2, 8)) for _ in range(count - 2)]


def batch_of_300_segments():
    index_map = torch.arange(300).reshape(15, 20).repeat_interleave(8, 0).repeat_interleave(8, 1)
    pixel_values, class_labels = torch.randn(1, 3, 120, 160), torch.randint(4, (1, 300))
    return {"pixel_values": pixel_values, "mask_labels": index_map[None], "class_labels": class_labels}


@only_glibc
@pytest.mark.slow
def test_two_hundred_training_steps_of_varying_size_take_no_more_memory_than_a_hundred():
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step, size in enumerate(varying_sizes(300)):
        # Every tenth image is full of small segments.
        batch = batch_of_300_segments() if step % 10 == 0 else tiny_batch(size=size)
        model(**batch).loss.backward()
        del batch
        optimizer.step()
        optimizer.zero_grad()
        if step == 100:
            memory, tensors = resident(), num_tensors()
    assert num_tensors() == tensors
    # A batch of the largest size has 1.5 MiB of pixels alone: a leak of one tensor of each step would be 100 MiB.
    assert resident() - memory < 30 * MIB  # fragments that the allocator cannot give back took up to 12


class Scenes:
    """Scenes of many sizes, drawn when they are asked for."""

    def __init__(self, count, task):
        self.sizes, self.task = varying_sizes(count), task
        self.labels = self.scenes(0).labels
        self.measured = {}

    def scenes(self, index):
        return GeneratedScenes(1, image_size=self.sizes[index], task=self.task, seed=index)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index in (100, len(self) - 1):
            self.measured[index] = resident()
        return self.scenes(index)[0]


@only_glibc
@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_two_hundred_evaluated_images_of_varying_size_take_no_more_memory_than_a_hundred(task):
    scenes = Scenes(300, "semantic" if task == "semantic" else "panoptic")
    model = tiny_model(id2label=scenes.labels.id2label)
    processor = image_processor_for(scenes.labels, image_size=128, task=task)
    evaluate(model, processor, scenes, task)
    first, last = scenes.measured.values()
    assert last - first < 10 * MIB


def bytes_for_backward(model, batch):
    """Bytes that a training step keeps from its forward for its backward pass, but for the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "backbone",
    [
        ResNetConfig(depths=[3, 4, 6, 3], embedding_size=16, hidden_sizes=[64, 128, 256, 512]),
        SwinConfig(embed_dim=24, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=7),
    ],
    ids=["resnet50", "swin-tiny"],
)
def test_gradient_checkpointing_keeps_at_least_40_percent_less(backbone):
    """With the depths of the paper's smallest models, at a quarter of their width."""
    decoder = DetrConfig(d_model=64, decoder_layers=6, decoder_attention_heads=8, decoder_ffn_dim=512, num_queries=100)
    config = tiny_config(backbone, decoder_config=decoder, fpn_feature_size=64, mask_feature_size=64)
    model, batch = MaskFormerForInstanceSegmentation(config).train(), tiny_batch(batch_size=1, size=(256, 256))
    without = bytes_for_backward(model, batch)
    model.gradient_checkpointing_enable()
    assert bytes_for_backward(model, batch) < 0.6 * without


@pytest.mark.parametrize("num_queries", [6, 320])
def test_an_image_with_300_segments_trains(num_queries):
    decoder = DetrConfig(
        d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, num_queries=num_queries
    )
    model = tiny_model(swin_config(), decoder_config=decoder).train()
    loss = model(**batch_of_300_segments()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
