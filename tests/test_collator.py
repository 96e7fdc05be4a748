"""The data collator: what it hands to the image processor and what it says when that fails."""

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize("error", [ValueError("label 7"), KeyError(7), TypeError("float")])
def test_a_failure_of_the_image_processor_names_the_samples(error):
    def failing_processor(**arguments):
        raise error

    with pytest.raises(ValueError, match=f"The batch of a, b cannot be built: .*{error.args[0]}") as caught:
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
    with pytest.raises(ValueError, match=r"no segmentation_map, name\. With Trainer, set remove_unused_columns=False"):
        MaskFormerDataCollator(MaskFormerImageProcessor())([{"image": None}])
