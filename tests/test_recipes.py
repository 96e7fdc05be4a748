"""The recipes of the paper, and what the command line makes of them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import Golden
from models import tiny_config, tiny_model
from test_conversion import backbone_files, to_torchvision, write_pkl, write_pth
from test_per_pixel_baseline import tiny_baseline
from test_scripts import SCRIPTS, load
from transformers import Dinov2Config, ResNetConfig, ResNetForImageClassification

from hf_maskformer import (
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainingArguments,
)
from hf_maskformer.data import layouts
from hf_maskformer.data.augmentation import PAPER_AUGMENTATIONS
from hf_maskformer.data.generated_scenes import GeneratedScenes, write_generated_scenes
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.hub.key_table import to_original
from hf_maskformer.training import presets
from hf_maskformer.training.model_arguments import ModelArguments
from hf_maskformer.training.parameter_groups import parameter_groups
from hf_maskformer.training.presets import PRESETS
from hf_maskformer.training.recipes import RECIPES, accumulation, check_data, recipe_image_processor
from hf_maskformer.training.starting_point import check_backbone, load_backbone_weights

DOCS = Path(__file__).parents[1] / "docs"
# Images in a step, steps, name of the augmentation, of the paper's recipes.
BY_DATA = {
    "ade20k": (16, 160_000, "ade20k"),
    "ade20k-full": (16, 200_000, "ade20k"),
    "cityscapes": (16, 90_000, "cityscapes"),
    "coco-stuff-10k": (32, 60_000, "coco-stuff-10k"),
    "mapillary-vistas": (16, 300_000, "mapillary-vistas"),
    "coco-panoptic": (64, 554_400, "coco-panoptic"),
    "ade20k-panoptic": (16, 720_000, "ade20k-640"),
}
OTHER_AUGMENTATION = {
    "ade20k-swin-base": "ade20k-640",
    "ade20k-swin-large": "ade20k-640",
    "coco-panoptic-swin-large": "coco-panoptic-1000",
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_paper_s_recipe(name):
    data = max((data for data in BY_DATA if name.startswith(data)), key=len)
    batch_size, steps, augmentation = BY_DATA[data]
    options = RECIPES[name].options()
    assert RECIPES[name].data.batch_size == batch_size
    assert options["max_steps"] == steps
    assert options["augmentation"] == OTHER_AUGMENTATION.get(name, augmentation)
    assert options["augmentation"] in PAPER_AUGMENTATIONS
    optimiser = ("learning_rate", "weight_decay", "backbone_learning_rate_factor", "warmup_steps", "warmup_factor")
    if "swin" in name:
        expected = (6e-5, 0.01, 1.0, 1500, 1e-6)
    else:
        expected = (1e-4, 1e-4, 0.1, 10 if data == "coco-panoptic" else 0, 1.0)
    assert tuple(options[option] for option in optimiser) == expected
    assert options["max_grad_norm"] == 0.01
    assert not options["bf16"]
    assert not options["fp16"]
    assert options["paper_schedule"] == ("steps" if data == "coco-panoptic" else "poly")
    if data == "coco-panoptic":
        assert [round(share * steps) for share in options["lr_milestones"]] == [369_600]


@pytest.mark.parametrize(
    ("variant", "preset"),
    [
        ("resnet_semantic", "ade20k-r50"),
        ("swin_semantic", "ade20k-swin-tiny"),
        ("resnet_panoptic_enc", "coco-panoptic-r50"),
        ("per_pixel_baseline", "ade20k-per-pixel-baseline-r50"),
        ("per_pixel_baseline_plus", "ade20k-per-pixel-baseline-plus-r50"),
    ],
)
def test_parameter_groups_of_a_recipe_are_the_original_s(variant, preset):
    golden, backbone = Golden(variant), RECIPES[preset].backbone
    groups = parameter_groups(
        golden.model, backbone.learning_rate, backbone.weight_decay, backbone.backbone_learning_rate_factor
    )
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {name: p for name, p in golden.model.named_parameters() if p.requires_grad}
    ours = to_original({name: torch.tensor(settings[id(p)]).expand(3, 2) for name, p in named.items()})
    assert golden.meta["param_groups"].keys() <= ours.keys()
    for name, expected in golden.meta["param_groups"].items():
        assert ours[name][0].tolist() == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("batch_size", "devices", "per_device", "steps", "expected"),
    [
        (16, 8, None, None, (2, 1)),
        (16, 1, None, None, (2, 8)),
        (16, 16, None, None, (1, 1)),
        (64, 8, None, None, (2, 4)),
        (32, 1, 4, None, (4, 8)),
        (16, 2, None, 2, (4, 2)),
        (16, 2, 3, 1, (3, 1)),  # both given: they win over the recipe
    ],
)
def test_images_of_a_step_are_divided(batch_size, devices, per_device, steps, expected):
    assert accumulation(batch_size, devices, per_device, steps) == expected


@pytest.mark.parametrize(
    ("devices", "per_device", "steps", "message"),
    [
        (3, None, None, r"16 images per step, which is not divisible by 3 processes. Start 1, 2, 4, 8 or 16"),
        (2, 3, None, r"--per_device_train_batch_size 3\. Set it to 1, 2, 4 or 8; or set both"),
        (2, None, 5, r"--gradient_accumulation_steps 5\. Set it to 1, 2, 4 or 8"),
        (16, 2, None, r"Set it to 1; or"),
        (2, 0, None, r"--per_device_train_batch_size 0\. Set it to 1, 2, 4 or 8"),
    ],
)
def test_images_that_do_not_divide_are_refused_with_what_would(devices, per_device, steps, message):
    with pytest.raises(ValueError, match=message):
        accumulation(16, devices, per_device, steps)


def parse(*options):
    command_line = [*options, "--use_cpu=true", "--report_to=none", "--data=DATA"]
    (model, data, training), sources = load("train").parse_arguments(command_line)
    return model, data, training, sources


def test_a_step_is_spread_over_all_gpus_of_a_process(monkeypatch):
    monkeypatch.setattr(MaskFormerTrainingArguments, "n_gpu", 4, raising=False)
    _, _, training, _ = parse("--preset=ade20k-r50", "--per_device_train_batch_size=2")
    assert training.gradient_accumulation_steps == 2


def test_a_preset_sets_what_the_command_line_leaves_open():
    _, data, training, sources = parse("--preset=ade20k-swin-base", "--max_steps=100", "--learning_rate=1e-3")
    assert (data.image_size, data.augmentation) == (640, "ade20k-640")
    assert (training.max_steps, training.learning_rate, training.weight_decay) == (100, 1e-3, 0.01)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)
    assert (training.eval_steps, training.save_steps) == (5000, 5000)
    found = {name: sources[name] for name in ("max_steps", "weight_decay", "gradient_accumulation_steps", "eval_steps")}
    assert list(found.values()) == ["command line", "paper", "computed", "package"]


def test_an_option_given_as_it_is_by_default_still_wins():
    _, _, training, sources = parse("--preset=ade20k-swin-tiny", "--learning_rate=1e-4", "--warmup-steps=0")
    assert (training.learning_rate, training.warmup_steps) == (1e-4, 0)
    assert sources["learning_rate"] == sources["warmup_steps"] == "command line"


@pytest.mark.parametrize(("processes", "parts"), [(1, 8), (2, 4), (8, 1)])
def test_gradients_are_accumulated_up_to_the_paper_s_images(processes, parts, monkeypatch):
    monkeypatch.setattr(MaskFormerTrainingArguments, "world_size", property(lambda self: processes))
    _, _, training, _ = parse("--preset=ade20k-r50")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, parts)


def test_options_that_mean_the_same_outrank_the_recipe_too():
    _, data, training, _ = parse(
        "--preset=ade20k-r50", "--num_train_epochs=3", "--lr_scheduler_type=cosine", "--image_size=64"
    )
    assert (training.max_steps, training.num_train_epochs) == (-1, 3)
    assert training.paper_schedule is None
    assert data.augmentation is None
    assert data.build_augmentation().crop_size == (64, 64)


@pytest.mark.parametrize("preset", ["ade20k-r50", "cityscapes-r101", "mapillary-vistas-r50", "coco-panoptic-r50"])
def test_colours_can_be_left_as_they_are_without_another_change(preset, caplog):
    _, as_in_paper, _, _ = parse(f"--preset={preset}")
    _, without, _, _ = parse(f"--preset={preset}", "--change_colors=false")
    recipe, found = as_in_paper.build_augmentation(), without.build_augmentation()
    assert found == (recipe if preset == "coco-panoptic-r50" else replace(recipe, change_colors=False))
    assert "is replaced" not in caplog.text


@pytest.mark.parametrize(
    ("options", "pad_size"),
    [
        (["--preset=ade20k-r50"], (512, 512)),
        (["--preset=cityscapes-r101"], (512, 1024)),
        (["--preset=ade20k-panoptic-r50"], (640, 640)),
        (["--preset=coco-panoptic-r50"], None),
        (["--preset=ade20k-r50", "--image_size=64"], None),
        (["--config=c", "--image_size=64"], None),
    ],
)
def test_images_of_a_recipe_are_filled_up_to_its_crops_in_training_alone(options, pad_size):
    """As by the paper's code, so that positions and the share of padding are those of its training."""
    _, data, _, _ = parse(*options)
    processor = MaskFormerImageProcessor(ignore_index=255)
    found = data.training_processor(processor).pad_size
    assert found == (pad_size and dict(zip(("height", "width"), pad_size, strict=True)))
    assert processor.pad_size is None


def test_sizes_that_a_named_augmentation_does_not_use_are_told_of(caplog):
    parse("--config=c", "--augmentation=ade20k", "--image_size=64", "--min_scale=1", "--crop=false")
    assert "--min_scale, --crop: ignored, as the augmentation 'ade20k' has its own" in caplog.text
    caplog.clear()
    parse("--config=c", "--image_size=64", "--min_scale=1")
    parse("--config=c", "--augmentation=ade20k", "--image_size=64")
    assert not caplog.text


def test_images_of_a_recipe_are_filled_up_to_whole_patches():
    _, data, _, _ = parse("--preset=ade20k-r50")
    processor = data.training_processor(MaskFormerImageProcessor(size_divisor=14))
    assert processor.pad_size == {"height": 518, "width": 518}


def test_sizes_that_take_the_place_of_the_recipe_s_augmentation_are_told_of(caplog):
    _, data, _, _ = parse("--preset=cityscapes-r101", "--max_scale=1.5")
    assert "--max_scale: the recipe's augmentation 'cityscapes' is replaced by --image_size, --min_scale" in caplog.text
    assert data.build_augmentation().crop_size == (1024, 1024)


def test_without_a_preset_nothing_changes():
    _, data, training, sources = parse("--config=x")
    assert (data.augmentation, data.image_size, training.max_steps) == (None, 512, -1)
    assert training.paper_schedule is None
    assert training.gradient_accumulation_steps == 1
    assert set(sources) == {"config", "use_cpu", "report_to", "data"}


def test_departures_from_the_paper_are_said_aloud(monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.training.recipe_options.logger.warning", warnings.append)
    parse("--preset=ade20k-r50", "--max_steps=100")
    assert not warnings
    batch = ("--per_device_train_batch_size=3", "--gradient_accumulation_steps=1")
    parse("--preset=ade20k-swin-tiny", "--max_steps=100", *batch)
    assert "A step has 3 images, but the paper's learning rate is for 16" in warnings[0]
    assert "ends after 100 steps, within the 1500 of the warm-up" in warnings[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset=ade20k-r5O"], r"There is no preset 'ade20k-r5O'\. Similar names are ade20k-r50"),
        (["--preset=ade20k-r50", "--config=x"], "--preset has its own configuration"),
        (["--preset=ade20k-r50", "--backbone=x", "--backbone_weights=y"], "Give only one of --checkpoint, --backbone"),
        (["--checkpoint=x", "--backbone_weights=y"], "--backbone_weights is for the model of --preset or --config"),
        (["--checkpoint=x", "--config=y"], "Give one of --checkpoint"),
        (["--preset=ade20k-r50", "--per_device_train_batch_size=5"], "Set it to 1, 2, 4, 8 or 16"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse(*options)


def test_training_wants_a_pretrained_backbone_and_data(monkeypatch):
    model, *_ = parse("--preset=ade20k-r50")
    with pytest.raises(ValueError, match=r"ade20k-r50 starts from a backbone trained on ImageNet\. Give --back"):
        model.check()
    model.check(is_training=False)
    with pytest.raises(ValueError, match=r"Give --data"):
        load("train").parse_arguments(["--preset=ade20k-r50", "--use_cpu=true"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        check_backbone("nowhere.pth")


class Samples(list):
    """A data set of samples with so many classes."""

    def __init__(self, samples, num_labels):
        super().__init__(samples)
        self.labels = LabelSet({label: f"class {label}" for label in range(num_labels)})


def test_other_names_of_as_many_classes_are_said_aloud(monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.training.recipes.logger.warning", warnings.append)
    sample = {"name": "a", "segmentation_map": None}
    check_data(PRESETS["mapillary-vistas-r50"], Samples([sample], 65))  # whose names are not known here
    assert not warnings
    check_data(PRESETS["cityscapes-r101"], Samples([sample], 19))
    assert "class 0 is 'class 0' in the data and 'road' there" in warnings[0]


def test_data_must_fit_a_preset():
    maps, segments = {"name": "a", "segmentation_map": None}, {"name": "b", "instance_id_to_semantic_id": {}}
    ade20k, coco = PRESETS["ade20k-r50"], PRESETS["coco-panoptic-r50"]
    with pytest.raises(ValueError, match=r"The data has 8 classes, but ade20k-r50 is a model for the 150 of ADE20K"):
        check_data(ade20k, Samples([maps], 8))
    check_data(ade20k, Samples([maps], 8), is_fine_tuning=True)
    check_data(ade20k, Samples([maps], 150))
    check_data(coco, Samples([segments], 133))
    with pytest.raises(ValueError, match=r"coco-panoptic-r50 is for panoptic segmentation, but a has no segments"):
        check_data(coco, Samples([maps], 133))
    for sample in (segments, {"name": "b", "masks": None}):
        with pytest.raises(ValueError, match=r"ade20k-r50 is for semantic .* but b has one mask per object"):
            check_data(ade20k, Samples([sample], 150))


def test_synonyms_of_classes_are_the_same_names(caplog):
    labels = layouts.named_labels("ade20k")
    synonyms = replace(labels, id2label=labels.id2label | {6: "road, route", 8: "windowpane, window "})
    assert synonyms.id2label != labels.id2label
    dataset = Samples([{"name": "a", "segmentation_map": None}], 150)
    dataset.labels = synonyms
    check_data(PRESETS["ade20k-r50"], dataset)
    assert "other names" not in caplog.text
    dataset.labels = replace(labels, id2label=labels.id2label | {6: "route"})
    check_data(PRESETS["ade20k-r50"], dataset)
    assert "class 6 is 'route' in the data and 'road' there" in caplog.text


def test_a_preset_has_its_own_task():
    segments = Samples([{"name": "b", "instance_id_to_semantic_id": {}}], 133)
    arguments = ModelArguments(preset="coco-panoptic-r50")
    for task in (None, "panoptic"):
        arguments.check_data(segments, task)
    with pytest.raises(ValueError, match="--task is instance, but coco-panoptic-r50 is for panoptic segmentation"):
        arguments.check_data(segments, "instance")


@pytest.mark.parametrize("write", [write_pkl, write_pth])
def test_a_backbone_comes_from_a_file(write, tmp_path):
    config = tiny_config(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128]))
    original, backbone = backbone_files(config)
    source = write(tmp_path / f"r.{write.__name__[-3:]}", {to_torchvision(name): t for name, t in backbone.items()})
    model = MaskFormerForInstanceSegmentation(config)
    others = {name: t.clone() for name, t in model.state_dict().items() if "encoder.encoder" not in name}
    load_backbone_weights(model, str(source))
    found = to_original(model.state_dict())
    assert all(torch.equal(found[f"backbone.{name}"], original[f"backbone.{name}"]) for name in backbone)
    decoder = "model.pixel_level_module.decoder.mask_projection.weight"
    assert torch.equal(model.state_dict()[decoder], others[decoder])
    with pytest.raises(ValueError, match=r"does not match the configuration\. Tensors unknown to the model:"):
        load_backbone_weights(tiny_model(), str(source))
    whole = write(tmp_path / f"whole.{write.__name__[-3:]}", original)
    with pytest.raises(ValueError, match="holds a whole model"):
        load_backbone_weights(model, str(whole))


def test_a_checkpoint_keeps_its_normalisation_under_a_recipe(tmp_path):
    MaskFormerImageProcessor(image_mean=[0.1, 0.2, 0.3], size_divisor=14).save_pretrained(tmp_path)
    labels = GeneratedScenes(1, image_size=(64, 64)).labels
    processor = recipe_image_processor(PRESETS["coco-panoptic-r50"], labels, 400, str(tmp_path))
    assert (processor.image_mean, processor.size_divisor) == ([0.1, 0.2, 0.3], 14)
    assert processor.size == {"shortest_edge": 400, "longest_edge": 666}
    assert processor.segmentation_task == "panoptic"
    assert processor.num_labels == labels.num_labels
    assert processor.label_ids_to_fuse == [0, 1, 2]


def dry_run(*options):
    script = load("train")
    arguments, sources = script.parse_arguments([*options, "--dry_run", "--use_cpu=true", "--report_to=none"])
    script.dry_run(*arguments, sources)


def rows(output):
    return {line.split("  ")[0]: line.split()[-2:] for line in output.splitlines() if "  " in line}


def test_a_dry_run_tells_recipe_groups_length_and_memory_without_data(capsys):
    dry_run("--preset=coco-panoptic-swin-tiny", "--weight_decay=0.02")
    output = capsys.readouterr().out
    found = rows(output)
    assert found["learning_rate"] == ["6e-05", "paper"]
    assert found["weight_decay"] == ["command", "line"]
    assert found["gradient_accumulation_steps"] == ["32", "computed"]
    assert found["classes"] == ["133", "model"]
    assert found["task"] == ["panoptic", "model"]
    groups = re.findall(r"(?m)^(rest|backbone) +(\d+) +([\d,]+) +(\S+) +(\S+)", output)
    assert [group[0] for group in groups] == ["rest", "rest", "backbone", "backbone"]
    assert [group[3:] for group in groups] == [("6e-05", "0"), ("6e-05", "0.02")] * 2
    assert sum(int(group[2].replace(",", "")) for group in groups) == pytest.approx(41.753e6, abs=500)
    assert "64 images per step: 2 on each of 1 device(s), accumulated 32 time(s)." in output
    assert "The learning rate falls to a tenth at step 369,600." in output
    assert "554,400 steps, 35,481,600 images; the number of epochs needs --data." in output
    # 41.753 million parameters of 4 bytes are 159 MiB.
    assert found["gradients, float32"][-1] == "159"
    assert found["AdamW's two moments, float32"][-1] == "319"
    assert "Not included: activations" in output


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes that call themselves as many classes as Cityscapes has."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_generated_scenes(root, num_train=4, num_val=2, image_size=(64, 64))
    content = json.loads((root / "classes.json").read_text())
    names = {label: content["id2label"].get(str(label), f"none {label}") for label in range(19)}
    replace_labels = {**content, "id2label": names}
    replace_labels.pop("palette", None)
    (root / "classes.json").write_text(json.dumps(replace_labels))
    return root


def test_a_dry_run_with_data_counts_epochs_and_checks_classes(scenes, capsys):
    dry_run("--preset=cityscapes-r101", f"--data={scenes}", "--max_steps=10")
    assert "10 steps, 160 images: 40.0 epochs of 4 images." in capsys.readouterr().out
    with pytest.raises(ValueError, match="The data has 19 classes, but ade20k-r50 is a model for the 150 of ADE20K"):
        dry_run("--preset=ade20k-r50", f"--data={scenes}")


def test_a_dry_run_of_a_configuration_needs_no_recipe(scenes, tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    dry_run(f"--config={tmp_path}", f"--data={scenes}")
    output = capsys.readouterr().out
    assert rows(output)["classes"] == ["19", "model"]
    assert "3 epochs of 4 images, about 3 steps." in output


def test_a_dry_run_refuses_a_checkpoint_of_other_classes_as_the_run_does(scenes, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    MaskFormerImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 4 classes, but the data has 19\. Pass reinitialize_head=True"):
        dry_run(f"--checkpoint={tmp_path}", f"--data={scenes}")
    dry_run(f"--checkpoint={tmp_path}", f"--data={scenes}", "--reinitialize_head=true")


def test_a_preset_trains_from_a_file_of_its_backbone_and_fine_tunes_a_checkpoint(scenes, tmp_path, monkeypatch):
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    monkeypatch.setitem(presets.BACKBONES, "r101", (ResNetConfig, sizes))
    _, backbone = backbone_files(tiny_config(ResNetConfig(**sizes)))
    backbone = {name: 0.01 * tensor.abs() + name.endswith("running_var") for name, tensor in backbone.items()}
    source = write_pth(tmp_path / "resnet.pth", {to_torchvision(name): tensor for name, tensor in backbone.items()})
    script, run = load("train"), tmp_path / "run"

    def train(*options):
        common = ["--image_size=64", "--max_steps=1", "--gradient_accumulation_steps=1", "--dataloader_num_workers=0"]
        common += ["--per_device_train_batch_size=2", "--use_cpu=true", "--report_to=none"]
        script.main(*script.parse_arguments([*options, *common])[0])

    train("--preset=cityscapes-r101", f"--data={scenes}", f"--backbone_weights={source}", f"--output_dir={run}")
    trained = to_original(MaskFormerForInstanceSegmentation.from_pretrained(run).state_dict())
    # One step at a learning rate of 1e-5.
    assert (trained["backbone.res2.0.conv1.weight"] - backbone["res2.0.conv1.weight"]).abs().max() < 1e-4
    settings = json.loads((run / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 64, "longest_edge": 128}
    other = ("--preset=ade20k-r50", f"--data={scenes}", f"--checkpoint={run}", f"--output_dir={tmp_path / 'tuned'}")
    train(*other)
    assert MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "tuned").config.num_labels == 19


def test_the_script_ends_a_dry_run_without_training(tmp_path):
    command = [sys.executable, SCRIPTS / "train.py", "--preset=ade20k-r50", "--dry-run", "--use_cpu=true"]
    done = subprocess.run([*command, f"--output_dir={tmp_path / 'run'}"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ade20k-r50: ADE20K, r50, 44.5 mIoU as reported")
    assert not (tmp_path / "run").exists()
    wrong = subprocess.run([*command, "--preset=ade20k-r5"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("error: There is no preset 'ade20k-r5'.")


def test_every_preset_has_its_command_in_the_documentation():
    commands = re.findall(r"--preset ([a-z0-9-]+)", (DOCS / "reproducing.md").read_text())
    assert set(commands) == set(PRESETS)


def test_whole_images_take_the_place_of_the_recipe_s_crops():
    _, data, _, _ = parse("--preset=ade20k-r50", "--crop=false")
    assert data.build_augmentation().crop_size is None


def test_weights_gradients_and_averages_are_all_of_the_memory(capsys):
    dry_run("--preset=ade20k-swin-tiny")
    found = rows(capsys.readouterr().out)
    parts = ("weights, float32", "gradients, float32", "AdamW's two moments, float32")
    together = int(found["in total, on each device"][-1].replace(",", ""))
    assert abs(together - sum(int(found[part][-1].replace(",", "")) for part in parts)) <= 2  # all are rounded


def test_a_checkpoint_keeps_its_normalisation_without_a_recipe_too(tmp_path):
    MaskFormerImageProcessor(image_mean=[0.1, 0.2, 0.3], size_divisor=14).save_pretrained(tmp_path)
    labels = GeneratedScenes(1, image_size=(64, 64)).labels
    processor = ModelArguments(checkpoint=str(tmp_path)).image_processor(labels, 64)
    assert (processor.image_mean, processor.size_divisor) == ([0.1, 0.2, 0.3], 14)


def test_what_a_training_begins_with_is_looked_for_before_the_data_are_read(tmp_path):
    for options in (
        {"backbone": "nowhere.pth"},
        {"preset": "ade20k-r50", "backbone_weights": "nowhere.pt"},
        {"config": "nowhere.json"},
        {"checkpoint": "nowhere.json"},
    ):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.\w+ does not exist"):
            ModelArguments(**options).check()
    ModelArguments(preset="ade20k-r50", backbone_weights="random").check()


def test_a_configuration_may_begin_with_the_weights_of_a_backbone(tmp_path):
    tiny_config().save_pretrained(tmp_path / "config")
    pretrained = ResNetForImageClassification(tiny_config().backbone_config)
    pretrained.save_pretrained(tmp_path / "backbone")
    arguments = ModelArguments(config=str(tmp_path / "config"), backbone_weights=str(tmp_path / "backbone"))
    arguments.check()
    stem = arguments.model(LabelSet({0: "sky", 1: "road"})).model.pixel_level_module.encoder.state_dict()
    name = "embedder.embedder.convolution.weight"
    assert torch.equal(stem[name], pretrained.resnet.state_dict()[name])


def test_a_preset_may_begin_with_a_backbone_by_name(tmp_path, monkeypatch):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    monkeypatch.setitem(presets.BACKBONES, "r101", (ResNetConfig, sizes))
    pretrained = ResNetForImageClassification(ResNetConfig(**sizes))
    pretrained.save_pretrained(tmp_path)
    labels = LabelSet({label: f"class {label}" for label in range(19)})
    model = ModelArguments(preset="cityscapes-r101", backbone=str(tmp_path)).model(labels)
    name = "embedder.embedder.convolution.weight"
    stem = model.model.pixel_level_module.encoder.state_dict()[name]
    assert torch.equal(stem, pretrained.resnet.state_dict()[name])


def test_a_model_is_planned_with_the_classes_of_the_data(tmp_path):
    labels = LabelSet({0: "sky", 1: "road"}, ignore_index=7)
    tiny_config().backbone_config.save_pretrained(tmp_path / "backbone")
    planned = ModelArguments(backbone=str(tmp_path / "backbone")).planned_config(labels)
    assert planned.id2label == {0: "sky", 1: "road"}
    tiny_baseline().config.save_pretrained(tmp_path / "config")
    assert ModelArguments(config=str(tmp_path / "config")).planned_config(labels).semantic_loss_ignore_index == 7


def test_the_image_processor_of_a_training_has_its_task_and_whole_patches():
    labels = LabelSet({0: "sky", 1: "road"})
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    processor = ModelArguments(config="x").image_processor(labels, 64, tiny_model(backbone), "panoptic")
    assert (processor.segmentation_task, processor.size_divisor) == ("panoptic", 14)


@pytest.mark.parametrize("option", ["image_size=64", "min_scale=0.7", "max_scale=1.5", "crop=false"])
def test_each_size_takes_the_place_of_the_recipe_s_augmentation_unless_one_is_named(option, caplog):
    _, data, _, _ = parse("--preset=ade20k-r50", f"--{option}")
    assert data.augmentation is None
    assert f"--{option.partition('=')[0]}: the recipe's augmentation 'ade20k' is replaced" in caplog.text
    caplog.clear()
    _, data, _, _ = parse("--preset=ade20k-r50", f"--{option}", "--augmentation=cityscapes")
    assert data.augmentation == "cityscapes"
    assert "is replaced" not in caplog.text


@pytest.mark.parametrize(("steps", "is_warned"), [(1500, True), (1501, False)])
def test_a_run_that_ends_with_its_warm_up_is_warned_of(steps, is_warned, caplog):
    parse("--preset=ade20k-swin-tiny", f"--max_steps={steps}")
    assert ("within the 1500 of the warm-up" in caplog.text) == is_warned


def test_a_warm_up_that_starts_at_the_full_rate_is_not_warned_of(caplog):
    parse("--preset=coco-panoptic-r50", "--max_steps=2")
    assert "warm-up" not in caplog.text


def test_a_dry_run_shows_what_decides_about_the_images_and_the_rates(tmp_path, capsys):
    dry_run("--preset=ade20k-swin-tiny", "--max_grad_norm=0.5")
    output = capsys.readouterr().out
    found = rows(output)
    assert found["shorter side at evaluation"] == ["512", "model"]
    assert found["longer side at most"] == ["2048", "model"]
    assert "lr_scheduler_type" not in found
    assert "min_scale" not in found
    assert "the gradient of the whole model is clipped to norm 0.5." in output
    tiny_config().save_pretrained(tmp_path)
    dry_run(f"--config={tmp_path}", "--image_size=96")
    output = capsys.readouterr().out
    found = rows(output)
    assert output.startswith(f"Starts from {tmp_path}.")
    assert found["lr_scheduler_type"] == ["polynomial", "default"]
    assert found["min_scale"] == ["0.5", "default"]
    assert "3 epochs; the number of steps needs --data." in output


def test_a_dry_run_names_the_checkpoint_and_counts_all_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MaskFormerTrainingArguments, "n_gpu", 4, raising=False)
    tiny_config().save_pretrained(tmp_path)
    dry_run(f"--checkpoint={tmp_path}", "--per_device_train_batch_size=2")
    output = capsys.readouterr().out
    assert output.startswith(f"Starts from {tmp_path}.")
    assert "8 images per step: 2 on each of 4 device(s), accumulated 1 time(s)." in output
