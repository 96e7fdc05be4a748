"""Whatever a file holds, reading it ends with a result or a documented error: no crash, no hang, no large allocation.

Every reader gets a few hundred random files in the default suite, and more than 100,000 together in the slow one.
"""

import contextlib
import io
import itertools
import json
import pickle
import resource
import signal
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from coco_files import write_instances, write_panoptic
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import tiny_config
from PIL import Image

from hf_maskformer import MaskFormerConfig, MaskFormerImageProcessor, PerPixelBaselineConfig
from hf_maskformer.data.coco import CocoInstances, CocoPanoptic
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.rle import decode_mask
from hf_maskformer.data.sample import load_image, make_sample
from hf_maskformer.evaluation.formats import write_panoptic as write_panoptic_predictions
from hf_maskformer.evaluation.prediction import Prediction, write_prediction
from hf_maskformer.evaluation.prediction_writer import PredictionWriter
from hf_maskformer.hub.original_config import DEFAULTS, OriginalConfig
from hf_maskformer.hub.unpickling import load_pickle
from hf_maskformer.image_processing_maskformer_images import read_image

SECONDS = 10  # for one tiny file
BYTES = 2**30  # that the process may grow by, for all of them
CALLS: list[object] = []


class Hang(BaseException):
    """No `except Exception` takes it for an error of the file."""


def witness(*arguments):
    """What a hostile pickle tries to call."""
    CALLS.append(arguments)


def finish(read):
    """Reads, and checks how it ends."""

    def stop(*_):
        raise Hang(f"took more than {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
    except (ValueError, OSError) as error:
        # Readers that turn every error into a documented one would hide this.
        if isinstance(error.__cause__, MemoryError):
            pytest.fail("asked for too much memory")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not CALLS


@contextlib.contextmanager
def little_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# What may stand in place of any value of a JSON or yaml file.
integers = st.one_of(
    st.integers(-3, 3), st.sampled_from([255, 2**15, 2**31, 2**63 - 1, 2**63, 10**12, 10**30, -(10**12)])
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.sampled_from([0.5, -1.0, 1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "../x", "/etc/hostname", "a\0b", "\ud800", "9" * 5000, "1", "LABEL_0", "é", "os.system"]),
)
junk = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.lists(integers, min_size=4, max_size=4),
    st.dictionaries(st.sampled_from(["id", "0", "model_type", "height", "width", "to_dict"]), scalars, max_size=3),
    st.lists(st.lists(scalars, max_size=2), max_size=2),
    st.just({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}}),
)


def places_of(value, prefix=()):
    """The path of every value in a JSON value."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_of(item, (*prefix, key))


def changed(value, path, new):
    """The value with another one at a path, removed if that is `...`."""
    if not path:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@st.composite
def mutants(draw, values, dump):
    """Texts of a file with up to three values changed or left out, or with bytes changed or cut off."""
    value = draw(st.sampled_from(values))
    for _ in range(draw(st.integers(0, 3))):
        places = list(places_of(value))[1:]
        if places:
            value = changed(value, draw(st.sampled_from(places)), draw(st.one_of(junk, junk, junk, st.just(...))))
    content = dump(value)
    return draw(damage(content)) if draw(st.integers(0, 4)) == 0 else content


@st.composite
def damage(draw, content):
    """The content with some bytes replaced, inserted, repeated or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 4))
        content[place : place + length] = draw(st.binary(max_size=4))
    if draw(st.integers(0, 4)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def as_yaml(value) -> bytes:
    return yaml.safe_dump(value).encode("utf-8", "replace")


# Each reader: the files, and what is done with one in an empty folder.


def configurations():
    backbones = [{"model_type": name} for name in ("resnet", "swin", "maskformer-resnet", "dinov2")]
    fields = [MaskFormerConfig(backbone_config=backbone).to_dict() for backbone in backbones]
    fields += [tiny_config(num_labels=4).to_dict(), PerPixelBaselineConfig().to_dict()]
    return mutants([json.loads(json.dumps(each, default=str)) for each in fields], as_json)


def read_configuration(folder, content):
    (folder / "config.json").write_bytes(content)
    config_class = PerPixelBaselineConfig if b"per-pixel-baseline" in content else MaskFormerConfig
    config = config_class.from_pretrained(folder)
    assert config_class.from_dict(config.to_dict()).num_labels == config.num_labels


def processors():
    settings_of_files = [
        MaskFormerImageProcessor(num_labels=4, ignore_index=255, label_ids_to_fuse=[1]).to_dict(),
        {"size": 800, "max_size": 1333, "size_divisibility": 32, "reduce_labels": True, "pad_size": 64},
    ]
    return mutants(json.loads(json.dumps(settings_of_files, default=str)), as_json)


def read_processor(folder, content):
    (folder / "preprocessor_config.json").write_bytes(content)
    processor = MaskFormerImageProcessor.from_pretrained(folder)
    with contextlib.suppress(MemoryError, RuntimeError):  # a batch may be larger than what a test may take
        processor(np.zeros((2, 3, 3), dtype=np.uint8))


def label_files():
    values = [{"id2label": {"0": "a", "1": "b"}, "ignore_index": 255, "thing_ids": [1], "category_ids": [3, 4]}]
    return mutants([*values, {"id2label": {"0": "a"}, "do_reduce_labels": True}], as_json)


def read_labels(folder, content):
    (folder / "classes.json").write_bytes(content)
    labels = LabelSet.from_json(folder / "classes.json")
    assert labels.num_labels == len(labels.id2label)


YAML_PIECES = ["a: &a [x]", "b: &b [*a, *a]", "c: [*b, *b]", "<<: *a", "d: &d {e: 1}", "f: *d", "_BASE_: config.yaml"]
YAML_PIECES += ["a: !!timestamp x", "? [a]\n: b", "&a a: *a", "a: !!python/object/apply:os.system [id]"]


def yaml_files():
    stages = ["res2", "res3", "res4", "res5"]
    common = {"INPUT.FORMAT": "RGB", "MODEL.META_ARCHITECTURE": "MaskFormer", "MODEL.SEM_SEG_HEAD.IN_FEATURES": stages}
    common |= {"MODEL.RESNETS.OUT_FEATURES": stages, "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead"}
    # A few of the fields at a time: yaml is slow.
    fields = list(DEFAULTS.items())
    defaults = [dict(fields[start : start + 6]) for start in range(0, len(fields), 6)]
    backbones = ["build_resnet_deeplab_backbone", "D2SwinTransformer"]
    values = [
        nested({**part, **common, "MODEL.BACKBONE.NAME": backbone}) for part in defaults for backbone in backbones
    ]
    return st.one_of(
        mutants(values, as_yaml),
        st.text(st.sampled_from("ab:[]{}-,&*! \n?|>%@'\"<=0."), max_size=30).map(str.encode),
        st.lists(st.sampled_from(YAML_PIECES), max_size=6).map(lambda pieces: "\n".join(pieces).encode()),
    )


def nested(flat):
    root: dict = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        part = root
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return root


def read_yaml_file(folder, content):
    (folder / "config.yaml").write_bytes(content)
    original = OriginalConfig(folder / "config.yaml")
    original.config()
    original.image_processor()


run_lengths = st.one_of(
    st.lists(st.integers(-2, 40), max_size=8),
    st.lists(st.one_of(integers, scalars), max_size=8),
    st.text(st.characters(min_codepoint=45, max_codepoint=115), max_size=12),
    st.binary(max_size=12),
    st.lists(st.integers(0, 12), min_size=1, max_size=6).map(lambda runs: [*runs, max(35 - sum(runs), 0)]),
    junk,
)
coordinates = st.one_of(st.floats(-5, 20), st.floats(), integers, scalars)
polygons = st.lists(st.one_of(st.lists(coordinates, max_size=10), junk), max_size=3)
segmentations = st.one_of(
    st.fixed_dictionaries({"counts": run_lengths}, optional={"size": st.one_of(st.just([5, 7]), junk)}), polygons, junk
)


def read_segmentation(folder, segmentation):
    assert decode_mask(segmentation, (5, 7)).shape == (5, 7)


def instance_files():
    polygon, rle = [[0, 0, 2, 0, 2, 2]], {"size": [2, 3], "counts": [1, 5]}
    common = {"image_id": 7, "category_id": 1, "iscrowd": 0}
    annotations = [{"id": 1, **common, "segmentation": polygon}, {"id": 2, **common, "segmentation": rle}]
    return mutants([coco_content({"height": 2, "width": 3}, annotations)], as_json)


def panoptic_files():
    segments = [{"id": 1, "category_id": 1, "iscrowd": 1}, {"id": 2, "category_id": 9}]
    return mutants([coco_content({}, [{"image_id": 7, "file_name": "a.png", "segments_info": segments}])], as_json)


def coco_content(fields, annotations):
    categories = [{"id": 1, "name": "person", "isthing": 1}, {"id": 9, "name": "tree", "isthing": 0}]
    images = [{"id": 7, "file_name": "a.png", **fields}]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_instances(folder, content):
    path = folder / "annotations/instances_train.json"
    if not path.exists():
        write_instances(folder, {"a": ((2, 3), [])})
    path.write_bytes(content)
    dataset = CocoInstances(path, folder / "images/train")
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample["masks"].shape[1:] == (2, 3)
        assert dataset.image_path(index).resolve().is_relative_to(folder.resolve())


def read_panoptic(folder, content):
    path = folder / "annotations/panoptic_train.json"
    if not path.exists():
        write_panoptic(folder, {"a": ([[1, 1], [2, 0]], [])})
    path.write_bytes(content)
    dataset = CocoPanoptic(path, folder / "images/train")
    for index in range(len(dataset)):
        assert dataset[index]["segmentation_map"].shape == (2, 2)


@st.composite
def image_files(draw):
    content = bytearray(draw(damage(draw(st.sampled_from(ENCODED_IMAGES)))))
    if draw(st.integers(0, 3)) == 0:
        # Widths, heights and lengths lie in the first bytes of most formats.
        start = draw(st.integers(0, 40))
        number = struct.pack(draw(st.sampled_from([">I", "<I"])), draw(st.sampled_from([2**31 - 1, 2**32 - 1, 50_000])))
        content[start : start + 4] = number
    return bytes(content)


def encoded_images():
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(noise[..., 0]), Image.fromarray(noise[..., 0]).convert("P")]
    pictures += [Image.fromarray(noise[..., 0].astype(np.uint16) * 257), Image.fromarray(noise[..., 0] > 99)]
    for kind, picture in itertools.product(
        ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "EPS", "ICO"), pictures
    ):
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, ValueError):  # not every format has every mode
            picture.save(buffer, kind)
            yield buffer.getvalue()
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield b"MZ not an image"


ENCODED_IMAGES = list(encoded_images())


def read_image_file(folder, content):
    path = folder / "image.png"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert read_image(path, 0).shape[0] == 3
    image = load_image(path)
    make_sample("x", image, image, "image", "map")


# Instructions of pickles, with their arguments.
OPCODES = [bytes([code]) for code in b"N]})(\x85\x86\x87aesubRoi012\x94tld\x81\x93Q\x97"]
OPCODES += [b"K\x01", b"q\x00", b"h\x00", b"C\x01a", b"X\x02\x00\x00\x00f4", b"P1\n", b"\x82\x01"]
OPCODES += [b"\x8a\xff", b"J\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\x00"]
OPCODES += [b"ctest_fuzz\nwitness\n", b"cos\nsystem\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"]
OPCODES += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.numeric\n_frombuffer\n"]


def pickles():
    content = {"model": {"w": np.ones((2, 3), "f4"), "b": np.zeros(0)}, "n": [1, (2.5, "é", None)]}
    whole = [pickle.dumps(content, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    programs = st.lists(st.sampled_from(OPCODES), max_size=25).map(lambda codes: b"\x80\x04" + b"".join(codes) + b".")
    return st.sampled_from(whole).flatmap(damage) | programs


def read_pickle(folder, content):
    (folder / "model.pkl").write_bytes(content)
    load_pickle(folder / "model.pkl")


# The files, the reader, and how many files the slow suite has it read.
READERS = {
    "configuration": (configurations, read_configuration, 5_000),
    "processor": (processors, read_processor, 5_000),
    "labels": (label_files, read_labels, 10_000),
    "yaml": (yaml_files, read_yaml_file, 4_000),
    "segmentation": (lambda: segmentations, read_segmentation, 40_000),
    "instances": (instance_files, read_instances, 5_000),
    "panoptic": (panoptic_files, read_panoptic, 5_000),
    "image": (image_files, read_image_file, 10_000),
    "pickle": (pickles, read_pickle, 25_000),
}


def fuzz(name, folder, num_files):
    files, read, _ = READERS[name]
    count = Counter()

    @settings(
        max_examples=num_files,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(files())
    def run(content):
        count["files"] += 1
        finish(lambda: read(folder, content))

    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return count["files"]


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_files_end_as_documented(name, tmp_path):
    assert fuzz(name, tmp_path, 150) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_files_end_as_documented(name, tmp_path):
    assert fuzz(name, tmp_path, READERS[name][2]) >= READERS[name][2]


def test_the_slow_suite_reads_more_than_a_hundred_thousand_files():
    assert sum(num_files for _, _, num_files in READERS.values()) >= 100_000


def test_what_is_read_undamaged_is_read(tmp_path):
    """Otherwise the properties above might hold because nothing is ever read."""
    for name, content in {
        "configuration": as_json(tiny_config().to_dict()),
        "processor": as_json({"size": 800}),
        "labels": as_json({"id2label": {"0": "a"}}),
        "segmentation": {"counts": [30, 5]},
        "image": ENCODED_IMAGES[1],
        "pickle": pickle.dumps({"model": np.ones(3)}),
    }.items():
        (tmp_path / name).mkdir()
        READERS[name][1](tmp_path / name, content)


names = st.one_of(
    st.sampled_from(["..", ".", "", "/", "../x", "a/../../x", "/tmp/x", "a\\..\\..\\x", "a/b", "~", "a\0b", "x" * 300]),
    st.text(st.sampled_from("ab./\\~ \0"), max_size=8),
)


@settings(max_examples=200, deadline=None)
@given(names)
def test_no_name_of_a_sample_leads_out_of_the_output_folder(tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside")
    root = outside / "root"
    output = root / "output"
    root.mkdir()
    ids = np.zeros((2, 2), dtype=np.int64)
    prediction = Prediction(ids, [])

    class Data:
        labels = LabelSet({0: "a"})

    writes = [
        lambda: write_prediction(prediction, Image.new("RGB", (2, 2)), {0: "a"}, "semantic", output, name),
        lambda: write_panoptic_predictions([(1, name, {"segmentation": ids, "segments_info": []})], output),
        lambda: PredictionWriter(output, "semantic", Data())(0, name, torch.zeros(2, 2, dtype=torch.int64)),
    ]
    for write in writes:
        with contextlib.suppress(ValueError, OSError):
            write()
    assert {path.name for path in root.iterdir()} <= {"output", "output.json"}
    assert [path.name for path in outside.iterdir()] == ["root"]
