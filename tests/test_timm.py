"""Backbones of timm, which needs a torchvision that imports."""

import pytest
import torch
from models import masks, tiny_batch, tiny_config
from transformers import TimmBackboneConfig

from hf_maskformer import MaskFormerConfig, MaskFormerForInstanceSegmentation
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.training.starting_point import model_on_backbone

try:
    import timm
    from timm.models._hub import save_for_hf
except (ImportError, RuntimeError) as error:  # a torchvision that does not belong to this torch raises the second
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_backbone_of_timm_trains_and_survives_a_round_trip(name, tmp_path):
    model = MaskFormerForInstanceSegmentation(tiny_config(TimmBackboneConfig(backbone=name)))
    batch = tiny_batch()
    model.train()(**batch).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    norms = [m for m in model.model.pixel_level_module.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(norms) == (name == "test_resnet")
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    model.save_pretrained(tmp_path)
    again, loading_info = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixel_values = batch["pixel_values"]
    assert torch.equal(masks(again, pixel_values), masks(model.eval(), pixel_values))


def test_a_model_of_timm_is_taken_as_it_lies_on_the_hub(tmp_path):
    pretrained = timm.create_model("test_convnext")
    save_for_hf(pretrained, tmp_path, safe_serialization=True)
    assert MaskFormerConfig.from_backbone(str(tmp_path)).backbone_config.backbone == "test_convnext"
    model = model_on_backbone(str(tmp_path), LabelSet({0: "sky", 1: "road"}))
    stem = model.model.pixel_level_module.encoder._backbone.stem_0
    assert torch.equal(stem.weight, pretrained.stem[0].weight)


def test_a_plain_vision_transformer_of_timm_is_refused_with_its_strides():
    model = MaskFormerForInstanceSegmentation(tiny_config(TimmBackboneConfig(backbone="test_vit")))
    with pytest.raises(ValueError, match=r"TimmBackbone have the strides \(16, 16, 16, 16\)"):
        model(torch.randn(1, 3, 160, 160))
