"""What Auto classes and pipelines load, in processes of their own: registrations hold for a whole process."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import needs_auto_image_processor, resnet_config, swin_config, tiny_model

import hf_maskformer
from hf_maskformer import (
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerModel,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig, MaskFormerTransformerConfig

PACKAGE = Path(hf_maskformer.__file__).parent
STAY = {"__init__.py", "__main__.py", "_torchvision.py", "command_line.py"}
SPINE = {path.name for path in PACKAGE.glob("*.py")} - STAY
SEGMENTATION = (
    "AutoModelForImageSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
)
MASKFORMER_CODE = {
    "AutoConfig": "configuration_maskformer.MaskFormerConfig",
    "AutoModel": "modeling_maskformer.MaskFormerModel",
    **dict.fromkeys(SEGMENTATION, "modeling_maskformer.MaskFormerForInstanceSegmentation"),
}
BASELINE_CODE = {
    "AutoConfig": "configuration_per_pixel_baseline.PerPixelBaselineConfig",
    "AutoModelForSemanticSegmentation": "modeling_per_pixel_baseline.PerPixelBaselineForSemanticSegmentation",
}
PROCESSOR_CODE = {"AutoImageProcessor": "image_processing_maskformer.MaskFormerImageProcessor"}


def shared_model():
    """An architecture that transformers has too."""
    return tiny_model(swin_config())


def own_model():
    """An architecture that transformers lacks."""
    backbone = MaskFormerResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 3])
    transformer = MaskFormerTransformerConfig(
        d_model=16, num_queries=6, pixel_decoder_layers=1, encoder_layers=1, decoder_layers=2, pre_norm=True
    )
    return tiny_model(backbone, decoder_config=transformer)


def baseline_model():
    return PerPixelBaselineForSemanticSegmentation(
        PerPixelBaselineConfig(
            backbone_config=resnet_config(),
            decoder_config=MaskFormerTransformerConfig(d_model=16, decoder_layers=2),
            fpn_feature_size=32,
            mask_feature_size=16,
            num_labels=4,
        )
    )


MODELS = {"shared": shared_model, "own": own_model, "baseline": baseline_model}
TRAVELLING = (
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerModel,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folders of the models, saved with an image processor and the code."""
    folders = {name: tmp_path_factory.mktemp("checkpoints") / name for name in MODELS}
    image_processor = MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    with pytest.MonkeyPatch.context() as patch:
        for travelling in TRAVELLING:
            patch.setattr(travelling, "_auto_class", None)  # what it is again afterwards
        hf_maskformer.register_remote_code()
        for name, folder in folders.items():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(folder)
            image_processor.save_pretrained(folder)
    return folders


def read_json(path):
    return json.loads(path.read_text())


def load_in_clean_process(mode, folders, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, Path(__file__).with_name("clean_process.py"), mode, *folders],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def expected_classes(code, model):
    """What a report should say of a checkpoint with these classes; `model` is the Auto class of the pipeline's."""
    return {**code, "pipeline's model": code[model], "pipeline's image processor": code["AutoImageProcessor"]}


def prefixed(code, prefix):
    return {name: f"{prefix}.{path}" for name, path in code.items()}


def assert_logits_of(folder, report):
    is_baseline = folder.name == "baseline"
    model_class = PerPixelBaselineForSemanticSegmentation if is_baseline else MaskFormerForInstanceSegmentation
    with torch.no_grad():
        output = model_class.from_pretrained(folder)(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    expected = (output.logits if is_baseline else output.masks_queries_logits).flatten()
    torch.testing.assert_close(torch.tensor(report["logits"]), expected, rtol=1e-4, atol=1e-4)


def without_baseline_message(messages):
    """Pipelines have a fixed list of the models they know, to which nobody can add."""
    return [
        message for message in messages if "'PerPixelBaselineForSemanticSegmentation' is not supported" not in message
    ]


@needs_auto_image_processor
def test_registered_auto_classes_and_pipelines_run_this_package(checkpoints, tmp_path):
    reports = load_in_clean_process("package", checkpoints.values(), tmp_path)
    for (name, folder), report in zip(checkpoints.items(), reports, strict=True):
        code = {**(BASELINE_CODE if name == "baseline" else MASKFORMER_CODE), **PROCESSOR_CODE}
        model = "AutoModelForSemanticSegmentation" if name == "baseline" else "AutoModelForUniversalSegmentation"
        code = prefixed(code, "hf_maskformer")
        assert report["classes"] == {
            **expected_classes(code, model),
            "image processor that transformers saved": code["AutoImageProcessor"],
        }
        assert without_baseline_message(report["messages"]) == []
        assert_logits_of(folder, report)


@needs_auto_image_processor
def test_transformers_alone_loads_the_same_folder_into_its_own_classes(checkpoints, tmp_path):
    (report,) = load_in_clean_process("stock", [checkpoints["shared"]], tmp_path)
    # With torchvision and without, it has image processors in different modules.
    image_processor = report["classes"]["AutoImageProcessor"]
    assert image_processor.startswith("transformers.models.maskformer.image_processing_")
    code = prefixed(MASKFORMER_CODE, "transformers.models.maskformer") | {"AutoImageProcessor": image_processor}
    del code["AutoModelForImageSegmentation"]
    assert report["classes"] == expected_classes(code, "AutoModelForUniversalSegmentation")
    # It has this to say about every Swin that it saved itself.
    assert [message for message in report["messages"] if "Backbone maskformer-swin is not" not in message] == []
    assert_logits_of(checkpoints["shared"], report)


@needs_auto_image_processor
def test_the_code_of_the_checkpoint_runs_without_this_package_and_is_passed_on(checkpoints, tmp_path):
    reports = load_in_clean_process("code", checkpoints.values(), tmp_path)
    for (name, folder), report in zip(checkpoints.items(), reports, strict=True):
        code = {**(BASELINE_CODE if name == "baseline" else MASKFORMER_CODE), **PROCESSOR_CODE}
        model = "AutoModelForSemanticSegmentation" if name == "baseline" else "AutoModelForUniversalSegmentation"
        paths = {thing: path.split(".") for thing, path in report["classes"].items()}
        assert {path[0] for path in paths.values()} == {"transformers_modules"}
        assert {thing: ".".join(path[-2:]) for thing, path in paths.items()} == expected_classes(code, model)
        assert without_baseline_message(report["messages"]) == []
        assert_logits_of(folder, report)
        for file in ("config.json", "preprocessor_config.json"):
            assert read_json(folder / "again" / file)["auto_map"] == read_json(folder / file)["auto_map"]
        assert {path.name for path in (folder / "again").glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_a_checkpoint_with_code_names_every_auto_class_and_has_the_files(checkpoints):
    for name, folder in checkpoints.items():
        assert read_json(folder / "config.json")["auto_map"] == (
            BASELINE_CODE if name == "baseline" else MASKFORMER_CODE
        )
        assert read_json(folder / "preprocessor_config.json")["auto_map"] == PROCESSOR_CODE
    files = {name: {path.name for path in folder.glob("*.py")} for name, folder in checkpoints.items()}
    baseline = {f"{kind}_per_pixel_baseline.py" for kind in ("configuration", "modeling")}
    assert files["shared"] == files["own"] == SPINE - baseline
    assert files["baseline"] == SPINE


def test_a_checkpoint_saved_without_code_does_not_point_to_any(checkpoints, tmp_path):
    MaskFormerForInstanceSegmentation.from_pretrained(checkpoints["shared"]).save_pretrained(tmp_path)
    MaskFormerImageProcessor.from_pretrained(checkpoints["shared"]).save_pretrained(tmp_path)
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
