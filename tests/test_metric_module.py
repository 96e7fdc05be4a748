"""The metrics through `evaluate.load`, offline, and counted by several processes."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate import PartialState

from hf_maskformer.evaluation import maskformer_metrics, mean_iou, panoptic_quality
from hf_maskformer.evaluation.processes import merge_over_processes

PREDICTION, REFERENCE = np.array([[1, 0], [1, 1]]), np.array([[1, 1], [1, 1]])
SEGMENTS = [{"id": 1, "label_id": 0}]
IMAGES = {
    "mean_iou": (PREDICTION, REFERENCE),
    "panoptic_quality": (
        {"segmentation": PREDICTION, "segments_info": SEGMENTS},
        {"segmentation": REFERENCE, "segments_info": SEGMENTS},
    ),
    "average_precision": (
        {"masks": PREDICTION[None], "labels": [0], "scores": [0.5]},
        {"masks": REFERENCE[None], "labels": [0]},
    ),
}
PERFECT = {
    "mean_iou": REFERENCE,
    "panoptic_quality": {"segmentation": REFERENCE, "segments_info": SEGMENTS},
    "average_precision": {"masks": REFERENCE[None], "labels": [0], "scores": [0.9]},
}
OPTIONS = {
    "mean_iou": {"num_labels": 2},
    "panoptic_quality": {"num_labels": 1, "thing_ids": [0]},
    "average_precision": {"num_labels": 1},
}
FIGURES = {"mean_iou": ("mean_iou", 0.75), "panoptic_quality": ("pq", 0.75), "average_precision": ("ap", 0.6)}


@pytest.fixture(params=list(IMAGES))
def name(request):
    if request.param == "average_precision":
        pytest.importorskip("faster_coco_eval")
    return request.param


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path, str(cache)])
        yield partial(evaluate.load, maskformer_metrics.__file__, cache_dir=str(cache))


def test_a_loaded_metric_counts_batch_by_batch(load, name):
    metric = load(name, **OPTIONS[name])
    prediction, reference = IMAGES[name]
    key, value = FIGURES[name]
    metric.add_batch(predictions=[prediction], references=[reference])
    metric.add(prediction=prediction, reference=reference)
    assert metric.compute()[key] == pytest.approx(value)
    assert metric.compute(predictions=[prediction], references=[reference])[key] == pytest.approx(value)


def test_a_loaded_metric_takes_its_options_with_the_images_too(load, name):
    prediction, reference = IMAGES[name]
    key, value = FIGURES[name]
    result = load(name).compute(predictions=[prediction], references=[reference], **OPTIONS[name])
    assert result[key] == pytest.approx(value)


def test_a_loaded_metric_ignores_what_it_is_told_to(load):
    metric = load("mean_iou", num_labels=3, ignore_index=2)
    metric.add(prediction=np.array([[0, 1, 1]]), reference=np.array([[0, 1, 2]]))
    assert metric.compute()["mean_iou"] == 1


def test_a_loaded_metric_says_how_it_is_used(load):
    with pytest.raises(ValueError, match="one of mean_iou, panoptic_quality, average_precision"):
        load()
    with pytest.raises(ValueError, match=r"pass evaluate.load the options, such as num_labels"):
        load("mean_iou").add_batch(predictions=[PREDICTION], references=[REFERENCE])
    with pytest.raises(ValueError, match="leave out num_labels"):
        load("mean_iou", num_labels=2).compute(num_labels=2)
    with pytest.raises(ValueError, match="merge_over_processes"):
        load("mean_iou", num_labels=2, num_process=2)


def new_metric(name):
    return maskformer_metrics.METRICS[name](**OPTIONS[name])


@pytest.fixture
def every_pixel(monkeypatch):
    """What an accelerator counts, on the CPU: pixels, not runs of them."""
    for module in (mean_iou, panoptic_quality):
        monkeypatch.setattr(module, "flag_run_ends", lambda images: None)


@pytest.mark.usefixtures("every_pixel")
def test_pixels_and_runs_of_pixels_count_alike(name):
    prediction, reference = IMAGES[name]
    metric = new_metric(name)
    metric.add(prediction=prediction, reference=reference)
    key, value = FIGURES[name]
    assert metric.compute()[key] == pytest.approx(value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ["mean_iou", "panoptic_quality"])
def test_maps_on_a_gpu_are_counted_there(name):
    prediction, reference = IMAGES[name]
    on_gpu = torch.from_numpy(PREDICTION).cuda()
    metric = new_metric(name)
    metric.add(
        prediction={**prediction, "segmentation": on_gpu} if isinstance(prediction, dict) else on_gpu,
        reference=reference,
    )
    key, value = FIGURES[name]
    assert metric.compute()[key] == pytest.approx(value)


def test_a_process_alone_keeps_its_counts(name):
    prediction, reference = IMAGES[name]
    metric = new_metric(name)
    metric.add(prediction=prediction, reference=reference)
    merge_over_processes(metric)
    key, value = FIGURES[name]
    assert metric.compute()[key] == pytest.approx(value)


def count_a_share(name, folder):
    """What each of two processes runs: the first counts an image, the second one that is predicted perfectly."""
    state = PartialState(cpu=True)
    prediction, reference = IMAGES[name]
    metric = new_metric(name)
    metric.add(prediction=(prediction, PERFECT[name])[state.process_index], reference=reference)
    merge_over_processes(metric)
    figures = metric.compute()
    (Path(folder) / f"{state.process_index}.json").write_text(json.dumps(figures[FIGURES[name][0]]))
    state.destroy_process_group()  # without it, torch may abort a process that ends


@pytest.mark.slow
def test_two_processes_hold_the_counts_of_both(name, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_metric_module import count_a_share\ncount_a_share({name!r}, {str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    subprocess.run(command, check=True, timeout=300)
    alone = new_metric(name)
    prediction, reference = IMAGES[name]
    alone.add_batch(predictions=[prediction, PERFECT[name]], references=[reference] * 2)
    expected = pytest.approx(alone.compute()[FIGURES[name][0]])
    assert [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)] == [expected] * 2
