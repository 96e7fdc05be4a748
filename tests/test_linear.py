"""Linear layers and mask logits computed as convolutions are torch's, and plain operators stay elsewhere."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from hf_maskformer import modeling_maskformer_linear
from hf_maskformer.modeling_maskformer_dispatch import HAS_MKL_AND_ONEDNN
from hf_maskformer.modeling_maskformer_linear import MIN_POSITIONS, Linear, convolution_pays, products_with_pixels

pytestmark = pytest.mark.skipif(not HAS_MKL_AND_ONEDNN, reason="here products are not left to MKL")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    """As on processors that are not Intel's, of several cores."""
    monkeypatch.setattr(modeling_maskformer_linear, "IS_MKL_SLOW", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


STATES = torch.randn(2, MIN_POSITIONS, 12)
EMBEDDINGS, PIXELS = torch.randn(3, 2, 5, 12), torch.randn(2, 12, 8, MIN_POSITIONS // 4)


@pytest.mark.parametrize("shape", [(MIN_POSITIONS,), (3, MIN_POSITIONS), (2, 8, MIN_POSITIONS // 4), (1, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_the_linear_layers(shape, has_bias):
    layer = Linear(12, 7, bias=has_bias)
    states, direction = torch.randn(*shape, 12), torch.randn(*shape, 7)
    results = []
    for dtype, function in ((torch.float32, lambda states, *weights: layer(states)), (torch.float64, F.linear)):
        leaves = [states.to(dtype).requires_grad_(), *(layer.parameters())]
        if dtype == torch.float64:
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        output = function(*leaves)
        assert output.is_contiguous()
        results.append([output, *torch.autograd.grad(output, leaves, direction.to(dtype))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_of_the_input_does_not_matter():
    layer, turned = Linear(12, 7), torch.randn(12, MIN_POSITIONS).T
    torch.testing.assert_close(layer(turned), F.linear(turned, layer.weight, layer.bias))


def test_it_is_taken_where_it_pays_only():
    weight = torch.randn(7, 12)
    assert convolution_pays(STATES, weight)
    assert not convolution_pays(STATES[:1, 1:], weight)
    assert not convolution_pays(STATES[:0], weight)
    assert not convolution_pays(STATES.double(), weight.double())
    assert not convolution_pays(STATES.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolution_pays(STATES, weight)

    class Quantised(torch.Tensor):
        pass

    assert not convolution_pays(STATES, weight.as_subclass(Quantised))


def test_on_intels_processors_it_is_not_taken(monkeypatch):
    monkeypatch.setattr(modeling_maskformer_linear, "IS_MKL_SLOW", False)
    assert not convolution_pays(STATES, torch.randn(7, 12))


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_with_pixels_are_einsteins_sums(layout):
    pixels = PIXELS.clone(memory_format=layout)
    for embeddings in (EMBEDDINGS, EMBEDDINGS[:1], EMBEDDINGS[:, :, :0]):
        found = products_with_pixels(embeddings, pixels)
        assert found.is_contiguous()
        torch.testing.assert_close(found, torch.einsum("lbqc,bchw->lbqhw", embeddings, pixels))


@torch.no_grad()
def test_exported_graphs_hold_the_plain_operator():
    program = torch.export.export(Linear(12, 7), (STATES,))
    assert [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]


@torch.no_grad()
def test_a_compiled_graph_serves_every_number_of_positions():
    layer = Linear(12, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for states in (STATES, torch.randn(2, 5, 12), torch.randn(4, 33, 12)):
        torch.testing.assert_close(compiled(states), F.linear(states, layer.weight, layer.bias))
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_graph_serves_every_number_of_images_and_pixels():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(products_with_pixels, backend=counter, fullgraph=True, dynamic=True)
    for images, height in ((2, 8), (3, 7), (4, 9)):
        embeddings, pixels = torch.randn(3, images, 5, 12), torch.randn(images, 12, height, 13)
        torch.testing.assert_close(compiled(embeddings, pixels), torch.einsum("lbqc,bchw->lbqhw", embeddings, pixels))
    assert counter.frame_count == 1


def test_a_compiled_graph_is_trained_with_the_plain_operator():
    layer = Linear(12, 7)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(run(STATES).square().sum(), layer.parameters()) for run in (compiled, layer)]
    torch.testing.assert_close(*gradients)


def test_the_operators_meet_torchs_rules():
    for embeddings, pixels in ((EMBEDDINGS, PIXELS), (EMBEDDINGS[:1], PIXELS), (EMBEDDINGS[:, :0], PIXELS[:0])):
        torch.library.opcheck(torch.ops.hf_maskformer.products_with_pixels.default, (embeddings, pixels))
    for states in (STATES, STATES[:, :5], STATES[:0]):
        torch.library.opcheck(torch.ops.hf_maskformer.linear.default, (states, torch.randn(7, 12), torch.randn(7)))


@torch.no_grad()
def test_one_thread_gets_the_plain_operator(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not convolution_pays(STATES, torch.randn(7, 12))


def test_compiled_derivatives_go_through_plain_operators():
    layer = Linear(12, 7)

    def derivative(weight, direction):
        return torch.func.jvp(
            lambda weight: torch.func.functional_call(layer, {"weight": weight}, STATES), (weight,), (direction,)
        )[1]

    weight = layer.weight.detach()
    with torch.no_grad():
        found = torch.compile(derivative, backend="aot_eager")(weight, -weight)
    torch.testing.assert_close(found, F.linear(STATES, -weight))


def test_models_with_weights_of_their_own_can_be_run_and_trained_together():
    layer = Linear(12, 7)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (STATES,)).square().mean()

    weights = torch.stack([layer.weight.detach(), -layer.weight.detach()])
    found = torch.vmap(torch.func.grad(loss))(weights)
    for gradient, weight in zip(found, weights, strict=True):
        expected = torch.func.grad(lambda weight: F.linear(STATES, weight, layer.bias).square().mean())(weight)
        torch.testing.assert_close(gradient, expected)
