"""The readers of COCO's panoptic and instance files."""

import json
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from coco_files import CATEGORIES, encode_ids, write_image, write_instances, write_json, write_panoptic
from models import tiny_config
from PIL import Image
from real_data import REAL_DATA, needs_real_data
from torch.utils.data import DataLoader

from hf_maskformer import MaskFormerDataCollator, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.data import json_file
from hf_maskformer.data.augmentation import RandomScaleCropFlip
from hf_maskformer.data.augmented import AugmentedDataset
from hf_maskformer.data.check import check_samples, inspect_samples
from hf_maskformer.data.coco import CocoInstances, CocoPanoptic
from hf_maskformer.data.coco_file import CocoFile
from hf_maskformer.data.geometry import drop_empty_masks
from hf_maskformer.data.json_file import read_entries, stream_json
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.data.rle import encode_rle
from hf_maskformer.evaluation.average_precision import AveragePrecision
from hf_maskformer.evaluation.tasks import reference_of

LARGE = 5 + 256 * 3 + 65536 * 2
IDS = [[255, 255, 0], [LARGE, 8, 8]]
SEGMENTS = [
    {"id": LARGE, "category_id": 90, "iscrowd": 0},
    {"id": 255, "category_id": 184, "iscrowd": 0},
    {"id": 8, "category_id": 1, "iscrowd": 1},
]
SQUARE = [[1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0]]


@pytest.fixture
def panoptic(tmp_path):
    return write_panoptic(tmp_path, {"a": (IDS, SEGMENTS), "b": ([[0, 4]], [{"id": 4, "category_id": 1}])})


def open_panoptic(json_path):
    return CocoPanoptic(json_path, json_path.parents[1] / "images/train")


def open_instances(json_path, **options):
    return CocoInstances(json_path, json_path.parents[1] / "images/train", **options)


def edit(json_path, change):
    content = json.loads(json_path.read_text())
    change(content)
    json_path.write_text(json.dumps(content))


@pytest.mark.parametrize("alpha", [0, 255])
def test_an_alpha_channel_is_not_part_of_an_id(panoptic, alpha):
    """Some annotation tools export ids as RGBA."""
    path = panoptic.with_suffix("") / "a.png"
    expected = open_panoptic(panoptic)[0]
    image = Image.open(path).convert("RGBA")
    image.putalpha(alpha)
    image.save(path)
    sample = open_panoptic(panoptic)[0]
    assert np.array_equal(sample["segmentation_map"], expected["segmentation_map"])
    assert sample["crowd_ids"] == expected["crowd_ids"]


def test_colours_that_are_stored_as_a_palette_are_the_same_ids(panoptic):
    expected = open_panoptic(panoptic)[0]
    path = panoptic.with_suffix("") / "a.png"
    image = Image.open(path)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(palette.convert("RGB"), image)
    palette.save(path)
    found = open_panoptic(panoptic)[0]
    assert np.array_equal(found["segmentation_map"], expected["segmentation_map"])
    assert found["instance_id_to_semantic_id"] == expected["instance_id_to_semantic_id"]


def test_segments_are_numbered_in_the_order_of_their_list(panoptic):
    sample = open_panoptic(panoptic)[0]
    assert sample["segmentation_map"].tolist() == [[257, 257, 255], [256, 258, 258]]
    assert sample["instance_id_to_semantic_id"] == {256: 1, 257: 2, 258: 0}
    assert sample["crowd_ids"] == (258,)
    assert (sample["name"], sample["image"].size) == ("a", (3, 2))


def test_labels_are_the_categories_in_the_order_of_their_ids(panoptic):
    labels = open_panoptic(panoptic).labels
    assert labels.id2label == {0: "person", 1: "toothbrush", 2: "tree"}
    assert (labels.thing_ids, labels.category_ids, labels.ignore_index) == ((0, 1), (1, 90, 184), 255)


def test_the_project_of_a_roboflow_export_is_no_class(tmp_path):
    categories = [
        {"id": 0, "name": "ball", "supercategory": "none"},
        {"id": 1, "name": "ball", "supercategory": "ball"},
        {"id": 2, "name": "bat", "supercategory": "ball"},
    ]
    annotations = [{"category_id": 1, "segmentation": SQUARE}]
    dataset = open_instances(write_instances(tmp_path / "a", {"a": ((2, 4), annotations)}, categories))
    assert (dataset.labels.id2label, dataset.labels.category_ids) == ({0: "ball", 1: "bat"}, (1, 2))
    assert dataset[0]["labels"].tolist() == [0]
    annotations[0]["category_id"] = 0
    categories[0]["name"] = categories[1]["supercategory"] = categories[2]["supercategory"] = "sport"
    used = open_instances(write_instances(tmp_path / "b", {"a": ((2, 4), annotations)}, categories))
    assert used.labels.id2label == {0: "sport", 1: "ball", 2: "bat"}


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        ("train/a.png", "a.png"),
        (r"train\a.png", "a.png"),
        (r"sub\a.png", "sub/a.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
    ],
)
def test_images_are_found_under_the_names_that_tools_list(tmp_path, listed, stored):
    """With the folder before them, as Windows writes paths, and in another form of Unicode."""
    json_path = write_instances(tmp_path, {"a": ((2, 4), [{"category_id": 1, "segmentation": SQUARE}])})
    edit(json_path, lambda content: content["images"][0].update(file_name=listed))
    place = tmp_path / "images/train" / stored
    place.parent.mkdir(exist_ok=True)
    (tmp_path / "images/train/a.png").rename(place)
    dataset = open_instances(json_path)
    assert dataset.image_path(0) == place
    assert dataset[0]["name"] == listed.removesuffix(".png").replace("\\", "/")
    place.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images .* names are relative to it"):
        open_instances(json_path)


@pytest.mark.parametrize("name", ["{folder}/{there}", "{backslashes}", "{folder}\\{backslashes}", "{there}"])
def test_no_spelling_of_a_name_leads_out_of_the_folder(tmp_path, name):
    json_path = write_instances(tmp_path / "data", {"a": ((2, 4), [])})
    there = tmp_path / "elsewhere/a.png"
    write_image(there, (2, 4))
    name = name.format(folder="train", there=there, backslashes=str(there).replace("/", "\\"))
    edit(json_path, lambda content: content["images"][0].update(file_name=name))
    with pytest.raises((ValueError, FileNotFoundError), match=r"is not one inside|1 of 1 images"):
        open_instances(json_path)


def test_a_map_of_ids_in_jpeg_is_refused(panoptic):
    path = panoptic.with_suffix("") / "a.png"
    Image.open(path).save(path, "JPEG")
    with pytest.raises(ValueError, match=r"a\.png is a JPEG, which is lossy and changes labels"):
        open_panoptic(panoptic)[0]


def test_objects_that_are_all_crowds_are_found_by_the_check(tmp_path):
    """As tools export them that write iscrowd 1 beside every RLE."""
    crowd = {"category_id": 1, "iscrowd": 1, "segmentation": {"size": [2, 4], "counts": [2, 2, 4]}}
    images = {"a": ((2, 4), [crowd]), "b": ((2, 4), [crowd, crowd])}
    with pytest.raises(ValueError, match=r"All objects with pixels are crowds \(3 with .* Set iscrowd to 0"):
        check_samples(open_instances(write_instances(tmp_path / "all", images)))
    images["b"][1][1] = {**crowd, "iscrowd": 0}
    report = inspect_samples(open_instances(write_instances(tmp_path / "some", images)))
    assert (report.problems, report.num_crowds, report.pixels.tolist()) == ([], 2, [2, 0, 0])
    empty = {**crowd, "segmentation": {"size": [2, 4], "counts": [8]}}
    report = inspect_samples(open_instances(write_instances(tmp_path / "empty", {"a": ((2, 4), [empty])})))
    assert (report.num_crowds, "None of 1 samples has a pixel" in report.problems[0]) == (0, True)


def test_segments_that_are_all_crowds_are_found_by_the_check(tmp_path):
    segments = [{**segment, "iscrowd": 1} for segment in SEGMENTS]
    with pytest.raises(ValueError, match=r"All objects with pixels are crowds \(3 with .* Set iscrowd to 0"):
        check_samples(open_panoptic(write_panoptic(tmp_path / "all", {"a": (IDS, segments)})))
    report = inspect_samples(open_panoptic(write_panoptic(tmp_path / "some", {"a": (IDS, SEGMENTS)})))
    assert (report.problems, report.num_crowds, report.pixels.tolist()) == ([], 1, [0, 1, 2])


@pytest.mark.parametrize("value", ["0", "false", 2, []])
def test_crowds_are_told_by_0_and_1(tmp_path, value):
    annotations = [{"category_id": 1, "segmentation": SQUARE, "iscrowd": value}]
    dataset = open_instances(write_instances(tmp_path / "instances", {"a": ((2, 4), annotations)}))
    with pytest.raises(ValueError, match=r"instances_train\.json, image 7 has the iscrowd .* Give 0 or 1"):
        dataset[0]
    segments = [{"id": 4, "category_id": 1, "iscrowd": value}]
    with pytest.raises(ValueError, match=r"a\.png: segment 4 has the iscrowd .* Give 0 or 1"):
        open_panoptic(write_panoptic(tmp_path / "panoptic", {"a": ([[0, 4]], segments)}))[0]


def test_polygons_of_two_corners_beside_others_cover_nothing(tmp_path):
    annotations = [
        {"category_id": 1, "segmentation": polygons} for polygons in (SQUARE, [*SQUARE, [0, 0, 1, 1], [2, 2]])
    ]
    dataset = open_instances(write_instances(tmp_path / "a", {"a": ((2, 4), annotations)}))
    assert np.array_equal(*dataset[0]["masks"])
    alone = [{"category_id": 1, "segmentation": [[0, 0, 1, 1]]}]
    with pytest.raises(ValueError, match="polygon of 4 numbers"):
        open_instances(write_instances(tmp_path / "b", {"a": ((2, 4), alone)}))[0]


def test_categories_that_do_not_say_so_are_things(tmp_path):
    categories = [{"id": 4, "name": "person"}, {"id": 2, "name": "sky", "isthing": 0}]  # instances have no "isthing"
    labels = open_instances(write_instances(tmp_path, {"a": ((2, 2), [])}, categories)).labels
    assert (labels.id2label, labels.thing_ids) == ({0: "sky", 1: "person"}, (1,))


def test_given_classes_are_matched_by_name(panoptic, tmp_path):
    labels = LabelSet({0: "tree", 1: "person", 2: "toothbrush"}, thing_ids=(1, 2))
    dataset = CocoPanoptic(panoptic, tmp_path / "images/train", labels=labels)
    assert dataset.labels.category_ids == (184, 1, 90)
    assert dataset[0]["instance_id_to_semantic_id"] == {256: 2, 257: 0, 258: 1}


def test_given_classes_that_do_not_say_which_are_things_leave_that_to_the_file(panoptic, tmp_path):
    labels = LabelSet({0: "tree", 1: "person", 2: "toothbrush"})
    assert CocoPanoptic(panoptic, tmp_path / "images/train", labels=labels).labels.thing_ids == (1, 2)


def test_given_classes_of_other_names_are_refused(panoptic, tmp_path):
    labels = LabelSet({0: "tree", 1: "person", 2: "comb"})
    with pytest.raises(ValueError, match=r"only the file has toothbrush and only the classes have comb"):
        CocoPanoptic(panoptic, tmp_path / "images/train", labels=labels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tree", r"panoptic_train\.json has several categories named tree"),
        ("comb", "but only the file has comb\\. Rename"),
    ],
)
def test_a_category_that_is_none_of_the_given_classes_or_one_of_two_is_refused(panoptic, tmp_path, name, message):
    edit(panoptic, lambda content: content["categories"].append({"id": 5, "name": name}))
    labels = LabelSet({0: "tree", 1: "person", 2: "toothbrush"})
    with pytest.raises(ValueError, match=message):
        CocoPanoptic(panoptic, tmp_path / "images/train", labels=labels)


def test_a_sound_data_set_passes_the_check_and_is_counted(panoptic):
    report = inspect_samples(open_panoptic(panoptic))
    assert (report.num_samples, report.problems, report.empty_segments) == (2, [], [])
    assert (report.pixels.tolist(), report.occurrences.tolist()) == ([1, 1, 2], [1, 1, 1])


def test_samples_come_in_the_order_of_the_images_and_travel_to_workers(panoptic):
    dataset = pickle.loads(pickle.dumps(open_panoptic(panoptic)))
    samples = list(DataLoader(dataset, batch_size=None, num_workers=1))
    assert [sample["name"] for sample in samples] == ["a", "b"]


def test_images_of_one_name_in_several_folders_are_told_apart(tmp_path):
    for write, open_file in ((write_panoptic, open_panoptic), (write_instances, open_instances)):
        root = tmp_path / write.__name__
        images = {"a/1": ([[0]], []), "b/1": ([[0]], []), "c": ([[0]], [])}
        if write is write_instances:
            images = dict.fromkeys(images, ((1, 1), []))
        for folder in "ab":
            (root / "annotations/panoptic_train" / folder).mkdir(parents=True)
        assert [sample["name"] for sample in open_file(write(root, images))] == ["a/1", "b/1", "c"]


def test_samples_are_counted_from_the_end_too(panoptic, tmp_path):
    annotations = [{"category_id": 1, "segmentation": SQUARE}]
    instances = write_instances(tmp_path / "instances", {"a": ((2, 4), []), "b": ((2, 4), annotations)})
    for dataset in (open_panoptic(panoptic), open_instances(instances)):
        last, expected = dataset[-1], dataset[1]
        assert last["name"] == expected["name"] == "b"
        for field in ("segmentation_map", "masks"):
            assert np.array_equal(last.get(field), expected.get(field))
        for index in (2, -3):
            with pytest.raises(IndexError):
                dataset[index]


def test_masks_come_from_polygons_and_both_kinds_of_run_lengths(tmp_path):
    mask = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
    annotations = [
        {"category_id": 90, "iscrowd": 0, "segmentation": SQUARE},
        {"category_id": 1, "iscrowd": 1, "segmentation": {"size": [3, 4], "counts": [3, 2, 1, 2, 4]}},
        {"category_id": 1, "segmentation": {"size": [3, 4], "counts": encode_rle(mask)}},
    ]
    dataset = open_instances(write_instances(tmp_path, {"a": ((3, 4), annotations), "empty": ((2, 2), [])}))
    sample, empty = dataset
    assert (sample["masks"] == mask).all()
    assert (sample["labels"].tolist(), sample["iscrowd"].tolist()) == ([1, 0, 0], [False, True, False])
    assert (empty["masks"].shape, empty["labels"].shape) == ((0, 2, 2), (0,))
    check_samples(dataset)


def test_annotations_before_the_images_and_in_any_order_find_theirs(tmp_path):
    json_path = write_instances(
        tmp_path,
        {
            "a": ((3, 4), [{"category_id": 1, "segmentation": SQUARE}] * 2),
            "b": ((3, 4), [{"category_id": 90, "segmentation": SQUARE}]),
        },
    )
    content = json.loads(json_path.read_text())
    write_json(json_path, {"annotations": content["annotations"][::-1], **content})
    assert [sample["labels"].tolist() for sample in open_instances(json_path)] == [[0, 0], [1]]


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_json_file_is_walked_in_pieces_of_any_size(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(json_file, "CHUNK", chunk)
    content = {"info": {"nested": [1, {"Käse": "ü"}]}, "images": [{"id": 12345, "name": "größe"}, 7, []], "empty": []}
    content["year"] = 2017  # a number shows only by what follows where it ends
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
    members = list(stream_json(path, ("images", "empty")))
    assert [(key, value) for key, value, _ in members] == [
        ("info", content["info"]),
        *(("images", value) for value in content["images"]),
        ("year", 2017),
    ]
    assert read_entries(path, [span for _, _, span in members]) == [value for _, value, _ in members]


@pytest.mark.parametrize("chunk", range(1, 25))
def test_numbers_are_read_whole_wherever_a_piece_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_file, "CHUNK", chunk)
    path = tmp_path / "file.json"
    path.write_text('{"a": 1.5e-3, "b": 2E+10, "c": -7, "d": 0.25, "e": [1e5, 3.0]}')
    members = [(key, value) for key, value, _ in stream_json(path, ("e",))]
    assert members == [("a", 1.5e-3), ("b", 2e10), ("c", -7), ("d", 0.25), ("e", 1e5), ("e", 3.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "byte 0 is the end of the file"),
        ("[]", r"byte 0 should be '\{'"),
        ('{"images": [{"id": 1}', "byte 21 is the end of the file"),
        ('{"images": [{"id": ', r"byte 12 is not a complete JSON value"),
        ('{"images": {"id": 1}}', r"byte 11 should be '\['"),
        ('{"images": [] "x": 1}', "byte 14 should be ','"),
        ('{"x": ' + "[" * 100_000, "byte 6 is (nested too deeply|not a complete JSON value)"),
    ],
)
def test_a_damaged_json_file_is_named_with_the_place(tmp_path, text, message):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=rf"file\.json: {message}"):
        list(stream_json(tmp_path / "file.json", ("images",)))


def test_text_in_another_encoding_is_named_with_the_place(tmp_path):
    (tmp_path / "file.json").write_bytes(b'{"images": [{"file_name": "Stra\xdfe.jpg"}]}')
    with pytest.raises(ValueError, match=r"file\.json: byte 12 begins a value that is not UTF-8"):
        list(stream_json(tmp_path / "file.json", ("images",)))


def test_a_file_that_changed_after_opening_is_named(panoptic):
    dataset = open_panoptic(panoptic)
    panoptic.write_text(" " * 50 + panoptic.read_text())
    with pytest.raises(ValueError, match=r"panoptic_train\.json has changed since it was opened"):
        dataset[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(c["images"][0]), "lists the image 7 twice"),
        (lambda c: c["images"].append({"file_name": "x"}), "an image has the id None"),
        (lambda c: c["images"].append("a.png"), "an image is a.png, not an object"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c["images"][0].update(file_name="../a.png"), r"has the file name '\.\./a\.png', which is not one"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "has the file name '/etc/passwd', which is not one"),
        (lambda c: c["images"][0].update(file_name=5), "has the file name 5, which is not one"),
        (lambda c: c["annotations"][0].update(file_name=None), "lists PNGs without a file_name. Give each of them"),
        (lambda c: c["images"][1].pop("file_name"), "lists images without a file_name. Give each of them"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotations of image 99, which its images do not list"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"an annotation has the image_id \[1\]"),
        (lambda c: c["annotations"].pop(), "1 of 2 images do not have exactly one panoptic annotation; image 7 has 0"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "1 of 2 images .*; image 8 has 2"),
        (lambda c: c["annotations"][0].update(segments_info={}), "segments_info of image 8 is not a list"),
        (
            lambda c: c["annotations"][0]["segments_info"][0].update(category_id=3),
            "a segment of image 8 has the category_id 3, which its categories do not list",
        ),
        (lambda c: c.update(categories=[]), "has no list of categories"),
        (lambda c: c["categories"].append(c["categories"][0]), "lists 4 categories with only 3 ids"),
        (lambda c: c["categories"].append({"id": "x", "name": "y"}), "has categories whose ids are not integers"),
        (lambda c: c["categories"].append({"id": 5, "name": "tree"}), "id2label names several classes tree"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_when_opened(panoptic, change, message):
    edit(panoptic, change)
    with pytest.raises(ValueError, match=message):
        open_panoptic(panoptic)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        CocoInstances(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(("kind", "folder"), [("images", "images/train"), ("PNGs", "annotations/panoptic_train")])
def test_missing_images_and_maps_are_counted_and_named(panoptic, tmp_path, kind, folder):
    (tmp_path / folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 {kind} that .* lists are not in .*{folder}: b\.png"):
        open_panoptic(panoptic)


def test_an_id_that_is_not_listed_is_named(panoptic, tmp_path):
    encode_ids([[0, 77]]).save(tmp_path / "annotations/panoptic_train/b.png")
    with pytest.raises(ValueError, match=r"panoptic_train/b\.png contains the ids 77, which its segments_info does"):
        open_panoptic(panoptic)[1]


def test_an_id_that_is_listed_twice_is_named(tmp_path):
    json_path = write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}, {"id": 4, "category_id": 90}])})
    with pytest.raises(ValueError, match=r"a\.png: segments_info lists the id 4 twice"):
        open_panoptic(json_path)[0]


def test_a_map_of_another_size_than_its_image_is_named(panoptic, tmp_path):
    write_image(tmp_path / "images/train/b.png", (3, 3))
    with pytest.raises(ValueError, match=r"panoptic_train/b\.png is 1 x 2 .*images/train/b\.png is 3 x 3"):
        check_samples(open_panoptic(panoptic))


def test_a_segment_without_a_pixel_is_reported_but_no_problem(tmp_path):
    segments = [{"id": 4, "category_id": 1}, {"id": 5, "category_id": 90}]
    report = inspect_samples(open_panoptic(write_panoptic(tmp_path, {"a": ([[4]], segments)})))
    assert report.problems == []
    assert len(report.empty_segments) == 1
    assert "a.png has no pixel of segments 1 in its list, counted from 0" in report.empty_segments[0]


def test_a_data_set_without_any_object_is_a_problem_and_no_single_sample_of_it(tmp_path):
    rectangle = {"category_id": 1, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}
    sizes = {"a": ((3, 4), []), "b": ((3, 4), [])}
    write_instances(tmp_path, sizes)
    with pytest.raises(ValueError, match="None of 2 samples has a pixel of any class"):
        check_samples(open_dataset(str(tmp_path), "train"))
    write_instances(tmp_path, sizes | {"b": ((3, 4), [rectangle])})
    check_samples(open_dataset(str(tmp_path), "train"))


def test_void_beside_segments_hides_no_class(tmp_path):
    segments = [{"id": 4, "category_id": 1}]
    path = write_panoptic(tmp_path, {"a": ([[4, 0]], segments)}, categories=CATEGORIES[:2])
    assert inspect_samples(open_panoptic(path)).problems == []


def test_an_object_without_a_mask_is_named_with_what_to_do(tmp_path):
    write_instances(tmp_path, {"a": ((3, 4), [{"category_id": 1, "segmentation": []}])})
    with pytest.raises(ValueError, match=r"annotation 100 of image 7 has no polygon\. Draw its mask, or remove"):
        open_dataset(str(tmp_path), "train")[0]


def test_areas_of_the_file_say_how_large_objects_are(tmp_path):
    pytest.importorskip("faster_coco_eval")
    entry = {"category_id": 1, "segmentation": SQUARE}
    images = {
        "all": ((3, 4), [entry | {"area": 2000.5}, entry | {"area": 3}]),
        "some": ((3, 4), [entry | {"area": 2000.5}, entry]),
    }
    dataset = open_instances(write_instances(tmp_path, images))
    assert dataset[0]["area"].tolist() == [2000.5, 3]
    assert "area" not in dataset[1]
    metric = AveragePrecision(dataset.labels.num_labels)
    reference = reference_of(dataset[0], dataset.labels, "instance")
    metric.add_batch(predictions=[{**reference, "scores": [0.9, 0.8]}], references=[reference])
    figures = metric.compute()
    assert not np.isnan([figures["ap_small"], figures["ap_medium"]]).any()  # although both masks have 4 pixels
    assert "area" not in drop_empty_masks(dataset[0])


@pytest.mark.parametrize("areas", [[4.0], [4.0, np.nan], [4.0, -1.0]])
def test_areas_that_do_not_fit_are_found_in_any_data_set(tmp_path, areas, monkeypatch):
    entry = {"category_id": 1, "segmentation": SQUARE, "area": 4}
    dataset = open_instances(write_instances(tmp_path, {"a": ((3, 4), [entry, entry])}))
    sample = {**dataset[0], "area": np.array(areas)}
    monkeypatch.setattr(CocoInstances, "__getitem__", lambda self, index: sample)
    with pytest.raises(ValueError, match=r"for 2 masks\. Give one pixel count each"):
        check_samples(dataset)


@pytest.mark.parametrize("area", ["4", -1, float("inf")])
def test_an_area_that_is_none_is_named(area, tmp_path):
    json_path = write_instances(tmp_path, {"a": ((3, 4), [{"category_id": 1, "segmentation": SQUARE, "area": area}])})
    with pytest.raises(ValueError, match=r"instances_train\.json, image 7: object 0 has the area"):
        open_instances(json_path)[0]


def test_a_mask_that_does_not_fit_is_named_with_its_annotation(tmp_path):
    rle = {"size": [3, 4], "counts": [5, 50]}
    json_path = write_instances(tmp_path, {"a": ((3, 4), [{"category_id": 1, "segmentation": rle}])})
    with pytest.raises(ValueError, match=r"instances_train\.json: annotation 100 of image 7 has a run of 50 pixels"):
        open_instances(json_path)[0]


def test_an_image_of_another_size_than_its_entry_is_named(tmp_path):
    json_path = write_instances(tmp_path, {"a": ((3, 4), [])})
    write_image(tmp_path / "images/train/a.png", (5, 5))
    with pytest.raises(ValueError, match=r"instances_train\.json, image 7 is 3 x 4 .*a\.png is 5 x 5"):
        open_instances(json_path)[0]


def test_an_entry_without_size_is_named(tmp_path):
    json_path = write_instances(tmp_path, {"a": ((3, 4), [])})
    edit(json_path, lambda content: content["images"][0].pop("height"))
    with pytest.raises(ValueError, match=r"image 7 has height and width \(None, 4\)"):
        open_instances(json_path)[0]


def test_many_categories_leave_room_for_the_ignored_value(tmp_path):
    categories = [{"id": number, "name": f"class {number}"} for number in range(300)]
    json_path = write_panoptic(tmp_path, {"a": ([[0, 4]], [{"id": 4, "category_id": 299}])}, categories)
    dataset = open_panoptic(json_path)
    assert dataset.labels.ignore_index == 65535
    assert dataset[0]["segmentation_map"].tolist() == [[65535, 256]]
    check_samples(dataset)


MEMORY = """
    import pickle, resource, sys
    from hf_maskformer.data.coco import CocoInstances, CocoPanoptic

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    folder = sys.argv[1]
    before = peak()
    for name, reader in (("panoptic", CocoPanoptic), ("instances", CocoInstances)):
        dataset = reader(f"{folder}/{name}.json", folder)
        assert len(dataset) == 100_000
        print((peak() - before) / len(dataset), len(pickle.dumps(dataset)) / len(dataset))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read in the Unix way")
def test_opening_large_files_takes_a_bounded_few_bytes_per_image(tmp_path):
    write_image(tmp_path / "a.png", (2, 2))
    (tmp_path / "panoptic").symlink_to(tmp_path)
    image = {"file_name": "a.png", "height": 2, "width": 2, "url": "x" * 100}
    segments = [{"id": 4, "category_id": 1, "area": 4, "bbox": [0, 0, 2, 2]}] * 8
    annotations = {
        "panoptic": {"file_name": "a.png", "segments_info": segments},
        "instances": {"category_id": 1, "segmentation": SQUARE * 8},
    }
    for name, annotation in annotations.items():
        lists = {
            "images": [{"id": number, **image} for number in range(100_000)],
            "annotations": [{"image_id": number, **annotation} for number in range(100_000)],
        }
        write_json(tmp_path / f"{name}.json", {**lists, "categories": CATEGORIES})
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    for line in done.stdout.splitlines():
        peak, held = map(float, line.split())
        # The entries take 500 bytes of text each and thousands as Python objects; kept are five 64-bit numbers.
        assert held < 50
        # While a file is opened, the ids are held as objects, and a window of a few MiB of it.
        assert peak < 700


@needs_real_data
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_panoptic_annotations_have_the_areas_that_they_state(split):
    root = REAL_DATA / "coco_panoptic"
    dataset = CocoPanoptic(root / f"annotations/panoptic_{split}.json", root / "images" / split)
    content = json.loads((root / f"annotations/panoptic_{split}.json").read_text())
    segments_of = {annotation["image_id"]: annotation["segments_info"] for annotation in content["annotations"]}
    assert dataset.labels.num_labels == 133
    for sample, entry in zip(dataset, content["images"], strict=True):
        areas = np.bincount(sample["segmentation_map"].ravel())[256:]
        segments = segments_of[entry["id"]]
        assert areas.tolist() == [segment["area"] for segment in segments]
        assert len(sample["crowd_ids"]) == sum(segment["iscrowd"] for segment in segments)


@needs_real_data
@pytest.mark.parametrize(
    ("name", "split"), [("coco_panoptic", "train"), ("coco_panoptic", "val"), ("nuts_instance", "val")]
)
def test_real_instances_have_the_masks_of_cocos_tools(name, split):
    coco = pytest.importorskip("pycocotools.coco")
    root = REAL_DATA / name
    dataset = CocoInstances(root / f"annotations/instances_{split}.json", root / "images" / split)
    reference = coco.COCO(dataset.label_source)
    for index, sample in enumerate(dataset):
        annotations = reference.imgToAnns[dataset._file.image(index)["id"]]
        assert (sample["masks"] == [reference.annToMask(annotation) for annotation in annotations]).all()


@needs_real_data
@pytest.mark.parametrize(("reader", "name"), [(CocoPanoptic, "coco_panoptic"), (CocoInstances, "nuts_instance")])
def test_real_annotations_make_batches_that_a_model_trains_on(reader, name):
    kind = "panoptic" if reader is CocoPanoptic else "instances"
    dataset = reader(REAL_DATA / name / f"annotations/{kind}_train.json", REAL_DATA / name / "images/train")
    augmentation = RandomScaleCropFlip.from_scales(96, 0.5, 1.5)
    processor = MaskFormerImageProcessor(do_resize=False, ignore_index=255, num_labels=dataset.labels.num_labels)
    augmented = AugmentedDataset(dataset, augmentation)
    batch = MaskFormerDataCollator(processor)([augmented[0], augmented[1]])
    model = MaskFormerForInstanceSegmentation(tiny_config(id2label=dataset.labels.id2label))
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()


def test_a_file_without_annotations_says_so(tmp_path):
    json_path = write_panoptic(tmp_path, {"a": (IDS, SEGMENTS)})
    edit(json_path, lambda content: content.pop("annotations"))
    with pytest.raises(ValueError, match="1 of 1 images do not have exactly one panoptic annotation; image 7 has 0"):
        open_panoptic(json_path)
    assert CocoFile(json_path, tmp_path / "images/train").annotations(0) == []


def test_zero_is_a_segment_where_it_is_listed(tmp_path):
    segments = [{"id": 0, "category_id": 1}, {"id": 4, "category_id": 90}]
    sample = open_panoptic(write_panoptic(tmp_path, {"a": ([[0, 4]], segments)}))[0]
    assert sample["segmentation_map"].tolist() == [[256, 257]]
    assert sample["instance_id_to_semantic_id"] == {256: 0, 257: 1}


def test_an_area_may_be_zero(tmp_path):
    annotation = {"category_id": 1, "segmentation": SQUARE, "area": 0}
    assert open_instances(write_instances(tmp_path, {"a": ((3, 4), [annotation])}))[0]["area"].tolist() == [0.0]


def test_annotations_of_an_image_keep_the_order_of_the_file(tmp_path):
    objects = [{"category_id": 1, "segmentation": SQUARE, "area": number} for number in range(50)]
    json_path = write_instances(tmp_path, {"a": ((3, 4), objects), "b": ((3, 4), objects)})
    edit(json_path, lambda content: content["annotations"].sort(key=lambda annotation: annotation["area"]))
    assert [sample["area"].tolist() for sample in open_instances(json_path)] == [list(range(50))] * 2


def test_given_classes_say_what_is_ignored(tmp_path):
    json_path = write_panoptic(tmp_path, {"a": ([[0, 4]], [{"id": 4, "category_id": 1}])})
    labels = LabelSet({0: "tree", 1: "person", 2: "toothbrush"}, ignore_index=99)
    dataset = CocoPanoptic(json_path, tmp_path / "images/train", labels=labels)
    assert dataset.labels.ignore_index == 99
    assert dataset[0]["segmentation_map"].tolist() == [[99, 256]]


@pytest.mark.parametrize("ignore_index", [-1, 255, 256, 257, 258, 259, 65535])
def test_no_segment_is_lost_to_the_ignored_value(tmp_path, ignore_index):
    segments = [{"id": number, "category_id": number} for number in (1, 2, 3)]
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    json_path = write_panoptic(tmp_path, {"a": ([[0, 1], [2, 3]], segments)}, categories)
    labels = LabelSet({label: f"class {label + 1}" for label in range(3)}, ignore_index=ignore_index)
    dataset = CocoPanoptic(json_path, tmp_path / "images/train", labels=labels)
    check_samples(dataset)
    processor = MaskFormerImageProcessor(ignore_index=ignore_index, do_resize=False)
    assert MaskFormerDataCollator(processor)([dataset[0]])["class_labels"].tolist() == [[0, 1, 2]]
    reference = reference_of(dataset[0], dataset.labels, "panoptic")
    assert reference["segmentation"].tolist() == [[0, 1], [2, 3]]
    assert [entry["label_id"] for entry in reference["segments_info"]] == [0, 1, 2]


def test_the_maps_may_lie_elsewhere(tmp_path):
    json_path = write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}])})
    json_path.with_suffix("").rename(tmp_path / "maps")
    dataset = CocoPanoptic(json_path, tmp_path / "images/train", tmp_path / "maps")
    assert dataset[0]["segmentation_map"].tolist() == [[256]]


@pytest.mark.parametrize(("count", "ignore_index"), [(255, 255), (256, 65535)])
def test_the_ignored_value_is_none_of_the_categories(tmp_path, count, ignore_index):
    categories = [{"id": number, "name": f"class {number}"} for number in range(count)]
    json_path = write_instances(tmp_path, {"a": ((2, 2), [])}, categories)
    assert open_instances(json_path).labels.ignore_index == ignore_index


def test_objects_of_which_some_do_not_say_whether_they_are_crowds_are_found(tmp_path, monkeypatch):
    entry = {"category_id": 1, "segmentation": SQUARE}
    dataset = open_instances(write_instances(tmp_path, {"a": ((3, 4), [entry, entry])}))
    sample = {**dataset[0], "iscrowd": np.array([True])}
    monkeypatch.setattr(CocoInstances, "__getitem__", lambda self, index: sample)
    with pytest.raises(ValueError, match="has 2 masks, 2 labels and 1 values of iscrowd"):
        check_samples(dataset)


def test_what_given_classes_say_of_things_outweighs_the_file(panoptic, tmp_path):
    labels = LabelSet({0: "tree", 1: "person", 2: "toothbrush"}, thing_ids=(1,))
    assert CocoPanoptic(panoptic, tmp_path / "images/train", labels=labels).labels.thing_ids == (1,)


def test_a_truth_value_is_no_id(tmp_path):
    path = write_instances(tmp_path, {"a": ((4, 4), [{"category_id": True, "segmentation": SQUARE}])})
    with pytest.raises(ValueError, match="a segment has the category_id True"):
        open_instances(path)
