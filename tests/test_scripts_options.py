"""Each option of a script reaches what it is about."""

# ruff: noqa: F811 - fixtures come from another file, and are arguments here

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import call, checkpoint, config, data, load, prepare  # noqa: F401

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor, MaskFormerTrainer
from hf_maskformer.data.columns import StreamedColumns
from hf_maskformer.evaluation.prediction import Prediction


def test_evaluate_hands_on_every_option(checkpoint, data, tmp_path, monkeypatch):
    script, opened, asked, checked = load("evaluate"), [], [], []
    scenes = script.open_dataset(str(data), "val")
    monkeypatch.setattr(script, "open_dataset", lambda *args, **kw: opened.append((args, kw)) or scenes)
    monkeypatch.setattr(script, "check_samples", checked.append)
    monkeypatch.setattr(script, "evaluate", lambda *args, **kw: asked.append((*args, kw)) or {"mean_iou": 0.5})
    monkeypatch.setattr(script, "as_table", lambda *_: "")
    columns = {"split": "other", "image_column": "photo", "label_column": "map", "classes": "c.json", "format": "coco"}
    options = {"tta": True, "precision": "bfloat16", "batch_size": 3, "num_workers": 2, "task": "semantic"}
    output = tmp_path / "new" / "metrics.json"
    script.main(script.Arguments(str(checkpoint), "DATA", **columns, **options, check_data=False, output=str(output)))
    assert opened == [(("DATA", "other", "photo", "map", "c.json"), {"format": "coco"})]
    ((model, _, dataset, task, given),) = asked
    assert (dataset, task, model.dtype, given["scale_averaging"]) == (scenes, "semantic", torch.bfloat16, True)
    assert (given["batch_size"], given["num_workers"], given["on_result"], checked) == (3, 2, None, [])
    assert json.loads(output.read_text()) == {"mean_iou": 0.5}


def test_evaluate_fuses_what_the_checkpoint_says_if_it_says_so(checkpoint, data, tmp_path, monkeypatch):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    processor = MaskFormerImageProcessor.from_pretrained(model)
    processor.label_ids_to_fuse = [1]
    processor.save_pretrained(model)
    script, fused = load("evaluate"), []
    observe = lambda model, processor, *_, **options: fused.append(processor.label_ids_to_fuse) or {}  # noqa: E731
    monkeypatch.setattr(script, "evaluate", observe)
    monkeypatch.setattr(script, "as_table", lambda *_: "")
    script.main(script.Arguments(str(model), str(data)))
    assert fused == [[1]]


def test_evaluate_compares_the_classes_of_data_and_checkpoint(checkpoint, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "data")
    classes = json.loads((other / "classes.json").read_text())
    classes["id2label"]["3"] = "coin"
    (other / "classes.json").write_text(json.dumps(classes))
    call("evaluate", checkpoint=checkpoint, data=other)
    assert "names its classes differently" in capsys.readouterr().err
    classes["id2label"]["8"] = "star"
    (other / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(ValueError, match=r"has 8 classes, but .*data has 9\. Evaluate a checkpoint on data"):
        call("evaluate", checkpoint=checkpoint, data=other)


def test_predict_hands_on_thresholds_and_precision(checkpoint, tmp_path, monkeypatch):
    script, asked = load("predict"), []

    def predict(model, image_processor, image, task, **thresholds):
        asked.append((model.dtype, model.training, task, thresholds))
        return Prediction(np.zeros((image.height, image.width), int), [])

    monkeypatch.setattr(script, "predict", predict)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    thresholds = {"threshold": 0.0, "mask_threshold": 0.25, "overlap_mask_area_threshold": 0.75}
    options = {"task": "panoptic", "precision": "bfloat16", **thresholds}
    call_script = script.Arguments(str(checkpoint), str(tmp_path / "photo.png"), str(tmp_path / "out"), **options)
    script.main(call_script)
    assert asked == [(torch.bfloat16, False, "panoptic", thresholds)]


def test_a_checkpoint_of_half_precision_is_exported_in_full(checkpoint, tmp_path, monkeypatch):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    MaskFormerForInstanceSegmentation.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    script, dtypes = load("export"), []

    def observe(model, *arguments, **options):
        dtypes.append(model.dtype)
        (tmp_path / "file").touch()
        return tmp_path / "file"

    monkeypatch.setattr(script, "export_model", observe)
    script.main(script.Arguments(str(model), str(tmp_path / "out")))
    assert dtypes == [torch.float32]


@pytest.mark.parametrize("command", ["check", "parquet"])
def test_the_preparation_hands_on_every_option(command, data, tmp_path, monkeypatch):
    script, opened, inspected, written = load("prepare_dataset"), [], [], []
    scenes, inspect_samples = script.open_dataset(str(data), "val"), script.inspect_samples
    observe = lambda *args: inspected.append(args[1:]) or inspect_samples(*args)  # noqa: E731
    monkeypatch.setattr(script, "open_dataset", lambda *args, **kw: opened.append((args, kw)) or scenes)
    monkeypatch.setattr(script, "inspect_samples", observe)
    monkeypatch.setattr(script, "write_parquet", lambda *args: written.append(args) or [])
    kind, is_check = next(iter(script.FORMATS)), command == "check"
    words = ["--split", "a", "b", "--image_column=photo", "--label_column=map", "--classes=c.json", f"--format={kind}"]
    words += ["--streaming", "--num_workers=3"] if is_check else []
    arguments = [command, "DATA", *([] if is_check else ["OUT"]), *words]
    assert script.main(script.parse_arguments(arguments)) == 0
    options = {"format": kind, "streaming": is_check}
    assert opened == [(("DATA", split, "photo", "map", "c.json"), options) for split in "ab"]
    assert inspected == ([(3,), (3,)] if is_check else [])
    assert written == ([] if is_check else [(scenes, "OUT", "a"), (scenes, "OUT", "b")])


def test_the_check_prints_classes_that_never_occur_and_the_first_findings_of_each_kind(data, capsys):
    script = load("prepare_dataset")
    lines = [f"sample {number}" for number in range(60)]
    script.print_findings(script.DataReport(60, lines, lines[:2], *[None] * 2), "1 of 3 classes have no pixel")
    found = capsys.readouterr().out.splitlines()
    assert found[:2] == ["60 samples, 60 problems, 2 samples with empty segments", "1 of 3 classes have no pixel"]
    assert found[2:] == [
        "problems, the first 50:",
        *(f"  {line}" for line in lines[:50]),
        "samples with empty segments:",
        "  sample 0",
        "  sample 1",
    ]


def test_the_check_says_how_many_crowds_training_leaves_out(capsys):
    script = load("prepare_dataset")
    for num_crowds in (0, 3):
        script.print_findings(script.DataReport(5, num_crowds=num_crowds), "")
    found = capsys.readouterr().out.splitlines()
    assert found[0] == found[1] == "5 samples, 0 problems, 0 samples with empty segments"
    assert found[2:] == ["3 crowds (iscrowd 1), which training leaves out"]


def test_train_reads_and_augments_what_its_options_name(monkeypatch):
    script, opened = load("train"), []
    monkeypatch.setattr(script, "open_dataset", lambda *args, **kw: opened.append((args, kw)))
    named = {"image_column": "photo", "label_column": "map", "classes": "c.json", "format": "coco"}
    plain = script.DataArguments("nowhere/DATA", eval_split="test", change_colors=False, **named)
    plain.open("a", True)
    assert opened == [(("nowhere/DATA", "a", "photo", "map", "c.json"), {"format": "coco", "streaming": True})]
    assert plain.card() == {"dataset_tags": "nowhere/DATA", "split": "test"}
    assert not plain.build_augmentation().change_colors
    for change_colors in (True, False):
        papers = script.DataArguments("DATA", augmentation="ade20k", change_colors=change_colors)
        assert papers.build_augmentation().change_colors is change_colors


def test_train_trains_on_one_split_and_evaluates_on_the_other(config, data, tmp_path, monkeypatch):
    sizes, prepare_trainer = [], MaskFormerTrainer.__init__

    def observe(trainer, **arguments):
        sizes.append((len(arguments["train_dataset"]), len(arguments["eval_dataset"])))
        prepare_trainer(trainer, **arguments)

    monkeypatch.setattr(MaskFormerTrainer, "__init__", observe)
    options = {"train_split": "val", "eval_split": "train", "num_pictures": 0, "image_size": 64, "max_steps": 1}
    call("train", config=config, data=data, output_dir=tmp_path, **options)
    assert sizes == [(2, 4)]


def test_a_new_training_in_the_folder_of_a_model_says_what_it_replaces(checkpoint, config, data, tmp_path, capsys):
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    options = {"image_size": 64, "max_steps": 1, "num_pictures": 0, "check_data": False}
    call("train", config=config, data=data, output_dir=tmp_path, **options)
    errors = capsys.readouterr().err
    assert "already holds a model, which this run replaces" in errors
    assert "Checking samples" not in errors


def test_the_demo_leaves_a_folder_with_something_in_it_alone_and_ends_as_its_scripts_do(tmp_path, monkeypatch):
    script = load("demo")
    (tmp_path / "mine").touch()
    monkeypatch.setattr(script, "write_generated_scenes", lambda *_, **__: pytest.fail("It writes into the folder."))
    with pytest.raises(FileExistsError, match="is not empty"):
        script.main(script.Arguments(output=str(tmp_path)))
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(script, "SCRIPTS", tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as error:
        script.run("train.py", max_steps=1)
    assert error.value.returncode == 3


def test_a_damaged_sample_of_either_split_stops_the_training_before_it_starts(config, data, tmp_path):
    for split in ("train", "val"):
        damaged = shutil.copytree(data, tmp_path / split)
        Image.new("L", (64, 64), 77).save(next((damaged / "annotations" / split).iterdir()))
        with pytest.raises(ValueError, match=r"has 1 problem.*\n.*label 77"):
            call("train", config=config, data=damaged, image_size=64, max_steps=1, output_dir=tmp_path / "run")


def test_a_training_that_publishes_tells_what_its_card_says_of_the_data(config, data, tmp_path, monkeypatch):
    told = []
    for method in ("create_model_card", "push_to_hub"):
        monkeypatch.setattr(MaskFormerTrainer, method, lambda trainer, **card: told.append(card))
    monkeypatch.setattr(MaskFormerTrainer, "init_hf_repo", lambda trainer, *_: None)
    options = {"image_size": 64, "max_steps": 1, "num_pictures": 0, "push_to_hub": True, "save_strategy": "no"}
    call("train", config=config, data=data, output_dir=tmp_path / "run", **options)
    assert told == [{"dataset": data.name, "split": "val"}] * 2


@pytest.mark.slow
def test_a_stream_is_shuffled_by_the_seed_of_the_training(data, config, tmp_path, monkeypatch):
    prepare("parquet", data, tmp_path / "parquet")
    seeds, shuffle = [], StreamedColumns.shuffle
    monkeypatch.setattr(
        StreamedColumns, "shuffle", lambda stream, seed, *args: seeds.append(seed) or shuffle(stream, seed, *args)
    )
    options = {"streaming": True, "seed": 5, "image_size": 64, "max_steps": 1, "num_pictures": 0}
    call("train", config=config, data=tmp_path / "parquet", output_dir=tmp_path / "run", **options)
    assert seeds == [5]
