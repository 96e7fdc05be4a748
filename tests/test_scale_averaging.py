import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_model
from PIL import Image

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation.scale_averaging import augmented_semantic_scores


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_scores_are_the_plain_mean_over_scales_and_mirror_images(image):
    model, processor = tiny_model().eval(), MaskFormerImageProcessor()
    expected = torch.zeros(4, 40, 60)
    for edge in (32, 64):
        for is_mirrored in (False, True):
            picture = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else image
            inputs = processor(picture, size={"shortest_edge": edge, "longest_edge": 80})
            height, width = inputs["pixel_mask"][0].any(1).sum(), inputs["pixel_mask"][0].any(0).sum()
            with torch.no_grad():
                outputs = model(inputs["pixel_values"])
            masks = F.interpolate(outputs.masks_queries_logits, inputs["pixel_values"].shape[-2:], mode="bilinear")
            labels = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
            scores = torch.einsum("qk,qhw->khw", labels, masks[0].sigmoid())[:, :height, :width]
            scores = F.interpolate(scores[None], (40, 60), mode="bilinear")[0]
            expected += (scores.flip(2) if is_mirrored else scores) / 4
    found = augmented_semantic_scores(model, processor, image, shortest_edges=[32, 64], longest_edge=80)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_mirrored_image_gets_the_mirrored_scores(image):
    model, processor = tiny_model().eval(), MaskFormerImageProcessor()
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scores, other = (
        augmented_semantic_scores(model, processor, picture, shortest_edges=[32]) for picture in (image, mirrored)
    )
    torch.testing.assert_close(scores, other.flip(-1))
    one_way = augmented_semantic_scores(model, processor, image, shortest_edges=[32], flip=False)
    assert (one_way - scores).abs().max() > 1e-4


def test_no_scale_is_refused(image):
    with pytest.raises(ValueError, match="shortest_edges is empty"):
        augmented_semantic_scores(tiny_model(), MaskFormerImageProcessor(), image, shortest_edges=[])
