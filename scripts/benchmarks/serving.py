"""The work of a service: loading a model (`load`), then segmenting photographs (`photo`)."""

import argparse
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

from .images import confident_scene
from .inputs import autocast
from .measuring import Comparison
from .models import build_models, new_config


def load(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """`from_pretrained` of one checkpoint by each class, from files in the operating system's cache."""
    config = new_config(arguments)
    classes: dict[str, Any] = {
        "stock": transformers.MaskFormerForInstanceSegmentation,
        "ours": MaskFormerForInstanceSegmentation,
    }
    with TemporaryDirectory() as folder:
        MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
        yield "load", {name: partial(each.from_pretrained, folder) for name, each in classes.items()}


def photo(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """A photograph, half as large again as the input each way, to its panoptic segmentation.

    Random weights are confident about nothing, so the class logits of both are replaced so that 20 queries count.
    """
    stock, ours = (model.eval() for model in build_models(arguments, deep_supervision=False, freeze_batch_norm=True))
    class_logits = confident_scene(side=8)[0].to(arguments.device)
    for model in (stock, ours):
        model.class_predictor.register_forward_hook(lambda module, inputs, output: class_logits.expand(output.shape))
    side = arguments.size * 3 // 2
    coarse = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    photograph = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    size = {"shortest_edge": arguments.size, "longest_edge": 4 * arguments.size}
    stock_processor, our_processor = MaskFormerImageProcessorPil(size=size), MaskFormerImageProcessor(size=size)
    settings: dict[str, Any] = {"target_sizes": [(side, side)], "threshold": 0.5, "label_ids_to_fuse": set()}

    def run_stock() -> Any:
        with torch.no_grad(), autocast(arguments):
            outputs = stock(**stock_processor(photograph, return_tensors="pt").to(arguments.device))
        return stock_processor.post_process_panoptic_segmentation(outputs, **settings)

    def run_ours() -> Any:
        with autocast(arguments):
            outputs = ours.predict(**our_processor(photograph, return_tensors="pt").to(arguments.device), threshold=0.5)
        return our_processor.post_process_panoptic_segmentation(outputs, **settings)

    yield "photo", {"stock": run_stock, "ours": run_ours}
