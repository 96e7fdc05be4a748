"""The data sets in the folders of their downloads, and how they are recognised on a command line."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import scipy.io
from coco_files import CATEGORIES, write_image, write_instances, write_json, write_panoptic
from PIL import Image
from real_data import REAL_DATA, needs_real_data

from hf_maskformer.data import layouts
from hf_maskformer.data.check import check_samples
from hf_maskformer.data.coco import CocoInstances, CocoPanoptic
from hf_maskformer.data.folder import PackedStrings, SegmentationFolder
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.data.parquet import write_parquet

LABELS = np.array([[0, 1, 255], [1, 0, 0]], dtype=np.uint8)


def write_map(path, labels=LABELS):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


@pytest.fixture
def label_names(tmp_path, monkeypatch):
    """Names of two classes for each data set, in place of the real ones."""
    folder = tmp_path / "label_names"
    folder.mkdir()
    for name in ("ade20k", "cityscapes"):
        (folder / f"{name}.json").write_text(json.dumps({"id2label": {"0": "wall", "1": "road"}}))
    names = {str(label): f"class {label}" for label in range(171)}
    (folder / "coco_stuff_10k.json").write_text(json.dumps({"id2label": names}))
    monkeypatch.setattr(layouts, "LABEL_NAMES", folder)


def test_ade20k_counts_its_labels_from_one(tmp_path, label_names):
    root = tmp_path / "ADEChallengeData2016"
    write_image(root / "images/training/ADE_train_1.jpg", (2, 3))
    write_map(root / "annotations/training/ADE_train_1.png", np.array([[0, 1, 2], [2, 2, 2]], dtype=np.uint8))
    dataset = open_dataset(str(root), "train")
    assert dataset.labels == LabelSet({0: "wall", 1: "road"}, do_reduce_labels=True)
    assert dataset[0]["name"] == "ADE_train_1"
    assert dataset[0]["segmentation_map"].tolist() == [[0, 1, 2], [2, 2, 2]]
    check_samples(dataset)


def test_annotations_of_cocos_form_under_another_name_are_answered_by_the_names(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has JSON files and no .* annotations/instances_SPLIT.json"):
        open_dataset(str(tmp_path), "train")
    (tmp_path / "annotations" / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images does not exist"):
        open_dataset(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "count"), [("ade20k", 150), ("ade20k_full", 847), ("cityscapes", 19), ("coco_stuff_10k", 171)]
)
def test_the_names_of_well_known_classes_come_along(name, count):
    assert layouts.named_labels(name).num_labels == count


def write_ade20k_full(root, ids, split="training", name="ADE_train_1"):
    """Writes one image whose map numbers objects by red and green, beside files that are neither."""
    ids = np.array(ids)
    blue = np.full_like(ids, 7)
    colors = np.stack([ids // 256 * 10, ids % 256, blue], axis=-1).astype(np.uint8)
    folder = root / f"images/ADE/{split}/urban/street"
    write_image(folder / f"{name}.jpg", ids.shape)
    Image.fromarray(colors).save(folder / f"{name}_seg.png")
    Image.fromarray(colors).save(folder / f"{name}_parts_1.png")
    write_map(folder / name / f"instance_000_{name}.png")
    (folder / f"{name}.json").write_text("{}")


def test_ade20k_full_numbers_objects_of_which_some_are_classes(tmp_path):
    root = tmp_path / "ADE20K_2021_17_01"
    write_ade20k_full(root, [[0, 2978, 312], [14, 3148, 3500]])
    write_ade20k_full(root, [[2420]], "validation", "ADE_val_1")
    dataset = open_dataset(str(root), "train")
    assert [sample["name"] for sample in dataset] == ["ADE_train_1"]
    # Nothing, wall, building; airplane, adding machine, and an object that is no class.
    assert dataset[0]["segmentation_map"].tolist() == [[65535, 0, 1], [94, 846, 65535]]
    assert [dataset.labels.id2label[label] for label in (0, 1, 94, 846)] == [
        "wall",
        "building",
        "airplane",
        "adding machine",
    ]
    assert open_dataset(str(root), "val")[0]["segmentation_map"].tolist() == [[2]]
    check_samples(dataset)
    write_parquet(dataset, tmp_path / "parquet", "train")
    again = open_dataset(str(tmp_path / "parquet"), "train")
    assert again.labels == dataset.labels
    assert again[0]["segmentation_map"].tolist() == dataset[0]["segmentation_map"].tolist()


def test_the_classes_of_ade20k_s_150_are_among_its_847():
    full, parsing = layouts.named_labels("ade20k_full"), layouts.named_labels("ade20k")
    assert set(parsing.id2label.values()) <= set(full.id2label.values())
    assert full.ignore_index == 65535


def test_the_objects_of_ade20k_full_are_numbered_by_the_alphabet():
    full = layouts.named_labels("ade20k_full")
    # Where two objects have one name, another of its synonyms stands for one of them.
    others = {"flowerpot", "handbag", "terrace", "traveling bag", "tube", "wharf"}
    names = [full.id2label[label] for label in np.argsort(full.category_ids).tolist()]
    # The last 20 came when the alphabet was full.
    initials = [name[0] for name in names[:-20] if name not in others]
    assert initials == sorted(initials)


@pytest.mark.parametrize(
    ("label", "name", "number"),
    [(11, "person", 1831), (99, "aircraft carrier", 3144), (188, "pot", 1974), (244, "roof", 2155),
     (300, "altar", 3108), (358, "alga", 3156), (412, "tube", 1885), (500, "cat", 430), (574, "spectacles", 2490),
     (663, "grill", 1138), (729, "cellular telephone", 457), (803, "videocassette recorder", 3145)],
)  # fmt: skip
def test_some_classes_of_ade20k_full(label, name, number):
    full = layouts.named_labels("ade20k_full")
    assert (full.id2label[label], full.category_ids[label]) == (name, number)


def test_classes_of_ade20k_full_need_the_numbers_of_their_objects(tmp_path):
    write_ade20k_full(tmp_path, [[2978, 312]])
    classes = LabelSet({0: "sky", 1: "building"}, category_ids=(2420, 312))
    assert layouts.Ade20kFull(tmp_path, "train", classes)[0]["segmentation_map"].tolist() == [[255, 1]]
    for category_ids in ((), (0, 312), (312, 6656)):
        with pytest.raises(ValueError, match=r"Give classes\.json category_ids.* 1 to 6655"):
            layouts.Ade20kFull(tmp_path, "train", replace(classes, category_ids=category_ids))


def test_ade20k_full_without_its_folders_of_scenes_says_what_was_found(tmp_path):
    write_ade20k_full(tmp_path, [[2978]])
    folder = tmp_path / "images/ADE/training"
    (folder / "urban/street/ADE_train_1_seg.png").rename(folder / "ADE_train_1_seg.png")
    with pytest.raises(FileNotFoundError, match=r"images/ADE/training holds no \*/\*/\*_seg \(\.png\)\. docs/data\.md"):
        layouts.Ade20kFull(tmp_path, "train")


@pytest.mark.parametrize("mode", ["L", "LA", "P"])
def test_maps_of_ade20k_full_are_in_colour(tmp_path, mode):
    write_ade20k_full(tmp_path, [[2978]])
    path = tmp_path / "images/ADE/training/urban/street/ADE_train_1_seg.png"
    Image.open(path).convert(mode).save(path)
    with pytest.raises(ValueError, match=rf"ADE_train_1_seg\.png has mode {mode}, but"):
        layouts.Ade20kFull(tmp_path, "train")[0]


def test_a_folder_of_ones_own_may_call_its_splits_as_ade20k_does(tmp_path):
    write_image(tmp_path / "images/training/a.jpg", (2, 3))
    write_map(tmp_path / "annotations/training/a.png")
    LabelSet({0: "sky", 1: "road"}).to_json(tmp_path / "classes.json")
    assert open_dataset(str(tmp_path), "training").labels.id2label == {0: "sky", 1: "road"}


def write_cityscapes(root, ending="labelTrainIds"):
    for city in ("ulm", "jena"):
        write_image(root / f"leftImg8bit/train/{city}/{city}_0_leftImg8bit.png", (2, 3))
        write_map(root / f"gtFine/train/{city}/{city}_0_gtFine_{ending}.png")
        write_map(root / f"gtFine/train/{city}/{city}_0_gtFine_instanceIds.png")


def test_cityscapes_pairs_images_and_maps_over_all_cities(tmp_path, label_names):
    write_cityscapes(tmp_path / "cityscapes")
    dataset = open_dataset(str(tmp_path / "cityscapes"), "train")
    assert [sample["name"] for sample in dataset] == ["jena_0", "ulm_0"]
    assert dataset[1]["segmentation_map"].tolist() == LABELS.tolist()
    check_samples(dataset)


def test_cityscapes_without_train_ids_says_how_to_make_them(tmp_path, label_names):
    write_cityscapes(tmp_path, ending="labelIds")
    with pytest.raises(
        FileNotFoundError, match=r"holds no \*/\*_gtFine_labelTrainIds \(.*\)\. Make them .* cityscapesscripts"
    ):
        layouts.cityscapes(tmp_path, "train")


def test_a_missing_map_of_one_city_is_not_looked_for_in_another(tmp_path, label_names):
    write_cityscapes(tmp_path)
    write_image(tmp_path / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png", (2, 3))
    with pytest.raises(
        ValueError, match=r"\S*leftImg8bit/train have .* in \S*gtFine/train: ulm/ulm_1_leftImg8bit\.png"
    ):
        layouts.cityscapes(tmp_path, "train")


def write_panoptic_cityscapes(root, ending=""):
    json_path = write_panoptic(root, {"ulm_0_1": ([[4, 0]], [{"id": 4, "category_id": 90}])})
    content = json.loads(json_path.read_text())
    content["images"][0]["file_name"] = "ulm_0_1_gtFine_leftImg8bit.png"
    (root / "gtFine").mkdir(exist_ok=True)
    write_json(root / f"gtFine/cityscapes_panoptic_train{ending}.json", content)
    (root / "annotations/panoptic_train").rename(root / f"gtFine/cityscapes_panoptic_train{ending}")
    (root / "leftImg8bit/train/ulm").mkdir(parents=True, exist_ok=True)
    (root / "images/train/ulm_0_1.png").rename(root / "leftImg8bit/train/ulm/ulm_0_1_leftImg8bit.png")
    json_path.unlink()


@pytest.mark.parametrize("ending", ["", "_trainId"])
def test_panoptic_cityscapes_finds_its_images_in_the_folders_of_their_cities(tmp_path, ending):
    write_panoptic_cityscapes(tmp_path, ending)
    dataset = open_dataset(str(tmp_path), "train", format="cityscapes-panoptic")
    check_samples(dataset)
    assert dataset[0]["name"] == "ulm_0_1_leftImg8bit"
    assert dataset[0]["segmentation_map"].tolist() == [[256, 255]]
    assert dataset.labels.id2label[dataset[0]["instance_id_to_semantic_id"][256]] == "toothbrush"


def test_cityscapes_with_both_kinds_of_annotations_asks_which(tmp_path):
    write_panoptic_cityscapes(tmp_path)
    with pytest.raises(ValueError, match=r"can be read as cityscapes or cityscapes-panoptic\. Choose one with format"):
        open_dataset(str(tmp_path), "train")


def test_panoptic_cityscapes_without_its_json_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cityscapes_panoptic_val\.json does not exist\. .*createPanopticImgs"):
        layouts.cityscapes_panoptic(tmp_path, "val")


def write_coco_stuff(root, ids):
    for name, split in (("a", "train"), ("b", "test")):
        write_image(root / f"images/{name}.jpg", np.shape(ids))
        (root / "annotations").mkdir(exist_ok=True)
        scipy.io.savemat(root / f"annotations/{name}.mat", {"S": np.array(ids, dtype=np.uint16), "names": ["x"]})
        (root / "imageLists").mkdir(exist_ok=True)
        (root / f"imageLists/{split}.txt").write_text(f"{name}\n")


def test_coco_stuff_skips_the_ids_that_were_never_annotated(tmp_path, label_names):
    write_coco_stuff(tmp_path / "stuff", [[0, 1, 11, 13, 92, 182]])
    dataset = open_dataset(str(tmp_path / "stuff"), "val")
    assert [sample["name"] for sample in dataset] == ["b"]
    # 12 is unused, as are ten more up to 91.
    assert dataset[0]["segmentation_map"].tolist() == [[255, 0, 10, 11, 80, 170]]
    check_samples(dataset)


def test_pixels_without_a_class_of_coco_stuff_have_the_ignored_value_of_given_classes(tmp_path, label_names):
    write_coco_stuff(tmp_path, [[0, 1, 182]])
    labels = LabelSet({label: f"class {label}" for label in range(171)}, ignore_index=65535)
    dataset = layouts.CocoStuff10k(tmp_path, "train", labels)
    assert dataset[0]["segmentation_map"].tolist() == [[65535, 0, 170]]
    check_samples(dataset)


@pytest.mark.parametrize("unknown", [12, 183, 60000])
def test_an_id_that_coco_stuff_does_not_have_is_named(tmp_path, label_names, unknown):
    write_coco_stuff(tmp_path, [[1, unknown]])
    with pytest.raises(ValueError, match=rf"a\.mat contains the id {unknown}"):
        layouts.CocoStuff10k(tmp_path, "train")[0]


def test_a_damaged_label_file_of_coco_stuff_is_named(tmp_path, label_names):
    write_coco_stuff(tmp_path, [[1]])
    (tmp_path / "annotations/a.mat").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"a\.mat is not a label file of COCO-Stuff"):
        layouts.CocoStuff10k(tmp_path, "train")[0]


def test_the_first_version_of_coco_stuff_is_refused(tmp_path, label_names):
    write_coco_stuff(tmp_path, [[1, 2]])
    path = tmp_path / "annotations/a.mat"
    names = ["unlabeled", *(f"class {number}" for number in range(171))]
    # As it is, and saved again in a format that is read.
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    for write in (lambda: path.write_bytes(header), lambda: scipy.io.savemat(path, {"S": [[1, 2]], "names": names})):
        write()
        with pytest.raises(ValueError, match=r"a\.mat is of version 1\.0 .* Download version 1\.1"):
            layouts.CocoStuff10k(tmp_path, "train")[0]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_a_list_of_no_images_is_named(tmp_path, label_names, content):
    write_coco_stuff(tmp_path, [[1]])
    (tmp_path / "imageLists/train.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"train\.txt"):
        layouts.CocoStuff10k(tmp_path, "train")


def test_an_image_of_a_list_that_is_missing_is_named(tmp_path, label_names):
    write_coco_stuff(tmp_path, [[1]])
    (tmp_path / "imageLists/train.txt").write_text("a\nz\n")
    with pytest.raises(FileNotFoundError, match=r"1 files of .*train\.txt are missing, the first of them z"):
        layouts.CocoStuff10k(tmp_path, "train")


@pytest.mark.parametrize(("config", "version"), [("config.json", ""), ("config_v1.2.json", "v1.2/")])
def test_mapillary_vistas_names_its_classes_itself(tmp_path, config, version):
    names = [{"readable": name} for name in ("Bird", "Road", "Unlabeled")]
    (tmp_path / config).write_text(json.dumps({"labels": names}))
    write_image(tmp_path / "validation/images/a.jpg", (1, 3))
    write_image(tmp_path / "training/images/b.jpg", (1, 3))
    write_map(tmp_path / f"validation/{version}labels/a.png", np.array([[0, 1, 2]], dtype=np.uint8))
    dataset = open_dataset(str(tmp_path), "val")
    assert dataset.labels == LabelSet({0: "Bird", 1: "Road"}, ignore_index=2)
    assert dataset[0]["segmentation_map"].tolist() == [[0, 1, 2]]
    check_samples(dataset)


def write_vistas(root, version):
    write_image(root / "training/images/a.jpg", (1, 3))
    write_map(root / f"training/{version}labels/a.png", np.array([[0, 1, 2]], dtype=np.uint8))


@pytest.mark.parametrize("version", ["", "v1.2/"])
def test_mapillary_vistas_of_given_classes_needs_no_names(tmp_path, version):
    write_vistas(tmp_path, version)
    (tmp_path / "other").mkdir()
    labels = LabelSet({0: "bird", 1: "road"}, ignore_index=2)
    assert layouts.mapillary_vistas(tmp_path, "train", labels)[0]["segmentation_map"].tolist() == [[0, 1, 2]]
    with pytest.raises(FileNotFoundError, match=r"config\S*\.json does not exist"):
        layouts.mapillary_vistas(tmp_path, "train")


@pytest.mark.parametrize("names", [["Bird", None], ["Bird", 3], ["Bird", "Bird"], ["Unlabeled"], []])
def test_names_of_mapillary_vistas_that_are_none_are_refused_with_their_file(tmp_path, names):
    write_vistas(tmp_path, "")
    (tmp_path / "config.json").write_text(json.dumps({"labels": [{"readable": name} for name in names]}))
    with pytest.raises(ValueError, match=r"config\.json has no list .*Download it again"):
        layouts.mapillary_vistas(tmp_path, "train")


def test_sixteen_bit_tiff_maps_as_of_the_whole_of_ade20k_are_read(tmp_path):
    write_image(tmp_path / "images/train/a.jpg", (1, 3))
    write_map(tmp_path / "annotations/train/a.tif", np.array([[0, 846, 65535]], dtype=np.uint16))
    LabelSet({label: f"class {label}" for label in range(847)}, ignore_index=65535).to_json(tmp_path / "classes.json")
    dataset = open_dataset(str(tmp_path), "train")
    assert dataset[0]["segmentation_map"].tolist() == [[0, 846, 65535]]
    check_samples(dataset)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="leftImg8bit/train does not exist"):
        layouts.cityscapes(tmp_path, "train", LabelSet({0: "road"}))


@pytest.mark.parametrize("year", ["", "2017"])
def test_coco_is_recognised_by_its_annotations(tmp_path, year):
    split = f"train{year}"
    segments = [{"id": 4, "category_id": 1}]
    write_panoptic(tmp_path / "panoptic", {"a": ([[4]], segments)}, split=split)
    write_instances(tmp_path / "instances", {"a": ((1, 1), [])}, split=split)
    assert isinstance(open_dataset(str(tmp_path / "panoptic"), "train"), CocoPanoptic)
    assert isinstance(open_dataset(str(tmp_path / "instances"), "train"), CocoInstances)


def test_splits_of_coco_may_share_one_folder_of_images(tmp_path):
    write_instances(tmp_path, {"a": ((1, 1), [])})
    (tmp_path / "images/train/a.png").rename(tmp_path / "images/a.png")
    (tmp_path / "images/train").rmdir()
    assert open_dataset(str(tmp_path), "train")[0]["name"] == "a"


def test_coco_may_have_its_annotations_among_the_images_of_a_split(tmp_path):
    json_path = write_instances(tmp_path, {"a": ((1, 1), [])}, split="valid")
    (tmp_path / "images/valid").rename(tmp_path / "valid")
    json_path.rename(tmp_path / "valid/_annotations.coco.json")
    assert open_dataset(str(tmp_path), "val")[0]["name"] == "a"


def test_coco_with_both_kinds_of_annotations_asks_which(tmp_path):
    write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}])})
    write_instances(tmp_path, {"a": ((1, 1), [])})
    with pytest.raises(ValueError, match=r"can be read as coco-instances or coco-panoptic\. Choose one with format"):
        open_dataset(str(tmp_path), "train")
    assert isinstance(open_dataset(str(tmp_path), "train", format="coco-panoptic"), CocoPanoptic)


def test_panoptic_ade20k_is_read_from_its_own_names(tmp_path):
    json_path = write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}])}, split="training")
    json_path.rename(tmp_path / "ade20k_panoptic_train.json")
    (tmp_path / "annotations/panoptic_training").rename(tmp_path / "ade20k_panoptic_train")
    assert open_dataset(str(tmp_path), "train")[0]["instance_id_to_semantic_id"] == {256: 0}


def test_classes_given_to_coco_order_its_categories(tmp_path):
    write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}])})
    classes = tmp_path / "mine.json"
    LabelSet({label: entry["name"] for label, entry in enumerate(CATEGORIES)}).to_json(classes)
    assert open_dataset(str(tmp_path), "train", classes=str(classes)).labels.category_ids == (184, 1, 90)


def test_a_split_without_annotations_lists_where_they_were_looked_for_and_what_other_splits_there_are(tmp_path):
    write_panoptic(tmp_path, {"a": ([[4]], [{"id": 4, "category_id": 1}])})
    there_is = r"has none of annotations/panoptic_val2017\.json, .*\. It has annotations/panoptic_train\.json\. Choose"
    with pytest.raises(FileNotFoundError, match=there_is):
        open_dataset(str(tmp_path), "val")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"format is 'yolo'; it must be one of folder, .*instance-columns"):
        open_dataset(str(tmp_path), "train", format="yolo")


def test_files_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"Only columns .* can be streamed.*prepare_dataset\.py parquet"):
        open_dataset(str(tmp_path), "train", format="folder", streaming=True)


def test_a_path_that_is_no_folder_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_dataset("nowhere", "train")


def test_file_names_take_a_few_bytes_each(tmp_path):
    names = [f"ADE_train_{number:08}.jpg" for number in range(1000)]
    packed = PackedStrings([*names, "größe.png"])
    assert list(packed) == [*names, "größe.png"]
    assert packed[-1] == "größe.png"
    assert packed._bytes.nbytes + packed._ends.nbytes < 35 * len(packed)
    with pytest.raises(IndexError):
        packed[1001]


@needs_real_data
@pytest.mark.parametrize(("name", "count"), [("camvid_semantic", 40), ("camvid_full", 367)])
def test_real_folders_open(name, count):
    dataset = open_dataset(str(REAL_DATA / name), "train")
    assert isinstance(dataset, SegmentationFolder)
    assert (len(dataset), dataset.labels.num_labels, dataset.labels.ignore_index) == (count, 11, 11)
    assert dataset[0]["segmentation_map"].shape == (360, 480)


@needs_real_data
def test_real_ade20k_maps_hold_its_labels():
    for split in ("train", "val"):
        dataset = open_dataset(str(REAL_DATA / "ade_semantic"), split)
        assert (dataset.labels.num_labels, dataset.labels.do_reduce_labels) == (150, True)
        check_samples(dataset)


def write_ade20k(root):
    write_image(root / "images/training/a.jpg", (2, 3))
    write_map(root / "annotations/training/a.png")


def write_mapillary(root):
    write_image(root / "training/images/a.jpg", (2, 3))
    write_map(root / "training/labels/a.png")
    (root / "config.json").write_text('{"labels": [{"readable": "Bird"}]}')


@pytest.mark.parametrize(
    ("format", "write"),
    [
        ("ade20k", write_ade20k),
        ("ade20k-full", lambda root: write_ade20k_full(root, [[2978]])),
        ("cityscapes", write_cityscapes),
        ("coco-stuff-10k", lambda root: write_coco_stuff(root, [[1]])),
        ("mapillary-vistas", write_mapillary),
    ],
)
def test_classes_of_ones_own_take_the_place_of_any_data_sets(tmp_path, label_names, format, write):
    write(tmp_path / "data")
    own = LabelSet({0: "sky", 1: "ship"}, category_ids=(2978, 312) if format == "ade20k-full" else ())
    classes = tmp_path / "mine.json"
    own.to_json(classes)
    dataset = open_dataset(str(tmp_path / "data"), "train", classes=str(classes), format=format)
    assert (dataset.labels, dataset.label_source) == (own, str(classes))


def test_classes_given_to_panoptic_cityscapes_order_its_categories(tmp_path):
    write_panoptic_cityscapes(tmp_path)
    classes = tmp_path / "mine.json"
    LabelSet({label: entry["name"] for label, entry in enumerate(CATEGORIES)}).to_json(classes)
    dataset = open_dataset(str(tmp_path), "train", classes=str(classes), format="cityscapes-panoptic")
    assert dataset.labels.category_ids == (184, 1, 90)


def test_classes_of_ones_own_take_the_place_of_a_folders(tmp_path):
    write_image(tmp_path / "images/train/a.jpg", (2, 3))
    write_map(tmp_path / "annotations/train/a.png")
    LabelSet({0: "sky", 1: "road"}).to_json(tmp_path / "classes.json")
    LabelSet({0: "road", 1: "sky"}).to_json(tmp_path / "mine.json")
    dataset = open_dataset(str(tmp_path), "train", classes=str(tmp_path / "mine.json"))
    assert dataset.labels.id2label == {0: "road", 1: "sky"}
    assert dataset.label_source == str(tmp_path / "mine.json")


def test_samples_of_a_list_come_in_the_order_of_their_names(tmp_path, label_names):
    write_coco_stuff(tmp_path, [[1]])
    names = [f"{number:02}" for number in range(20)]
    for name in names:
        (tmp_path / f"images/{name}.jpg").write_bytes((tmp_path / "images/a.jpg").read_bytes())
        (tmp_path / f"annotations/{name}.mat").write_bytes((tmp_path / "annotations/a.mat").read_bytes())
    (tmp_path / "imageLists/train.txt").write_text("\n".join(reversed(names)))
    assert open_dataset(str(tmp_path), "train").names == names


def test_columns_of_class_and_instance_are_read_by_the_name_of_their_format(tmp_path):
    label = Image.fromarray(np.stack([LABELS, LABELS, LABELS], axis=-1))
    row = {"image": Image.new("RGB", (3, 2)), "label": label}
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    split = datasets.Dataset.from_list([row], features=features)
    datasets.DatasetDict(train=split).save_to_disk(tmp_path / "data")
    LabelSet({0: "sky", 1: "road"}).to_json(tmp_path / "data/classes.json")
    sample = open_dataset(str(tmp_path / "data"), "train", format="instance-columns")[0]
    assert sample["instance_id_to_semantic_id"] == {256: 0, 257: 1}
