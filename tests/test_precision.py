"""Half precision and integers predict nearly what float32 predicts, and are saved and loaded as they are."""

import sys
from typing import get_args

import pytest
import torch
from models import ARCHITECTURES

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.evaluation.precision import Precision, loading_options
from hf_maskformer.export.exporting import export_model

# Of the largest logit; bfloat16 has 8 bits, and errors of 50 layers add up.
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.1, "float16": 0.02, "int8_weights": 0.1, "int8": 0.2}


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = ARCHITECTURES[request.param]().eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


@torch.no_grad()
@pytest.mark.parametrize("precision", get_args(Precision))
def test_it_predicts_nearly_what_float32_predicts(saved, precision):
    if precision.startswith("int8"):
        pytest.importorskip("torchao")
    model, folder = saved
    rounded = MaskFormerForInstanceSegmentation.from_pretrained(folder, **loading_options(precision)).eval()
    pixel_values = torch.randn(2, 3, 64, 96)
    expected = model(pixel_values)
    inputs = pixel_values.to(rounded.dtype)
    for found in (rounded(inputs), rounded.predict(inputs)):
        for name in ("class_queries_logits", "masks_queries_logits"):
            difference = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
            assert difference <= TOLERANCE[precision], name
            assert precision == "float32" or difference > 0, "nothing was rounded"
        (segmentation, _) = MaskFormerImageProcessor().post_process_semantic_segmentation(found)
        assert segmentation.shape == (64, 96)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8_weights", "int8"])
def test_integers_are_saved_and_loaded(saved, precision, tmp_path):
    pytest.importorskip("torchao")
    _, folder = saved
    rounded = MaskFormerForInstanceSegmentation.from_pretrained(folder, **loading_options(precision)).eval()
    rounded.save_pretrained(tmp_path / "rounded")
    loaded = MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "rounded").eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    expected, found = (model(pixel_values).masks_queries_logits for model in (rounded, loaded))
    assert torch.equal(found, expected)


def test_integers_are_not_exported(saved, tmp_path):
    pytest.importorskip("torchao")
    rounded = MaskFormerForInstanceSegmentation.from_pretrained(saved[1], **loading_options("int8_weights"))
    with pytest.raises(ValueError, match="8-bit weights cannot be exported"):
        export_model(rounded, MaskFormerImageProcessor(), tmp_path / "exported", "torch_export", size=(64, 96))
    assert not (tmp_path / "exported").exists()


def test_integers_without_torchao_end_in_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="needs torchao: pip install torchao"):
        loading_options("int8")
