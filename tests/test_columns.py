"""The reader of `datasets` columns."""

import io
import json
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.check import check_samples
from hf_maskformer.data.columns import SegmentationColumns, load_columns
from hf_maskformer.data.labels import LabelSet

ID2LABEL = {0: "sky", 1: "road"}
LABELS = np.array([[0, 1, 255], [1, 0, 0]], dtype=np.uint8)


def make_dataset(image_column="image", label_column="label", labels=LABELS):
    columns = {
        image_column: [Image.new("RGB", (3, 2), (10, 20, 30))],
        label_column: [Image.fromarray(labels)],
        "city": ["Ulm"],
    }
    features = {image_column: datasets.Image(), label_column: datasets.Image(), "city": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def classes_path(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"id2label": {"0": "sky", "1": "road"}, "ignore_index": 255, "thing_ids": [1]}))
    return path


def test_a_row_becomes_a_sample():
    columns = SegmentationColumns(make_dataset(), labels=LabelSet(ID2LABEL))
    assert len(columns) == 1
    assert columns[0]["image"].getpixel((0, 0)) == (10, 20, 30)
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()
    assert columns[0]["name"] == "row_0"


def test_columns_of_other_names_are_read():
    dataset = make_dataset("photo", "mask")
    assert SegmentationColumns(dataset, "photo", "mask", labels=LabelSet(ID2LABEL))[0]["image"].size == (3, 2)


def test_a_format_of_the_data_set_does_not_matter():
    columns = SegmentationColumns(make_dataset().with_format("numpy"), labels=LabelSet(ID2LABEL))
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()


def test_sixteen_bit_labels_keep_their_values():
    labels = np.array([[0, 1, 65535], [300, 0, 0]], dtype=np.uint16)
    columns = SegmentationColumns(make_dataset(labels=labels), labels=LabelSet(ID2LABEL))
    assert columns[0]["segmentation_map"].tolist() == labels.tolist()


def test_it_travels_to_worker_processes():
    columns = pickle.loads(pickle.dumps(SegmentationColumns(make_dataset(), labels=LabelSet(ID2LABEL))))
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()


def test_a_missing_column_names_those_there_are():
    with pytest.raises(ValueError, match=r"no column 'annotation'. Its columns are: image, label, city"):
        SegmentationColumns(make_dataset(), label_column="annotation", labels=LabelSet(ID2LABEL))


def test_a_column_without_images_is_refused():
    with pytest.raises(ValueError, match=r"Column 'city' has the feature .* but images are needed"):
        SegmentationColumns(make_dataset(), label_column="city", labels=LabelSet(ID2LABEL))


def test_the_check_over_all_samples_names_row_and_column():
    columns = SegmentationColumns(make_dataset(labels=LABELS * 2), labels=LabelSet(ID2LABEL, ignore_index=254))
    with pytest.raises(ValueError, match="row 0, column 'label' contains label 2, but id2label has 2 labels"):
        check_samples(columns)


def test_an_image_of_another_size_than_its_map_is_named():
    columns = SegmentationColumns(make_dataset(labels=LABELS.T), labels=LabelSet(ID2LABEL))
    with pytest.raises(ValueError, match=r"row 0, column 'label' is 3 x 2 .*row 0, column 'image' is 2 x 3"):
        columns[0]


def test_a_damaged_image_is_named_by_its_row():
    encoded = io.BytesIO()
    Image.new("RGB", (100, 100)).save(encoded, "PNG")
    cells = {"image": [{"bytes": encoded.getvalue()[:-40], "path": None}], "label": [Image.fromarray(LABELS)]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    columns = SegmentationColumns(datasets.Dataset.from_dict(cells, features=features), labels=LabelSet(ID2LABEL))
    with pytest.raises(ValueError, match="row 0 cannot be decoded"):
        check_samples(columns)


def test_an_empty_cell_is_named():
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": [None], "label": [Image.fromarray(LABELS)]}, features=features)
    with pytest.raises(ValueError, match="row 0 is empty in column 'image'"):
        SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]


def test_a_saved_data_set_is_loaded_from_disk(tmp_path, classes_path):
    datasets.DatasetDict(train=make_dataset()).save_to_disk(tmp_path / "saved")
    columns = load_columns(str(tmp_path / "saved"), "train", classes_path=classes_path)
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()
    assert columns.labels == LabelSet(ID2LABEL, thing_ids=(1,))
    assert columns.label_source == str(classes_path)


def test_a_split_that_was_not_saved_names_those_there_are(tmp_path, classes_path):
    datasets.DatasetDict(train=make_dataset()).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has no split 'val'. Its splits are: train"):
        load_columns(str(tmp_path / "saved"), "val", classes_path=classes_path)


def test_a_saved_data_set_without_splits_is_refused(tmp_path, classes_path):
    make_dataset().save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="single data set without splits"):
        load_columns(str(tmp_path / "saved"), "train", classes_path=classes_path)


def test_a_folder_of_parquet_files_is_loaded(tmp_path, classes_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    make_dataset().to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    columns = load_columns(str(tmp_path / "parquet"), "train", classes_path=classes_path)
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()
