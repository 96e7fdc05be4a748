"""The fast way of a 3 x 3 convolution gives what torch's gives, and stays out of the way elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from hf_maskformer import modeling_maskformer_winograd
from hf_maskformer.modeling_maskformer_pixel_decoder import XavierConv2d
from hf_maskformer.modeling_maskformer_winograd import MIN_CHANNELS, convolve, winograd, winograd_pays

WIDE = torch.randn(MIN_CHANNELS, MIN_CHANNELS, 3, 3)
LARGE = torch.randn(1, MIN_CHANNELS, 40, 40)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 8), (23, 18), (90, 37)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_convolution_at_any_size(size, has_bias):
    states, weight, bias = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3), torch.randn(7) if has_bias else None
    expected = F.conv2d(states.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    found = winograd(states, weight, bias)
    # float32's 1e-7 times the matrices' few bits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_layout_of_the_input_does_not_matter():
    states, weight = torch.randn(2, 5, 9, 6), torch.randn(7, 5, 3, 3)
    other = winograd(states.contiguous(memory_format=torch.channels_last), weight, None)
    torch.testing.assert_close(winograd(states, weight, None), other)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates():
    states = torch.randn(3, MIN_CHANNELS, 40, 40)
    together = convolve(states, WIDE, None)
    torch.testing.assert_close(together[1:2], convolve(states[1:2], WIDE, None), rtol=0, atol=0)


def test_it_is_taken_where_it_pays_only():
    with torch.no_grad():
        assert winograd_pays(LARGE, WIDE)
        assert not winograd_pays(LARGE[:, :, :20, :20], WIDE)
        assert not winograd_pays(LARGE[:, :8], WIDE[:, :8])
        assert not winograd_pays(LARGE, WIDE[:, :, :1, :1])
        assert not winograd_pays(LARGE.double(), WIDE.double())
        assert not winograd_pays(LARGE.to("meta"), WIDE.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd_pays(LARGE, WIDE)
    assert not winograd_pays(LARGE, WIDE)


@torch.no_grad()
def test_other_strides_and_dilations_are_torchs():
    for stride, padding, dilation in (((2, 2), (1, 1), (1, 1)), ((1, 1), (2, 2), (2, 2)), ((1, 1), (0, 0), (1, 1))):
        expected = F.conv2d(LARGE, WIDE, None, stride, padding, dilation)
        assert torch.equal(convolve(LARGE, WIDE, None, stride, padding, dilation), expected)


@torch.no_grad()
def test_weights_changed_in_place_count_at_once():
    layer = XavierConv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    before = layer(LARGE)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(LARGE), 2 * before)


@torch.no_grad()
def test_another_default_device_leaves_no_trace():
    modeling_maskformer_winograd.transforms.cache_clear()
    with torch.device("meta"):
        there = convolve(LARGE, WIDE, None)
    assert there.device.type == "cpu"
    assert torch.equal(convolve(LARGE, WIDE, None), there)


@torch.no_grad()
def test_compiled_and_exported_graphs_hold_the_plain_operator(monkeypatch):
    monkeypatch.setattr(modeling_maskformer_winograd, "winograd", None)  # whoever calls it fails
    layer = XavierConv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    program = torch.export.export(layer, (LARGE,))
    assert [node.name for node in program.graph.nodes if "conv" in str(node.target)]
    torch.jit.trace(layer, LARGE, check_trace=False)
    with pytest.raises(TypeError):
        layer(LARGE)


@torch.no_grad()
def test_models_with_weights_of_their_own_can_be_run_together():
    weights = torch.stack([WIDE, -WIDE])
    both = torch.vmap(lambda weight: convolve(LARGE, weight, None))(weights)
    torch.testing.assert_close(both[1], convolve(LARGE, -WIDE, None))
