"""The joint augmentation of image and segmentation map."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_maskformer.data.augmentation import (
    PAPER_AUGMENTATIONS,
    RandomFlipCropScale,
    RandomScaleCropFlip,
    class_areas,
)
from hf_maskformer.data.color import color_jitter
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.geometry import resize


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


def test_without_a_crop_images_stay_whole():
    augmentation = RandomScaleCropFlip.from_scales(32, 1.0, 1.0, crop=False)
    sample = augmentation(GeneratedScenes(1, image_size=(64, 160))[0])
    assert sample["image"].size == (80, 32)
    assert sample["segmentation_map"].shape == (32, 80)


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


AUGMENTATIONS = {
    "scale_crop_flip": RandomScaleCropFlip([30, 40, 90], max_size=120, crop_size=(25, 33)),
    "flip_crop_scale": RandomFlipCropScale([30, 40, 90], 120, early_short_edges=(30, 50), crop_range=(20, 36)),
}


def coordinates(height=40, width=60):
    """A sample whose image and map both hold the place of each pixel, and its masks in another sample."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8))
    return {"image": image, "segmentation_map": (64 * rows + columns).astype(np.int32), "name": "places"}


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32))
def test_image_and_map_show_the_same_place_everywhere(augment, seed):
    sample = augment(coordinates(), torch.Generator().manual_seed(seed))
    image = np.array(sample["image"]).astype(int)
    assert sample["segmentation_map"].shape == image.shape[:2]
    # The nearest place of a pixel and the mean of those around it lie less than a step apart; two more are for the
    # antialiasing of a border, where there are places on one side only, and for a second resizing.
    assert np.abs(image[..., 0] - sample["segmentation_map"] // 64).max() <= 3
    assert np.abs(image[..., 1] - sample["segmentation_map"] % 64).max() <= 3
    # On average there is no shift at all.
    assert abs((image[..., 0] - sample["segmentation_map"] // 64).mean()) < 0.5
    assert abs((image[..., 1] - sample["segmentation_map"] % 64).mean()) < 0.5


def with_masks(sample):
    """The same sample as masks, one for each label of its map."""
    labels = np.unique(sample["segmentation_map"])
    return {
        "image": sample["image"],
        "name": sample["name"],
        "masks": sample["segmentation_map"] == labels[:, None, None],
        "labels": labels.astype(np.int64),
        "iscrowd": labels % 2 == 1,
    }


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
@pytest.mark.parametrize("seed", range(10))
def test_masks_move_with_the_map_and_vanish_with_their_labels(augment, seed):
    from_map = augment(blocks(), torch.Generator().manual_seed(seed))
    from_masks = augment(with_masks(blocks()), torch.Generator().manual_seed(seed))
    expected = with_masks(from_map)
    for field in ("masks", "labels", "iscrowd"):
        assert np.array_equal(from_masks[field], expected[field])
    assert from_masks["masks"].any(axis=(1, 2)).all()
    assert torch.from_numpy(from_masks["masks"]).shape[1:] == from_map["segmentation_map"].shape


def test_a_window_of_a_resized_image_is_the_part_of_the_whole():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (41, 67, 3), dtype=np.uint8))
    sample = {"image": image, "segmentation_map": random.integers(0, 256, (41, 67)), "name": "noise"}
    for size in ((30, 50), (41, 67), (97, 160)):
        whole, part = resize(sample, size), resize(sample, size, (7, 5, 20, 31))
        difference = np.array(whole["image"])[7:27, 5:36].astype(int) - np.array(part["image"])
        assert np.abs(difference).max() <= 1  # the box of the window is rounded to single precision
        assert np.array_equal(whole["segmentation_map"][7:27, 5:36], part["segmentation_map"])


def halves():
    """One column of label 1 beside a large area of label 0."""
    labels = np.zeros((20, 40), dtype=np.uint8)
    labels[:, :4] = 1
    return {"image": Image.new("RGB", (40, 20)), "segmentation_map": labels, "name": "halves"}


@pytest.mark.parametrize("as_masks", [False, True])
def test_crops_of_a_single_class_are_drawn_again(as_masks):
    sample = with_masks(halves()) if as_masks else halves()
    shares = {}
    for limit in (1.0, 0.96):
        augment = RandomScaleCropFlip([20], 40, (20, 20), single_category_max_area=limit)
        samples = [augment(sample, torch.Generator().manual_seed(seed)) for seed in range(40)]
        shares[limit] = np.mean([len(class_areas(cropped)) == 2 for cropped in samples])
    # 4 of the 21 places of a crop show the column; ten draws find one nearly always.
    assert shares[1.0] < 0.4
    assert shares[0.96] > 0.7


def test_ignored_pixels_and_other_instances_do_not_make_a_crop_varied():
    labels = np.array([[255, 255, 256, 257]])
    sample = {"segmentation_map": labels, "instance_id_to_semantic_id": {256: 3, 257: 3}}
    assert class_areas(sample, (255,)).tolist() == [2]
    assert sorted(class_areas({"segmentation_map": labels}, (255,)).tolist()) == [1, 1]


def test_the_panoptic_augmentation_crops_half_of_the_samples():
    augment = RandomFlipCropScale([40], 60, early_short_edges=[40], crop_range=(20, 20), flip_probability=0)
    samples = [augment(blocks(), torch.Generator().manual_seed(seed)) for seed in range(40)]
    sizes = [sample["image"].size for sample in samples]
    assert set(sizes) == {(60, 40), (40, 40)}
    assert 10 < sizes.count((40, 40)) < 30


def test_the_panoptic_augmentation_draws_every_edge_of_its_crop_range():
    augment = RandomFlipCropScale([12], 100, early_short_edges=[8], crop_range=(2, 4), crop_probability=1)
    torch.manual_seed(0)
    # The shorter edge of a crop, of 2 to 4 pixels, becomes 12: the longer one tells what they were.
    assert {max(augment(blocks(8, 8))["image"].size) for _ in range(100)} == {12, 16, 18, 24}
    # A side that is shorter stays whole: 2 or 3 of 3 pixels, and 2 to 4 of 8.
    augment = RandomFlipCropScale([12], 100, early_short_edges=[3], crop_range=(2, 4), crop_probability=1)
    sizes = {augment(blocks(3, 8, block=1))["image"].size for _ in range(100)}
    assert sizes == {(12, 12), (12, 18), (16, 12), (18, 12), (24, 12)}


def test_no_side_gets_longer_than_the_panoptic_augmentation_allows():
    for crop_probability in (0, 1):
        augment = RandomFlipCropScale([40], 60, [40], crop_range=(200, 200), crop_probability=crop_probability)
        assert augment(blocks(40, 100))["image"].size == (60, 24)


def test_sizes_are_those_of_the_paper_for_each_data_set():
    found = {name: (min(a.short_edges), max(a.short_edges), a.max_size) for name, a in PAPER_AUGMENTATIONS.items()}
    assert found == {
        "ade20k": (256, 1024, 2048),
        "ade20k-640": (320, 1280, 2560),
        "cityscapes": (512, 2048, 4096),
        "coco-panoptic": (480, 800, 1333),
        "coco-panoptic-1000": (480, 800, 1000),
        "coco-stuff-10k": (320, 960, 2560),
        "mapillary-vistas": (1024, 4096, 8192),
    }
    crops = {name: a.crop_size for name, a in PAPER_AUGMENTATIONS.items() if "panoptic" not in name}
    assert crops == {
        "ade20k": (512, 512),
        "ade20k-640": (640, 640),
        "cityscapes": (512, 1024),
        "coco-stuff-10k": (640, 640),
        "mapillary-vistas": (1280, 1280),
    }
    assert all(PAPER_AUGMENTATIONS[name].change_colors for name in crops)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_range": (600, 384)}, r"crop_range \(600, 384\) must be at least one pixel each, .* must ascend"),
        ({"crop_range": (0, 384)}, r"crop_range \(0, 384\) must be at least one pixel"),
        ({"early_short_edges": ()}, "must hold at least one length"),
        ({"short_edges": (-3,)}, r"short_edges \[-3\], .* must be at least one pixel"),
        ({"max_size": 0}, "max_size 0, .* must be at least one pixel"),
        ({"crop_probability": -0.5}, "crop_probability is -0.5; it must be between 0 and 1"),
        ({"flip_probability": 2.0}, "flip_probability is 2.0; it must be between 0 and 1"),
    ],
)
def test_impossible_settings_of_the_panoptic_augmentation_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomFlipCropScale(**arguments)


def test_colours_change_and_labels_stay():
    sample = {**blocks(), "image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))}
    augment = RandomScaleCropFlip([40], 60, flip_probability=0, change_colors=True)
    images = {augment(sample, torch.Generator().manual_seed(seed))["image"].tobytes() for seed in range(8)}
    assert len(images) > 5
    assert np.array_equal(augment(sample)["segmentation_map"], sample["segmentation_map"])


def test_grey_stays_grey_and_colours_stay_in_their_range():
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    values = set()
    for seed in range(200):
        pixel = color_jitter(grey, torch.Generator().manual_seed(seed)).getpixel((0, 0))
        assert len(set(pixel)) == 1
        values.add(pixel[0])
    # Contrast of 0.5 to 1.5 on a brightness of 68 to 132.
    assert 34 <= min(values) < 50
    assert 160 < max(values) <= 198
    assert 100 in values


def test_brightness_and_contrast_change_once_each():
    grey = Image.new("RGB", (1, 1), (60, 60, 60))
    values = [color_jitter(grey, torch.Generator().manual_seed(n)).getpixel((0, 0))[0] for n in range(400)]
    lowest, highest = 0.5 * (60 - 32), 1.5 * (60 + 32)
    assert lowest <= min(values) < lowest + 8
    assert highest - 20 < max(values) <= highest
    # By chance of one half each: a quarter keeps its value, to four standard deviations.
    assert values.count(60) / len(values) == pytest.approx(1 / 4, abs=0.09)


def test_the_saturation_changes_by_half_at_most():
    brown = Image.new("RGB", (1, 1), (80, 60, 60))
    pixels = [color_jitter(brown, torch.Generator().manual_seed(n)).getpixel((0, 0)) for n in range(400)]
    saturations = [(max(pixel) - min(pixel)) / max(pixel) for pixel in pixels]
    # Brightness shifts all channels by 32 at most before; contrast changes nothing of it.
    lowest, highest = 0.5 * 20 / (80 + 32), 1.5 * 20 / (80 - 32)
    assert lowest - 0.03 < min(saturations) < lowest + 0.04
    assert highest - 0.12 < max(saturations) < highest + 0.05


def test_the_hue_of_red_turns_by_at_most_36_degrees():
    red = Image.new("RGB", (1, 1), (200, 0, 0))
    hues = {color_jitter(red, torch.Generator().manual_seed(n)).convert("HSV").getpixel((0, 0))[0] for n in range(300)}
    turns = sorted((hue + 128) % 256 - 128 for hue in hues)
    assert -27 <= turns[0] < -22
    assert 22 < turns[-1] <= 27


@pytest.mark.parametrize("augment", [RandomScaleCropFlip([8], max_size=16), RandomFlipCropScale([8], max_size=16)])
def test_masks_that_do_not_say_whether_they_are_crowds_are_none(augment):
    masks = np.array([np.ones((8, 8)), np.zeros((8, 8))], dtype=bool)
    sample = {"image": Image.new("RGB", (8, 8)), "name": "plain", "masks": masks, "labels": np.array([4, 5])}
    augmented = augment(sample)
    assert augmented["labels"].tolist() == [4]
    assert augmented["iscrowd"].tolist() == [False]


@pytest.mark.parametrize("short_edge", [20, 80])
def test_images_are_scaled_bilinearly(short_edge):
    sample = RandomScaleCropFlip([short_edge], 1000, flip_probability=0)(coordinates())
    size = (short_edge * 3 // 2, short_edge)
    expected = coordinates()["image"].resize(size, Image.Resampling.BILINEAR)
    assert np.array_equal(sample["image"], expected)


def test_colours_come_from_the_generator_too():
    augment = RandomScaleCropFlip([40], 60, change_colors=True)
    images = []
    for seed in range(5):
        torch.manual_seed(seed)  # the global one does not matter
        images.append(augment(blocks(), torch.Generator().manual_seed(3))["image"].tobytes())
    assert len(set(images)) == 1


def test_contrast_may_come_last():
    # Cutting off the red of an orange turns its hue beyond the 36 degrees to which that of red turns, which are 26.
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    hues = [color_jitter(red, torch.Generator().manual_seed(n)).convert("HSV").getpixel((0, 0))[0] for n in range(400)]
    assert max((hue + 128) % 256 - 128 for hue in hues) > 28


def test_the_panoptic_augmentation_draws_every_short_edge_and_both_directions():
    torch.manual_seed(0)
    augment = RandomFlipCropScale([20, 40], 100, crop_probability=0)
    samples = [augment(blocks()) for _ in range(30)]
    assert {sample["image"].size for sample in samples} == {(30, 20), (60, 40)}
    assert {sample["segmentation_map"][0, 0].item() for sample in samples} == {0, 5}
    augment = RandomFlipCropScale([20], 100, early_short_edges=(20, 40), crop_range=(20, 20), crop_probability=1)
    # A crop of the small image shows all four rows of blocks, one of the large image two or three.
    rows = {len(np.unique(augment(blocks())["segmentation_map"][:, 0])) for _ in range(30)}
    assert max(rows) == 4
    assert min(rows) < 4


def test_no_side_is_too_long_before_the_panoptic_crop():
    augment = RandomFlipCropScale([40], 60, early_short_edges=[40], crop_range=(40, 40), crop_probability=1)
    assert augment(blocks(40, 100))["image"].size == (40, 40)


def test_the_share_of_a_class_is_one_of_the_labelled_pixels():
    # The upper half is labelled: four places of a crop show 0 to 3 columns of class 1, of which 3 are enough.
    labels = np.full((20, 23), 255, dtype=np.uint8)
    labels[:10] = np.arange(23) >= 20
    sample = {"image": Image.new("RGB", (23, 20)), "segmentation_map": labels, "name": "half"}
    augment = RandomScaleCropFlip([20], 23, (20, 20), single_category_max_area=0.9)
    samples = [augment(sample, torch.Generator().manual_seed(seed)) for seed in range(40)]
    columns = [(cropped["segmentation_map"] == 1).any(axis=0).sum() for cropped in samples]
    assert np.mean(np.array(columns) == 3) > 0.8


def test_an_image_without_a_labelled_pixel_is_cropped_all_the_same():
    sample = {"image": Image.new("RGB", (8, 8)), "segmentation_map": np.full((8, 8), 255), "name": "void"}
    assert RandomScaleCropFlip([8], 8, (4, 4), single_category_max_area=0.75)(sample)["image"].size == (4, 4)


def test_neither_an_ignored_id_nor_an_ignored_label_counts_as_a_class():
    table = {255: 0, 256: 255, 257: 3}
    sample = {"segmentation_map": np.array([[255, 256, 257]]), "instance_id_to_semantic_id": table}
    assert class_areas(sample, (255,)).tolist() == [1]


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match=r"single_category_max_area is 1\.5"):
        RandomScaleCropFlip([4], 10, single_category_max_area=1.5)


def test_pixels_of_ids_without_a_label_are_no_class():
    sample = {"segmentation_map": np.array([[0, 0, 256, 257]]), "instance_id_to_semantic_id": {256: 3, 257: 3}}
    assert class_areas(sample, (255,)).tolist() == [2]


def test_the_contrast_falls_to_one_half():
    grey = Image.new("RGB", (1, 1), (220, 220, 220))
    values = [color_jitter(grey, torch.Generator().manual_seed(n)).getpixel((0, 0))[0] for n in range(1000)]
    lowest = 0.5 * (220 - 32)
    assert lowest <= min(values) < lowest + 10


def test_areas_that_the_data_gave_are_gone_with_the_image_that_they_were_of():
    sample = {"image": Image.new("RGB", (8, 8)), "name": "a", "masks": np.ones((1, 8, 8), bool)}
    sample |= {"labels": np.array([4]), "area": np.array([64.0])}
    assert "area" not in RandomScaleCropFlip([16], max_size=16)(sample)


def test_the_hue_of_half_of_the_images_turns():
    red = Image.new("RGB", (1, 1), (200, 0, 0))  # only a turn changes its hue
    hues = [color_jitter(red, torch.Generator().manual_seed(n)).convert("HSV").getpixel((0, 0))[0] for n in range(400)]
    # Of 37 steps one is none; to four standard deviations.
    assert np.mean(np.array(hues) != 0) == pytest.approx(36 / 37 / 2, abs=0.1)
