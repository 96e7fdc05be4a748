"""Post-processing of random images against slow, obvious implementations."""

import pytest
import reference_post_processing as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_maskformer import post_processing_maskformer_tiles
from hf_maskformer.post_processing_maskformer import panoptic_segmentation, semantic_scores, semantic_segmentation
from hf_maskformer.post_processing_maskformer_instance import instance_segmentation

SEEDS = st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["paper", "direct", "fast"])
THRESHOLDS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8])
MASK_THRESHOLDS = st.sampled_from([0.2, 0.5, 0.7])
FEW = settings(max_examples=100, deadline=None)
MANY = settings(max_examples=3000, deadline=None)


def check_semantic(seed, mode):
    case = reference.random_case(seed)
    scores = reference.semantic(case, mode)
    sizes = case.image_size, case.padded_size, case.target_size
    found = semantic_scores(case.class_logits, case.mask_logits, *sizes, mode)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)
    (label_map,) = semantic_segmentation(*case.batch(), [case.target_size], mode)
    loss = scores.amax(0) - scores.gather(0, label_map[None])[0]
    assert (loss <= reference.NEAR_TIE * (1 + scores.amax(0))).all()


def check_panoptic(seed, threshold, mask_threshold, overlap):
    case = reference.random_case(seed)
    stuff = {0, 2}
    expected = reference.panoptic(case, threshold, mask_threshold, overlap, stuff)
    assume(expected.is_clear)
    (found,) = panoptic_segmentation(
        *case.batch(), threshold, mask_threshold, overlap, stuff, target_sizes=[case.target_size]
    )
    assert torch.equal(found["segmentation"], expected.segmentation)
    assert [(entry["id"], entry["label_id"]) for entry in found["segments_info"]] == expected.segments


def check_instances(seed, threshold, mask_threshold, top_k, min_area):
    case = reference.random_case(seed)
    expected = reference.instances(case, threshold, mask_threshold, top_k, min_area)
    assume(expected.is_clear)
    options = {"target_sizes": [case.target_size], "top_k": top_k, "min_area": min_area}
    (found,) = instance_segmentation(*case.batch(), threshold, mask_threshold, form="masks", **options)
    assert found["segmentation"].shape == (len(expected.masks), *case.target_size)
    assert all(map(torch.equal, found["segmentation"], expected.masks))
    assert [entry["label_id"] for entry in found["segments_info"]] == expected.labels
    assert [entry["score"] for entry in found["segments_info"]] == pytest.approx(expected.scores, abs=1e-5)
    (encoded,) = instance_segmentation(*case.batch(), threshold, mask_threshold, form="rle", **options)
    assert encoded["segments_info"] == found["segments_info"]
    assert all(each["size"] == list(case.target_size) for each in encoded["segmentation"])
    coco = pytest.importorskip("pycocotools.mask")
    assert all(
        map(torch.equal, map(torch.from_numpy, map(coco.decode, encoded["segmentation"])), found["segmentation"])
    )
    (painted,) = instance_segmentation(*case.batch(), threshold, mask_threshold, **options)
    assert torch.equal(painted["segmentation"], expected.id_map(case.target_size))


@FEW
@given(SEEDS, MODES)
def test_semantic_equals_the_reference(seed, mode):
    check_semantic(seed, mode)


@FEW
@given(SEEDS, THRESHOLDS, MASK_THRESHOLDS, THRESHOLDS)
def test_panoptic_equals_the_reference(seed, threshold, mask_threshold, overlap):
    check_panoptic(seed, threshold, mask_threshold, overlap)


@FEW
@given(SEEDS, THRESHOLDS, MASK_THRESHOLDS, st.integers(1, 12), st.integers(0, 30))
def test_instances_equal_the_reference(seed, threshold, mask_threshold, top_k, min_area):
    check_instances(seed, threshold, mask_threshold, top_k, min_area)


@pytest.mark.slow
@MANY
@given(SEEDS, MODES)
def test_semantic_equals_the_reference_in_thousands_of_cases(seed, mode):
    check_semantic(seed, mode)


@pytest.mark.slow
@MANY
@given(SEEDS, THRESHOLDS, MASK_THRESHOLDS, THRESHOLDS)
def test_panoptic_equals_the_reference_in_thousands_of_cases(seed, threshold, mask_threshold, overlap):
    check_panoptic(seed, threshold, mask_threshold, overlap)


@pytest.mark.slow
@MANY
@given(SEEDS, THRESHOLDS, MASK_THRESHOLDS, st.integers(1, 12), st.integers(0, 30))
def test_instances_equal_the_reference_in_thousands_of_cases(seed, threshold, mask_threshold, top_k, min_area):
    check_instances(seed, threshold, mask_threshold, top_k, min_area)


@pytest.mark.parametrize("mode", ["paper", "direct", "fast"])
def test_the_size_of_chunks_changes_no_result(mode, monkeypatch):
    cases = [reference.random_case(seed) for seed in range(12)]

    def results() -> list:
        found = []
        for case in cases:
            options = {"target_sizes": [(90, 110)]}
            found += semantic_segmentation(*case.batch(), mode=mode, **options)
            found += [result["segmentation"] for result in panoptic_segmentation(*case.batch(), 0.1, **options)]
            found += [result["segmentation"] for result in instance_segmentation(*case.batch(), 0.1, **options)]
        return found

    expected = results()
    monkeypatch.setattr(post_processing_maskformer_tiles, "_CHUNK_ON_CPU", 1)
    monkeypatch.setattr(post_processing_maskformer_tiles, "_FEWEST_TILES", 3)
    assert all(map(torch.equal, results(), expected))


@settings(max_examples=30, deadline=None)
@given(st.lists(SEEDS, min_size=2, max_size=3), MODES)
def test_a_batch_changes_no_result(seeds, mode):
    """Images of different sizes, padded to the size of the largest."""
    first = reference.random_case(seeds[0])
    cases = [
        reference.Case(
            first.class_logits.roll(index, 0),
            first.mask_logits.flip(-1) + index,
            tuple(max(1, side - 3 * index) for side in first.image_size),
            first.padded_size,
            reference.random_case(seed).target_size,
        )
        for index, seed in enumerate(seeds)
    ]
    targets = [case.target_size for case in cases]
    batch = [torch.cat(parts) for parts in zip(*(case.batch() for case in cases), strict=True)]
    semantic = semantic_segmentation(*batch, targets, mode)
    panoptic = panoptic_segmentation(*batch, threshold=0.1, target_sizes=targets)
    instances = instance_segmentation(*batch, threshold=0.1, target_sizes=targets)
    for index, case in enumerate(cases):
        assert torch.equal(semantic[index], semantic_segmentation(*case.batch(), targets[index : index + 1], mode)[0])
        for together, function in ((panoptic, panoptic_segmentation), (instances, instance_segmentation)):
            (alone,) = function(*case.batch(), threshold=0.1, target_sizes=targets[index : index + 1])
            assert torch.equal(together[index]["segmentation"], alone["segmentation"])
            assert together[index]["segments_info"] == alone["segments_info"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_gpu_gives_the_same_results(seed):
    case = reference.random_case(seed)
    expected = reference.panoptic(case, 0.1, 0.5, 0.3, {0}), reference.instances(case, 0.1, 0.5, 5, 1)
    assume(all(each.is_clear for each in expected))
    batch, options = [part.cuda() for part in case.batch()], {"target_sizes": [case.target_size]}
    (panoptic,) = panoptic_segmentation(*batch, 0.1, 0.5, 0.3, {0}, **options)
    assert torch.equal(panoptic["segmentation"].cpu(), expected[0].segmentation)
    (found,) = instance_segmentation(*batch, 0.1, 0.5, top_k=5, form="masks", **options)
    assert all(map(torch.equal, found["segmentation"].cpu(), expected[1].masks))
    scores = reference.semantic(case, "paper")
    (label_map,) = semantic_segmentation(*batch, **options)
    loss = scores.amax(0) - scores.gather(0, label_map[None].cpu())[0]
    assert (loss <= reference.NEAR_TIE * (1 + scores.amax(0))).all()
