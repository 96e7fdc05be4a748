"""The mIoU metric against hand-worked cases, a slow obvious reference and stored reference values."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_maskformer.evaluation import mean_iou
from hf_maskformer.evaluation.mean_iou import MeanIoU
from hf_maskformer.evaluation.processes import merge_over_processes

DATA = Path(os.environ.get("HF_MASKFORMER_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))

VOID = 255


def scores(prediction, reference, num_labels=2, ignore_index=VOID):
    metric = MeanIoU(num_labels, ignore_index)
    metric.add(prediction=np.array(prediction), reference=np.array(reference))
    return metric.compute()


def test_a_two_by_two_case_worked_out_by_hand():
    # Class 0: 1 pixel right of 2, union 2. Class 1: 2 right of 2, union 3.
    result = scores([[0, 1], [1, 1]], [[0, 0], [1, 1]])
    assert result["per_category_iou"].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert result["per_category_accuracy"].tolist() == [0.5, 1.0]
    assert result["mean_iou"] == pytest.approx(7 / 12)
    assert result["mean_accuracy"] == 0.75
    assert result["overall_accuracy"] == 0.75
    assert result["frequency_weighted_iou"] == pytest.approx(7 / 12)


def test_frequent_classes_weigh_more_in_the_frequency_weighted_iou():
    # Class 0: IoU 2 / 3 on three of four pixels; class 1: IoU 1 / 2 on one.
    result = scores([[0, 0], [1, 1]], [[0, 0], [0, 1]])
    assert result["frequency_weighted_iou"] == pytest.approx(3 / 4 * 2 / 3 + 1 / 4 * 1 / 2)


def test_classes_absent_from_the_reference_are_left_out_of_the_means_even_if_predicted():
    result = scores([[0, 2], [0, 0]], [[0, 0], [0, 0]], num_labels=3)
    assert result["mean_iou"] == result["mean_accuracy"] == 0.75
    assert np.isnan(result["per_category_iou"]).tolist() == [False, True, True]
    assert np.isnan(result["per_category_accuracy"]).tolist() == [False, True, True]


def test_ignored_reference_pixels_are_not_counted_whatever_is_predicted():
    result = scores([[0, 1], [1, 0]], [[0, 1], [VOID, VOID]])
    assert result["mean_iou"] == result["overall_accuracy"] == 1.0


def test_an_ignore_index_among_the_classes_leaves_that_class_out():
    result = scores([[0, 1], [1, 0]], [[0, 1], [0, 1]], ignore_index=0)
    assert np.isnan(result["per_category_iou"][0])
    assert result["per_category_accuracy"][1] == 0.5


@pytest.mark.parametrize("no_class", [VOID, -1, 2, 70000, 2**32, -(2**40)])
def test_a_prediction_that_is_no_class_is_wrong_for_its_reference_and_charged_to_no_other(no_class):
    result = scores([[0, no_class], [1, 1]], [[0, 0], [1, 1]])
    assert result["per_category_iou"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("label", [2, -1, 254, 2**32])
def test_a_reference_label_outside_the_classes_is_named(label):
    with pytest.raises(ValueError, match=rf"contains label {label}, but there are 2 labels \(0 to 1\)"):
        scores([[0, 0]], [[0, label]])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \(1, 2\), its reference \(2, 1\)"):
        scores([[0, 0]], [[0], [0]])


@pytest.mark.parametrize("values", [np.zeros((1, 1), np.float32), torch.zeros(1, 1)])
def test_maps_of_floats_are_refused(values):
    with pytest.raises(ValueError, match=r"prediction holds (torch.)?float32"):
        MeanIoU(2).add(prediction=values, reference=np.zeros((1, 1), int))


def test_as_many_predictions_as_references_are_needed():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        MeanIoU(2).add_batch(predictions=[np.zeros((1, 1), int)], references=[np.zeros((1, 1), int)] * 2)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_labels is 0"):
        MeanIoU(0)


@pytest.mark.parametrize("references", [[], [np.full((2, 2), VOID)]])
def test_nothing_counted_is_an_error(references):
    metric = MeanIoU(2)
    metric.add_batch(predictions=[np.zeros((2, 2), int)] * len(references), references=references)
    with pytest.raises(ValueError, match="No labelled pixel was counted"):
        metric.compute()


def test_compute_starts_anew():
    metric = MeanIoU(2)
    metric.add(prediction=np.array([[0]]), reference=np.array([[1]]))
    assert metric.compute()["mean_iou"] == 0.0
    metric.add(prediction=np.array([[1]]), reference=np.array([[1]]))
    assert metric.compute()["mean_iou"] == 1.0


def test_images_of_different_size_add_up_in_one_batch_and_over_several():
    predictions = [np.array([[0, 1]]), np.array([[1], [1], [0]])]
    references = [np.array([[0, 0]]), np.array([[1], [1], [1]])]
    together, apart = MeanIoU(2), MeanIoU(2)
    together.add_batch(predictions=predictions, references=references)
    for prediction, reference in zip(predictions, references, strict=True):
        apart.add(prediction=prediction, reference=reference)
    assert together.confusion_matrix.tolist() == apart.confusion_matrix.tolist() == [[1, 1, 0], [1, 2, 0]]


def test_an_image_without_pixels_changes_nothing_for_those_beside_it():
    metric, smooth = MeanIoU(2), np.repeat([[0, 1]], 50, axis=1)
    metric.add_batch(predictions=[smooth, smooth[:0], smooth], references=[smooth, smooth[:0], 1 - smooth])
    assert metric.confusion_matrix.tolist() == [[50, 50, 0], [50, 50, 0]]


def test_merging_equals_counting_in_one_place():
    first, second = MeanIoU(2), MeanIoU(2)
    first.add(prediction=np.array([[0, 1]]), reference=np.array([[0, 0]]))
    second.add(prediction=np.array([[1, VOID]]), reference=np.array([[1, 1]]))
    first.merge(second)
    assert first.confusion_matrix.tolist() == [[1, 1, 0], [0, 1, 1]]
    assert second.confusion_matrix.tolist() == [[0, 0, 0], [0, 1, 1]]


def test_metrics_of_different_classes_do_not_merge():
    with pytest.raises(ValueError, match="num_labels 2 and 3"):
        MeanIoU(2).merge(MeanIoU(3))


def test_metrics_that_ignore_different_labels_do_not_merge():
    with pytest.raises(ValueError, match="ignore_index 255 and 0"):
        MeanIoU(2).merge(MeanIoU(2, ignore_index=0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_the_highest_number_of_a_type_may_stand_for_void(dtype):
    highest = 2 ** (8 * dtype.itemsize) - 1
    metric = MeanIoU(2, ignore_index=highest)
    prediction, reference = (torch.tensor([[0, 1, number]]).to(dtype) for number in (1, highest))
    metric.add(prediction=prediction, reference=reference)
    assert metric.confusion_matrix[:, :2].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    "convert",
    [
        lambda values: values,
        lambda values: values.astype(np.uint8),
        lambda values: values.astype(np.uint16),
        lambda values: torch.from_numpy(values),
        lambda values: torch.from_numpy(values.astype(np.uint8)),
        lambda values: values.astype(">u2"),
        lambda values: values[::-1].copy()[::-1],
        lambda values: Image.fromarray(values.astype(np.uint8)),
        lambda values: values.tolist(),
    ],
)
def test_arrays_tensors_and_images_of_any_integer_type_count_alike(convert):
    metric = MeanIoU(3)
    metric.add(prediction=convert(np.array([[0, 1], [2, 255]])), reference=convert(np.array([[0, 0], [2, 255]])))
    assert metric.confusion_matrix.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def slow_per_category_iou(predictions, references, num_labels, ignore_index):
    for label in range(num_labels):
        intersection = union = shown = 0
        for prediction, reference in zip(predictions, references, strict=True):
            for predicted, expected in zip(prediction.flat, reference.flat, strict=True):
                if expected == ignore_index:
                    continue
                intersection += predicted == label and expected == label
                union += predicted == label or expected == label
                shown += expected == label
        yield intersection / union if shown else float("nan")


def draw_map(data, values, size):
    height, width = size
    return np.array(data.draw(st.lists(values, min_size=height * width, max_size=height * width))).reshape(size)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_random_maps_agree_with_a_slow_reference(data):
    num_labels = data.draw(st.integers(1, 4))
    ignore_index = data.draw(st.sampled_from([num_labels, 255, -1]))
    expected = st.sampled_from([*range(num_labels), ignore_index])
    predicted = st.one_of(expected, st.integers(-2, 300))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    references = [draw_map(data, expected, size) for size in sizes]
    references[0][0, 0] = 0
    predictions = [draw_map(data, predicted, size) for size in sizes]
    metric = MeanIoU(num_labels, ignore_index)
    metric.add_batch(predictions=predictions, references=references)
    result = metric.compute()
    slow = list(slow_per_category_iou(predictions, references, num_labels, ignore_index))
    np.testing.assert_allclose(result["per_category_iou"], slow, rtol=1e-12)
    assert result["mean_iou"] == pytest.approx(np.nanmean(slow))


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_counts_equal_a_plain_bincount_of_the_pixels(data):
    """Smooth maps and noise, of any integer type and layout: alone, all at once and a few at a time by two threads."""
    num_labels = data.draw(st.integers(1, 120))
    ignore_index = data.draw(st.integers(0, 127))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    images, expected = [], np.zeros((num_labels, num_labels + 1), np.int64)
    for _ in range(data.draw(st.integers(1, 3))):
        height, width, run = data.draw(st.tuples(st.integers(0, 30), st.integers(1, 60), st.sampled_from([1, 4, 30])))
        prediction, reference = random.integers(0, 128, (2, height, width)).repeat(run, axis=2)[..., :width]
        reference = np.where(reference < num_labels, reference, ignore_index % num_labels)
        reference[random.random(reference.shape) < 1 / (3 * run)] = ignore_index
        is_counted = reference != ignore_index
        columns = np.minimum(prediction[is_counted], num_labels)
        places = reference[is_counted] * (num_labels + 1) + columns
        expected += np.bincount(places, minlength=expected.size).reshape(expected.shape)
        pair = (torch.from_numpy(values).to(data.draw(st.sampled_from(INTEGERS))) for values in (prediction, reference))
        images.append([values.T.contiguous().T if data.draw(st.booleans()) else values for values in pair])
    predictions, references = zip(*images, strict=True)
    for num_threads, pixels_at_once in [(1, 1), (1, 10**6), (2, 1), (2, 1000)]:
        metric = MeanIoU(num_labels, ignore_index)
        with threads(num_threads, pixels_at_once):
            metric.add_batch(predictions=predictions, references=references)
        assert (metric.confusion_matrix.numpy() == expected).all()


@contextmanager
def threads(number, pixels_at_once):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with mock.patch.object(mean_iou, "PIXELS_AT_ONCE", pixels_at_once):
            yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2])
def test_an_unknown_label_within_a_batch_is_named_and_nothing_of_the_batch_counts(number):
    metric = MeanIoU(2)
    with threads(number, pixels_at_once=2), pytest.raises(ValueError, match="contains label -3"):
        metric.add_batch(predictions=np.zeros((3, 1, 2), int), references=np.array([[[0, 1]], [[0, -3]], [[1, 1]]]))
    assert not metric.confusion_matrix.any()


def test_counting_goes_on_outside_of_the_inference_mode_it_began_in():
    with torch.inference_mode():
        metric = MeanIoU(2)
        metric.add(prediction=torch.tensor([[0]]), reference=torch.tensor([[0]]))
    metric.add(prediction=torch.tensor([[1]]), reference=torch.tensor([[0]]))
    assert metric.confusion_matrix.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_arrays_are_counted_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert scores([[0, 1], [1, 1]], [[0, 0], [1, 1]])["mean_accuracy"] == 0.75


@pytest.mark.skipif(not (DATA / "metric_reference").is_dir(), reason="the reference data is not here")
def test_stored_reference_values_are_met():
    expected = json.loads((DATA / "metric_reference/expected.json").read_text())["semantic"]
    metric = MeanIoU(expected["num_classes"], expected["ignore_index"])
    for path in sorted((DATA / expected["gt"]).glob("*.png")):
        metric.add(prediction=Image.open(DATA / expected["pred"] / path.name), reference=Image.open(path))
    assert metric.confusion_matrix.sum() == expected["valid_pixels"]
    result = metric.compute()
    assert 100 * result["mean_iou"] == pytest.approx(expected["mIoU"], abs=1e-6)
    # Every class occurs in these references, so that averaging over reference and prediction makes no difference.
    assert 100 * result["mean_iou"] == pytest.approx(expected["alt_mIoU_over_union_gt0"], abs=1e-6)
    assert 100 * result["mean_accuracy"] == pytest.approx(expected["mACC"], abs=1e-6)
    assert 100 * result["overall_accuracy"] == pytest.approx(expected["pACC"], abs=1e-6)
    assert 100 * result["frequency_weighted_iou"] == pytest.approx(expected["fwIoU"], abs=1e-6)
    assert (100 * result["per_category_iou"]).tolist() == pytest.approx(expected["IoU"], abs=1e-6)
    assert (100 * result["per_category_accuracy"]).tolist() == pytest.approx(expected["ACC"], abs=1e-6)


def test_merging_over_a_single_process_changes_nothing():
    metric = MeanIoU(2)
    metric.add_batch(predictions=[torch.tensor([[0, 1]])], references=[torch.tensor([[0, 0]])])
    counted = metric.confusion_matrix.clone()
    merge_over_processes(metric)
    assert torch.equal(metric.confusion_matrix, counted)
