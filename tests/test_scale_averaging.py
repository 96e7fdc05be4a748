import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_model
from PIL import Image
from test_per_pixel_baseline import tiny_baseline
from transformers import MaskFormerForInstanceSegmentation

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


def test_the_mode_follows_the_task_of_the_model(image):
    model = tiny_model().eval()

    def scores(task=None, **options):
        processor = MaskFormerImageProcessor(segmentation_task=task)
        return augmented_semantic_scores(model, processor, image, shortest_edges=[32], **options)

    assert torch.equal(scores("panoptic"), scores(mode="direct"))
    assert torch.equal(scores("semantic"), scores(mode="paper"))
    assert torch.equal(scores("panoptic", mode="paper"), scores())
    assert not torch.equal(scores("panoptic"), scores())
    with pytest.raises(ValueError, match="mode is 'slow'; give one of paper, direct, fast"):
        scores(mode="slow")


def test_the_logits_of_a_per_pixel_baseline_are_averaged(image):
    model, processor = tiny_baseline().eval(), MaskFormerImageProcessor()
    expected = torch.zeros(4, 40, 60)
    for edge in (32, 64):
        inputs = processor(image, size={"shortest_edge": edge})
        height, width = inputs["pixel_mask"][0].any(1).sum(), inputs["pixel_mask"][0].any(0).sum()
        with torch.no_grad():
            logits = model(inputs["pixel_values"]).logits
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear")[..., :height, :width]
        expected += F.interpolate(logits, (40, 60), mode="bilinear")[0] / 2
    found = augmented_semantic_scores(model, processor, image, shortest_edges=[32, 64], flip=False)
    torch.testing.assert_close(found, expected.softmax(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='its mode is "paper"'):
        augmented_semantic_scores(model, processor, image, mode="direct")


def test_a_model_that_does_not_say_where_the_image_lies_is_refused(image):
    stock = MaskFormerForInstanceSegmentation(tiny_config())
    with pytest.raises(ValueError, match="of this package"):
        augmented_semantic_scores(stock, MaskFormerImageProcessor(), image, shortest_edges=[32])


def test_no_scale_is_refused(image):
    with pytest.raises(ValueError, match="shortest_edges is empty"):
        augmented_semantic_scores(tiny_model(), MaskFormerImageProcessor(), image, shortest_edges=[])
