"""What makes inference fast leaves its results as they are."""

import weakref
from functools import partial

import accelerate
import peft
import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    NUM_LABELS,
    NUM_QUERIES,
    Operations,
    convnext_config,
    resnet_config,
    swin_config,
    tiny_batch,
    tiny_model,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from transformers import ResNetConfig

from hf_maskformer import MaskFormerImageProcessor, modeling_maskformer_swin, modeling_maskformer_swin_windows
from hf_maskformer.modeling_maskformer import likely_queries
from hf_maskformer.modeling_maskformer_dispatch import HAS_ONEDNN_OPERATORS
from hf_maskformer.modeling_maskformer_pixel_decoder import FeaturePyramid, FeaturePyramidLayer
from hf_maskformer.modeling_maskformer_resnet import ConvNorm, ResNetBackbone, ResNetStage
from hf_maskformer.modeling_maskformer_swin import (
    SwinBackbone,
    SwinBlock,
    SwinStage,
    WindowSelfAttention,
    attend_in_windows,
)
from hf_maskformer.modeling_maskformer_swin_windows import CompiledWindowGrid, WindowGrid, _cached_grid

BACKBONES = [resnet_config, swin_config, convnext_config]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return ARCHITECTURES[request.param]().eval()


def test_all_queries_are_predicted_as_in_forward(model):
    pixel_values, pixel_mask = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96)
    pixel_mask[1, 40:] = 0
    with torch.no_grad():
        expected = model(pixel_values, pixel_mask=pixel_mask)
    found = model.predict(pixel_values, pixel_mask)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    assert found.image_sizes.tolist() == expected.image_sizes.tolist() == [[64, 96], [40, 96]]


def with_sure_queries(model):
    """Makes queries sure of a class (0 and 4), torn between two (1), or of no object, whatever the image is."""
    logits = torch.full((NUM_QUERIES, NUM_LABELS + 1), -6.0)
    for query, classes in enumerate(([1], [0, 2], [-1], [-1], [3], [-1])):
        logits[query, classes] = 6.0
    model.class_predictor.register_forward_hook(lambda module, inputs, output: logits.expand(output.shape))
    return model


@pytest.mark.parametrize(("task", "arguments"), [("panoptic", {}), ("instance", {"top_k": NUM_QUERIES})])
def test_post_processing_finds_the_same_segments_among_the_likely_queries(model, task, arguments):
    model, pixel_values = with_sure_queries(model), torch.randn(2, 3, 64, 96)
    post_process = getattr(MaskFormerImageProcessor(), f"post_process_{task}_segmentation")
    with torch.no_grad():
        all_queries = model(pixel_values)
    likely = model.predict(pixel_values, threshold=0.3)
    assert likely.class_queries_logits.shape[1] == 3 < NUM_QUERIES
    results = [post_process(outputs, threshold=0.3, **arguments) for outputs in (likely, all_queries)]
    for found, expected in zip(*results, strict=True):
        assert len(expected["segments_info"]) > 0
        assert [s["label_id"] for s in found["segments_info"]] == [s["label_id"] for s in expected["segments_info"]]
        # Pixels where two queries score alike to float32's precision may go either way.
        assert (found["segmentation"] != expected["segmentation"]).float().mean() < 0.001


def test_an_offloaded_model_predicts_the_same(model):
    pixel_values = torch.randn(1, 3, 64, 96)
    expected = model.predict(pixel_values).masks_queries_logits
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(offloaded.predict(pixel_values).masks_queries_logits, expected, **CLOSE)


def test_an_adapter_on_the_mask_projection_takes_part():
    model, pixel_values = tiny_model().eval(), torch.randn(1, 3, 64, 96)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["mask_projection"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted.eval()(pixel_values).masks_queries_logits
    found = adapted.get_base_model().predict(pixel_values).masks_queries_logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="Call eval"):
        tiny_model().train().predict(torch.randn(1, 3, 64, 96))


def test_hooks_on_a_norm_are_called():
    model, calls = tiny_model().eval(), []
    norm = model.model.pixel_level_module.encoder.embedder.embedder.normalization
    norm.register_forward_hook(lambda *arguments: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert calls == [1]


@torch.no_grad()
@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
def test_a_forward_in_the_place_of_a_modules_own_is_called(backbone):
    """Some tools wrap it on the module instead of adding a hook."""
    model, called = tiny_model(backbone()).eval(), set()
    layers = {each for each in model.modules() if isinstance(each, nn.Conv2d | nn.BatchNorm2d | nn.Linear)}
    for layer in layers:
        layer.forward = lambda *inputs, layer=layer, own=layer.forward: called.add(layer) or own(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    assert called == layers


@torch.no_grad()
def test_hooks_on_all_modules_are_called():
    model, called = tiny_model().eval(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        model(torch.randn(1, 3, 64, 64))
    finally:
        handle.remove()
    assert called >= {each for each in model.modules() if isinstance(each, nn.Conv2d | nn.BatchNorm2d)}


@torch.no_grad()
def test_a_pass_of_a_resnet_on_a_gpu_starts_no_more_operations_than_transformers():
    """The meta device stands for a GPU, where small operations may take longer to start than to run."""
    config, counts = resnet_config(), []
    for backbone in (ResNetBackbone(config), transformers.ResNetBackbone(config)):
        with Operations() as operations:
            backbone.eval().to("meta")(torch.empty(1, 3, 64, 64, device="meta"))
        counts.append(operations.count)
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_what_hooks_or_callers_keep_of_a_resnet_is_not_overwritten(layer_type):
    # Without a shortcut in the first layer, whose input is the stem's feature map.
    fields = {"layer_type": layer_type, "downsample_in_first_stage": False, "embedding_size": 16}
    names = ["stem", "stage1", "stage2", "stage3"]
    config = ResNetConfig(hidden_sizes=[16, 32, 32, 64], depths=[3, 2, 2, 1], out_features=names, **fields)
    backbone, pixel_values = ResNetBackbone(config).eval(), torch.randn(2, 3, 64, 96)
    expected, kept = backbone(pixel_values), []
    with torch.no_grad():
        for found, tensor in zip(backbone(pixel_values), expected, strict=True):
            torch.testing.assert_close(found, tensor, **CLOSE)
        layers = backbone.encoder.stages[0].layers
        inputs = torch.randn(2, 16, 16, 24)
        copy = inputs.clone()
        layers[1](inputs)
        assert torch.equal(inputs, copy)
        layers[1].layer[0].convolution.register_forward_pre_hook(lambda module, arguments: kept.extend(arguments))
        backbone(pixel_values)
    torch.testing.assert_close(kept[0], layers[0](expected[0]), **CLOSE)


@pytest.mark.skipif(not HAS_ONEDNN_OPERATORS, reason="here torch lacks what adds a convolution to a residual")
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_layer_takes_the_memory_of_a_residual_that_it_owns(layer_type):
    layer = ResNetStage(ResNetConfig(layer_type=layer_type), 16, 16, 1, [1]).layers[0].eval()
    inputs = torch.randn(2, 16, 16, 24).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(inputs)
        found = layer(inputs, owns_residual=True)
    assert found.data_ptr() == inputs.data_ptr()
    torch.testing.assert_close(found, expected, **CLOSE)


class Keeper(torch.nn.Module):
    """Stands in the place of a layer, as wrappers and adapters do, and keeps what it gives."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        output = self.module(*arguments)
        self.kept, self.copy = with_copy(output)
        return output


def with_copy(output):
    """What a module gives, or the last of several tensors, and a copy."""
    kept = output[-1] if isinstance(output, tuple) else output
    return kept, kept.clone()


class Parallel(torch.nn.Module):
    """Adds its input to what a module gives, as adapters beside a module do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, states, *arguments, **settings):
        return self.module(states, *arguments, **settings) + states


def test_layers_of_a_resnet_may_be_replaced():
    names = ["stage1", "stage2", "stage3"]
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[3, 3, 1], out_features=names)
    backbone, pixel_values = ResNetBackbone(config).eval(), torch.randn(1, 3, 64, 96)
    stage = backbone.encoder.stages[1]
    stage.layers[1] = torch.nn.Identity()
    expected = backbone(pixel_values)
    patched, kept = stage.layers[2].forward, []
    stage.layers[2].forward = lambda states, *arguments: (kept.append((states, states.clone())), patched(states))[1]
    stage.layers[0] = Keeper(stage.layers[0])
    backbone.encoder.stages[0].layers[1] = Keeper(backbone.encoder.stages[0].layers[1])
    last = backbone.encoder.stages[2].layers[0]
    last.shortcut = Keeper(last.shortcut)
    with torch.no_grad():
        for found, tensor in zip(backbone(pixel_values), expected, strict=True):
            torch.testing.assert_close(found, tensor, **CLOSE)
    keepers = [module for module in backbone.modules() if isinstance(module, Keeper)]
    for tensor, copy in [*kept, *((keeper.kept, keeper.copy) for keeper in keepers)]:
        assert torch.equal(tensor, copy)


@torch.no_grad()
@pytest.mark.parametrize(
    "place",
    [
        "embeddings",
        "embeddings.norm",
        "embeddings.dropout",
        "encoder.layers.0",
        "encoder.layers.0.blocks.0",
        "encoder.layers.0.downsample",
        "encoder.layers.0.downsample.reduction",
    ],
)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_others_keep_of_a_swin_is_not_overwritten(place, is_replaced):
    backbone, pixel_values = SwinBackbone(swin_config()).eval(), torch.randn(1, 3, 64, 96)
    expected, kept = backbone(pixel_values), []
    if is_replaced:
        keeper = Keeper(backbone.model.get_submodule(place))
        backbone.model.set_submodule(place, keeper)
    else:
        module = backbone.model.get_submodule(place)
        module.register_forward_hook(lambda module, inputs, output: kept.extend(with_copy(output)))
    for found, tensor in zip(backbone(pixel_values), expected, strict=True):
        torch.testing.assert_close(found, tensor, **CLOSE)
    assert torch.equal(*((keeper.kept, keeper.copy) if is_replaced else kept))


@pytest.mark.parametrize("place", ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"])
def test_what_stands_beside_a_block_of_a_swin_reads_its_input(place):
    backbone, pixel_values = SwinBackbone(swin_config()).eval(), torch.randn(1, 3, 64, 96)
    backbone.model.encoder.set_submodule(place, Parallel(backbone.model.encoder.get_submodule(place)))
    expected = backbone(pixel_values)
    with torch.no_grad():
        for found, tensor in zip(backbone(pixel_values), expected, strict=True):
            torch.testing.assert_close(found, tensor, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("place", ["embeddings", "encoder.layers.0.downsample", "encoder.layers.0.blocks.0"])
def test_what_is_replaced_in_a_swin_leaves_the_rest_in_place(monkeypatch, place):
    backbone, numbers = SwinBackbone(swin_config()).eval(), []
    attend_in_parts = SwinBlock._attend_in_parts
    monkeypatch.setattr(SwinBlock, "_attend_in_parts", lambda *inputs: numbers.append(1) or attend_in_parts(*inputs))
    backbone(torch.randn(1, 3, 64, 96))
    count = len(numbers)
    backbone.model.set_submodule(place, Keeper(backbone.model.get_submodule(place)))
    backbone(torch.randn(1, 3, 64, 96))
    assert len(numbers) - count == count - ("blocks" in place)


@torch.no_grad()
def test_a_swin_has_memory_for_one_map_of_states_in_each_stage(monkeypatch):
    backbone, pointers = SwinBackbone(swin_config()).eval(), []
    stage_forward = SwinStage.forward

    def record(stage, states, owns_states):
        output, next_states = stage_forward(stage, states, owns_states)
        pointers.append((states.data_ptr(), output.data_ptr()))
        return output, next_states

    monkeypatch.setattr(SwinStage, "forward", record)
    backbone(torch.randn(1, 3, 60, 96))
    assert len(pointers) == 4
    assert all(given == taken for given, taken in pointers)


def test_activations_of_a_resnet_have_the_names_of_checkpoints():
    fields = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "hidden_act": "prelu"}
    config = ResNetConfig(**fields, out_features=["stage1", "stage2"])
    assert set(ResNetBackbone(config).state_dict()) == set(transformers.ResNetBackbone(config).state_dict())


@torch.no_grad()
def test_a_map_of_the_backbone_is_free_once_the_pyramid_has_projected_it(monkeypatch):
    pyramid = FeaturePyramid([8, 12, 16, 20], 32).eval()
    features = [torch.randn(1, channels, 32 >> i, 32 >> i) for i, channels in enumerate([8, 12, 16, 20])]
    maps = [weakref.ref(values) for values in features]
    alive, alive_levels = [], []

    def forward(self, states):
        alive.append(sum(values() is not None for values in maps))
        alive_levels.append(sum(values() is not None for values in levels))
        return original(self, states)

    def layer_forward(self, coarse, lateral):
        inputs = [lateral, coarse]
        del coarse, lateral  # or this call would hold them
        level = original_of_layer(self, inputs.pop(), inputs.pop())
        levels.append(weakref.ref(level))
        return level

    original, original_of_layer, levels = torch.nn.GroupNorm.forward, FeaturePyramidLayer.forward, []
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", forward)
    monkeypatch.setattr(FeaturePyramidLayer, "forward", layer_forward)
    pyramid(features, with_levels=False)
    # One norm after the coarsest map, then two for each of the others: before a coarser level is added, and after it.
    assert alive == [4, 2, 2, 1, 1, 0, 0]
    assert alive_levels == [0, 0, 0, 1, 0, 1, 0]


@torch.no_grad()
def test_hooks_and_compilers_of_parts_of_the_pyramid_take_part():
    pyramid, calls, graphs = FeaturePyramid([8, 12, 16, 20], 32).eval(), [], []
    features = [torch.randn(1, channels, 32 >> i, 32 >> i) for i, channels in enumerate([8, 12, 16, 20])]
    expected = pyramid(list(features))
    for part in (pyramid.layers[0], pyramid.layers[0].proj, pyramid.layers[1].block):
        part.register_forward_hook(lambda module, inputs, output: calls.append(module))
    torch._dynamo.reset()
    for part in (pyramid.layers[1].proj, pyramid.layers[2]):
        part.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for found, level in zip(pyramid(list(features)), expected, strict=True):
        torch.testing.assert_close(found, level, **CLOSE)
    assert calls == [pyramid.layers[0].proj, pyramid.layers[0], pyramid.layers[1].block]
    assert len(graphs) == 2


def test_what_a_hook_keeps_of_the_pyramid_is_not_overwritten():
    layer = FeaturePyramidLayer(32, 16).eval()
    coarse, lateral, kept = torch.randn(2, 32, 5, 7), torch.randn(2, 16, 10, 14), []
    expected = layer(coarse, lateral)
    with torch.no_grad():
        torch.testing.assert_close(layer(coarse, lateral), expected, **CLOSE)
        layer.proj[1].register_forward_hook(lambda module, inputs, output: kept.extend((output, output.clone())))
        torch.testing.assert_close(layer(coarse, lateral), expected, **CLOSE)
        assert torch.equal(*kept)
        layer = FeaturePyramidLayer(32, 16).eval()
        found = torch.vmap(lambda image: layer(image[None], lateral[:1])[0])(coarse)
        torch.testing.assert_close(found, layer(coarse, lateral[:1].expand(2, -1, -1, -1)), **CLOSE)


def test_padding_is_left_out_of_predict_as_of_forward():
    model = tiny_model(mask_padding=True).eval()
    pixel_values, pixel_mask = torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96)
    pixel_mask[:, :, 40:] = 0
    with torch.no_grad():
        expected = model(pixel_values, pixel_mask=pixel_mask).masks_queries_logits
    torch.testing.assert_close(model.predict(pixel_values, pixel_mask).masks_queries_logits, expected, **CLOSE)


def test_the_likely_queries_are_in_their_order_and_as_many_as_the_image_with_most_has():
    def logits(*probabilities):
        return torch.tensor([[[p, 0.0, 1 - p] for p in image] for image in probabilities]).log()

    likely = likely_queries(logits([0.9, 0.1, 0.6, 0.2], [0.3, 0.1, 0.2, 0.8]), threshold=0.5)
    assert likely.tolist() == [[0, 2], [0, 3]]
    assert likely_queries(logits([0.1, 0.3], [0.2, 0.1]), threshold=0.5).tolist() == [[1], [0]]
    assert likely_queries(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), threshold=0.5).tolist() == [[0, 1]]


def test_functional_gradients_pass_through_the_windows():
    model, pixel_values = tiny_model(swin_config()).eval(), torch.randn(1, 3, 64, 64)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (pixel_values,)).masks_queries_logits.sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    name = "model.pixel_level_module.encoder.model.embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(gradients[name], parameters[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_training", [False, True])
def test_functional_gradients_of_pixels_pass_through_the_windows(is_training):
    model, pixel_values = tiny_model(swin_config()).train(is_training), torch.randn(1, 3, 64, 64)

    def loss(pixel_values):
        return model(pixel_values).masks_queries_logits.square().mean()

    found = torch.func.grad(loss)(pixel_values)
    loss(pixel_values.requires_grad_()).backward()
    torch.testing.assert_close(found, pixel_values.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_done_to_the_weights_is_the_norm(dtype):
    layer = ConvNorm(3, 8, 3, stride=2, dilation=2).eval()
    with torch.no_grad():
        for tensor in layer.normalization.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    layer.normalization.eps = 0.5
    layer, states = layer.to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    expected = layer.normalization(layer.convolution(states)).relu()
    assert torch.equal(layer(states), expected)  # with gradients it is not done to them
    with torch.no_grad():
        found = layer(states)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_with_and_without_gradient_agree(backbone):
    model, pixel_values = tiny_model(backbone()).eval(), torch.randn(1, 3, 64, 96)
    with_gradient = model(pixel_values).masks_queries_logits
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).masks_queries_logits, with_gradient, **CLOSE)


def test_a_block_in_parts_is_the_whole(monkeypatch):
    model, pixel_values = tiny_model(swin_config()).eval(), torch.randn(2, 3, 64, 96)
    whole = model(pixel_values).masks_queries_logits
    monkeypatch.setattr(modeling_maskformer_swin, "POSITIONS_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).masks_queries_logits, whole, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 12), (12, 4), (5, 9)])
def test_attention_is_never_asked_about_no_windows(height, width):
    config = swin_config()
    block = SwinBlock(config, 8, 2, shift=2, drop_path=0.0).eval()
    grids = tuple(WindowGrid((height, width), 4, shift, torch.device("cpu")) for shift in (0, 2))
    states, numbers = torch.randn(2, height, width, 8), []
    expected = block(states, grids)
    block.attention.register_forward_pre_hook(lambda module, inputs: numbers.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(block(states.clone(), grids, in_place=True), expected, **CLOSE)
    assert min(numbers) > 0
    assert sum(numbers) == 2 * grids[1].num_windows


@torch.no_grad()
def test_states_in_another_layout_pass_a_block_in_place():
    block = SwinBlock(swin_config(), 8, 2, shift=2, drop_path=0.0).eval()
    grids = tuple(WindowGrid((6, 7), 4, shift, torch.device("cpu")) for shift in (0, 2))
    states = torch.randn(2, 8, 6, 7).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(states.clone(), grids, in_place=True), block(states, grids), **CLOSE)


def test_scores_of_half_precision_meet_their_bias_in_float32(monkeypatch):
    attention, softmax, types = WindowSelfAttention(swin_config(), 8, 2).bfloat16(), torch.Tensor.softmax, []
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, *_: types.append(scores.dtype) or softmax(scores, *_))
    attention(torch.randn(3, 16, 8).bfloat16(), None)
    assert types == [torch.float32]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("scores_at_once", [1, 5 * 2 * 16**2, 2**19])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, CLOSE), (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2})]
)
def test_attention_in_parts_is_that_in_each_window(monkeypatch, dtype, tolerance, scores_at_once, shift):
    monkeypatch.setattr(modeling_maskformer_swin, "SCORES_AT_ONCE", scores_at_once)
    grid = WindowGrid((12, 16), 4, shift, torch.device("cpu"))
    query, key, value = torch.randn(3, 2 * grid.num_windows, 2, 16, 8).to(dtype)
    bias = torch.randn(1, 2, 16, 16)
    attention_mask = torch.zeros(grid.num_windows, 16, 16) if grid.attention_mask is None else grid.attention_mask
    added = bias + attention_mask[:, None].repeat(2, 1, 1, 1)
    expected = scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=added)
    found = attend_in_windows(query, key, value, bias, grid.attention_mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.transpose(1, 2).flatten(2), **tolerance)
    operator = torch.ops.hf_maskformer.attend_in_windows.default
    torch.library.opcheck(operator, (query, key, value, bias, grid.attention_mask))


@torch.no_grad()
def test_compiled_attention_serves_any_number_of_windows():
    attention, counter = WindowSelfAttention(swin_config(), 8, 2).eval(), CompileCounter()
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    for size in ((9, 13), (17, 6)):
        grid = WindowGrid(size, 4, 2, torch.device("cpu"))
        windows = torch.randn(2 * grid.num_windows, 16, 8)
        torch.testing.assert_close(
            compiled(windows, grid.attention_mask), attention(windows, grid.attention_mask), **CLOSE
        )
    assert counter.frame_count == 1


def test_gradients_of_attention_in_bfloat16_are_near_those_in_float32():
    attention = WindowSelfAttention(swin_config(), 8, 2).bfloat16()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    # The bias of the keys has none: it changes all scores of a query alike.
    parameters = [parameter for name, parameter in attention.named_parameters() if name != "key.bias"]
    windows, gradients = torch.randn(64, 16, 8).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        output = attention.to(dtype)(windows.to(dtype), None)
        gradients.append(torch.autograd.grad(output.float().square().sum(), parameters))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_attention_drops_all_that_it_is_told_to_in_training(with_gradient, is_frozen):
    config = swin_config()
    config.attention_probs_dropout_prob = 1.0
    attention, windows = WindowSelfAttention(config, 8, 2).requires_grad_(not is_frozen), torch.randn(3, 16, 8)
    with torch.set_grad_enabled(with_gradient):
        assert not attention.train()(windows, None).any()
        assert attention.eval()(windows, None).all()


def test_a_swin_takes_no_images_and_any_norm():
    backbone = SwinBackbone(swin_config()).eval()
    with torch.no_grad():
        assert [len(feature_map) for feature_map in backbone(torch.randn(0, 3, 64, 64))] == [0, 0, 0, 0]
        backbone.model.encoder.layers[0].blocks[0].layernorm_before = torch.nn.Identity()
        backbone(torch.randn(1, 3, 64, 64))


@torch.no_grad()
def test_derivatives_by_dual_numbers_are_those_of_the_function():
    # torch's fused attention has none on a CPU.
    model, pixel_values = tiny_model(attn_implementation="eager").eval(), torch.randn(1, 3, 64, 64)
    direction = torch.randn_like(pixel_values)
    expected = torch.func.jvp(lambda images: model(images).masks_queries_logits, (pixel_values,), (direction,))[1]
    with forward_ad.dual_level():
        logits = model(forward_ad.make_dual(pixel_values, direction)).masks_queries_logits
        torch.testing.assert_close(forward_ad.unpack_dual(logits).tangent, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_feature_map_is_kept_until_it_is_used_or_as_long_as_it_is_wanted(monkeypatch, backbone, wanted):
    model, kept = tiny_model(backbone()).eval(), []
    module, references = model.model.pixel_level_module, []
    maps_of, level_of = module.encoder.forward, FeaturePyramidLayer.forward

    def record(images):
        output = maps_of(images)
        references.extend(weakref.ref(each) for each in (images, *getattr(output, "feature_maps", output)))
        return output

    def record_level(layer, coarse, lateral):
        level = level_of(layer, coarse, lateral)
        references.append(weakref.ref(level))
        return level

    module.encoder.forward = record
    monkeypatch.setattr(FeaturePyramidLayer, "forward", record_level)
    module.decoder.mask_projection.register_forward_pre_hook(
        lambda *arguments: kept.extend(reference() is not None for reference in references)
    )
    outputs = model(torch.randn(1, 3, 64, 96), output_hidden_states=wanted)
    # The image as the backbone saw it, its maps, and the levels of the pyramid.
    assert kept == [False] + [wanted] * 3 + [True] + [wanted] * 2 + [True]
    assert len(outputs.encoder_hidden_states or ()) == (4 if wanted else 0)
    assert len(outputs.pixel_decoder_hidden_states or ()) == (3 if wanted else 0)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (3, 2)])
@pytest.mark.parametrize("kind", [WindowGrid, CompiledWindowGrid])
def test_windows_are_the_map_shifted_and_cut_and_come_back(kind, size, shift):
    grid = kind(size, window_size=4, shift=shift, device=torch.device("cpu"))
    if shift:
        assert torch.equal(grid.attention_mask, WindowGrid(size, 4, shift, torch.device("cpu")).attention_mask)
    states = torch.randn(2, *size, 3, requires_grad=True)
    windows = grid.to_windows(states)
    padded = torch.nn.functional.pad(states, (0, 0, 0, -size[1] % 4, 0, -size[0] % 4)).roll((-shift, -shift), (1, 2))
    first_window, last_window = padded[0, :4, :4].flatten(0, 1), padded[1, -4:, -4:].flatten(0, 1)
    assert torch.equal(windows[0], first_window)
    assert torch.equal(windows[-1], last_window)
    back = grid.to_map(windows)
    assert torch.equal(back, states)
    weight = torch.randn_like(back)
    (back * weight).sum().backward()
    assert torch.equal(states.grad, weight)


@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_the_operators_of_windows_are_what_torch_asks_of_operators(size):
    operators, shift = torch.ops.hf_maskformer, 2
    states = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    windows = torch.randn_like(operators.to_windows(states, 4, shift), requires_grad=True)
    torch.library.opcheck(operators.to_windows.default, (states, 4, shift))
    torch.library.opcheck(operators.to_map.default, (windows, *size, 4, shift))
    torch.library.opcheck(operators.window_attention_mask.default, (*size, 4, shift, torch.device("cpu")))
    torch.autograd.gradcheck(lambda states: operators.to_windows(states, 4, shift), states)
    torch.autograd.gradcheck(lambda windows: operators.to_map(windows, *size, 4, shift), windows)
    torch.autograd.gradgradcheck(lambda states: operators.to_windows(states, 4, shift) ** 2, states)


def test_a_compiled_graph_may_overwrite_its_attention_mask():
    mask_of, arguments = torch.ops.hf_maskformer.window_attention_mask, (8, 12, 4, 2, torch.device("cpu"))
    expected = mask_of(*arguments).clone()
    mask_of(*arguments).zero_()
    assert torch.equal(mask_of(*arguments), expected)


def test_half_precision_trains_on_a_cpu_with_narrow_convolutions():
    """In the layout of inference, some of torch's bfloat16 convolutions corrupt memory in their backward pass."""
    model, batch = tiny_model(freeze_batch_norm=False).train(), tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_windows_that_are_cut_while_another_thread_compiles_are_the_same(monkeypatch):
    """torch says in all threads that something is compiled; it may say otherwise when attention begins."""
    model, pixel_values = tiny_model(swin_config()).eval(), torch.randn(1, 3, 224, 288)
    expected = model(pixel_values).masks_queries_logits
    monkeypatch.setattr(modeling_maskformer_swin, "window_grid", partial(WindowGrid, in_graph=True))
    torch.testing.assert_close(model(pixel_values).masks_queries_logits, expected, **CLOSE)


def test_windows_are_cut_once_for_a_size_and_serve_every_kind_of_pass():
    _cached_grid.cache_clear()
    model, pixel_values = tiny_model(swin_config()).eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(pixel_values).masks_queries_logits
    made = _cached_grid.cache_info().misses
    found = model(pixel_values).masks_queries_logits
    found.sum().backward()
    assert _cached_grid.cache_info().misses == made > 0
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 8), (6, 7), (5, 7)])
def test_a_level_of_the_pyramid_is_the_same_without_gradient_at_odd_sizes(height, width):
    layer, coarse, lateral = FeaturePyramidLayer(32, 8), torch.randn(2, 32, 3, 4), torch.randn(2, 8, height, width)
    expected = layer(coarse, lateral)
    with torch.no_grad():
        torch.testing.assert_close(layer(coarse, lateral), expected, **CLOSE)


def test_windows_of_a_run_without_values_do_not_serve_others():
    backbone, pixel_values = SwinBackbone(swin_config()).eval(), torch.randn(1, 3, 44, 52)
    expected = backbone(pixel_values)[-1]
    _cached_grid.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        backbone(mode.from_tensor(pixel_values))
    found = backbone(pixel_values)[-1]
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_windows_of_large_maps_are_not_kept(monkeypatch):
    """Their attention masks would take gigabytes."""
    monkeypatch.setattr(modeling_maskformer_swin_windows, "MAX_CACHED_PAIRS", 8 * 8 * 4**2)
    backbone = SwinBackbone(swin_config()).eval()
    _cached_grid.cache_clear()
    backbone(torch.randn(1, 3, 32, 32))  # the first map is 8 x 8
    made = _cached_grid.cache_info().misses
    backbone(torch.randn(1, 3, 36, 32))  # the first is 9 x 8, which is not kept, the others 5 x 4, 3 x 2 and 2 x 1
    assert made == 8  # of four stages with and without shift
    assert _cached_grid.cache_info().misses == made + 6


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_hook_on_the_mask_projection_sees_the_same_in_predict(backbone):
    model, pixel_values, shapes = tiny_model(backbone()).eval(), torch.randn(2, 3, 64, 96), []

    def change(module, inputs, output):
        shapes.append(output.shape)
        return output + 1.0

    model.model.pixel_level_module.decoder.mask_projection.register_forward_hook(change)
    expected, found = model(pixel_values), model.predict(pixel_values)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, **CLOSE)
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


def test_a_hook_inside_a_swin_sees_whole_maps_and_keeps_what_it_saw(monkeypatch):
    monkeypatch.setattr(modeling_maskformer_swin, "POSITIONS_AT_ONCE", 7)
    model, pixel_values, seen = tiny_model(swin_config()).eval(), torch.randn(1, 3, 64, 96), []
    block = model.model.pixel_level_module.encoder.model.encoder.layers[0].blocks[1]
    for module in (block.attention, block.layernorm_after):
        module.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    model(pixel_values)
    with torch.no_grad():
        model(pixel_values)
    assert len(seen) == 8
    for expected, found in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("has_gradients", [False, True])
def test_images_are_mapped_by_vmap(backbone, has_gradients):
    model, pixel_values = tiny_model(backbone()).eval(), torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(has_gradients):
        expected = model(pixel_values).masks_queries_logits
        found = torch.func.vmap(lambda image: model(image[None]).masks_queries_logits[0])(pixel_values)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_every_parameter_has_its_part_in_predict_as_in_forward(name):
    """At construction biases are 0: what leaves them out would be seen by trained models only."""
    model, pixel_values = ARCHITECTURES[name]().eval(), torch.randn(2, 3, 64, 96)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    expected, found = model(pixel_values), model.predict(pixel_values)
    for field in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-4)
