"""The reader of `datasets` columns."""

import io
import json
import pickle
import struct
import zipfile
import zlib

import datasets
import numpy as np
import pytest
from coco_files import encode_ids
from PIL import Image
from torch.utils.data import DataLoader

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.data.check import check_samples, inspect_samples
from hf_maskformer.data.columns import SegmentationColumns, StreamedColumns, load_columns
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.rle import encode_rle

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


def test_a_transform_that_would_not_be_called_is_refused():
    dataset = make_dataset()
    for changed in (dataset.with_transform(lambda rows: rows), dataset.with_format("numpy").with_transform(dict)):
        with pytest.raises(ValueError, match=r"has a transform .* which would not be called\. Use dataset\.map"):
            SegmentationColumns(changed, labels=LabelSet(ID2LABEL))


@pytest.mark.parametrize("mode", [None, "L"])
def test_label_maps_in_jpeg_are_refused(mode):
    file = io.BytesIO()
    Image.fromarray(LABELS).convert("RGB" if mode else "L").save(file, "JPEG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image(mode=mode)})
    columns = {"image": [Image.new("RGB", (3, 2))], "label": [{"bytes": file.getvalue(), "path": None}]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match="row 0, column 'label' is a JPEG, which is lossy and changes labels"):
        SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]


def test_sixteen_bit_labels_keep_their_values():
    labels = np.array([[0, 1, 65535], [300, 0, 0]], dtype=np.uint16)
    columns = SegmentationColumns(make_dataset(labels=labels), labels=LabelSet(ID2LABEL))
    assert columns[0]["segmentation_map"].tolist() == labels.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_a_few_bits_keep_their_values(bits, tmp_path):
    labels = np.arange(2**bits, dtype=np.uint8).repeat(4).reshape(-1, 8)
    stored = np.packbits((labels[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(labels), -1).astype(bool), axis=1)
    lines = b"".join(b"\0" + line.tobytes() for line in stored)
    header = struct.pack(">IIBBBBB", labels.shape[1], labels.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    )
    photograph = io.BytesIO()
    Image.new("RGB", labels.shape[::-1]).save(photograph, "PNG")
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    cells = {"image": [{"bytes": photograph.getvalue(), "path": None}], "label": [{"bytes": content, "path": None}]}
    columns = SegmentationColumns(datasets.Dataset.from_dict(cells, features=features), labels=LabelSet(ID2LABEL))
    assert columns[0]["segmentation_map"].tolist() == labels.tolist()
    ids = SegmentationColumns(
        datasets.Dataset.from_dict(
            {**cells, "segments_info": [[{"id": i, "category_id": 0} for i in range(1, 2**bits)]]},
            features=datasets.Features(
                **features, segments_info=[{"id": datasets.Value("int64"), "category_id": datasets.Value("int64")}]
            ),
        ),
        labels=LabelSet(ID2LABEL),
    )
    assert len(np.unique(ids[0]["segmentation_map"])) == 2**bits
    (tmp_path / "map.png").write_bytes(content)
    processed = MaskFormerImageProcessor(do_resize=False)(columns[0]["image"], tmp_path / "map.png")
    assert processed["class_labels"][0].tolist() == list(range(2**bits))


def test_images_are_read_from_their_paths_too(tmp_path):
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "image.png")
    Image.fromarray(LABELS).save(tmp_path / "label.png")
    cells = {name: [str(tmp_path / f"{name}.png")] for name in ("image", "label")}
    features = datasets.Features(image=datasets.Image(mode="RGB"), label=datasets.Image())
    dataset = datasets.Dataset.from_dict(cells, features=features)
    for data in (dataset, dataset.cast_column("label", datasets.Image(decode=False))):
        sample = SegmentationColumns(data, labels=LabelSet(ID2LABEL))[0]
        assert sample["image"].getpixel((0, 0)) == (10, 20, 30)
        assert sample["segmentation_map"].tolist() == LABELS.tolist()
    with zipfile.ZipFile(tmp_path / "label.zip", "w") as archive:
        archive.write(tmp_path / "label.png", "label.png")
    (tmp_path / "label.png").unlink()
    with pytest.raises(ValueError, match=r"row 0, column 'label': .*label\.png cannot be read"):
        SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]
    cells["label"] = [f"zip://label.png::{tmp_path / 'label.zip'}"]
    stream = datasets.Dataset.from_dict(cells, features=features).to_iterable_dataset()
    [sample] = StreamedColumns(stream, labels=LabelSet(ID2LABEL))
    assert sample["segmentation_map"].tolist() == LABELS.tolist()


def test_streams_that_were_filtered_or_mapped_are_read():
    stream = make_stream()
    filtered = stream.filter(lambda row: row["name"] != "3")
    mapped = stream.map(lambda row: {"name": row["name"] + "!"}, features=stream.features)
    for changed, names in ((filtered, ["0", "1", "2", "4", "5"]), (mapped, ["0!", "1!", "2!", "3!", "4!", "5!"])):
        samples = list(StreamedColumns(changed, labels=LabelSet(ID2LABEL)))
        assert [sample["name"] for sample in samples] == names
        assert all(sample["segmentation_map"].tolist() == LABELS.tolist() for sample in samples)


def test_a_stream_of_images_without_features_says_how_to_name_them():
    stream = make_stream().map(lambda row: {"image": row["image"].rotate(180)})
    with pytest.raises(ValueError, match=r"columns of the stream cannot be inferred .* features=datasets\.Features"):
        StreamedColumns(stream, labels=LabelSet(ID2LABEL))


def test_ids_are_the_indices_of_a_palette_whose_colours_are_none():
    labels = Image.fromarray(np.array([[1, 2], [0, 2]], dtype=np.uint8), "P")
    labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    segments_info = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    integer = datasets.Value("int64")
    dataset = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 2))], "label": [labels], "segments_info": [segments_info]},
        features=datasets.Features(
            image=datasets.Image(), label=datasets.Image(), segments_info=[{"id": integer, "category_id": integer}]
        ),
    )
    sample = SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]
    assert sample["segmentation_map"].tolist() == [[256, 257], [255, 257]]


def test_workers_share_the_stream_of_a_saved_data_set(tmp_path, classes_path):
    datasets.DatasetDict(train=datasets.concatenate_datasets([make_dataset()] * 6)).save_to_disk(tmp_path / "saved")
    stream = load_columns(str(tmp_path / "saved"), "train", classes_path=classes_path, streaming=True)
    names = [sample["name"] for sample in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(names) == ["row_0", "row_0", "row_1", "row_1", "row_2", "row_2"]  # numbered by each worker


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
    with pytest.raises(ValueError, match="row 0, column 'image' cannot be decoded"):
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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_file_that_was_cut_short_is_named(tmp_path, classes_path, streaming):
    datasets.DatasetDict(train=make_dataset()).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").rglob("*.arrow")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{path} is damaged"):
        load_columns(str(tmp_path / "saved"), "train", classes_path=classes_path, streaming=streaming)


def test_a_split_that_was_not_saved_names_those_there_are(tmp_path, classes_path):
    datasets.DatasetDict(train=make_dataset()).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"has no split 'val'. Its splits are: train\. Choose splits with --train_split"
    ):
        load_columns(str(tmp_path / "saved"), "val", classes_path=classes_path)
    make_dataset().to_parquet(tmp_path / "files" / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"Split 'val' .* one of \['train'\]\.\)\. Choose splits with --train_split"):
        load_columns(str(tmp_path / "files"), "val", classes_path=classes_path)


def test_a_saved_data_set_without_splits_is_refused(tmp_path, classes_path):
    make_dataset().save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="single data set without splits"):
        load_columns(str(tmp_path / "saved"), "train", classes_path=classes_path)


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "train [1].parquet"])
def test_a_folder_of_parquet_files_is_loaded(tmp_path, classes_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    make_dataset().to_parquet(tmp_path / "parquet" / name)
    columns = load_columns(str(tmp_path / "parquet"), "train", classes_path=classes_path)
    assert columns[0]["segmentation_map"].tolist() == LABELS.tolist()


def make_panoptic(ids, segments_info, encode=None):
    """One row with a map of ids and the list of its segments."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.Image(),
        segments_info=[{name: datasets.Value("int64") for name in ("id", "category_id", "iscrowd")}],
    )
    label = Image.fromarray(np.array(ids, dtype=np.uint16)) if encode is None else encode(ids)
    row = {"image": Image.new("RGB", label.size), "label": label, "segments_info": segments_info}
    return datasets.Dataset.from_list([row], features=features)


SEGMENTS = [{"id": 300, "category_id": 1, "iscrowd": 0}, {"id": 2, "category_id": 0, "iscrowd": 1}]


@pytest.mark.parametrize("encode", [None, encode_ids])
def test_a_map_of_ids_is_read_with_its_segments(encode):
    columns = SegmentationColumns(make_panoptic([[300, 2, 0]], SEGMENTS, encode), labels=LabelSet(ID2LABEL))
    sample = columns[0]
    assert sample["segmentation_map"].tolist() == [[256, 257, 255]]
    assert (sample["instance_id_to_semantic_id"], sample["crowd_ids"]) == ({256: 1, 257: 0}, (257,))
    check_samples(columns)


def test_categories_are_renumbered_by_the_classes():
    segments = [{"id": 300, "category_id": 90, "iscrowd": 0}]
    labels = LabelSet(ID2LABEL, category_ids=(90, 7))
    columns = SegmentationColumns(make_panoptic([[300]], segments), labels=labels)
    assert columns[0]["instance_id_to_semantic_id"] == {256: 0}


def test_an_unknown_category_is_named():
    columns = SegmentationColumns(make_panoptic([[300, 2]], SEGMENTS), labels=LabelSet({0: "sky"}))
    with pytest.raises(
        ValueError, match=r"row 0, column 'label': segment 300 has the category_id 1, but the 1 classes have 0"
    ):
        columns[0]


def test_an_id_without_segment_is_named():
    columns = SegmentationColumns(make_panoptic([[300, 2, 5]], SEGMENTS), labels=LabelSet(ID2LABEL))
    with pytest.raises(ValueError, match="row 0, column 'label' contains the ids 5, which its segments_info does not"):
        columns[0]


def class_and_instance(classes, instances):
    channels = [classes, instances, np.zeros_like(classes)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_instance_maps(label):
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    return datasets.Dataset.from_list([{"image": Image.new("RGB", label.size), "label": label}], features=features)


def test_red_is_the_class_and_green_the_instance():
    label = class_and_instance(np.array([[0, 1, 1], [1, 255, 0]]), np.array([[0, 1, 2], [1, 0, 0]]))
    columns = SegmentationColumns(make_instance_maps(label), labels=LabelSet(ID2LABEL), instance_maps=True)
    sample = columns[0]
    assert sample["segmentation_map"].tolist() == [[256, 257, 258], [257, 255, 256]]
    assert sample["instance_id_to_semantic_id"] == {256: 0, 257: 1, 258: 1}
    check_samples(columns)


@pytest.mark.parametrize("ignore_index", [256, 257])
def test_no_instance_has_the_ignored_value(ignore_index):
    label = class_and_instance(np.array([[0, 1]]), np.array([[0, 1]]))
    labels = LabelSet(ID2LABEL, ignore_index=ignore_index)
    sample = SegmentationColumns(make_instance_maps(label), labels=labels, instance_maps=True)[0]
    assert ignore_index not in sample["segmentation_map"]
    assert [sample["instance_id_to_semantic_id"][number] for number in sample["segmentation_map"][0]] == [0, 1]


def test_a_map_of_one_channel_has_no_instances():
    columns = SegmentationColumns(make_dataset(), labels=LabelSet(ID2LABEL), instance_maps=True)
    with pytest.raises(ValueError, match="row 0, column 'label' has mode L; red must be the class"):
        columns[0]


def make_objects(objects, size=(2, 3)):
    features = datasets.Features(
        image=datasets.Image(),
        objects=[
            {
                "label": datasets.Value("int64"),
                "iscrowd": datasets.Value("bool"),
                "size": [datasets.Value("int64")],
                "counts": datasets.Value("string"),
            }
        ],
    )
    row = {"image": Image.new("RGB", size[::-1]), "objects": objects}
    return datasets.Dataset.from_list([row], features=features)


def test_objects_are_masks_that_may_overlap():
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    entry = {"label": 1, "iscrowd": False, "size": [2, 3], "counts": encode_rle(mask)}
    columns = SegmentationColumns(make_objects([entry, entry | {"iscrowd": True}]), labels=LabelSet(ID2LABEL))
    sample = columns[0]
    assert (sample["masks"] == mask).all()
    assert (sample["labels"].tolist(), sample["iscrowd"].tolist()) == ([1, 1], [False, True])
    check_samples(columns)


def test_labels_of_objects_do_not_count_from_1():
    with pytest.raises(ValueError, match="'objects' count from 0, so do_reduce_labels must be false"):
        SegmentationColumns(make_objects([]), labels=LabelSet(ID2LABEL, do_reduce_labels=True))


def test_an_object_that_overruns_its_image_is_named():
    entry = {"label": 1, "iscrowd": False, "size": [2, 3], "counts": "9"}
    with pytest.raises(ValueError, match="row 0, column 'objects': object 0 has a run of 9 pixels"):
        SegmentationColumns(make_objects([entry]), labels=LabelSet(ID2LABEL))[0]


def test_objects_that_are_boxes_are_refused():
    features = datasets.Features(image=datasets.Image(), objects=[{"label": datasets.Value("int64")}])
    row = {"image": Image.new("RGB", (3, 2)), "objects": [{"label": 1}]}
    dataset = datasets.Dataset.from_list([row], features=features)
    with pytest.raises(ValueError, match="row 0, column 'objects': object 0 has no counts, size"):
        SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]


def test_objects_of_another_size_than_their_image_are_named():
    entry = {"label": 1, "iscrowd": False, "size": [20000, 30000], "counts": "0"}
    with pytest.raises(ValueError, match="row 0, column 'objects' is 20000 x 30000"):
        SegmentationColumns(make_objects([entry]), labels=LabelSet(ID2LABEL))[0]


def test_a_label_that_no_class_has_is_found_among_objects():
    entry = {"label": 2, "iscrowd": False, "size": [2, 3], "counts": encode_rle(np.ones((2, 3), bool))}
    with pytest.raises(ValueError, match=r"column 'objects' contains label 2, but id2label has 2\."):
        check_samples(SegmentationColumns(make_objects([entry]), labels=LabelSet(ID2LABEL)))


def test_a_column_of_names_names_the_samples():
    dataset = make_dataset().add_column("name", ["street"])
    assert SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]["name"] == "street"


def make_stream(num_rows=6, num_shards=2):
    rows = [
        {"image": Image.new("RGB", (3, 2)), "label": Image.fromarray(LABELS), "name": f"{n}"} for n in range(num_rows)
    ]
    features = datasets.Features(image=datasets.Image(), label=datasets.Image(), name=datasets.Value("string"))
    return datasets.Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=num_shards)


def test_a_stream_gives_the_samples_in_turn():
    stream = StreamedColumns(make_stream(), labels=LabelSet(ID2LABEL))
    assert [sample["name"] for sample in stream] == list("012345")
    assert [sample["segmentation_map"].tolist() for sample in stream] == [LABELS.tolist()] * 6
    report = inspect_samples(stream)
    assert (report.num_samples, report.problems) == (6, [])


def test_workers_share_the_shards_of_a_stream():
    stream = StreamedColumns(make_stream(), labels=LabelSet(ID2LABEL))
    names = [sample["name"] for sample in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(names) == list("012345")


def test_a_shuffled_stream_comes_in_another_order_in_each_epoch():
    stream = StreamedColumns(make_stream(20), labels=LabelSet(ID2LABEL))
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (0, 0), (1, 0)):
        shuffled = stream.shuffle(seed, buffer_size=20)
        shuffled.set_epoch(epoch)
        orders.append([sample["name"] for sample in shuffled])
    in_turn = [sample["name"] for sample in stream]
    assert all(sorted(order) == sorted(in_turn) for order in orders)
    assert orders[0] == orders[2]
    assert orders[0] not in (orders[1], orders[3], in_turn)


def test_a_shuffled_stream_holds_rows_as_they_are_stored(monkeypatch):
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kw: decoded.append(1) or decode(*args, **kw))
    rows = iter(StreamedColumns(make_stream(20), labels=LabelSet(ID2LABEL)).shuffle(buffer_size=20))
    next(rows)
    assert len(decoded) <= 4  # image and map of the first row or two, while the buffer holds 20


def test_a_stream_that_breaks_off_says_after_how_many_rows():
    def rows():
        yield {"image": Image.new("RGB", (3, 2)), "label": Image.fromarray(LABELS)}
        raise OSError("the shard ends early")

    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    stream = StreamedColumns(
        datasets.IterableDataset.from_generator(rows, features=features), labels=LabelSet(ID2LABEL)
    )
    with pytest.raises(ValueError, match=r"cannot be read any further after 1 rows \(the shard ends early\)"):
        list(stream)
    assert "after 1 rows" in inspect_samples(stream).problems[0]


def test_a_stream_without_the_column_names_those_there_are():
    with pytest.raises(ValueError, match=r"no column 'mask'\. Its columns are: image, label, name"):
        StreamedColumns(make_stream(), label_column="mask", labels=LabelSet(ID2LABEL))


def test_a_photograph_without_objects_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, "JPEG", exif=exif)
    integer, text = datasets.Value("int64"), datasets.Value("string")
    objects = [{"label": integer, "size": [integer], "counts": text}]
    row = {"image": {"bytes": content.getvalue(), "path": None}, "objects": []}
    dataset = datasets.Dataset.from_list([row], features=datasets.Features(image=datasets.Image(), objects=objects))
    sample = SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]
    assert (sample["image"].size, sample["masks"].shape) == ((2, 3), (0, 3, 2))


def test_a_mode_of_a_column_is_kept():
    dataset = make_dataset(labels=np.stack([LABELS] * 3, axis=-1)).cast_column("label", datasets.Image(mode="L"))
    assert SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]["segmentation_map"].tolist() == LABELS.tolist()


def test_maps_of_class_and_instance_need_no_list_of_segments():
    dataset = make_instance_maps(class_and_instance(np.array([[0, 1]]), np.array([[0, 1]])))
    dataset = dataset.add_column("segments_info", [[{"id": 7, "category_id": 1}]])
    sample = SegmentationColumns(dataset, labels=LabelSet(ID2LABEL), instance_maps=True)[0]
    assert sample["instance_id_to_semantic_id"] == {256: 0, 257: 1}


def test_a_list_of_segments_may_be_stored_column_by_column():
    integer = datasets.Value("int64")
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.Image(),
        segments_info={"id": datasets.List(integer), "category_id": datasets.List(integer)},
    )
    segments_info = {"id": [70000, 4], "category_id": [1, 0]}
    row = {"image": Image.new("RGB", (3, 1)), "label": encode_ids([[4, 70000, 0]]), "segments_info": segments_info}
    sample = SegmentationColumns(datasets.Dataset.from_list([row], features=features), labels=LabelSet(ID2LABEL))[0]
    assert sample["segmentation_map"].tolist() == [[257, 256, 255]]
    assert sample["instance_id_to_semantic_id"] == {256: 1, 257: 0}


def test_a_format_does_not_matter_to_lists_of_segments():
    integer = datasets.Value("int64")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.Image(), segments_info=[{"id": integer, "category_id": integer}]
    )
    row = {
        "image": Image.new("RGB", (2, 1)),
        "label": encode_ids([[4, 0]]),
        "segments_info": [{"id": 4, "category_id": 1}],
    }
    dataset = datasets.Dataset.from_list([row], features=features).with_format("torch")
    sample = SegmentationColumns(dataset, labels=LabelSet(ID2LABEL))[0]
    assert sample["segmentation_map"].tolist() == [[256, 255]]


def test_a_stream_is_shuffled_within_its_buffer():
    stream = StreamedColumns(make_stream(20, num_shards=1), labels=LabelSet(ID2LABEL))
    assert [sample["name"] for sample in stream.shuffle(buffer_size=1)] == [sample["name"] for sample in stream]


def test_files_of_a_private_stream_are_read_by_its_token(tmp_path, monkeypatch):
    import datasets.utils.file_utils as file_utils

    tokens = []

    def observe(path, mode, download_config):
        tokens.append(download_config.token)
        return open(path, mode)

    monkeypatch.setattr(file_utils, "xopen", observe)
    Image.fromarray(LABELS).save(tmp_path / "label.png")
    cells = {name: [str(tmp_path / "label.png")] for name in ("image", "label")}
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    stream = datasets.Dataset.from_dict(cells, features=features).to_iterable_dataset()
    stream._token_per_repo_id = {"me/data": "hf_secret"}
    list(StreamedColumns(stream, labels=LabelSet(ID2LABEL)))
    assert tokens == ["hf_secret"] * 2
