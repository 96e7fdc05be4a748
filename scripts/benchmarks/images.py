"""The image processors' work before the model (`preprocess`) and after it (`postprocess`)."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil
from transformers.utils import is_torchvision_available

from hf_maskformer import MaskFormerImageProcessor

from .inputs import NUM_LABELS, NUM_QUERIES
from .measuring import Comparison


def stock_image_processors(**settings: Any) -> dict[str, Any]:
    """transformers' image processors: the Pillow one, and, if torchvision imports, the torchvision one.

    Without torchvision `transformers.MaskFormerImageProcessor` is the Pillow one under another name.
    """
    processors: dict[str, Any] = {"stock, Pillow": MaskFormerImageProcessorPil(**settings)}
    # hf_maskformer has hidden a torchvision that is installed but does not import.
    if is_torchvision_available() and transformers.MaskFormerImageProcessor is not MaskFormerImageProcessorPil:
        processors["stock, torchvision"] = transformers.MaskFormerImageProcessor(**settings)
    else:
        print("torchvision does not import here, so transformers' torchvision image processor is not measured.")
    return processors


def preprocess(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Images of 480 x 640, with and without maps of 20 segments, resized so that the shorter edge is each of `edges`.

    "ours" makes index maps of the maps; "ours, masks" makes what stock makes.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (arguments.batch, 60, 80, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC) for pixels in coarse]
    # 4 x 5 rectangles, each with its own id
    maps = [np.arange(20, dtype=np.uint8).reshape(4, 5).repeat(120, 0).repeat(128, 1)] * len(images)
    for edge in arguments.edges:
        size = {"shortest_edge": edge, "longest_edge": 4 * edge}
        stock = stock_image_processors(size=size)
        ours = MaskFormerImageProcessor(size=size)
        yield (
            f"images {edge}",
            {name: partial(processor, images, return_tensors="pt") for name, processor in stock.items()}
            | {"ours": partial(ours, images)},
        )
        with_maps = {name: partial(processor, images, maps, return_tensors="pt") for name, processor in stock.items()}
        with_maps["ours"] = partial(ours.preprocess, images, maps, target_format="segment_map")
        with_maps["ours, masks"] = partial(ours, images, maps)
        for name, run in with_maps.items():
            print(f"targets at {edge}, {name}: {sum(each.nbytes for each in run()['mask_labels']) / 2**20:.1f} MiB")
        yield f"images and maps {edge}", with_maps


def postprocess(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Each task from the logits of one image; "naive" follows the paper's order of operations with whole tensors."""
    input_size = (arguments.size, arguments.size)
    target_size = (arguments.size * 8 // 5, arguments.size * 32 // 15)
    class_logits, mask_logits = (logits.to(arguments.device) for logits in confident_scene(arguments.size // 4))
    outputs = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    stock, ours = MaskFormerImageProcessorPil(), MaskFormerImageProcessor()

    def naive() -> torch.Tensor:
        labels = class_logits[0].softmax(-1)[:, :-1]
        masks = F.interpolate(mask_logits, size=input_size, mode="bilinear")[0].sigmoid()
        scores = torch.einsum("qk,qhw->khw", labels, masks)
        return F.interpolate(scores[None], size=target_size, mode="bilinear")[0].argmax(0)

    def call(processor: Any, kind: str, **options: Any) -> Callable[[], object]:
        method = getattr(processor, f"post_process_{kind}_segmentation")
        return partial(method, outputs, target_sizes=[target_size], **options)

    yield (
        "semantic",
        {
            "stock": call(stock, "semantic"),
            "naive": naive,
            **{f"ours, {mode}": call(ours, "semantic", mode=mode) for mode in ("paper", "direct", "fast")},
        },
    )
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "panoptic": ("panoptic", {"label_ids_to_fuse": set()}),
        "instance": ("instance", {}),
        "instance, masks": ("instance", {"return_binary_maps": True}),
        "instance, run lengths": ("instance", {"return_coco_annotation": True}),
    }
    for name, (kind, options) in kinds.items():
        yield name, {"stock": call(stock, kind, **options), "ours": call(ours, kind, **options)}


def confident_scene(side: int, num_segments: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, Q, K + 1) and (1, Q, side, side) that are confident about wavy regions around random centres."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.rand(num_segments, 2, 1, 1) * side
    distances = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2).sqrt()
    waves = F.interpolate(torch.randn(1, num_segments, 12, 12), size=(side, side), mode="bicubic")[0]
    distances = distances + 6 * waves
    nearest, second = distances.topk(2, dim=0, largest=False).values
    margins = torch.where(distances == nearest, second, nearest) - distances
    noise = torch.randn(NUM_QUERIES, side, side)
    mask_logits = 0.5 * noise - 8
    mask_logits[:num_segments] = margins.clamp(-9, 9) + 0.3 * noise[:num_segments]
    class_logits = torch.randn(NUM_QUERIES, NUM_LABELS + 1)
    class_logits[num_segments:, -1] += 12
    class_logits[range(num_segments), torch.randperm(NUM_LABELS)[:num_segments]] += 11
    order = torch.randperm(NUM_QUERIES)
    return class_logits[None, order], mask_logits[None, order]
