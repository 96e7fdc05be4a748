"""The fast way of a 3 x 3 convolution gives what torch's gives, and stays out of the way elsewhere."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_maskformer import modeling_maskformer_dispatch, modeling_maskformer_winograd
from hf_maskformer.modeling_maskformer_pixel_decoder import XavierConv2d
from hf_maskformer.modeling_maskformer_winograd import (
    MIN_CHANNELS,
    WinogradConvolution,
    cached_winograd_pays,
    convolve,
    transformed_kernel,
    winograd,
    winograd_pays,
)

pytestmark = pytest.mark.skipif(
    not modeling_maskformer_dispatch.HAS_ONEDNN_OPERATORS, reason="here torch lacks what arranges kernels for oneDNN"
)

WIDE = torch.randn(MIN_CHANNELS, MIN_CHANNELS, 3, 3)
LARGE = torch.randn(1, MIN_CHANNELS, 48, 48)
SIZES = [(1, 1), (3, 5), (4, 8), (23, 18), (90, 37), (5, 1400)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_convolution_at_any_size(size, has_bias):
    states, weight, bias = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3), torch.randn(7) if has_bias else None
    expected = F.conv2d(states.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    found = winograd(states, transformed_kernel(weight), bias)
    # float32's 1e-7 times the matrices' few bits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_its_gradients_are_the_convolutions(size, has_bias):
    inputs = [torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3)] + ([torch.randn(7)] if has_bias else [])
    direction = torch.randn(2, 7, *size)

    def gradients(function, dtype):
        arguments = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = function(*arguments, *([] if has_bias else [None]))
        return torch.autograd.grad(output, arguments, direction.to(dtype))

    expected = gradients(lambda *arguments: F.conv2d(*arguments, padding=1), torch.float64)
    for found, tensor in zip(gradients(WinogradConvolution.apply, torch.float32), expected, strict=True):
        assert (found - tensor).abs().max() < 1e-5 * tensor.abs().max()


def test_a_gradient_that_nobody_needs_is_not_computed(monkeypatch):
    weight = WIDE.clone().requires_grad_()
    convolve(LARGE, weight, None).sum().backward()
    monkeypatch.setattr(modeling_maskformer_winograd, "winograd_kernel_gradient", None)  # whoever calls it fails
    states = LARGE.clone().requires_grad_()
    convolve(states, WIDE, None).sum().backward()
    expected = F.conv_transpose2d(torch.ones_like(LARGE), WIDE, padding=1)
    torch.testing.assert_close(states.grad, expected, atol=1e-3, rtol=1e-4)


def test_gradients_of_gradients_are_the_convolutions():
    def penalty(function):
        states, weight = LARGE.clone().requires_grad_(), WIDE.clone().requires_grad_()
        output = function(states, weight)
        (slope,) = torch.autograd.grad(output.square().mean(), states, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    expected = penalty(lambda states, weight: F.conv2d(states, weight, padding=1))
    found = penalty(lambda states, weight: convolve(states, weight, None))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("has_bias", [False, True])
def test_derivatives_forward_are_the_convolutions(has_bias):
    inputs = (LARGE, WIDE, torch.randn(MIN_CHANNELS))[: 2 + has_bias]
    directions = tuple(torch.randn_like(tensor) for tensor in inputs)

    def derivative(function):
        return torch.func.jvp(lambda *inputs: function(*inputs, *([] if has_bias else [None])), inputs, directions)[1]

    found, expected = derivative(convolve), derivative(lambda *inputs: F.conv2d(*inputs, padding=1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_layout_of_the_input_does_not_matter():
    states, weight = torch.randn(2, 5, 9, 6), torch.randn(7, 5, 3, 3)
    other = winograd(states.contiguous(memory_format=torch.channels_last), transformed_kernel(weight), None)
    torch.testing.assert_close(winograd(states, transformed_kernel(weight), None), other)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates():
    states = torch.randn(3, MIN_CHANNELS, 48, 48)
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


def test_kernels_of_many_channels_are_not_kept_transformed():
    """They are four times as large."""
    maps = [torch.empty(1, channels, 64, 64, device="meta") for channels in (256, 512)]
    kernels = [torch.empty(256, len(each[0]), 3, 3, device="meta") for each in maps]
    assert [cached_winograd_pays(*pair) for pair in zip(maps, kernels, strict=True)] == [True, False]


def test_without_its_operators_it_is_left(monkeypatch):
    monkeypatch.setattr(modeling_maskformer_dispatch, "HAS_ONEDNN_OPERATORS", False)
    assert not winograd_pays(LARGE, WIDE)


@torch.no_grad()
def test_a_run_without_values_leaves_no_trace():
    modeling_maskformer_winograd.transforms.cache_clear()
    weight = torch.nn.Parameter(WIDE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        convolve(mode.from_tensor(LARGE), weight, None)
    assert type(convolve(LARGE, weight, None)) is torch.Tensor


@torch.no_grad()
def test_other_strides_and_dilations_are_torchs():
    for stride, padding, dilation in (((2, 2), (1, 1), (1, 1)), ((1, 1), (1, 1), (2, 2)), ((1, 1), (0, 0), (1, 1))):
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
def test_exported_graphs_hold_the_plain_operator(monkeypatch):
    monkeypatch.setattr(modeling_maskformer_winograd, "winograd", None)  # whoever calls it fails
    layer = XavierConv2d(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    program = torch.export.export(layer, (LARGE,))
    assert [node.name for node in program.graph.nodes if "aten.conv" in str(node.target)]
    torch.jit.trace(layer, LARGE, check_trace=False)
    with pytest.raises(TypeError):
        layer(LARGE)


def test_a_compiled_graph_serves_every_size_in_the_fast_way(monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(convolve, backend=counter, fullgraph=True, dynamic=True)
    calls = []
    for name in ("winograd", "winograd_kernel_gradient"):
        function = getattr(modeling_maskformer_winograd, name)
        monkeypatch.setattr(
            modeling_maskformer_winograd,
            name,
            lambda *arguments, name=name, function=function: calls.append(name) or function(*arguments),
        )
    for size, expected_calls in (((48, 44), ["winograd", "winograd", "winograd_kernel_gradient"]), ((9, 7), [])):
        inputs = [torch.randn(2, MIN_CHANNELS, *size), WIDE.clone(), torch.randn(MIN_CHANNELS)]
        results = []
        for function in (compiled, lambda *inputs: F.conv2d(*inputs, padding=1)):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for found, expected in zip(*results, strict=True):
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert calls == expected_calls
        calls.clear()
    assert counter.frame_count == 1


def test_the_operators_meet_torchs_rules():
    operators = torch.ops.hf_maskformer
    for size in ((48, 44), (9, 7)):
        states, bias = torch.randn(2, MIN_CHANNELS, *size), torch.randn(MIN_CHANNELS)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid = states.contiguous(memory_format=layout)
            torch.library.opcheck(operators.convolve_3x3.default, (laid, WIDE, bias))
            torch.library.opcheck(operators.convolve_3x3_kernel_gradient.default, (laid, laid))


def test_a_copy_of_the_file_uses_the_operators_that_are_there():
    path = modeling_maskformer_winograd.__file__
    spec = importlib.util.spec_from_file_location("hf_maskformer.copy_of_winograd", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    compiled = torch.compile(copy.convolve, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(LARGE, WIDE, None), convolve(LARGE, WIDE, None))


@torch.no_grad()
def test_models_with_weights_of_their_own_can_be_run_together():
    weights = torch.stack([WIDE, -WIDE])
    both = torch.vmap(lambda weight: convolve(LARGE, weight, None))(weights)
    torch.testing.assert_close(both[1], F.conv2d(LARGE, -WIDE, padding=1))


def test_gradients_can_be_taken_through_such_models():
    def loss(weight):
        return convolve(LARGE, weight, None).square().mean()

    weights = torch.stack([WIDE, -WIDE])
    found = torch.vmap(torch.func.grad(loss))(weights)
    expected = torch.func.grad(lambda weight: F.conv2d(LARGE, weight, padding=1).square().mean())(WIDE)
    assert (found[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    torch.testing.assert_close(found[1], -found[0])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_derivatives_of_functions_are_the_convolutions_in_compiled_code_too(is_compiled):
    def loss(weight, function):
        return function(LARGE, weight).square().mean()

    gradient = torch.func.grad(lambda weight: loss(weight, lambda *inputs: convolve(*inputs, None)))
    found = (torch.compile(gradient, backend="aot_eager", fullgraph=True) if is_compiled else gradient)(WIDE)
    expected = torch.func.grad(lambda weight: loss(weight, lambda *inputs: F.conv2d(*inputs, padding=1)))(WIDE)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() > 0
