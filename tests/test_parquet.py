"""Parquet versions of data sets, written and read back."""

import json

import datasets
import numpy as np
import pytest
from coco_files import write_instances, write_panoptic
from PIL import Image
from torch.utils.data import Subset

from hf_maskformer.data.coco import CocoInstances, CocoPanoptic
from hf_maskformer.data.generated_scenes import GeneratedScenes, write_generated_scenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.data.parquet import write_parquet

SQUARE = [[1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def assert_equal(found, expected):
    assert found.labels == expected.labels
    found = list(found)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key == "image":
                assert np.array_equal(one[key], other[key])
            elif isinstance(one[key], np.ndarray):
                assert np.array_equal(one[key], other[key])
                assert one[key].dtype.kind == other[key].dtype.kind
            else:
                assert one[key] == other[key]


@pytest.fixture(params=["semantic", "panoptic", "instances"])
def dataset(request, tmp_path):
    root = tmp_path / "source"
    if request.param == "semantic":
        write_generated_scenes(root, num_train=3, num_val=1, image_size=(64, 80))
        return open_dataset(str(root), "train")
    if request.param == "panoptic":
        segments = [{"id": 70000, "category_id": 184}, {"id": 4, "category_id": 1, "iscrowd": 1}]
        images = {"b": ([[4, 70000, 0]], segments), "a": ([[0, 0]], []), "c": ([[4]], segments)}
        return CocoPanoptic(write_panoptic(root, images), root / "images/train")
    annotations = [
        {"category_id": 90, "segmentation": SQUARE, "area": 3.5},
        {"category_id": 1, "segmentation": SQUARE, "iscrowd": 1, "area": 4},
        {"category_id": 1, "segmentation": SQUARE},
    ]
    images = {"b": ((3, 4), annotations[:2]), "a": ((2, 2), []), "c": ((5, 6), annotations[1:])}
    return CocoInstances(write_instances(root, images), root / "images/train")


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_are_read_back_equal(dataset, tmp_path, streaming):
    paths = write_parquet(dataset, tmp_path / "out", "train", samples_per_file=2)
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert not list((tmp_path / "out/data").glob("*.partial"))
    assert_equal(open_dataset(str(tmp_path / "out"), "train", streaming=streaming), dataset)


def test_both_splits_share_a_folder_and_its_classes(dataset, tmp_path):
    write_parquet(dataset, tmp_path / "out", "train")
    write_parquet(dataset, tmp_path / "out", "val")
    for split in ("train", "val"):
        assert_equal(open_dataset(str(tmp_path / "out"), split), dataset)


def test_other_classes_want_another_folder(dataset, tmp_path):
    (tmp_path / "out").mkdir()
    LabelSet({0: "sky"}).to_json(tmp_path / "out/classes.json")
    with pytest.raises(ValueError, match=r"classes\.json holds other classes"):
        write_parquet(dataset, tmp_path / "out", "train")


def test_an_empty_data_set_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="The val split is empty, so there is nothing to write"):
        write_parquet(GeneratedScenes(0, image_size=(64, 64)), tmp_path / "out", "val")
    assert not (tmp_path / "out").exists()


def test_files_of_an_earlier_writing_are_not_read_beside_the_new_ones(dataset, tmp_path):
    write_parquet(dataset, tmp_path / "out", "train", samples_per_file=1)
    write_parquet(dataset, tmp_path / "out", "train", samples_per_file=1)  # in their place
    with pytest.raises(ValueError, match=r"holds files of an earlier train, such as train-00000-of-00003\.parquet"):
        write_parquet(dataset, tmp_path / "out", "train")
    write_parquet(dataset, tmp_path / "out", "val")
    assert len(open_dataset(str(tmp_path / "out"), "train")) == len(dataset)


def test_a_data_set_is_not_written_into_itself(tmp_path):
    root = tmp_path / "source"
    write_generated_scenes(root, num_train=2, num_val=1, image_size=(64, 64))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds annotations, which does not belong to a Parquet data set"):
        write_parquet(open_dataset(str(root), "train"), root, "train")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_classes_that_are_there_already_stay_as_they_are(dataset, tmp_path):
    write_parquet(dataset, tmp_path / "out", "train")
    path = tmp_path / "out" / "classes.json"
    text = json.dumps(json.loads(path.read_text()) | {"palette": [[1, 2, 3]]})
    path.write_text(text)
    write_parquet(dataset, tmp_path / "out", "val")
    assert path.read_text() == text


@pytest.mark.parametrize("damaged", [0, 2])
def test_a_sample_that_cannot_be_read_leaves_no_file(tmp_path, damaged):
    class Damaged(GeneratedScenes):
        def __getitem__(self, index):
            if index == damaged:
                raise ValueError("scene cannot be read")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="scene cannot be read"):
        write_parquet(Damaged(3, image_size=(64, 64)), tmp_path / "out", "val", samples_per_file=2)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_split_that_are_missing_are_told_of(dataset, tmp_path, streaming, caplog):
    paths = write_parquet(dataset, tmp_path / "out", "train", samples_per_file=1)
    open_dataset(str(tmp_path / "out"), "train", streaming=streaming)
    assert not caplog.records
    paths[1].unlink()
    open_dataset(str(tmp_path / "out"), "train", streaming=streaming)
    assert "Only 2 of the 3 files" in caplog.text


def test_a_part_of_a_data_set_is_written(dataset, tmp_path):
    write_parquet(Subset(dataset, [1]), tmp_path / "out", "train")
    (found,) = open_dataset(str(tmp_path / "out"), "train")
    assert found["name"] == dataset[1]["name"]


@pytest.mark.parametrize("split", ["my-split", "fold 1", "../train", "", "all"])
def test_a_split_that_could_not_be_read_is_refused(tmp_path, split):
    with pytest.raises(ValueError, match="use letters, digits and _"):
        write_parquet(GeneratedScenes(1, image_size=(64, 64)), tmp_path / "out", split)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path, streaming):
    write_parquet(GeneratedScenes(1, image_size=(64, 64)), tmp_path / "out[1]", "val")
    with pytest.raises(ValueError, match=r"Rename folders with \["):
        open_dataset(str(tmp_path / "out[1]"), "val", streaming=streaming)


def test_a_data_set_without_files_is_stored_without_loss(tmp_path):
    scenes = GeneratedScenes(2, image_size=(64, 64), task="panoptic")
    write_parquet(scenes, tmp_path / "out", "val")
    for found, expected in zip(open_dataset(str(tmp_path / "out"), "val"), scenes, strict=True):
        assert np.array_equal(found["image"], expected["image"])
        # Segments are renumbered; their labels stay.
        for name in ("found", "expected"):
            sample = {"found": found, "expected": expected}[name]
            table = sample["instance_id_to_semantic_id"]
            sample["classes"] = np.vectorize(table.get)(sample["segmentation_map"])
        assert np.array_equal(found["classes"], expected["classes"])


class OneSample:
    """A data set of one given map."""

    labels = LabelSet({0: "sky"})

    def __init__(self, segmentation_map, **fields):
        self.sample = {"image": Image.new("RGB", (1, 1)), "name": "a", "segmentation_map": segmentation_map, **fields}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


@pytest.mark.parametrize("value", [-1, 2**16])
def test_a_value_that_a_png_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(ValueError, match=rf"a has a map with values from {value} to {value}"):
        write_parquet(OneSample(np.array([[value]])), tmp_path, "train")


@pytest.mark.parametrize("table", [{5: 1}, {5: 1, 0: 2}, {5: 1, 255: 2}])
def test_zero_is_void_where_labels_are_reduced_unless_it_has_a_label(tmp_path, table):
    image = Image.new("RGB", (3, 1))
    sample = OneSample(np.array([[0, 5, 255]]), instance_id_to_semantic_id=table, image=image)
    sample.labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=True)
    write_parquet(sample, tmp_path / "out", "train")
    found = open_dataset(str(tmp_path / "out"), "train")[0]
    labels = [found["instance_id_to_semantic_id"].get(number) for number in found["segmentation_map"].ravel()]
    assert labels == [table.get(0), 1, None]


def test_masks_of_reduced_labels_can_be_opened_again(tmp_path):
    sample = OneSample(None, masks=np.ones((1, 1, 3), bool), labels=np.array([1]), image=Image.new("RGB", (3, 1)))
    sample.labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=True)
    write_parquet(sample, tmp_path / "out", "train")
    assert open_dataset(str(tmp_path / "out"), "train")[0]["labels"].tolist() == [1]


def test_an_id_without_label_is_refused(tmp_path):
    sample = OneSample(np.array([[3]]), instance_id_to_semantic_id={4: 0})
    with pytest.raises(ValueError, match="a contains ids that instance_id_to_semantic_id lacks"):
        write_parquet(sample, tmp_path, "train")
    assert not list(tmp_path.glob("data/*.parquet"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_file_is_named(dataset, tmp_path, streaming):
    paths = write_parquet(dataset, tmp_path / "out", "train", samples_per_file=1)
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{paths[1]} is damaged \(.*(footer|corrupted)"):
        open_dataset(str(tmp_path / "out"), "train", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_upright", [False, True])
def test_turned_photographs_are_read_back_with_maps_on_either_grid(tmp_path, streaming, is_upright):
    labels = np.array([[0, 1, 1], [1, 0, 0]], dtype=np.uint8)
    for kind in ("images", "annotations"):
        (tmp_path / "source" / kind / "train").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for viewing
    photograph = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    photograph.save(tmp_path / "source/images/train/a.png", exif=exif)
    Image.fromarray(labels.T if is_upright else labels).save(tmp_path / "source/annotations/train/a.png")
    (tmp_path / "source/classes.json").write_text('{"id2label": {"0": "sky", "1": "road"}}')
    dataset = open_dataset(str(tmp_path / "source"), "train")
    assert dataset[0]["image"].size == ((2, 3) if is_upright else (3, 2))
    write_parquet(dataset, tmp_path / "out", "train")
    assert_equal(open_dataset(str(tmp_path / "out"), "train", streaming=streaming), dataset)


def test_of_the_splits_of_parquet_files_only_the_one_asked_for_is_prepared(tmp_path):
    root = tmp_path / "a folder"
    for split, count in (("train", 3), ("val", 1)):
        write_parquet(GeneratedScenes(count, image_size=(64, 80)), root, split)
    assert len(open_dataset(str(root), "val")) == 1
    prepared = [path.name for path in (tmp_path / "cache").rglob("*.arrow")]
    assert len(prepared) == 1
    assert "val" in prepared[0]
    with pytest.raises(ValueError, match="Split 'test' of "):
        open_dataset(str(root), "test")


own_cache = own_cache


@pytest.mark.parametrize("highest", [255, 256, 65535])
def test_a_map_keeps_its_highest_value(tmp_path, highest):
    class Maps:
        labels = LabelSet({label: f"class {label}" for label in range(300)}, ignore_index=65535)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            segmentation_map = np.array([[0, highest]], dtype=np.int32)
            return {"image": Image.new("RGB", (2, 1)), "segmentation_map": segmentation_map, "name": "high"}

    write_parquet(Maps(), tmp_path, "train")
    assert open_dataset(str(tmp_path), "train")[0]["segmentation_map"].tolist() == [[0, highest]]


def test_photographs_are_stored_as_their_files(tmp_path):
    write_generated_scenes(tmp_path / "source", num_train=1, num_val=1, image_size=(64, 64))
    [path] = (tmp_path / "source/images/train").iterdir()
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    dataset = open_dataset(str(tmp_path / "source"), "train")
    [file] = write_parquet(dataset, tmp_path / "parquet", "train")
    [cell] = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))["image"]
    assert cell["bytes"] == path.with_suffix(".jpg").read_bytes()
