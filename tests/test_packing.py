"""In bfloat16 on a CPU weights are rounded and arranged once, and again when somebody changes them."""

import copy
import io

import accelerate
import peft
import pytest
import torch
import torch._dynamo.testing
from models import resnet_config, swin_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from hf_maskformer import modeling_maskformer_packing as packing
from hf_maskformer.modeling_maskformer_linear import Linear, products_with_pixels
from hf_maskformer.modeling_maskformer_pixel_decoder import XavierConv2d
from hf_maskformer.modeling_maskformer_resnet import ConvNorm, ResNetStage
from hf_maskformer.modeling_maskformer_swin import SwinLinear, WindowSelfAttention

pytestmark = pytest.mark.skipif(not packing.HAS_PACKING_OPERATORS, reason="torch has no oneDNN with bfloat16 here")

# Sums in another order, each rounded to 8 bits.
CLOSE = {"rtol": 3e-2, "atol": 3e-2}


@pytest.fixture(params=[False, True], ids=["bfloat16", "autocast"])
def autocast(request):
    """Weights in float32 under autocast, or all in bfloat16."""
    return request.param


@pytest.fixture
def reorders(monkeypatch):
    """How many weights were arranged so far."""
    count = []
    for name in ("PackedConvolution", "PackedLinear"):
        original = getattr(packing, name).__init__

        def counted(self, *arguments, original=original):
            count.append(self)
            original(self, *arguments)

        monkeypatch.setattr(getattr(packing, name), "__init__", counted)
    return count


def prepared(module, autocast):
    return module.eval() if autocast else module.eval().bfloat16()


def run(module, *inputs, autocast):
    inputs = inputs if autocast else [values.bfloat16() for values in inputs]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return module(*inputs)


def run_plainly(module, *inputs, autocast):
    """As torch computes it, without anything that was kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "HAS_PACKING_OPERATORS", False)
        return run(module, *inputs, autocast=autocast)


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
    "linear": (lambda: Linear(8, 16), (2, 5, 8)),
    "linear without bias": (lambda: Linear(8, 16, bias=False), (5, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_what_torch_gives(name, autocast, reorders):
    make, shape = LAYERS[name]
    layer, states = prepared(make(), autocast), torch.randn(shape)
    expected = run_plainly(layer, states, autocast=autocast)
    assert not reorders
    for _ in range(3):
        found = run(layer, states, autocast=autocast)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(reorders) == 1
    larger = torch.randn(*shape[:-2], 13, 8)
    torch.testing.assert_close(
        run(layer, larger, autocast=autocast), run_plainly(layer, larger, autocast=autocast), **CLOSE
    )


@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_models_predict_what_they_predict_with_torchs_layers(backbone, autocast, reorders):
    model, pixel_values = prepared(tiny_model(backbone()), autocast), torch.randn(2, 3, 64, 96)
    expected = run_plainly(model, pixel_values, autocast=autocast)
    found = run(model, pixel_values, autocast=autocast)
    count = len(reorders)
    for name in ("class_queries_logits", "masks_queries_logits", "pixel_decoder_last_hidden_state"):
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    run(model, pixel_values, autocast=autocast)
    assert len(reorders) == count > 20


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


@pytest.mark.parametrize("name", ["convolution and norm", "convolution", "linear"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_counts_at_once(name, change, autocast):
    make, shape = LAYERS[name]
    layer, states = prepared(make(), autocast), torch.randn(shape)
    before = run(layer, states, autocast=autocast)
    change(next(layer.parameters()))
    found = run(layer, states, autocast=autocast)
    torch.testing.assert_close(found, run_plainly(layer, states, autocast=autocast), **CLOSE)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_change_of_a_norm_counts_at_once(name, autocast):
    layer, states = prepared(with_statistics(ConvNorm(8, 16, 3)), autocast), torch.randn(2, 8, 9, 10)
    run(layer, states, autocast=autocast)
    getattr(layer.normalization, name).data[3] += 2.0
    found = run(layer, states, autocast=autocast)
    torch.testing.assert_close(found, run_plainly(layer, states, autocast=autocast), **CLOSE)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16])
def test_the_sample_of_a_matrix_has_a_value_of_each_row(rows, columns):
    weight = torch.zeros(rows, columns)
    sample, seen = packing.sample(weight), packing.sample(weight).tobytes()
    for row in range(rows):
        weight[row] = 1.0
        assert sample.tobytes() != seen
        weight[row] = 0.0


def test_a_change_of_the_settings_counts_at_once(autocast):
    layer, states = prepared(with_statistics(ConvNorm(8, 16, 3, stride=2)), autocast), torch.randn(2, 8, 9, 10)
    projection = prepared(XavierConv2d(8, 16, 3, padding=1), autocast)
    for each in (layer, projection):
        run(each, states, autocast=autocast)
    layer.convolution.stride, layer.normalization.eps, projection.padding = (1, 1), 0.5, (0, 0)
    for each in (layer, projection):
        found, expected = (way(each, states, autocast=autocast) for way in (run, run_plainly))
        torch.testing.assert_close(found, expected, **CLOSE)


def test_statistics_of_another_batch_count_at_once():
    layer, states = with_statistics(ConvNorm(8, 16, 3)).eval(), torch.randn(2, 8, 9, 10)
    run(layer, states, autocast=True)
    layer.train()(3 + 2 * states)
    layer.eval()
    torch.testing.assert_close(run(layer, states, autocast=True), run_plainly(layer, states, autocast=True), **CLOSE)


def test_queries_keys_and_values_are_one_product_and_follow_each_of_their_weights(autocast, reorders):
    config = swin_config()
    attention, windows = prepared(WindowSelfAttention(config, 8, 2), autocast), torch.randn(3, 16, 8)
    for change in (None, "query", "key", "value"):
        if change is not None:
            getattr(attention, change).weight.data.add_(1.0)
        found = run(lambda states: attention(states, None), windows, autocast=autocast)
        expected = run_plainly(lambda states: attention(states, None), windows, autocast=autocast)
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(reorders) == 4
    assert all(len(packed.bias) == 24 for packed in reorders)


def test_hooks_and_adapters_among_queries_keys_and_values_take_part():
    attention, windows = WindowSelfAttention(swin_config(), 8, 2).eval(), torch.randn(3, 16, 8)
    seen = []
    handle = attention.key.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run(lambda states: attention(states, None), windows, autocast=True)
    assert len(seen) == 1
    handle.remove()
    wrapped = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["value"], init_lora_weights=False), torch.nn.ModuleDict({"own": attention})
    )
    assert type(wrapped["own"].value) is not SwinLinear
    found = run(lambda states: wrapped["own"](states, None), windows, autocast=True)
    expected = run_plainly(lambda states: wrapped["own"](states, None), windows, autocast=True)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_merged_adapter_counts_at_once():
    layer, states = torch.nn.ModuleDict({"own": Linear(8, 16)}).eval(), torch.randn(2, 5, 8)
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["own"], init_lora_weights=False), layer)
    expected = run(model["own"], states, autocast=True)
    model["own"].merge()
    torch.testing.assert_close(run(model["own"], states, autocast=True), expected, **CLOSE)


def test_hooks_on_an_activation_are_called():
    layer, seen = ConvNorm(8, 16, 3).eval(), []
    layer.activation.register_forward_hook(lambda module, inputs, output: seen.append(output))
    run(layer, torch.randn(1, 8, 9, 10), autocast=True)
    assert len(seen) == 1


def test_a_resnet_stage_leaves_its_input_as_it_is(autocast):
    config = resnet_config()
    stage = prepared(ResNetStage(config, 16, 16, 1, [1, 1, 1]), autocast)
    states = torch.randn(2, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    before = states.clone()
    found = run(stage, states, autocast=autocast)
    torch.testing.assert_close(found, run_plainly(stage, states, autocast=autocast), **CLOSE)
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
        assert packing._KEPT.get(layer) is None


def test_the_results_of_inference_mode_serve_without_it(reorders):
    layer, states = Linear(8, 16).eval().bfloat16(), torch.randn(5, 8).bfloat16()
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
        assert packing._KEPT.get(layer) is None


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


def test_moving_a_model_frees_what_is_kept():
    model = tiny_model().eval()
    run(model, torch.randn(1, 3, 64, 64), autocast=True)
    kept = [module for module in model.modules() if packing._KEPT.get(module) is not None]
    model.to(torch.float64)
    assert kept
    assert not any(packing._KEPT.get(module) for module in kept)


def test_offloaded_weights_are_not_kept(tmp_path):
    model = tiny_model(swin_config()).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = run_plainly(model, pixel_values, autocast=True)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    found = run(model, pixel_values, autocast=True)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, **CLOSE)
    assert not [module for module in model.modules() if packing._KEPT.get(module) is not None]


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


def test_a_residual_in_another_layout_is_added_too(autocast):
    layer = prepared(with_statistics(ConvNorm(8, 16, 1, activation=None)), autocast)
    states, residual = torch.randn(2, 8, 9, 10), torch.randn(2, 16, 9, 10).bfloat16()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        owned = residual.clone().contiguous(memory_format=layout)
        results.append(run(lambda states, owned=owned: layer(states, owned), states, autocast=autocast))
    torch.testing.assert_close(*results, **CLOSE)
    expected = (run_plainly(layer, states, autocast=autocast) + residual).relu()
    torch.testing.assert_close(results[0], expected, **CLOSE)


def test_a_bias_of_some_of_queries_keys_and_values_is_added(autocast):
    attention, windows = WindowSelfAttention(swin_config(), 8, 2), torch.randn(3, 16, 8)
    attention.key.bias = None
    torch.nn.init.normal_(attention.query.bias)
    attention = prepared(attention, autocast)
    found, expected = (
        way(lambda states: attention(states, None), windows, autocast=autocast) for way in (run, run_plainly)
    )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_training_frees_what_is_kept_and_copies_have_nothing_of_it():
    model = tiny_model().eval()
    names = set(model.state_dict())
    run(model, torch.randn(1, 3, 64, 64), autocast=True)
    kept = [module for module in model.modules() if packing._KEPT.get(module) is not None]
    assert kept
    assert set(model.state_dict()) == names
    torch.save(model, io.BytesIO())
    assert not any(packing._KEPT.get(module) for module in copy.deepcopy(model).modules())
    model.train()
    assert not any(packing._KEPT.get(module) for module in kept)


def test_what_is_kept_goes_with_its_module():
    layer = Linear(8, 16).eval().bfloat16()
    with torch.no_grad():
        layer(torch.randn(5, 8).bfloat16())
    count = len(packing._KEPT)
    del layer
    assert len(packing._KEPT) == count - 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_with_pixels_are_einsteins_sums(layout, autocast):
    embeddings, pixels = torch.randn(2, 3, 5, 8), torch.randn(3, 8, 6, 7).contiguous(memory_format=layout)
    found = run(products_with_pixels, embeddings, pixels, autocast=autocast)
    expected = torch.einsum("lbqc,bchw->lbqhw", embeddings, pixels)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=0.1)


@torch.no_grad()
def test_a_compiled_graph_of_products_serves_every_number_of_images_and_pixels(autocast):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(products_with_pixels, backend=counter, fullgraph=True, dynamic=True)
    for images, height in ((2, 8), (3, 7), (4, 9)):
        embeddings, pixels = torch.randn(3, images, 5, 12), torch.randn(images, 12, height, 13)
        expected = run(products_with_pixels, embeddings, pixels, autocast=autocast)
        torch.testing.assert_close(run(compiled, embeddings, pixels, autocast=autocast), expected, **CLOSE)
    assert counter.frame_count == 1
