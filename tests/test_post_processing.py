"""Post-processing against the stored results of the paper's own implementation, and on cases worked out by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.maskformer.image_processing_pil_maskformer import (
    MaskFormerImageProcessorPil as StockImageProcessor,
)

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from hf_maskformer.post_processing_maskformer import panoptic_segmentation, semantic_scores, semantic_segmentation
from hf_maskformer.post_processing_maskformer_instance import instance_segmentation

FIXTURES = Path(__file__).parent / "fixtures"
SKY, PERSON, NO_OBJECT = 0, 1, 2


def class_logits(*labels: int, confidence: float = 9.0) -> torch.Tensor:
    """One image whose queries are almost sure of these labels: (1, Q, 3)."""
    return torch.eye(3)[list(labels)][None] * confidence


def mask_logits(*masks: list[list[int]]) -> torch.Tensor:
    """One image whose queries are almost sure of these 0/1 masks: (1, Q, h, w)."""
    return torch.tensor(masks)[None] * 20.0 - 10.0


def sizes(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows)


def panoptic(classes: torch.Tensor, masks: torch.Tensor, **options) -> dict:
    """Panoptic segmentation of one unpadded image at the resolution of its mask logits."""
    size = sizes(tuple(masks.shape[-2:]))
    return panoptic_segmentation(classes, masks, size, size, **options)[0]


def mixed_batch() -> tuple[torch.Tensor, ...]:
    """Three images of different sizes in one padded batch, with smooth random logits."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(3, 10, 6, generator=generator) * 3
    masks = torch.randn(3, 10, 8, 12, generator=generator) * 5
    return classes, masks, sizes((32, 48), (20, 40), (31, 17)), sizes((32, 48), (32, 48), (32, 48))


def stored_numbers(variant: str) -> tuple[dict[str, torch.Tensor], dict]:
    folder = FIXTURES / variant
    return load_file(folder / "arrays.safetensors"), json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("variant", ["resnet_semantic", "swin_semantic"])
@pytest.mark.parametrize("index", [0, 1])
def test_semantic_scores_equal_the_original(variant, index):
    arrays, meta = stored_numbers(variant)
    logits = arrays["eval.pred_logits"][index], arrays["eval.pred_masks"][index]
    scores = semantic_scores(
        *logits, tuple(meta["image_sizes"][index]), tuple(meta["padded_size"]), tuple(meta["out_sizes"][index])
    )
    torch.testing.assert_close(scores, arrays[f"result_{index}.sem_seg"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["resnet_semantic", "swin_semantic"])
def test_semantic_maps_equal_the_original(variant):
    arrays, meta = stored_numbers(variant)
    maps = semantic_segmentation(
        arrays["eval.pred_logits"],
        arrays["eval.pred_masks"],
        torch.tensor(meta["image_sizes"]),
        torch.tensor([meta["padded_size"]] * 2),
        target_sizes=meta["out_sizes"],
    )
    for index, label_map in enumerate(maps):
        assert_equal_but_for_ties(label_map, arrays[f"result_{index}.sem_seg"])


@pytest.mark.parametrize("variant", ["resnet_semantic", "swin_semantic"])
def test_an_image_whose_sides_divide_by_nothing_equals_the_original(variant):
    arrays, meta = stored_numbers(variant)
    maps = semantic_segmentation(
        arrays["odd.pred_logits"],
        arrays["odd.pred_masks"],
        torch.tensor([arrays["odd.image"].shape[-2:]]),
        torch.tensor([arrays["odd.pixel_values"].shape[-2:]]),
        target_sizes=[tuple(meta["odd_out_size"])],
    )
    assert_equal_but_for_ties(maps[0], arrays["odd.sem_seg"])


def assert_equal_but_for_ties(label_map: torch.Tensor, stored_scores: torch.Tensor) -> None:
    best, second = stored_scores.topk(2, dim=0).values
    is_clear = best - second > 1e-4  # ten times what the scores themselves may differ by
    assert is_clear.float().mean() > 0.99
    assert torch.equal(label_map[is_clear], stored_scores.argmax(dim=0)[is_clear])


@pytest.mark.parametrize("case", range(8))
def test_panoptic_maps_equal_the_original(case):
    arrays, meta = stored_numbers("resnet_panoptic_enc")
    expected = meta["panoptic"][case]
    index = expected["image"]
    stuff = set(range(13)) - set(meta["things"])
    result = panoptic_segmentation(
        arrays["eval.pred_logits"],
        arrays["eval.pred_masks"],
        torch.tensor(meta["image_sizes"]),
        torch.tensor([meta["padded_size"]] * 2),
        threshold=expected["object_mask_threshold"],
        overlap_mask_area_threshold=expected["overlap_threshold"],
        label_ids_to_fuse=stuff,
        target_sizes=meta["out_sizes"],
    )[index]
    stored = arrays[f"result_{index}.panoptic_seg_{expected['thr_index']}"]
    assert (result["segmentation"] != stored).sum() <= expected["near_tie_pixels(<1e-4)"]
    found = [(entry["id"], entry["label_id"], entry["was_fused"]) for entry in result["segments_info"]]
    assert found == [(entry["id"], entry["category_id"], not entry["isthing"]) for entry in expected["segments_info"]]


def test_scores_sum_label_times_mask_probability_over_queries():
    classes = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    masks = torch.logit(torch.tensor([[[0.8]], [[0.4]]]))
    scores = semantic_scores(classes, masks, (1, 1), (1, 1))
    # label 0: 0.5 x 0.8 + 0.25 x 0.4, label 1: 0.25 x 0.8 + 0.25 x 0.4; "no object" scores nothing
    torch.testing.assert_close(scores, torch.tensor([[[0.5]], [[0.3]]]))


def test_semantic_maps_have_the_size_of_the_image_unless_told_otherwise():
    batch = mixed_batch()
    assert [tuple(label_map.shape) for label_map in semantic_segmentation(*batch)] == [(32, 48), (20, 40), (31, 17)]
    targets = [(5, 6), (64, 64), (1, 1)]
    maps = semantic_segmentation(*batch, target_sizes=targets)
    assert [tuple(label_map.shape) for label_map in maps] == targets
    assert {label_map.dtype for label_map in maps} == {torch.int64}


def test_padding_is_cropped_before_resizing():
    # The image is the left half of the padded input; its own left half is sky, its right half a person.
    classes = class_logits(SKY, PERSON)
    masks = mask_logits([[1, 0, 0, 0]] * 4, [[0, 1, 0, 0]] * 4)
    image_size, padded_size = sizes((16, 8)), sizes((16, 16))
    expected = [[SKY] * 4 + [PERSON] * 4] * 8
    label_map = semantic_segmentation(classes, masks, image_size, padded_size, target_sizes=[(8, 8)])[0]
    assert label_map.tolist() == expected
    result = panoptic_segmentation(classes, masks, image_size, padded_size, target_sizes=[(8, 8)])[0]
    assert result["segmentation"].tolist() == [[1] * 4 + [2] * 4] * 8


def test_an_image_gets_the_same_result_alone_and_in_a_batch():
    classes, masks, image_sizes, padded_sizes = mixed_batch()
    targets = [(40, 50), (20, 40), (13, 29)]
    options = {"threshold": 0.1, "overlap_mask_area_threshold": 0.3, "label_ids_to_fuse": {0, 1}}
    together = semantic_segmentation(classes, masks, image_sizes, padded_sizes, targets)
    panoptic_together = panoptic_segmentation(
        classes, masks, image_sizes, padded_sizes, target_sizes=targets, **options
    )
    for index in range(3):
        one = slice(index, index + 1)
        batch = classes[one], masks[one], image_sizes[one], padded_sizes[one]
        assert torch.equal(semantic_segmentation(*batch, targets[one])[0], together[index])
        alone = panoptic_segmentation(*batch, target_sizes=targets[one], **options)[0]
        assert torch.equal(alone["segmentation"], panoptic_together[index]["segmentation"])
        assert alone["segments_info"] == panoptic_together[index]["segments_info"]
    assert any(result["segments_info"] for result in panoptic_together)


def test_a_fused_label_that_reappears_keeps_its_one_id_and_entry():
    columns = [[[int(column == query) for column in range(4)]] for query in range(4)]
    result = panoptic(class_logits(SKY, PERSON, SKY, PERSON), mask_logits(*columns), label_ids_to_fuse={SKY})
    assert result["segmentation"].tolist() == [[1, 2, 1, 3]]
    entries = [(entry["id"], entry["label_id"], entry["was_fused"]) for entry in result["segments_info"]]
    assert entries == [(1, SKY, True), (2, PERSON, False), (3, PERSON, False)]


def test_labels_that_are_not_fused_keep_one_segment_per_query():
    result = panoptic(class_logits(SKY, SKY), mask_logits([[1, 0]], [[0, 1]]))
    assert result["segmentation"].tolist() == [[1, 2]]
    assert [entry["was_fused"] for entry in result["segments_info"]] == [False, False]


def test_the_score_of_a_fused_segment_weighs_each_query_by_the_pixels_it_won():
    # Both masks have three pixels; the surer query wins the two that they share.
    classes = torch.tensor([[[0.9, 0.05, 0.05], [0.6, 0.2, 0.2]]]).log()
    masks = mask_logits([[1, 1, 1, 0]], [[0, 1, 1, 1]])
    fused = panoptic(classes, masks, overlap_mask_area_threshold=0.3, label_ids_to_fuse=[SKY])["segments_info"]
    assert [entry["score"] for entry in fused] == pytest.approx([(3 * 0.9 + 0.6) / 4])
    separate = panoptic(classes, masks, overlap_mask_area_threshold=0.3)["segments_info"]
    assert [entry["score"] for entry in separate] == pytest.approx([0.9, 0.6])


def test_among_equal_queries_the_first_wins():
    mask = [[1, 1, 0, 0]]
    result = panoptic(class_logits(PERSON, SKY, SKY), mask_logits(mask, mask, [[0, 0, 1, 1]]))
    assert result["segmentation"].tolist() == [[1, 1, 2, 2]]
    assert [entry["label_id"] for entry in result["segments_info"]] == [PERSON, SKY]


def test_a_kept_query_is_surer_than_the_threshold():
    classes = torch.tensor([[[0.0, 0.0, -200.0]]])  # sky and person at exactly 0.5
    assert panoptic(classes, mask_logits([[1, 1]]), threshold=0.5)["segments_info"] == []
    assert len(panoptic(classes, mask_logits([[1, 1]]), threshold=0.49)["segments_info"]) == 1


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_without_any_segment_everything_is_void(threshold):
    labels = (NO_OBJECT, NO_OBJECT) if threshold < 1 else (SKY, PERSON)
    result = panoptic(class_logits(*labels), mask_logits([[1, 0]], [[0, 1]]), threshold=threshold)
    assert result["segmentation"].tolist() == [[0, 0]]
    assert result["segmentation"].dtype == torch.int32
    assert result["segments_info"] == []


def test_a_query_that_wins_too_little_of_its_mask_leaves_its_pixels_void():
    # The second query wins 1 of the 4 pixels of its mask; the first, surer of its label, takes the other 3.
    classes = torch.tensor([[[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]]]).log()
    masks = mask_logits([[1, 1, 1, 0]], [[1, 1, 1, 1]])
    assert panoptic(classes, masks, overlap_mask_area_threshold=0.3)["segmentation"].tolist() == [[1, 1, 1, 0]]
    assert panoptic(classes, masks, overlap_mask_area_threshold=0.25)["segmentation"].tolist() == [[1, 1, 1, 2]]


def test_a_pixel_that_just_reaches_the_mask_threshold_is_part_of_the_mask():
    classes = torch.tensor([[[0.7, 0.1, 0.2], [0.05, 0.9, 0.05]]]).log()
    masks = torch.tensor([[[[9.0, 0.0, 0.0, 0.0, -9.0]], [[-9.0, 9.0, 9.0, 9.0, 9.0]]]])
    # The first wins one of the four pixels of its mask, of which three are at exactly 1/2.
    assert panoptic(classes, masks)["segmentation"].tolist() == [[0, 1, 1, 1, 1]]


def test_the_area_test_does_not_weigh_the_mask_by_the_label_score():
    # 0.6 x 0.7 lies below 0.5: weighed, the mask would have no pixel at all and the segment would vanish.
    classes = torch.tensor([[[0.6, 0.2, 0.2]]]).log()
    masks = torch.logit(torch.tensor([[[[0.7, 0.7]]]]))
    assert panoptic(classes, masks)["segmentation"].tolist() == [[1, 1]]
    assert panoptic(classes, masks, mask_threshold=0.75)["segmentation"].tolist() == [[0, 0]]


def test_scores_keep_no_graph():
    classes, masks, *_ = mixed_batch()
    assert not semantic_scores(classes[0].requires_grad_(), masks[0].requires_grad_(), (4, 4), (32, 48)).requires_grad


def test_autocast_changes_no_result():
    batch, targets = mixed_batch(), [(70, 90), (50, 40), (120, 30)]

    def results():
        yield from semantic_segmentation(*batch, targets)
        for function in (panoptic_segmentation, instance_segmentation):
            for result in function(*batch, 0.1, target_sizes=targets):
                yield result["segmentation"]
                yield torch.tensor([entry["score"] for entry in result["segments_info"]])

    expected = list(results())
    with torch.autocast("cpu", torch.bfloat16):
        found = list(results())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("function", [semantic_segmentation, panoptic_segmentation, instance_segmentation])
def test_logits_are_left_as_they_are(function):
    masks = torch.randn(1, 8, 12, 5).permute(0, 3, 1, 2)
    masks[0, 0, 0, 0] = torch.finfo(torch.float32).max
    before = masks.clone()
    function(torch.randn(1, 5, 4), masks, sizes((32, 48)), sizes((32, 48)))
    assert torch.equal(masks, before)


def test_half_precision_logits_are_computed_in_float32():
    classes, masks, *image_and_padded = mixed_batch()
    halves = classes.bfloat16(), masks.bfloat16()
    exact = [half.float() for half in halves]
    scores = semantic_scores(halves[0][0], halves[1][0], (32, 48), (32, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = semantic_scores(exact[0][0], exact[1][0], (32, 48), (32, 48))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, under_autocast)
    assert torch.equal(
        panoptic_segmentation(*halves, *image_and_padded, threshold=0.1)[1]["segmentation"],
        panoptic_segmentation(*exact, *image_and_padded, threshold=0.1)[1]["segmentation"],
    )


@pytest.mark.parametrize("function", [semantic_segmentation, panoptic_segmentation])
def test_target_sizes_that_do_not_fit_the_batch_are_refused(function):
    with pytest.raises(ValueError, match=r"2 entries, but the batch has 3 images"):
        function(*mixed_batch(), target_sizes=[(4, 4), (4, 4)])
    with pytest.raises(ValueError, match=r"target_sizes\[1\] is \(0, 4\)"):
        function(*mixed_batch(), target_sizes=[(4, 4), (0, 4), (4, 4)])
    for sizes in ((4, 4), [None] * 3, [(4, 4, 3)] * 3):
        with pytest.raises(ValueError, match=r"give a list with one \(height, width\) per image"):
            function(*mixed_batch(), target_sizes=sizes)


@pytest.mark.parametrize(
    "size", [(10.5, 20), (0, 5), (5, 0), (-1, 5), (5, -1), (2**16 + 1, 5), (5, 10**9), (math.inf, 2), (math.nan, 2), 5]
)
def test_a_size_that_no_image_has_is_refused(size):
    with pytest.raises(ValueError, match=r"target_sizes(\[0\])? is .*height"):
        semantic_segmentation(*mixed_batch(), target_sizes=[size] * len(mixed_batch()[0]))


@pytest.mark.parametrize("index", [0, 1])
def test_semantic_maps_of_a_panoptic_model_equal_the_original_in_direct_mode(index):
    arrays, meta = stored_numbers("resnet_panoptic_enc")
    label_map = semantic_segmentation(
        arrays["eval.pred_logits"],
        arrays["eval.pred_masks"],
        torch.tensor(meta["image_sizes"]),
        torch.tensor([meta["padded_size"]] * 2),
        target_sizes=meta["out_sizes"],
        mode="direct",
    )[index]
    assert_equal_but_for_ties(label_map, arrays[f"result_{index}.sem_seg"])


@pytest.mark.parametrize("mode", ["paper", "direct", "fast"])
def test_a_label_of_the_same_score_throughout_wins_only_where_no_other_is_above(mode):
    classes = torch.tensor([[[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]]])
    masks = torch.tensor([[[[0.0] * 4], [[-9.0, -3.0, 3.0, 9.0]]]])  # sky is 1/2 everywhere
    (label_map,) = semantic_segmentation(classes, masks, sizes((1, 4)), sizes((1, 4)), mode=mode)
    assert label_map.tolist() == [[SKY, SKY, PERSON, PERSON]]


def test_modes_differ_in_what_is_resized():
    # One label, one query, two grid points: the middle of the target shows in which order sigmoid and mean come.
    classes, masks = class_logits(SKY, confidence=50.0), torch.tensor([[[[8.0, 0.0]]]])
    shared = {"image_size": (4, 8), "padded_size": (4, 8), "target_size": (1, 4)}
    at = {logit: torch.sigmoid(torch.tensor(logit)).item() for logit in (8.0, 7.0, 6.0, 5.0, 3.0, 2.0, 1.0, 0.0)}
    fast = semantic_scores(classes[0], masks[0], **shared, mode="fast")[SKY, 0]
    step = (at[0.0] - at[8.0]) / 4
    assert fast.tolist() == pytest.approx([at[8.0], at[8.0] + step, at[8.0] + 3 * step, at[0.0]])
    direct = semantic_scores(classes[0], masks[0], **shared, mode="direct")[SKY, 0]
    assert direct.tolist() == pytest.approx([at[8.0], at[6.0], at[2.0], at[0.0]])
    paper = semantic_scores(classes[0], masks[0], **shared, mode="paper")[SKY, 0]
    assert paper.tolist() == pytest.approx([at[8.0], (at[7.0] + at[5.0]) / 2, (at[3.0] + at[1.0]) / 2, at[0.0]])


def test_an_unknown_mode_is_refused():
    classes, masks = torch.randn(1, 10, 6), torch.randn(1, 10, 8, 12)
    with pytest.raises(ValueError, match="mode is 'dierct'; give one of paper, direct, fast"):
        semantic_segmentation(classes, masks, sizes((32, 48)), sizes((32, 48)), mode="dierct")
    with pytest.raises(ValueError, match="mode is 'dierct'; give one of paper, direct, fast"):
        semantic_scores(classes[0], masks[0], (32, 48), (32, 48), mode="dierct")


def test_fast_mode_equals_transformers_where_nothing_is_padded():
    classes, masks = torch.randn(1, 10, 6) * 3, torch.randn(1, 10, 8, 12) * 5
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    (stock,) = StockImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(45, 61)])
    full = sizes((32, 48))
    assert torch.equal(semantic_segmentation(classes, masks, full, full, [(45, 61)], mode="fast")[0], stock)


def test_large_logits_are_finite_even_if_their_sum_is_not():
    classes, masks = class_logits(PERSON), torch.tensor([[[[3e38, 3e38]]]])
    assert panoptic(classes, masks)["segmentation"].tolist() == [[1, 1]]


@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, -1e300])
def test_masks_may_be_filled_with_the_largest_numbers_there_are(extreme):
    classes, masks = class_logits(SKY, PERSON, SKY, PERSON, SKY), torch.randn(1, 5, 20, 24).double()

    def results(value):
        masks[:, 1, :, :12] = value
        arguments = classes, masks, sizes((77, 90)), sizes((80, 96))
        options = {"target_sizes": [(101, 211)]}
        panoptic = panoptic_segmentation(*arguments, **options, overlap_mask_area_threshold=0.0)
        return semantic_segmentation(*arguments, **options)[0], panoptic[0]["segmentation"]

    for found, expected in zip(results(extreme), results(math.copysign(1e6, extreme)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("function", [semantic_segmentation, panoptic_segmentation, instance_segmentation])
def test_logits_that_are_not_finite_are_refused(function):
    classes, masks, *rest = mixed_batch()
    masks[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="The mask logits contain NaN or infinity"):
        function(classes, masks, *rest)
    with pytest.raises(ValueError, match="The class logits contain NaN"):
        function(classes * float("inf"), mixed_batch()[1], *rest)
    with pytest.raises(ValueError, match=r"class logits have shape \(3, 9, 6\)"):
        function(classes[:, 1:], mixed_batch()[1], *rest)


def every_result(batch, target_sizes):
    scores = [semantic_segmentation(*batch, target_sizes, mode) for mode in ("paper", "direct", "fast")]
    return (
        *(label_map for label_maps in scores for label_map in label_maps),
        *(result["segmentation"] for result in panoptic_segmentation(*batch, 0.1, target_sizes=target_sizes)),
        *(result["segmentation"] for result in instance_segmentation(*batch, 0.1, target_sizes=target_sizes)),
        semantic_scores(batch[0][0], batch[1][0], (32, 48), (32, 48), (70, 90)),
        *instance_segmentation(*batch, 0.1, target_sizes=target_sizes, form="rle"),
    )


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_results_do_not_depend_on_the_default_type_or_device(default):
    batch, targets = mixed_batch(), [(70, 90), (5, 4), (1200, 3)]
    expected = every_result(batch, targets)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        found = every_result(batch, targets)
    finally:
        torch.set_default_dtype(usual)
        torch.set_default_device(None)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("threshold", [None, "0.5", 1.5, -0.1, True, math.nan])
@pytest.mark.parametrize("function", [panoptic_segmentation, instance_segmentation])
@pytest.mark.parametrize("name", ["threshold", "mask_threshold"])
def test_a_threshold_that_is_no_probability_is_refused(function, threshold, name):
    with pytest.raises(ValueError, match=f"^{name} is .*; give a number from 0 to 1"):
        function(*mixed_batch(), **{name: threshold})


@pytest.mark.parametrize("label_ids", [["0", "1"], "01", "", 0, None])
def test_labels_to_fuse_that_are_no_integers_are_refused(label_ids):
    with pytest.raises(ValueError, match=r"^label_ids_to_fuse is .*; give a list of label ids"):
        panoptic_segmentation(*mixed_batch(), label_ids_to_fuse=label_ids)


@pytest.mark.parametrize("collection", [tuple, set, np.array, torch.tensor, dict.fromkeys])
def test_labels_to_fuse_may_come_in_any_collection(collection):
    result = panoptic(class_logits(SKY, SKY), mask_logits([[1, 0]], [[0, 1]]), label_ids_to_fuse=collection([SKY]))
    assert result["segmentation"].tolist() == [[1, 1]]
    assert [entry["was_fused"] for entry in result["segments_info"]] == [True]


@pytest.mark.parametrize("threshold", ["0.5", 1.5, -0.1, True, math.nan])
@pytest.mark.parametrize("function", [panoptic_segmentation, instance_segmentation])
def test_a_share_that_a_mask_has_to_show_is_one_from_0_to_1(function, threshold):
    with pytest.raises(ValueError, match=r"^overlap_mask_area_threshold is .*; give a number from 0 to 1"):
        function(*mixed_batch(), overlap_mask_area_threshold=threshold)


def test_a_processor_refuses_a_target_without_a_pixel():
    logits = {"class_queries_logits": torch.zeros(1, 2, 3), "masks_queries_logits": torch.zeros(1, 2, 8, 8)}
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=r"target_sizes\[0\] is"):
            MaskFormerImageProcessor().post_process_semantic_segmentation(
                MaskFormerForInstanceSegmentationOutput(**logits), target_sizes=[size]
            )
