"""Files made to do harm, each by hand: what a stranger's checkpoint or data set may try."""

import base64
import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from coco_files import write_instances
from models import swin_config, tiny_config, tiny_model
from PIL import Image
from safetensors.torch import save_file

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.coco import CocoInstances
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.sample import load_image
from hf_maskformer.evaluation.pipeline import _as_rgb
from hf_maskformer.training.starting_point import new_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


def with_header(content, change, name="model.pixel_level_module.decoder.mask_projection.weight", length=None):
    """The content of a safetensors file with another header."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    changed = change if isinstance(change, bytes) else json.dumps({**header, name: {**header[name], **change}}).encode()
    return struct.pack("<Q", len(changed) if length is None else length) + changed + body


LYING_HEADERS = {
    "a shape beyond the file": lambda content: with_header(content, {"shape": [2**40]}),
    "a shape that overflows": lambda content: with_header(content, {"shape": [2**62, 2**62]}),
    "a negative shape": lambda content: with_header(content, {"shape": [-1]}),
    "a place beyond the file": lambda content: with_header(content, {"data_offsets": [0, 2**60]}),
    "a place of another tensor": lambda content: with_header(content, {"data_offsets": [0, 64]}),
    "a place that ends before it begins": lambda content: with_header(content, {"data_offsets": [100, 0]}),
    "another type": lambda content: with_header(content, {"dtype": "I64"}),
    "an unknown type": lambda content: with_header(content, {"dtype": "object"}),
    "an announced exabyte": lambda content: with_header(content, {}, length=2**60),
    "nesting": lambda content: with_header(content, b"[" * 100_000),
    "no JSON": lambda content: with_header(content, b"\x80\x02cos\nsystem\n"),
    "a missing end": lambda content: content[:-10],
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("kind", LYING_HEADERS)
def test_safetensors_that_lie_about_themselves_are_refused(checkpoint, tmp_path, kind):
    shutil.copytree(checkpoint, tmp_path / "lying")
    path = tmp_path / "lying/model.safetensors"
    path.write_bytes(LYING_HEADERS[kind](path.read_bytes()))
    with pytest.raises(OSError, match=r"lying cannot be loaded \(SafetensorError"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "lying")


def test_weights_in_a_pickle_are_not_run(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(
        b"\x80\x02cos\nmkdir\nX"
        + struct.pack("<I", len(str(tmp_path / "made")))
        + f"{tmp_path}/made".encode()
        + b"\x85R."
    )
    with pytest.raises(OSError, match="cannot be loaded"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "pickled")
    assert not (tmp_path / "made").exists()


def write_config(folder, **fields):
    content = json.loads(tiny_config(swin_config()).to_json_string(use_diff=False))
    for path, value in fields.items():
        *parents, last = path.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    for name in ("id2label", "label2id") if "num_labels" in fields else ():
        del content[name]
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 10**8}, "num_labels is '100000000', but must be an integer from 1 to 65536"),
        ({"num_labels": "x"}, "num_labels is 'x'"),
        ({"fpn_feature_size": 32 * 10**9}, "fpn_feature_size is 32000000000"),
        ({"mask_weight": "heavy"}, "wrong type .*mask_weight"),
        ({"train_num_points": 10**15}, "train_num_points is 1000000000000000"),
        ({"oversample_ratio": 1e300}, "oversample_ratio is 1e.300"),
        ({"decoder_config__decoder_layers": 10**9}, "decoder_config.decoder_layers is 1000000000"),
        ({"decoder_config__decoder_layers": 10**4}, "at most 512 layers in all"),
        ({"decoder_config__num_queries": 10**9}, "decoder_config.num_queries is 1000000000"),
        ({"decoder_config__num_labels": 10**8}, "decoder_config.num_labels is 100000000"),
        ({"decoder_config__id2label": [1]}, "decoder_config has a field of a wrong type"),
        ({"decoder_config__activation_function": "os.system"}, "activation_function is 'os.system'"),
        ({"decoder_config__to_dict": 1}, "decoder_config.to_dict is the name of a method"),
        ({"backbone_config__depths": [10**6] * 4}, "backbone_config.depths is"),
        ({"backbone_config__depths": [200] * 4}, "backbone_config.depths is .* at most 512 layers in all"),
        ({"decoder_config__mine": -(10**9)}, "decoder_config.mine is -1000000000, but no number there may exceed"),
        ({"decoder_config__mine": [[[[[[[[[[1]]]]]]]]]]}, "decoder_config.mine is nested more than 8 deep"),
        ({"backbone_config__window_size": 10**4}, "window_size is 10000, but must be 1 to 64"),
        ({"backbone_config__num_heads": [0] * 4}, r"num_heads\[0\] is 0"),
        ({"backbone_config__model_type": ["swin"]}, r"model_type \['swin'\]"),
        ({"backbone_config__attn_implementation": "a/b"}, "code of the Hub"),
        ({"save_pretrained": 1}, "the name of a method"),
        ({"dtype": "os.system"}, "dtype of the configuration is 'os.system'"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_when_it_is_read(tmp_path, fields, message):
    write_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        MaskFormerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "[" * 100_000, '{"a": ' * 100_000, ""])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    for name, reader in {"config": MaskFormerConfig, "preprocessor_config": MaskFormerImageProcessor}.items():
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises((OSError, ValueError)):
            reader.from_pretrained(tmp_path)


def test_a_file_cannot_ask_for_an_attention_of_the_hub(tmp_path):
    write_config(tmp_path, attn_implementation="stranger/code", _attn_implementation="stranger/code")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone_config__embed_dim": 65536},
        {"decoder_config__d_model": 65536, "decoder_config__decoder_layers": 10},
        {"fpn_feature_size": 65536, "mask_feature_size": 65536},
    ],
)
def test_a_model_beyond_any_memory_is_refused_before_it_is_built(tmp_path, fields):
    """Each of its sizes might be that of a model."""
    write_config(tmp_path, **fields)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"a model of .* parameters, but models here have at most"):
        MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model of .* parameters"):
        new_model(str(tmp_path), LabelSet({0: "sky"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10**9, "width": 10**9}}, "every edge must be a positive integer, at most 65536"),
        ({"size": "large"}, "size is 'large'; give an integer"),
        ({"size_divisor": 10**12}, "size_divisor is"),
        ({"image_mean": [float("nan")] * 3}, "image_mean is"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"do_resize": "no"}, "do_resize is 'no', but must be true or false"),
        ({"num_labels": 1.5}, "num_labels is 1.5, but must be an integer"),
        ({"panoptic_thresholds": {"threshold": "x"}}, "panoptic_thresholds is"),
    ],
)
def test_a_processor_that_no_model_has_is_refused(tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        MaskFormerImageProcessor.from_pretrained(tmp_path)


def test_an_image_that_resizing_would_blow_up_is_refused():
    line = np.zeros((1, 60_000, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="Images would be 800 x 48000000 after resizing"):
        MaskFormerImageProcessor(size={"shortest_edge": 800})(line)


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 50,000 x 50,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "EPS")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "2500000000 pixels"),
        (eps(), "cannot identify"),
        (b"MZ\x90\x00", "cannot identify"),
        (b"", "cannot ident"),
    ],
    ids=["bomb", "PostScript", "program", "empty"],
)
def test_what_is_no_harmless_image_is_refused_whatever_it_is_called(tmp_path, content, message):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.png cannot be read as an image .*{message}") as error:
        load_image(tmp_path / "photo.png")
    assert "BytesIO" not in str(error.value)
    with pytest.raises(ValueError, match=rf"Image 0 .*photo\.png.* cannot be read.*{message}"):
        MaskFormerImageProcessor()(tmp_path / "photo.png")


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(bomb(), "2500000000 pixels"), (eps(), "cannot identify"), (b"MZ\x90\x00", "cannot identify")],
    ids=["bomb", "PostScript", "program"],
)
def test_what_is_no_harmless_image_is_refused_in_base64_too(content, message, prefix):
    with pytest.raises(ValueError, match=rf"Image 0 .* cannot be read: .*{message}"):
        _as_rgb(prefix + base64.b64encode(content).decode(), timeout=None, index=0)


@pytest.mark.parametrize("text", ["no such file.png", "data:text/html;base64,AAAA", "data:image/png,AAAA", "a\0b", ""])
def test_a_string_that_holds_no_image_is_refused(text):
    with pytest.raises(ValueError, match=r"cannot be read: (there is no such file|cannot identify)"):
        _as_rgb(text, timeout=None, index=0)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_an_image_in_base64_is_read_with_its_sixteen_bits(prefix):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 4), 257 * 99, dtype=np.uint16)).save(buffer, "PNG")
    image = _as_rgb(prefix + base64.encodebytes(buffer.getvalue()).decode(), timeout=None, index=0)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (99, 99, 99))


def index_of(files):
    return json.dumps({"metadata": {}, "weight_map": {f"weight{n}": file for n, file in enumerate(files)}})


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "[1]",
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"w": 1}, "metadata": {}}',
        '{"weight_map": {}, "metadata": {}}',
        '{"weight_map": {"w": ["model.safetensors"]}, "metadata": {}}',
        index_of(["missing.safetensors"]),
        index_of(["../outside.safetensors"]),
        index_of(["/etc/hostname"]),
        index_of(["OUTSIDE"]),
        index_of(["a\0b"]),
        index_of([""]),
        pytest.param("[" * 100_000, id="nesting"),
        "",
    ],
)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_index_of_weights_that_lies_is_refused(checkpoint, tmp_path, index, variant):
    folder = tmp_path / "indexed"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    index = index.replace("OUTSIDE", str(tmp_path / "outside.safetensors"))
    (folder / f"model.safetensors.index{f'.{variant}' if variant else ''}.json").write_text(index)
    with pytest.raises(OSError, match="indexed"):
        MaskFormerForInstanceSegmentation.from_pretrained(folder, variant=variant)


def test_shards_with_a_true_index_are_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_more_masks_than_memory_are_refused(tmp_path):
    annotation = {"category_id": 1, "segmentation": {"size": [3000, 3000], "counts": [9_000_000]}}
    path = write_instances(tmp_path, {"a": ((3000, 3000), [annotation] * 1000)})
    with pytest.raises(ValueError, match="image 7 has 1000 masks of 3000 x 3000 pixels, more than 8 GB"):
        CocoInstances(path, tmp_path / "images/train")[0]


def test_a_hundred_thousand_classes_are_read_in_time(tmp_path):
    content = {"id2label": {str(label): f"class {label}" for label in range(100_000)}, "ignore_index": -1}
    (tmp_path / "classes.json").write_text(json.dumps({**content, "thing_ids": list(range(50_000))}))
    labels = LabelSet.from_json(tmp_path / "classes.json")
    assert len(labels.stuff_ids) == 50_000


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_labels_of_sixteen_bits_that_are_none_are_named(tmp_path, mode):
    noise = np.random.default_rng(0).integers(0, 2**16, (4, 5))
    for kind in ("images", "annotations"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "images/train/a.png")
    Image.fromarray(noise.astype(np.uint16 if mode == "I;16" else np.int32)).save(tmp_path / "annotations/train/a.tif")
    (tmp_path / "classes.json").write_text('{"id2label": {"0": "sky"}}')
    with pytest.raises(ValueError, match=r"a\.tif contains label .* but .*classes\.json has 1 labels"):
        check_samples(SegmentationFolder(tmp_path, "train"))
    segmentation_map = noise.astype(np.int32)
    with pytest.raises(ValueError, match="label"):
        MaskFormerImageProcessor(num_labels=1)(Image.new("RGB", (5, 4)), segmentation_map)
