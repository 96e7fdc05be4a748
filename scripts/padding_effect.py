"""Measures how much the prediction for an image changes when the image shares a padded batch with another.

    python scripts/padding_effect.py --checkpoint OUTPUT --input photographs

Each image is predicted alone, and in a batch with itself rotated by 90 degrees, so that both are padded: by
transformers, by this package, and by this package with `mask_padding`. Prints the share of pixels that change label
(mean over the images, and maximum) and the largest change of a label probability and of a mask logit (mean over the
images).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import MaskFormerForInstanceSegmentation as StockModel
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.command_line import OptionParser, errors_as_messages
from hf_maskformer.evaluation.prediction import read_images
from hf_maskformer.modeling_maskformer_pixel_level import sizes_in_batch

STRIDE = 4  # pixels between two mask logits


@dataclass
class Arguments:
    checkpoint: str = field(metadata={"help": "A MaskFormer that transformers can load too: a folder or a Hub name."})
    input: str = field(metadata={"help": "An image, a folder of images, or an http(s) URL."})


class Prediction(NamedTuple):
    """The outputs of a model for one image."""

    labels: Tensor  # (H, W)
    label_probabilities: Tensor  # (Q, K + 1)
    mask_logits: Tensor  # (Q, h, w), those of the image alone


def main(arguments: Arguments) -> None:
    checkpoint = arguments.checkpoint
    processor = MaskFormerImageProcessor.from_pretrained(checkpoint)
    peers: dict[str, tuple[Any, Any]] = {
        "transformers": (
            StockModel.from_pretrained(checkpoint),
            MaskFormerImageProcessorPil.from_pretrained(checkpoint),
        ),
        "this package": (MaskFormerForInstanceSegmentation.from_pretrained(checkpoint), processor),
        "with `mask_padding`": (
            MaskFormerForInstanceSegmentation.from_pretrained(checkpoint, mask_padding=True),
            processor,
        ),
    }
    images = [image for _, image in read_images(arguments.input)]
    print(f"{len(images)} images, each alone and in a batch of two")
    print("| | pixels: mean, largest | label probability | mask logit |\n| --- | --- | --- | --- |")
    for name, (model, image_processor) in peers.items():
        moves = torch.tensor([moves_in_a_batch(model.eval(), image_processor, image) for image in images])
        pixels, probability, logit = moves.mean(dim=0).tolist()
        print(f"| {name} | {pixels:.1%}, {moves[:, 0].max():.1%} | {probability:.3f} | {logit:.2f} |", flush=True)


def moves_in_a_batch(model: Any, image_processor: Any, image: Image.Image) -> tuple[float, float, float]:
    """The share of pixels that change, and the largest changes of a label probability and of a mask logit."""
    alone = predict_first(model, image_processor, [image])
    padded = predict_first(model, image_processor, [image, image.transpose(Image.Transpose.ROTATE_90)])
    return (
        (alone.labels != padded.labels).float().mean().item(),
        (alone.label_probabilities - padded.label_probabilities).abs().max().item(),
        (alone.mask_logits - padded.mask_logits).abs().max().item(),
    )


@torch.no_grad()
def predict_first(model: Any, image_processor: Any, images: list[Image.Image]) -> Prediction:
    """The prediction for the first image of a batch."""
    inputs = image_processor(images, return_tensors="pt")
    outputs = model(**inputs)
    sizes = [(image.height, image.width) for image in images]
    labels = image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
    image_size = sizes_in_batch(inputs["pixel_values"], inputs["pixel_mask"])[0][0]
    height, width = (image_size // STRIDE).tolist()
    mask_logits = outputs.masks_queries_logits[0, :, :height, :width]
    return Prediction(labels, outputs.class_queries_logits[0].softmax(dim=-1), mask_logits)


if __name__ == "__main__":
    with errors_as_messages():
        main(*OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses())
