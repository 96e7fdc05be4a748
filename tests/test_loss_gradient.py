"""Matching first and differentiating later, chunk by chunk, changes no number: against the plain formulation."""

import pytest
import torch
import torch.nn.functional as F
from models import (
    NUM_LABELS,
    NUM_QUERIES,
    as_mask_list,
    resnet_config,
    swin_config,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_maskformer import MaskFormerLoss
from hf_maskformer.loss_maskformer_logits import matched_mask_logits
from hf_maskformer.loss_maskformer_masks import (
    BilinearUpsampling,
    MasksOfSegment,
    dense_mask_losses,
    plain_mask_losses,
)
from hf_maskformer.loss_maskformer_points import Points, PointSampling, sampled_mask_losses
from hf_maskformer.loss_maskformer_targets import are_owned, prepare_targets
from hf_maskformer.modeling_maskformer_pixel_decoder import MaskProjection

pytestmark = pytest.mark.usefixtures("way")

TOLERANCE = 1e-5  # relative L2 per tensor
FLOOR = 1e-6  # of the total norm: some true gradients are zero


def plain_loss(criterion, class_logits, mask_logits, mask_labels, class_labels, void_counts=True) -> Tensor:
    """The loss by its definition: all masks with gradient, enlarged by the library, one layer and image at a time."""
    targets = prepare_targets(mask_labels, class_labels, class_logits.shape[1])
    matches, _ = criterion.match(class_logits.detach(), mask_logits.detach(), targets)
    num_masks = max(sum(int((labels != -100).sum()) for labels in class_labels), 1)
    weights = torch.tensor([1.0] * criterion.num_labels + [criterion.no_object_weight])
    total = torch.zeros(())
    for layer, layer_matches in enumerate(matches):
        classes = torch.full(class_logits.shape[1:3], criterion.num_labels)
        for image, (queries, segments) in enumerate(layer_matches):
            classes[image, queries] = class_labels[image][segments]
            masks = mask_labels[image]
            if masks.dim() == 2:
                masks = masks == torch.arange(masks.max() + 1)[:, None, None]
            counted = (masks > 0).any(0).flatten().expand(len(queries), -1) if not void_counts else None
            if queries:
                logits = F.interpolate(mask_logits[layer, image, queries][None], size=masks.shape[1:], mode="bilinear")
                focal, dice = plain_mask_losses(logits[0].flatten(1), masks[segments].flatten(1) > 0, counted)
                total = total + (20 * focal.sum() + dice.sum()) / num_masks
        total = total + F.cross_entropy(class_logits[layer].transpose(1, 2), classes, weights)
    return total


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    floor = FLOOR * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm() + floor, name


def overlapping(batch):
    batch = as_mask_list(batch)
    batch["mask_labels"][0][1, :, :40] = 1.0
    return batch


@pytest.mark.parametrize("form", [dict, as_mask_list])
def test_segments_without_a_query_count_in_the_number_of_masks(form):
    """As in the paper's code, which divides by the number of all segments; classes by the weights of the queries."""
    class_logits = torch.randn(2, 2, 3, NUM_LABELS + 1, requires_grad=True)
    mask_logits = torch.randn(2, 2, 3, 16, 24, requires_grad=True)
    index_map = torch.arange(16 * 24).view(1, 16, 24).repeat(2, 1, 1) % 10
    labels = {"mask_labels": index_map, "class_labels": torch.randint(NUM_LABELS, (2, 10))}
    batch = form({"pixel_values": None, **labels})
    loss, targets = MaskFormerLoss(NUM_LABELS), (batch["mask_labels"], batch["class_labels"])
    found = loss(class_logits, mask_logits, *targets)[0]
    expected = plain_loss(loss, class_logits, mask_logits, *targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    logits = {"classes": class_logits, "masks": mask_logits}
    gradients = (torch.autograd.grad(total, list(logits.values())) for total in (found, expected))
    assert_same_gradients(*(dict(zip(logits, each, strict=True)) for each in gradients))


@pytest.mark.parametrize("form", [dict, as_mask_list, overlapping])
@pytest.mark.parametrize("backbone", [resnet_config, swin_config])
@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
def test_every_parameter_has_the_gradient_of_the_plain_formulation(backbone, form, void_in_loss):
    model = tiny_model(backbone(), void_in_loss=void_in_loss).train()
    batch = form(tiny_batch())
    labels = batch["mask_labels"], batch["class_labels"]

    outputs = model(batch["pixel_values"], output_auxiliary_logits=True)
    layers = [*outputs.auxiliary_logits, outputs]
    class_logits, mask_logits = (
        torch.stack([layer[f"{kind}_queries_logits"] for layer in layers]) for kind in ("class", "masks")
    )
    expected_loss = plain_loss(model.criterion, class_logits, mask_logits, *labels, void_in_loss == "background")
    expected_loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


@pytest.mark.parametrize(
    ("low_size", "size"), [((8, 16), (32, 64)), ((7, 5), (27, 18)), ((25, 42), (99, 167)), ((6, 6), (6, 6))]
)
def test_enlargement_is_the_librarys_bilinear_one_and_has_its_transpose(low_size, size):
    maps = torch.randn(3, *low_size, requires_grad=True)
    expected = F.interpolate(maps[None], size=size, mode="bilinear")[0]
    upsampling, upstream = BilinearUpsampling(low_size, size, maps.device), torch.randn(3, *size)
    assert torch.allclose(upsampling(maps), expected, atol=1e-5)
    expected.backward(upstream)
    assert torch.allclose(upsampling.transposed(upstream), maps.grad, atol=1e-5)


def test_an_odd_size_costs_what_an_even_one_does():
    work = []
    for low_size, size in [((100, 167), (399, 667)), ((104, 168), (416, 672))]:
        with FlopCounterMode(display=False) as counter:
            upsampling = BilinearUpsampling(low_size, size, torch.device("cpu"))
            upsampling.transposed(upsampling(torch.randn(1, *low_size)))
        work.append(counter.get_total_flops())
    assert work[0] <= work[1]


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])  # probabilities near 1/2, confident ones, saturated ones
@pytest.mark.parametrize("left_out", [None, torch.arange(50, 90)])
def test_dense_losses_of_a_chunk_are_the_plain_ones(scale, left_out):
    logits = (scale * torch.randn(4, 8, 8)).requires_grad_()
    inside = [torch.arange(5), torch.arange(100, 400)]
    groups = [MasksOfSegment(slice(0, 3), inside[0], left_out), MasksOfSegment(slice(3, 4), inside[1], left_out)]
    focal, dice, found = dense_mask_losses(logits, groups, (32, 32), 20.0, 1.0)

    masks = torch.zeros(4, 32 * 32, dtype=torch.bool)
    for group in groups:
        masks[group.rows, group.inside] = True
    counted = torch.ones_like(masks)
    if left_out is not None:
        counted[:, left_out] = False
    pixels = F.interpolate(logits[None], size=(32, 32), mode="bilinear")[0].flatten(1)
    expected_focal, expected_dice = plain_mask_losses(pixels.double(), masks, counted)
    (20 * expected_focal.sum() + expected_dice.sum()).backward()
    assert torch.allclose(focal.double(), expected_focal, rtol=1e-5)
    assert torch.allclose(dice.double(), expected_dice, rtol=1e-5, atol=1e-6)
    assert_same_gradients({"logits": found}, {"logits": logits.grad})


@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
def test_embeddings_and_logits_give_the_same_loss_and_gradient(void_in_loss):
    loss, batch = MaskFormerLoss(NUM_LABELS, void_in_loss=void_in_loss), tiny_batch(size=(16, 24))
    class_logits = torch.randn(2, 2, NUM_QUERIES, NUM_LABELS + 1)
    embeddings = [torch.randn(2, 2, NUM_QUERIES, 8, requires_grad=True), torch.randn(2, 8, 4, 6, requires_grad=True)]
    logits = torch.einsum("lbqc,bchw->lbqhw", *embeddings)
    labels = batch["mask_labels"], batch["class_labels"]
    from_logits = loss(class_logits, logits, *labels)[0]
    expected = torch.autograd.grad(from_logits, embeddings)
    from_embeddings = loss(class_logits, logits.detach(), *labels, embeddings=embeddings)[0]
    found = torch.autograd.grad(from_embeddings, embeddings)
    assert from_embeddings.item() == pytest.approx(from_logits.item(), rel=1e-6)
    assert_same_gradients(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0]])
@pytest.mark.parametrize("frozen", [None, "mask_embeddings", "level", "weight", "bias"])
def test_mask_logits_have_the_same_gradient_around_the_pixel_embeddings(counts, frozen):
    projection = MaskProjection(5, 8, kernel_size=3, padding=1).double()
    leaves = {
        "mask_embeddings": torch.randn(sum(counts), 8).double(),
        "level": torch.randn(3, 5, 7, 6).double(),
        **dict(projection.named_parameters()),
    }
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    learning = [leaf for leaf in leaves.values() if leaf.requires_grad]
    upstream = torch.randn(sum(counts), 7, 6).double()
    results = []
    for goes_around in (True, False):
        pixel_embeddings = projection(leaves["level"])
        pixel_embeddings = pixel_embeddings if goes_around else pixel_embeddings.view_as(pixel_embeddings)
        logits = matched_mask_logits(leaves["mask_embeddings"], pixel_embeddings, counts)
        assert (type(logits.grad_fn).__name__ == "FoldedMaskLogitsBackward") == goes_around
        results.append([logits, *torch.autograd.grad(logits, learning, upstream)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "goes_around"), [(4, True), (5, False)])
def test_many_masks_send_their_gradient_through_the_pixel_embeddings(count, goes_around):
    pixel_embeddings = MaskProjection(5, 8, kernel_size=3, padding=1)(torch.randn(1, 5, 7, 6))
    logits = matched_mask_logits(torch.randn(count, 8), pixel_embeddings, [count])
    assert (type(logits.grad_fn).__name__ == "FoldedMaskLogitsBackward") == goes_around


def test_autocast_rounds_mask_logits_and_their_gradient_once():
    projection = MaskProjection(8, 16, kernel_size=3, padding=1)
    mask_embeddings, level = torch.randn(4, 16, requires_grad=True), torch.randn(1, 8, 9, 9, requires_grad=True)
    leaves, upstream = [mask_embeddings, level, *projection.parameters()], torch.randn(4, 9, 9)
    plain = torch.einsum("mc,bchw->mhw", mask_embeddings, projection(level))
    expected = torch.autograd.grad(plain, leaves, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        logits = matched_mask_logits(mask_embeddings, projection(level), [4])
    assert logits.dtype == torch.bfloat16
    for found, of_plain in zip(torch.autograd.grad(logits, leaves, upstream.bfloat16()), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - of_plain).norm() < 0.01 * of_plain.norm()


class BackwardWork(TorchDispatchMode):
    """Counts the products in the backward pass of convolutions, once for the two gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            gradient, _, weight, *_ = args
            self.num_products += gradient.numel() * weight[0].numel()
        return function(*args, **(kwargs or {}))


def gradients_and_work(model, batch) -> tuple[dict[str, Tensor], int]:
    model.zero_grad()
    loss = model(**batch).loss
    with BackwardWork() as work:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, work.num_products


def test_a_hook_on_the_projection_sees_its_gradient():
    batch, seen, model = tiny_batch(), [], tiny_model(mask_feature_size=32).train()
    around, less_work = gradients_and_work(model, batch)
    projection = model.model.pixel_level_module.decoder.mask_projection
    projection.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    through, work = gradients_and_work(model, batch)
    assert seen == [(2, 32, 16, 24)]
    assert less_work < work
    assert_same_gradients(around, through)


def test_the_gradient_of_pixel_embeddings_may_be_retained_in_the_model():
    batch, model = tiny_batch(), tiny_model(mask_feature_size=32).train()
    kept, seen = [], []
    projection = model.model.pixel_level_module.decoder.mask_projection

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    hook = projection.register_forward_hook(keep)
    model(**batch).loss.backward()
    hook.remove()
    projection.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    model(**batch).loss.backward()
    torch.testing.assert_close(kept[0].grad, seen[0])


@pytest.mark.parametrize("change", [Tensor.tanh, Tensor.tanh_], ids=["replaced", "in place"])
def test_what_changes_the_pixel_embeddings_has_its_part_in_the_gradient(change):
    """A hook of the pixel decoder; the loss by its definition takes what comes out."""
    model, batch = tiny_model(mask_feature_size=32).train(), as_mask_list(tiny_batch())
    decoder = model.model.pixel_level_module.decoder
    decoder.register_forward_hook(
        lambda module, inputs, output: output._replace(pixel_embeddings=change(output.pixel_embeddings))
    )
    found, _ = gradients_and_work(model, batch)
    model.zero_grad()
    outputs = model(batch["pixel_values"], output_auxiliary_logits=True)
    layers = [*outputs.auxiliary_logits, outputs]
    logits = [torch.stack([layer[f"{kind}_queries_logits"] for layer in layers]) for kind in ("class", "masks")]
    plain_loss(model.criterion, *logits, batch["mask_labels"], batch["class_labels"]).backward()
    assert_same_gradients(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_outputs_of_training_are_saved_as_tensors_alone(tmp_path):
    pixel_embeddings = tiny_model().train()(tiny_batch()["pixel_values"]).pixel_decoder_last_hidden_state
    assert pixel_embeddings.requires_grad
    torch.save(pixel_embeddings, tmp_path / "saved.pt")
    assert torch.equal(torch.load(tmp_path / "saved.pt", weights_only=True), pixel_embeddings)


def test_a_hook_on_the_pixel_embeddings_is_called():
    """So does sharding, which gathers weights for the backward pass when the gradient of an output is there."""
    model, seen = tiny_model(mask_feature_size=32).train(), []
    decoder = model.model.pixel_level_module.decoder
    decoder.register_forward_hook(lambda module, inputs, output: output[0].register_hook(seen.append) and None)
    model(**tiny_batch()).loss.backward()
    assert len(seen) == 1


def test_without_logits_they_are_made_from_the_embeddings():
    """Also at the pixels that were drawn: 10 of 24 for matching."""
    batch, (class_logits, _) = tiny_batch(size=(16, 24)), (torch.randn(2, 2, NUM_QUERIES, NUM_LABELS + 1), None)
    embeddings = torch.randn(2, 2, NUM_QUERIES, 8), torch.randn(2, 8, 4, 6)
    logits = torch.einsum("lbqc,bchw->lbqhw", *embeddings)
    labels = batch["mask_labels"], batch["class_labels"]
    for points in (None, 10):
        loss, found = MaskFormerLoss(NUM_LABELS, train_num_points=points), []
        for given in (logits, None):
            torch.manual_seed(0)
            found.append(loss(class_logits, given, *labels, embeddings=embeddings)[0].item())
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(ValueError, match="Give masks_queries_logits, or the embeddings"):
        loss(class_logits, None, *labels)


def test_a_compiled_model_has_the_same_loss_and_gradient():
    """Traced by the compiler, but run op by op: what is tested is that the criterion does not stop it."""
    model, batch = tiny_model().train(), tiny_batch()
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = torch.compile(model, backend="eager")(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, gradients)


@pytest.mark.parametrize("points", [None, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_pure", [True, False])
def test_half_precision_is_finite_on_full_masks_of_1024_pixels(dtype, is_pure, points):
    model = tiny_model(train_num_points=points).train()
    pixel_values = torch.randn(1, 3, 1024, 1024)
    labels = torch.zeros(1, 1024, 1024, dtype=torch.int64), torch.tensor([[1]])
    if is_pure:
        loss = model.to(dtype)(pixel_values.to(dtype), *labels).loss
    else:
        with torch.autocast("cpu", dtype):
            loss = model(pixel_values, *labels).loss
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_nothing_of_the_size_of_all_masks_is_kept_for_the_backward_pass():
    num_layers, num_queries = 3, 20
    embeddings = torch.randn(num_layers, 2, num_queries, 8, requires_grad=True), torch.randn(2, 8, 16, 16)
    logits = torch.einsum("lbqc,bchw->lbqhw", embeddings[0].detach(), embeddings[1])
    batch, sizes = tiny_batch(size=(64, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        MaskFormerLoss(NUM_LABELS)(
            torch.randn(num_layers, 2, num_queries, NUM_LABELS + 1, requires_grad=True),
            logits,
            batch["mask_labels"],
            batch["class_labels"],
            embeddings=embeddings,
        )
    num_matched = num_layers * 4
    assert max(sizes) <= num_matched * 16 * 16  # of the 120 masks, at a quarter of the resolution


def test_fixed_matching_gives_query_i_to_class_i():
    loss, batch = MaskFormerLoss(NUM_LABELS, matching="fixed"), tiny_batch(size=(16, 24))
    targets = prepare_targets(batch["mask_labels"], batch["class_labels"], 2)
    logits = torch.randn(2, 2, NUM_LABELS, NUM_LABELS + 1), torch.randn(2, 2, NUM_LABELS, 4, 6)
    assert loss.match(*logits, targets)[0] == [[([0, 2], [0, 1]), ([3, 1], [0, 1])]] * 2
    assert loss(*logits, batch["mask_labels"], batch["class_labels"])[0].isfinite()
    with pytest.raises(ValueError, match=r"Image 1 has several segments of the classes \[3\]"):
        loss(*logits, batch["mask_labels"], torch.tensor([[0, 2], [3, 3]]))


def test_fixed_matching_needs_as_many_queries_as_classes():
    assert NUM_QUERIES != NUM_LABELS
    with pytest.raises(ValueError, match=f"num_queries is {NUM_QUERIES} and there are {NUM_LABELS} labels"):
        tiny_config(matching="fixed")
    names = {label: str(label) for label in range(NUM_QUERIES)}
    assert tiny_config(matching="fixed", id2label=names).matching == "fixed"


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize(("points", "ratio"), [(None, 0.0), (96, 0.0), (96, 0.75)])
def test_what_void_pixels_predict_does_not_matter_if_they_are_ignored(form, points, ratio):
    batch = form(tiny_batch(batch_size=1, size=(16, 16)))
    labels = batch["mask_labels"], batch["class_labels"]
    owned = tiny_batch(batch_size=1, size=(16, 16))["mask_labels"] >= 0
    # Points between void and segment mix the logits of both, so only void that has no such neighbour is changed.
    void = F.max_pool2d(owned.float(), 3, stride=1, padding=1)[0] == 0
    class_logits, mask_logits = torch.randn(1, 1, 3, NUM_LABELS + 1), torch.randn(1, 1, 3, 16, 16)
    changed = mask_logits.masked_fill(void, 7.0)
    for void_in_loss, is_same in (("ignore", True), ("background", False)):
        results = []
        for logits in (mask_logits, changed):
            torch.manual_seed(0)
            loss = MaskFormerLoss(
                NUM_LABELS, void_in_loss=void_in_loss, train_num_points=points, importance_sample_ratio=ratio
            )
            results.append(loss(class_logits, logits, *labels)[0].item())
        assert (results[0] == pytest.approx(results[1], rel=1e-6)) == is_same


@pytest.mark.parametrize("low_size", [(8, 16), (7, 5), (1, 3)])
def test_points_are_interpolated_as_by_the_library_and_have_its_gradient(low_size):
    maps, positions = torch.randn(3, *low_size, requires_grad=True), torch.rand(2, 200)
    positions[:, :4] = torch.tensor([[0.0, 0.0, 0.999, 0.999], [0.0, 0.999, 0.0, 0.999]])  # beyond the outer pixels
    grid = 2 * positions.flip(0).T[None, None] - 1
    expected = F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)[0, :, 0]
    points, upstream = Points(positions, low_size), torch.randn(3, 200)
    assert torch.allclose(points(maps.detach()), expected, atol=1e-5)
    expected.backward(upstream)
    assert torch.allclose(points.transposed(upstream), maps.grad, atol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
@pytest.mark.parametrize("form", [dict, overlapping])
def test_sampled_losses_and_their_gradient_are_the_plain_ones_on_the_same_points(form, void_in_loss, scale):
    batch, ignores_void = form(tiny_batch(size=(32, 64))), void_in_loss == "ignore"
    targets = prepare_targets(batch["mask_labels"], batch["class_labels"], 2)
    counts, segments = [3, 2], torch.tensor([0, 1, 1, 0, 1])
    logits, sampling = (scale * torch.randn(5, 8, 16)).requires_grad_(), PointSampling(40)
    torch.manual_seed(0)
    *found, gradient = sampled_mask_losses(logits, sampling, counts, segments, targets, ignores_void, 20.0, 1.0)

    torch.manual_seed(0)
    expected, start = [], 0
    for count, masks in zip(counts, targets.masks, strict=True):
        positions = torch.rand(2, 130)  # 120 to choose 30 from, and 10 more
        grid = 2 * positions.flip(0).T[None, None] - 1
        rows = slice(start, start := start + count)
        at_points = F.grid_sample(logits[rows][None], grid, padding_mode="border", align_corners=False)[0, :, 0]
        y, x = (positions * torch.tensor([[32.0], [64.0]])).long()
        if masks.dim() == 2:
            masks = masks == torch.arange(2)[:, None, None]
        certainty = at_points.abs()
        if ignores_void:
            certainty[:, ~are_owned(masks)[y, x]] = torch.inf
        chosen = torch.cat((certainty[:, :120].sort(1).indices[:, :30], torch.arange(120, 130).repeat(count, 1)), 1)
        inside = masks[segments[rows]][:, y, x].gather(1, chosen)
        counted = are_owned(masks)[y, x][chosen] if ignores_void else None
        expected.append(plain_mask_losses(at_points.gather(1, chosen).double(), inside, counted))
    focal, dice = (torch.cat(losses) for losses in zip(*expected, strict=True))
    (20 * focal.sum() + dice.sum()).backward()
    assert torch.allclose(found[0].double(), focal, rtol=1e-5)
    assert torch.allclose(found[1].double(), dice, rtol=1e-5, atol=1e-6)
    assert_same_gradients({"logits": gradient}, {"logits": logits.grad})


def test_sampled_losses_are_those_of_all_pixels_on_average():
    batch = tiny_batch(size=(32, 48))
    logits = torch.randn(1, 2, NUM_QUERIES, NUM_LABELS + 1), torch.randn(1, 2, NUM_QUERIES, 8, 12)
    labels = batch["mask_labels"], batch["class_labels"]
    expected = MaskFormerLoss(NUM_LABELS)(*logits, *labels)[1]
    sampled = MaskFormerLoss(NUM_LABELS, train_num_points=4000, importance_sample_ratio=0.0)(*logits, *labels)[1]
    for name, term in expected.items():
        assert sampled[name].item() == pytest.approx(term.item(), rel=0.05)


def test_importance_sampling_looks_at_uncertain_points():
    """Half of every mask is certain and right; the losses are higher where it is not."""
    logits = torch.full((1, 1, NUM_QUERIES, 8, 8), -20.0)
    logits[..., :4] = 0.0
    inputs = torch.zeros(1, 1, NUM_QUERIES, NUM_LABELS + 1), logits
    labels = torch.zeros(1, 32, 32, dtype=torch.int64).masked_fill(torch.arange(32) >= 12, -1), torch.tensor([[0]])
    uniform, important = (
        MaskFormerLoss(NUM_LABELS, train_num_points=200, importance_sample_ratio=ratio)(*inputs, *labels)[1]
        for ratio in (0.0, 1.0)
    )
    assert important["loss_mask"] > 1.5 * uniform["loss_mask"]


def test_points_teach_every_parameter():
    model, batch = tiny_model(train_num_points=50).train(), tiny_batch()
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    void = {**batch, "mask_labels": torch.full_like(batch["mask_labels"], -1)}
    void["class_labels"] = torch.full_like(batch["class_labels"], -100)
    assert model(**void).loss.isfinite()
