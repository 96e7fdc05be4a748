"""A GPU gives what the CPU gives: the machine's own, or where it has none, an emulated one.

test_gpu.py runs these tests in a separate process.
"""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import ARCHITECTURES, as_mask_list, tiny_batch, tiny_model
from PIL import Image
from test_per_pixel_baseline import TRANSFORMER, batch_of_labels, tiny_baseline
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_maskformer import (
    AveragePrecision,
    MaskFormerDataCollator,
    MaskFormerImageProcessor,
    MaskFormerTrainer,
    MaskFormerTrainingArguments,
    MeanIoU,
    PanopticQuality,
)
from hf_maskformer.data.generated_scenes import GeneratedScenes
from hf_maskformer.evaluation.evaluation import evaluate
from hf_maskformer.evaluation.pipeline import MaskFormerPipeline
from hf_maskformer.evaluation.tasks import TASKS

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    DEVICE, Device = torch.device("cuda"), nullcontext
    torch.backends.cudnn.allow_tf32 = False
else:
    from emulated_gpu import DEVICE
    from emulated_gpu import EmulatedGPU as Device

needs_coco = pytest.mark.skipif(find_spec("faster_coco_eval") is None, reason="needs the extra coco")
SCENES = GeneratedScenes(3, image_size=(64, 64), task="panoptic")
POINTS = {"train_num_points": 50}
VOID = {"void_in_loss": "ignore"}


@pytest.fixture(autouse=True)
def device():
    torch.manual_seed(0)
    with Device() as device:
        yield device


def on_gpu(values):
    return tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), values)


def twin_on_gpu(model):
    return deepcopy(model).to(DEVICE)


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


def check_same(actual, expected, tolerance=1e-4):
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(other, Tensor | float):
            one = one.cpu() if isinstance(one, Tensor) else one
            assert_close(one, other, rtol=tolerance, atol=tolerance)
        else:
            assert one == other


def step(model, batch, autocast=nullcontext):
    """The loss of a batch and the gradient of each parameter."""
    torch.manual_seed(0)  # points are drawn
    with autocast():
        loss = model.train()(**batch).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


def check_step(model, batch):
    check_same(step(twin_on_gpu(model), on_gpu(batch)), step(model, batch), tolerance=1e-3)


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        on_gpu(torch.ones(2)) + torch.ones(2)
    with pytest.raises(TypeError, match="to numpy"):
        on_gpu(torch.ones(2)).numpy()


@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("fields", [{}, VOID, POINTS, POINTS | VOID], ids=["all", "no void", "points", "both"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_training_step(kind, fields, form):
    if HAS_GPU and "train_num_points" in fields:
        pytest.skip("a GPU draws other points")
    config = ARCHITECTURES[kind]().config
    for name, value in fields.items():
        setattr(config, name, value)
    check_step(type(tiny_model())(config), form(tiny_batch()))


@pytest.mark.parametrize("decoder", [None, TRANSFORMER], ids=["baseline", "baseline+"])
def test_a_training_step_of_a_baseline(decoder):
    check_step(tiny_baseline(decoder), batch_of_labels())


def test_a_training_step_with_gradient_checkpointing():
    model = ARCHITECTURES["swin"]()
    model.gradient_checkpointing_enable()
    check_step(model, tiny_batch())


def test_a_training_step_of_a_larger_batch():
    check_step(tiny_model(), {**tiny_batch(), "num_items_in_batch": torch.tensor([8.0, 7.0])})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_mixed_precision_is_near_float32(kind, dtype):
    model, batch = ARCHITECTURES[kind](), tiny_batch()
    loss, *gradients = step(twin_on_gpu(model), on_gpu(batch), partial(torch.autocast, DEVICE.type, dtype=dtype))
    check_same(loss, step(model, batch)[0], tolerance=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.skipif(HAS_GPU, reason="only an emulated GPU counts how often it is waited for")
@pytest.mark.parametrize("form", [dict, as_mask_list])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_training_step_waits_for_the_gpu_once_and_a_prediction_never(kind, form, device):
    model, batch = twin_on_gpu(ARCHITECTURES[kind]()), on_gpu(form(tiny_batch()))
    device.waits.clear()
    model(**batch).loss.backward()
    assert device.waits == {"aten._to_copy.default": 1}  # the costs of matching
    device.waits.clear()
    with torch.no_grad():
        model.eval()(batch["pixel_values"])
    assert not device.waits


def test_a_training(tmp_path):
    arguments = MaskFormerTrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        save_strategy="no",
        num_pictures=1,
        report_to="none",
    )
    if not HAS_GPU:  # Accelerate does not find it
        PartialState._shared_state["device"] = vars(arguments)["_setup_devices"] = DEVICE
        arguments.dataloader_pin_memory = False
    processor = MaskFormerImageProcessor(size={"shortest_edge": 64})
    trainer = MaskFormerTrainer(
        model=tiny_model(id2label=SCENES.labels.id2label),
        args=arguments,
        train_dataset=SCENES,
        eval_dataset=SCENES,
        data_collator=MaskFormerDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.model.device.type == DEVICE.type
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1
    trainer.create_model_card()
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_a_prediction(kind, dtype):
    model = ARCHITECTURES[kind]().eval().to(dtype)
    twin = twin_on_gpu(model)
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.long)
    pixel_mask[1, :, 50:] = 0
    inputs = {"pixel_values": torch.randn(2, 3, 64, 96).to(dtype), "pixel_mask": pixel_mask}
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    check_same(twin(**on_gpu(inputs)), model(**inputs), tolerance)
    check_same(twin.predict(**on_gpu(inputs)), model.predict(**inputs), tolerance)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("semantic", {}),
        ("semantic", {"mode": "direct"}),
        ("semantic", {"mode": "fast"}),
        ("semantic", {"return_segmentation_scores": True}),
        ("panoptic", {"threshold": 0.3, "label_ids_to_fuse": {0, 1}}),
        ("instance", {"threshold": 0.0, "overlap_mask_area_threshold": 0.1}),
        ("instance", {"threshold": 0.0, "return_binary_maps": True}),
        ("instance", {"threshold": 0.0, "return_coco_annotation": True}),
    ],
)
@torch.no_grad()
def test_post_processing(task, options):
    outputs = tiny_model().eval()(torch.randn(2, 3, 64, 96))
    # So that no pixel is decided by less than rounding.
    outputs["class_queries_logits"] *= 5
    outputs["masks_queries_logits"] *= 3
    post_process = getattr(MaskFormerImageProcessor(), f"post_process_{task}_segmentation")
    expected = post_process(outputs, target_sizes=[(70, 90), (64, 50)], **options)
    check_same(post_process(on_gpu(outputs), target_sizes=[(70, 90), (64, 50)], **options), expected)
    assert task == "semantic" or all(result["segments_info"] for result in expected)


@pytest.mark.parametrize(
    ("task", "scale_averaging"),
    [("semantic", False), ("semantic", True), ("panoptic", False), pytest.param("instance", False, marks=needs_coco)],
)
def test_an_evaluation(task, scale_averaging):
    model = tiny_model(id2label=SCENES.labels.id2label)
    thresholds = {"threshold": 0.2, "overlap_mask_area_threshold": 0.1}
    processor = MaskFormerImageProcessor(size={"shortest_edge": 128}, panoptic_thresholds=thresholds)
    actual, expected = (
        evaluate(each, processor, SCENES, task, batch_size=2, scale_averaging=scale_averaging)
        for each in (twin_on_gpu(model), model)
    )
    np.testing.assert_equal(actual, expected)


IDS = torch.arange(12, dtype=torch.int32).view(3, 4) % 3
SEGMENTS = {"segmentation": IDS, "segments_info": [{"id": number, "label_id": number} for number in (1, 2)]}
MASKS = {"masks": torch.stack([IDS == 1, IDS == 2]), "labels": torch.tensor([1, 2]), "scores": torch.ones(2)}


@pytest.mark.parametrize(
    ("make_metric", "image", "figure"),
    [
        (lambda: MeanIoU(3), IDS, "mean_iou"),
        (lambda: PanopticQuality(3, [1, 2]), SEGMENTS, "pq"),
        pytest.param(lambda: AveragePrecision(3), MASKS, "ap", marks=needs_coco),
    ],
    ids=["semantic", "panoptic", "instance"],
)
def test_a_metric(make_metric, image, figure):
    metric = make_metric()
    metric.add(prediction=on_gpu(image), reference=on_gpu(image))
    assert metric.compute()[figure] == pytest.approx(1)


@pytest.mark.parametrize("target_format", ["masks", "segment_map"])
def test_pre_processing(target_format):
    processor = MaskFormerImageProcessor(size={"shortest_edge": 64})
    label_map = np.random.default_rng(1).integers(0, 4, (50, 70))
    expected = processor(photograph(), label_map, target_format=target_format, return_tensors="pt")
    actual = processor(photograph(), label_map, target_format=target_format, return_tensors="pt", device=DEVICE)
    assert actual["pixel_values"].device.type == DEVICE.type
    # A CPU rounds resized pixels to bytes.
    check_same(actual.pop("pixel_values"), expected.pop("pixel_values"), tolerance=0.02)
    check_same(dict(actual), dict(expected))


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline(task):
    model, processor = tiny_model().eval(), MaskFormerImageProcessor(size={"shortest_edge": 64})
    options = {"threshold": 0.1} if task != "semantic" else {}
    options |= {"overlap_mask_area_threshold": 0.0} if task == "panoptic" else {}
    actual, expected = (
        MaskFormerPipeline(each, image_processor=processor, device=place)(photograph(), subtask=task, **options)
        for each, place in ((twin_on_gpu(model), DEVICE), (model, "cpu"))
    )
    assert expected
    for one, other in zip(actual, expected, strict=True):
        assert (one["label"], one["mask"].tobytes()) == (other["label"], other["mask"].tobytes())
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
