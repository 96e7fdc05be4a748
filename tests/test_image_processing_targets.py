"""Segmentation maps into targets, with segments worked out by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.maskformer.image_processing_pil_maskformer import (
    MaskFormerImageProcessorPil as StockImageProcessor,
)

from hf_maskformer import image_processing_maskformer_targets
from hf_maskformer.image_processing_maskformer import MaskFormerImageProcessor


def targets(segmentation_map, instance_labels=None, **settings) -> tuple[list, list[int]]:
    """Masks and labels of one map, unresized and unpadded."""
    if isinstance(segmentation_map, list):
        segmentation_map = np.array(segmentation_map)
    image = np.zeros((*np.shape(segmentation_map)[:2], 3), np.uint8)
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0, **settings)
    batch = processor(image, [segmentation_map], instance_labels)
    return batch["mask_labels"][0].int().tolist(), batch["class_labels"][0].tolist()


def random_maps() -> tuple[list[Image.Image], list[np.ndarray]]:
    """Images and maps of three sizes; the last map is all void."""
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (33, 20), (50, 50)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    maps = [np.kron(rng.integers(0, 6, (size[0], 2)), np.ones((1, size[1] // 2), int)) for size in sizes]
    maps[2][:] = 255
    return images, maps


def test_each_label_of_a_map_is_a_segment():
    masks, labels = targets([[3, 255], [3, 7]], ignore_index=255)
    assert labels == [3, 7]
    assert masks == [[[1, 0], [1, 0]], [[0, 0], [0, 1]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.int16, np.int32, np.uint64])
def test_noise_of_any_type_is_numbered_by_its_values(dtype):
    noise = np.random.default_rng(0).integers(3, 120, (20, 30))
    values = np.unique(noise)
    masks, labels = targets(noise.astype(dtype))
    assert labels == values.tolist()
    assert np.array_equal(masks, noise == values[:, None, None])


def test_the_ignore_value_may_be_negative():
    assert targets([[-1, 4], [0, 4]], ignore_index=-1)[1] == [0, 4]


def test_reduced_labels_keep_what_is_ignored_ignored():
    masks, labels = targets([[0, 1], [2, 255]], ignore_index=255, do_reduce_labels=True)
    assert labels == [0, 1]  # neither -1 for the 0 nor 254 for the 255
    assert masks == [[[0, 1], [0, 0]], [[0, 0], [1, 0]]]


def test_reduced_labels_ignore_255_when_no_ignore_value_is_set():
    assert targets([[0, 1, 255]], do_reduce_labels=True)[1] == [0]


def test_reduced_labels_keep_the_first_label_when_zero_is_ignored():
    assert targets([[0, 1, 2]], ignore_index=0, do_reduce_labels=True)[1] == [0, 1]


def test_ids_stand_for_the_labels_of_a_dictionary():
    masks, labels = targets([[5, 5, 9, 300]], {5: 1, 9: 1, 300: 0})
    assert labels == [1, 1, 0]
    assert masks == [[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 1]]]


def test_ids_may_be_large():
    masks, labels = targets([[2**24 - 1, 0, 70_000]], {2**24 - 1: 4, 0: 2, 70_000: 3})
    assert labels == [2, 3, 4]
    assert masks == [[[0, 1, 0]], [[0, 0, 1]], [[1, 0, 0]]]


def test_labels_of_ids_are_reduced_and_ids_are_not():
    settings = {"ignore_index": 255, "do_reduce_labels": True}
    masks, labels = targets([[1, 2, 256, 257]], {1: 0, 2: 1, 256: 4, 257: 255}, **settings)
    assert labels == [0, 3]  # the segments whose label is 0 ("other") or 255 (ignored) are dropped, id 256 is not
    assert masks == [[[0, 1, 0, 0]], [[0, 0, 1, 0]]]


def test_ids_of_ignored_pixels_need_no_label():
    assert targets([[255, 4]], {4: 2}, ignore_index=255)[1] == [2]
    assert targets([[0, 4]], {4: 2}, do_reduce_labels=True)[1] == [1]


def test_ids_may_mean_different_labels_in_each_image():
    images = [np.zeros((1, 2, 3), np.uint8)] * 2
    maps = [np.array([[1, 2]])] * 2
    batch = MaskFormerImageProcessor()(images, maps, [{1: 0, 2: 5}, {1: 7, 2: 7}])
    assert [labels.tolist() for labels in batch["class_labels"]] == [[0, 5], [7, 7]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64, ">u2", bool])
def test_arrays_and_tensors_of_any_integer_type_mean_the_same(dtype):
    array = np.array([[0, 1], [1, 1]]).astype(dtype)
    expected = [[[1, 0], [0, 0]], [[0, 1], [1, 1]]], [0, 1]
    assert targets(array) == expected
    assert targets(array[..., None]) == expected
    if np.dtype(dtype).isnative:
        assert targets(torch.from_numpy(array)) == expected


def test_a_stack_of_maps_goes_with_a_stack_of_images():
    maps = torch.tensor([[[0, 0]], [[4, 0]]])
    batch = MaskFormerImageProcessor(do_resize=False)(torch.zeros(2, 3, 1, 2, dtype=torch.uint8), maps)
    assert [labels.tolist() for labels in batch["class_labels"]] == [[0], [0, 4]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "I;16"])
def test_pil_maps_of_any_integer_mode_mean_the_same(mode):
    array = np.array([[0, 1], [1, 0]])
    if mode == "1":
        segmentation_map = Image.fromarray(array.astype(bool))
    else:
        segmentation_map = Image.fromarray(array.astype({"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        segmentation_map.putpalette([9, 9, 9, 7, 7, 7])
    assert segmentation_map.mode == mode
    masks, labels = targets(segmentation_map)
    assert labels == [0, 1]
    assert masks == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]


def test_a_grey_map_with_three_channels_is_no_map_of_ids_unless_labels_of_ids_are_given():
    grey = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8)).convert("RGB")
    with pytest.raises(ValueError, match=r'Segmentation map 0 is grey, .*image\.convert\("L"\)'):
        targets(grey)
    assert targets(grey.convert("L"))[1] == [0, 1, 2]
    assert targets(grey, {0: 7, 0x010101: 5, 0x020202: 6})[1] == [7, 5, 6]


@pytest.mark.parametrize("kind", ["PIL image", "array", "tensor"])
def test_the_colours_of_coco_panoptic_are_ids(kind):
    colours = np.array([[[1, 0, 0], [0, 1, 0], [44, 1, 2]]], dtype=np.uint8)
    segmentation_map = {"PIL image": Image.fromarray, "array": np.array, "tensor": torch.from_numpy}[kind](colours)
    masks, labels = targets(segmentation_map, {1: 7, 256: 5, 44 + 256 + 2 * 65536: 6})
    assert labels == [7, 5, 6]
    assert masks == [[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]]


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_a_map_in_a_file_is_that_map(tmp_path, mode):
    values = np.array([[0, 7], [3, 200]], dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "map.png")
    for path in (tmp_path / "map.png", str(tmp_path / "map.png")):
        batch = MaskFormerImageProcessor(do_resize=False)(np.zeros((2, 2, 3), np.uint8), path)
        assert batch["class_labels"][0].tolist() == [0, 3, 7, 200]


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_one_map_may_have_a_channel(convert):
    image, labels = np.zeros((2, 3, 3), np.uint8), [[0, 1, 1], [2, 2, 2]]
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0)
    expected = processor(image, np.array(labels))["mask_labels"][0]
    assert processor(image, convert(labels)[..., None])["mask_labels"][0].equal(expected)


@pytest.mark.parametrize(
    "settings", [{"target_format": "label_map"}, {"do_reduce_labels": True, "num_labels": 255}, {"num_labels": 256}]
)
def test_what_stands_for_no_segment_is_no_label(settings):
    """Without an ignore_index it is 255, in maps whose labels are reduced and in maps of labels."""
    image, segmentation_map = np.zeros((1, 2, 3), np.uint8), np.array([[255, 3]])
    processor = MaskFormerImageProcessor(do_resize=False)
    if settings == {"num_labels": 256}:
        assert processor(image, segmentation_map, **settings)["class_labels"][0].tolist() == [3, 255]
        settings |= {"target_format": "label_map"}
    with pytest.raises(ValueError, match="Set ignore_index to a value that is not a label, such as 65535"):
        processor(image, segmentation_map, **settings)
    settings |= {"ignore_index": 65535, "target_format": "label_map"}
    labels = processor(image, segmentation_map, **settings)["labels"]
    assert labels[0, 0, 0].item() == 255 - bool(settings.get("do_reduce_labels"))
    assert labels[0, 1, 1].item() == 65535


def test_a_damaged_map_is_named():
    file = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(file, "PNG")
    damaged = Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))
    with pytest.raises(ValueError, match="Segmentation map 0 cannot be read: image file is truncated"):
        MaskFormerImageProcessor()(np.zeros((64, 64, 3), np.uint8), damaged)


def test_targets_follow_their_image_through_resizing():
    image = Image.new("RGB", (4, 2))
    segmentation_map = np.array([[1, 1, 2, 2], [1, 1, 3, 3]])
    batch = MaskFormerImageProcessor(size={"height": 4, "width": 8})(image, segmentation_map)
    assert batch["mask_labels"][0].shape == (3, 32, 32)
    assert torch.equal(batch["mask_labels"][0].sum(0)[:4, :8], torch.ones(4, 8, dtype=torch.int64))
    assert batch["mask_labels"][0].sum((1, 2)).tolist() == [16, 8, 8]


def test_targets_equal_those_of_transformers_where_it_pads_nothing():
    images, maps = random_maps()
    settings = {"size": {"height": 64, "width": 96}, "ignore_index": 255}
    ours = MaskFormerImageProcessor(**settings)(images, maps)
    stock = StockImageProcessor(**settings)(images, maps, return_tensors="pt")
    for index in range(3):
        assert torch.equal(ours["mask_labels"][index].float(), stock["mask_labels"][index])
        assert torch.equal(ours["class_labels"][index], stock["class_labels"][index])


def test_padding_belongs_to_no_segment():
    images, maps = random_maps()
    batch = MaskFormerImageProcessor(do_resize=False, ignore_index=255)(images, maps)
    for index, masks in enumerate(batch["mask_labels"]):
        assert masks.dtype == torch.bool
        assert masks.shape[1:] == (64, 64)
        assert not masks[:, batch["pixel_mask"][index] == 0].any()
        assert masks.sum() == (maps[index] != 255).sum()


@pytest.mark.parametrize("settings", [{}, {"do_reduce_labels": True}, {"size": {"shortest_edge": 30}}])
def test_both_target_formats_hold_the_same(settings):
    images, maps = random_maps()
    processor = MaskFormerImageProcessor(**{"size": {"shortest_edge": 70}, "ignore_index": 255} | settings)
    masks = processor(images, maps)
    segment_map = processor(images, maps, target_format="segment_map")
    most_segments = max(len(labels) for labels in masks["class_labels"])
    assert segment_map["class_labels"].shape == (3, most_segments)
    for index, labels in enumerate(masks["class_labels"]):
        rebuilt = segment_map["mask_labels"][index] == torch.arange(len(labels))[:, None, None]
        assert torch.equal(rebuilt, masks["mask_labels"][index])
        assert torch.equal(segment_map["class_labels"][index, : len(labels)], labels)
        assert (segment_map["class_labels"][index, len(labels) :] == -100).all()


@pytest.mark.parametrize(
    ("count", "num_processes", "dtype"), [(300, 1, torch.int16), (300, 2, torch.int32), (40000, 1, torch.int32)]
)
def test_an_index_map_has_two_bytes_unless_they_are_too_few_or_processes_exchange_it(
    count, num_processes, dtype, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    ids = np.arange(count, dtype=np.int32)[None]
    images = [np.zeros((1, length, 3), np.uint8) for length in (3, count)]
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0, ignore_index=-1)
    maps = processor(images, [ids[:, :3], ids], target_format="segment_map")["mask_labels"]
    assert maps.dtype == dtype
    assert maps[1, 0].tolist() == ids[0].tolist()
    assert maps[0, 0].unique().tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("size", [(2, 4), (2, 16), (16, 2)])
def test_a_segment_that_shrinking_removes_is_no_segment(size):
    ids = np.zeros((8, 8), int)
    ids[0, 0], ids[1, 1] = 5, 6  # of which the nearest neighbours meet one at most
    processor = MaskFormerImageProcessor(size={"height": size[0], "width": size[1]})
    batch = processor(np.zeros((8, 8, 3), np.uint8), ids)
    assert batch["mask_labels"][0].flatten(1).any(1).all()
    assert len(batch["class_labels"][0]) == len(batch["mask_labels"][0]) < 3


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_ids_beyond_31_bits_keep_their_labels(dtype):
    ids, labels = np.array([[2**31 + 5, 1]], dtype), {2**31 + 5: 3, 1: 0}
    assert targets(ids, labels)[1] == [0, 3]


def test_255_is_no_label_of_a_label_map_whatever_the_map_shows():
    processor, image = MaskFormerImageProcessor(num_labels=256), np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="Set ignore_index to a value that is not a label"):
        processor(image, np.zeros((2, 3), int), target_format="label_map")


def test_the_memory_of_masks_is_that_of_the_padded_size(monkeypatch):
    monkeypatch.setattr(image_processing_maskformer_targets, "MAX_MASK_BYTES", 64 * 64)
    with pytest.raises(ValueError, match="map 0 has 64 segments; masks of 32 x 32"):
        MaskFormerImageProcessor(do_resize=False)(np.zeros((8, 8, 3), np.uint8), np.arange(64).reshape(8, 8))


def test_masks_that_no_memory_holds_are_refused(monkeypatch):
    segmentation_map = np.arange(64, dtype=np.int32).reshape(8, 8)
    image, settings = Image.new("RGB", (8, 8)), {"do_resize": False, "size_divisor": 0}
    monkeypatch.setattr(image_processing_maskformer_targets, "MAX_MASK_BYTES", 64 * 64)
    assert len(MaskFormerImageProcessor(**settings)(image, segmentation_map)["mask_labels"][0]) == 64
    monkeypatch.setattr(image_processing_maskformer_targets, "MAX_MASK_BYTES", 64 * 64 - 1)
    with pytest.raises(ValueError, match=r'map 0 has 64 segments; masks of 8 x 8 .* target_format="segment_map"'):
        MaskFormerImageProcessor(**settings)(image, segmentation_map)
    batch = MaskFormerImageProcessor(**settings)(image, segmentation_map, target_format="segment_map")
    assert batch["class_labels"].shape == (1, 64)


def test_an_image_without_segments_has_no_masks():
    image, void = np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 255)
    processor = MaskFormerImageProcessor(do_resize=False, ignore_index=255)
    batch = processor(image, void)
    assert batch["mask_labels"][0].shape == (0, 32, 32)
    assert batch["class_labels"][0].shape == (0,)
    batch = processor(image, void, target_format="segment_map")
    assert (batch["mask_labels"] == -1).all()
    assert batch["class_labels"].shape == (1, 0)


@pytest.mark.parametrize(
    ("segmentation_map", "instance_labels", "settings", "message"),
    [
        ([[0, 9]], None, {"num_labels": 9}, r"map 0 contains the value 9, but num_labels is 9 \(labels 0 to 8\)"),
        ([[0, 255]], None, {"num_labels": 9}, "ignore_index=255; if 0 means 'other' .* do_reduce_labels=True"),
        ([[1, 11]], None, {"num_labels": 9, "do_reduce_labels": True}, "the value 11, which means label 10"),
        ([[1, 2]], {1: 0, 2: 9}, {"num_labels": 9}, "the value 2, which means label 9"),
        ([[0, -1]], None, {}, "the value -1, but labels start at 0"),
        ([[1, 7]], {1: 0}, {}, "map 0 contains the id 7, which instance_id_to_semantic_id does not contain"),
        ([[1, 7, 900]], {1: 0}, {"do_reduce_labels": True}, "map 0 contains the ids 7, 900, which"),
        ([list(range(30))], {1: 0}, {}, r"the ids 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\. \(29 in all\), which"),
        ([[-3, 1]], {1: 0, -3: 2}, {}, "map 0 contains the negative id -3; ids start at 0"),
    ],
)
def test_values_without_a_valid_label_are_refused(segmentation_map, instance_labels, settings, message):
    with pytest.raises(ValueError, match=message):
        targets(segmentation_map, instance_labels, **settings)


def test_errors_name_the_image():
    images = [np.zeros((1, 1, 3), np.uint8)] * 2
    with pytest.raises(ValueError, match="Segmentation map 1 contains the value 5"):
        MaskFormerImageProcessor(num_labels=5)(images, [np.array([[4]]), np.array([[5]])])
    with pytest.raises(ValueError, match="Segmentation map 1 contains the id 2"):
        MaskFormerImageProcessor()(images, [np.array([[2]])] * 2, [{2: 0}, {1: 0}])


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (np.zeros((3, 2), int), {}, r"Segmentation map 0 is 3 x 2, but image 0 is 2 x 3 \(height x width\)"),
        ([np.zeros((2, 3), int)] * 2, {}, "There are 1 images, but 2 segmentation maps"),
        ([], {}, "segmentation_maps is empty"),
        (np.zeros((2, 3)), {}, "Segmentation map 0 has shape .* and type float64; give integers"),
        (Image.new("RGBA", (3, 2)), {}, r"Segmentation map 0 has shape \(2, 3, 4\)"),
        ([np.zeros((2, 3, 3), int)], {}, r"Segmentation map 0 has shape \(2, 3, 3\) and type int64"),
        (np.zeros((0, 3), int), {}, r"Segmentation map 0 has shape \(0, 3\), so it holds no pixel"),
        ("map.png", {}, r"Segmentation map 0 \(map.png\) cannot be read: .*No such file"),
        (5, {}, "Segmentation map 0 is a int"),
        (np.zeros((2, 3), int), {"target_format": "boxes"}, "target_format is 'boxes'"),
        (np.zeros((2, 3), int), {"instance_id_to_semantic_id": [{}, {}]}, "has 2 dictionaries, but there are 1 images"),
        (np.ones((2, 3), int), {"instance_id_to_semantic_id": {"1": 0}}, "has '1': 0, but .* must be integers"),
        (np.ones((2, 3), int), {"instance_id_to_semantic_id": [{1: "sky"}]}, "has 1: 'sky', but .* must be integers"),
        (np.ones((2, 3), int), {"instance_id_to_semantic_id": [[(1, 0)]]}, "holds a list where a dictionary"),
        (np.full((2, 3), 2**63, np.uint64), {}, "contains the value 9223372036854775808"),
        (None, {"instance_id_to_semantic_id": {1: 0}}, "given without segmentation_maps"),
    ],
)
def test_maps_that_do_not_fit_their_images_are_refused(maps, options, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor()(np.zeros((2, 3, 3), np.uint8), maps, **options)


@pytest.mark.parametrize("size", [(2, 4), (3, 3)])
def test_a_map_of_another_height_or_width_is_refused(size):
    message = f"Segmentation map 0 is {size[0]} x {size[1]}, but image 0 is 2 x 3"
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor()(np.zeros((2, 3, 3), np.uint8), np.zeros(size, int))
