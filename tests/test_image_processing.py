"""The image processor: its settings and their files, images into batches, outputs into segmentations."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers.image_utils import SizeDict
from transformers.models.maskformer.image_processing_pil_maskformer import (
    MaskFormerImageProcessorPil as StockImageProcessor,
)

from hf_maskformer.image_processing_maskformer import MaskFormerImageProcessor
from hf_maskformer.image_processing_maskformer_images import read_image, resize_image, resize_nearest
from hf_maskformer.image_processing_maskformer_settings import ImageProcessorSettings
from hf_maskformer.post_processing_maskformer import panoptic_segmentation, semantic_segmentation

FILE_OF_2022 = """{"do_normalize": true, "do_resize": true, "feature_extractor_type": "MaskFormerFeatureExtractor",
    "ignore_index": 255, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "max_size": 2048,
    "num_labels": 150, "reduce_labels": true, "resample": 2, "size": 512, "size_divisibility": 32}"""


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise with some structure: the hardest input for a resizing filter."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def unscaled(**settings) -> MaskFormerImageProcessor:
    """A processor that leaves pixels as they are, so that tests can read them."""
    return MaskFormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, **settings)


def saved_file(tmp_path, content: str):
    (tmp_path / "preprocessor_config.json").write_text(content)
    return tmp_path


# Settings and their files


def test_settings_default_to_those_of_transformers():
    assert MaskFormerImageProcessor().to_json_string() == StockImageProcessor().to_json_string()


def test_a_file_of_2022_loads_with_its_meaning(tmp_path):
    processor = MaskFormerImageProcessor.from_pretrained(saved_file(tmp_path, FILE_OF_2022))
    assert processor.size == {"shortest_edge": 512, "longest_edge": 2048}
    assert processor.do_reduce_labels is True
    assert (processor.size_divisor, processor.ignore_index, processor.num_labels) == (32, 255, 150)
    assert not {"reduce_labels", "max_size", "size_divisibility", "feature_extractor_type"} & processor.to_dict().keys()


def test_none_turns_a_setting_off_that_may_be_none(tmp_path):
    pad_size = {"height": 128, "width": 128}
    processor = MaskFormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255, pad_size=pad_size)
    image, segmentation_map = random_image(64, 64), np.repeat(np.array([[3, 255]], np.uint8), 32).reshape(1, 64)
    batch = processor([image], [segmentation_map.repeat(64, 0)], ignore_index=None, pad_size=None)
    assert batch["class_labels"][0].tolist() == [3, 255]
    assert batch["pixel_values"].shape[-2:] == (64, 64)
    processor.save_pretrained(tmp_path)
    loaded = MaskFormerImageProcessor.from_pretrained(tmp_path, ignore_index=None)
    assert (loaded.ignore_index, loaded.pad_size) == (None, pad_size)
    assert MaskFormerImageProcessor(do_resize=None, size=None).do_resize is True  # has no meaning there


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("[64, 96]", {"height": 64, "width": 96}),
        ('{"height": 64, "width": 96}', {"height": 64, "width": 96}),
        ('{"shortest_edge": 64}', {"shortest_edge": 64, "longest_edge": 1333}),
    ],
)
def test_a_file_of_2022_has_a_max_size_beside_any_size(tmp_path, size, expected):
    content = f'{{"size": {size}, "max_size": 1333}}'
    assert MaskFormerImageProcessor.from_pretrained(saved_file(tmp_path, content)).size == expected


def test_a_file_of_2022_that_transformers_saved_again_keeps_its_meaning(tmp_path):
    old = FILE_OF_2022.replace('"size_divisibility": 32', '"size_divisibility": 0')
    StockImageProcessor.from_pretrained(saved_file(tmp_path, old)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_reduce_labels"] is False
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert processor.do_reduce_labels is True
    assert processor.size_divisor == 0


def test_arguments_outweigh_the_file_under_old_and_new_names(tmp_path):
    saved_file(tmp_path, FILE_OF_2022)
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False, size=640, num_labels=7)
    assert processor.do_reduce_labels is False
    assert processor.size == {"shortest_edge": 640, "longest_edge": 2048}
    assert processor.num_labels == 7
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path, reduce_labels=False, max_size=1000)
    assert processor.do_reduce_labels is False
    assert processor.size == {"shortest_edge": 512, "longest_edge": 1000}


def test_arguments_that_are_no_settings_are_handed_back_on_request(tmp_path):
    saved_file(tmp_path, FILE_OF_2022)
    _, unused = MaskFormerImageProcessor.from_pretrained(tmp_path, foo=1, num_labels=7, return_unused_kwargs=True)
    assert unused["foo"] == 1
    assert "num_labels" not in unused


EVERY_SETTING = {
    "do_resize": False,
    "size": {"height": 96, "width": 64},
    "size_divisor": 0,
    "resample": 3,
    "do_rescale": False,
    "rescale_factor": 0.5,
    "do_normalize": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "ignore_index": 7,
    "do_reduce_labels": True,
    "num_labels": 9,
    "pad_size": {"height": 128, "width": 160},
    "label_ids_to_fuse": [2, 5],
}


def test_every_setting_survives_saving_and_loading(tmp_path):
    MaskFormerImageProcessor(**EVERY_SETTING).save_pretrained(tmp_path)
    loaded = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in EVERY_SETTING} == EVERY_SETTING
    assert loaded.to_dict() == EVERY_SETTING | {"image_processor_type": "MaskFormerImageProcessor"}


def test_transformers_loads_what_we_save(tmp_path):
    MaskFormerImageProcessor(**EVERY_SETTING).save_pretrained(tmp_path)
    stock = StockImageProcessor.from_pretrained(tmp_path).to_dict()
    assert {name: to_plain(stock[name]) for name in EVERY_SETTING} == EVERY_SETTING
    assert stock["image_processor_type"] == "MaskFormerImageProcessor"


def test_we_load_what_transformers_saves(tmp_path):
    StockImageProcessor(**EVERY_SETTING).save_pretrained(tmp_path)
    loaded = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in EVERY_SETTING} == EVERY_SETTING


def to_plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_settings_that_change_nothing_are_accepted():
    processor = MaskFormerImageProcessor(
        processor_class="X",
        image_processor_type="MaskFormerImageProcessorFast",
        do_convert_rgb=True,
        crop_size=None,
        use_fast=False,
        backend="pil",
    )
    assert processor.to_dict() == MaskFormerImageProcessor().to_dict()


def test_a_size_may_be_that_of_an_image_processor_of_transformers():
    for edges in ({"shortest_edge": 40, "longest_edge": 90}, {"height": 40, "width": 90}):
        processor = MaskFormerImageProcessor(size=SizeDict(**edges))
        assert processor.size == MaskFormerImageProcessor(size=edges).size == edges
        assigned = MaskFormerImageProcessor()
        assigned.size = SizeDict(**edges)
        image = Image.new("RGB", (50, 100))
        expected = processor(image).pixel_values[0].shape
        assert assigned(image).pixel_values[0].shape == expected
        assert MaskFormerImageProcessor()(image, size=SizeDict(**edges)).pixel_values[0].shape == expected
    assert MaskFormerImageProcessor(pad_size=SizeDict(height=7, width=9)).pad_size == {"height": 7, "width": 9}


def test_settings_of_one_value_are_refused_with_a_file_too(tmp_path):
    MaskFormerImageProcessor().save_pretrained(tmp_path)
    for setting in ({"do_pad": False}, {"data_format": "channels_last"}, {"return_tensors": "np"}):
        with pytest.raises(ValueError, match="is not supported; only"):
            MaskFormerImageProcessor.from_pretrained(tmp_path, **setting)
    assert MaskFormerImageProcessor.from_pretrained(tmp_path, do_pad=True, use_fast=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest": 3}, "shortest=3 is not a setting"),
        ({"do_center_crop": True}, "do_center_crop=True is not supported"),
        ({"reduce_labels": False, "do_reduce_labels": True}, "reduce_labels=False contradicts do_reduce_labels=True"),
        ({"size_divisibility": 16, "size_divisor": 64}, "size_divisibility=16 contradicts size_divisor=64"),
        ({"size": {"height": 3, "width": 3}, "max_size": 9}, "max_size=9 contradicts size"),
        ({"size": {"longest_edge": 3}}, "size is .* give a dictionary with"),
        ({"size": True}, "every edge must be a positive integer"),
        ({"pad_size": {"height": 64, "width": True}}, "every edge must be a positive integer"),
        ({"size": {"shortest_edge": 0}}, "every edge must be a positive integer"),
        ({"pad_size": {"shortest_edge": 9}}, "pad_size is .* give a dictionary with"),
        ({"size_divisor": -1}, "size_divisor is -1"),
        ({"resample": 1}, r"resample is 1; known are 0 \(nearest\), 2 \(bilinear\)"),
        ({"image_mean": [0.5]}, "image_mean is .* give three numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean is .* give three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std is .* must not contain a zero"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"num_labels": "a"}, "num_labels is 'a', but must be an integer"),
        ({"size_divisor": 1.5}, "size_divisor is 1.5"),
        ({"pad_size": (200, 200)}, r"pad_size is \(200, 200\), but must be a dictionary"),
        ({"size": "64"}, "size is '64'; give an integer"),
        ({"label_ids_to_fuse": 2}, "label_ids_to_fuse is 2; give a list"),
        ({"ignore_index": 1.5}, "ignore_index is 1.5, but must be an integer"),
        ({"rescale_factor": 0}, "rescale_factor is 0; give a number above 0"),
        ({"do_resize": "no"}, "do_resize is 'no', but must be true or false"),
        ({"panoptic_thresholds": {"threshold": "high"}}, "panoptic_thresholds is .*; give numbers from 0 to 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor()(random_image(4, 4), **settings)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (512, {"shortest_edge": 512, "longest_edge": 1333}),
        (np.int64(512), {"shortest_edge": 512, "longest_edge": 1333}),
        ((30, 40), {"height": 30, "width": 40}),
        ({"shortest_edge": 512}, {"shortest_edge": 512}),
        (None, {"shortest_edge": 800, "longest_edge": 1333}),
    ],
)
def test_size_may_take_several_forms(given, meant):
    assert MaskFormerImageProcessor(size=given).size == meant


def test_sizes_of_one_processor_are_not_shared_with_the_next():
    MaskFormerImageProcessor().size["shortest_edge"] = 3
    assert MaskFormerImageProcessor().size["shortest_edge"] == 800


# Resizing


@pytest.mark.parametrize(
    ("size", "image_size", "resized_size"),
    [
        ({"shortest_edge": 800, "longest_edge": 1333}, (480, 640), (800, 1067)),  # 1066.67 is rounded, not cut
        ({"shortest_edge": 800, "longest_edge": 1333}, (1024, 2048), (667, 1333)),  # 666.5 is rounded up
        ({"shortest_edge": 800, "longest_edge": 1333}, (1000, 100), (1333, 133)),
        # Halves that are not exact: the order of the paper's operations decides.
        ({"shortest_edge": 480}, (704, 715), (480, 487)),
        ({"shortest_edge": 800, "longest_edge": 1333}, (105, 310), (451, 1333)),
        ({"shortest_edge": 512}, (100, 1000), (512, 5120)),
        ({"shortest_edge": 512, "longest_edge": 600}, (1, 5000), (1, 600)),  # 0.12 pixels become one
        ({"height": 30, "width": 50}, (480, 640), (30, 50)),
        ({"max_height": 100, "max_width": 100}, (480, 640), (75, 100)),
    ],
)
def test_resized_sizes(size, image_size, resized_size):
    assert ImageProcessorSettings(size=size).resized_size(image_size) == resized_size


@pytest.mark.parametrize(("resample", "levels"), [(Image.Resampling.BILINEAR, 1), (Image.Resampling.BICUBIC, 2)])
@pytest.mark.parametrize("size", [(512, 683), (240, 320), (37, 51), (800, 1067)])
def test_resizing_is_within_a_level_or_two_of_pil(size, resample, levels):
    image = random_image(480, 640)
    ours = resize_image(torch.from_numpy(np.array(image)).permute(2, 0, 1), size, resample)
    pil = np.array(image.resize(size[::-1], resample))
    assert ours.dtype == torch.uint8
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - pil).max() <= levels


@pytest.mark.parametrize("size", [(512, 683), (15, 27), (106, 106), (800, 1067), (1, 1)])
def test_nearest_resizing_equals_pil(size):
    values = np.random.default_rng(0).integers(0, 2**20, (106, 480), dtype=np.int32)
    pil = np.array(Image.fromarray(values).resize(size[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(resize_nearest(values, size), pil)


# Images into batches


def test_pixel_values_equal_those_of_transformers_where_it_does_not_stretch():
    images = [random_image(64, 96, seed=1), random_image(64, 96, seed=2)]
    settings = {"size": {"shortest_edge": 64, "longest_edge": 1333}}
    ours = MaskFormerImageProcessor(**settings)(images, return_tensors="pt")
    stock = StockImageProcessor(**settings)(images, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(ours["pixel_mask"], stock["pixel_mask"])
    assert ours["pixel_mask"].dtype == stock["pixel_mask"].dtype


def test_resized_pixel_values_are_within_one_level_of_transformers():
    settings = {"size": {"shortest_edge": 96, "longest_edge": 1333}}
    ours = MaskFormerImageProcessor(**settings)(random_image(64, 128))["pixel_values"]
    stock = StockImageProcessor(**settings)(random_image(64, 128), return_tensors="pt")["pixel_values"]
    assert (ours - stock).abs().max() <= 1.01 / 255 / 0.224


def test_normalisation_by_hand():
    image = np.full((1, 1, 3), 51, dtype=np.uint8)
    processor = MaskFormerImageProcessor(do_resize=False, image_mean=[0.0, 0.1, 0.2], image_std=0.5, size_divisor=0)
    assert processor(image)["pixel_values"].flatten().tolist() == pytest.approx([0.4, 0.2, 0.0], abs=1e-6)


def test_other_defaults_for_tensors_leave_no_trace():
    image, processor = Image.effect_noise((40, 30), 50), MaskFormerImageProcessor(size={"height": 32, "width": 48})
    expected = processor(image, return_tensors="pt").pixel_values
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = processor(image, return_tensors="pt").pixel_values
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_image_is_the_same_in_every_form(tmp_path):
    image = random_image(6, 5)
    image.save(tmp_path / "image.png")
    array = np.array(image)
    tensor = torch.from_numpy(array)
    forms = [image, array, array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), tmp_path / "image.png"]
    forms += [image.convert("RGBA"), np.dstack([array, array[..., :1]]), array[None], [image], array.astype(np.float32)]
    expected = unscaled()(image)["pixel_values"]
    assert expected.dtype == torch.float32
    for form in forms:
        assert torch.equal(unscaled()(form)["pixel_values"], expected)


def test_float_images_are_taken_as_they_are():
    array = np.array(random_image(6, 5))
    processor = MaskFormerImageProcessor(size={"height": 9, "width": 8})
    expected = processor(array.astype(np.float64))["pixel_values"]
    scaled = processor(array / 255, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)


def test_grey_and_palette_images_become_rgb():
    grey = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5))
    expected = torch.arange(30.0).reshape(6, 5).expand(3, 6, 5)
    for form in (grey, np.array(grey), np.array(grey)[..., None], np.array(grey)[None]):
        pixel_values = unscaled(size_divisor=0)(form)["pixel_values"]
        assert torch.equal(pixel_values[0], expected)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert unscaled(size_divisor=0)(palette)["pixel_values"].flatten().tolist() == [10, 20, 30]


def test_sixteen_bits_are_scaled_to_eight():
    deep = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16))
    assert deep.mode == "I;16"
    pixel_values = unscaled(size_divisor=0)(deep)["pixel_values"]
    assert pixel_values[0, :, 0].tolist() == [[0, 1, 128, 255]] * 3


@pytest.mark.parametrize("dtype", [np.uint16, ">u2"])
def test_arrays_and_tensors_of_sixteen_bits_are_scaled_to_eight(dtype):
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=dtype)
    for form in (deep, np.stack([deep] * 3), torch.from_numpy(deep.astype(np.uint16))):
        pixel_values = unscaled(size_divisor=0)(form)["pixel_values"]
        assert pixel_values[0, :, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_sixteen_bits_are_rounded():
    pixels = np.array([[0, 128, 129, 65535 - 128]], np.uint16)
    assert unscaled(size_divisor=0)(pixels)["pixel_values"][0, 0, 0].tolist() == [0, 0, 1, 255]


def test_a_tensor_with_gradient_is_an_image():
    batch = MaskFormerImageProcessor(do_rescale=False)(torch.rand(3, 40, 60, requires_grad=True))
    assert not batch["pixel_values"].requires_grad


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint32"])
def test_integers_of_unknown_range_are_refused(dtype):
    pixels = np.zeros((4, 4, 3), dtype=dtype)
    for form in (pixels, torch.from_numpy(pixels)):
        with pytest.raises(ValueError, match=f"Image 1 holds .*{dtype}, which does not say which value is white"):
            MaskFormerImageProcessor()([random_image(4, 4), form])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(value):
    pixels = np.full((3, 4, 4), 100.0)
    pixels[1, 2, 3] = value
    with pytest.raises(ValueError, match="Image 0 contains NaN or infinity"):
        MaskFormerImageProcessor()(pixels)


def test_a_tensor_stays_on_its_device_until_it_is_resized():
    assert read_image(torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"), 0).device.type == "meta"


@pytest.mark.parametrize("mode", ["1", "LA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_read_as_pillow_converts_them(mode):
    image = random_image(6, 5).convert(mode)
    pixel_values = unscaled(size_divisor=0)(image)["pixel_values"]
    assert np.array_equal(pixel_values[0].byte().permute(1, 2, 0).numpy(), np.array(image.convert("RGB")))


@pytest.mark.parametrize(("opaque", "premultiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_colours_multiplied_by_their_opacity_are_read_as_those_that_are_not(opaque, premultiplied):
    image = random_image(6, 5).convert(opaque)  # wholly opaque
    found, expected = (unscaled()(each)["pixel_values"] for each in (image.convert(premultiplied), image))
    assert torch.equal(found, expected)


def test_a_bool_array_is_black_and_white_as_mode_1_is():
    array = np.arange(30).reshape(5, 6) % 4 == 0
    processor = MaskFormerImageProcessor(do_resize=False)
    as_image, as_array = (processor(each)["pixel_values"] for each in (Image.fromarray(array), array))
    assert torch.equal(as_image, as_array)


def test_a_file_is_turned_upright_and_a_pil_image_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(6, 5).save(tmp_path / "turned.png", exif=exif)
    from_file = unscaled(size_divisor=0)(tmp_path / "turned.png")["pixel_values"]
    as_stored = unscaled(size_divisor=0)(Image.open(tmp_path / "turned.png"))["pixel_values"]
    assert torch.equal(from_file, as_stored.flip(2).transpose(2, 3))


def test_a_damaged_file_and_one_beyond_pillows_limit_are_named(tmp_path, monkeypatch):
    random_image(64, 64).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"Image 1 \(.*cut\.png\) cannot be read: image file is truncated"):
        MaskFormerImageProcessor()([random_image(4, 4), tmp_path / "cut.png"])
    (tmp_path / "bomb.png").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png\) cannot be read: .*decompression bomb"):
        MaskFormerImageProcessor()(tmp_path / "bomb.png")


def test_one_pixel_is_an_image():
    batch = MaskFormerImageProcessor(size={"shortest_edge": 32})(Image.new("RGB", (1, 1), "white"))
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert (batch["pixel_values"] > 2).all()


@pytest.mark.parametrize("size", [(40, 50), (20, 25)])
def test_bytes_are_resized_alike_where_torch_filters_floats_only(size):
    pixels = torch.from_numpy(np.array(random_image(30, 37))).permute(2, 0, 1)
    as_bytes = resize_image(pixels, size, resample=2).int()
    as_floats = resize_image(pixels.float(), size, resample=2).round().clamp(0, 255).int()
    assert (as_bytes - as_floats).abs().max() <= 1


def test_a_device_takes_the_whole_batch():
    images = [random_image(6, 5), random_image(6, 5, seed=1), random_image(3, 4)]
    maps = [np.zeros((image.height, image.width), int) for image in images]
    for resample in (2, 0):
        batch = MaskFormerImageProcessor()(images, maps, device="meta", target_format="segment_map", resample=resample)
        assert {name: value.device.type for name, value in batch.items()} == dict.fromkeys(batch, "meta")
    on_cpu = MaskFormerImageProcessor()(images, maps, device="cpu", target_format="segment_map")
    assert {name: value.shape for name, value in batch.items()} == {name: each.shape for name, each in on_cpu.items()}


def test_images_that_are_ready_are_only_padded():
    processor = MaskFormerImageProcessor(do_resize=False)
    images = [random_image(40, 50), random_image(20, 70)]
    expected = processor(images)
    ready = [
        values[:, : image.height, : image.width] for values, image in zip(expected["pixel_values"], images, strict=True)
    ]
    for given in (ready, [each.numpy() for each in ready]):
        batch = processor.pad_and_create_pixel_mask(given)
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
    assert processor.pad_and_create_pixel_mask(ready, size_divisor=0)["pixel_mask"].shape == (2, 40, 70)
    assert processor.pad_and_create_pixel_mask(ready, pad_size=80)["pixel_mask"].shape == (2, 80, 80)
    with pytest.raises(ValueError, match="pixel_values_list is empty"):
        processor.pad_and_create_pixel_mask([])


def test_the_data_format_decides_where_the_shape_does_not():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    first = unscaled(size_divisor=0)(array)["pixel_values"]
    last = unscaled(size_divisor=0)(array, input_data_format="channels_last")["pixel_values"]
    assert torch.equal(first, last.permute(0, 2, 3, 1))
    assert first[0].flatten().tolist() == list(range(27))
    with pytest.raises(ValueError, match="input_data_format is 'channels_lats'; give"):
        unscaled()(array, input_data_format="channels_lats")


def test_of_two_axes_that_may_be_channels_three_are_more_likely_than_one():
    image = torch.arange(60, dtype=torch.uint8).reshape(1, 20, 3)
    assert unscaled(size_divisor=0)(image)["pixel_values"].shape == (1, 3, 1, 20)


def test_images_are_padded_right_and_below_with_zeros():
    images = [np.full((2, 3, 3), 9, dtype=np.uint8), np.full((4, 1, 3), 9, dtype=np.uint8)]
    batch = unscaled(size_divisor=0)(images)
    assert batch["pixel_values"][:, 0].tolist() == [
        [[9, 9, 9], [9, 9, 9], [0, 0, 0], [0, 0, 0]],
        [[9, 0, 0], [9, 0, 0], [9, 0, 0], [9, 0, 0]],
    ]
    assert torch.equal(batch["pixel_mask"] * 9, batch["pixel_values"][:, 0].long())
    normalised = MaskFormerImageProcessor(do_resize=False)(images)["pixel_values"]
    assert (normalised[0, :, 2:] == 0).all()


@pytest.mark.parametrize(
    ("divisor", "padded_size"), [(32, (64, 128)), (0, (50, 97)), (None, (50, 97)), (10, (50, 100))]
)
def test_a_size_divisor_pads_and_does_not_stretch(divisor, padded_size):
    image = random_image(50, 97)
    batch = unscaled(size_divisor=divisor)(image)
    assert batch["pixel_values"].shape == (1, 3, *padded_size)
    assert batch["pixel_mask"].sum() == 50 * 97
    assert torch.equal(batch["pixel_values"][0, :, :50, :97].byte(), torch.tensor(np.array(image)).permute(2, 0, 1))


def test_pad_size_is_the_size_of_every_batch():
    processor = unscaled(pad_size={"height": 50, "width": 70})
    assert processor(random_image(5, 7))["pixel_values"].shape == (1, 3, 50, 70)
    assert processor(random_image(5, 7), pad_size=np.int64(9))["pixel_values"].shape == (1, 3, 9, 9)
    with pytest.raises(ValueError, match=r"Image 1 is 51 x 7 after resizing and does not fit into pad_size 50 x 70"):
        processor([random_image(5, 7), random_image(51, 7)])


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_an_image_that_pad_size_does_not_hold_is_refused(size):
    processor = unscaled(pad_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="does not fit into pad_size"):
        processor(np.zeros((*size, 3), np.uint8))


def test_a_size_given_in_a_call_changes_one_edge_of_the_processors():
    processor = MaskFormerImageProcessor(size={"shortest_edge": 20, "longest_edge": 50}, size_divisor=0)
    assert processor(np.zeros((10, 30, 3), np.uint8), size=40)["pixel_values"].shape[-2:] == (17, 50)


def test_settings_of_a_call_hold_for_this_call_only():
    processor = MaskFormerImageProcessor(size={"height": 32, "width": 32})
    assert processor(random_image(9, 9), size={"height": 64, "width": 32})["pixel_mask"].shape == (1, 64, 32)
    assert processor(random_image(9, 9))["pixel_mask"].shape == (1, 32, 32)


def test_attributes_may_be_changed_and_are_checked():
    processor = MaskFormerImageProcessor()
    processor.size = {"height": 32, "width": 64}
    assert processor(random_image(9, 9))["pixel_mask"].shape == (1, 32, 64)
    processor.resample = 5
    with pytest.raises(ValueError, match="resample is 5"):
        processor(random_image(9, 9))


def test_arrays_are_returned_on_request():
    batch = unscaled()(random_image(4, 4), np.zeros((4, 4), dtype=np.uint8), return_tensors="np")
    assert isinstance(batch["pixel_values"], np.ndarray)
    assert isinstance(batch["mask_labels"][0], np.ndarray)
    with pytest.raises(ValueError, match="return_tensors is 'tf'"):
        unscaled()(random_image(4, 4), return_tensors="tf")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images is None"),
        ([], "images is empty"),
        ([Image.new("RGB", (2, 2)), None], "Image 1 is a NoneType"),
        (np.zeros((5, 6, 7), dtype=np.uint8), r"Image 0 has shape \(5, 6, 7\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"Image 0 has shape \(0, 4, 3\)"),
        (Image.new("I", (2, 2)), "Image 0 cannot be read: mode I does not say which values are black and white"),
        (Image.new("F", (2, 2)), "Image 0 cannot be read: mode F"),
        ("nowhere.png", r"Image 0 \(nowhere.png\) cannot be read: .*No such file"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor()(images)


# Outputs into segmentations


def model_outputs() -> SimpleNamespace:
    """Two images, 20 x 30 and 32 x 24, in a padded batch of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        class_queries_logits=torch.randn(2, 10, 5, generator=generator) * 3,
        masks_queries_logits=torch.randn(2, 10, 8, 8, generator=generator) * 5,
        image_sizes=torch.tensor([[20, 30], [32, 24]]),
        padded_sizes=torch.tensor([[32, 32], [32, 32]]),
    )


def test_semantic_maps_come_from_the_sizes_in_the_outputs():
    outputs = model_outputs()
    expected = semantic_segmentation(*vars(outputs).values(), target_sizes=[(40, 60), (16, 12)])
    maps = MaskFormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(40, 60), (16, 12)])
    assert all(map(torch.equal, maps, expected))
    maps = MaskFormerImageProcessor().post_process_semantic_segmentation(outputs)
    assert [tuple(label_map.shape) for label_map in maps] == [(20, 30), (32, 24)]


@pytest.mark.parametrize(("largest", "is_warned"), [(1.0, True), (1.5, False)])
def test_images_that_were_rescaled_already_are_warned_of(largest, is_warned, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.image_processing_maskformer.logger.warning_once", warnings.append)
    MaskFormerImageProcessor()(images=torch.full((3, 40, 40), largest))
    assert any("rescaled again" in warning for warning in warnings) == is_warned


@pytest.mark.parametrize(
    ("kind", "factor", "is_warned"),
    [
        (np.uint16, 1 / 65535, True),
        (np.uint8, 1 / 65535, True),
        (np.float32, 1 / 65535, False),
        (np.uint8, None, False),
    ],
)
def test_a_factor_for_16_bits_is_warned_of_where_they_are_read_as_8(kind, factor, is_warned, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.image_processing_maskformer.logger.warning_once", warnings.append)
    MaskFormerImageProcessor(rescale_factor=factor)(images=np.full((3, 40, 40), 200, dtype=kind))
    assert any("become black with the rescale_factor" in warning for warning in warnings) == is_warned


def test_a_divisor_of_none_and_a_set_of_labels_may_be_assigned(tmp_path):
    processor = MaskFormerImageProcessor()
    processor.size_divisor, processor.label_ids_to_fuse, processor.size = None, {2, 1}, {"height": 8, "width": 40}
    assert processor(Image.new("RGB", (9, 9)))["pixel_values"].shape[-2:] == (8, 40)
    processor.save_pretrained(tmp_path)
    loaded = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert (loaded.size_divisor, loaded.label_ids_to_fuse) == (0, [1, 2])


POST_PROCESSING = [f"post_process_{task}_segmentation" for task in ("semantic", "instance", "panoptic")]


@pytest.mark.parametrize("name", POST_PROCESSING)
@pytest.mark.parametrize(
    ("settings", "photographs"),
    [({"do_resize": False}, [(20, 30), (20, 24)]), ({"size": {"shortest_edge": 20}}, [(200, 300), (400, 480)])],
)
def test_a_model_that_was_not_told_of_its_padding_is_warned_of(name, settings, photographs, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.image_processing_maskformer.logger.warning_once", warnings.append)
    processor, outputs = MaskFormerImageProcessor(**settings), model_outputs()
    padded = SimpleNamespace(**vars(outputs) | {"image_sizes": outputs.padded_sizes})
    post_process = getattr(processor, name)
    post_process(outputs, target_sizes=photographs)
    for targets in (None, [(32, 32)] * 2, torch.tensor([[70, 150]] * 2)):  # none, or not those of the photographs
        post_process(padded, target_sizes=targets)
    with pytest.raises(ValueError, match="target_sizes is"):
        post_process(padded, target_sizes=[(None, 3)] * 2)
    assert not warnings
    post_process(padded, target_sizes=photographs)
    assert len(warnings) == 1
    assert "called without pixel_mask" in warnings[0]


def test_outputs_without_sizes_are_taken_to_fill_four_times_the_mask_logits():
    outputs = model_outputs()
    outputs.masks_queries_logits = outputs.masks_queries_logits[..., :6]
    full = torch.tensor([[32, 24], [32, 24]])
    logits = outputs.class_queries_logits, outputs.masks_queries_logits
    del outputs.image_sizes, outputs.padded_sizes
    maps = MaskFormerImageProcessor().post_process_semantic_segmentation(outputs)
    assert all(map(torch.equal, maps, semantic_segmentation(*logits, full, full)))


def test_labels_to_fuse_are_those_of_the_processor_unless_given():
    outputs = model_outputs()
    thresholds = {"threshold": 0.1, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.2}
    processor = MaskFormerImageProcessor(label_ids_to_fuse=[0, 1, 2, 3])

    def processed(**options) -> list:
        return [entry["segments_info"] for entry in processor.post_process_panoptic_segmentation(outputs, **options)]

    def expected(labels: list[int]) -> list:
        results = panoptic_segmentation(*vars(outputs).values(), *thresholds.values(), labels)
        return [entry["segments_info"] for entry in results]

    assert processed(**thresholds) == expected([0, 1, 2, 3])
    assert processed(**thresholds, label_ids_to_fuse=set()) == expected([])
    assert expected([]) != expected([0, 1, 2, 3])


def test_semantic_scores_come_with_the_map_on_request():
    outputs = model_outputs()
    processor = MaskFormerImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs, mode="direct")
    for label_map, result in zip(
        maps, processor.post_process_semantic_segmentation(outputs, None, True, mode="direct"), strict=True
    ):
        assert result.segmentation_scores.shape == (4, *label_map.shape)
        assert torch.equal(result.segmentation, label_map)
        assert torch.equal(result["segmentation_scores"].argmax(0), label_map)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'slow'; give one of paper, direct, fast"):
        MaskFormerImageProcessor().post_process_semantic_segmentation(model_outputs(), mode="slow")


def test_instances_come_in_three_forms():
    processor, thresholds = MaskFormerImageProcessor(), {"threshold": 0.1, "mask_threshold": 0.4}
    outputs, targets = model_outputs(), [(40, 60), (16, 12)]
    forms = {"id_map": {}, "masks": {"return_binary_maps": True}, "rle": {"return_coco_annotation": True}}
    results = {
        form: processor.post_process_instance_segmentation(outputs, **thresholds, target_sizes=targets, **flag)
        for form, flag in forms.items()
    }
    for index, target in enumerate(targets):
        id_map, masks, rle = (results[form][index] for form in ("id_map", "masks", "rle"))
        assert id_map["segments_info"] == masks["segments_info"] == rle["segments_info"]
        assert masks["segmentation"].shape == (len(masks["segments_info"]), *target)
        assert torch.equal(id_map["segmentation"] > 0, masks["segmentation"].any(0))
        assert [entry["size"] for entry in rle["segmentation"]] == [list(target)] * len(rle["segments_info"])
    assert len(results["rle"][0]["segments_info"]) > 1


def test_one_form_of_instances_at_a_time():
    with pytest.raises(ValueError, match="exclude each other"):
        MaskFormerImageProcessor().post_process_instance_segmentation(
            model_outputs(), return_coco_annotation=True, return_binary_maps=True
        )


@pytest.mark.parametrize("outputs", [{}, (torch.zeros(1), torch.zeros(1)), None])
def test_what_is_no_output_of_a_model_is_refused(outputs):
    with pytest.raises(ValueError, match=f"outputs is a {type(outputs).__name__}; give what the model returned"):
        MaskFormerImageProcessor().post_process_semantic_segmentation(outputs)


def test_one_target_size_too_many_is_refused():
    with pytest.raises(ValueError, match="target_sizes has 3 entries, but the batch has 2 images"):
        MaskFormerImageProcessor().post_process_panoptic_segmentation(model_outputs(), target_sizes=[(4, 4)] * 3)


def test_a_setting_of_a_later_transformers_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": false, "do_magic": true}')
    logger = logging.getLogger("hf_maskformer.image_processing_maskformer")
    with caplog.at_level("WARNING", logger=logger.name):
        processor = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert not processor.do_resize
    assert "do_magic" in caplog.text


NUMPY_SETTINGS = {
    "num_labels": np.int64(4),
    "ignore_index": np.uint8(255),
    "rescale_factor": np.float32(0.5),
    "image_mean": np.array([0.5, 0.25, 0], dtype=np.float32),
    "panoptic_thresholds": {"threshold": np.float32(0.5)},
}


@pytest.mark.parametrize("is_assigned", [False, True])
def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path, is_assigned):
    processor = MaskFormerImageProcessor(**({} if is_assigned else NUMPY_SETTINGS))
    for name, value in NUMPY_SETTINGS.items() if is_assigned else ():
        setattr(processor, name, value)
    processor.save_pretrained(tmp_path)
    loaded = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert (loaded.num_labels, loaded.ignore_index, loaded.rescale_factor) == (4, 255, 0.5)
    assert (loaded.image_mean, loaded.panoptic_thresholds) == ([0.5, 0.25, 0], {"threshold": 0.5})


@pytest.mark.parametrize("value", [0, "four", object()])
def test_a_setting_without_a_meaning_is_not_saved_over_a_file(tmp_path, value):
    processor = MaskFormerImageProcessor(num_labels=4)
    processor.save_pretrained(tmp_path)
    processor.num_labels = value
    with pytest.raises(ValueError, match="num_labels is"):
        processor.save_pretrained(tmp_path)
    assert MaskFormerImageProcessor.from_pretrained(tmp_path).num_labels == 4


def test_a_processor_in_a_subfolder_is_read(tmp_path):
    MaskFormerImageProcessor(ignore_index=7).save_pretrained(tmp_path / "processor")
    assert MaskFormerImageProcessor.from_pretrained(tmp_path, subfolder="processor").ignore_index == 7


@pytest.mark.skipif(not features.check("jpg_2000"), reason="needs JPEG 2000 in Pillow")
def test_a_file_of_jpeg_2000_is_read(tmp_path):
    Image.new("RGB", (32, 64)).save(tmp_path / "photo.jp2")
    batch = MaskFormerImageProcessor(do_resize=False)(str(tmp_path / "photo.jp2"))
    assert batch["pixel_values"].shape == (1, 3, 64, 32)


def test_no_batch_has_images_of_more_pixels_than_the_limit():
    settings = ImageProcessorSettings(do_resize=False)
    assert settings.padded_size([(2**14, 2**14)]) == (2**14, 2**14)
    with pytest.raises(ValueError, match="more than 268435456 pixels"):
        settings.padded_size([(2**14, 2**14 + 1)])
