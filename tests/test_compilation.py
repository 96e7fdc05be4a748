"""torch.compile: one graph for the whole model, for any size, compiled once for sizes seen before."""

from collections.abc import Callable

import pytest
import torch
from models import ARCHITECTURES, tiny_batch, tiny_model
from torch._dynamo.testing import CompileCounter

from hf_maskformer import PerPixelBaselineConfig, PerPixelBaselineForSemanticSegmentation

SIZES = [(2, 64, 96), (3, 75, 101), (2, 64, 96), (3, 75, 101)]


def tiny_baseline() -> PerPixelBaselineForSemanticSegmentation:
    config = tiny_model().config
    return PerPixelBaselineForSemanticSegmentation(
        PerPixelBaselineConfig(
            backbone_config=config.backbone_config, fpn_feature_size=32, mask_feature_size=16, num_labels=4
        )
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
@pytest.mark.parametrize("build", [*ARCHITECTURES.values(), tiny_baseline], ids=[*ARCHITECTURES, "baseline"])
def test_the_model_is_one_graph_that_is_not_compiled_again(build, with_mask):
    model = build().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        found = logits(compiled, *SIZES[0], with_mask)
    torch.testing.assert_close(found, logits(model, *SIZES[0], with_mask))
    assert counter.frame_count == 1


def test_one_graph_serves_every_batch_and_size():
    model = tiny_model().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in [(2, 141, 173), (3, 147, 169), (2, 205, 139)]:
        torch.testing.assert_close(logits(compiled, *size), logits(model, *size))
    assert counter.frame_count == 1


def test_a_training_step_leaves_the_graph_at_the_loss_only():
    model = tiny_model().train()
    explanation = torch._dynamo.explain(model)(**tiny_batch())
    assert explanation.graph_count == 2
    assert [reason.user_stack[-1].line for reason in explanation.break_reasons] == ["loss, loss_dict = self.criterion("]
