import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_model
from PIL import Image
from test_per_pixel_baseline import tiny_baseline
from transformers import MaskFormerForInstanceSegmentation

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation import scale_averaging
from hf_maskformer.evaluation.scale_averaging import augmented_semantic_scores


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def smooth_image(height, width):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def original_scores(model, image, resizings, target_size):
    """What the original does at each scale, with nothing of this package but the model.

    The image is resized by Pillow, mirrored after that, normalised and padded on the right and below; the mask logits
    are brought to the padded size; the sums over queries are cropped, brought to the target and mirrored back.
    """
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    total = torch.zeros(model.config.num_labels, *target_size)
    for (height, width), (padded_height, padded_width) in resizings:
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        for is_mirrored in (False, True):
            pixels = np.zeros((padded_height, padded_width, 3))
            pixels[:height, :width] = ((resized[:, ::-1] if is_mirrored else resized) - mean) / std
            with torch.no_grad():
                outputs = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
            logits = F.interpolate(outputs.masks_queries_logits, (padded_height, padded_width), mode="bilinear")[0]
            scores = torch.zeros(model.config.num_labels, padded_height, padded_width)
            for mask, labels in zip(logits.sigmoid(), outputs.class_queries_logits[0].softmax(-1), strict=True):
                scores += labels[:-1, None, None] * mask
            scores = F.interpolate(scores[None, :, :height, :width], target_size, mode="bilinear")[0]
            total += torch.from_numpy(scores.numpy()[:, :, ::-1].copy()) if is_mirrored else scores
    return total / (2 * len(resizings))


# A longest edge of 80 bounds the second: 40 x 60 becomes 53.3 x 80 instead of 64 x 96.
RESIZINGS = [((32, 48), (32, 64)), ((53, 80), (64, 96))]


def test_scores_are_those_of_the_original_added_up_over_scales_and_mirror_images():
    model, processor, image = tiny_model().eval(), MaskFormerImageProcessor(size=40), smooth_image(40, 60)
    expected = original_scores(model, image, RESIZINGS, (40, 60))
    found = augmented_semantic_scores(model, processor, image, shortest_edges=[32, 64], longest_edge=80)
    # Pillow rounds pixels otherwise, by one level at most.
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)
    one_scale = original_scores(model, image, RESIZINGS[:1], (40, 60))
    assert (one_scale - expected).abs().max() > 2e-2


def test_scales_are_made_of_the_image_at_the_size_of_the_processor():
    model, image = tiny_model().eval(), smooth_image(80, 120)
    processor = MaskFormerImageProcessor(size={"shortest_edge": 10, "longest_edge": 100})
    found = augmented_semantic_scores(model, processor, image, shortest_edges=[32, 64], longest_edge=80)
    small = image.resize((15, 10), Image.Resampling.BILINEAR)
    expected = original_scores(model, small, RESIZINGS, (80, 120))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (original_scores(model, image, RESIZINGS, (80, 120)) - expected).abs().max() > 5e-3


def test_the_size_to_which_the_processor_pads_does_not_bound_the_scales(image):
    model = tiny_model().eval()
    plain = MaskFormerImageProcessor(size={"height": 40, "width": 40}, size_divisor=0)
    padding = MaskFormerImageProcessor(size={"height": 40, "width": 40}, size_divisor=0, pad_size=48)
    scales = {"shortest_edges": [48, 64], "longest_edge": 96}
    found, expected = (augmented_semantic_scores(model, each, image, **scales) for each in (padding, plain))
    assert torch.equal(found, expected)
    assert padding.pad_size == {"height": 48, "width": 48}


def test_a_processor_that_does_not_resize_is_told_to_for_the_scales(image):
    model = tiny_model().eval()
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0)
    scores = [augmented_semantic_scores(model, processor, image, shortest_edges=[edge]) for edge in (48, 96)]
    assert not torch.allclose(*scores, atol=1e-3)


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
    with pytest.raises(ValueError, match="mode is 'slow'; it must be one of paper, direct, fast"):
        scores(mode="slow")


def test_the_logits_of_a_per_pixel_baseline_are_averaged(image):
    model, processor = tiny_baseline().eval(), MaskFormerImageProcessor(size=40)
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


@pytest.mark.parametrize("kind", [str, np.asarray, lambda path: torch.from_numpy(np.array(Image.open(path)))])
def test_an_image_may_have_any_form_that_the_image_processor_takes(tmp_path, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    model, processor = tiny_model().eval(), MaskFormerImageProcessor(size={"shortest_edge": 32})
    given = kind(image) if kind is np.asarray else kind(tmp_path / "image.png")
    expected = augmented_semantic_scores(model, processor, image, shortest_edges=[32])
    assert augmented_semantic_scores(model, processor, given, shortest_edges=[32]).equal(expected)


def test_scales_and_mirroring_are_those_of_the_paper_for_ade20k_unless_told_otherwise(image, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        scale_averaging,
        "_scores",
        lambda model, inputs, *_: sizes.append(size_of_image(inputs["pixel_mask"][0])) or torch.zeros(4, 40, 60),
    )
    for wide in (image, image.resize((600, 60))):
        augmented_semantic_scores(tiny_model(), MaskFormerImageProcessor(), wide)
    scales = [edge for edge in range(256, 897, 128) for _ in range(2)]
    assert [height for height, _ in sizes[:12]] == scales
    assert max(width for _, width in sizes) == 3584


def size_of_image(pixel_mask):
    return int(pixel_mask.any(dim=1).sum()), int(pixel_mask.any(dim=0).sum())


def test_scales_are_averaged_with_a_model_of_half_precision(image):
    model, processor = tiny_model().eval(), MaskFormerImageProcessor(size=40)
    expected = augmented_semantic_scores(model, processor, image, shortest_edges=[48])
    found = augmented_semantic_scores(model.bfloat16(), processor, image, shortest_edges=[48])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
