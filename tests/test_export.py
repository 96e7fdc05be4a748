"""Exported files give what PyTorch gives, for any batch and size. Tracing takes a minute, so most cases are slow."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, resnet_config, swin_config, tiny_model
from PIL import ExifTags, Image
from transformers import Dinov2Config

from hf_maskformer import (
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.configuration_maskformer_parts import MaskFormerTransformerConfig
from hf_maskformer.export.exporting import build_head, export_model, trace
from hf_maskformer.export.heads import Logits, Panoptic, PerPixelLogits, Semantic
from hf_maskformer.image_processing_maskformer_settings import DEFAULT_PANOPTIC_THRESHOLDS
from hf_maskformer.modeling_maskformer_swin import WindowSelfAttention
from hf_maskformer.post_processing_maskformer import panoptic_segmentation, semantic_segmentation
from hf_maskformer.post_processing_per_pixel_baseline import per_pixel_segmentation

SIZES = [(1, 64, 96), (3, 33, 130), (2, 77, 101), (1, 160, 300)]
FUSED = (0, 1)


def tiny_baseline() -> PerPixelBaselineForSemanticSegmentation:
    config = tiny_model().config
    return PerPixelBaselineForSemanticSegmentation(
        PerPixelBaselineConfig(
            backbone_config=config.backbone_config, fpn_feature_size=32, mask_feature_size=16, num_labels=4
        )
    )


def sure_model() -> MaskFormerForInstanceSegmentation:
    """Its queries are sure enough of their labels to have segments."""
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        model.class_predictor.weight.mul_(8)
    return model


@pytest.fixture
def image_processor() -> MaskFormerImageProcessor:
    return MaskFormerImageProcessor(label_ids_to_fuse=list(FUSED))


@torch.no_grad()
def test_the_semantic_head_gives_what_post_processing_gives():
    model, pixel_values = tiny_model().eval(), torch.randn(2, 3, 61, 90)
    outputs = model(pixel_values)
    for output_size in (None, (50, 120)):
        (found,) = Semantic(Logits(model), output_size)(pixel_values)
        expected = semantic_segmentation(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            outputs.image_sizes,
            outputs.padded_sizes,
            output_size and [output_size] * 2,
        )
        # Random masks are nearly tied in places, where another order of the sums may decide.
        assert (found == torch.stack(expected)).float().mean() > 0.999


class GivenLogits(Logits):
    """Twelve queries, ten of which are kept; the image holds the mask logits."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        labels = torch.arange(12) % 4
        labels[10:] = 4  # no object
        classes = torch.nn.functional.one_hot(labels, 5) * 4 + torch.arange(12)[:, None] / 100
        return classes.expand(len(pixel_values), -1, -1), torch.cat(
            [pixel_values[..., row::4, row::4] for row in range(4)], dim=1
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "post_process"), [(Semantic, semantic_segmentation), (Panoptic, panoptic_segmentation)]
)
@torch.no_grad()
def test_onnx_runtime_gives_pixels_that_no_query_wants_to_the_same_one(head, post_process, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    logits, sizes = GivenLogits(tiny_model()), torch.tensor([[64, 96]] * 2)
    settings = {} if head is Semantic else {"overlap_mask_area_threshold": 0.0}
    pixel_values = torch.randn(2, 3, 64, 96) * 5 - torch.linspace(0, 60, 96)
    program = torch.onnx.export(head(logits, **settings), (pixel_values,), input_names=["pixel_values"], dynamo=True)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found, *_ = session.run(None, {"pixel_values": pixel_values.numpy()})
    results = post_process(*logits(pixel_values), sizes, sizes, **settings)
    expected = torch.stack([result if head is Semantic else result["segmentation"] for result in results])
    assert len(expected.unique()) > 3
    assert (torch.from_numpy(found) == expected).float().mean() > 0.999


@pytest.mark.parametrize("ids", [[4], [99], [-2], [], None])
def test_ids_to_fuse_that_are_no_labels_fuse_nothing(ids, image_processor):
    image_processor.label_ids_to_fuse = ids
    model = tiny_model()
    assert not build_head(model, image_processor, "panoptic").is_fused[: model.config.num_labels].any()


@torch.no_grad()
def test_the_semantic_head_of_a_baseline_gives_what_post_processing_gives():
    model, pixel_values = tiny_baseline().eval(), torch.randn(2, 3, 61, 90)
    outputs = model(pixel_values)
    for output_size in (None, (50, 120)):
        (found,) = Semantic(PerPixelLogits(model), output_size)(pixel_values)
        sizes = outputs.image_sizes, outputs.padded_sizes, output_size and [output_size] * 2
        torch.testing.assert_close(found, torch.stack(per_pixel_segmentation(outputs.logits, *sizes)))


class FakeLogits(Logits):
    """Stands for a sure model: sharp masks, labels that repeat."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(pixel_values.shape[-1])
        labels = torch.randint(5, (len(pixel_values), 12), generator=generator)
        classes = torch.nn.functional.one_hot(labels, 5) * 4 + torch.rand(len(pixel_values), 12, 5, generator=generator)
        masks = torch.randn(len(pixel_values), 12, 4, 5, generator=generator) * 8 - 4
        return classes, masks


@pytest.mark.parametrize("width", range(60, 72))
def test_the_panoptic_head_gives_what_post_processing_gives(width):
    logits, pixel_values = FakeLogits(tiny_model()), torch.zeros(2, 3, 50, width)
    settings = {"overlap_mask_area_threshold": 0.4 if width % 2 else 0.0, "label_ids_to_fuse": FUSED}
    output_size = (75, 2 * width) if width % 3 == 0 else None
    head = Panoptic(logits, output_size=output_size, **settings)
    segmentation, segment_ids, labels, scores = head(pixel_values)
    sizes = torch.tensor([[50, width]] * 2)
    target_sizes = output_size and [output_size] * 2
    expected = panoptic_segmentation(*logits(pixel_values), sizes, sizes, **settings, target_sizes=target_sizes)
    for index, result in enumerate(expected):
        assert (segmentation[index] == result["segmentation"]).float().mean() > 0.9995
        info = {int(segment): int(label) for segment, label in zip(segment_ids[index], labels[index], strict=True)}
        info.pop(0, None)
        assert info == {segment["id"]: segment["label_id"] for segment in result["segments_info"]}
        assert scores.shape == labels.shape


def test_queries_of_no_object_are_labelled_so_and_have_no_segment_at_any_threshold():
    logits, pixel_values = FakeLogits(tiny_model()), torch.zeros(2, 3, 50, 60)
    head = Panoptic(logits, threshold=0.0, overlap_mask_area_threshold=0.0)
    _, segment_ids, labels, scores = head(pixel_values)
    expected_scores, expected_labels = logits(pixel_values)[0].softmax(-1).max(-1)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(labels, expected_labels)
    assert (labels == 4).any()
    assert not segment_ids[labels == 4].any()


def test_a_head_of_its_own_has_the_thresholds_of_post_processing():
    head = Panoptic(FakeLogits(tiny_model()))
    own = {name: getattr(head, name) for name in DEFAULT_PANOPTIC_THRESHOLDS}
    assert own == DEFAULT_PANOPTIC_THRESHOLDS


def test_what_the_model_or_the_file_cannot_do_is_refused(image_processor, tmp_path):
    with pytest.raises(ValueError, match="format is 'tflite'"):
        export_model(tiny_model(), image_processor, tmp_path, "tflite")
    with pytest.raises(ValueError, match="task is 'depth'"):
        export_model(tiny_model(), image_processor, tmp_path, "torch_export", "depth")
    with pytest.raises(ValueError, match="a per-pixel baseline, which has no segments"):
        export_model(tiny_baseline(), image_processor, tmp_path, "torch_export", "panoptic")
    with pytest.raises(ValueError, match="at least 33 pixels"):
        export_model(tiny_model(), image_processor, tmp_path, "torch_export", size=(32, 64))
    with pytest.raises(ValueError, match=r"output_size is .*must be positive"):
        export_model(tiny_model(), image_processor, tmp_path, "torch_export", "semantic", output_size=(0, 64))
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
    with pytest.raises(ValueError, match=r"whole patches, so it does not accept every size\. Give size\."):
        export_model(tiny_model(backbone), image_processor, tmp_path, "torch_export")
    with pytest.raises(ValueError, match="output_size needs a segmentation"):
        export_model(tiny_model(), image_processor, tmp_path, "torch_export", output_size=(32, 64))


@pytest.mark.parametrize("missing", [["onnx", "onnxscript"], ["onnx"], ["onnxscript"]])
def test_onnx_without_its_packages_says_what_to_install(image_processor, tmp_path, monkeypatch, missing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    with pytest.raises(ImportError, match=rf"ONNX needs {', '.join(missing)}: pip install 'hf-maskformer\[export\]'"):
        export_model(tiny_model(), image_processor, tmp_path, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_program_of_torch_export_runs_at_any_size(name, image_processor, tmp_path):
    model = ARCHITECTURES[name]().eval()
    path = export_model(model, image_processor, tmp_path, "torch_export")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weights < path.stat().st_size < weights + 5e6
    program = torch.export.load(path).module()
    for batch_size, height, width in SIZES:
        pixel_values = torch.randn(batch_size, 3, height, width)
        for found, expected in zip(program(pixel_values), Logits(model)(pixel_values), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]
    assert (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "task", "thresholds"),
    [
        (sure_model, "panoptic", {"threshold": 0.3, "overlap_mask_area_threshold": 0.1}),
        (ARCHITECTURES["swin"], "logits", {}),
        (ARCHITECTURES["encoders"], "logits", {}),
        (tiny_baseline, "semantic", {}),
    ],
    ids=["resnet", "swin", "encoders", "baseline"],
)
@torch.no_grad()
def test_onnx_runtime_gives_what_pytorch_gives(build, task, thresholds, image_processor, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build().eval()
    head = build_head(model, image_processor, task, **thresholds)
    path = export_model(model, image_processor, tmp_path, "onnx", task, **thresholds)
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == list(head.output_names)
    for batch_size, height, width in SIZES:
        pixel_values = torch.randn(batch_size, 3, height, width)
        found_tensors = session.run(None, {"pixel_values": pixel_values.numpy()})
        for found, expected in zip(found_tensors, head(pixel_values), strict=True):
            assert expected.any()
            if expected.is_floating_point():
                torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
            else:  # near ties may fall either way
                assert (torch.from_numpy(found) == expected).float().mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"do_normalize": False, "resample": 0}, {"do_rescale": False}, {"rescale_factor": 0.5}]
)
def test_the_documented_code_runs_a_file_without_this_package(tmp_path, monkeypatch, settings):
    pytest.importorskip("onnxruntime")
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert "maskformer" not in code
    model = tiny_model().eval()
    image_processor = MaskFormerImageProcessor(size={"height": 512, "width": 512}, **settings)
    export_model(model, image_processor, tmp_path / "exported", "onnx", "semantic", size=(512, 512))
    image, lies_on_its_side = Image.effect_noise((200, 100), 90).convert("RGB"), Image.Exif()
    lies_on_its_side[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "photo.png", exif=lies_on_its_side)
    monkeypatch.chdir(tmp_path)
    found = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("photo.jpg", "photo.png"), found)
    assert "LABEL_" in printed.getvalue()
    pixel_values = torch.from_numpy(found["pixel_values"])
    torch.testing.assert_close(pixel_values, image_processor("photo.png", return_tensors="pt").pixel_values)


def test_the_image_processor_beside_a_file_of_one_size_makes_that_size(tmp_path):
    image_processor = MaskFormerImageProcessor(do_resize=False, pad_size={"height": 96, "width": 96})
    path = export_model(tiny_model().eval(), image_processor, tmp_path, "torch_export", "semantic", size=(40, 70))
    beside = MaskFormerImageProcessor.from_pretrained(tmp_path)
    inputs = beside(Image.new("RGB", (200, 100)), return_tensors="pt")
    (labels,) = torch.export.load(path).module()(inputs.pixel_values)
    assert labels.shape == (1, 40, 70)
    assert (image_processor.do_resize, image_processor.pad_size) == (False, {"height": 96, "width": 96})


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_traced(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(FileExistsError, match="model is a file"):
        export_model(tiny_model(), MaskFormerImageProcessor(), tmp_path / "model", "torch_export", size=(64, 64))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_keeps_its_settings(tmp_path, weights):
    MaskFormerImageProcessor().save_pretrained(tmp_path)
    (tmp_path / weights).touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=f"holds {weights}, to which its config.json"):
        export_model(tiny_model(), MaskFormerImageProcessor(), tmp_path, "torch_export", size=(64, 64))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_model_of_other_channels_is_exported_with_them(image_processor, tmp_path):
    backbone = resnet_config()
    backbone.num_channels = 1
    model = tiny_model(backbone).eval()
    path = export_model(model, image_processor, tmp_path, "torch_export")
    pixel_values = torch.randn(2, 1, 70, 90)
    with torch.no_grad():
        _, found = torch.export.load(path).module()(pixel_values)
        torch.testing.assert_close(found, model(pixel_values).masks_queries_logits)


def test_the_thresholds_of_the_image_processor_are_those_of_the_file(image_processor):
    image_processor.panoptic_thresholds = {"threshold": 0.8, "mask_threshold": 0.4}
    head = build_head(tiny_model().eval(), image_processor, "panoptic", mask_threshold=0.3)
    assert (head.threshold, head.mask_threshold, head.overlap_mask_area_threshold) == (0.8, 0.3, 0.8)


@pytest.mark.parametrize(
    ("task", "thresholds", "message"),
    [
        ("logits", {"threshold": 0.8}, "Only the task 'panoptic' has thresholds, but 'logits' was given threshold"),
        ("panoptic", {"treshold": 0.8}, "There is no treshold; thresholds are threshold, mask_threshold, "),
        ("panoptic", {"threshold": 3}, "threshold is 3; give a number from 0 to 1"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(image_processor, tmp_path, task, thresholds, message):
    with pytest.raises(ValueError, match=message):
        export_model(tiny_model(), image_processor, tmp_path / "exported", "torch_export", task, (64, 64), **thresholds)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_model_is_traced_by_the_older_torchscript_too(backbone, tmp_path):
    logits, pixel_values = Logits(tiny_model(backbone()).eval()), torch.randn(1, 3, 64, 96)
    torch.jit.trace(logits, pixel_values).save(tmp_path / "model.pt")
    found = torch.jit.load(tmp_path / "model.pt")(pixel_values)
    torch.testing.assert_close(found, logits(pixel_values), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_torchscript_keeps_the_fused_attention_of_windows():
    attention = WindowSelfAttention(swin_config(), 8, 2).eval().requires_grad_(False)
    traced = torch.jit.trace(lambda windows: attention(windows, None), torch.randn(3, 16, 8))
    assert "scaled_dot_product_attention" in str(traced.graph)


def test_a_model_of_half_precision_is_refused(image_processor, tmp_path):
    with pytest.raises(ValueError, match=r"The model is in torch.bfloat16 on cpu. Export model.float\(\).cpu\(\)"):
        export_model(tiny_model().bfloat16(), image_processor, tmp_path, "torch_export", size=(64, 64))


def test_a_model_in_training_stays_in_training(image_processor, tmp_path):
    decoder = MaskFormerTransformerConfig(d_model=16, num_queries=6, decoder_layers=2, dropout=0.5)
    model = tiny_model(decoder_config=decoder).train()
    model.model.pixel_level_module.encoder.eval()
    modes = [module.training for module in model.modules()]
    export_model(model, image_processor, tmp_path, "torch_export", size=(64, 64))
    assert [module.training for module in model.modules()] == modes
    program = torch.export.load(tmp_path / "model.pt2").module()
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model.eval()(pixel_values)
    torch.testing.assert_close(program(pixel_values)[1], expected.masks_queries_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_head_has_the_output_size_and_fuses_what_the_image_processor_says(task, image_processor):
    head = build_head(tiny_model().eval(), image_processor, task, (50, 120))
    labels_or_segmentation, *_ = head(torch.randn(1, 3, 64, 96))
    assert labels_or_segmentation.shape == (1, 50, 120)
    if task == "panoptic":
        assert head.is_fused.nonzero().flatten().tolist() == list(FUSED)


class Double(torch.nn.Module):
    def forward(self, pixel_values):
        return 2 * pixel_values


def test_a_given_size_is_height_and_width():
    program = trace(Double(), (40, 50))
    (pixel_values,) = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    assert pixel_values.shape[1:] == (3, 40, 50)
    assert isinstance(pixel_values.shape[0], torch.SymInt)  # any batch


def test_what_the_user_of_the_file_must_know_lies_beside_it(image_processor, tmp_path):
    folder = tmp_path / "models" / "small"
    path = export_model(tiny_model().eval(), image_processor, folder, "torch_export", size=(64, 96))
    assert path.parent == folder
    assert {file.name for file in folder.iterdir()} == {path.name, "config.json", "preprocessor_config.json"}


@pytest.mark.parametrize("output_size", [None, (75, 120)])
def test_the_semantic_head_keeps_the_order_of_the_paper_where_masks_are_sharp(output_size):
    logits, pixel_values, sizes = FakeLogits(tiny_model()), torch.zeros(2, 3, 50, 66), torch.tensor([[50, 66]] * 2)
    (found,) = Semantic(logits, output_size)(pixel_values)
    expected = semantic_segmentation(*logits(pixel_values), sizes, sizes, output_size and [output_size] * 2)
    assert (found == torch.stack(expected)).float().mean() > 0.9995


class Halves(Logits):
    """Three queries, as sure as no object: one of the left half, one of the right one, one that no pixel belongs to."""

    def forward(self, pixel_values):
        masks = torch.full((1, 3, 16, 16), -8.0)
        masks[:, 0, :, :8], masks[:, 1, :, 8:], masks[:, 2, :2] = 0.4, 8.0, -0.4
        return torch.tensor([[[1.0, 0, 0, 0, 1]]]).expand(1, 3, 5), masks


class Whole(Halves):
    """The first query has every pixel."""

    def forward(self, pixel_values):
        class_logits, masks = super().forward(pixel_values)
        return class_logits, torch.tensor([20.0, -20.0, -20.0])[None, :, None, None].expand_as(masks)


@pytest.mark.parametrize("kind", [Halves, Whole])
@pytest.mark.parametrize(
    "thresholds",
    [
        {"threshold": float(torch.tensor([1.0, 0, 0, 0, 1]).softmax(0)[0])},
        {"threshold": 0.1, "overlap_mask_area_threshold": 1.0},
        {"threshold": 0.1, "overlap_mask_area_threshold": 0.0},
        {"threshold": 0.1, "mask_threshold": 0.7},
        {"threshold": 0.1, "mask_threshold": 0.3},
    ],
)
def test_thresholds_are_met_as_in_post_processing(kind, thresholds):
    logits, pixel_values, sizes = kind(tiny_model()), torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]])
    segmentation, segment_ids, *_ = Panoptic(logits, **thresholds)(pixel_values)
    (expected,) = panoptic_segmentation(*logits(pixel_values), sizes, sizes, **thresholds)
    assert segment_ids.count_nonzero() == len(expected["segments_info"])
    assert torch.equal(segmentation[0], expected["segmentation"])
