"""The scripts from end to end, in this process, on a few small drawn scenes."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import write_instances
from huggingface_hub import ModelCard
from models import tiny_config
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data.augmentation import PAPER_AUGMENTATIONS
from hf_maskformer.data.generated_scenes import write_generated_scenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.evaluation import evaluation

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name):
    specification = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def call(name, **options):
    script = load(name)
    command_line = [f"--{option}={value}" for option, value in options.items()]
    if name == "train":
        classes = (script.ModelArguments, script.DataArguments, MaskFormerTrainingArguments)
        command_line += ["--report_to=none", "--use_cpu=true"]
    else:
        classes = (script.Arguments,)
    script.main(*HfArgumentParser(classes).parse_args_into_dataclasses(command_line))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_generated_scenes(root, num_train=4, num_val=2, image_size=(64, 64))
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_config(freeze_batch_norm=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data, config):
    output = tmp_path_factory.mktemp("run")
    call("train", config=config, data=data, image_size=64, max_steps=2, output_dir=output)
    return output


def test_train_leaves_a_checkpoint_and_its_scores(checkpoint):
    assert MaskFormerForInstanceSegmentation.from_pretrained(checkpoint).config.id2label[3] == "disc"
    assert 0 <= json.loads((checkpoint / "eval_results.json").read_text())["eval_mean_iou"] <= 1
    assert json.loads((checkpoint / "train_results.json").read_text())["train_loss"] > 0
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    assert (settings["segmentation_task"], settings["label_ids_to_fuse"]) == ("semantic", [0, 1, 2])


@pytest.mark.parametrize("options", [{}, {"eval_strategy": "steps", "eval_steps": 2}])
def test_train_evaluates_the_final_model_once(config, data, tmp_path, monkeypatch, options):
    calls = []
    evaluate = MaskFormerTrainer.evaluate
    monkeypatch.setattr(MaskFormerTrainer, "evaluate", lambda *args, **kw: calls.append(1) or evaluate(*args, **kw))
    call("train", config=config, data=data, image_size=64, max_steps=2, output_dir=tmp_path, **options)
    assert len(calls) == 1
    assert json.loads((tmp_path / "eval_results.json").read_text()).keys() >= {"eval_mean_iou", "eval_mean_accuracy"}


@pytest.mark.parametrize("saving", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "best"}])
def test_the_best_checkpoint_is_reported_as_it_was_evaluated(config, data, tmp_path, saving):
    saving |= {"eval_strategy": "steps", "eval_steps": 1}
    options = {"load_best_model_at_end": True, "max_steps": 3, "output_dir": tmp_path, **saving}
    call("train", config=config, data=data, image_size=64, **options)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_mean_iou"] == state["best_metric"]


def test_train_leaves_a_card_that_names_the_data_but_not_where_they_lie(checkpoint, data):
    card = ModelCard.load(checkpoint / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split) == (data.name, "val")
    assert "pictures/sample_1.jpg" in card.text
    assert str(data.parent) not in card.content


def test_evaluate_gives_the_score_that_training_ended_with(checkpoint, data, tmp_path, capsys):
    call("evaluate", checkpoint=checkpoint, data=data, batch_size=2, output=tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    after_training = json.loads((checkpoint / "eval_results.json").read_text())["eval_mean_iou"]
    assert metrics["mean_iou"] == pytest.approx(after_training, abs=1e-6)
    assert metrics["per_category_iou"].keys() == set(LabelSet.from_json(data / "classes.json").id2label.values())
    assert "speckle" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_predict_writes_three_files_for_every_image(checkpoint, data, tmp_path, task):
    call("predict", checkpoint=checkpoint, input=data / "images" / "val", output=tmp_path, task=task)
    names = {path.name for path in tmp_path.iterdir()}
    endings = ("labels.png", "segments.json", "overlay.png")
    assert names == {f"scene_0000{index}_{ending}" for index in (0, 1) for ending in endings}


def test_predict_tells_how_many_images_it_could_not_read(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "b.png")
    command = [sys.executable, SCRIPTS / "predict.py", f"--checkpoint={checkpoint}"]
    command += [f"--input={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (tmp_path / "out" / "b_labels.png").exists()
    assert f"skipped: {tmp_path / 'photos' / 'a.png'} cannot be read as an image" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Images that could not be read: 1, see above.")


def test_fine_tuning_other_classes_needs_a_word(checkpoint, data, tmp_path):
    other = tmp_path / "data"
    write_two_classes(other, data)
    options = {
        "checkpoint": checkpoint,
        "data": other,
        "image_size": 64,
        "max_steps": 1,
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(ValueError, match=r"has 8 classes, but the data has 2\. Pass reinitialize_head"):
        call("train", **options)
    call("train", reinitialize_head=True, **options)
    assert MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "run").config.num_labels == 2
    with pytest.raises(ValueError, match=r"has 8 classes, but .* has 2\. Evaluate a checkpoint on data with its own"):
        call("evaluate", checkpoint=checkpoint, data=other)


def write_two_classes(root, data):
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for path in (data / "annotations" / split).iterdir():
            things = np.asarray(Image.open(path)) > 2
            Image.fromarray(things.astype(np.uint8)).save(root / "annotations" / split / path.name)
            (root / "images" / split / path.name).write_bytes((data / "images" / split / path.name).read_bytes())
    (root / "classes.json").write_text(json.dumps({"id2label": {"0": "background", "1": "object"}}))


def test_labels_that_the_classes_lack_stop_the_training_before_it_starts(data, config, tmp_path):
    write_two_classes(tmp_path / "data", data)
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"id2label": {"0": "background"}}))
    with pytest.raises(ValueError, match=r"scene_0000\d\.png contains label 1, but .*classes\.json has 1 labels"):
        call("train", config=config, data=tmp_path / "data", max_steps=1, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_wants_one_starting_point(data, tmp_path):
    with pytest.raises(ValueError, match=r"Give one of --checkpoint .*, --backbone .* and --config"):
        call("train", data=data, output_dir=tmp_path)


def test_train_reads_columns_of_a_datasets_data_set(data, config, tmp_path):
    import datasets

    columns = {
        split: datasets.Dataset.from_dict(
            {
                "photo": sorted(map(str, (data / "images" / split).iterdir())),
                "mask": sorted(map(str, (data / "annotations" / split).iterdir())),
            }
        )
        .cast_column("photo", datasets.Image())
        .cast_column("mask", datasets.Image())
        for split in ("train", "val")
    }
    datasets.DatasetDict(columns).save_to_disk(tmp_path / "columns")
    call(
        "train",
        config=config,
        data=tmp_path / "columns",
        image_column="photo",
        label_column="mask",
        classes=data / "classes.json",
        image_size=64,
        max_steps=1,
        output_dir=tmp_path / "run",
    )
    assert (tmp_path / "run" / "model.safetensors").is_file()


def prepare(*command_line):
    script = load("prepare_dataset")
    return script.main(script.parse_arguments([str(argument) for argument in command_line]))


def test_the_check_reports_how_often_each_class_occurs(data, capsys):
    assert prepare("check", data) == 0
    output = capsys.readouterr().out
    assert "4 samples, 0 problems, 0 samples with empty segments" in output
    assert "2 samples, 0 problems" in output
    assert len(re.findall(r"(?m)^ +3 +\d+\.\d{3}% +\d  disc$", output)) == 2


def test_the_check_lists_problems_and_fails(data, tmp_path, capsys):
    write_two_classes(tmp_path, data)
    (tmp_path / "images" / "val" / "scene_00001.png").unlink()
    path = tmp_path / "annotations" / "train" / "scene_00002.png"
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(path)
    assert prepare("check", tmp_path) == 1
    output = capsys.readouterr().out
    assert "4 samples, 1 problems" in output
    assert f"{path} contains label 7, but" in output
    assert "1 of 2 label files" in output
    assert "scene_00001.png" in output


def test_the_check_names_a_data_set_that_is_not_there(tmp_path, capsys):
    assert prepare("check", tmp_path / "nowhere", "--split", "train") == 1
    assert "nowhere is not a folder" in capsys.readouterr().out


def test_check_finds_classes_that_splits_number_otherwise(tmp_path, capsys):
    square = [{"category_id": 1, "segmentation": [[0, 0, 2, 0, 2, 2]]}]
    for split, names in (("train", "ab"), ("val", "ba")):
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        write_instances(tmp_path, {"a": ((4, 4), square)}, categories, split)
    assert prepare("check", tmp_path, "--split", "train") == 0
    assert prepare("check", tmp_path) == 1
    assert "'b' is class 0 in eval_dataset, but class 1 in train_dataset" in capsys.readouterr().out


@pytest.mark.slow
def test_train_and_evaluate_read_the_parquet_version_streamed_too(data, config, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet, output = tmp_path / "parquet", tmp_path / "run"
    assert prepare("parquet", data, parquet) == 0
    options = {"config": config, "data": parquet, "image_size": 64, "max_steps": 3, "output_dir": output}
    passes = []
    collate = MaskFormerDataCollator.__call__

    def observe(collator, samples):
        passes.append([sample["name"] for sample in samples])
        return collate(collator, samples)

    with monkeypatch.context() as patch:
        patch.setattr(MaskFormerDataCollator, "__call__", observe)
        call("train", streaming=True, **options)
    in_turn = [sample["name"] for sample in open_dataset(str(parquet), "train")]
    assert all(sorted(names) == in_turn for names in passes)
    assert len({tuple(names) for names in passes} | {tuple(in_turn)}) > 2  # in another order each time
    call("evaluate", checkpoint=output, data=parquet, output=tmp_path / "metrics.json")
    trained = json.loads((output / "eval_results.json").read_text())["eval_mean_iou"]
    assert json.loads((tmp_path / "metrics.json").read_text())["mean_iou"] == pytest.approx(trained, abs=1e-6)


def test_evaluate_reads_with_the_processes_and_in_the_batches_that_are_asked_for(checkpoint, data, monkeypatch):
    asked = []

    def observe(dataset, batch_size, num_workers, **options):
        asked.append((batch_size, num_workers))
        return DataLoader(dataset, batch_size, num_workers=num_workers, **options)

    monkeypatch.setattr(evaluation, "DataLoader", observe)
    call("evaluate", checkpoint=checkpoint, data=data, batch_size=2, num_workers=1)
    assert asked == [(2, 1)]


def test_train_begins_with_the_weights_of_its_seed_and_augments_by_it(config, data, tmp_path, monkeypatch):
    weights, seeds = [], []
    prepare_trainer = MaskFormerTrainer.__init__

    def observe(trainer, **arguments):
        seeds.append(arguments["train_dataset"].seed)
        prepare_trainer(trainer, **arguments)

    monkeypatch.setattr(MaskFormerTrainer, "__init__", observe)
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(run)  # what ran before does not matter
        options = {"seed": seed, "image_size": 64, "max_steps": 1, "num_pictures": 0, "check_data": False}
        call("train", config=config, data=data, output_dir=tmp_path / str(run), **options)
        weights.append(load_file(tmp_path / str(run) / "model.safetensors")["class_predictor.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert seeds == [1, 1, 2]


def test_evaluate_names_every_damaged_sample_before_it_begins(checkpoint, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/annotations/val").iterdir():
        Image.new("L", (64, 64), 77).save(path)
    with pytest.raises(ValueError, match=r"The data set of 2 samples has 2 problems:(\n.*scene_0.*label 77.*){2}"):
        call("evaluate", checkpoint=checkpoint, data=tmp_path / "data")


def test_train_takes_the_papers_augmentations_by_name(config, data, tmp_path, monkeypatch):
    options = {"config": config, "data": data, "max_steps": 1, "image_size": 64, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="augmentation is 'imagenet'; it must be one of ade20k"):
        call("train", augmentation="imagenet", output_dir=tmp_path / "none", **options)
    sizes = []
    compute_loss = MaskFormerTrainer.compute_loss

    def observe(trainer, model, inputs, *args, **kwargs):
        sizes.append(tuple(inputs["pixel_values"].shape[-2:]))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MaskFormerTrainer, "compute_loss", observe)
    call("train", augmentation="coco-panoptic", output_dir=tmp_path / "coco", **options)
    assert min(sizes.pop()) >= 480  # as augmented, which is not the size at evaluation
    crop = PAPER_AUGMENTATIONS["ade20k"]
    monkeypatch.setitem(PAPER_AUGMENTATIONS, "ade20k", replace(crop, short_edges=[crop.crop_size[0] // 2]))
    call("train", augmentation="ade20k", output_dir=tmp_path / "ade20k", **options)
    assert sizes == [crop.crop_size]


def test_train_takes_whole_images(config, tmp_path, monkeypatch):
    write_generated_scenes(tmp_path / "data", num_train=2, num_val=1, image_size=(64, 160))
    sizes = []
    compute_loss = MaskFormerTrainer.compute_loss

    def observe(trainer, model, inputs, *args, **kwargs):
        sizes.append(tuple(inputs["pixel_values"].shape[-2:]))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MaskFormerTrainer, "compute_loss", observe)
    options = {"crop": False, "min_scale": 1, "max_scale": 1, "max_steps": 1, "image_size": 64}
    call("train", config=config, data=tmp_path / "data", output_dir=tmp_path / "run", **options)
    assert sizes == [(64, 160)]


@pytest.mark.parametrize(
    "script", ["train", *(pytest.param(each, marks=pytest.mark.slow) for each in ("evaluate", "predict"))]
)
def test_a_wrong_name_ends_a_script_with_a_message_alone(script, data, tmp_path):
    options = {
        "train": {"data": data, "output_dir": tmp_path},
        "evaluate": {"data": data},
        "predict": {"input": data, "output": tmp_path},
    }[script] | {"checkpoint": tmp_path / "nowhere"}
    command = [sys.executable, SCRIPTS / f"{script}.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'nowhere'} is not a folder with a config.json")
    assert "Traceback" not in done.stderr


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Runs a subject of the benchmark once on tiny models, and gives what it wrote with --json."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = load("benchmark")
    small = {**script.models.BACKBONES["resnet50"], "hidden_sizes": [8, 16, 32, 64], "embedding_size": 8}
    monkeypatch.setitem(script.models.BACKBONES, "resnet50", small)

    def run(*command_line):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(
            sys, "argv", ["benchmark.py", *command_line, "--repeats=1", "--threads=0", f"--json={file}"]
        )
        script.main(script.parse_arguments())
        return json.loads(file.read_text())

    return run


@pytest.mark.parametrize(
    ("command_line", "comparisons"),
    [
        ("forward --size=64", {"forward": ["stock", "ours"]}),
        ("forward --size=64 --batch=2 --kept=20", {"forward": ["stock", "ours", "ours, 20 kept"]}),
        (
            "forward --size=64 --width 64 96 --kept=20 --bf16",
            {"forward": ["stock", "ours", "ours, 20 kept", "stock, no autocast", "ours, no autocast"]},
        ),
        pytest.param(
            "forward --size=64 --compile --onnx",
            {
                "forward": ["stock", "ours", "ONNX Runtime"],
                "compiled": ["stock", "ours", "ours, not compiled"],
                "compiled, frozen": ["stock", "ours", "ours, not compiled"],
            },
            marks=pytest.mark.slow,
        ),
        ("photo --size=64", {"photo": ["stock", "ours"]}),
        ("load --backbone=resnet50", {"load": ["stock", "ours"]}),
        ("step --size=64", {"step": ["stock", "ours"]}),
        # Where a processor has no bfloat16, it takes a minute.
        pytest.param("step --size=64 --freeze_batch_norm --bf16", {"step": ["stock", "ours"]}, marks=pytest.mark.slow),
        ("criterion --size=64 --points=64", {"criterion": ["stock", "ours", "ours, points"]}),
        (
            "postprocess --size=64",
            {
                "semantic": ["stock", "naive", "ours, paper", "ours, direct", "ours, fast"],
                "panoptic": ["stock", "ours"],
                "instance": ["stock", "ours"],
                "instance, masks": ["stock", "ours"],
                "instance, run lengths": ["stock", "ours"],
            },
        ),
        (
            "preprocess --batch=1 --edges 48 64",
            {
                "images 48": ["stock, Pillow", "ours"],
                "images and maps 48": ["stock, Pillow", "ours", "ours, masks"],
                "images 64": ["stock, Pillow", "ours"],
                "images and maps 64": ["stock, Pillow", "ours", "ours, masks"],
            },
        ),
        ("data --size=64 --batch=2", {"data": ["stock, Pillow", "ours", "reading"]}),
        ("metric --size=64 --batch=10", {"metric": ["stock", "ours"]}),
    ],
)
def test_every_subject_of_the_benchmark_gives_the_ratio_of_each_peer_to_stock(command_line, comparisons, benchmark):
    figures = benchmark(*command_line.split())["figures"]
    assert list(figures) == list(comparisons)
    for name, peers in comparisons.items():
        measured = figures[name]
        assert [peer for peer in measured if peer != "stock, torchvision"] == peers
        for values in measured.values():
            assert values["ratio"] == pytest.approx(measured[peers[0]]["median_ms"] / values["median_ms"])


@pytest.mark.parametrize("subject", ["forward", pytest.param("step", marks=pytest.mark.slow)])
def test_the_benchmark_tells_where_the_time_goes(subject, benchmark):
    for values in benchmark(subject, "--size=64", "--profile")["figures"][subject].values():
        shares = {name: value for name, value in values.items() if name.endswith("_share")}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[f"{kind}_share"] for kind in ("convolutions", "products", "norms")) > 0
        assert values["of_peak"] > 0


def test_the_share_of_the_peak_is_the_work_of_the_first_peer_in_the_time_of_each(benchmark, monkeypatch):
    breakdown = sys.modules["benchmarks.breakdown"]
    monkeypatch.setattr(breakdown, "products_per_second", lambda device, dtype: 4e9)
    factor = torch.ones(100, 100)
    figures = {"stock": {"median_ms": 1.0}, "ours": {"median_ms": 0.5}, "elsewhere": {"median_ms": 1.0}}
    peers = {"stock": lambda: factor @ factor, "ours": lambda: factor + factor, "elsewhere": lambda: None}
    breakdown.add_breakdown(figures, peers, "cpu", torch.float32)
    # 2 million operations in a millisecond are half of 4 billion in a second.
    assert [values["of_peak"] for values in figures.values()] == pytest.approx([0.5, 1.0, 0.5])
    assert figures["stock"]["products_share"] > 0.5
    assert figures["ours"]["others_share"] == 1
    assert "others_share" not in figures["elsewhere"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process's memory")
def test_the_benchmark_tells_that_our_criterion_takes_less_memory(benchmark):
    figures = benchmark("criterion", "--size=128")["figures"]["criterion"]
    assert 0 < figures["ours"]["peak_mib"] < figures["stock"]["peak_mib"] / 2


def test_the_benchmark_draws_how_the_criterion_grows(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys.modules["benchmarks.criterion"], "SWEEPS", {"size": (64, 96), "segments": (2, 4)})
    figures = benchmark("criterion", "--size=64", f"--plot={tmp_path / 'growth.png'}")["figures"]
    assert list(figures) == ["size 64", "size 96", "segments 2", "segments 4"]
    assert Image.open(tmp_path / "growth.png").width > 500


@pytest.mark.slow
def test_the_benchmark_draws_how_latency_grows(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sys.modules["benchmarks.models"], "PLOT_SIZES", (64, 96))
    figures = benchmark("forward", f"--plot={tmp_path / 'latency.png'}")["figures"]
    assert list(figures) == ["size 64", "size 96"]
    assert list(figures["size 64"]) == ["stock", "ours", "ONNX Runtime"]
    assert Image.open(tmp_path / "latency.png").width > 500


def test_the_benchmark_knows_transformers_fallback_from_its_processor_on_torchvision(benchmark, monkeypatch, capsys):
    images = sys.modules["benchmarks.images"]
    fallback = images.MaskFormerImageProcessorPil
    monkeypatch.setattr(images.transformers, "MaskFormerImageProcessor", fallback)
    assert list(images.stock_image_processors()) == ["stock, Pillow"]
    assert "torchvision image processor is not measured" in capsys.readouterr().out
    monkeypatch.setattr(images, "is_torchvision_available", lambda: True)
    assert list(images.stock_image_processors()) == ["stock, Pillow"]
    other = type("OnTorchvision", (fallback,), {})
    monkeypatch.setattr(images.transformers, "MaskFormerImageProcessor", other)
    assert list(images.stock_image_processors()) == ["stock, Pillow", "stock, torchvision"]


@pytest.mark.parametrize("file", ["docs/benchmarks.md", "Makefile", "scripts/benchmark.py"])
def test_every_written_command_of_the_benchmark_is_one(file, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = load("benchmark")
    lines = (SCRIPTS.parent / file).read_text().splitlines()
    commands = [line.split("scripts/benchmark.py ")[1] for line in lines if "python scripts/benchmark.py " in line]
    commands = [command for command in commands if not command.startswith("SUBJECT")]
    assert {command.split()[0] for command in commands} == set(script.SUBJECTS)
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *command.split()])
        assert script.parse_arguments().subject == command.split()[0]


def test_the_benchmark_refuses_to_keep_all_queries(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("forward", "--kept=100")
    assert "--kept is 100, but must be 1 to 99" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_with_accelerate_launch(data, config, tmp_path):
    """On the CPU --multi_gpu stands for torchrun; --cpu starts a single process, whatever --num_processes says."""
    options = {"config": config, "data": data, "image_size": 64, "max_steps": 2, "output_dir": tmp_path}
    options |= {"save_steps": 1}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += [
        "--main_process_port=0",
        SCRIPTS / "train.py",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    subprocess.run([*command, "--report_to=none", "--use_cpu=true"], check=True, timeout=300)
    assert sorted(path.name for path in (tmp_path / "checkpoint-2").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    alone = tmp_path / "metrics.json"
    call("evaluate", checkpoint=tmp_path, data=data, output=alone)
    together = json.loads((tmp_path / "eval_results.json").read_text())["eval_mean_iou"]
    assert together == pytest.approx(json.loads(alone.read_text())["mean_iou"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ddp", ["--num_processes=8"], {"multi_gpu": True, "nproc_per_node": "8"}),
        ("bf16", [], {"multi_gpu": True, "nproc_per_node": "2"}),
        ("fsdp2", ["--mixed_precision=bf16"], {"use_fsdp": True, "nproc_per_node": "2"}),
        (
            "multi_node",
            ["--machine_rank=1", "--main_process_ip=host"],
            {"multi_gpu": True, "nproc_per_node": "8", "nnodes": "2", "node_rank": 1, "rdzv_endpoint": "host:29500"},
        ),
    ],
)
def test_the_configurations_for_accelerate_start_what_they_promise(name, options, expected):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = SCRIPTS / f"configs/accelerate/{name}.yaml"
    arguments = launch.launch_command_parser().parse_args([f"--config_file={file}", *options, "train.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert {key: getattr(arguments, key) for key in expected} == expected
    is_bf16 = name == "bf16" or "--mixed_precision=bf16" in options
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("bf16" if is_bf16 else "no")
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    else:
        assert "ACCELERATE_USE_FSDP" not in environment


def test_the_demo_leaves_all_it_promises(tmp_path):
    output = tmp_path / "demo"
    command = [
        sys.executable,
        SCRIPTS / "demo.py",
        f"--output={output}",
        "--num_train=8",
        "--num_val=2",
        "--max_steps=1",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert (output / "checkpoint" / "model.safetensors").is_file()
    assert "mean_iou" in json.loads((output / "metrics.json").read_text())
    for picture in ("scene_00000.png", "scene_00001.png"):
        assert str(output / "pictures" / picture) in done.stdout
        assert Image.open(output / "pictures" / picture).width > 3 * 128


@pytest.mark.slow
def test_the_demo_reaches_its_score(tmp_path):
    subprocess.run([sys.executable, SCRIPTS / "demo.py", f"--output={tmp_path / 'demo'}"], check=True, timeout=900)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["mean_iou"] >= 0.75
    assert len(list((tmp_path / "demo" / "pictures").glob("*.png"))) >= 4


def test_padding_has_an_effect_only_where_there_is_padding(checkpoint, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)

    def moves(name, width):
        Image.fromarray(pixels[:, :width]).save(tmp_path / name)
        call("padding_effect", checkpoint=checkpoint, input=tmp_path / name)
        rows = [line.split("|")[1:] for line in capsys.readouterr().out.splitlines() if "%" in line]
        return {row[0].strip(): float(row[3]) for row in rows}  # of mask logits

    square, wide = moves("square.png", 64), moves("wide.png", 96)
    assert list(square) == ["transformers", "this package", "with `mask_padding`"]
    assert set(square.values()) == {0}
    assert all(value > 0 for value in wide.values())


def run_as_program(name, *command_line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *command_line])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("train --lerning_rate=1", "there is no option --lerning_rate. Did you mean --learning_rate?"),
        ("train --preset=ade20k-r50 --dry-runn", "there is no option --dry-runn. Did you mean --dry-run?"),
        ("evaluate --chekpoint=x --data=y", "there is no option --chekpoint. Did you mean --checkpoint?"),
        ("predict --checkpoint=x --inptu y", "there is no option --inptu. Did you mean --input?"),
        ("predict --xyzzy", "there is no option --xyzzy."),
        ("convert_checkpoint a b --perset x", "there is no option --perset. Did you mean --preset?"),
        ("prepare_dataset check x --splt val", "there is no option --splt. Did you mean --split?"),
        ("train --max_steps=many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
    ],
)
def test_an_option_that_does_not_exist_is_answered_by_the_nearest(command_line, message, monkeypatch, capsys):
    assert run_as_program(*command_line.split(), monkeypatch=monkeypatch) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[0] == f"error: {message}"
    assert len(shown) == 2


def test_the_help_of_training_is_its_own_options_and_all_only_if_asked(monkeypatch, capsys):
    helps = {}
    for option in ("--help", "--help_all"):
        assert run_as_program("train", option, monkeypatch=monkeypatch) == 0
        helps[option] = capsys.readouterr().out
    for shown in ("--preset", "--data", "--max_steps", "--learning_rate", "(default: 0.0001)", "--help_all"):
        assert shown in helps["--help"]
    assert "--fsdp" not in helps["--help"]
    assert "--fsdp" in helps["--help_all"]


def test_the_export_script_hands_on_sizes_and_the_thresholds_of_panoptic_segments(checkpoint, tmp_path, monkeypatch):
    calls = []

    def export_model(model, image_processor, *arguments, **options):
        calls.append((arguments, options))
        (tmp_path / "model").touch()
        return tmp_path / "model"

    script = load("export")
    monkeypatch.setattr(script, "export_model", export_model)
    for options in ({"task": "panoptic", "threshold": 0.25}, {"task": "semantic"}, {"threshold": 0.5}):
        script.main(script.Arguments(str(checkpoint), "out", size=[64, 96], **options))
    sizes = {"size": (64, 96), "output_size": None}
    assert calls == [
        (("out", "onnx", "panoptic"), {**sizes, "threshold": 0.25}),  # the others are the checkpoint's
        (("out", "onnx", "semantic"), sizes),
        (("out", "onnx", "logits"), {**sizes, "threshold": 0.5}),  # which is refused there
    ]
    with pytest.raises(ValueError, match="--size takes a height and a width"):
        script.main(script.Arguments(str(checkpoint), "out", size=[64]))


def test_prediction_does_what_the_checkpoint_was_trained_for(checkpoint, data, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    processor = MaskFormerImageProcessor.from_pretrained(model)
    processor.segmentation_task = "panoptic"
    processor.save_pretrained(model)
    image = data / "images" / "val" / "scene_00000.png"
    for folder, options in (("default", {}), ("named", {"task": "semantic"})):
        call("predict", checkpoint=model, input=image, output=tmp_path / folder, **options)
    tasks = [
        json.loads((tmp_path / folder / "scene_00000_segments.json").read_text())["task"]
        for folder in ("default", "named")
    ]
    assert tasks == ["panoptic", "semantic"]


def test_a_new_training_does_not_mix_with_the_checkpoints_of_another(data, config, tmp_path):
    options = {"config": config, "data": data, "image_size": 64, "save_steps": 1, "output_dir": tmp_path / "run"}
    call("train", max_steps=1, **options)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run holds checkpoints of another run, such as .*checkpoint-1"):
        call("train", max_steps=1, **options)
    call("train", max_steps=1, resume_from_checkpoint="auto", **options)
    assert (tmp_path / "run" / "metrics.json").is_file()  # of the model that is still there
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["train_loss"] > 0
    call("train", max_steps=2, resume_from_checkpoint="auto", **options)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_dir": "file"}, ValueError, "but file is a file"),
        ({"output_dir": "file/run"}, ValueError, "but file is a file"),
        ({"output_dir": "nowhere"}, ValueError, "the folder of the data"),
        ({"report_to": "wandb"}, ImportError, "--report_to wandb: it is not installed"),
        ({"report_to": "tensorbord"}, ValueError, "--report_to tensorbord is unknown"),
    ],
)
def test_what_a_training_cannot_have_shows_before_the_data_are_read(
    config, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    script = load("train")
    command_line = [
        f"--{name}={value}" for name, value in {"output_dir": "run", "report_to": "none", **options}.items()
    ]
    arguments, _ = script.parse_arguments([f"--config={config}", "--data=nowhere", "--use_cpu=true", *command_line])
    with pytest.raises(error, match=message):
        script.main(*arguments)


def test_other_classes_than_the_checkpoint_s_show_before_the_data_are_read(checkpoint, data, tmp_path, monkeypatch):
    write_two_classes(tmp_path / "data", data)
    script = load("train")
    monkeypatch.setattr(script, "check_samples", lambda *_: pytest.fail("The data were read."))
    command_line = [f"--checkpoint={checkpoint}", f"--data={tmp_path / 'data'}", "--use_cpu=true", "--report_to=none"]
    arguments, _ = script.parse_arguments([*command_line, f"--output_dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="classes, but the data has 2"):
        script.main(*arguments)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train", {"data": "nowhere", "config": "small.json", "output_dir": "closed/run"}),
        ("train", {"data": "nowhere", "config": "small.json", "output_dir": "closed/run", "dry_run": True}),
        ("evaluate", {"data": "nowhere", "checkpoint": "nowhere", "output": "closed/figures.json"}),
        ("evaluate", {"data": "nowhere", "checkpoint": "nowhere", "predictions": "closed/run"}),
        ("predict", {"input": "nowhere", "checkpoint": "nowhere", "output": "closed/run"}),
        ("export", {"checkpoint": "nowhere", "output": "closed/run"}),
    ],
)
def test_what_cannot_be_written_shows_before_anything_is_read(tmp_path, monkeypatch, capsys, name, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir()
    # The superuser may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "closed")
    shutil.copy(SCRIPTS / "configs/small.json", tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *(f"--{key}={value}" for key, value in options.items())])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert re.search(r"error: --\w+ is closed/\S+, but closed is not writable", capsys.readouterr().err)


def test_a_file_in_the_place_of_a_folder_shows_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output is file, but file is a file"):
        call("predict", checkpoint="nowhere", input="nowhere", output="file")
    for option in ({"predictions": "file"}, {"output": "file/figures.json"}):
        with pytest.raises(ValueError, match="but file is a file"):
            call("evaluate", checkpoint="nowhere", data="nowhere", **option)


def test_predictions_do_not_lie_among_the_images(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="The results would be among the images"):
        call("predict", checkpoint=checkpoint, input=tmp_path, output=f"{tmp_path}/.")


def test_predict_takes_thresholds(checkpoint, tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "photo.png")
    for threshold, name in ((0.0, "all"), (1.0, "none")):
        options = {"task": "panoptic", "threshold": threshold, "overlap_mask_area_threshold": 0.0}
        call("predict", checkpoint=checkpoint, input=tmp_path / "photo.png", output=tmp_path / name, **options)
    counts = [
        len(json.loads((tmp_path / name / "photo_segments.json").read_text())["segments"]) for name in ("all", "none")
    ]
    assert counts[0] > counts[1] == 0


def test_a_folder_above_a_checkpoint_and_a_file_in_it_are_answered(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, but .*run has"):
        call("predict", checkpoint=tmp_path, input="photo.jpg", output=tmp_path / "out")
    with pytest.raises(OSError, match=r"config\.json is not a weight file\. Name the folder"):
        call("predict", checkpoint=tmp_path / "run" / "config.json", input="photo.jpg", output=tmp_path / "out")
    (tmp_path / "run" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"run has no preprocessor_config\.json\. Save the image processor there too"):
        call("predict", checkpoint=tmp_path / "run", input="photo.jpg", output=tmp_path / "out")


def test_a_data_set_of_which_a_split_cannot_be_written_is_not_called_complete(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data" / "images" / "train").iterdir()).write_bytes(b"damaged")
    script = load("prepare_dataset")
    assert script.main(script.parse_arguments(["parquet", str(tmp_path / "data"), str(tmp_path / "out")])) == 1
    assert "out is incomplete: train and any later splits were not written." in capsys.readouterr().out
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
