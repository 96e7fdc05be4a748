"""Checkpoints of the paper's code become folders that give the paper's own stored numbers."""

import importlib.util
import json
import os
import pickle
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from golden import CONFIGS, FIXTURES, Golden
from models import ARCHITECTURES, tiny_config
from safetensors.torch import load_file
from transformers import AutoConfig, ResNetConfig, SwinConfig

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.configuration_maskformer_parts import MaskFormerResNetConfig
from hf_maskformer.configuration_per_pixel_baseline import PerPixelBaselineConfig
from hf_maskformer.hub.conversion import convert_checkpoint, load_original, original_shapes, whole_folder
from hf_maskformer.hub.key_table import from_original, to_original
from hf_maskformer.hub.original_checkpoint import read_checkpoint
from hf_maskformer.hub.original_config import OriginalConfig
from hf_maskformer.modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation
from hf_maskformer.training.presets import PRESETS

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
# The whole of the stored numbers lies beside the repository on some machines.
STORED = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = 1e-4  # of the largest value; float32 itself is 1e-5 off float64 here


def run_script(*command_line):
    specification = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.main(script.parse_arguments([str(argument) for argument in command_line]))


def zoo_spelling(name):
    return name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")


def write_pkl(path, tensors):
    """As the model zoo distributes checkpoints."""
    arrays = {zoo_spelling(name): tensor.numpy() for name, tensor in tensors.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    return path


def write_pth(path, tensors):
    """As training leaves them."""
    torch.save({"model": dict(tensors), "optimizer": {"state": {}}, "iteration": 9}, path)
    return path


def check_model(folder, name, arrays):
    """The model in a folder gives the stored logits, and is the one whose losses and gradients are compared too."""
    is_baseline = json.loads((folder / "config.json").read_text())["model_type"] == "per-pixel-baseline"
    model_class = PerPixelBaselineForSemanticSegmentation if is_baseline else MaskFormerForInstanceSegmentation
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    compared = Golden(name).model.state_dict()
    assert model.state_dict().keys() == compared.keys()
    assert all(torch.equal(tensor, compared[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        outputs = model(arrays["pixel_values"])
    if is_baseline:
        pairs = [(outputs.logits, "logits" if model.config.decoder_config is None else "pred_masks")]
    else:
        pairs = [(outputs.class_queries_logits, "pred_logits"), (outputs.masks_queries_logits, "pred_masks")]
    for ours, name in pairs:
        original = arrays[f"eval.{name}"]
        assert ours.shape == original.shape
        assert (ours - original).abs().max() <= TOLERANCE * original.abs().max()


@pytest.mark.parametrize("write", [write_pkl, write_pth])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_formats_give_the_stored_logits(name, write, tmp_path):
    tensors = load_file(FIXTURES / name / "original_model.safetensors")
    source = write(tmp_path / f"model_final.{write.__name__[-3:]}", tensors)
    run_script(source, tmp_path / "model", "--config", FIXTURES / name / "config.yaml")
    check_model(tmp_path / "model", name, load_file(FIXTURES / name / "arrays.safetensors"))


@pytest.mark.skipif(not STORED.is_dir(), reason="the files that the original wrote are not on this machine")
@pytest.mark.parametrize("name", CONFIGS)
def test_files_that_the_original_wrote_give_the_stored_logits(name, tmp_path):
    run_script(STORED / name / "model_final.pkl", tmp_path / "model", "--config", STORED / name / "config.yaml")
    check_model(tmp_path / "model", name, load_file(STORED / name / "arrays.safetensors"))


@pytest.mark.parametrize("name", ["resnet_semantic", "swin_semantic"])
def test_transformers_own_class_gives_the_same_from_the_folder(name, convert):
    folder = convert(load_file(FIXTURES / name / "original_model.safetensors"), name)
    stock, loading = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    arrays = load_file(FIXTURES / name / "arrays.safetensors")
    with torch.no_grad():
        logits = stock.eval()(arrays["pixel_values"]).masks_queries_logits
    original = arrays["eval.pred_masks"]
    assert (logits - original).abs().max() <= TOLERANCE * original.abs().max()


def test_transformers_own_class_refuses_what_it_cannot_express(convert):
    name = "resnet_panoptic_enc"
    folder = convert(load_file(FIXTURES / name / "original_model.safetensors"), name)
    with pytest.raises((KeyError, ValueError), match="maskformer-transformer"):
        transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder)


@pytest.fixture(scope="module")
def tensors():
    return load_file(FIXTURES / "resnet_semantic" / "original_model.safetensors")


@pytest.fixture
def convert(tmp_path):
    """Converts tensors with the configuration of a stored variant; gives the folder."""

    def convert(tensors, name="resnet_semantic", write=write_pth, labels=None):
        original = OriginalConfig(FIXTURES / name / "config.yaml")
        source = write(tmp_path / f"source.{write.__name__[-3:]}", tensors)
        convert_checkpoint(source, tmp_path / "model", original.config(labels), original.image_processor(labels))
        return tmp_path / "model"

    return convert


def test_the_folder_has_processor_and_card(convert, tensors):
    folder = convert(tensors, write=write_pkl)
    processor = MaskFormerImageProcessor.from_pretrained(folder)
    assert (processor.size_divisor, processor.num_labels) == (32, 13)
    card = (folder / "README.md").read_text()
    assert "license: unknown" in card
    assert 'MaskFormerForInstanceSegmentation.from_pretrained("model")' in card
    assert AutoConfig.from_pretrained(folder).model_type == "maskformer"


def test_a_card_has_figures_and_licence_of_the_authors_for_their_own_file_only(tmp_path, tensors):
    original = OriginalConfig(FIXTURES / "resnet_semantic" / "config.yaml")
    for name in ("model_final_d8dbeb", "mine"):
        source = write_pkl(tmp_path / f"{name}.pkl", tensors)
        convert_checkpoint(source, tmp_path / name, original.config(), original.image_processor())
    reported = "Reported by the paper's authors for these weights, not measured again here: 44.5 mIoU on ADE20K"
    theirs, mine = ((tmp_path / name / "README.md").read_text() for name in ("model_final_d8dbeb", "mine"))
    assert reported in theirs
    assert "license: cc-by-nc-4.0" in theirs
    assert "Reported" not in mine
    assert "license: unknown" in mine


def test_the_classes_file_names_the_labels(tmp_path, tensors):
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"id2label": {str(label): f"class {label}" for label in range(13)}}))
    source = write_pkl(tmp_path / "source.pkl", tensors)
    config = FIXTURES / "resnet_semantic" / "config.yaml"
    run_script(source, tmp_path / "model", "--config", config, "--classes", classes)
    assert AutoConfig.from_pretrained(tmp_path / "model").id2label[12] == "class 12"


def test_the_script_wants_one_description_of_the_model(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script("a.pkl", tmp_path / "model")
    assert "one of the arguments --config --preset is required" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no preset 'ade20k-r5O'\. Similar names are ade20k-r50"):
        run_script("a.pkl", tmp_path / "model", "--preset", "ade20k-r5O")


def test_leftovers_are_left_out_and_named(convert, tensors, monkeypatch):
    notes = []
    monkeypatch.setattr("hf_maskformer.hub.conversion.logger.info", notes.append)
    leftovers = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "backbone.stem.conv1.norm.num_batches_tracked": torch.tensor(7),
    }
    assert (convert({**tensors, **leftovers}) / "model.safetensors").is_file()
    assert all(name in notes[0] for name in leftovers)


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_written(convert, tensors, tmp_path):
    changed = {name: tensor for name, tensor in tensors.items() if name != "backbone.stem.conv1.weight"}
    changed["sem_seg_head.pixel_decoder.mask_features.bias"] = torch.zeros(5)
    changed["sem_seg_head.predictor.query_embed.weight"] = torch.zeros(20, 48, dtype=torch.int64)
    changed["surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"does not match the configuration") as error:
        convert(changed, write=write_pkl)
    for part in (
        "unknown to the model: surprise.weight",
        "missing from the file: backbone.stem.conv1.weight",
        "sem_seg_head.mask_features.bias ([5] there, [32] in the model)",  # the name that the file has
        "query_embed.weight ([20, 48] integers there, [20, 48] in the model)",
    ):
        assert part in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source.pkl"}


def test_a_wrong_shape_is_found_before_a_model_is_built(tmp_path, monkeypatch):
    def model_class_on_meta_only(config):
        assert torch.get_default_device().type == "meta", "a model of this size was built"
        return MaskFormerForInstanceSegmentation

    preset = PRESETS["ade20k-swin-large"]
    config, processor = preset.config(), preset.image_processor()
    small = {"sem_seg_head.predictor.query_embed.weight": torch.zeros(1)}
    monkeypatch.setattr("hf_maskformer.hub.conversion.model_class", model_class_on_meta_only)
    with pytest.raises(ValueError, match=r"of another shape: .*query_embed\.weight \(\[1\] there, \[100, 256\]"):
        convert_checkpoint(write_pkl(tmp_path / "small.pkl", small), tmp_path / "model", config, processor)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(convert, tensors, value):
    name = "sem_seg_head.pixel_decoder.mask_features.bias"
    with pytest.raises(ValueError, match=rf"NaN or infinite: {name}"):
        convert({**tensors, name: torch.full_like(tensors[name], value)})


def test_a_tensor_without_plain_values_is_refused(tmp_path):
    for value in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")):
        torch.save({"sem_seg_head.a": value}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth holds 'sem_seg_head\.a', which is not a plain tensor"):
            read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(("content", "reason"), [(b"", r"\S.*"), (b"garbage", r"Unsupported operand \d+")])
def test_a_file_that_holds_no_tensors_says_why_and_not_to_run_its_code(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"a\.pth is not a file of tensors, .* \({reason}\)\. Download it again"
    ) as raised:
        read_checkpoint(tmp_path / "a.pth")
    assert "weights_only" not in str(raised.value)


def test_a_tensor_in_both_spellings_is_refused(convert, tensors):
    name = "sem_seg_head.pixel_decoder.mask_features.bias"
    with pytest.raises(ValueError, match=r"two spellings of the same tensor"):
        convert({**tensors, zoo_spelling(name): tensors[name]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "holds no tensors"),
        ([1], "holds no tensors"),
        ({"model": {"sem_seg_head.a": "text"}}, r"'sem_seg_head\.a', which is not a plain tensor with a name"),
        ({1: np.zeros(1)}, "holds 1, which is not a plain tensor with a name"),
        ({"a": np.zeros(1)}, "not a checkpoint of MaskFormer"),
        ({"blobs": {"conv1_w": np.zeros(1)}}, "'blobs', which is not a plain tensor with a name"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    source = tmp_path / "a.pkl"
    source.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        run_script(source, tmp_path / "model", "--preset", "ade20k-r50")
    assert not (tmp_path / "model").exists()


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, error, message in (
        ("none.pkl", FileNotFoundError, "none.pkl does not exist"),
        ("a.bin", ValueError, "neither a .pkl"),
        ("a.pth", ValueError, "a.pth is not a file of tensors"),
    ):
        if name != "none.pkl":
            (tmp_path / name).write_bytes(b"text")
        with pytest.raises(error, match=re.escape(message)):
            run_script(tmp_path / name, tmp_path / "model", "--preset", "ade20k-r50")


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(exec, "raise AssertionError('it ran')"), "exec"),
        (Evil(os.system, "exit 1"), r"\w+\.system"),  # torch allows nothing of its module, and says so in other words
    ],
)
def test_a_pth_that_asks_for_more_is_refused_and_not_run(tmp_path, evil, name):
    torch.save({"model": evil}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=rf"evil\.pth asks for {name}, which is refused and was not run\. Get another"):
        run_script(tmp_path / "evil.pth", tmp_path / "model", "--preset", "ade20k-r50")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: {"model": tensors, "lr": [np.float64(1e-4)], "score": np.float32(0.5), "step": np.int64(5)},
        lambda tensors: {"state_dict": tensors},
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    ],
)
def test_what_training_programs_put_around_the_tensors_is_taken_off(tmp_path, wrapped):
    config = tiny_config(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128]))
    original, _ = backbone_files(config)
    torch.save(wrapped(original), tmp_path / "whole.pth")
    found = read_checkpoint(tmp_path / "whole.pth")
    assert not found.is_backbone
    assert found.tensors.keys() == original.keys()
    content = wrapped(original)
    assert set(found.source_names.values()) == set(content.get("model", content.get("state_dict")))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in original.items())


def test_a_pickle_of_torch_s_tensors_names_the_file_to_take(tmp_path):
    """As some tools make of the Swins."""
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps({"model": {"patch_embed.proj.weight": torch.ones(2)}}))
    with pytest.raises(
        ValueError, match=r"asks for torch\.\S+, which is refused .* Give the \.pth that it was made from"
    ):
        read_checkpoint(tmp_path / "swin.pkl")


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"), whole_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


def test_the_current_folder_is_refused_and_a_link_to_an_empty_one_is_filled(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("content")
    assert (tmp_path / "empty" / "file").read_text() == "content"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="here is the current folder"), whole_folder(Path()):
        pass


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def write_half():
        with whole_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def backbone_files(config):
    """A model and its backbone as ImageNet files have it: by kind, names and tensors."""
    model = MaskFormerForInstanceSegmentation(config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    original = to_original(model.state_dict())
    backbone = {name.removeprefix("backbone."): t for name, t in original.items() if name.startswith("backbone.")}
    return original, {name: tensor for name, tensor in backbone.items() if not re.match(r"norm\d\.", name)}


def to_torchvision(name):
    name = re.sub(r"^stem\.conv1\.norm\.", "bn1.", re.sub(r"^stem\.conv1\.weight", "conv1.weight", name))
    name = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
    name = re.sub(r"shortcut\.norm\.", "downsample.1.", name.replace("shortcut.weight", "downsample.0.weight"))
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)


IMAGENET = {
    "torchvision": (to_torchvision, {"fc.weight": (10, 8), "fc.bias": (10,), "bn1.num_batches_tracked": ()}),
    "detectron2": (str, {"stem.fc.weight": (10, 8), "stem.fc.bias": (10,)}),
}


@pytest.mark.parametrize("kind", IMAGENET)
@pytest.mark.parametrize("write", [write_pkl, write_pth])
def test_a_resnet_trained_on_imagenet_fills_the_backbone(kind, write, tmp_path):
    spelling, others = IMAGENET[kind]
    config = tiny_config(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128]))
    original, backbone = backbone_files(config)
    tensors = {spelling(name): tensor for name, tensor in backbone.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in others.items()}
    source = write(tmp_path / f"resnet.{write.__name__[-3:]}", tensors)
    check_backbone(source, config, original, tmp_path)


def test_a_deep_stem_is_filled_too(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    config = tiny_config(MaskFormerResNetConfig(**sizes, last_stage_dilations=[2]))
    original, tensors = backbone_files(config)
    assert "stem.conv3.norm.running_var" in tensors
    check_backbone(write_pkl(tmp_path / "resnet.pkl", tensors), config, original, tmp_path)


def test_a_swin_trained_on_imagenet_fills_the_backbone(tmp_path):
    config = tiny_config(SwinConfig(embed_dim=8, depths=[2, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4))
    original, tensors = backbone_files(config)
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    tensors |= {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(10, 64)}
    check_backbone(write_pth(tmp_path / "swin.pth", tensors), config, original, tmp_path)


def check_backbone(source, config, original, tmp_path):
    convert_checkpoint(source, tmp_path / "model", config, MaskFormerImageProcessor())
    model = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "model")
    found = to_original(model.state_dict())
    for name, tensor in original.items():
        is_given = name.startswith("backbone.") and not re.match(r"backbone\.norm\d\.", name)
        if tensor.is_floating_point() and name != "criterion.empty_weight":
            assert torch.equal(found[name], tensor) == is_given, name
    assert "**everything else is random**" in (tmp_path / "model" / "README.md").read_text()


def test_random_weights_beside_a_backbone_are_said_aloud(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_maskformer.hub.conversion.logger.warning", warnings.append)
    config = tiny_config(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128]))
    source = write_pth(tmp_path / "resnet.pth", backbone_files(config)[1])
    convert_checkpoint(source, tmp_path / "model", config, MaskFormerImageProcessor())
    assert "holds a backbone only" in warnings[0]
    assert "Train the model before using it" in warnings[0]


def test_an_incomplete_backbone_is_refused(tmp_path):
    config = tiny_config(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128]))
    _, backbone = backbone_files(config)
    backbone.pop("res5.2.conv3.weight")
    with pytest.raises(ValueError, match=r"missing from the file: backbone\.res5\.2\.conv3\.weight"):
        convert_checkpoint(
            write_pth(tmp_path / "resnet.pth", backbone), tmp_path / "model", config, MaskFormerImageProcessor()
        )


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_of_every_full_size_model_go_both_ways(name):
    config = PRESETS[name].config()
    theirs = original_shapes(config)
    ours = from_original({zoo_spelling(name): tensor for name, tensor in theirs.items()})
    with torch.device("meta"):
        is_baseline = isinstance(config, PerPixelBaselineConfig)
        model_class = PerPixelBaselineForSemanticSegmentation if is_baseline else MaskFormerForInstanceSegmentation
        expected = model_class(config).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in expected.items()}
    assert to_original(ours).keys() == theirs.keys()


def test_the_classes_file_says_how_the_processor_reads_label_maps(tmp_path, tensors):
    names = {str(label): f"class {label}" for label in range(13)}
    content = {"id2label": names, "ignore_index": 200, "do_reduce_labels": True, "thing_ids": [1]}
    (tmp_path / "classes.json").write_text(json.dumps(content))
    source, config = write_pkl(tmp_path / "source.pkl", tensors), FIXTURES / "resnet_semantic" / "config.yaml"
    run_script(source, tmp_path / "model", "--config", config, "--classes", tmp_path / "classes.json")
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path / "model")
    assert (processor.ignore_index, processor.do_reduce_labels) == (200, True)
    assert processor.label_ids_to_fuse == [label for label in range(13) if label != 1]


def test_the_card_of_a_panoptic_model_is_for_panoptic_segmentation(convert):
    name = "resnet_panoptic_enc"
    folder = convert(load_file(FIXTURES / name / "original_model.safetensors"), name)
    assert MaskFormerImageProcessor.from_pretrained(folder).segmentation_task == "panoptic"
    card = (folder / "README.md").read_text()
    assert "for panoptic segmentation" in card
    assert "for semantic segmentation" not in card


def test_a_converted_model_predicts_and_its_folder_is_as_open_as_others(tmp_path, tensors):
    source = write_pth(tmp_path / "source.pt", tensors)
    config = OriginalConfig(FIXTURES / "resnet_semantic" / "config.yaml").config()
    assert not load_original(read_checkpoint(source.rename(tmp_path / "source.pth")), config).training
    (tmp_path / "other").mkdir()
    with whole_folder(tmp_path / "model") as folder:
        (folder / "file").touch()
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("model", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_files_of_torch_have_two_endings(tmp_path, tensors, suffix):
    checkpoint = read_checkpoint(write_pth(tmp_path / f"source{suffix}", tensors))
    assert checkpoint.tensors.keys() == tensors.keys()


def test_one_of_query_key_and_value_without_the_others_has_no_name_there():
    name = "model.transformer_module.decoder.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="is made of query, key and value, but only 1 of them are given"):
        to_original({name: torch.zeros(2, 2)})


class Writes:
    """Where it is run, a file says so."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_nothing_that_a_checkpoint_asks_for_is_run(tmp_path, suffix):
    content = {"model": Writes(tmp_path / "it ran")}
    if suffix == ".pth":
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"asks for more than torch\.load allows|is refused and was not run"):
        read_checkpoint(tmp_path / f"evil{suffix}")
    assert not (tmp_path / "it ran").exists()


def test_numbers_of_another_byte_order_are_read(tmp_path, tensors):
    arrays = {name: tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")) for name, tensor in tensors.items()}
    (tmp_path / "big.pkl").write_bytes(pickle.dumps({"model": arrays}))
    config = OriginalConfig(FIXTURES / "resnet_semantic" / "config.yaml").config()
    weights = load_original(read_checkpoint(tmp_path / "big.pkl"), config).state_dict()
    assert torch.equal(weights["class_predictor.bias"], tensors["sem_seg_head.predictor.class_embed.bias"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_travel_both_ways_in_whatever_order_tensors_come(name):
    """Files of safetensors, say, are in the order of the alphabet: keys before queries."""
    ours = ARCHITECTURES[name]().state_dict()
    expected, found = to_original(ours), to_original(dict(sorted(ours.items())))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[there], tensor) for there, tensor in expected.items())
    back = from_original(found)
    assert back.keys() == ours.keys()
    assert all(back[here].dtype == tensor.dtype for here, tensor in ours.items())


def test_two_of_query_key_and_value_have_no_name_there_either():
    layer = "model.transformer_module.decoder.layers.0.self_attn"
    tensors = {f"{layer}.{name}_proj.weight": torch.zeros(2, 2) for name in "qv"}
    with pytest.raises(ValueError, match="in_proj_weight is made of query, key and value, but only 2 of them"):
        to_original(tensors)


def test_a_name_with_another_sign_in_place_of_a_dot_is_refused():
    name = "sem_seg_head.predictor.query_embed.weight"
    assert from_original({name: torch.zeros(1)})
    for place in [index for index, sign in enumerate(name) if sign == "."]:
        with pytest.raises(ValueError, match="is not a tensor of a MaskFormer checkpoint"):
            from_original({f"{name[:place]}_{name[place + 1 :]}": torch.zeros(1)})
