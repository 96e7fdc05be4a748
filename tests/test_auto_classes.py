"""What Auto classes and pipelines load, in processes of their own: registrations hold for a whole process."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import swin_config, tiny_model

import hf_maskformer
from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor, MaskFormerModel
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig

PACKAGE = Path(hf_maskformer.__file__).parent
SPINE = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
SEGMENTATION = (
    "AutoModelForImageSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
)


def save_with_code(model, folder):
    """The model and an image processor. Registers for the time of saving only."""
    with pytest.MonkeyPatch.context() as patch:
        for travelling in (
            MaskFormerConfig,
            MaskFormerForInstanceSegmentation,
            MaskFormerModel,
            MaskFormerImageProcessor,
        ):
            patch.setattr(travelling, "_auto_class", None)
        hf_maskformer.register_remote_code()
        model.save_pretrained(folder)
        MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save_with_code(tiny_model(swin_config()), tmp_path_factory.mktemp("checkpoints") / "with-code")


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    """Of an architecture that transformers lacks."""
    backbone = MaskFormerResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 3])
    transformer = MaskFormerTransformerConfig(
        d_model=16, num_queries=6, pixel_decoder_layers=1, encoder_layers=1, decoder_layers=2, pre_norm=True
    )
    torch.manual_seed(0)
    model = tiny_model(backbone, decoder_config=transformer)
    return save_with_code(model, tmp_path_factory.mktemp("checkpoints") / "of-our-own")


def read_json(path):
    return json.loads(path.read_text())


def load_in_clean_process(folder, mode, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, Path(__file__).with_name("clean_process.py"), folder, mode],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def expected_classes(config, base_model, model, image_processor, auto_models=SEGMENTATION):
    return {
        "AutoConfig": config,
        "AutoModel": base_model,
        **dict.fromkeys((*auto_models, "pipeline's model"), model),
        **dict.fromkeys(("AutoImageProcessor", "pipeline's image processor"), image_processor),
    }


def assert_logits_of(folder, report):
    model = MaskFormerForInstanceSegmentation.from_pretrained(folder)
    with torch.no_grad():
        expected = model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).masks_queries_logits
    torch.testing.assert_close(torch.tensor(report["logits"]), expected.flatten(), rtol=1e-4, atol=1e-4)


def test_registered_auto_classes_and_pipelines_run_this_package(checkpoint, tmp_path):
    report = load_in_clean_process(checkpoint, "package", tmp_path)
    assert report["classes"] == expected_classes(
        "hf_maskformer.configuration_maskformer.MaskFormerConfig",
        "hf_maskformer.modeling_maskformer.MaskFormerModel",
        "hf_maskformer.modeling_maskformer.MaskFormerForInstanceSegmentation",
        "hf_maskformer.image_processing_maskformer.MaskFormerImageProcessor",
    )
    assert report["messages"] == []
    assert_logits_of(checkpoint, report)


def test_transformers_alone_loads_the_same_folder_into_its_own_classes(checkpoint, tmp_path):
    report = load_in_clean_process(checkpoint, "stock", tmp_path)
    # With torchvision and without, it has image processors in different modules.
    image_processor = report["classes"]["AutoImageProcessor"]
    assert image_processor.startswith("transformers.models.maskformer.image_processing_")
    assert report["classes"] == expected_classes(
        "transformers.models.maskformer.configuration_maskformer.MaskFormerConfig",
        "transformers.models.maskformer.modeling_maskformer.MaskFormerModel",
        "transformers.models.maskformer.modeling_maskformer.MaskFormerForInstanceSegmentation",
        image_processor,
        SEGMENTATION[1:],
    )
    # It has this to say about every Swin that it saved itself.
    assert [message for message in report["messages"] if "Backbone maskformer-swin is not" not in message] == []
    assert_logits_of(checkpoint, report)


@pytest.mark.parametrize("name", ["checkpoint", "own_checkpoint"])
def test_the_code_of_the_checkpoint_runs_without_this_package_and_is_passed_on(name, request, tmp_path):
    checkpoint = request.getfixturevalue(name)
    report = load_in_clean_process(checkpoint, "code", tmp_path)
    modules = {name: module.split(".") for name, module in report["classes"].items()}
    assert {module[0] for module in modules.values()} == {"transformers_modules"}
    assert {name: ".".join(module[-2:]) for name, module in modules.items()} == expected_classes(
        "configuration_maskformer.MaskFormerConfig",
        "modeling_maskformer.MaskFormerModel",
        "modeling_maskformer.MaskFormerForInstanceSegmentation",
        "image_processing_maskformer.MaskFormerImageProcessor",
    )
    assert report["messages"] == []
    assert_logits_of(checkpoint, report)
    again = checkpoint / "again"
    for name in ("config.json", "preprocessor_config.json"):
        assert read_json(again / name)["auto_map"] == read_json(checkpoint / name)["auto_map"]
    assert {path.name for path in again.glob("*.py")} == {path.name for path in checkpoint.glob("*.py")}


def test_every_auto_class_is_in_the_files_of_a_checkpoint_with_code(checkpoint):
    assert read_json(checkpoint / "config.json")["auto_map"] == {
        "AutoConfig": "configuration_maskformer.MaskFormerConfig",
        "AutoModel": "modeling_maskformer.MaskFormerModel",
        **dict.fromkeys(SEGMENTATION, "modeling_maskformer.MaskFormerForInstanceSegmentation"),
    }
    assert read_json(checkpoint / "preprocessor_config.json")["auto_map"] == {
        "AutoImageProcessor": "image_processing_maskformer.MaskFormerImageProcessor"
    }
    assert {path.name for path in checkpoint.glob("*.py")} == SPINE


def test_a_checkpoint_saved_without_code_does_not_point_to_any(checkpoint, tmp_path):
    MaskFormerForInstanceSegmentation.from_pretrained(checkpoint).save_pretrained(tmp_path)
    MaskFormerImageProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in read_json(tmp_path / name)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SPINE))
def test_files_of_the_spine_import_only_their_neighbours(name):
    """What transformers copies with a checkpoint: it follows `from .name import Thing`, and knows no subfolders."""
    relative = [
        node.module
        for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert {f"{module}.py" for module in relative} <= SPINE
