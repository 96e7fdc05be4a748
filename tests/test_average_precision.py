"""Average precision against hand-worked cases, pycocotools and stored reference values."""

import contextlib
import io
import json
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_maskformer import AveragePrecision

pytest.importorskip("faster_coco_eval")
coco_mask = pytest.importorskip("pycocotools.mask")
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

DATA = Path(os.environ.get("HF_MASKFORMER_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))

SIZE = (40, 40)
NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NAMES += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]


def box(top, left, height, width):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def objects(masks, labels=None, **fields):
    return {"masks": np.array(masks).reshape(-1, *SIZE), "labels": labels or [0] * len(masks), **fields}


def run_lengths(masks):
    return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


FIRST, SECOND, ELSEWHERE = box(0, 0, 10, 10), box(20, 20, 10, 10), box(0, 20, 10, 10)
TRUTH = objects([FIRST, SECOND])


def figures(prediction, reference, num_labels=1):
    metric = AveragePrecision(num_labels)
    metric.add(prediction=prediction, reference=reference)
    return metric.compute()


def test_a_false_alarm_between_two_hits_worked_out_by_hand():
    # Precision is 1 up to recall 1 / 2, which 51 of 101 recalls do not exceed, and 2 / 3 up to recall 1.
    result = figures(objects([FIRST, ELSEWHERE, SECOND], scores=[0.9, 0.8, 0.7]), TRUTH)
    assert [result[name] for name in ("ap", "ap50", "ap_small")] == pytest.approx([(51 + 50 * 2 / 3) / 101] * 3)
    assert result["ar100"] == 1
    assert result["ar1"] == 0.5
    assert math.isnan(result["ap_large"])


def test_an_iou_of_070_counts_at_five_of_ten_thresholds():
    result = figures(objects([box(0, 0, 10, 7)], scores=[1.0]), objects([FIRST]))
    assert result["ap"] == pytest.approx(0.5)
    assert (result["ap50"], result["ap75"]) == (1, 0)


def test_labels_without_a_reference_object_are_left_out_even_if_predicted():
    result = figures(objects([FIRST, SECOND], labels=[0, 2], scores=[1.0, 1.0]), objects([FIRST]), num_labels=3)
    assert result["ap"] == 1
    assert [math.isnan(result["per_category"][label]["ap"]) for label in range(3)] == [False, True, True]


def test_crowd_excuses_predictions_and_is_never_missed():
    crowd = objects([FIRST, box(20, 0, 20, 40)], iscrowd=[0, 1])
    assert figures(objects([SECOND, FIRST], scores=[0.9, 0.8]), crowd)["ap"] == 1
    assert figures(objects([SECOND, FIRST], scores=[0.9, 0.8]), objects([FIRST]))["ap"] == pytest.approx(0.5)


def test_a_given_area_decides_the_size():
    result = figures(objects([FIRST], scores=[1.0]), objects([FIRST], area=[50.0**2]))
    assert result["ap_medium"] == 1
    assert math.isnan(result["ap_small"])


def test_an_empty_prediction_scores_nothing():
    assert figures(objects([], scores=[]), TRUTH)["ap"] == 0


def test_predictions_where_the_reference_is_empty_are_false_alarms():
    metric = AveragePrecision(1)
    metric.add(prediction=objects([FIRST], scores=[1.0]), reference={"masks": [], "labels": []})
    metric.add(prediction=objects([FIRST], scores=[0.5]), reference=objects([FIRST]))
    assert metric.compute()["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("images", [[], [objects([], scores=[])], [objects([FIRST], scores=[1.0], iscrowd=[1])]])
def test_no_reference_object_is_an_error(images):
    metric = AveragePrecision(1)
    metric.add_batch(predictions=images, references=images)
    with pytest.raises(ValueError, match="No reference object was added"):
        metric.compute()


@pytest.mark.parametrize(
    "convert",
    [
        lambda masks: masks.astype(np.float32),
        lambda masks: torch.from_numpy(masks),
        lambda masks: list(torch.from_numpy(masks)),
        lambda masks: np.ascontiguousarray(masks[..., ::-1])[..., ::-1],  # a mirrored view
        lambda masks: list(masks.astype(">u2")),
        run_lengths,
        lambda masks: [{**mask, "counts": mask["counts"].decode()} for mask in run_lengths(masks)],
        lambda masks: [{"size": list(SIZE), "counts": runs_down_the_columns(mask)} for mask in masks],
    ],
)
def test_masks_of_every_form_are_the_same(convert):
    prediction = objects([FIRST, ELSEWHERE, SECOND], scores=torch.tensor([0.9, 0.8, 0.7]))
    prediction["labels"] = torch.tensor(prediction["labels"])
    expected = figures(prediction, TRUTH)["ap"]
    assert figures({**prediction, "masks": convert(prediction["masks"])}, TRUTH)["ap"] == expected


def runs_down_the_columns(mask):
    values = mask.T.flatten().astype(int)
    edges = np.flatnonzero(np.diff(values, prepend=0)).tolist()
    return np.diff([0, *edges, values.size]).tolist()


def test_compute_starts_anew():
    metric = AveragePrecision(1)
    metric.add(prediction=objects([], scores=[]), reference=TRUTH)
    assert metric.compute()["ap"] == 0
    metric.add(prediction=objects([FIRST, SECOND], scores=[1.0, 1.0]), reference=TRUTH)
    assert metric.compute()["ap"] == 1


def test_what_is_kept_is_a_few_bytes_for_each_prediction():
    sizes = []
    for num_images in (0, 300):
        metric = AveragePrecision(1)
        for _ in range(num_images):
            metric.add(prediction=objects([FIRST, SECOND], scores=[1.0, 0.5]), reference=TRUTH)
        sizes.append(len(pickle.dumps(metric)))
    assert sizes[1] - sizes[0] < 24 * 2 * 300


BAD = [
    (objects([FIRST], labels=[1], scores=[1.0]), r"prediction contains label 1, but there are 1 labels \(0 to 0\)"),
    (objects([FIRST], scores=[1.0, 0.5]), "prediction has 2 scores for 1 masks"),
    (objects([FIRST], labels=[0, 0], scores=[1.0]), "prediction has 2 labels for 1 masks"),
    ({"masks": [FIRST], "labels": [0]}, "The prediction has no scores, but masks, labels"),
    (objects([FIRST], scores=[math.nan]), "score that is not finite"),
    ({"masks": np.full((1, *SIZE), 0.3), "labels": [0], "scores": [1.0]}, "values other than 0 and 1"),
    ({"masks": FIRST, "labels": [0], "scores": [1.0]}, r"shape \(40, 40\); it must be \(N, height, width\)"),
    ({"masks": np.ones((1, 4, 4)), "labels": [0], "scores": [1.0]}, r"predicted masks are \(4, 4\)"),
    (
        {"masks": run_lengths([FIRST, np.ones((4, 4))]), "labels": [0, 0], "scores": [1.0, 1.0]},
        r"masks of several sizes, \[\(4, 4\), \(40, 40\)\]",
    ),
    ({"masks": [{"size": [2, 2], "counts": [3, 9]}], "labels": [0], "scores": [1.0]}, "exceed the mask"),
]


@pytest.mark.parametrize(("prediction", "message"), BAD)
def test_what_does_not_fit_together_is_refused_and_adds_nothing(prediction, message):
    metric = AveragePrecision(1)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=TRUTH)
    assert len(metric.records) == metric.num_objects.sum() == 0


def test_metrics_of_different_labels_do_not_merge():
    with pytest.raises(ValueError, match="num_labels 2 and 3"):
        AveragePrecision(2).merge(AveragePrecision(3))


def test_pycocotools_alone_will_do(monkeypatch):
    masks, reference = [FIRST, ELSEWHERE, SECOND], objects([FIRST, SECOND], iscrowd=[0, 0])
    predictions = [objects(masks, scores=[0.9, 0.8, 0.7])]
    predictions.append({**predictions[0], "masks": run_lengths(masks)})
    predictions.append({**predictions[0], "masks": [{"size": SIZE, "counts": counts_of(mask)} for mask in masks]})
    expected = [figures(prediction, reference) for prediction in predictions]
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    for prediction, theirs in zip(predictions, expected, strict=True):
        np.testing.assert_equal(figures(prediction, reference), theirs)


def counts_of(mask):
    """The lengths of runs down the columns, beginning with that of 0."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(ends, prepend=0, append=mask.size).tolist()


def test_a_missing_library_is_named_with_the_command(monkeypatch):
    for name in ("faster_coco_eval", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval") as raised:
        AveragePrecision(1)
    assert "faster_coco_eval" in str(raised.value.__cause__)  # which may be installed, but damaged


def by_pycocotools(predictions, references, num_labels):
    """The twelve figures as pycocotools summarises them, and the precision of each label."""
    annotations, results = [], []
    for image_id, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        for mask, label, score in zip(
            run_lengths(prediction["masks"]), prediction["labels"], prediction["scores"], strict=True
        ):
            results.append({"image_id": image_id, "category_id": label, "segmentation": mask, "score": score})
        for mask, label, crowd in zip(
            run_lengths(reference["masks"]), reference["labels"], reference["iscrowd"], strict=True
        ):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": label})
            annotations[-1] |= {"segmentation": mask, "area": float(coco_mask.area(mask)), "iscrowd": crowd}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": index, "height": SIZE[0], "width": SIZE[1]} for index in range(len(references))],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(num_labels)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"][..., 0, -1]


@st.composite
def batches(draw):
    num_labels, num_images = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = random.permutation(1000) / 1000  # no two the same, so that no order matters
    predictions, references = [], []
    for _ in range(num_images):
        count = int(random.integers(0, 6))
        boxes = [random.integers((0, 0, 3, 3), (20, 20, 40, 40)) for _ in range(count)]
        labels = random.integers(0, num_labels, count).tolist()
        crowd = (random.random(count) < 0.2).astype(int).tolist()
        references.append(objects([box(*place) for place in boxes], labels, iscrowd=crowd))
        # A jittered copy of each object, with a wrong label now and then, and one that is nowhere.
        places = [place + random.integers(-2, 3, 4) for place in boxes] + [random.integers(2, 20, 4)]
        guesses = [label if random.random() < 0.8 else 0 for label in labels] + [0]
        own, scores = scores[: count + 1].tolist(), scores[count + 1 :]
        predictions.append(objects([box(*place.clip(0)) for place in places], guesses, scores=own))
    references[0] = objects([FIRST], iscrowd=[0])
    return num_labels, predictions, references


@given(batches())
@settings(max_examples=40, deadline=None)
def test_random_images_agree_with_pycocotools_in_any_order_and_in_parts(batch):
    num_labels, predictions, references = batch
    stats, precision = by_pycocotools(predictions, references, num_labels)
    expected = dict(zip(NAMES, np.where(stats < 0, np.nan, stats), strict=True))
    whole, backwards, first, rest = (AveragePrecision(num_labels) for _ in range(4))
    whole.add_batch(predictions=predictions, references=references)
    backwards.add_batch(predictions=predictions[::-1], references=references[::-1])
    first.add_batch(predictions=predictions[:1], references=references[:1])
    rest.add_batch(predictions=predictions[1:], references=references[1:])
    first.merge(rest)
    for metric in (whole, backwards, first):
        result = metric.compute()
        per_category = result.pop("per_category")
        assert result == pytest.approx(expected, abs=1e-9, nan_ok=True)
        for label, scores in per_category.items():
            shown = precision[..., label].mean()
            assert scores["ap"] == pytest.approx(shown if shown >= 0 else math.nan, abs=1e-9, nan_ok=True)


def test_more_predictions_than_count_agree_with_pycocotools():
    draw = np.random.default_rng(0)
    predictions, references = [], []
    for image in range(2):
        boxes = [draw.integers((0, 0, 3, 3), (20, 20, 20, 20)) for _ in range(130)]
        references.append(objects([box(*place) for place in boxes[::5]], iscrowd=[0] * 26))
        scores = ((draw.permutation(130) + image / 2) / 130).tolist()
        predictions.append(objects([box(*(place + draw.integers(0, 2, 4))) for place in boxes], scores=scores))
    metric = AveragePrecision(1)
    metric.add_batch(predictions=predictions, references=references)
    stats, _ = by_pycocotools(predictions, references, 1)
    result = metric.compute()
    assert [result[name] for name in NAMES] == pytest.approx(np.where(stats < 0, np.nan, stats), abs=1e-9, nan_ok=True)
    assert result["ar1"] < result["ar10"] < result["ar100"] < 1


def test_of_objects_of_the_same_iou_the_last_is_taken():
    halves = [box(0, 0, 10, 10), box(0, 10, 10, 10)]
    both = objects([box(0, 0, 10, 20), halves[0]], scores=[0.9, 0.8])
    assert figures(both, objects(halves))["ap50"] == 1
    assert figures(both, objects(halves[::-1]))["ap50"] == pytest.approx(51 / 101)


def test_of_predictions_of_the_same_score_the_one_given_first_ranks_first():
    one, other, truth = objects([FIRST], scores=[0.5]), objects([ELSEWHERE], scores=[0.5]), objects([FIRST])
    empty = objects([], scores=[])
    for first, second, ap in ((FIRST, ELSEWHERE, 1), (ELSEWHERE, FIRST, 0.5)):
        assert figures(objects([first, second], scores=[0.5, 0.5]), truth)["ap"] == pytest.approx(ap)
    above = objects([FIRST], scores=[0.5 + 1e-12])
    for predictions, references, ap in (
        ([one, other], [truth, empty], 1),
        ([other, one], [empty, truth], 0.5),
        ([other, above], [empty, truth], 1),
    ):
        metric, later = AveragePrecision(1), AveragePrecision(1)
        metric.add(prediction=predictions[0], reference=references[0])
        later.add(prediction=predictions[1], reference=references[1])
        metric.merge(later)
        assert metric.compute()["ap"] == pytest.approx(ap)


@pytest.mark.parametrize("are_apart", [False, True])
def test_many_predictions_of_the_same_score_keep_their_order(are_apart):
    """Among others of another label: a sort that is not stable leaves a few equal numbers in order, or equal ones."""
    number = 600
    hit, miss = box(0, 0, 4, 4), box(20, 20, 4, 4)
    nothing, truth = objects([]), objects([hit])
    scores, labels = (
        np.random.default_rng(0).permutation(1000)[:number] / 1000,
        (np.arange(number) % 20 > 0).astype(int),
    )
    scores[labels == 0] = 0.5
    parts = [slice(each, each + 1) for each in range(number)] if are_apart else [slice(None)]
    for place, ap in ((0, 1.0), (580, 1 / 30)):
        masks, metric = np.where((np.arange(number) == place)[:, None, None], hit, miss), AveragePrecision(2)
        for part in parts:
            prediction = {"masks": masks[part], "labels": labels[part], "scores": scores[part]}
            has_truth = not are_apart or part.start == place
            metric.add(prediction=prediction, reference=truth if has_truth else nothing)
        assert metric.compute()["per_category"][0]["ap50"] == pytest.approx(ap)


def test_labels_beyond_a_byte_are_told_apart():
    prediction, reference = objects([FIRST], [299], scores=[1.0]), objects([FIRST], [299])
    assert figures(prediction, reference, num_labels=300)["per_category"][299]["ap"] == 1


def test_an_area_at_the_border_of_two_ranges_is_in_both():
    result = figures(objects([FIRST], scores=[1.0]), objects([FIRST], area=[32.0**2]))
    assert (result["ap_small"], result["ap_medium"]) == (1, 1)


@pytest.mark.skipif(not (DATA / "metric_reference").is_dir(), reason="the reference data is not here")
def test_stored_reference_values_are_met():
    expected = json.loads((DATA / "metric_reference/expected.json").read_text())["instance"]
    truth = json.loads((DATA / expected["gt_json"]).read_text())
    results = json.loads((DATA / expected["pred_json"]).read_text())
    label_of = {category["id"]: label for label, category in enumerate(truth["categories"])}
    metric = AveragePrecision(len(label_of))
    for image in truth["images"]:
        size = image["height"], image["width"]
        found = [each for each in results if each["image_id"] == image["id"]]
        true = [each for each in truth["annotations"] if each["image_id"] == image["id"]]
        metric.add(
            prediction={
                "masks": [each["segmentation"] for each in found],
                "labels": [label_of[each["category_id"]] for each in found],
                "scores": [each["score"] for each in found],
            },
            reference={
                "masks": [coco_mask.merge(coco_mask.frPyObjects(each["segmentation"], *size)) for each in true],
                "labels": [label_of[each["category_id"]] for each in true],
                "iscrowd": [each["iscrowd"] for each in true],
                "area": [each["area"] for each in true],
            },
        )
    result = metric.compute()
    theirs = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    for name, their_name in zip(NAMES, theirs, strict=True):
        absent = expected[their_name] == -1
        assert 100 * result[name] == pytest.approx(math.nan if absent else expected[their_name], abs=1e-4, nan_ok=True)
    for category, scores in expected["per_class"].items():
        own = result["per_category"][label_of[int(category)]]
        assert [100 * own["ap"], 100 * own["ap50"]] == pytest.approx([scores["AP"], scores["AP50"]], abs=1e-4)
