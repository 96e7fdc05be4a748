"""Instances worked out by hand."""

import math

import pytest
import torch

from hf_maskformer.post_processing_maskformer_inputs import split_batch
from hf_maskformer.post_processing_maskformer_instance import _find_instances, instance_segmentation

SKY, PERSON, NO_OBJECT = 0, 1, 2


def class_logits(*labels: int, confidence: float = 9.0) -> torch.Tensor:
    """One image whose queries are almost sure of these labels: (1, Q, 3)."""
    return torch.eye(3)[list(labels)][None] * confidence


def mask_logits(*masks: list[list[int]]) -> torch.Tensor:
    """One image whose queries are almost sure of these 0/1 masks: (1, Q, h, w)."""
    return torch.tensor(masks)[None] * 20.0 - 10.0


def instances(classes: torch.Tensor, masks: torch.Tensor, **options) -> dict:
    """Instances of one unpadded image at the resolution of its mask logits."""
    size = torch.tensor([masks.shape[-2:]])
    return instance_segmentation(classes, masks, size, size, **options)[0]


def overlapping_instances() -> tuple[torch.Tensor, torch.Tensor]:
    """The second query is surer; the masks share two of their three pixels."""
    classes = torch.tensor([[[0.7, 0.1, 0.2], [0.05, 0.9, 0.05]]]).log()
    return classes, mask_logits([[1, 1, 1, 0]], [[0, 1, 1, 1]])


def test_instances_overlap_and_come_surest_first():
    result = instances(*overlapping_instances(), form="masks")
    assert result["segmentation"].int().tolist() == [[[0, 1, 1, 1]], [[1, 1, 1, 0]]]
    assert [(entry["id"], entry["label_id"]) for entry in result["segments_info"]] == [(1, PERSON), (2, SKY)]
    assert [entry["score"] for entry in result["segments_info"]] == pytest.approx([0.9, 0.7], abs=1e-4)


def test_the_score_of_a_large_instance_is_as_exact_as_that_of_a_small_one():
    masks = torch.full((1, 1, 256, 512), -0.2)
    size = torch.tensor([[1024, 2048]])
    options = {"mask_threshold": 0.4, "threshold": 0.0}
    (result,) = instance_segmentation(torch.tensor([[[30.0, 0.0]]]), masks, size, size, **options)
    assert result["segments_info"][0]["score"] == pytest.approx(1 / (1 + math.exp(0.2)), abs=1e-6)


def test_in_an_id_map_the_surest_instance_lies_on_top():
    result = instances(*overlapping_instances())
    assert result["segmentation"].tolist() == [[2, 1, 1, 1]]
    assert result["segmentation"].dtype == torch.int32


def test_an_instance_that_shows_too_little_leaves_the_id_map_if_asked_for():
    hidden = instances(*overlapping_instances(), overlap_mask_area_threshold=0.5)
    assert hidden["segmentation"].tolist() == [[0, 1, 1, 1]]
    assert len(hidden["segments_info"]) == 1
    shown = instances(*overlapping_instances(), overlap_mask_area_threshold=0.3)
    assert shown["segmentation"].tolist() == [[2, 1, 1, 1]]


def test_an_instance_that_shows_just_enough_stays_in_the_id_map():
    classes, masks = class_logits(SKY, PERSON), mask_logits([[1, 1, 0, 0]], [[0, 0, 1, 1]])
    assert instances(classes, masks, overlap_mask_area_threshold=1.0)["segmentation"].unique().tolist() == [1, 2]


def test_a_pixel_that_just_reaches_the_mask_threshold_is_part_of_the_mask():
    classes = torch.tensor([[[0.7, 0.1, 0.2]]]).log()
    for masks, expected in (([9.0, 0.0, -9.0], [True, True, False]), ([0.0, 0.0, 0.0], [True] * 3)):
        result = instances(classes, torch.tensor(masks).view(1, 1, 1, 3), threshold=0.1, form="masks")
        assert result["segmentation"].tolist() == [[expected]]


def test_an_instance_whose_score_is_the_threshold_is_found():
    classes, masks = torch.tensor([[[0.0, -200.0, 0.0]]]), torch.full((1, 1, 1, 2), 200.0)
    assert [entry["score"] for entry in instances(classes, masks, threshold=0.5)["segments_info"]] == [0.5]


def test_the_score_of_an_instance_is_that_of_its_label_times_the_mean_of_its_mask():
    classes = torch.tensor([[[0.8, 0.1, 0.1]]]).log()
    masks = torch.logit(torch.tensor([[[[0.9, 0.6, 0.2]]]]))
    assert instances(classes, masks)["segments_info"][0]["score"] == pytest.approx(0.8 * 0.75)
    surer = instances(classes, masks, mask_threshold=0.7)
    assert surer["segments_info"][0]["score"] == pytest.approx(0.8 * 0.9)
    assert surer["segmentation"].tolist() == [[1, 0, 0]]
    assert instances(classes, masks, threshold=0.61)["segments_info"] == []


def test_two_labels_of_one_query_are_two_instances_of_one_mask():
    classes = torch.tensor([[[0.5, 0.4, 0.1]]]).log()
    result = instances(classes, mask_logits([[1, 0]]), threshold=0.3, top_k=2, form="masks")
    assert [entry["label_id"] for entry in result["segments_info"]] == [SKY, PERSON]
    assert result["segmentation"].int().tolist() == [[[1, 0]], [[1, 0]]]
    assert len(instances(classes, mask_logits([[1, 0]]), threshold=0.3)["segments_info"]) == 1


def test_a_mask_is_kept_once_for_all_labels_of_its_query():
    classes = torch.randn(1, 2, 51, generator=torch.Generator().manual_seed(0))
    masks = mask_logits([[1, 0, 0]], [[0, 1, 1]])
    (image,) = split_batch(classes, masks, torch.tensor([[1, 3]]), torch.tensor([[1, 3]]), None)
    found = _find_instances(image, threshold=0.0, mask_threshold=0.5, top_k=100, min_area=1)
    assert len(found.scores) == 100
    assert len(found.pixels) == 2  # of one tile each
    best = classes[0].softmax(-1)[:, :-1].amax(1)
    owners = found.owners()[0]
    assert torch.allclose(found.scores[owners], best[[0, 1, 1]], atol=1e-4)
    assert sorted(found.masks()[:, 0].int().tolist()) == [[0, 1, 1]] * 50 + [[1, 0, 0]] * 50


@pytest.mark.parametrize("top_k", [0, -1, 2.5])
def test_no_candidates_are_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}; give a whole number of at least 1"):
        instances(*overlapping_instances(), top_k=top_k)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'rel'; give one of id_map, masks, rle"):
        instances(*overlapping_instances(), form="rel")


def test_small_instances_are_left_out():
    classes, masks = class_logits(PERSON, PERSON), mask_logits([[1, 1, 0]], [[0, 0, 1]])
    assert len(instances(classes, masks)["segments_info"]) == 2
    assert instances(classes, masks, min_area=2)["segmentation"].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(("form", "empty"), [("id_map", [[0, 0]]), ("masks", []), ("rle", [])])
def test_without_any_instance_there_is_nothing_but_void(form, empty):
    for classes, masks in (
        (class_logits(NO_OBJECT), mask_logits([[1, 1]])),
        (class_logits(PERSON), mask_logits([[0, 0]])),
    ):
        result = instances(classes, masks, form=form)
        assert result["segments_info"] == []
        found = result["segmentation"]
        assert (found if form == "rle" else found.tolist()) == empty
