"""What the three tasks need of samples and models, what is counted, and what is written."""

import json
import re
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_files import CATEGORIES, write_instances, write_panoptic
from models import resnet_config, tiny_model
from PIL import Image
from torch.utils.data import Subset

from hf_maskformer import (
    AveragePrecision,
    MaskFormerImageProcessor,
    PanopticQuality,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.data.coco import CocoInstances, CocoPanoptic
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.rle import decode_mask
from hf_maskformer.evaluation import evaluation, prediction_writer
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.evaluation.prediction_writer import PredictionWriter
from hf_maskformer.evaluation.processes import merge_over_processes
from hf_maskformer.evaluation.report import as_json, as_table, scalars
from hf_maskformer.evaluation.scale_averaging import augmented_semantic_scores
from hf_maskformer.evaluation.tasks import (
    FIGURES,
    TASKS,
    metric_for,
    predict_batch,
    reference_of,
    segments_of,
    task_of,
    task_of_data,
)
from hf_maskformer.training.starting_point import image_processor_for

LABELS = LabelSet({0: "person", 1: "car", 2: "sky"}, thing_ids=(0, 1))
SCENES = GeneratedScenes(3, image_size=(64, 64), task="panoptic")


def sample(**fields):
    height, width = fields.get("segmentation_map", fields.get("masks", np.zeros((1, 2, 2)))).shape[-2:]
    return {"image": Image.new("RGB", (width, height)), "name": "a", **fields}


IDS = np.array([[7, 7, 9, 255], [8, 8, 9, 9]])
OF_CLASSES = sample(segmentation_map=np.array([[0, 1], [2, 255]]))
OF_SEGMENTS = sample(segmentation_map=IDS, instance_id_to_semantic_id={7: 0, 8: 0, 9: 2, 11: 1}, crowd_ids=(8,))
OF_MASKS = sample(masks=np.ones((2, 2, 2), bool), labels=np.array([1, 0]), iscrowd=np.array([False, True]))


class Samples(list):
    labels = LABELS


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, dataset):
        self.dataset, self.labels = dataset, dataset.labels

    def __iter__(self):
        return (self.dataset[index] for index in range(len(self.dataset)))


def model_for(labels, **fields):
    return tiny_model(id2label=labels.id2label, **fields).eval()


@pytest.mark.parametrize(("of", "task"), [(OF_CLASSES, "semantic"), (OF_SEGMENTS, "panoptic"), (OF_MASKS, "instance")])
def test_the_form_of_the_labels_tells_the_task(of, task):
    assert task_of_data(Samples([of])) == task_of_data(Stream(Samples([of]))) == task


def test_each_of_several_processes_evaluates_a_share_of_a_stream(monkeypatch):
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64, task="panoptic")
    names = []
    for process in range(2):
        state = SimpleNamespace(process_index=process, num_processes=2, is_local_main_process=True)
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        evaluate(model, processor, Stream(SCENES), on_result=lambda index, name, result: names.append(name))
    assert names == [SCENES.name(index) for index in (0, 2, 1)]


@pytest.mark.parametrize("dataset", [SCENES, Stream(SCENES)], ids=["list", "stream"])
def test_samples_of_a_share_keep_their_places_in_the_data_set(monkeypatch, dataset):
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64, task="panoptic")
    places = {}
    for process in range(2):
        state = SimpleNamespace(process_index=process, num_processes=2, is_local_main_process=True)
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        evaluate(model, processor, dataset, on_result=lambda index, name, result: places.update({name: index}))
    assert places == {SCENES.name(index): index for index in range(len(SCENES))}


def test_predictions_of_one_score_rank_in_the_order_of_their_processes(monkeypatch):
    mask, other = np.eye(4, dtype=bool)[None], ~np.eye(4, dtype=bool)[None]
    reference = {"masks": mask, "labels": [0]}
    parts = [AveragePrecision(1) for _ in range(2)]
    for part, predicted in zip(parts, (mask, other), strict=True):
        part.add(prediction={"masks": predicted, "labels": [0], "scores": [0.5]}, reference=reference)
    monkeypatch.setattr("hf_maskformer.evaluation.processes.gather_object", lambda mine: deepcopy(parts))
    metric = AveragePrecision(1)
    merge_over_processes(metric)
    # The hit comes first: full precision up to one half of the recall.
    assert metric.compute()["ap50"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("task", TASKS)
def test_a_single_process_keeps_its_counts_when_they_are_brought_together(task):
    metric = metric_for(task, LABELS)
    reference = reference_of(
        {"semantic": OF_CLASSES, "panoptic": OF_SEGMENTS, "instance": OF_MASKS}[task], LABELS, task
    )
    prediction = {**reference, "scores": [0.5, 0.5]} if task == "instance" else reference
    metric.add(prediction=prediction, reference=reference)
    before = deepcopy(vars(metric))
    merge_over_processes(metric)
    for name, value in before.items():
        assert np.array_equal(getattr(metric, name), value), name


def test_an_empty_data_set_has_no_task():
    with pytest.raises(ValueError, match="data set is empty"):
        task_of_data(Samples())


def test_the_reference_of_segments_has_void_as_0_and_lists_what_has_pixels():
    reference = reference_of(OF_SEGMENTS, LABELS, "panoptic")
    assert reference["segmentation"].tolist() == [[1, 1, 3, 0], [2, 2, 3, 3]]
    assert reference["segments_info"] == [
        {"id": 1, "label_id": 0, "iscrowd": False},
        {"id": 2, "label_id": 0, "iscrowd": True},
        {"id": 3, "label_id": 2, "iscrowd": False},
    ]


def test_the_instances_of_a_map_of_segments_are_its_things():
    reference = reference_of(OF_SEGMENTS, LABELS, "instance")
    assert (reference["labels"].tolist(), reference["iscrowd"].tolist()) == ([0, 0], [False, True])
    assert reference["masks"].tolist() == [(IDS == 7).tolist(), (IDS == 8).tolist()]
    everything = LabelSet(LABELS.id2label)
    assert reference_of(OF_SEGMENTS, everything, "instance")["labels"].tolist() == [0, 0, 2]


def test_labels_that_count_from_1_are_reduced_in_maps_of_segments_too():
    reduced = LabelSet({0: "person", 1: "car"}, do_reduce_labels=True)
    of = sample(segmentation_map=np.array([[5, 6, 7]]), instance_id_to_semantic_id={5: 0, 6: 1, 7: 2})
    reference = reference_of(of, reduced, "panoptic")
    assert reference["segmentation"].tolist() == [[0, 1, 2]]
    assert [info["label_id"] for info in reference["segments_info"]] == [0, 1]


@pytest.mark.parametrize(
    ("of", "task", "message"),
    [
        (OF_MASKS, "semantic", "a has masks, which may overlap and leave pixels without a class"),
        (OF_MASKS, "panoptic", "a has masks, which may overlap, but panoptic"),
        (OF_CLASSES, "panoptic", "a has a map of classes, which does not tell panoptic segments apart"),
        (OF_CLASSES, "instance", "a has a map of classes, which does not tell instance segments apart"),
    ],
)
def test_labels_that_do_not_allow_a_task_are_refused(of, task, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model_for(LABELS), image_processor_for(LABELS, 64), Samples([of]), task)


def perfect(reference, task):
    """The prediction that equals a reference."""
    if task == "instance":
        return {"masks": reference["masks"], "labels": reference["labels"], "scores": np.ones(len(reference["labels"]))}
    return reference


@pytest.mark.parametrize("task", TASKS)
def test_references_agree_with_themselves(task):
    metric = metric_for(task, SCENES.labels)
    for index in range(len(SCENES)):
        reference = reference_of(SCENES[index], SCENES.labels, task)
        metric.add(prediction=perfect(reference, task), reference=reference)
    assert metric.compute()[{"semantic": "mean_iou", "panoptic": "pq", "instance": "ap"}[task]] == pytest.approx(1.0)


def test_figures_of_things_and_of_stuff_are_told_apart_by_the_labels():
    metric = metric_for("panoptic", SCENES.labels)
    reference = reference_of(SCENES[0], SCENES.labels, "panoptic")
    stuff = [info for info in reference["segments_info"] if info["label_id"] not in SCENES.labels.thing_ids]
    found = np.where(np.isin(reference["segmentation"], [info["id"] for info in stuff]), reference["segmentation"], 0)
    metric.add(prediction={"segmentation": found, "segments_info": stuff}, reference=reference)
    figures = metric.compute()
    assert (figures["pq_things"], figures["pq_stuff"]) == (0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_late_masks_give_what_the_forward_pass_gives(task):
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64)
    processor.panoptic_thresholds = {"threshold": 0.12 if task == "panoptic" else 0.9}  # no instance reaches that
    batch = processor([SCENES[0]["image"], SCENES[1]["image"]], return_tensors="pt")
    sizes = [(64, 64), (64, 64)]
    with torch.no_grad():
        expected = segments_of(model(**batch), processor, sizes, task)
        found = predict_batch(model, processor, batch, sizes, task)
    for one, other in zip(expected, found, strict=True):
        if task == "semantic":
            assert torch.equal(one, other)
        else:
            assert [info["label_id"] for info in one["segments_info"]] == [
                info["label_id"] for info in other["segments_info"]
            ]
            assert len(one["segments_info"]) > 0
            assert str(one["segmentation"]) == str(other["segmentation"])


def test_a_baseline_knows_no_segments():
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 16}
    config = PerPixelBaselineConfig(backbone_config=resnet_config(), num_labels=8, **sizes)
    model, processor = PerPixelBaselineForSemanticSegmentation(config), image_processor_for(SCENES.labels, 128)
    assert 0 <= evaluate(model, processor, SCENES)["mean_iou"] <= 1
    for task in ("panoptic", "instance"):
        with pytest.raises(ValueError, match=f"has no segments, so its task is semantic, not {task}"):
            evaluate(model, processor, SCENES, task)
    assert 0 <= evaluate(model, processor, SCENES, scale_averaging=True)["mean_iou"] <= 1


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("task", "figure"), [("panoptic", "pq"), ("instance", "ap"), ("semantic", "mean_iou")])
def test_a_stream_is_counted_like_a_list(task, figure, batch_size):
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64, task=task)
    processor.panoptic_thresholds = {"threshold": 0.1, "overlap_mask_area_threshold": 0.0}
    listed = evaluate(model, processor, SCENES, batch_size=batch_size)
    streamed = evaluate(model, processor, Stream(SCENES), batch_size=1)
    assert listed[figure] == pytest.approx(streamed[figure], abs=1e-6)


def test_averaging_scales_is_for_semantic_segmentation():
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64)
    with pytest.raises(ValueError, match="Scales are averaged for semantic"):
        evaluate(model, processor, SCENES, "panoptic", scale_averaging=True)


def instance_data(root, category_id=90):
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    annotations = [{"category_id": category_id, "segmentation": square, "iscrowd": 0, "area": 64, "bbox": [1, 1, 8, 8]}]
    return CocoInstances(write_instances(root, {"a": ((64, 64), annotations)}), root / "images/train")


def panoptic_data(root):
    ids = np.full((64, 64), 3)
    ids[:20] = 700
    segments = [{"id": 3, "category_id": 184, "iscrowd": 0}, {"id": 700, "category_id": 1, "iscrowd": 0}]
    return CocoPanoptic(write_panoptic(root, {"a": (ids, segments)}), root / "images/train")


def test_panoptic_predictions_are_written_for_panopticapi(tmp_path):
    dataset = panoptic_data(tmp_path / "data")
    writer = PredictionWriter(tmp_path / "out", "panoptic", dataset)
    segmentation = torch.zeros(64, 64, dtype=torch.int32)
    segmentation[:5] = 300
    writer(0, "a", {"segmentation": segmentation, "segments_info": [{"id": 300, "label_id": 2, "score": 0.9}]})
    writer.finish()
    (annotation,) = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (7, "a.png")
    assert annotation["segments_info"][0]["category_id"] == 184  # the highest of the ids
    assert np.asarray(Image.open(tmp_path / "out/panoptic/a.png"))[0, 0].tolist() == [300 - 256, 1, 0]


def test_instances_are_written_as_coco_results(tmp_path):
    from pycocotools.coco import COCO

    dataset = instance_data(tmp_path / "data")
    model, processor = model_for(dataset.labels), image_processor_for(dataset.labels, 64, task="instance")
    writer = PredictionWriter(tmp_path / "out", "instance", dataset)
    evaluate(model, processor, dataset, on_result=writer)
    writer.finish()
    entries = json.loads((tmp_path / "out/instances.json").read_text())
    assert entries
    assert {entry["category_id"] for entry in entries} <= {category["id"] for category in CATEGORIES}
    assert COCO(str(tmp_path / "data/annotations/instances_train.json")).loadRes(str(tmp_path / "out/instances.json"))


def test_parts_of_a_data_set_keep_the_ids_of_their_images(tmp_path):
    dataset = CocoInstances(
        write_instances(tmp_path, {name: ((1, 2), []) for name in "abc"}), tmp_path / "images/train"
    )
    part = Subset(Subset(dataset, [2, 1]), [1, 0])
    writer = PredictionWriter(tmp_path / "out", "panoptic", part)
    for index in range(2):
        segmentation = torch.zeros(1, 2, dtype=torch.int32)
        writer(index, f"{index}", {"segmentation": segmentation, "segments_info": []})
    writer.finish()
    entries = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in entries] == [dataset.image_id(1), dataset.image_id(2)]


def test_predictions_of_one_name_by_several_processes_are_an_error_in_each(tmp_path, monkeypatch):
    dataset = Samples()
    dataset.labels = LABELS
    monkeypatch.setattr(prediction_writer, "gather_object", lambda mine: [*mine, "name b", "name c"])  # the other's
    for name in "ab":
        writer = PredictionWriter(tmp_path, "semantic", dataset)
        writer(0, name, torch.tensor([[0, 1]]))
        with pytest.raises(ValueError, match="name b") if name == "b" else nullcontext():
            writer.finish()


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_the_first_of_several_processes_writes_the_entries_of_all(tmp_path, monkeypatch, task):
    dataset = Samples()
    dataset.labels = LABELS
    # The other process has the like of each name, identity and entry.
    as_other = {str: lambda each: f"other {each}", dict: lambda each: {**each, "image_id": 7}}

    def of_both(mine: list) -> list:
        return [*mine, *(as_other[type(each)](each) for each in mine)]

    monkeypatch.setattr(prediction_writer, "gather_object", of_both)
    mask = torch.ones(1, 2, dtype=torch.int32)
    file = tmp_path / {"panoptic": "panoptic.json", "instance": "instances.json"}[task]
    for is_main in (False, True):
        state = SimpleNamespace(is_main_process=is_main)
        monkeypatch.setattr(prediction_writer, "PartialState", lambda state=state: state)
        writer = PredictionWriter(tmp_path, task, dataset)
        segmentation = mask if task == "panoptic" else [{"size": [1, 2], "counts": "02"}]
        writer(0, "a", {"segmentation": segmentation, "segments_info": [{"id": 1, "label_id": 0, "score": 0.5}]})
        writer.finish()
        assert file.exists() == is_main
    content = json.loads(file.read_text())
    entries = content["annotations"] if task == "panoptic" else content
    assert [entry["image_id"] for entry in entries] == [0, 7]


def test_semantic_predictions_number_classes_as_the_files_do(tmp_path):
    dataset = Samples()
    dataset.labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=True)
    writer = PredictionWriter(tmp_path, "semantic", dataset)
    writer(0, "city/a", torch.tensor([[0, 1]]))
    writer.finish()
    assert np.asarray(Image.open(tmp_path / "city/a.png")).tolist() == [[1, 2]]
    assert [path.name for path in tmp_path.iterdir()] == ["city"]
    with pytest.raises(ValueError, match="which is not one inside"):
        writer(0, "../a", torch.tensor([[0, 1]]))


def test_segments_have_the_categories_of_the_files(tmp_path):
    dataset = Samples()
    for first, categories in ((0, ()), (1, ()), (None, (7, 3))):
        dataset.labels = LabelSet({0: "sky", 1: "road"}, do_reduce_labels=first == 1, category_ids=categories)
        panoptic = PredictionWriter(tmp_path / f"panoptic {first}", "panoptic", dataset)
        info = {"id": 1, "label_id": 1, "score": 0.5}
        panoptic(0, "a", {"segmentation": torch.ones(1, 2, dtype=torch.int32), "segments_info": [info]})
        panoptic.finish()
        instance = PredictionWriter(tmp_path / f"instance {first}", "instance", dataset)
        instance(0, "a", {"segmentation": [[2]], "segments_info": [info]})
        instance.finish()
        (annotation,) = json.loads((tmp_path / f"panoptic {first}/panoptic.json").read_text())["annotations"]
        (entry,) = json.loads((tmp_path / f"instance {first}/instances.json").read_text())
        expected = 3 if first is None else first + 1
        assert entry["category_id"] == annotation["segments_info"][0]["category_id"] == expected


def test_a_file_without_instances_is_told_of(tmp_path, transformers_log):
    writer = PredictionWriter(tmp_path, "instance", Samples())
    writer(0, "a", {"segmentation": [], "segments_info": []})
    writer.finish()
    assert json.loads((tmp_path / "instances.json").read_text()) == []
    assert "No object was found in any image" in transformers_log.text


def test_a_prediction_never_replaces_another(tmp_path):
    dataset = Samples()
    dataset.labels = LabelSet({0: "sky", 1: "road"})
    writer = PredictionWriter(tmp_path, "semantic", dataset)
    writer(0, "a", torch.tensor([[0, 1]]))
    with pytest.raises(
        ValueError, match=r"Several samples have the name a, .*; rename the file, or in columns the entry of `name`\."
    ):
        writer(1, "a", torch.tensor([[1, 1]]))
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 1]]
    for task, segmentation in (("panoptic", torch.zeros(1, 2, dtype=torch.int32)), ("instance", [])):
        writer = PredictionWriter(tmp_path, task, dataset)
        writer(0, "a", {"segmentation": segmentation, "segments_info": []})
        with pytest.raises(
            ValueError, match=r"have the image_id 0, .*; read a stream with no more than one worker process"
        ):
            writer(0, "b", {"segmentation": segmentation, "segments_info": []})


def figures_of(metric):
    mask = np.eye(4, dtype=bool)[None]
    if isinstance(metric, AveragePrecision):
        prediction = {"masks": mask, "labels": [1], "scores": [1.0]}
    else:
        prediction = {"segmentation": mask[0].astype(int), "segments_info": [{"id": 1, "label_id": 1}]}
    metric.add(prediction=prediction, reference=prediction)
    return metric.compute()


@pytest.mark.parametrize(
    ("metric", "columns"), [(PanopticQuality(3, [0, 1]), "PQ"), (AveragePrecision(3), "AP50"), (None, "IoU")]
)
def test_figures_of_every_task_become_json_and_a_table(metric, columns):
    if metric is None:
        metric = metric_for("semantic", LABELS)
        metric.add(prediction=np.array([[1]]), reference=np.array([[1]]))
        figures = metric.compute()
    else:
        figures = figures_of(metric)
    content = json.loads(json.dumps(as_json(figures, LABELS.id2label), allow_nan=False))
    per_class = content.get("per_category") or content["per_category_iou"]
    assert list(per_class) == ["person", "car", "sky"]
    assert per_class["car"] == 1.0 or 1.0 in per_class["car"].values()
    table = as_table(figures, LABELS.id2label).splitlines()
    assert columns in table[0]
    assert table[1].split()[:2] == ["car", "100.00"]
    assert "2 classes that do not occur are left out" in table[-1]
    assert all(np.isfinite(value) for value in scalars(figures).values())


def test_the_processor_knows_the_task_and_fuses_stuff_only_where_it_is_known():
    processor = image_processor_for(LABELS, 64, task="panoptic")
    assert (processor.segmentation_task, processor.label_ids_to_fuse) == ("panoptic", [2])
    assert image_processor_for(LabelSet(LABELS.id2label), 64, task="panoptic").label_ids_to_fuse == []
    assert isinstance(processor, MaskFormerImageProcessor)


@pytest.mark.parametrize(
    ("task", "per_class", "columns", "rows"),
    [
        (
            "semantic",
            {"per_category_iou": [0.5, np.nan, 0.25], "per_category_accuracy": [0.75, np.nan, 1.0]},
            ("IoU", "accuracy"),
            {"person": (50, 75), "sky": (25, 100), "mean": ("mean_iou", "mean_accuracy")},
        ),
        (
            "panoptic",
            {"per_category": {0: {"pq": 0.5, "sq": 0.75, "rq": 0.25}}},
            ("PQ", "SQ", "RQ"),
            {
                "person": (50, 75, 25),
                "things": ("pq_things", "sq_things", "rq_things"),
                "stuff": ("pq_stuff", "sq_stuff", "rq_stuff"),
                "mean": ("pq", "sq", "rq"),
            },
        ),
        (
            "instance",
            {"per_category": {0: {"ap": 0.5, "ap50": 0.75, "ap75": 0.25}}},
            ("AP", "AP50", "AP75"),
            {"person": (50, 75, 25), "mean": ("ap", "ap50", "ap75")},
        ),
    ],
)
def test_every_figure_stands_under_its_name_in_the_table(task, per_class, columns, rows):
    figures = {name: (place + 1) / 100 for place, name in enumerate(FIGURES[task])}
    *lines, last = as_table({**figures, **per_class}, LABELS.id2label).splitlines()
    assert lines[0].split() == ["class", *columns]
    percent = {name: 100 * value for name, value in figures.items()}
    expected = [[name, *(f"{percent.get(value, value):.2f}" for value in values)] for name, values in rows.items()]
    assert [line.split() for line in lines[1:]] == expected
    titles = {"pixel accuracy": "overall_accuracy", "frequency-weighted IoU": "frequency_weighted_iou"}
    titles |= {"AP small": "ap_small", "AP medium": "ap_medium", "AP large": "ap_large"}
    titles |= {f"AR of {most}": f"ar{most}" for most in (1, 10, 100)}
    noted = {title: float(value) for title, value in re.findall(r"; ([\w -]+) (\d+\.\d\d)", last)}
    assert noted == pytest.approx({title: percent[name] for title, name in titles.items() if name in figures})
    assert as_json(figures, LABELS.id2label) == figures


def test_means_without_a_value_have_no_row():
    figures = dict.fromkeys(FIGURES["panoptic"], 0.5) | dict.fromkeys(("pq_things", "sq_things", "rq_things"), np.nan)
    table = as_table({**figures, "per_category": {}}, LABELS.id2label).splitlines()
    assert [line.split()[0] for line in table] == ["class", "stuff", "mean", "All"]


def test_counts_stay_whole_numbers_in_json():
    content = as_json({"per_category": {0: {"pq": 0.5, "tp": 3}}}, LABELS.id2label)
    assert repr(content["per_category"]["person"]["tp"]) == "3"


def test_crowds_of_masks_reach_average_precision():
    reference = reference_of(OF_MASKS, LABELS, "instance")
    assert reference["iscrowd"].tolist() == [False, True]


@pytest.mark.parametrize("scale_averaging", [False, True])
def test_images_are_predicted_in_evaluation_mode_under_autocast_and_the_mode_comes_back(scale_averaging):
    model, processor, states = model_for(SCENES.labels), image_processor_for(SCENES.labels, 128), []
    model.register_forward_pre_hook(
        lambda module, inputs: states.append((module.training, torch.is_autocast_enabled("cpu")))
    )
    options = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "scale_averaging": scale_averaging}
    evaluate(model.train(), processor, SCENES, "semantic", **options)
    assert set(states) == {(False, True)}
    assert model.training


def decided_model():
    """Several of its classes occur, and the images differ in them."""
    model = model_for(SCENES.labels)
    with torch.no_grad():
        model.class_predictor.weight.mul_(4)
        [*model.mask_embedder.parameters()][-2].mul_(100)
    return model


def described(result, task):
    """The label at each pixel of a result, or of instances, of the highest-scoring; -1 for none."""
    if task == "semantic":
        return result.numpy()
    label_of = {info["id"]: info["label_id"] for info in result["segments_info"]}
    ids = result["segmentation"]
    if task == "instance":
        masks = np.array([decode_mask(mask, (64, 64)) for mask in ids])
        ids = np.where(masks.any(0), masks.argmax(0) + 1, 0)
    return np.vectorize(lambda number: label_of.get(number, -1))(np.asarray(ids))


@pytest.mark.parametrize("task", TASKS)
def test_every_result_is_told_with_its_sample(task):
    model, processor, told = decided_model(), image_processor_for(SCENES.labels, 64, task=task), [[], []]
    processor.panoptic_thresholds = {"threshold": 0.1, "overlap_mask_area_threshold": 0.0}
    for results, batch_size in zip(told, (1, 3), strict=True):
        evaluate(model, processor, SCENES, task, batch_size=batch_size, on_result=lambda *args: results.append(args))  # noqa: B023
    assert [entry[:2] for entry in told[0]] == [(index, SCENES[index]["name"]) for index in range(3)]
    maps = [[described(result, task) for *_, result in results] for results in told]
    assert (np.array(maps[0]) == np.array(maps[1])).mean() > 0.99  # near ties may fall either way
    assert all((maps[0][index] != maps[0][index - 1]).mean() > 0.02 for index in range(3))


def test_averaged_scales_are_counted_as_the_surest_class_of_each_pixel():
    model, processor = decided_model(), image_processor_for(SCENES.labels, 128)
    metric, scales = metric_for("semantic", SCENES.labels), [round(128 * scale) for scale in evaluation.SCALES]
    for index in range(len(SCENES)):
        scores = augmented_semantic_scores(
            model, processor, SCENES[index]["image"], shortest_edges=scales, longest_edge=896
        )
        metric.add(prediction=scores.argmax(0), reference=reference_of(SCENES[index], SCENES.labels, "semantic"))
    expected = metric.compute()["per_category_iou"]
    found = evaluate(model, processor, SCENES, "semantic", scale_averaging=True)["per_category_iou"]
    np.testing.assert_allclose(found, expected)


def test_a_model_of_half_precision_is_evaluated():
    model, processor = model_for(SCENES.labels), image_processor_for(SCENES.labels, 64)
    batch, sizes = processor([SCENES[0]["image"]], return_tensors="pt"), [(64, 64)]
    (expected,) = predict_batch(model, processor, batch, sizes, "semantic")
    (found,) = predict_batch(model.bfloat16(), processor, batch, sizes, "semantic")
    assert (found == expected).float().mean() > 0.8


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"size": {"shortest_edge": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": 384}},
        {"size": {"shortest_edge": 100, "longest_edge": 384}},
        {"size": {"max_height": 384, "max_width": 384}},
        {"size": {"height": 64, "width": 384}},
    ],
)
def test_scales_are_relative_to_the_size_at_which_an_image_is_evaluated(settings):
    scenes, sizes = GeneratedScenes(1, image_size=(64, 384)), []
    model, processor = model_for(SCENES.labels), MaskFormerImageProcessor(size_divisor=0, **settings)
    model.register_forward_pre_hook(
        lambda _, _args, inputs: sizes.append(tuple(inputs["pixel_values"].shape[-2:])), with_kwargs=True
    )
    evaluate(model, processor, scenes, "semantic", scale_averaging=True)
    assert sizes[::2] == sizes[1::2] == [(round(64 * scale), round(384 * scale)) for scale in evaluation.SCALES]


def test_scales_of_an_image_of_one_row_have_a_pixel():
    scenes = GeneratedScenes(1, image_size=(64, 384))
    processor = MaskFormerImageProcessor(size={"height": 1, "width": 384})
    assert evaluate(model_for(SCENES.labels), processor, scenes, "semantic", scale_averaging=True)


def test_a_panoptic_prediction_in_a_folder_is_named_with_it(tmp_path):
    dataset = Samples()
    dataset.labels = LABELS
    writer = PredictionWriter(tmp_path, "panoptic", dataset)
    writer(0, "city/a", {"segmentation": torch.zeros(1, 2, dtype=torch.int32), "segments_info": []})
    writer.finish()
    (entry,) = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert (tmp_path / "panoptic" / entry["file_name"]).is_file()


def test_there_are_no_figures_where_another_process_was_stopped(monkeypatch):
    monkeypatch.setattr(evaluation, "gather_object", lambda mine: [*mine, True])
    processor = image_processor_for(SCENES.labels, 64)
    assert evaluate(model_for(SCENES.labels), processor, SCENES, "semantic", should_stop=lambda: False) == {}


def test_the_columns_of_a_table_stand_below_each_other():
    scores = {"per_category_iou": [0.5, 1.0], "per_category_accuracy": [0.5, 1.0]}
    figures = dict.fromkeys(FIGURES["semantic"], 0.75) | scores
    *lines, _ = as_table(figures, {0: "sky", 1: "wall-other-merged"}).splitlines()
    assert [line[: len("wall-other-merged")].strip() for line in lines] == ["class", "sky", "wall-other-merged", "mean"]
    assert len({len(line) for line in lines}) == 1


def test_what_has_no_value_is_no_note_below_a_table():
    figures = dict.fromkeys(FIGURES["instance"], 0.5) | {"ap_small": np.nan, "per_category": {}}
    last = as_table(figures, LABELS.id2label).splitlines()[-1]
    assert "AP medium 50.00" in last
    assert "AP small" not in last


def test_a_figure_of_zero_is_one():
    figures = {"pq": 0.0, "per_category": {0: {"pq": 0.0, "tp": 0}}, "per_category_iou": np.array([0.0, np.nan, 1.0])}
    assert as_json(figures, LABELS.id2label) == {
        "pq": 0.0,
        "per_category": {"person": {"pq": 0.0, "tp": 0}},
        "per_category_iou": {"person": 0.0, "car": None, "sky": 1.0},
    }


class Endless(torch.utils.data.Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        return OF_CLASSES


def test_a_data_set_of_length_0_is_empty_whatever_it_would_give():
    with pytest.raises(ValueError, match="The data set is empty"):
        task_of_data(Endless())


def test_an_image_without_a_segment_is_one_of_segments():
    nothing = sample(segmentation_map=np.full((2, 4), 255), instance_id_to_semantic_id={})
    assert task_of(nothing) == "panoptic"
    reference = reference_of(nothing, LABELS, "panoptic")
    assert (reference["segmentation"].any(), reference["segments_info"]) == (False, [])


def test_what_a_data_set_ignores_is_ignored_by_reference_and_metric():
    labels = LabelSet(LABELS.id2label, ignore_index=99, thing_ids=LABELS.thing_ids)
    metric = metric_for("semantic", labels)
    metric.add(prediction=np.array([[0, 1]]), reference=np.array([[0, 99]]))
    assert metric.compute()["overall_accuracy"] == 1
    of_segments = sample(segmentation_map=np.array([[7, 0, 9]]), instance_id_to_semantic_id={7: 0, 9: 2})
    assert reference_of(of_segments, labels, "panoptic")["segmentation"].tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("task", FIGURES)
def test_results_have_the_sizes_that_are_asked_for(task):
    processor = image_processor_for(SCENES.labels, 64, task=task)
    batch = processor([SCENES[0]["image"]], return_tensors="pt")
    with torch.no_grad():
        (result,) = predict_batch(model_for(SCENES.labels), processor, batch, [(30, 50)], task)
    if task == "instance":
        assert {tuple(mask["size"]) for mask in result["segmentation"]} == {(30, 50)}
    else:
        assert tuple((result if task == "semantic" else result["segmentation"]).shape) == (30, 50)


def test_an_unknown_task_is_refused():
    processor = image_processor_for(SCENES.labels, 64)
    with pytest.raises(ValueError, match="task is 'boxes'; it must be one of semantic, instance, panoptic"):
        evaluate(model_for(SCENES.labels), processor, SCENES, "boxes")
