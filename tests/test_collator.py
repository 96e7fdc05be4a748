"""The data collator: what it hands to the image processor and what it says when that fails."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

from hf_maskformer.data.collator import MaskFormerDataCollator
from hf_maskformer.image_processing_maskformer import MaskFormerImageProcessor


def make_sample(name, **more):
    return {"image": Image.new("RGB", (2, 1)), "segmentation_map": np.array([[0, 1]]), "name": name, **more}


class RecordingProcessor:
    """Keeps the arguments of its call."""

    def __call__(self, **arguments):
        self.arguments = arguments
        return {"pixel_values": torch.zeros(len(arguments["images"]), 3, 1, 2)}


def test_samples_are_handed_over_as_lists_with_targets_as_index_maps():
    processor = RecordingProcessor()
    samples = [make_sample("a"), make_sample("b")]
    batch = MaskFormerDataCollator(processor)(samples)
    assert batch["pixel_values"].shape == (2, 3, 1, 2)
    assert processor.arguments["images"] == [sample["image"] for sample in samples]
    assert processor.arguments["segmentation_maps"][1] is samples[1]["segmentation_map"]
    assert processor.arguments["instance_id_to_semantic_id"] is None
    assert processor.arguments["target_format"] == "segment_map"
    assert processor.arguments["return_tensors"] == "pt"


def test_id_tables_are_handed_over_when_all_samples_have_one():
    processor = RecordingProcessor()
    tables = [{0: 1, 1: 1}, {0: 2, 1: 3}]
    samples = [make_sample(name, instance_id_to_semantic_id=table) for name, table in zip("ab", tables, strict=True)]
    MaskFormerDataCollator(processor)(samples)
    assert processor.arguments["instance_id_to_semantic_id"] == tables


def test_samples_with_and_without_id_table_do_not_mix():
    samples = [make_sample("a", instance_id_to_semantic_id={0: 1}), make_sample("b")]
    with pytest.raises(ValueError, match="instance_id_to_semantic_id is missing in b but given"):
        MaskFormerDataCollator(RecordingProcessor())(samples)


@pytest.mark.parametrize(
    "samples", [[], {}, None, "abc", [None], [[make_sample("a")]], make_sample("a"), iter([make_sample("a")])]
)
def test_what_is_no_list_of_samples_is_refused(samples):
    with pytest.raises(ValueError, match=r"The batch is .*; pass a list of samples"):
        MaskFormerDataCollator(RecordingProcessor())(samples)


@pytest.mark.parametrize("error", [ValueError("label 7"), KeyError(7), TypeError("float")])
def test_a_failure_of_the_image_processor_names_the_sample(error):
    def failing_processor(**arguments):
        raise error

    with pytest.raises(ValueError, match=f"The batch of a cannot be built: .*{error.args[0]}") as caught:
        MaskFormerDataCollator(failing_processor)([make_sample("a"), make_sample("b")])
    assert caught.value.__cause__ is error


def test_a_real_batch_pads_images_and_numbers_segments():
    small = make_sample("small")
    large = small | {"image": Image.new("RGB", (3, 2)), "segmentation_map": np.array([[7, 7, 7], [255, 4, 4]])}
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0, ignore_index=255)
    batch = MaskFormerDataCollator(processor)([small, large])
    assert set(batch) == {"pixel_values", "pixel_mask", "mask_labels", "class_labels"}
    assert batch["pixel_values"].shape == (2, 3, 2, 3)
    assert batch["pixel_mask"][0].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert batch["mask_labels"].tolist() == [[[0, 1, -1], [-1, -1, -1]], [[1, 1, 1], [-1, 0, 0]]]
    assert [list(labels) for labels in batch["class_labels"]] == [[0, 1], [4, 7]]


def test_a_label_outside_the_classes_is_named_with_its_sample():
    processor = MaskFormerImageProcessor(num_labels=1)
    with pytest.raises(ValueError, match=r"The batch of street cannot be built: .*contains the value 1"):
        MaskFormerDataCollator(processor)([make_sample("street")])


def test_samples_whose_fields_the_trainer_removed_are_named():
    with pytest.raises(ValueError, match=r"no segmentation_map, name, but have image\. Open the data with a reader"):
        MaskFormerDataCollator(MaskFormerImageProcessor())([{"image": None}])


def make_masks(name, masks, labels, **more):
    masks = np.array(masks, dtype=bool)
    iscrowd = np.zeros(len(labels), dtype=bool)
    image = Image.new("RGB", masks.shape[:0:-1])
    return {"image": image, "masks": masks, "labels": np.array(labels), "iscrowd": iscrowd, "name": name, **more}


def collate(samples, **options):
    processor = MaskFormerImageProcessor(do_resize=False, size_divisor=0, ignore_index=255)
    return MaskFormerDataCollator(processor, **options)(samples)


def test_overlapping_masks_are_padded_like_their_images_and_their_labels_to_one_number():
    small = make_masks("small", [[[1, 1]], [[0, 1]]], [3, 5])
    large = make_masks("large", np.ones((1, 2, 3)), [0])
    batch = collate([small, large])
    assert [masks.dtype for masks in batch["mask_labels"]] == [torch.bool] * 2
    assert batch["mask_labels"][0].tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]
    assert batch["mask_labels"][1].tolist() == [[[1, 1, 1]] * 2]
    assert batch["class_labels"].tolist() == [[3, 5], [0, -100]]


def test_masks_and_maps_of_the_same_segments_give_the_same_targets():
    masks = make_masks("a", [[[1, 1, 0]], [[0, 0, 1]]], [4, 2])
    segmentation_map = {"segmentation_map": np.array([[256, 256, 257]]), "instance_id_to_semantic_id": {256: 4, 257: 2}}
    from_map = collate([{"image": masks["image"], "name": "a", **segmentation_map}], target_format="masks")
    from_masks = collate([masks])
    for name in ("mask_labels", "class_labels"):
        assert torch.equal(from_map[name][0], from_masks[name][0])


def test_masks_are_resized_with_their_image():
    processor = MaskFormerImageProcessor(size={"height": 4, "width": 8}, size_divisor=0)
    batch = MaskFormerDataCollator(processor)([make_masks("a", [[[1, 0]], [[0, 1]]], [0, 1])])
    assert batch["mask_labels"][0].float().mean(dim=1).tolist() == [[1] * 4 + [0] * 4, [0] * 4 + [1] * 4]


@pytest.mark.parametrize("convert", [np.array, list, lambda flags: np.array(flags, np.int64)])  # COCO writes 0 and 1
def test_masks_without_a_pixel_and_crowds_are_left_out_with_their_labels(convert):
    sample = make_masks("a", [[[1, 0]], [[0, 0]], [[0, 1]], [[1, 1]]], [1, 2, 3, 4])
    sample["iscrowd"] = convert([False, False, False, True])
    batch = collate([sample])
    assert batch["mask_labels"][0].tolist() == [[[1, 0]], [[0, 1]]]
    assert batch["class_labels"][0].tolist() == [1, 3]


def test_an_image_without_objects_has_empty_targets():
    batch = collate([make_masks("a", np.zeros((0, 2, 2)), [])])
    assert (batch["mask_labels"][0].shape, batch["class_labels"][0].shape) == ((0, 2, 2), (0,))


def test_crowds_of_a_map_and_segments_that_vanished_are_left_out():
    table = {256: 4, 257: 5, 258: 6}
    segmentation_map = np.array([[256, 257]], dtype=np.int32)
    sample = make_sample("a", instance_id_to_semantic_id=table, crowd_ids=(257,))
    batch = collate([sample | {"segmentation_map": segmentation_map}])
    assert batch["mask_labels"].tolist() == [[[0, -1]]]
    assert batch["class_labels"].tolist() == [[4]]
    assert segmentation_map.tolist() == [[256, 257]]


@pytest.mark.parametrize("ignore_index", [65535, -1])
def test_crowds_of_a_map_of_few_bits_are_ignored_by_any_value(ignore_index):
    segmentation_map = np.array([[255, 7], [9, 9]], dtype=np.uint8)
    sample = make_sample("a", instance_id_to_semantic_id={255: 0, 7: 1, 9: 0}, crowd_ids=(9,))
    sample |= {"image": Image.new("RGB", (2, 2)), "segmentation_map": segmentation_map}
    processor = MaskFormerImageProcessor(ignore_index=ignore_index, do_resize=False, size_divisor=0)
    batch = MaskFormerDataCollator(processor)([sample])
    assert batch["mask_labels"].tolist() == [[[1, 0], [-1, -1]]]
    assert batch["class_labels"].tolist() == [[1, 0]]


def test_crowds_need_a_value_to_be_ignored_by():
    sample = make_sample("a", instance_id_to_semantic_id={0: 1, 1: 1}, crowd_ids=(1,))
    with pytest.raises(ValueError, match=r"The batch of a cannot be built: there are crowds, but .* no ignore_index"):
        MaskFormerDataCollator(MaskFormerImageProcessor())([sample])


@pytest.mark.parametrize("masks_come_first", [False, True])
def test_masks_and_maps_do_not_mix(masks_come_first):
    samples = [make_sample("map"), make_masks("masks", [[[1, 0]]], [0])]
    with pytest.raises(ValueError, match=r"cannot share a batch: .* is missing in (map|masks)\."):
        collate(samples[::-1] if masks_come_first else samples)


def test_masks_without_labels_are_not_said_to_lie_beside_maps():
    sample = make_masks("a", [[[1, 0]]], [0])
    del sample["labels"]
    with pytest.raises(ValueError, match=r"^The samples have no labels, but have image, masks, iscrowd, name\."):
        collate([sample])


def test_masks_make_no_label_map():
    with pytest.raises(ValueError, match=r"masks may overlap, so they give no label_map"):
        collate([make_masks("a", [[[1, 0]]], [0])], target_format="label_map")


def test_the_image_processor_of_transformers_is_refused():
    with pytest.raises(ValueError, match="is a MaskFormerImageProcessorPil of transformers"):
        MaskFormerDataCollator(MaskFormerImageProcessorPil())


def test_masks_of_another_size_than_their_image_are_named():
    sample = make_masks("a", [[[1, 0]]], [0], image=Image.new("RGB", (5, 5)))
    with pytest.raises(ValueError, match=r"the masks of a have shape \(1, 1, 2\), but its image is 5 x 5"):
        collate([sample])


@pytest.mark.parametrize("label", [-1, 2])
def test_a_mask_whose_label_is_outside_the_classes_is_named(label):
    processor = MaskFormerImageProcessor(do_resize=False, num_labels=2)
    with pytest.raises(ValueError, match=rf"street has the labels \[{label}\], but num_labels is 2"):
        MaskFormerDataCollator(processor)([make_masks("street", [[[1, 0]]], [label])])


@pytest.mark.parametrize("sample", [make_sample("map"), make_masks("masks", [[[1, 0]]], [0])], ids=["map", "masks"])
def test_samples_that_were_brought_to_size_keep_it(sample):
    processor = MaskFormerImageProcessor(size={"height": 4, "width": 8}, size_divisor=0, ignore_index=255)
    assert MaskFormerDataCollator(processor)([sample])["pixel_values"].shape[2:] == (4, 8)
    batch = MaskFormerDataCollator(processor, do_resize=False)([sample])
    assert batch["pixel_values"].shape[2:] == batch["mask_labels"][0].shape[-2:] == (1, 2)


def test_a_class_of_ones_own_on_transformers_processor_is_refused_too():
    class Own(MaskFormerImageProcessorPil):
        pass

    with pytest.raises(ValueError, match="The image processor is a Own of transformers"):
        MaskFormerDataCollator(Own())
