import json

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from hf_maskformer.data.generated_scenes import (
    CLASS_NAMES,
    THING_IDS,
    GeneratedScenes,
    color_classifier_mean_iou,
    write_generated_scenes,
)
from hf_maskformer.data.scene_drawing import SHAPES


@pytest.fixture(scope="module")
def semantic():
    return list(GeneratedScenes(60, seed=3))


@pytest.fixture(scope="module")
def panoptic():
    return list(GeneratedScenes(60, seed=3, task="panoptic"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "new"
    write_generated_scenes(root, num_train=3, num_val=2, seed=5, image_size=(64, 80))
    return root


def arrays(sample):
    return np.asarray(sample["image"]), sample["segmentation_map"]


def checksum(sample):
    image, segmentation_map = arrays(sample)
    weights = np.arange(1, segmentation_map.size + 1)
    return int(image.reshape(-1, 3).sum(1) @ weights), int(segmentation_map.ravel() @ weights)


def test_a_scene_has_the_promised_form(semantic):
    image, label_map = arrays(semantic[0])
    assert image.shape == (128, 128, 3)
    assert label_map.shape == (128, 128)
    assert label_map.dtype == np.uint8
    assert semantic[0]["image"].mode == "RGB"
    assert semantic[7]["name"] == "scene_00007"


def test_labels_are_things_and_stuff():
    assert GeneratedScenes(1).labels.id2label == dict(enumerate(CLASS_NAMES))
    assert GeneratedScenes(1).labels.thing_ids == tuple(THING_IDS)
    assert CLASS_NAMES[THING_IDS[0]] == "disc"


def test_a_scene_does_not_depend_on_order_or_number_of_scenes(semantic):
    again = GeneratedScenes(1000, seed=3)
    assert [checksum(again[index]) for index in (5, 0, 59)] == [checksum(semantic[index]) for index in (5, 0, 59)]


def test_scenes_differ_by_index_and_seed(semantic):
    other_seed = GeneratedScenes(1, seed=4)[0]
    assert len({checksum(semantic[0]), checksum(semantic[1]), checksum(other_seed)}) == 3


def test_another_process_draws_the_same_scenes(semantic):
    options = {"batch_size": None, "num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(GeneratedScenes(4, seed=3), collate_fn=checksum, **options)
    assert list(loader) == [checksum(sample) for sample in semantic[:4]]


def test_both_tasks_show_the_same_scene(semantic, panoptic):
    for by_label, by_segment in zip(semantic, panoptic, strict=True):
        assert by_label["name"] == by_segment["name"]
        np.testing.assert_array_equal(by_label["image"], by_segment["image"])
        labels = np.vectorize(by_segment["instance_id_to_semantic_id"].get)(by_segment["segmentation_map"])
        np.testing.assert_array_equal(labels, by_label["segmentation_map"])


def test_every_segment_is_visible_and_listed(panoptic):
    for sample in panoptic:
        areas = np.bincount(sample["segmentation_map"].ravel())
        assert list(sample["instance_id_to_semantic_id"]) == list(range(1, len(areas)))
        assert areas[0] == 0
        assert areas[1:].min() >= 100
        assert sample["segmentation_map"].dtype == np.int32


def test_each_stuff_class_is_one_segment(panoptic):
    for sample in panoptic:
        stuff = [label for label in sample["instance_id_to_semantic_id"].values() if label not in THING_IDS]
        assert len(set(stuff)) == len(stuff) >= 2


def test_every_class_is_in_a_third_of_the_scenes_with_two_percent_of_the_pixels(semantic):
    areas = np.stack([np.bincount(sample["segmentation_map"].ravel(), minlength=8) for sample in semantic])
    assert (areas > 0).mean(0).min() > 1 / 3
    assert areas.sum(0).min() > 0.02 * areas.sum()


def test_objects_overlap_in_most_scenes(panoptic):
    def objects_touch(sample):
        segments = sample["segmentation_map"]
        things = np.isin([sample["instance_id_to_semantic_id"][i] for i in range(1, segments.max() + 1)], THING_IDS)
        is_thing = things[segments - 1]
        return (is_thing[:, 1:] & is_thing[:, :-1] & (segments[:, 1:] != segments[:, :-1])).any()

    assert np.mean([objects_touch(sample) for sample in panoptic]) > 0.6


def test_a_scene_looks_alike_at_any_size():
    small, large = (GeneratedScenes(1, seed=2, image_size=size)[0]["image"] for size in ((64, 96), (256, 384)))
    difference = np.abs(np.asarray(small, dtype=int) - np.asarray(large.resize(small.size, Image.Resampling.BOX)))
    assert difference.mean() < 16


@pytest.mark.parametrize(("shape", "area"), [*zip(SHAPES, (3.1416, 2.0306, 3.0976, 2.6075, 2.7936), strict=True)])
def test_a_shape_covers_its_area(shape, area):
    y, x = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    distance = shape(y, x)
    assert (distance < 0).mean() * 9 == pytest.approx(area, rel=0.02)  # the grid resolves outlines to half a percent
    assert np.abs(np.diff(distance, axis=0)).max() <= 3 / 599 * 1.001  # a distance changes no faster than the place


def test_colour_alone_does_not_tell_the_classes_apart():
    score = color_classifier_mean_iou(GeneratedScenes(40, seed=0), GeneratedScenes(20, seed=1), len(CLASS_NAMES))
    assert score < 0.2


def flat_sample(colors, labels):
    image = Image.fromarray(np.array([[(color, 0, 0) for color in colors]], dtype=np.uint8))
    return {"image": image, "segmentation_map": np.array([labels]), "name": "flat"}


def test_the_colour_classifier_is_perfect_where_colour_decides():
    sample = flat_sample([10, 100, 200], [0, 1, 2])
    assert color_classifier_mean_iou([sample], [sample], num_labels=3) == 1


def test_the_colour_classifier_leaves_out_ignored_pixels_and_absent_classes():
    train, val = flat_sample([10, 100, 200], [0, 1, 255]), flat_sample([10, 10, 10], [0, 0, 255])
    assert color_classifier_mean_iou([train], [val], num_labels=5) == 1


def test_the_colour_classifier_takes_the_better_weighting():
    # Colour 10 is 3 of 4 pixels of class 0 and 2 of 2 of class 1. By frequency it is class 0: IoU 1/4 and 0 on val.
    # With classes all alike it is class 1: IoU 0 and 3/4.
    train = [flat_sample([10, 10, 10, 10, 10, 200], [0, 0, 0, 1, 1, 0])]
    val = [flat_sample([10, 10, 10, 10], [0, 1, 1, 1])]
    assert color_classifier_mean_iou(train, val, num_labels=2) == pytest.approx(0.375)


def test_the_colour_classifier_refuses_labels_out_of_range():
    with pytest.raises(ValueError, match="flat contains label 7, but labels are 0 to 2"):
        color_classifier_mean_iou([flat_sample([0], [7])], [], num_labels=3)


def test_the_colour_classifier_refuses_samples_without_labels():
    with pytest.raises(ValueError, match="no labelled pixel"):
        color_classifier_mean_iou([flat_sample([0], [0])], [flat_sample([0], [255])], num_labels=3)


def test_written_scenes_read_back_as_drawn(root):
    scenes = GeneratedScenes(5, seed=5, image_size=(64, 80))
    for split, indices in (("val", range(2)), ("train", range(2, 5))):
        names = [scenes[index]["name"] for index in indices]
        for folder in ("images", "annotations", "panoptic"):
            assert sorted(path.stem for path in (root / folder / split).iterdir()) == names
        for index, name in zip(indices, names, strict=True):
            image, label_map = arrays(scenes[index])
            np.testing.assert_array_equal(Image.open(root / "images" / split / f"{name}.png"), image)
            annotation = Image.open(root / "annotations" / split / f"{name}.png")
            assert annotation.mode == "L"
            np.testing.assert_array_equal(annotation, label_map)


def test_written_classes_list_names_and_things(root):
    classes = json.loads((root / "classes.json").read_text())
    assert classes["id2label"] == {str(label): name for label, name in enumerate(CLASS_NAMES)}
    assert classes["ignore_index"] == 255
    assert classes["thing_ids"] == list(THING_IDS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_panoptic_descriptions_agree_with_the_pictures(root, split):
    panoptic = json.loads((root / f"panoptic_{split}.json").read_text())
    assert [category["isthing"] for category in panoptic["categories"]] == [0, 0, 0, 1, 1, 1, 1, 1]
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        assert annotation["image_id"] == image["id"]
        assert (image["height"], image["width"]) == (64, 80)
        colors = np.asarray(Image.open(root / "panoptic" / split / annotation["file_name"])).astype(int)
        segment_map = colors @ [1, 256, 65536]
        label_map = np.asarray(Image.open(root / "annotations" / split / image["file_name"]))
        assert {info["id"] for info in annotation["segments_info"]} == set(np.unique(segment_map).tolist())
        for info in annotation["segments_info"]:
            mask = segment_map == info["id"]
            left, top, width, height = info["bbox"]
            assert mask.sum() == mask[top : top + height, left : left + width].sum() == info["area"]
            assert mask[top].any()
            assert mask[top + height - 1].any()
            assert mask[:, left].any()
            assert mask[:, left + width - 1].any()
            assert np.unique(label_map[mask]).tolist() == [info["category_id"]]
            assert info["iscrowd"] == 0


def test_a_folder_in_use_is_not_written_to(root):
    with pytest.raises(FileExistsError, match="is not empty"):
        write_generated_scenes(root, num_train=1, num_val=1)


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="no scene 2: this data set has scenes 0 to 1"):
        GeneratedScenes(2)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scenes": -1}, "num_scenes is -1"),
        ({"num_scenes": 1, "seed": -2}, "seed is -2"),
        ({"num_scenes": 1, "image_size": (128, 32)}, r"image_size is \(128, 32\)"),
        ({"num_scenes": 1, "task": "instance"}, "task is 'instance'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneratedScenes(**arguments)


def test_each_colour_is_given_its_most_frequent_class_where_that_is_best():
    colors = [0] * 15 + [100] * 10 + [200] * 4
    labels = [0] * 10 + [1] * 5 + [0] * 10 + [1] * 4
    image = Image.fromarray(np.array([[(red, 0, 0) for red in colors]], dtype=np.uint8))
    sample = {"image": image, "segmentation_map": np.array([labels]), "name": "a"}
    assert color_classifier_mean_iou([sample], [sample], 2) == pytest.approx((20 / 25 + 4 / 9) / 2)
