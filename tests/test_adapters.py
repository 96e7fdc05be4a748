"""Low-rank adapters (PEFT) in the decoder and the backbone."""

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, masks, tiny_batch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_per_pixel_baseline import tiny_baseline
from transformers import default_data_collator

from hf_maskformer import (
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
)
from hf_maskformer.evaluation.scale_averaging import augmented_semantic_scores
from hf_maskformer.export.exporting import build_head
from hf_maskformer.training.starting_point import model_class_of

LORA_TARGETS = {
    "resnet": r".*(q_proj|v_proj|convolution)",
    "swin": r".*(q_proj|v_proj|query|value)",
    "encoders": r".*(q_proj|v_proj|stages\.[012].*convolution)",  # peft does not know the last stage's dilation
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_low_rank_adapters_train_in_decoder_and_backbone_and_travel(architecture, tmp_path):
    pixel_values = torch.randn(1, 3, 64, 96)
    ARCHITECTURES[architecture]().save_pretrained(tmp_path / "model")
    base = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=LORA_TARGETS[architecture], modules_to_save=["class_predictor"])
    )
    before = masks(adapted.eval(), pixel_values)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "class_predictor" in name for name in trained)
    assert any("pixel_level_module.encoder" in name for name in trained)
    assert any("transformer_module.decoder" in name for name in trained)
    adapted.train()(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    torch.optim.SGD(trained.values(), lr=0.1).step()
    after = masks(adapted.eval(), pixel_values)
    assert not torch.allclose(after, before)

    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter holds adapters without their model\. Merge them"):
        model_class_of(str(tmp_path / "adapter"))
    base = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(masks(again, pixel_values), after)
    torch.testing.assert_close(masks(again.merge_and_unload(), pixel_values), after, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_queries_is_trained():
    adapted = get_peft_model(ARCHITECTURES["resnet"](), LoraConfig(r=2, target_modules=["queries_embedder"]))
    adapted.train()(**tiny_batch()).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert any(p.grad.abs().max() > 0 for p in trained.values())


def test_the_trainer_takes_a_model_with_adapters(tmp_path):
    model = get_peft_model(ARCHITECTURES["swin"](), LoraConfig(r=2, target_modules=LORA_TARGETS["swin"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = [{name: tensor[0] for name, tensor in tiny_batch(1).items()} for _ in range(2)]
    arguments = MaskFormerTrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, gradient_checkpointing=True
    )
    trainer = MaskFormerTrainer(
        model,
        arguments,
        train_dataset=images,
        processing_class=MaskFormerImageProcessor(),
        data_collator=default_data_collator,
    )
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name for name in changed)
    for part in ("pixel_level_module.encoder", "transformer_module.decoder"):
        assert any(part in name for name in changed)


def test_a_baseline_with_an_adapter_on_its_classifier_is_still_a_baseline():
    base = tiny_baseline().eval()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)).eval()
    processor = MaskFormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    scores = augmented_semantic_scores(adapted, processor, image, shortest_edges=[32], flip=False)
    exported = build_head(adapted, processor, "logits")(torch.randn(1, 3, 32, 64))
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(
        scores, augmented_semantic_scores(merged, processor, image, shortest_edges=[32], flip=False)
    )
    assert [tuple(logits.shape) for logits in exported] == [(1, 4, 8, 16)]
