"""torch.compile: one graph for the whole model, for any size, compiled once for sizes seen before."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import ARCHITECTURES, tiny_batch, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import SwinConfig

from hf_maskformer import (
    MaskFormerDataCollator,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
    PerPixelBaselineConfig,
    PerPixelBaselineForSemanticSegmentation,
)
from hf_maskformer.configuration_maskformer_parts import MaskFormerTransformerConfig
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.modeling_maskformer_swin import SwinBackbone
from hf_maskformer.modeling_maskformer_transformer_layers import TransformerEncoder
from hf_maskformer.training.starting_point import image_processor_for

SIZES = [(2, 64, 96), (3, 75, 101), (2, 64, 96), (3, 75, 101)]
# Before 2.13, torch compiles max pooling, which a ResNet begins with, separately for odd and even heights and widths.
MAX_GRAPHS = 1 if torch.__version__ >= "2.13" else 4


def tiny_baseline() -> PerPixelBaselineForSemanticSegmentation:
    config = tiny_model().config
    return PerPixelBaselineForSemanticSegmentation(
        PerPixelBaselineConfig(
            backbone_config=config.backbone_config, fpn_feature_size=32, mask_feature_size=16, num_labels=4
        )
    )


MODELS = {**ARCHITECTURES, "baseline": tiny_baseline}
for_every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "resnet" else pytest.mark.slow) for name in MODELS]
)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch.compiler.reset()


@torch.no_grad()
def logits(model: Callable, batch_size: int, height: int, width: int, with_mask: bool = False) -> torch.Tensor:
    torch.manual_seed(height)
    inputs = {"pixel_values": torch.randn(batch_size, 3, height, width)}
    if with_mask:
        inputs["pixel_mask"] = torch.ones(batch_size, height, width, dtype=torch.long)
        inputs["pixel_mask"][1:, height // 2 :] = 0
    outputs = model(**inputs)
    return outputs.masks_queries_logits if "masks_queries_logits" in outputs else outputs.logits


@pytest.mark.parametrize("with_mask", [False, True])
@for_every_model
def test_the_model_is_one_graph_that_is_not_compiled_again(name, with_mask):
    model = MODELS[name]().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        found = logits(compiled, *SIZES[0], with_mask)
    torch.testing.assert_close(found, logits(model, *SIZES[0], with_mask))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_graphs_serve_every_batch_and_size(name):
    model = MODELS[name]().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    # Windows of 4 positions cover some maps of a Swin exactly, some with one row or column of windows.
    sizes = [(2, 141, 173), (3, 147, 169), (2, 205, 139), (2, 256, 160), (3, 128, 224), (2, 192, 100)]
    # In the last two one window is the whole coarsest map.
    for size in [*sizes, (2, 128, 128), (3, 100, 97)]:
        torch.testing.assert_close(logits(compiled, *size), logits(model, *size))
    assert counter.frame_count <= MAX_GRAPHS


def test_a_training_step_leaves_the_graph_at_the_loss_only():
    model = tiny_model().train()
    explanation = torch._dynamo.explain(model)(**tiny_batch())
    assert explanation.graph_count == 2
    assert [reason.user_stack[-1].line for reason in explanation.break_reasons] == ["loss, loss_dict = self.criterion("]


@pytest.mark.parametrize("name", ["resnet", pytest.param("swin", marks=pytest.mark.slow)])
def test_a_compiled_model_gets_the_same_gradients(name):
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]().train(), tiny_batch()
    compiled = copy.deepcopy(model)
    compiled.model.compile(backend="aot_eager", fullgraph=True)
    losses = [one.forward(**batch).loss for one in (model, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        gradient, found = parameter.grad, other.grad
        if parameter.requires_grad:
            # Linear layers take their sums in another order: all of a gradient may be off by the rounding of its
            # largest numbers.
            scale = max(1, abs(gradient).max().item())
            gradient, found = gradient / scale, found / scale
        torch.testing.assert_close(found, gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_a_graph_for_training_serves_every_batch_and_size(name):
    model = ARCHITECTURES[name]().train()
    torch._dynamo.utils.counters.clear()
    model.model.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for batch_size, *size in [(2, 141, 173), (3, 128, 224), (2, 205, 139), (2, 256, 160)]:
        model(**tiny_batch(batch_size, size)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= MAX_GRAPHS


@pytest.mark.slow
def test_a_graph_in_which_layers_are_computed_anew_serves_every_size():
    config = MaskFormerTransformerConfig(d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32, dropout=0.0)
    encoder = TransformerEncoder(config, 8, num_layers=2).train()
    for layer in encoder.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in [(2, 8, 5, 7), (3, 8, 6, 4)]:
        features = torch.randn(size)
        losses = [one(features).cos().sum() for one in (encoder, compiled)]
        torch.testing.assert_close(*[torch.autograd.grad(loss, list(encoder.parameters())) for loss in losses])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class MapsAndConvolutions(nn.Module):
    """Of the maps of a backbone, each seen by a convolution as those of a pixel decoder are, the mean squares."""

    def __init__(self, backbone: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.convolutions = nn.ModuleList(nn.Conv2d(number, 4, kernel_size=1) for number in channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(images)
        seen = (convolution(one) for convolution, one in zip(self.convolutions, maps, strict=True))
        return torch.stack([one.square().mean() for one in seen]).sum()


class EncoderOfImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, kernel_size=3, stride=8, padding=1)
        config = MaskFormerTransformerConfig(d_model=8, num_attention_heads=2, dim_feedforward=8, dropout=0.0)
        self.encoder = TransformerEncoder(config, 8, num_layers=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.encoder(self.projection(images))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "encoder"])
def test_inductor_compiles_training_for_any_size(name):
    swin = SwinConfig(embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, drop_path_rate=0.0)
    backbone = SwinBackbone(swin) if name == "swin" else EncoderOfImages()
    model = MapsAndConvolutions(backbone, [8, 16] if name == "swin" else [8]).train()
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=True)
    images = torch.randn(2, 3, 45, 70)
    losses = [one(images) for one in (model, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for parameter, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)


@torch.no_grad()
def test_a_graph_of_a_swin_serves_padded_maps_and_others():
    swin = SwinConfig(embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, drop_path_rate=0.0)
    backbone, counter = SwinBackbone(swin).eval(), CompileCounter()
    compiled = torch.compile(backbone, backend=counter, fullgraph=True, dynamic=True)
    for size in [(2, 3, 45, 70), (3, 3, 64, 96), (2, 3, 32, 65)]:
        images = torch.randn(size)
        torch.testing.assert_close(compiled(images), backbone(images))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_trainer_compiles_up_to_the_loss(tmp_path):
    scenes = GeneratedScenes(4, image_size=(64, 64))
    image_processor = image_processor_for(scenes.labels, image_size=64)
    losses = {}
    for is_compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.utils.counters.clear()
        arguments = MaskFormerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            torch_compile=is_compiled,
            torch_compile_backend="aot_eager" if is_compiled else None,
        )
        trainer = MaskFormerTrainer(
            model=tiny_model(id2label=scenes.labels.id2label),
            args=arguments,
            train_dataset=scenes,
            data_collator=MaskFormerDataCollator(image_processor),
            processing_class=image_processor,
        )
        trainer.train()
        losses[is_compiled] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[True]) == 3
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1


@pytest.mark.slow
def test_predict_runs_around_compiled_parts():
    model, pixel_values = tiny_model().eval(), torch.randn(2, 3, 64, 96)
    expected = model.predict(pixel_values, threshold=0.3).masks_queries_logits
    for module in (model.model.pixel_level_module, model.model.transformer_module):
        module.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model.predict(pixel_values, threshold=0.3).masks_queries_logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "swin"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_gives_equal_logits(name, dynamic):
    model = ARCHITECTURES[name]().eval()
    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for size in [(2, 141, 173), (3, 128, 224)][: 1 + dynamic]:
        torch.testing.assert_close(logits(compiled, *size), logits(model, *size), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= MAX_GRAPHS


@torch.no_grad()
def test_wrong_images_are_refused_in_the_words_of_the_model_that_is_not_compiled():
    compiled = torch.compile(tiny_model().eval(), backend="eager", dynamic=True)
    compiled(torch.randn(2, 3, 64, 96))
    for shape in ((2, 1, 64, 96), (2, 64, 96, 3), (3, 64, 96), (0, 3, 64, 96)):
        with pytest.raises(ValueError, match=r"pixel_values have the shape .* takes \(images, 3, height, width\)"):
            compiled(torch.randn(shape))
