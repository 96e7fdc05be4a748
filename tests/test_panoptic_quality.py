"""Panoptic quality against hand-worked cases, a slow obvious reading of the rules and stored reference values."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_maskformer import PanopticQuality

DATA = Path(os.environ.get("HF_MASKFORMER_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))

THING, STUFF = 0, 1


def image(segmentation, labels, crowd=()):
    """One image from rows of segment ids and the label of each id."""
    segments = [{"id": segment, "label_id": label, "iscrowd": segment in crowd} for segment, label in labels.items()]
    return {"segmentation": np.array(segmentation), "segments_info": segments}


VOID_IMAGE = image([[0, 0], [0, 0]], {})


def metric_of(prediction, reference, num_labels=2):
    metric = PanopticQuality(num_labels, thing_ids=[THING])
    metric.add(prediction=prediction, reference=reference)
    return metric


def test_counting_goes_on_outside_of_the_inference_mode_it_began_in():
    one = image([[1]], {1: THING})
    with torch.inference_mode():
        metric = metric_of(one, one)
    metric.add(prediction=one, reference=one)
    assert metric.totals.tolist() == [[2, 2, 0, 0], [0, 0, 0, 0]]


def counts(prediction, reference, label=THING):
    """IoU sum, true positives, false positives and false negatives of one label."""
    return metric_of(prediction, reference).totals[label].tolist()


def test_two_labels_worked_out_by_hand():
    # Thing: IoU 3 / 4. Stuff: one segment missed, one imagined at void's expense of none.
    prediction = image([[1, 1, 1, 2], [3, 3, 0, 0]], {1: THING, 2: STUFF, 3: THING})
    reference = image([[7, 7, 7, 7], [9, 9, 9, 9]], {7: THING, 9: STUFF})
    result = metric_of(prediction, reference).compute()
    assert result["per_category"][THING] == {
        "pq": 0.5,
        "sq": 0.75,
        "rq": pytest.approx(2 / 3),
        "tp": 1,
        "fp": 1,
        "fn": 0,
    }
    assert result["per_category"][STUFF] == {"pq": 0, "sq": 0, "rq": 0, "tp": 0, "fp": 1, "fn": 1}
    assert (result["pq_things"], result["pq_stuff"], result["pq"]) == (0.5, 0, 0.25)
    assert (result["sq_things"], result["sq_stuff"], result["sq"]) == (0.75, 0, 0.375)
    assert result["rq"] == pytest.approx(1 / 3)


def test_arrays_are_counted_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        perfect = image([[1, 1, 2, 2]], {1: THING, 2: STUFF})
        assert metric_of(perfect, perfect).compute()["pq"] == 1


def test_an_iou_of_one_half_is_no_match():
    reference = image([[1, 1, 0, 0]], {1: THING})
    assert counts(image([[1, 0, 0, 0]], {1: THING}), reference) == [0, 0, 1, 1]


def test_void_of_the_reference_is_not_part_of_the_union():
    # Three pixels of five lie outside void; with void the IoU would be 3 / 5.
    reference = image([[1, 1, 1, 0, 0]], {1: THING})
    assert counts(image([[4, 4, 4, 4, 4]], {4: THING}), reference) == [1, 1, 0, 0]


@pytest.mark.parametrize(("void", "false_positives"), [(2, 1), (3, 0)])
def test_a_prediction_with_more_than_half_of_it_in_void_is_no_false_positive(void, false_positives):
    reference = image([[0] * void + [2] * (4 - void) + [2] * 8], {2: STUFF})
    prediction = image([[1] * 4 + [0] * 8], {1: THING})
    assert counts(prediction, reference) == [0, 0, false_positives, 0]


@pytest.mark.parametrize(("crowd_label", "false_positives"), [(THING, 0), (STUFF, 1)])
def test_crowd_of_its_label_excuses_a_prediction_and_is_never_missed(crowd_label, false_positives):
    reference = image([[5, 5, 5, 5, 5, 6]], {5: crowd_label, 6: STUFF}, crowd=[5])
    assert counts(image([[1, 1, 1, 0, 0, 0]], {1: THING}), reference) == [0, 0, false_positives, 0]
    assert counts(VOID_IMAGE | {"segmentation": np.zeros((1, 6), int)}, reference, crowd_label)[3] == (
        crowd_label == STUFF
    )


def test_a_crowd_is_not_matched_even_by_a_prediction_that_equals_it():
    crowd = image([[1, 1]], {1: THING}, crowd=[1])
    assert counts(image([[1, 1]], {1: THING}), crowd) == [0, 0, 0, 0]


def test_void_and_crowd_excuse_together():
    reference = image([[0, 5, 6, 6, 6]], {5: THING, 6: STUFF}, crowd=[5])
    assert counts(image([[1, 1, 1, 0, 0]], {1: THING}), reference) == [0, 0, 0, 0]


def test_fused_stuff_is_one_segment_whatever_its_pieces():
    segmentation = [[3, 0, 3], [3, 0, 3]]
    assert counts(image(segmentation, {3: STUFF}), image(segmentation, {3: STUFF}), STUFF) == [1, 1, 0, 0]


def test_an_empty_prediction_misses_all_and_an_empty_reference_excuses_all():
    full = image([[1, 1], [2, 2]], {1: THING, 2: STUFF})
    assert metric_of(VOID_IMAGE, full).totals.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert metric_of(full, VOID_IMAGE).totals.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_labels_that_were_not_counted_are_left_out_of_the_means():
    same = image([[1, 1]], {1: THING})
    result = metric_of(same, same, num_labels=3).compute()
    assert result["pq"] == result["pq_things"] == 1
    assert math.isnan(result["pq_stuff"])
    assert math.isnan(result["per_category"][STUFF]["pq"])


@pytest.mark.parametrize("images", [[], [VOID_IMAGE]])
def test_nothing_counted_is_an_error(images):
    metric = PanopticQuality(2, [THING])
    metric.add_batch(predictions=images, references=images)
    with pytest.raises(ValueError, match="No segment was counted"):
        metric.compute()


def test_compute_starts_anew():
    same = image([[1]], {1: THING})
    metric = metric_of(VOID_IMAGE | {"segmentation": np.array([[0]])}, same)
    assert metric.compute()["pq"] == 0
    metric.add(prediction=same, reference=same)
    assert metric.compute()["pq"] == 1


@pytest.mark.parametrize(
    "convert", [torch.tensor, lambda x: x.astype(np.uint16), Image.fromarray, lambda x: x[:, ::-1]]
)
def test_maps_may_be_tensors_arrays_and_images(convert):
    reference = image([[2, 1, 2]], {1: THING, 2: STUFF})
    prediction = reference | {"segmentation": convert(reference["segmentation"].astype(np.uint8))}
    assert metric_of(prediction, reference).compute()["pq"] == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_the_highest_number_of_a_type_may_be_an_id(dtype):
    highest = 2 ** (8 * dtype.itemsize) - 1
    one = image([[0, highest]], {highest: THING})
    one["segmentation"] = torch.from_numpy(one["segmentation"]).to(dtype)
    assert metric_of(one, one).compute()["pq"] == 1


def test_what_memory_held_before_does_not_count(monkeypatch):
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 1, dtype))
    one = image(np.ones((1, 163), int), {1: THING})  # pixels that fill no whole number of words
    assert metric_of(one, one).compute()["pq"] == 1


def test_large_ids_as_coco_writes_them():
    same = image([[2**24 - 1, 5], [5, 0]], {2**24 - 1: THING, 5: STUFF})
    assert metric_of(same, same).compute()["pq"] == 1


BAD = {
    "contains id 2, which its segments_info does not list": image([[1, 2]], {1: THING}),
    "contains id -1, which": image([[1, -1]], {1: THING}),
    "lists segment 2, which has no pixel": image([[1, 1]], {1: THING, 2: STUFF}),
    r"Segment 1 of the .* has label 2, but there are 2 labels \(0 to 1\)": image([[1, 1]], {1: 2}),
    "lists a segment with id 0; ids count from 1": image([[0, 1]], {0: THING, 1: THING}),
    "lists id 1 twice": {**image([[1, 1]], {1: THING}), "segments_info": [{"id": 1, "label_id": 0}] * 2},
    "has no segments_info, but segmentation": {"segmentation": np.ones((1, 2), np.int32)},
    "has no label_id, but id, category_id": {
        "segmentation": np.ones((1, 2), np.int32),
        "segments_info": [{"id": 1, "category_id": 0}],
    },
    "holds float32": {**image([[1, 1]], {1: THING}), "segmentation": np.ones((1, 2), np.float32)},
    "Resize the prediction to the reference": image([[1], [1]], {1: THING}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("role", ["prediction", "reference"])
def test_what_does_not_fit_together_is_refused_and_counts_nothing(message, role):
    good = image([[1, 1]], {1: THING})
    metric = PanopticQuality(2, [THING])
    with pytest.raises(ValueError, match=message):
        metric.add(**{"prediction": good, "reference": good, role: BAD[message]})
    assert not metric.totals.any()


def test_thing_ids_must_be_labels():
    with pytest.raises(ValueError, match="thing_ids contains 2, but there are 2 labels"):
        PanopticQuality(2, [0, 2])


def test_metrics_of_different_labels_do_not_merge():
    with pytest.raises(ValueError, match=r"thing_ids \[0\] and \[1\]"):
        PanopticQuality(2, [0]).merge(PanopticQuality(2, [1]))


def slow_totals(predictions, references, num_labels):
    """The published rules, one pair of segments at a time."""
    totals = np.zeros((num_labels, 4))
    for prediction, reference in zip(predictions, references, strict=True):
        void = reference["segmentation"] == 0
        matched, found = set(), set()
        for true in reference["segments_info"]:
            for guess in prediction["segments_info"]:
                if true["iscrowd"] or true["label_id"] != guess["label_id"]:
                    continue
                true_mask = reference["segmentation"] == true["id"]
                guess_mask = (prediction["segmentation"] == guess["id"]) & ~void
                iou = (true_mask & guess_mask).sum() / (true_mask | guess_mask).sum()
                if iou > 0.5:
                    totals[true["label_id"]] += [iou, 1, 0, 0]
                    matched.add(true["id"])
                    found.add(guess["id"])
        for true in reference["segments_info"]:
            totals[true["label_id"], 3] += true["id"] not in matched and not true["iscrowd"]
        for guess in prediction["segments_info"]:
            excused = void
            crowds = [s for s in reference["segments_info"] if s["iscrowd"] and s["label_id"] == guess["label_id"]]
            if crowds:
                excused = excused | (reference["segmentation"] == crowds[-1]["id"])
            mask = prediction["segmentation"] == guess["id"]
            totals[guess["label_id"], 2] += guess["id"] not in found and (mask & excused).sum() / mask.sum() <= 0.5
    return totals


@st.composite
def images(draw, shape, num_labels):
    ids = st.sampled_from([0, 3, 4, 9, 300])
    segmentation = np.array(draw(st.lists(ids, min_size=math.prod(shape), max_size=math.prod(shape)))).reshape(shape)
    present = draw(st.permutations([int(segment) for segment in np.unique(segmentation) if segment]))
    labels = {segment: draw(st.integers(0, num_labels - 1)) for segment in present}
    return image(segmentation, labels, crowd=[segment for segment in present if draw(st.integers(0, 3)) == 0])


@st.composite
def batches(draw):
    num_labels = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4))
    references = [draw(images(shape, num_labels)) for shape in shapes]
    # Half of the predictions start from the reference's map, or hardly any would match.
    predictions = [draw(images(shape, num_labels)) for shape in shapes]
    for index, reference in enumerate(references):
        if draw(st.booleans()):
            predictions[index] = {**reference, "segments_info": reference["segments_info"][::-1]}
    return num_labels, predictions, references


@given(batches())
@settings(max_examples=100, deadline=None)
def test_random_images_agree_with_the_rules_in_any_order_and_in_parts(batch):
    num_labels, predictions, references = batch
    expected = slow_totals(predictions, references, num_labels)
    whole, backwards, first, rest = (PanopticQuality(num_labels, [0]) for _ in range(4))
    whole.add_batch(predictions=predictions, references=references)
    np.testing.assert_allclose(whole.totals, expected, rtol=1e-12)
    backwards.add_batch(predictions=predictions[::-1], references=references[::-1])
    first.add_batch(predictions=predictions[:1], references=references[:1])
    rest.add_batch(predictions=predictions[1:], references=references[1:])
    first.merge(rest)
    np.testing.assert_allclose(backwards.totals, expected, rtol=1e-12)
    np.testing.assert_allclose(first.totals, expected, rtol=1e-12)


def test_images_leave_nothing_behind_but_sums():
    same = image([[1, 1], [0, 2]], {1: THING, 2: STUFF})
    metric = metric_of(same, same)
    before = {name: getattr(value, "shape", value) for name, value in vars(metric).items()}
    metric.add_batch(predictions=[same] * 20, references=[same] * 20)
    assert {name: getattr(value, "shape", value) for name, value in vars(metric).items()} == before


def read_coco_panoptic(folder, annotation, label_of):
    red, green, blue = np.moveaxis(np.array(Image.open(folder / annotation["file_name"])).astype(int), -1, 0)
    segments = [
        {"id": segment["id"], "label_id": label_of[segment["category_id"]], "iscrowd": segment.get("iscrowd", 0)}
        for segment in annotation["segments_info"]
    ]
    return {"segmentation": red + 256 * green + 256**2 * blue, "segments_info": segments}


@pytest.mark.skipif(not (DATA / "metric_reference").is_dir(), reason="the reference data is not here")
def test_stored_reference_values_are_met():
    expected = json.loads((DATA / "metric_reference/expected.json").read_text())["panoptic"]
    truth = json.loads((DATA / expected["gt_json"]).read_text())
    guesses = json.loads((DATA / expected["pred_json"]).read_text())["annotations"]
    guess_of = {guess["image_id"]: guess for guess in guesses}
    label_of = {category["id"]: label for label, category in enumerate(truth["categories"])}
    things = [label_of[category["id"]] for category in truth["categories"] if category["isthing"]]
    metric = PanopticQuality(len(label_of), things)
    for annotation in truth["annotations"]:
        metric.add(
            prediction=read_coco_panoptic(DATA / expected["pred_folder"], guess_of[annotation["image_id"]], label_of),
            reference=read_coco_panoptic(DATA / expected["gt_folder"], annotation, label_of),
        )
    result = metric.compute()
    for name in ("pq", "sq", "rq"):
        for kind, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
            assert 100 * result[name + suffix] == pytest.approx(expected[kind][name], abs=1e-6)
        for category, figures in expected["per_class"].items():
            found = result["per_category"][label_of[int(category)]]
            assert 100 * found[name] == pytest.approx(figures[name], abs=1e-6)
            assert [found[count] for count in ("tp", "fp", "fn")] == [figures[count] for count in ("tp", "fp", "fn")]
