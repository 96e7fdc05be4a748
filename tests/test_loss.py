import itertools
import warnings

import pytest
import torch
from models import NUM_LABELS, Operations, as_mask_list, tiny_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_maskformer import MaskFormerLoss, loss_maskformer, loss_maskformer_masks, loss_maskformer_points
from hf_maskformer.loss_maskformer_logits import (
    _PROJECTIONS,
    _layers_at_once,
    matched_mask_logits,
    record_projection,
)
from hf_maskformer.loss_maskformer_masks import plain_mask_losses
from hf_maskformer.loss_maskformer_matching import assign, finite_costs, pairwise_mask_costs
from hf_maskformer.loss_maskformer_targets import prepare_targets

pytestmark = pytest.mark.usefixtures("way")


def random_logits(num_layers=2, batch_size=2, num_queries=6, size=(16, 24)):
    return (
        torch.randn(num_layers, batch_size, num_queries, NUM_LABELS + 1, requires_grad=True),
        torch.randn(num_layers, batch_size, num_queries, *size, requires_grad=True),
    )


def labels_of(batch):
    return batch["mask_labels"], batch["class_labels"]


def test_a_perfect_prediction_costs_almost_nothing_and_a_wrong_one_much():
    batch = tiny_batch(batch_size=1, size=(8, 12))
    masks = as_mask_list(batch)["mask_labels"][0]
    good_masks = torch.cat([masks * 40 - 20, torch.full((1, 8, 12), -20.0)])[None, None]
    good_classes = torch.full((1, 1, 3, NUM_LABELS + 1), -20.0)
    for query, label in enumerate([*batch["class_labels"][0].tolist(), NUM_LABELS]):
        good_classes[0, 0, query, label] = 20.0
    loss = MaskFormerLoss(NUM_LABELS)
    assert loss(good_classes, good_masks, *labels_of(batch))[0] < 1e-3
    assert loss(-good_classes, -good_masks, *labels_of(batch))[0] > 30


def test_mask_losses_of_a_case_worked_out_by_hand():
    """Two pixels, one inside; logits 0, so every probability is 1/2."""
    focal, dice = plain_mask_losses(torch.zeros(1, 2), torch.tensor([[True, False]]))
    log_two = 0.6931472
    assert focal.item() == pytest.approx((0.25 * 0.25 * log_two + 0.75 * 0.25 * log_two) / 2)
    assert dice.item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1))


def test_matching_costs_are_the_losses_of_every_pair():
    logits, masks = torch.randn(5, 12), torch.rand(3, 12) > 0.5
    focal, dice = pairwise_mask_costs(logits, masks)
    for query, segment in itertools.product(range(5), range(3)):
        one = plain_mask_losses(logits[query][None], masks[segment][None])
        assert focal[query, segment].item() == pytest.approx(one[0].item(), rel=1e-4)
        assert dice[query, segment].item() == pytest.approx(one[1].item(), rel=1e-4)


def test_matching_costs_are_those_on_the_pixels_that_count():
    logits, masks, left_out = torch.randn(5, 40), torch.rand(3, 40) > 0.5, torch.arange(40) >= 24
    masks &= ~left_out
    found = pairwise_mask_costs(logits, masks, left_out)
    for cost, expected in zip(found, pairwise_mask_costs(logits[:, :24], masks[:, :24]), strict=True):
        torch.testing.assert_close(cost, expected)
    for cost in pairwise_mask_costs(logits, torch.zeros_like(masks), torch.ones_like(left_out)):
        assert cost.abs().max() < 1e-6


def test_matching_on_points_sees_every_part_of_the_image():
    sampling = MaskFormerLoss(NUM_LABELS, train_num_points=10).point_sampling
    draws = [sampling.choose_pixels(torch.arange(40)).tolist() for _ in range(200)]
    assert all(len(set(draw)) == 10 and draw == sorted(draw) for draw in draws)
    assert set().union(*draws) == set(range(40))


@pytest.mark.parametrize("copies", [1, 12_000])  # the many are solved by threads
def test_the_assignment_is_the_cheapest_of_all(copies, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cost = torch.rand(4, 3)
    matches = assign(cost.expand(2, copies, -1, -1), [3] * copies)
    assert len(matches) == 2
    assert all(image == matches[0][0] for layer in matches for image in layer)
    rows, columns = matches[0][0]
    cheapest = min(sum(cost[row, column] for column, row in enumerate(p)) for p in itertools.permutations(range(4), 3))
    assert cost[rows, columns].sum().item() == pytest.approx(cheapest.item())


def test_identical_segments_go_to_different_queries():
    targets = prepare_targets([torch.ones(2, 4, 4)], [torch.tensor([1, 1])], batch_size=1)
    logits = torch.randn(1, 1, 5, NUM_LABELS + 1), torch.randn(1, 1, 5, 4, 4)
    (((queries, segments),),), _ = MaskFormerLoss(NUM_LABELS).match(*logits, targets)
    assert len(set(queries)) == 2
    assert sorted(segments) == [0, 1]


def test_costs_that_are_not_finite_match_last():
    cost = torch.tensor([[float("nan"), 1.0], [2.0, float("inf")], [3.0, 3.0]])
    with pytest.warns(UserWarning, match="The mask cost of the matching is not finite"):
        cost = finite_costs(cost, {"class cost": True, "mask cost": False}, set())
    (((rows, columns),),) = assign(cost[None, None], [2])
    assert dict(zip(rows, columns, strict=True)) == {0: 1, 1: 0}


@pytest.mark.parametrize("costs", [[float("-inf"), float("-inf")], [float("nan"), float("inf")]])
def test_a_query_whose_costs_are_not_finite_matches_after_large_costs(costs):
    cost = torch.tensor([costs, [2000.0, 1000.0], [1000.0, 3000.0]])
    with pytest.warns(UserWarning, match="not finite"):
        cost = finite_costs(cost, {"mask cost": False}, set())
    (((rows, columns),),) = assign(cost[None, None], [2])
    assert dict(zip(rows, columns, strict=True)) == {1: 1, 2: 0}


def test_each_cost_has_a_weight_of_its_own():
    logits, targets = random_logits(), prepare_targets(*labels_of(tiny_batch(size=(16, 24))), 2)
    plain = MaskFormerLoss(NUM_LABELS, class_cost=1.0, mask_cost=1.0, dice_cost=1.0).matching_costs(*logits, targets)
    costs = {"class_cost": 2.0, "mask_cost": 3.0, "dice_cost": 5.0}
    weights = {"cross_entropy_weight": 7.0, "mask_weight": 11.0, "dice_weight": 13.0}
    found = MaskFormerLoss(NUM_LABELS, **costs, **weights).matching_costs(*logits, targets)
    for name, cost in costs.items():
        name = name.replace("_", " ")
        torch.testing.assert_close(found[name], cost * plain[name])


@pytest.mark.parametrize("points", [None, 10])
def test_fixed_matching_is_the_same_on_points(points):
    loss, batch = MaskFormerLoss(NUM_LABELS, matching="fixed", train_num_points=points), tiny_batch(size=(16, 24))
    logits, targets = random_logits(num_queries=NUM_LABELS), prepare_targets(*labels_of(batch), 2)
    assert loss.match(*logits, targets)[0] == [[([0, 2], [0, 1]), ([3, 1], [0, 1])]] * 2


@pytest.mark.parametrize("points", [None, 64])
def test_a_multiple_of_the_loss_has_that_multiple_of_the_gradient(points):
    """As accumulation of gradients and the scaling of the loss in half precision ask for."""
    batch, logits, gradients = tiny_batch(size=(16, 24)), random_logits(), []
    for factor in (1.0, 8.0):
        torch.manual_seed(0)
        loss, _ = MaskFormerLoss(NUM_LABELS, train_num_points=points)(*logits, *labels_of(batch))
        gradients.append(torch.autograd.grad(factor * loss, logits))
    for one, multiple in zip(*gradients, strict=True):
        torch.testing.assert_close(multiple, 8 * one)


def test_how_many_points_are_in_work_at_once_does_not_matter(monkeypatch):
    monkeypatch.setattr(loss_maskformer_points, "MANY_POINTS", 16)
    labels, logits = labels_of(tiny_batch(size=(32, 48))), random_logits(size=(8, 12))
    expected = MaskFormerLoss(NUM_LABELS)(*logits, *labels)[1]
    found = MaskFormerLoss(NUM_LABELS, train_num_points=4000, importance_sample_ratio=0.0)(*logits, *labels)[1]
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_index_maps_and_labels_of_any_integer_type_mean_the_same(dtype):
    batch, logits, loss = tiny_batch(size=(16, 24)), random_logits(), MaskFormerLoss(NUM_LABELS)
    batch["mask_labels"].clamp_(min=0)  # some types have no -1
    expected = loss(*logits, *labels_of(batch))[0].item()
    assert loss(*logits, batch["mask_labels"].to(dtype), batch["class_labels"])[0].item() == expected
    assert loss(*logits, batch["mask_labels"], batch["class_labels"].to(dtype))[0].item() == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_masks_of_negative_integers_are_inside_too(dtype):
    batch, logits, loss = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), MaskFormerLoss(NUM_LABELS)
    expected = loss(*logits, *labels_of(batch))[0].item()
    batch["mask_labels"] = [(-masks).to(dtype) for masks in batch["mask_labels"]]
    assert loss(*logits, *labels_of(batch))[0].item() == expected


@pytest.mark.parametrize(
    ("field", "image", "value", "message"),
    [
        ("mask_labels", 1, torch.ones(1, 16, 24), "Image 1 has 1 masks, but 2 labels"),
        ("class_labels", 0, torch.tensor([-1, 2]), r"Image 0 has the class labels \[-1, 2\]"),
        ("class_labels", 1, torch.tensor([True, False]), "image 1 are torch.bool of shape"),
        ("class_labels", 1, torch.tensor([[1], [2]]), r"of shape \(2, 1\), but must be"),
    ],
)
def test_targets_of_a_list_that_do_not_fit_are_refused(field, image, value, message):
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch[field][image] = value
    with pytest.raises(ValueError, match=message):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch))


def test_an_empty_tensor_of_labels_may_have_the_type_that_torch_gives_it():
    batch, logits, losses = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), []
    batch["mask_labels"][1] = torch.zeros(0, 16, 24)
    for empty in (torch.tensor([]), torch.zeros(0, dtype=torch.int64)):
        batch["class_labels"][1] = empty
        losses.append(MaskFormerLoss(NUM_LABELS)(*logits, *labels_of(batch))[0].item())
    assert losses[0] == losses[1]


def test_an_index_map_may_have_as_many_segments_as_its_indices_count():
    index_map, labels = torch.zeros(1, 8, 8, dtype=torch.int32), torch.zeros(1, 2**15 - 1, dtype=torch.int64)
    index_map[0, 4:] = 2**15 - 2
    logits = random_logits(num_layers=1, batch_size=1, size=(2, 2))
    assert MaskFormerLoss(NUM_LABELS)(*logits, index_map, labels)[0].isfinite()


def test_more_segments_than_queries_leave_some_unmatched():
    class_logits, mask_logits = random_logits(num_queries=3)
    index_map = torch.arange(16 * 24).view(1, 16, 24).repeat(2, 1, 1) % 10
    labels = torch.zeros(2, 10, dtype=torch.int64)
    total, _ = MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, index_map, labels)
    total.backward()
    assert total.isfinite()
    assert mask_logits.grad.flatten(3).abs().sum(-1).gt(0).all()  # every query has a mask to learn


def test_a_void_image_teaches_no_object_only():
    class_logits, mask_logits = random_logits(num_layers=1)
    void = torch.full((2, 16, 24), -1), torch.full((2, 2), -100)
    total, terms = MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, *void)
    total.backward()
    expected = -class_logits.log_softmax(-1)[..., -1].mean()
    assert terms["loss_cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["loss_mask"] == terms["loss_dice"] == 0
    assert mask_logits.grad.abs().max() == 0


def test_a_batch_of_empty_lists_is_void():
    class_logits, mask_logits = random_logits(num_layers=1)
    empty = [torch.zeros(0, 16, 24)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    total, _ = MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, *empty)
    assert total.item() == pytest.approx(-class_logits.log_softmax(-1)[..., -1].mean().item(), rel=1e-5)


def test_an_image_without_segments_beside_one_with_some():
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch["mask_labels"][1] = torch.zeros(0, 16, 24)
    batch["class_labels"][1] = torch.zeros(0, dtype=torch.int64)
    class_logits, mask_logits = random_logits()
    total, _ = MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, *labels_of(batch))
    total.backward()
    assert mask_logits.grad[:, 0].abs().sum() > 0
    assert mask_logits.grad[:, 1].abs().sum() == 0


def test_both_forms_of_targets_give_the_same_loss_with_different_numbers_of_segments():
    batch = tiny_batch(size=(16, 24))
    batch["mask_labels"][0][batch["mask_labels"][0] == 1] = -1
    batch["class_labels"][0, 1] = -100
    logits, loss = random_logits(), MaskFormerLoss(NUM_LABELS)
    index_form = loss(*logits, *labels_of(batch))[1]
    list_form = loss(*logits, *labels_of(as_mask_list(batch)))[1]
    assert {name: term.item() for name, term in index_form.items()} == {
        name: term.item() for name, term in list_form.items()
    }


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_type_mean_the_same(dtype):
    batch, logits, loss = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), MaskFormerLoss(NUM_LABELS)
    expected = loss(*logits, *labels_of(batch))[0].item()
    batch["mask_labels"] = [masks.to(dtype) for masks in batch["mask_labels"]]
    assert loss(*logits, *labels_of(batch))[0].item() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_have_the_costs_and_losses_of_their_numbers(dtype):
    batch, loss = tiny_batch(size=(16, 24)), MaskFormerLoss(NUM_LABELS)
    halves = [logits.detach().to(dtype) for logits in random_logits()]
    exact = [logits.float() for logits in halves]
    targets = prepare_targets(*labels_of(batch), 2)
    found, expected = (loss.matching_costs(*logits, targets) for logits in (halves, exact))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loss(*halves, *labels_of(batch))[1] == loss(*exact, *labels_of(batch))[1]


def test_half_precision_logits_give_a_finite_loss():
    batch = tiny_batch(batch_size=1, size=(512, 512))
    class_logits, mask_logits = (logits.half() * 10 for logits in random_logits(1, 1, 6, (128, 128)))
    assert MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, *labels_of(batch))[0].isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(class_labels=b["class_labels"] + 2), r"Image 0 has the class labels \[2, 4\].*4 classes"),
        (
            lambda b: b.update(mask_labels=b["mask_labels"] + 3),
            "mask_labels of image 0 point to segment 4.*has 2 class_labels",
        ),
        (lambda b: b["mask_labels"][0, 0, 0].fill_(2), "mask_labels of image 0 point to segment 2.*has 2 class_labels"),
        (
            lambda b: b.update(class_labels=b["class_labels"][:1]),
            "mask_labels are for 2 images, but class_labels for 1",
        ),
        (
            lambda b: b.update(mask_labels=b["mask_labels"][:1], class_labels=b["class_labels"][:1]),
            "labels are for 1 images, but the batch has 2",
        ),
        (
            lambda b: b.update(mask_labels=[torch.ones(3, 16, 24)] * 2, class_labels=[torch.tensor([0, 1])] * 2),
            "Image 0 has 3 masks, but 2 labels",
        ),
        (lambda b: b["class_labels"][0].fill_(-100)[1:].fill_(1), "class_labels of image 0 have -100 before their end"),
        (lambda b: b["mask_labels"][1, 3].fill_(-2), "mask_labels of image 1 hold an index below -1"),
        (
            lambda b: b.update(mask_labels=list(b["mask_labels"] == 0)),
            r"image 0 are one map \(H, W\) of torch.bool.*\(1, H, W\)",
        ),
        (lambda b: b.update(mask_labels=b["mask_labels"].float()), "of torch.float32, but an index map holds integers"),
        (lambda b: b.update(mask_labels=list(b["mask_labels"][:, 0])), r"image 0 have the shape \(24,\)"),
        (
            lambda b: b.update(class_labels=b["class_labels"] + 0.5),
            "class_labels of image 0 are torch.float32 of shape",
        ),
        (lambda b: b.update(size=(8, 8)), "are 16 x 24 pixels, but the padded images have 8 x 8"),
        (lambda b: b.update(size=(64, 96)), "are 16 x 24 pixels, but the padded images have 64 x 96"),
        (lambda b: b.update(as_mask_list(b), size=(64, 96)), "are 16 x 24 pixels, but the padded images have 64 x 96"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    batch = tiny_batch(size=(16, 24))
    change(batch)
    with pytest.raises(ValueError, match=message):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch), size=batch.get("size"))


@pytest.mark.parametrize("index", [2**16, 2**32, -(2**16)])
def test_an_index_that_would_be_another_in_two_bytes_is_refused(index):
    batch = tiny_batch(size=(16, 24))
    batch["mask_labels"][0, 0, 0] = index
    with pytest.raises(ValueError, match="mask_labels of image 0"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch))


def test_one_image_with_more_masks_than_labels_is_named():
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch["mask_labels"][1] = torch.ones(3, 16, 24)
    with pytest.raises(ValueError, match="Image 1 has 3 masks, but 2 labels"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch))


def test_padding_of_255_in_float_masks_belongs_to_no_segment():
    """What transformers' image processor writes into the masks of the smaller image of a batch."""
    batch, logits, loss = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), MaskFormerLoss(NUM_LABELS)
    expected = loss(*logits, *labels_of(batch))[0].item()
    for masks in batch["mask_labels"]:
        masks[:, :, 10:12] = 255  # between the two segments
    assert loss(*logits, *labels_of(batch))[0].item() == expected


@pytest.mark.parametrize("size", [(16, 24), (64, 96)])
def test_autocast_changes_neither_matching_nor_loss(size):
    batch, logits, loss = tiny_batch(size=size), random_logits(), MaskFormerLoss(NUM_LABELS)
    targets = prepare_targets(*labels_of(batch), 2)
    expected, expected_costs = loss(*logits, *labels_of(batch))[0].item(), loss.matching_costs(*logits, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*logits, *labels_of(batch))[0].item() == expected
        for name, cost in loss.matching_costs(*logits, targets).items():
            assert torch.equal(cost, expected_costs[name])


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("points", [None, 64])
def test_an_image_that_is_all_void_has_a_finite_loss_if_void_is_ignored(form, points):
    batch, logits = form(tiny_batch(size=(16, 24))), random_logits()
    batch["mask_labels"][1][:] = -1 if form is dict else 0  # a crop has removed both of its segments
    loss = MaskFormerLoss(NUM_LABELS, void_in_loss="ignore", train_num_points=points)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total, terms = loss(*logits, *labels_of(batch))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, logits))
    assert not any(term.requires_grad for term in terms.values())


def test_a_wrong_value_is_seen_behind_padding():
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch["mask_labels"] = [masks.float() for masks in batch["mask_labels"]]
    batch["mask_labels"][0][:, 8:, 20:] = 255
    batch["mask_labels"][0][1, 15, 3] = 0.5
    with pytest.raises(ValueError, match=r"mask_labels of image 0 contain 0\.5"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch))


@pytest.mark.parametrize("num_masks", [1, 2])
def test_float_masks_that_are_255_inside_are_refused(num_masks):
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch["mask_labels"] = [255 * masks.float()[:num_masks] for masks in batch["mask_labels"]]
    batch["class_labels"] = [labels[:num_masks] for labels in batch["class_labels"]]
    with pytest.raises(ValueError, match="contain 255, but floating-point masks are 1 inside"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch))


def test_float_masks_that_are_255_inside_are_refused_away_from_the_corner_too():
    masks = torch.zeros(2, 16, 24)
    masks[0, 4:8, 4:8] = masks[1, 9:12, 9:12] = 255
    with pytest.raises(ValueError, match="contain 255, but floating-point masks are 1 inside"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(batch_size=1), [masks], [torch.tensor([0, 1])])


def test_no_masks_have_no_size_that_could_be_wrong():
    batch, logits, losses = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), []
    batch["class_labels"][1] = torch.zeros(0, dtype=torch.int64)
    for size in ((16, 24), (1, 1)):
        batch["mask_labels"][1] = torch.zeros(0, *size)
        sizes = {"image_sizes": torch.tensor([[16, 24]] * 2), "size": (16, 24)}
        losses.append(MaskFormerLoss(NUM_LABELS)(*logits, *labels_of(batch), **sizes)[0].item())
    assert losses[0] == losses[1]


def test_the_weight_of_no_object_is_that_of_the_configuration_not_of_the_checkpoint():
    batch, logits = tiny_batch(size=(16, 24)), random_logits()
    loaded = MaskFormerLoss(NUM_LABELS, no_object_weight=0.5)
    loaded.load_state_dict(MaskFormerLoss(NUM_LABELS).state_dict())
    fresh = MaskFormerLoss(NUM_LABELS, no_object_weight=0.5)
    assert loaded(*logits, *labels_of(batch))[0] == fresh(*logits, *labels_of(batch))[0]


def test_a_network_that_diverged_is_reported_once_with_the_term():
    class_logits, mask_logits = random_logits()
    mask_logits = torch.full_like(mask_logits, float("nan"))
    loss, labels = MaskFormerLoss(NUM_LABELS), labels_of(tiny_batch(size=(16, 24)))
    with pytest.warns(UserWarning, match="of the matching is not finite") as reports:
        loss(class_logits, mask_logits, *labels)
    assert [str(report.message).split(" of the matching")[0] for report in reports] == [
        "The mask cost",
        "The dice cost",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(class_logits, mask_logits, *labels)


def test_a_segment_that_a_crop_removed_is_learnt_as_an_empty_mask():
    class_logits, mask_logits = random_logits(num_layers=1)
    index_map, labels = labels_of(tiny_batch(size=(16, 24)))
    index_map[:, :8] = -1  # the second segment
    index_map[index_map == 1] = -1
    total, _ = MaskFormerLoss(NUM_LABELS)(class_logits, mask_logits, index_map, labels)
    total.backward()
    assert total.isfinite()
    assert mask_logits.grad.flatten(3).abs().sum(-1).gt(0).sum().item() == 4


def test_masks_may_end_where_their_image_does():
    batch, logits, loss = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), MaskFormerLoss(NUM_LABELS)
    batch["mask_labels"][1][:, :, 16:] = 0
    expected = loss(*logits, *labels_of(batch), size=(16, 24))[0].item()
    batch["mask_labels"][1] = batch["mask_labels"][1][:, :, :16]
    assert loss(*logits, *labels_of(batch), size=(16, 24))[0].item() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_masks_of_integers_are_inside_where_they_are_not_0(dtype):
    batch, logits, loss = as_mask_list(tiny_batch(size=(16, 24))), random_logits(), MaskFormerLoss(NUM_LABELS)
    expected = loss(*logits, *labels_of(batch))[0].item()
    batch["mask_labels"] = [(255 * masks).to(dtype) for masks in batch["mask_labels"]]
    assert loss(*logits, *labels_of(batch))[0].item() == expected


@pytest.mark.parametrize("value", [0.5, -1.0, 128.0, float("nan")])
@pytest.mark.parametrize("options", [{}, {"matching": "fixed"}, {"train_num_points": 8}])
def test_masks_of_floating_type_with_other_values_are_refused(value, options):
    batch = as_mask_list(tiny_batch(size=(16, 24)))
    batch["mask_labels"][1][1, 15, 3] = value
    with pytest.raises(ValueError, match=f"mask_labels of image 1 contain {value:g}, but floating-point masks"):
        MaskFormerLoss(NUM_LABELS, **options)(*random_logits(num_queries=NUM_LABELS), *labels_of(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"void_in_loss": "ignored"}, "void_in_loss is 'ignored', but must be 'background' or 'ignore'"),
        ({"matching": "hungarian"}, "matching is 'hungarian', but must be 'bipartite' or 'fixed'"),
        ({"no_object_weight": 0.0}, "no_object_weight is 0.0, but must be a finite number above 0"),
        ({"mask_weight": -1}, "mask_weight is -1, but must be a finite number of at least 0"),
        ({"class_cost": 0, "mask_cost": 0, "dice_cost": 0}, "are all 0, so every matching costs the same"),
        ({"train_num_points": 0}, "train_num_points is 0, but must be a whole number from 1"),
        ({"train_num_points": 1.5}, "train_num_points is 1.5, but must be a whole number from 1"),
        ({"oversample_ratio": 0.5}, "oversample_ratio is 0.5, but must be a number from 1"),
        ({"importance_sample_ratio": 2}, "importance_sample_ratio is 2, but must be from 0 to 1"),
    ],
)
def test_a_loss_without_meaning_is_not_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskFormerLoss(NUM_LABELS, **arguments)


def test_fixed_matching_needs_a_query_for_each_class():
    batch = tiny_batch(size=(16, 24))
    with pytest.raises(ValueError, match="there are 6 queries and 4 classes"):
        MaskFormerLoss(NUM_LABELS, matching="fixed")(*random_logits(num_queries=6), *labels_of(batch))


@pytest.mark.parametrize("number", [5, torch.tensor(5), torch.ones(3)])
def test_numbers_of_items_that_are_not_two_are_refused(number):
    batch = tiny_batch(size=(16, 24))
    with pytest.raises(ValueError, match=r"must be a tensor of two numbers: what .*count_items returns"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(), *labels_of(batch), num_items_in_batch=number)


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("points", [None, 64])
def test_the_default_type_of_numbers_does_not_matter(form, points):
    batch, logits = form(tiny_batch(size=(24, 40))), random_logits(size=(6, 10))
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            losses.append(MaskFormerLoss(NUM_LABELS, train_num_points=points)(*logits, *labels_of(batch))[0])
        finally:
            torch.set_default_dtype(default)
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_index_maps_of_a_list_may_end_where_their_image_does():
    batch, logits, loss = tiny_batch(size=(16, 24)), random_logits(), MaskFormerLoss(NUM_LABELS)
    batch["mask_labels"][1, :, 16:] = -1
    expected = loss(*logits, *labels_of(batch))[0].item()
    index_maps = [batch["mask_labels"][0], batch["mask_labels"][1, :, :16]]
    assert loss(*logits, index_maps, batch["class_labels"])[0].item() == expected


@pytest.mark.parametrize("form", [dict, as_mask_list])
def test_targets_come_to_the_device_of_the_logits(form):
    """The meta device stands for another one: it has no numbers, but types and places."""
    targets = prepare_targets(*labels_of(form(tiny_batch())), 2, device=torch.device("meta"), sort_pixels=True)
    tensors = [targets.labels, *targets.masks, targets.values, targets.starts]
    assert {tensor.device.type for tensor in [*tensors, *(p for p in targets.pixels if p is not None)]} == {"meta"}


class Waits(TorchFunctionMode):
    """Notes what would make the host wait for a device."""

    NAMES = ("cpu", "tolist", "item", "nonzero", "unique", "bincount", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class WaitsOfOperators(TorchDispatchMode):
    """Notes the same below autograd, where the operators of the backward pass and those inside of others are seen.

    A copy from CPU to CPU is none, so that `Waits` has to see that one.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # An index of truth values is looked up by `nonzero`, inside of the operator.
        is_by_truth = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:2]
            if isinstance(indices, list | tuple)
            for index in indices
        )
        if name in self.NAMES or is_by_truth:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("matching", ["bipartite", "fixed"])
@pytest.mark.parametrize("points", [None, 64])
@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
def test_the_host_waits_once_in_a_step(form, matching, points, void_in_loss):
    batch, logits = form(tiny_batch(size=(32, 48))), random_logits(num_queries=NUM_LABELS, size=(8, 12))
    loss = MaskFormerLoss(NUM_LABELS, matching=matching, train_num_points=points, void_in_loss=void_in_loss)
    logits = [tensor.requires_grad_() for tensor in logits]
    loss(*logits, *labels_of(batch))  # the matrices that enlarge masks of this size are made once
    with Waits() as waits, WaitsOfOperators() as waits_of_operators:
        loss(*logits, *labels_of(batch))[0].backward()
    assert waits.found == ["cpu"]
    assert waits_of_operators.found == []


@pytest.mark.parametrize("form", [dict, as_mask_list])
def test_on_a_gpu_more_segments_are_no_more_operations(form, way):
    counts = []
    for num_segments in (3, 12):
        index_map = torch.arange(32 * 48).view(1, 32, 48) % num_segments
        labels = torch.zeros(1, num_segments, dtype=torch.int64)
        batch = form({"pixel_values": None, "mask_labels": index_map, "class_labels": labels})
        logits, loss = random_logits(batch_size=1, num_queries=20, size=(8, 12)), MaskFormerLoss(NUM_LABELS)
        with Operations() as operations:
            loss(*logits, *labels_of(batch))[0].backward()
        counts.append(operations.count)
    assert (counts[0] == counts[1]) == (way == "GPU")


def test_on_a_gpu_more_layers_are_no_more_operations_of_matching(way):
    batch, counts = tiny_batch(size=(32, 48)), []
    targets = prepare_targets(*labels_of(batch), 2)
    for num_layers in (2, 6):
        embeddings = torch.randn(num_layers, 2, 6, 8), torch.randn(2, 8, 8, 12)
        class_logits, _ = random_logits(num_layers)
        with Operations() as operations:
            MaskFormerLoss(NUM_LABELS).matching_costs(class_logits, None, targets, embeddings)
        counts.append(operations.count)
    assert (counts[0] == counts[1]) == (way == "GPU")


@pytest.mark.parametrize(("at_most", "expected"), [(1, 1), (2, 2), (4, 3), (5, 3), (6, 6), (9, 6)])
def test_layers_are_matched_in_parts_of_like_size(monkeypatch, way, at_most, expected):
    monkeypatch.setattr(loss_maskformer_masks, "CHUNK_SIZE_GPU", at_most * 100 * 64 + 5)
    assert _layers_at_once(6, 100, 64, torch.device("cpu")) == (expected if way == "GPU" else 1)


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
def test_how_many_masks_are_in_work_at_once_does_not_matter(form, void_in_loss, monkeypatch):
    batch, losses = form(tiny_batch(size=(32, 48))), []
    class_logits, mask_logits = random_logits(num_layers=3, size=(8, 12))
    # All, two masks of the image and two of three layers, or one of each.
    for chunk_size in (32 * 48 * 100, 32 * 48 * 2, 1):
        for name in ("CHUNK_SIZE_CPU", "CHUNK_SIZE_GPU"):
            monkeypatch.setattr(loss_maskformer_masks, name, chunk_size)
        loss = MaskFormerLoss(NUM_LABELS, void_in_loss=void_in_loss)(class_logits, mask_logits, *labels_of(batch))[0]
        losses.append((loss, *torch.autograd.grad(loss, (class_logits, mask_logits))))
    for of_all, *others in zip(*losses, strict=True):
        for found in others:
            torch.testing.assert_close(found, of_all, rtol=1e-4, atol=1e-7)


def peak_memory(run) -> int:
    """The most bytes that were allocated during a run, beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


@pytest.mark.parametrize("way", ["CPU"], indirect=True)
@pytest.mark.parametrize("void_in_loss", ["background", "ignore"])
def test_full_masks_in_list_form_take_little_more_memory_than_they_do_themselves(void_in_loss):
    num_segments, side = 40, 128
    masks = [torch.ones(num_segments, side, side, dtype=torch.uint8)] * 2
    labels = [torch.zeros(num_segments, dtype=torch.int64)] * 2
    logits = random_logits(num_layers=1, num_queries=num_segments, size=(side // 8, side // 8))
    loss = MaskFormerLoss(NUM_LABELS, void_in_loss=void_in_loss)
    loss(*logits, masks, labels)  # loads what is loaded once
    assert peak_memory(lambda: loss(*logits, masks, labels)) < 2 * (2 * num_segments * side * side)


def test_without_gradient_a_process_waits_for_no_other(monkeypatch):
    """A validation loss is that of the process's own batch, even if no other process computes one."""
    batch, logits, loss = tiny_batch(size=(16, 24)), random_logits(), MaskFormerLoss(NUM_LABELS)
    expected = loss(*logits, *labels_of(batch))[0].item()
    reduced = []
    monkeypatch.setattr(loss_maskformer, "num_processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    with torch.no_grad():
        assert loss(*logits, *labels_of(batch))[0].item() == expected
    assert not reduced
    loss(*logits, *labels_of(batch))
    assert len(reduced) == 1


def test_fewer_masks_than_processes_are_divided_by_their_own_number(monkeypatch):
    """Each process takes four times its part, of which the gradients' average over processes is a quarter."""
    batch, logits = tiny_batch(batch_size=1, size=(16, 24)), random_logits(batch_size=1)
    batch["class_labels"][0, 1] = -100
    batch["mask_labels"][batch["mask_labels"] == 1] = -1
    expected = MaskFormerLoss(NUM_LABELS)(*logits, *labels_of(batch))[1]
    monkeypatch.setattr(loss_maskformer, "num_processes", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers: None)  # the other three have no mask
    found = MaskFormerLoss(NUM_LABELS)(*logits, *labels_of(batch))[1]
    for name in ("loss_mask", "loss_dice"):
        assert found[name].item() == pytest.approx(4 * expected[name].item())


def test_what_made_pixel_embeddings_is_forgotten_once_it_was_used():
    embeddings = torch.randn(1, 8, 4, 6)
    record_projection(embeddings, torch.randn(1, 5, 4, 6), torch.randn(8, 5, 3, 3), torch.randn(8))
    matched_mask_logits(torch.randn(2, 8), embeddings, [2])
    assert embeddings not in _PROJECTIONS


def test_an_index_map_of_more_segments_than_its_indices_count_is_refused():
    index_map, labels = torch.zeros(1, 8, 8, dtype=torch.int32), torch.zeros(1, 2**15, dtype=torch.int64)
    with pytest.raises(ValueError, match="class_labels of image 0 are 32768, but an index map has at most 32767"):
        MaskFormerLoss(NUM_LABELS)(*random_logits(batch_size=1), index_map, labels, size=(64, 96))
