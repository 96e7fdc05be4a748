"""The folder reader, its classes.json and the check over all samples."""

import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from hf_maskformer.data import check
from hf_maskformer.data.check import check_samples, inspect_samples
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet

CLASSES = {"id2label": {"0": "sky", "1": "road"}}
LABELS = np.array([[0, 1, 255], [1, 0, 0]], dtype=np.uint8)


def write_sample(root: Path, name: str, labels: np.ndarray | Image.Image = LABELS, size=(3, 2), suffix=".png"):
    (root / "images/train").mkdir(parents=True, exist_ok=True)
    (root / "annotations/train").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(root / "images/train" / (name + suffix))
    label_image = labels if isinstance(labels, Image.Image) else Image.fromarray(labels)
    label_image.save(root / "annotations/train" / f"{name}.png")


def write_classes(root: Path, **changes):
    (root / "classes.json").write_text(json.dumps(CLASSES | changes))


@pytest.fixture
def root(tmp_path):
    write_sample(tmp_path, "b")
    write_sample(tmp_path, "a")
    write_classes(tmp_path)
    return tmp_path


def map_of_the_only_sample(root, labels):
    write_sample(root, "only", labels)
    write_classes(root)
    return SegmentationFolder(root, "train")[0]["segmentation_map"]


def test_samples_come_in_the_order_of_their_names(root):
    dataset = SegmentationFolder(root, "train")
    assert dataset.names == [sample["name"] for sample in dataset] == ["a", "b"]
    assert len(dataset) == 2


def test_what_is_not_read_is_named(root, transformers_log):
    (root / "images/train/city").mkdir()
    Image.new("RGB", (3, 2)).save(root / "images/train/c.gif")
    for name in ("notes.txt", ".hidden.png"):
        (root / "images/train" / name).touch()
    assert SegmentationFolder(root, "train").names == ["a", "b"]
    assert "images/train also holds c.gif, city, which is not read" in transformers_log.text


def test_a_map_of_numbers_with_a_decimal_point_is_refused_with_the_remedy(root):
    (root / "annotations/train/a.png").unlink()
    Image.fromarray(LABELS.astype(np.float32)).save(root / "annotations/train/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif has mode F .* save floating-point values as integers"):
        SegmentationFolder(root, "train")[0]


def test_a_sample_is_an_rgb_image_and_a_map_of_its_size(root):
    sample = SegmentationFolder(root, "train")[0]
    assert sample["image"].mode == "RGB"
    assert sample["image"].getpixel((0, 0)) == (10, 20, 30)
    assert sample["segmentation_map"].tolist() == LABELS.tolist()


def test_classes_json_gives_the_labels(root):
    write_classes(root, ignore_index=9, do_reduce_labels=True, thing_ids=[1], palette=[[0, 0, 0]])
    dataset = SegmentationFolder(root, "train")
    assert dataset.labels == LabelSet({0: "sky", 1: "road"}, ignore_index=9, do_reduce_labels=True, thing_ids=(1,))


def test_an_id2label_json_of_the_hub_gives_the_names_alone(root):
    (root / "classes.json").write_text(json.dumps({"0": "sky", "1": "road"}))
    assert SegmentationFolder(root, "train").labels == LabelSet({0: "sky", 1: "road"})


def test_what_classes_json_leaves_out_has_a_default(root):
    dataset = SegmentationFolder(root, "train")
    assert dataset.labels == LabelSet({0: "sky", 1: "road"}, ignore_index=255, do_reduce_labels=False, thing_ids=())


def test_sixteen_bit_labels_keep_their_values(tmp_path):
    labels = np.array([[0, 1, 65535], [300, 0, 0]], dtype=np.uint16)
    assert map_of_the_only_sample(tmp_path, labels).tolist() == labels.tolist()


def test_a_palette_image_is_read_as_indices_not_as_colours(tmp_path):
    image = Image.fromarray(LABELS, mode="P")
    image.putpalette([200, 100, 50] * 256)
    assert map_of_the_only_sample(tmp_path, image).tolist() == LABELS.tolist()


def test_a_one_bit_map_has_the_classes_zero_and_one(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0]], dtype=np.uint8)
    assert map_of_the_only_sample(tmp_path, Image.fromarray(labels * 255).convert("1")).tolist() == labels.tolist()


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".tiff", ".webp"])
def test_common_image_formats_are_read(tmp_path, suffix):
    write_sample(tmp_path, "a", suffix=suffix)
    write_classes(tmp_path)
    assert SegmentationFolder(tmp_path, "train")[0]["image"].size == (3, 2)


def test_grey_and_transparent_images_become_rgb(root):
    Image.new("L", (3, 2), 7).save(root / "images/train/a.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 128)).save(root / "images/train/b.png")
    grey, transparent = SegmentationFolder(root, "train")
    assert grey["image"].getpixel((0, 0)) == (7, 7, 7)
    assert transparent["image"].getpixel((0, 0)) == (1, 2, 3)


def test_what_operating_systems_leave_in_folders_is_passed_over(root):
    for name in ("._a.png", ".DS_Store", "Thumbs.db"):
        (root / "images/train" / name).write_bytes(b"")
        (root / "annotations/train" / name).write_bytes(b"")
    assert SegmentationFolder(root, "train").names == ["a", "b"]


def test_worker_processes_read_the_same_samples(root):
    dataset = SegmentationFolder(root, "train")
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert [sample["name"] for sample in loader] == ["a", "b"]
    assert pickle.loads(pickle.dumps(dataset))[1]["segmentation_map"].tolist() == LABELS.tolist()


def write_turned_image(root, name, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for viewing
    image = Image.new("RGB", size, (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(root / f"images/train/{name}.png", exif=exif)


def test_an_image_with_an_orientation_is_turned_upright(root):
    write_turned_image(root, "a", size=(2, 3))
    image = SegmentationFolder(root, "train")[0]["image"]
    assert image.size == (3, 2)
    assert image.getpixel((2, 0)) == (255, 255, 255)


def test_an_image_whose_map_fits_the_stored_grid_only_is_not_turned(root):
    write_turned_image(root, "a", size=(3, 2))
    image = SegmentationFolder(root, "train")[0]["image"]
    assert image.size == (3, 2)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_images_without_label_file_are_counted_and_named(root):
    for index in range(7):
        Image.new("RGB", (3, 2)).save(root / f"images/train/extra{index}.jpg")
    with pytest.raises(ValueError, match=r"7 of 9 images in .*: extra0.jpg, .*extra4.jpg, ... \(7 in all\). Add"):
        SegmentationFolder(root, "train")


def test_label_files_without_image_are_named(root):
    Image.fromarray(LABELS).save(root / "annotations/train/extra.png")
    with pytest.raises(ValueError, match=r"1 of 3 label files in .* have no image in .*: extra.png"):
        SegmentationFolder(root, "train")


def test_images_and_label_files_of_other_names_are_shown_side_by_side(root):
    (root / "annotations/train/a.png").rename(root / "annotations/train/a_mask.png")
    with pytest.raises(ValueError, match=r"in .*images/train there are only a.png, and in .* only a_mask.png. Rename"):
        SegmentationFolder(root, "train")


def test_names_from_different_systems_meet(root):
    write_sample(root, unicodedata.normalize("NFC", "größe"))
    path = root / "images/train" / unicodedata.normalize("NFC", "größe.png")
    path.rename(path.with_name(unicodedata.normalize("NFD", "größe.png")))
    assert SegmentationFolder(root, "train").names == ["a", "b", unicodedata.normalize("NFC", "größe")]


def test_two_images_of_one_name_are_refused(root):
    Image.new("RGB", (3, 2)).save(root / "images/train/a.jpg")
    with pytest.raises(ValueError, match=r"both a.jpg and a.png"):
        SegmentationFolder(root, "train")


def test_a_missing_split_names_those_there_are(root):
    with pytest.raises(
        FileNotFoundError, match=r"images/val does not exist. The splits in .* are: train\. Choose splits with"
    ):
        SegmentationFolder(root, "val")


def test_images_beside_each_other_instead_of_in_splits_are_told_from_a_missing_split(tmp_path):
    """As in an export of Label Studio, or the Oxford-IIIT pets."""
    write_sample(tmp_path, "a")
    (tmp_path / "result.json").touch()
    for path in list((tmp_path / "images/train").iterdir()):
        path.rename(tmp_path / "images" / path.name)
    (tmp_path / "images/train").rmdir()
    match = r"images/train does not exist, and neither does any other split .* see docs/data.md .* holds .*result.json"
    with pytest.raises(FileNotFoundError, match=match):
        SegmentationFolder(tmp_path, "train")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/images does not exist"):
        SegmentationFolder(tmp_path / "nowhere", "train")


def test_a_folder_of_another_layout_is_told_by_what_it_holds(tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has another layout of docs/data.md; .* holds masks/\."):
        SegmentationFolder(tmp_path, "train")


def test_a_folder_without_images_is_refused(root):
    for path in (root / "images/train").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        SegmentationFolder(root, "train")


def test_label_files_of_another_format_are_named(root):
    for path in (root / "annotations/train").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(
        FileNotFoundError, match=r"annotations/train holds no label file \(.png, .*\); there is a\.jpg, b\.jpg"
    ):
        SegmentationFolder(root, "train")


def test_a_label_map_that_is_a_jpeg_under_the_name_of_a_png_is_refused(root):
    path = root / "annotations/train/a.png"
    Image.open(path).convert("L").save(path, "JPEG")
    with pytest.raises(ValueError, match=r"a\.png is a JPEG, which is lossy and changes labels.* as PNG"):
        SegmentationFolder(root, "train")[0]


def test_a_missing_classes_json_is_named(root):
    (root / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes.json does not exist. Write the classes there"):
        SegmentationFolder(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", 'there is no object "id2label"'),
        ("{}", 'there is no object "id2label"'),
        ('{"0": "sky", "palette": []}', 'there is no object "id2label"'),
        ('{"0": "sky", "2": "road"}', "has the ids 0, 2, but ids must be 0 to K - 1"),
        ('{"id2label": ["sky"]}', 'there is no object "id2label"'),
        ('{"id2label": {}}', r"id2label has the ids \(none\)"),
        ('{"id2label": {"0": "sky", "2": "road"}}', "has the ids 0, 2, but ids must be 0 to K - 1"),
        ('{"id2label": {"sky": "0"}}', 'id2label has the key "sky"'),
        ('{"id2label": {"00": "sky"}}', 'id2label has the key "00"'),
        ('{"id2label": {"0": 1}}', "id2label maps 0 to 1"),
        ('{"id2label": {"0": 1, "1": 1}}', "id2label maps 0 to 1"),
        ('{"id2label": {"0": "sky", "1": "sky", "2": "sky (1)"}}', r"id2label names several classes sky \(1\)"),
        ('{"id2label": {"0": "sky"}, "ignore_index": "255"}', "ignore_index is '255'"),
        (
            '{"id2label": {"0": "sky"}, "ignore_index": 3000000000}',
            "ignore_index is 3000000000, but pixels have at most",
        ),
        ('{"id2label": {"0": "sky"}, "ignore_index": 0}', "ignore_index 0 is also the pixel value of a class"),
        ('{"id2label": {"0": "sky"}, "ignore_index": 1, "do_reduce_labels": true}', "ignore_index 1 is also"),
        ('{"id2label": {"0": "sky"}, "do_reduce_labels": 1}', "do_reduce_labels is 1"),
        ('{"id2label": {"0": "sky"}, "thing_ids": [1]}', "thing_ids names 1, which"),
        ('{"id2label": {"0": "sky"}, "thing_ids": 0}', "thing_ids is 0"),
        ('{"id2label": {"0": "sky"}, "thing_ids": ["0"]}', r"thing_ids is \['0'\]"),
        ('{"id2label": {"0": "sky"}, "category_ids": ["7"]}', r"category_ids is \['7'\]"),
        ('{"id2label": {"0": "sky"}, "category_ids": 7}', "category_ids is 7"),
        ('{"id2label": {"0": "sky"}, "category_ids": [7, 8]}', "category_ids has 2 different ids, but there are 1"),
        ('{"id2label": {"0": "sky", "1": "road"}, "category_ids": [7, 7]}', "category_ids has 1 different ids"),
        (
            '{"id2label": {"0": "sky"}, "category_ids": [7], "do_reduce_labels": true}',
            "category_ids already map values to classes",
        ),
        ('{"id2label": {"0": "sky"}, "reduce_labels": true}', "unknown field reduce_labels; the fields are id2label"),
    ],
)
def test_a_malformed_classes_json_is_explained_with_its_path(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=rf"classes.json: .*{message}"):
        LabelSet.from_json(tmp_path / "classes.json")


def test_classes_that_share_a_name_are_told_apart(tmp_path, caplog):
    path = tmp_path / "classes.json"
    path.write_text('{"id2label": {"0": "screen", "1": "door", "2": "screen"}}')
    assert LabelSet.from_json(path).id2label == {0: "screen (0)", 1: "door", 2: "screen (2)"}
    assert "They are renamed screen (0), screen (2)." in caplog.text
    with pytest.raises(ValueError, match="id2label names several classes screen"):
        LabelSet({0: "screen", 1: "screen"})


def test_classes_are_written_as_they_are_read(tmp_path):
    label_set = LabelSet({0: "sky", 1: "größe"}, ignore_index=7, thing_ids=(1,), category_ids=(184, 3))
    label_set.to_json(tmp_path / "classes.json")
    assert LabelSet.from_json(tmp_path / "classes.json") == label_set
    assert (label_set.label_of(3, "x"), label_set.label_of(184, "x")) == (1, 0)


def test_ids_of_numpy_are_written_as_numbers(tmp_path):
    labels = LabelSet({np.int64(0): "sky"}, ignore_index=np.uint8(255), thing_ids=(np.int64(0),))
    labels.to_json(tmp_path / "classes.json")
    assert LabelSet.from_json(tmp_path / "classes.json") == LabelSet({0: "sky"}, thing_ids=(0,))


def test_a_byte_order_mark_in_classes_json_does_no_harm(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES), encoding="utf-8-sig")
    assert LabelSet.from_json(tmp_path / "classes.json").num_labels == 2


def test_the_class_map_of_reduced_labels_ignores_zero_and_keeps_what_was_ignored():
    label_set = LabelSet({0: "sky", 1: "road"}, ignore_index=255, do_reduce_labels=True)
    assert label_set.class_map(np.array([[0, 1], [2, 255]], dtype=np.uint8)).tolist() == [[255, 0], [1, 255]]


def test_the_class_map_of_labels_that_start_at_zero_is_the_map():
    label_set = LabelSet({0: "sky", 1: "road"})
    assert label_set.class_map(LABELS).tolist() == LABELS.tolist()


def test_a_sound_data_set_passes_the_check(root):
    check_samples(SegmentationFolder(root, "train"))


def test_reduced_labels_may_reach_the_number_of_classes(root):
    write_sample(root, "b", np.array([[0, 1, 2], [255, 0, 0]], dtype=np.uint8))
    write_classes(root, do_reduce_labels=True)
    check_samples(SegmentationFolder(root, "train"))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_image_is_named(root, suffix):
    write_sample(root, "c", np.zeros((100, 100), np.uint8), size=(100, 100), suffix=suffix)
    path = root / f"images/train/c{suffix}"
    path.write_bytes(path.read_bytes()[:-40])
    dataset = SegmentationFolder(root, "train")
    with pytest.raises(ValueError, match=rf"train/c{suffix} cannot be read as an image .*Replace the file"):
        check_samples(dataset)


@pytest.mark.parametrize("lowest", [0, 1])
def test_masks_of_0_and_255_are_refused_instead_of_ignoring_what_they_show(root, lowest):
    write_classes(root, do_reduce_labels=bool(lowest))
    write_sample(root, "a", np.array([[0, 255, 0], [0, 0, 0]], dtype=np.uint8).clip(lowest))
    write_sample(root, "b", np.full((2, 3), lowest, np.uint8))
    message = rf"class 1 \('road'\)\. 8.33% of all .* In masks of {lowest} and 255, write .* {lowest + 1} or another"
    with pytest.raises(ValueError, match=message):
        check_samples(SegmentationFolder(root, "train"))
    write_sample(root, "b", np.full((2, 3), lowest + 1, np.uint8))
    check_samples(SegmentationFolder(root, "train"))


def test_masks_of_0_and_255_of_more_classes_are_a_warning(root, transformers_log):
    write_classes(root, id2label={0: "background", 1: "cat", 2: "dog"})
    write_sample(root, "a", np.array([[0, 255, 0], [0, 0, 0]], dtype=np.uint8))
    write_sample(root, "b", np.zeros((2, 3), np.uint8))
    check_samples(SegmentationFolder(root, "train"))
    assert "2 of 3 classes have no pixel" in transformers_log.text
    assert "In masks of 0 and 255, write the value of the class, 1 or another, instead" in transformers_log.text


def test_the_0_that_reduced_labels_ignore_hides_no_class(root):
    write_classes(root, do_reduce_labels=True)
    for name in ("a", "b"):
        write_sample(root, name, np.array([[0, 1, 1], [1, 1, 1]], dtype=np.uint8))
    check_samples(SegmentationFolder(root, "train"))


def test_classes_that_never_occur_are_named_without_stopping(root, transformers_log):
    write_classes(root, id2label={"0": "sky", "1": "road", "2": "tree", "3": "car"})
    check_samples(SegmentationFolder(root, "train"))
    assert "2 of 4 classes have no pixel in any of 2 samples: tree, car." in transformers_log.text


def test_a_file_that_is_no_image_is_named(root):
    (root / "annotations/train/b.png").write_text("text")
    with pytest.raises(ValueError, match=r"annotations/train/b.png cannot be read as an image"):
        check_samples(SegmentationFolder(root, "train"))


def test_a_map_of_another_size_is_named(root):
    write_sample(root, "b", LABELS, size=(4, 2))
    with pytest.raises(ValueError, match=r"annotations/train/b.png is 2 x 3 .*images/train/b.png is 2 x 4"):
        check_samples(SegmentationFolder(root, "train"))


def test_a_map_of_colours_is_named(root):
    write_sample(root, "b", Image.new("RGB", (3, 2)))
    with pytest.raises(ValueError, match=r"annotations/train/b.png has mode RGB \(R, G, B\)"):
        check_samples(SegmentationFolder(root, "train"))


def test_a_sixteen_bit_image_is_scaled_and_one_of_unknown_range_refused(root):
    write_sample(root, "b", np.zeros((2, 3), dtype=np.uint8))
    Image.fromarray(np.full((2, 3), 128 * 257, np.uint16)).save(root / "images/train/b.png")
    (sample,) = [sample for sample in SegmentationFolder(root, "train") if sample["name"] == "b"]
    assert np.unique(sample["image"]).tolist() == [128]
    (root / "images/train/b.png").unlink()
    Image.fromarray(np.full((2, 3), 4000, np.int32)).save(root / "images/train/b.tif")
    with pytest.raises(ValueError, match=r"images/train/b.tif cannot be used as an image: mode I does not say"):
        check_samples(SegmentationFolder(root, "train"))


def test_labels_that_disagree_with_classes_json_are_named_with_both_files(root):
    write_sample(root, "b", np.array([[0, 1, 2], [7, 255, 0]], dtype=np.uint8))
    message = r"annotations/train/b.png contains label 2, 7, but .*classes.json has 2 labels, which are 0 to 1 in the"
    with pytest.raises(ValueError, match=message):
        check_samples(SegmentationFolder(root, "train"))


def test_only_the_first_ten_problems_are_listed_and_all_are_counted(root):
    for index in range(12):
        write_sample(root, f"c{index:02}", np.full((2, 3), 9, np.uint8))
    with pytest.raises(ValueError, match="has 12 problems, of which the first 10") as caught:
        check_samples(SegmentationFolder(root, "train"))
    lines = str(caught.value).splitlines()[1:]
    assert [f"c{index:02}.png" in line for index, line in enumerate(lines)] == [True] * 10


SKY = Image.new("RGB", (3, 2))


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ({"image": SKY, "segmentation_map": LABELS}, "Sample 0 has no name. Give it image, name,"),
        ({"image": SKY, "name": "a"}, "Sample 0 has no segmentation_map."),
        ({"image": SKY, "name": "a", "masks": LABELS[None] == 1}, "Sample 0 has no labels."),
        ({"image": np.array(SKY), "name": "a", "segmentation_map": LABELS}, "image of sample 0 is of type ndarray"),
    ],
)
def test_the_form_of_samples_of_your_own_is_checked(sample, problem):
    class Samples(list):
        labels = LabelSet({0: "sky", 1: "road"})

    assert problem in inspect_samples(Samples([sample])).problems[0]


class InstanceSamples:
    """One image whose map holds the instance ids 0, 5 and 255."""

    def __init__(self, id_to_label, do_reduce_labels=False):
        self.id_to_label = id_to_label
        self.labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=do_reduce_labels)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {
            "image": Image.new("RGB", (3, 1)),
            "segmentation_map": np.array([[0, 5, 255]]),
            "name": "scene",
            "instance_id_to_semantic_id": self.id_to_label,
        }


def test_instance_ids_are_checked_by_the_label_they_stand_for():
    check_samples(InstanceSamples({0: 1, 5: 0}))
    with pytest.raises(ValueError, match="scene contains label 2, but id2label has 2 labels"):
        check_samples(InstanceSamples({0: 1, 5: 2}))


def test_an_instance_id_without_label_is_named():
    with pytest.raises(ValueError, match="scene contains the ids 5, which instance_id_to_semantic_id lacks"):
        check_samples(InstanceSamples({0: 1}))


def test_a_segment_cannot_have_the_id_of_ignored_pixels():
    check_samples(InstanceSamples({0: 1, 5: 0, 255: 255}))
    with pytest.raises(ValueError, match="scene gives a segment the id 255, which marks pixels without a segment"):
        check_samples(InstanceSamples({0: 1, 5: 0, 255: 1}))


def test_with_reduced_labels_the_instance_id_zero_needs_no_label():
    check_samples(InstanceSamples({5: 2}, do_reduce_labels=True))
    with pytest.raises(ValueError, match="scene contains label 3"):
        check_samples(InstanceSamples({5: 3}, do_reduce_labels=True))


root = root


def test_a_square_image_with_an_orientation_is_turned_upright(root):
    write_turned_image(root, "a", size=(2, 2))
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(root / "annotations/train/a.png")
    assert SegmentationFolder(root, "train")[0]["image"].getpixel((1, 0)) == (255, 255, 255)


def test_categories_of_reduced_labels_reach_the_number_of_classes():
    labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=True)
    assert [labels.label_of(category_id, "file") for category_id in (1, 2)] == [1, 2]


def test_the_check_reads_every_sample_of_a_long_data_set(monkeypatch):
    monkeypatch.setattr(check, "BLOCK", 2)
    assert check.inspect_samples(GeneratedScenes(5, image_size=(64, 64))).num_samples == 5


def test_the_most_frequent_class_comes_first_in_the_table():
    report = check.DataReport(pixels=np.array([1, 0, 3]), occurrences=np.array([1, 0, 2]))
    table = check.report_as_table(report, LabelSet({0: "sky", 1: "road", 2: "sea"}))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["2", "75.000%", "2", "sea"],
        ["0", "25.000%", "1", "sky"],
        ["1", "0.000%", "0", "road"],
    ]


def test_a_data_set_of_a_single_class_is_counted(root):
    for name in "ab":
        write_sample(root, name, np.array([[0, 0, 255], [0, 0, 0]], np.uint8))
    write_classes(root, id2label={"0": "cell"})
    report = check.inspect_samples(SegmentationFolder(root, "train"))
    assert (report.problems, report.pixels.tolist(), report.occurrences.tolist()) == ([], [10], [2])


def test_the_check_needs_no_thread_beside_its_own(root):
    assert check.inspect_samples(SegmentationFolder(root, "train"), num_workers=0).num_samples == 2


def test_file_names_may_hold_bytes_that_are_no_text(root):
    name = os.fsdecode(b"caf\xe9")
    write_sample(root, name)
    assert name in SegmentationFolder(root, "train").names


def test_the_ignored_value_has_at_most_32_bits():
    assert LabelSet({0: "sky"}, ignore_index=2**31 - 1).ignore_index == 2**31 - 1
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match="pixels have at most 32 bits"):
            LabelSet({0: "sky"}, ignore_index=value)
