"""The joint augmentation of image and segmentation map."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset


def blocks(height=40, width=60, block=10):
    """A sample of square blocks, each with a label of its own, whose image holds ten times the label of its pixel."""
    rows, columns = np.arange(height) // block, np.arange(width) // block
    labels = ((rows[:, None] * (width // block) + columns) % 25).astype(np.uint8)
    image = Image.fromarray(labels * 10).convert("RGB")
    return {"image": image, "segmentation_map": labels, "name": "blocks", "instance_id_to_semantic_id": {0: 1}}


def labels_in_image(sample):
    return np.array(sample["image"])[:, :, 0] / 10


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_crop_and_flip_keep_every_pixel_with_its_label(seed):
    torch.manual_seed(seed)
    sample = RandomScaleCropFlip([40], max_size=60, crop_size=(17, 23))(blocks())
    assert sample["segmentation_map"].shape == (17, 23)
    assert (labels_in_image(sample) == sample["segmentation_map"]).all()


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_scaling_moves_image_and_map_alike(seed):
    torch.manual_seed(seed)
    sample = RandomScaleCropFlip([80, 100, 133], max_size=1000, crop_size=(60, 60))(blocks())
    # Bilinear interpolation mixes labels at most one source pixel beside a border between blocks, on both sides:
    # 2 of 10 pixels in each direction. A shift by one block would leave next to no agreement.
    agreement = (labels_in_image(sample) == sample["segmentation_map"]).mean()
    assert agreement > (1 - 0.2) ** 2 - 0.1


def test_the_original_sample_stays_as_it_was():
    sample = blocks()
    RandomScaleCropFlip([20], max_size=60, crop_size=(5, 5), flip_probability=1.0)(sample)
    assert sample["image"].size == (60, 40)
    assert (sample["segmentation_map"] == blocks()["segmentation_map"]).all()


def test_other_fields_travel_along():
    sample = RandomScaleCropFlip([20], max_size=60)(blocks())
    assert (sample["name"], sample["instance_id_to_semantic_id"]) == ("blocks", {0: 1})


def test_a_seed_repeats_the_draws_and_draws_differ():
    augment = RandomScaleCropFlip([30, 40, 50], max_size=100, crop_size=(16, 16))

    def draw_ten(seed):
        torch.manual_seed(seed)
        return [augment(blocks())["segmentation_map"].tobytes() for _ in range(10)]

    assert draw_ten(seed=0) == draw_ten(seed=0)
    assert draw_ten(seed=0) != draw_ten(seed=1)
    assert len(set(draw_ten(seed=0))) > 1


def test_every_short_edge_both_directions_and_the_corners_are_drawn():
    torch.manual_seed(0)
    scale_only = RandomScaleCropFlip([20, 40], max_size=100)
    assert {scale_only(blocks())["image"].size for _ in range(30)} == {(30, 20), (60, 40)}
    crop = RandomScaleCropFlip([2], max_size=3, crop_size=(1, 1), flip_probability=0.0)
    labels = {crop(blocks(2, 3, block=1))["segmentation_map"].item() for _ in range(100)}
    assert labels == {0, 1, 2, 3, 4, 5}


def test_the_flip_probability_decides_on_mirroring():
    sample = blocks()
    never = RandomScaleCropFlip([40], max_size=60, flip_probability=0.0)(sample)
    always = RandomScaleCropFlip([40], max_size=60, flip_probability=1.0)(sample)
    assert (never["segmentation_map"] == sample["segmentation_map"]).all()
    assert (always["segmentation_map"] == sample["segmentation_map"][:, ::-1]).all()


def test_a_side_shorter_than_the_crop_stays_whole():
    sample = RandomScaleCropFlip([40], max_size=60, crop_size=(100, 30))(blocks())
    assert sample["image"].size == (30, 40)
    assert sample["segmentation_map"].shape == (40, 30)


def test_the_map_can_be_given_to_torch():
    sample = RandomScaleCropFlip([40], max_size=60, crop_size=(10, 10), flip_probability=1.0)(blocks())
    assert torch.from_numpy(sample["segmentation_map"]).shape == (10, 10)


@pytest.mark.parametrize(
    ("size", "short_edge", "max_size", "expected"),
    [
        ((640, 480), 512, 2048, (683, 512)),  # 682.67
        ((480, 640), 512, 2048, (512, 683)),
        ((300, 100), 200, 500, (500, 167)),  # 166.67: the longest side outranks the shortest
        ((5, 2), 1, 9, (3, 1)),  # 2.5 rounds up
        ((5000, 1), 512, 2048, (2048, 1)),  # never to nothing
    ],
)
def test_the_shorter_side_becomes_the_drawn_length(size, short_edge, max_size, expected):
    sample = RandomScaleCropFlip([short_edge], max_size)(blocks(*size, block=1))
    assert sample["segmentation_map"].shape == expected
    assert sample["image"].size == expected[::-1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_scaling_keeps_the_type_and_the_values_of_the_map(dtype):
    segmentation_map = np.array([[250, 1], [1, 250]], dtype=dtype)
    sample = {"image": Image.new("RGB", (2, 2)), "segmentation_map": segmentation_map, "name": "x"}
    resized = RandomScaleCropFlip([4], 8, flip_probability=0)(sample)["segmentation_map"]
    assert resized.dtype == dtype
    assert resized.tolist() == [[250, 250, 1, 1]] * 2 + [[1, 1, 250, 250]] * 2


def test_scales_are_those_of_the_paper_around_512():
    augmentation = RandomScaleCropFlip.from_scales(512, 0.5, 2.0)
    assert augmentation.short_edges == [
        *(256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024)
    ]
    assert (augmentation.max_size, augmentation.crop_size) == (2048, (512, 512))


def test_scales_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"min_scale 2\.0 and max_scale 0\.5 must be"):
        RandomScaleCropFlip.from_scales(512, 2.0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_edges": []}, "must hold at least one length"),
        ({"short_edges": [0]}, "must be at least one pixel"),
        ({"short_edges": [4], "crop_size": (0, 4)}, r"crop_size \(0, 4\) must be at least one pixel"),
        ({"short_edges": [4], "flip_probability": 1.5}, "flip_probability is 1.5"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomScaleCropFlip(max_size=10, **arguments)


def test_an_augmented_data_set_changes_its_samples_anew_at_each_reading():
    torch.manual_seed(0)
    dataset = AugmentedDataset([blocks()], RandomScaleCropFlip([40], max_size=60, crop_size=(8, 8)))
    assert len(dataset) == 1
    assert len({dataset[0]["segmentation_map"].tobytes() for _ in range(5)}) > 1
