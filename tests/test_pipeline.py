"""transformers' own pipeline with our objects, and the adapted one."""

import logging
import warnings

import numpy as np
import pytest
import torch
from models import tiny_model
from PIL import Image
from transformers import pipeline

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation.pipeline import MaskFormerPipeline

THRESHOLDS = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (50, 30), (40, 60))
    ]


def processor(**settings) -> MaskFormerImageProcessor:
    return MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 200}, **settings)


def segmenter(**settings) -> MaskFormerPipeline:
    return pipeline(
        "image-segmentation",
        model=tiny_model().eval(),
        image_processor=processor(**settings),
        pipeline_class=MaskFormerPipeline,
        device="cpu",
    )


@pytest.mark.parametrize("subtask", [None, "panoptic", "instance", "semantic"])
def test_the_stock_pipeline_takes_our_objects_without_a_word(subtask, caplog, recwarn):
    warnings.simplefilter("always")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        segment = pipeline("image-segmentation", model=tiny_model().eval(), image_processor=processor(), device="cpu")
        results = segment(images(), subtask=subtask, threshold=0.0)
    assert not caplog.records
    assert not recwarn.list
    assert [{segment["mask"].size for segment in segments} for segments in results] == [
        {image.size} for image in images()
    ]


def test_a_segment_has_mask_label_score_box_and_area():
    segments = segmenter(segmentation_task="instance")(images()[0], threshold=0.0)
    assert segments
    for segment in segments:
        mask = np.asarray(segment["mask"])
        assert mask.shape == (40, 60)
        rows, columns = np.nonzero(mask == 255)
        box = {"xmin": columns.min(), "ymin": rows.min(), "xmax": columns.max() + 1, "ymax": rows.max() + 1}
        assert segment["box"] == box
        assert segment["area"] == len(rows)
        assert segment["label"].startswith("LABEL_")
        assert 0 < segment["score"] <= 1


def test_the_task_of_the_image_processor_is_done_unless_another_is_asked_for():
    segment, image = segmenter(segmentation_task="panoptic", label_ids_to_fuse=range(4)), images()[0]
    panoptic = segment(image, **THRESHOLDS)
    labels = [entry["label"] for entry in panoptic]
    assert len(labels) == len(set(labels))  # each stuff class once
    assert sum(entry["area"] for entry in panoptic) <= 40 * 60
    semantic = segment(image, subtask="semantic")
    assert sum(entry["area"] for entry in semantic) == 40 * 60
    segment.image_processor.segmentation_task = None
    assert [entry["area"] for entry in segment(image)] == [entry["area"] for entry in semantic]


def test_a_semantic_segment_scores_like_its_label_in_its_pixels():
    segment, image = segmenter(), images()[0]
    inputs = segment.image_processor(image)
    with torch.no_grad():
        outputs = segment.model(**inputs)
    (result,) = segment.image_processor.post_process_semantic_segmentation(outputs, [(40, 60)], True, mode="fast")
    for entry in segment(image):
        label = segment.model.config.label2id[entry["label"]]
        expected = result.segmentation_scores[label][torch.from_numpy(np.array(entry["mask"])) > 0].mean()
        assert entry["score"] == pytest.approx(expected.item(), abs=0.02)  # nearest point instead of bilinear


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_images_of_any_sizes_go_through_in_batches(task):
    segment = segmenter(segmentation_task=task)
    together = segment(images(), batch_size=1, threshold=0.0)
    in_batches = segment(images(), batch_size=2, threshold=0.0)
    assert [len(segments) for segments in together[2:]] == [len(segments) for segments in in_batches[2:]]
    assert [{entry["mask"].size for entry in segments} for segments in in_batches] == [
        {image.size} for image in images()
    ]


def test_a_generator_is_read_one_batch_ahead_at_most():
    read = []

    def photographs():
        for number in range(6):
            read.append(number)
            yield images()[0]

    results = segmenter()(photographs(), batch_size=2)
    next(results)
    assert len(read) == 2
    assert len(list(results)) == 5


def test_a_progress_bar_counts_images(capsys):
    segmenter()(images(), batch_size=2, progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_an_unknown_subtask_is_refused():
    with pytest.raises(ValueError, match="subtask is 'boxes'; give one of semantic, instance, panoptic"):
        segmenter()(images()[0], subtask="boxes")
