"""At inference on a CPU weights are folded, rounded and arranged once, and again when somebody changes them."""

import copy
import io

import accelerate
import peft
import pytest
import torch
import torch._dynamo.testing
from models import resnet_config, swin_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_maskformer import modeling_maskformer_packing as packing
from hf_maskformer.modeling_maskformer_linear import Linear, products_with_pixels, project
from hf_maskformer.modeling_maskformer_pixel_decoder import XavierConv2d
from hf_maskformer.modeling_maskformer_resnet import ConvNorm, ResNetStage
from hf_maskformer.modeling_maskformer_swin import SwinLinear, WindowSelfAttention

pytestmark = pytest.mark.skipif(not packing.HAS_ONEDNN_OPERATORS, reason="here torch lacks what arranges weights")
BFLOAT16 = pytest.mark.skipif(not packing.HAS_BFLOAT16_OPERATORS, reason="torch has no oneDNN with bfloat16 here")

# Sums in another order, each rounded to 8 bits.
CLOSE = {"rtol": 3e-2, "atol": 3e-2}
CLOSE_IN_FLOAT32 = {"rtol": 1e-3, "atol": 3e-4}


@pytest.fixture(params=[pytest.param("bfloat16", marks=BFLOAT16), pytest.param("autocast", marks=BFLOAT16), "float32"])
def numbers(request):
    """What is computed in: weights in bfloat16, weights in float32 under autocast to bfloat16, or all in float32."""
    return request.param


@pytest.fixture
def counter():
    """Counts graphs of the compiler, which has forgotten those of other tests."""
    torch._dynamo.reset()
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


@pytest.fixture
def reorders(monkeypatch):
    """How many weights were arranged so far."""
    count = []
    for name in ("PackedConvolution", "PackedLinear", "PackedWinograd"):
        original = getattr(packing, name).__init__

        def counted(self, *arguments, original=original):
            count.append(self)
            original(self, *arguments)

        monkeypatch.setattr(getattr(packing, name), "__init__", counted)
    return count


def prepared(module, numbers):
    return module.eval().bfloat16() if numbers == "bfloat16" else module.eval()


def run(module, *inputs, numbers="autocast"):
    inputs = [values.bfloat16() for values in inputs] if numbers == "bfloat16" else inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=numbers == "autocast"):
        return module(*inputs)


def kept(module):
    """The weights of a module of which something is kept."""
    return [weight for weight in module.parameters() if packing._CACHE.get(weight)]


def run_plainly(module, *inputs, numbers="autocast"):
    """As torch computes it, without anything that was kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "HAS_BFLOAT16_OPERATORS", False)
        patch.setattr(packing, "HAS_ONEDNN_OPERATORS", False)
        return run(module, *inputs, numbers=numbers)


def with_statistics(conv_norm):
    norm = conv_norm.normalization
    for values in (norm.weight, norm.running_var):
        torch.nn.init.uniform_(values, 0.5, 1.5)
    for values in (norm.bias, norm.running_mean):
        torch.nn.init.normal_(values)
    return conv_norm


LAYERS = {
    "convolution and norm": (lambda: with_statistics(ConvNorm(8, 16, 3, stride=2)), (2, 8, 9, 10)),
    "without activation": (lambda: with_statistics(ConvNorm(8, 16, 1, activation=None)), (2, 8, 9, 10)),
    "other activation": (lambda: with_statistics(ConvNorm(8, 16, 3, dilation=2, activation="gelu")), (2, 8, 9, 10)),
    "convolution": (lambda: XavierConv2d(8, 16, 3, padding=1), (2, 8, 9, 10)),
    "convolution without bias": (lambda: XavierConv2d(8, 16, 3, padding=1, bias=False), (1, 8, 9, 10)),
    "wide convolution": (lambda: XavierConv2d(192, 192, 3, padding=1), (1, 192, 32, 32)),
    "wide convolution and norm": (lambda: with_statistics(ConvNorm(192, 192, 3)), (2, 192, 32, 30)),
    "wide convolution with a stride": (lambda: with_statistics(ConvNorm(192, 192, 3, stride=2)), (1, 192, 32, 32)),
    "wide dilated convolution": (lambda: with_statistics(ConvNorm(192, 192, 3, dilation=2)), (1, 192, 32, 32)),
    "linear": (lambda: Linear(8, 16), (2, 5, 8)),
    "linear without bias": (lambda: Linear(8, 16, bias=False), (5, 8)),
}


def close(numbers):
    return CLOSE_IN_FLOAT32 if numbers == "float32" else CLOSE


def packs(name, numbers):
    return "linear" not in name or numbers != "float32"


@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_what_torch_gives(name, numbers, reorders):
    make, shape = LAYERS[name]
    layer, states = prepared(make(), numbers), torch.randn(shape)
    expected = run_plainly(layer, states, numbers=numbers)
    assert not reorders
    for _ in range(3):
        found = run(layer, states, numbers=numbers)
        torch.testing.assert_close(found, expected, **close(numbers))
    assert len(reorders) == packs(name, numbers)
    larger = torch.randn(*shape[:-2], 13, 8)
    found, expected = (way(layer, larger, numbers=numbers) for way in (run, run_plainly))
    torch.testing.assert_close(found, expected, **close(numbers))


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_models_predict_what_they_predict_with_torchs_layers(backbone, numbers, reorders):
    model, pixel_values = prepared(tiny_model(backbone()), numbers), torch.randn(2, 3, 64, 96)
    expected = run_plainly(model, pixel_values, numbers=numbers)
    found = run(model, pixel_values, numbers=numbers)
    count = len(reorders)
    for name in ("class_queries_logits", "masks_queries_logits", "pixel_decoder_last_hidden_state"):
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    run(model, pixel_values, numbers=numbers)
    assert len(reorders) == count > (4 if numbers == "float32" else 20)


def change_the_first_row(weight):
    weight.data[0] = 0.0


def change_a_row_in_the_middle(weight):
    weight.data[8] = 0.0


def change_the_last_row(weight):
    weight.data[-1] = 0.0


def scale(weight):
    weight.data.mul_(0.9)


def change_one_number(weight):
    with torch.no_grad():
        weight[1, 2] += 1.0


def replace_memory(weight):
    weight.data = torch.randn_like(weight)


def step_of_a_fused_optimiser(weight):
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


CHANGES = [
    change_the_first_row,
    change_a_row_in_the_middle,
    change_the_last_row,
    scale,
    change_one_number,
    replace_memory,
    step_of_a_fused_optimiser,
]


@pytest.mark.parametrize("name", ["convolution and norm", "convolution", "wide convolution", "linear"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_counts_at_once(name, change, numbers):
    make, shape = LAYERS[name]
    layer, states = prepared(make(), numbers), torch.randn(shape)
    before = run(layer, states, numbers=numbers)
    change(next(layer.parameters()))
    found = run(layer, states, numbers=numbers)
    torch.testing.assert_close(found, run_plainly(layer, states, numbers=numbers), **CLOSE)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_change_of_a_norm_counts_at_once(name, numbers):
    layer, states = prepared(with_statistics(ConvNorm(8, 16, 3)), numbers), torch.randn(2, 8, 9, 10)
    run(layer, states, numbers=numbers)
    getattr(layer.normalization, name).data[3] += 2.0
    found = run(layer, states, numbers=numbers)
    torch.testing.assert_close(found, run_plainly(layer, states, numbers=numbers), **CLOSE)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16])
def test_a_change_of_any_row_or_column_is_seen(rows, columns):
    weight = torch.zeros(rows, columns)
    entry = packing.CacheEntry(None, [weight])
    # The first row is looked at as a whole, of the others enough that a column of many of them does not pass either.
    below = weight.data[1:].T if rows > columns else ()
    for part in (*weight.data, *weight.data.T, *below):
        part.fill_(1.0)
        assert not entry.is_current([weight])
        weight.data.zero_()
        # torch does not count changes through `.data`.
        assert entry.is_current([weight])


@pytest.mark.parametrize("name", ["convolution", "linear"])
def test_a_transposed_weight_counts_at_once(name, numbers):
    layer = Linear(8, 8) if name == "linear" else XavierConv2d(8, 8, 3, padding=1)
    layer, states = prepared(layer, numbers), torch.randn(2, 8, 8, 8)
    run(layer, states, numbers=numbers)
    layer.weight.data = layer.weight.data.transpose(0, 1)
    found, expected = (way(layer, states, numbers=numbers) for way in (run, run_plainly))
    torch.testing.assert_close(found, expected, **close(numbers))


@torch.no_grad()
def test_a_change_while_weights_are_made_is_seen_in_the_next_pass():
    weight = torch.zeros(3, 4)

    def make():
        made = weight.clone()
        weight.data[1] = 5.0  # as another thread might
        return made

    packing.cached(make, None, None, weight)
    assert torch.equal(packing.cached(weight.clone, None, None, weight), weight)


def test_a_change_of_the_settings_counts_at_once(numbers):
    layer, states = prepared(with_statistics(ConvNorm(8, 16, 3, stride=2)), numbers), torch.randn(2, 8, 9, 10)
    projection = prepared(XavierConv2d(8, 16, 3, padding=1), numbers)
    for each in (layer, projection):
        run(each, states, numbers=numbers)
    layer.convolution.stride, layer.normalization.eps, projection.padding = (1, 1), 0.5, (0, 0)
    for each in (layer, projection):
        found, expected = (way(each, states, numbers=numbers) for way in (run, run_plainly))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("channels", "size"), [(8, 8), (192, 32)])
def test_another_eps_alone_counts_at_once(channels, size, numbers):
    layer = prepared(with_statistics(ConvNorm(channels, channels, 3)), numbers)
    states = torch.randn(1, channels, size, size)
    run(layer, states, numbers=numbers)
    layer.normalization.eps = 2.0
    found, expected = (way(layer, states, numbers=numbers) for way in (run, run_plainly))
    torch.testing.assert_close(found, expected, **close(numbers))


@BFLOAT16
@pytest.mark.parametrize(("first", "second"), [("autocast", "float32"), ("float32", "autocast")])
def test_weights_packed_for_one_type_do_not_serve_another(first, second):
    layer, states = XavierConv2d(8, 16, 3, padding=1).eval(), torch.randn(1, 8, 9, 10)
    run(layer, states, numbers=first)
    found, expected = (way(layer, states, numbers=second) for way in (run, run_plainly))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **close(second))


@torch.no_grad()
def test_a_norm_is_folded_into_half_precision_with_one_rounding():
    norm = [torch.rand(64).add(0.5).bfloat16() for _ in range(4)]
    weight = torch.randn(64, 8, 3, 3).bfloat16()
    found = packing.FoldableConvolution(weight, None, (1, 1), (1, 1), (1, 1), norm, 1e-5).folded()
    scale = norm[0].double() * (norm[3].double() + 1e-5).rsqrt()
    expected = weight * scale[:, None, None, None], norm[1] - norm[2] * scale
    for values, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(values.double(), exact, rtol=2**-8, atol=2**-8)


def orders(weight):
    """The arrangements of a convolution's weight that are kept, by the size of its inputs."""
    return next(entry.value for entry in packing._CACHE[weight].values() if isinstance(entry.value, dict))


def test_weights_are_arranged_once_for_each_size_and_again_when_they_change(numbers, reorders):
    layer = prepared(XavierConv2d(192, 192, 3, padding=1), numbers)
    sizes = [(1, 192, 3, 8), (2, 192, 3, 8), (1, 192, 8, 3)]
    for size in (*sizes, *sizes):
        run(layer, torch.randn(size), numbers=numbers)
    assert len(reorders) == 3
    layer.weight.data[0] = 0.0
    states = torch.randn(sizes[1])
    found, expected = (way(layer, states, numbers=numbers) for way in (run, run_plainly))
    torch.testing.assert_close(found, expected, **close(numbers))
    assert list(orders(layer.weight)) == [states.shape]


def test_each_size_has_the_order_that_is_fast_for_it_and_equal_orders_are_one(numbers):
    # In bfloat16, oneDNN on a Zen 5 takes three orders for these sizes, in float32 two.
    layer = prepared(XavierConv2d(2048, 512, 1, bias=False), numbers)
    convolution = packing.FoldableConvolution(layer.weight, None, layer.stride, layer.padding, layer.dilation)
    sizes = [torch.Size((1, 2048, size, size)) for size in (16, 1, 2, 16, 4, 20)]
    for size in sizes:
        run(layer, torch.randn(size), numbers=numbers)
    by_size = orders(layer.weight)
    assert set(by_size) == set(sizes)
    for size, kept in by_size.items():
        fresh = packing.PackedConvolution(convolution, kept.dtype, size)
        assert fresh.is_arranged_as(kept)
        assert all(kept is other or not kept.is_arranged_as(other) for other in by_size.values())


def test_only_so_many_sizes_are_remembered(monkeypatch, numbers):
    monkeypatch.setattr(packing, "MAX_SIZES", 2)
    layer = prepared(XavierConv2d(8, 16, 1), numbers)
    for size in range(1, 8):
        states = torch.randn(1, 8, size, 4)
        found, expected = (way(layer, states, numbers=numbers) for way in (run, run_plainly))
        torch.testing.assert_close(found, expected, **close(numbers))
        assert len(orders(layer.weight)) <= 2


@torch.no_grad()
def test_large_maps_have_a_kernel_of_their_own_for_all_sizes(reorders):
    layer = XavierConv2d(192, 192, 3, padding=1).eval()
    for size in (32, 8, 40, 8, 32):
        layer(torch.randn(1, 192, size, size))
    assert [type(made).__name__ for made in reorders] == ["PackedWinograd", "PackedConvolution"]
    assert len(packing._CACHE[layer.weight]) == 2
    layer.weight[0] = 0.0
    layer(torch.randn(1, 192, 32, 32))
    assert len(packing._CACHE[layer.weight]) == 1


def test_the_bias_of_positions_follows_its_table(numbers):
    attention, windows = prepared(WindowSelfAttention(swin_config(), 8, 2), numbers), torch.randn(3, 16, 8)
    before = run(lambda states: attention(states, None), windows, numbers=numbers)
    attention.relative_position_bias_table.data[0] += 10.0
    found = run(lambda states: attention(states, None), windows, numbers=numbers)
    expected = run_plainly(lambda states: attention(states, None), windows, numbers=numbers)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, expected, **close(numbers))
    attention.relative_position_index.copy_(attention.relative_position_index.flip(0))
    found = run(lambda states: attention(states, None), windows, numbers=numbers)
    expected = run_plainly(lambda states: attention(states, None), windows, numbers=numbers)
    torch.testing.assert_close(found, expected, **close(numbers))


@BFLOAT16
def test_the_bias_of_positions_is_not_rounded_under_autocast():
    """So what is the same for all of them makes no difference, however large it is."""
    attention, windows = WindowSelfAttention(swin_config(), 8, 2).eval(), torch.randn(3, 16, 8)
    for values in (attention.relative_position_bias_table, attention.value.weight):
        torch.nn.init.normal_(values)
    expected = run(lambda states: attention(states, None), windows)
    attention.relative_position_bias_table.data += 100.0  # near which numbers of 8 bits are 0.5 apart
    found = run(lambda states: attention(states, None), windows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # of about 1, with products of 8 bits


@pytest.mark.parametrize(
    "name", ["convolution and norm", "other activation", "convolution", "wide convolution", "linear"]
)
def test_compiled_code_keeps_weights_too(name, numbers, reorders):
    torch._dynamo.reset()
    make, shape = LAYERS[name]
    layer, states = prepared(make(), numbers), torch.randn(shape)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for _ in range(2):
        expected = run_plainly(layer, states, numbers=numbers)
        for _ in range(2):
            found = run(compiled, states, numbers=numbers)
            torch.testing.assert_close(found, expected, **close(numbers))
        next(layer.parameters()).data[1] += 1.0
    assert len(reorders) == 2 * packs(name, numbers)


@torch.no_grad()
def test_compiled_code_serves_all_sizes_and_sees_what_is_turned_off(reorders, counter):
    layer = with_statistics(ConvNorm(192, 192, 3)).eval()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for size in ((2, 192, 9, 10), (3, 192, 32, 20), (4, 192, 5, 7), (2, 192, 48, 40)):
        states = torch.randn(size)
        torch.testing.assert_close(compiled(states), run_plainly(layer, states, numbers="float32"), **CLOSE_IN_FLOAT32)
        counts.add(counter.frame_count)
    assert {type(made).__name__ for made in reorders} == {"PackedConvolution", "PackedWinograd"}
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(compiled(states), run_plainly(layer, states, numbers="float32"), **CLOSE_IN_FLOAT32)
    assert {counter.frame_count} == counts


@BFLOAT16
@torch.no_grad()
@pytest.mark.parametrize(("count", "is_enabled"), [(0, True), (2, False)])
def test_operators_of_compiled_code_leave_to_torch_what_is_empty_or_turned_off(count, is_enabled, reorders):
    operators, geometry = torch.ops.hf_maskformer, ([2, 2], [3, 3], [2, 2])
    positions, weight, bias = (torch.randn(size).bfloat16() for size in ((count, 8), (6, 8), (6,)))
    images, kernel = torch.randn(count, 8, 9, 10), torch.randn(6, 8, 3, 3)
    with torch.backends.mkldnn.flags(enabled=is_enabled):
        product = operators.linear_in_bfloat16(positions, [weight], [bias])
        convolved = operators.convolve(images, kernel, None, *geometry, [], None, torch.float32, "relu")
    assert not reorders
    torch.testing.assert_close(product, torch.nn.functional.linear(positions, weight, bias), **CLOSE)
    expected = torch.nn.functional.conv2d(images, kernel, None, *geometry).relu()
    torch.testing.assert_close(convolved, expected, **CLOSE_IN_FLOAT32)
    assert convolved.is_contiguous(memory_format=torch.channels_last)  # as the compiler was told


def test_layers_that_are_compiled_one_by_one_add_their_residual(numbers):
    torch._dynamo.reset()
    stage = prepared(ResNetStage(resnet_config(), 16, 16, 1, [1, 1, 1]), numbers)
    states = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    states = states if numbers == "float32" else states.bfloat16()
    expected = run_plainly(stage, states, numbers=numbers)
    for layer in stage.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(stage, states, numbers=numbers), expected, **close(numbers))


@BFLOAT16
def test_operators_work_while_another_thread_compiles(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # it says so in all threads
    states, weight, bias = torch.randn(2, 5, 8).bfloat16(), torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16()
    with torch.no_grad():
        found = torch.ops.hf_maskformer.linear_in_bfloat16(states, [weight], [bias])
    torch.testing.assert_close(found, torch.nn.functional.linear(states, weight, bias), **CLOSE)


@torch.no_grad()
def test_tensors_that_torch_swaps_can_be_loaded():
    model, pixel_values = tiny_model().eval(), torch.randn(1, 3, 64, 64)
    other = {name: values + 0.1 for name, values in model.state_dict().items()}
    model(pixel_values)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    found, expected = (way(model, pixel_values, numbers="float32") for way in (run, run_plainly))
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, **CLOSE_IN_FLOAT32)


@pytest.mark.parametrize(
    ("has_norm", "dtype"), [(True, torch.float32), pytest.param(False, torch.bfloat16, marks=BFLOAT16)]
)
def test_a_convolution_of_compiled_code_meets_torchs_rules(has_norm, dtype):
    states, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3)
    norm, eps = ([torch.rand(6) + 0.5 for _ in range(4)], 1e-5) if has_norm else ([], None)
    geometry = ([2, 1], [1, 2], [1, 2])
    arguments = (states, weight, None, *geometry, norm, eps, dtype, "relu" if has_norm else "none")
    torch.library.opcheck(torch.ops.hf_maskformer.convolve.default, arguments)


@BFLOAT16
def test_a_linear_layer_of_compiled_code_meets_torchs_rules():
    operator = torch.ops.hf_maskformer.linear_in_bfloat16.default
    matrices, vectors = [torch.randn(3, 4), torch.randn(5, 4)], [torch.randn(3), torch.randn(5)]
    torch.library.opcheck(operator, (torch.randn(2, 7, 4), matrices, vectors))
    torch.library.opcheck(operator, (torch.randn(7, 4), matrices, []))


def test_statistics_of_another_batch_count_at_once():
    layer, states = with_statistics(ConvNorm(8, 16, 3)).eval(), torch.randn(2, 8, 9, 10)
    run(layer, states)
    layer.train()(3 + 2 * states)
    layer.eval()
    torch.testing.assert_close(run(layer, states), run_plainly(layer, states), **CLOSE)


@BFLOAT16
@pytest.mark.parametrize("numbers", ["bfloat16", "autocast"])
def test_queries_keys_and_values_are_one_product_and_follow_each_of_their_weights(numbers, reorders):
    config = swin_config()
    attention, windows = prepared(WindowSelfAttention(config, 8, 2), numbers), torch.randn(3, 16, 8)
    for change in (None, "query", "key", "value"):
        if change is not None:
            getattr(attention, change).weight.data.add_(1.0)
        found = run(lambda states: attention(states, None), windows, numbers=numbers)
        expected = run_plainly(lambda states: attention(states, None), windows, numbers=numbers)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(reorders) == 4
    assert all(len(packed.bias) == 24 for packed in reorders)


def test_hooks_and_adapters_among_queries_keys_and_values_take_part():
    attention, windows = WindowSelfAttention(swin_config(), 8, 2).eval(), torch.randn(3, 16, 8)
    torch.nn.init.normal_(attention.value.weight)  # else the adapter, small as they all begin, is lost in the rounding
    seen = []
    handle = attention.key.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run(lambda states: attention(states, None), windows)
    assert len(seen) == 1
    handle.remove()
    wrapped = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["value"], init_lora_weights=False), torch.nn.ModuleDict({"own": attention})
    )
    assert type(wrapped["own"].value) is not SwinLinear
    wrapped.eval()  # in training nothing would be kept of the adapter anyway
    found = run(lambda states: wrapped["own"](states, None), windows)
    expected = run_plainly(lambda states: wrapped["own"](states, None), windows)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_merged_adapter_counts_at_once():
    layer, states = torch.nn.ModuleDict({"own": Linear(8, 16)}).eval(), torch.randn(2, 5, 8)
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["own"], init_lora_weights=False), layer)
    expected = run(model["own"], states)
    model["own"].merge()
    torch.testing.assert_close(run(model["own"], states), expected, **CLOSE)


def test_hooks_on_an_activation_are_called():
    layer, seen = ConvNorm(8, 16, 3).eval(), []
    layer.activation.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run(layer, torch.randn(1, 8, 9, 10))
    assert len(seen) == 1


def test_a_resnet_stage_leaves_its_input_as_it_is(numbers):
    config = resnet_config()
    stage = prepared(ResNetStage(config, 16, 16, 1, [1, 1, 1]), numbers)
    states = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    states = states if numbers == "float32" else states.bfloat16()
    before = states.clone()
    found = run(stage, states, numbers=numbers)
    torch.testing.assert_close(found, run_plainly(stage, states, numbers=numbers), **CLOSE)
    assert torch.equal(states, before)


def test_where_gradients_are_wanted_nothing_is_packed(reorders):
    model = tiny_model().eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 64, 64)).masks_queries_logits.float().sum().backward()
    assert not reorders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_types_are_left_to_torch(dtype, reorders):
    layer, states = Linear(8, 16).eval().to(dtype), torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        layer(states)
        with torch.autocast("cpu", torch.float16):
            layer(states)
    assert not reorders


def test_weights_of_inference_mode_are_not_kept(reorders):
    with torch.inference_mode():
        layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
        first = layer(states)
        layer.weight[1, 2] += 1.0
        assert not torch.equal(layer(states), first)
        assert not kept(layer)


def test_the_results_of_inference_mode_serve_without_it(reorders):
    layer, states = ConvNorm(8, 16, 1).eval(), torch.randn(2, 8, 9, 10)
    with torch.inference_mode():
        expected = layer(states)
    with torch.no_grad():
        assert torch.equal(layer(states), expected)
    assert len(reorders) == 1


def test_weights_with_gaps_between_them_are_not_kept():
    layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
    layer.weight.data = torch.randn(16, 11).bfloat16()[:, :8]
    with torch.no_grad():
        layer(states)
        assert not kept(layer)


@BFLOAT16
@pytest.mark.parametrize("place", range(3))
def test_a_product_of_which_one_weight_has_gaps_is_not_kept(place):
    """Looking at its values would read beyond its memory."""
    layers, states = [Linear(8, 16).eval().bfloat16() for _ in range(3)], torch.randn(5, 8).bfloat16()
    with torch.no_grad():
        project(layers, states)
        assert kept(layers[0])
        layers[place].weight.data = torch.randn(16, 11).bfloat16()[:, :8]
        found = project(layers, states)
        assert not any(map(kept, layers))
    expected = [torch.nn.functional.linear(states, layer.weight, layer.bias) for layer in layers]
    for values, right in zip(found, expected, strict=True):
        torch.testing.assert_close(values, right, **CLOSE)


def test_nothing_holds_on_to_the_memory_of_weights(reorders):
    layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
    with torch.no_grad():
        expected = layer(states)
    storage, values = layer.weight.untyped_storage(), layer.weight.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)  # as sharding does between passes
    storage.resize_(size)
    layer.weight.data.copy_(values)
    with torch.no_grad():
        torch.testing.assert_close(layer(states), expected)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "size"), [(8, 8), (192, 32)])
def test_what_is_kept_has_a_bias_of_its_own(channels, size):
    layer = XavierConv2d(channels, channels, 3, padding=1).eval()
    layer(torch.randn(1, channels, size, size))
    for kept_of_kind in packing._CACHE[layer.weight].values():
        made = kept_of_kind.value
        for packed in made.values() if isinstance(made, dict) else [made]:
            assert packed.bias.data_ptr() != layer.bias.data_ptr()


@torch.no_grad()
def test_nothing_is_kept_in_training_even_without_gradient():
    layer, states = XavierConv2d(8, 16, 3, padding=1), torch.randn(1, 8, 9, 10)
    layer.train()(states)
    assert not kept(layer)
    layer.eval()(states)
    assert kept(layer)


def test_moving_a_model_frees_what_is_kept():
    model = tiny_model().eval()
    run(model, torch.randn(1, 3, 64, 64), numbers="float32")
    assert kept(model)
    model.to(torch.float64)
    assert not kept(model)


def test_offloaded_weights_are_not_kept(tmp_path):
    model = tiny_model(swin_config()).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = run_plainly(model, pixel_values)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    found = run(model, pixel_values)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, **CLOSE)
    assert not kept(model)


def test_with_processes_beside_it_a_model_keeps_nothing(tmp_path, reorders):
    layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with torch.no_grad():
            layer(states)
    finally:
        torch.distributed.destroy_process_group()
    assert not reorders


def test_what_counts_or_turns_off_operators_sees_plain_ones(reorders):
    layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(states)
        with torch.backends.mkldnn.flags(enabled=False):
            layer(states)
    assert counter.get_total_flops() == 2 * 5 * 8 * 16
    assert not reorders


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_tools_that_look_at_operators_see_no_packed_ones(backbone, numbers):
    namespaces = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            namespaces.add(function.namespace)
            return function(*args, **(kwargs or {}))

    model, pixel_values = prepared(tiny_model(backbone()), numbers), torch.randn(1, 3, 32, 64)
    with Recorder():
        run(model, pixel_values, numbers=numbers)
    assert namespaces == {"aten"}


def test_a_residual_in_another_layout_is_added_too(numbers):
    layer = prepared(with_statistics(ConvNorm(8, 16, 1, activation=None)), numbers)
    states, residual = torch.randn(2, 8, 9, 10), torch.randn(2, 16, 9, 10).bfloat16()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        owned = residual.clone().contiguous(memory_format=layout)
        results.append(run(lambda states, owned=owned: layer(states, owned), states, numbers=numbers))
    torch.testing.assert_close(*results, **CLOSE)
    expected = (run_plainly(layer, states, numbers=numbers) + residual).relu()
    torch.testing.assert_close(results[0], expected, **CLOSE)


def test_a_wide_convolution_is_added_to_its_residual(numbers):
    layer = prepared(with_statistics(ConvNorm(192, 192, 3, activation=None)), numbers)
    states, residual = torch.randn(2, 1, 192, 32, 32)
    found, expected = (way(layer, states, residual.clone(), numbers=numbers) for way in (run, run_plainly))
    torch.testing.assert_close(found, expected, **close(numbers))


def test_a_bias_of_some_of_queries_keys_and_values_is_added(numbers):
    attention, windows = WindowSelfAttention(swin_config(), 8, 2), torch.randn(3, 16, 8)
    attention.key.bias = None
    torch.nn.init.normal_(attention.query.bias)
    attention = prepared(attention, numbers)
    found, expected = (
        way(lambda states: attention(states, None), windows, numbers=numbers) for way in (run, run_plainly)
    )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_training_frees_what_is_kept_and_copies_have_nothing_of_it():
    model = tiny_model().eval()
    names = set(model.state_dict())
    run(model, torch.randn(1, 3, 64, 64), numbers="float32")
    assert kept(model)
    assert set(model.state_dict()) == names
    torch.save(model, io.BytesIO())
    assert not kept(copy.deepcopy(model))
    model.train()
    assert not kept(model)


def test_what_is_kept_goes_with_its_module():
    layer = ConvNorm(8, 16, 1).eval()
    with torch.no_grad():
        layer(torch.randn(2, 8, 9, 10))
    count = len(packing._CACHE)
    del layer
    assert len(packing._CACHE) == count - 1


def test_products_with_pixels_are_mapped_by_vmap(numbers):
    embeddings, pixels = torch.randn(3, 2, 1, 6, 8), torch.randn(3, 1, 8, 9, 10)
    found = run(torch.func.vmap(products_with_pixels), embeddings, pixels, numbers=numbers)
    torch.testing.assert_close(found.float(), torch.einsum("elbqc,ebchw->elbqhw", embeddings, pixels), rtol=0, atol=0.1)


@BFLOAT16
@pytest.mark.parametrize("numbers", ["bfloat16", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_with_pixels_are_einsteins_sums(layout, numbers):
    embeddings, pixels = torch.randn(2, 3, 5, 8), torch.randn(3, 8, 6, 7).contiguous(memory_format=layout)
    found = run(products_with_pixels, embeddings, pixels, numbers=numbers)
    expected = torch.einsum("lbqc,bchw->lbqhw", embeddings, pixels)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=0.1)


@torch.no_grad()
def test_a_compiled_graph_of_products_serves_every_number_of_images_and_pixels(numbers, counter):
    compiled = torch.compile(products_with_pixels, backend=counter, fullgraph=True, dynamic=True)
    for images, height in ((2, 8), (3, 7), (4, 9)):
        embeddings, pixels = torch.randn(3, images, 5, 12), torch.randn(images, 12, height, 13)
        expected = run(products_with_pixels, embeddings, pixels, numbers=numbers)
        torch.testing.assert_close(run(compiled, embeddings, pixels, numbers=numbers), expected, **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kind", ["float32", pytest.param("autocast", marks=BFLOAT16), "compiled"])
def test_what_is_wrong_with_an_image_is_seen_in_its_results_alone(kind, value):
    """oneDNN's ReLU makes 0 of NaN."""
    model, images = tiny_model(fpn_feature_size=64).eval(), torch.randn(2, 3, 64, 96)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if kind == "compiled" else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected = call(images)
        images[1, 2, 5, 7] = value
        found = call(images)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(found[name][0], expected[name][0])
        assert found[name][1].isnan().all()


@torch.no_grad()
def test_a_bright_image_in_float16_is_not_taken_for_a_damaged_one():
    model = tiny_model().eval().half()
    pixel_values = torch.full((1, 3, 128, 192), 2.0, dtype=torch.float16)  # whose sum is beyond what float16 holds
    assert model(pixel_values).masks_queries_logits.isfinite().all()


@pytest.mark.parametrize("channels", [8, 192])  # the latter by Winograd's way in float32
@pytest.mark.parametrize("part", ["convolution.weight", "normalization.running_mean", "normalization.running_var"])
def test_weights_that_are_not_finite_are_refused(part, channels, numbers):
    layer, states = prepared(ConvNorm(channels, channels, 3), numbers), torch.randn(1, channels, 32, 32)
    with torch.no_grad():
        run(layer, states, numbers=numbers)
        values = layer.state_dict()[part]
        values.view(-1)[1] = torch.nan
        with pytest.raises(ValueError, match=rf"weight \({channels}, {channels}, 3, 3\), .* is not finite"):
            run(layer, states, numbers=numbers)
        values.view(-1)[1] = 1.0
        assert run(layer, states, numbers=numbers).isfinite().all()


def test_finite_weights_whose_sum_is_not_are_no_error(numbers):
    layer = prepared(XavierConv2d(8, 16, kernel_size=1), numbers)
    torch.nn.init.constant_(layer.weight, 2.0**127)
    assert not run(layer, torch.zeros(1, 8, 4, 4), numbers=numbers).any()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_convolutions_without_a_norm_are_looked_at_too(part, is_compiled):
    layer, states = XavierConv2d(8, 16, kernel_size=1).eval(), torch.randn(1, 8, 4, 4)
    getattr(layer, part).data.view(-1)[-1] = torch.inf
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if is_compiled else layer
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight \(16, 8, 1, 1\), .* is not finite"):
        call(states)
