"""The comparison of trainings with transformers' model, on a few small drawn scenes."""

import copy
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_config
from PIL import Image

from hf_maskformer import PerPixelBaselineConfig
from hf_maskformer.data.generated_scenes import write_generated_scenes


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")  # what it shares with the benchmarks lies there
    return importlib.import_module("compare_training")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_generated_scenes(root, num_train=4, num_val=2, image_size=(64, 64))
    return str(root)


@pytest.fixture
def arguments(script, data, tmp_path):
    def build(config=None, **options):
        tiny_config(**{"freeze_batch_norm": False, **(config or {})}).save_pretrained(tmp_path / "config")
        settings = {"config": str(tmp_path / "config"), "data": data, "max_steps": 3, "num_evaluations": 1}
        return script.Arguments(**{**settings, "image_size": 64, "batch_size": 2, **options})

    return build


def curves_of(script, settings):
    script.main(settings)
    curves = json.loads(Path(settings.json).read_text())["curves"]
    assert list(curves) == ["transformers", "this package"]
    return list(curves.values())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"freeze_batch_norm": True, "deep_supervision": False}, {}),
        ({"class_cost": 20.0}, {"num_workers": 1, "bf16": True}),
    ],
)
def test_both_models_begin_alike_and_read_the_same_batches(config, options, script, arguments, tmp_path, monkeypatch):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def evaluate(model, *arguments, **options):
        # Batch norm counts what it reads, also where nothing is learnt.
        read = [tensor.double().sum() for name, tensor in model.state_dict().items() if "running" in name]
        logits = copy.deepcopy(model).eval()(image).masks_queries_logits
        return {"mean_iou": sum(read).item() + logits.double().sum().item()}

    monkeypatch.setattr(script, "evaluate", torch.no_grad()(evaluate))
    settings = arguments(config, learning_rate=0.0, num_evaluations=3, json=str(tmp_path / "curves.json"), **options)
    stock, ours = ([point["mean_iou"] for point in points] for points in curves_of(script, settings))
    assert stock == pytest.approx(ours, rel=1e-2 if settings.bf16 else 1e-5)
    assert len(set(ours)) == (1 if config.get("freeze_batch_norm") else 4)


def test_both_models_match_at_the_same_costs(script, arguments):
    settings = arguments({"class_cost": 20.0, "dice_cost": 3.0})
    dataset = script.open_dataset(settings.data, "train")
    model = script.new_model(settings.config, dataset.labels)
    matcher = script.stock_of(model).criterion.matcher
    costs = {"class_cost": matcher.cost_class, "mask_cost": matcher.cost_mask, "dice_cost": matcher.cost_dice}
    assert costs == model.config.matching_costs == {"class_cost": 20.0, "mask_cost": 20.0, "dice_cost": 3.0}


def test_both_models_learn(script, arguments):
    settings = arguments(max_steps=60, learning_rate=1e-3, backbone_learning_rate_factor=1.0, max_grad_norm=1.0)
    dataset = script.open_dataset(settings.data, "train")
    script.set_seed(0)
    model = script.new_model(settings.config, dataset.labels)
    image_processor = script.image_processor_for(dataset.labels, settings.image_size, model=model)
    for run in script.start_runs(model, dataset, image_processor, settings):
        batch = next(run.batches)
        before = run.loss(batch)
        run.train(1.0)
        assert run.loss(batch) < 0.9 * before


def test_curves_are_written_and_drawn(script, arguments, tmp_path):
    pytest.importorskip("matplotlib")
    files = {"json": str(tmp_path / "curves.json"), "plot": str(tmp_path / "curves.png")}
    for points in curves_of(script, arguments(max_steps=4, num_evaluations=2, **files)):
        assert [point["steps"] for point in points] == [0, 2, 4]
        assert 0 == points[0]["minutes"] < points[1]["minutes"] < points[2]["minutes"]
    assert Image.open(tmp_path / "curves.png").width > 500


def test_a_clock_stands_still_while_the_other_model_trains(script, arguments, monkeypatch):
    now = 0.0
    monkeypatch.setattr(script.time, "perf_counter", lambda: now)
    settings = arguments(max_steps=None, minutes=1.0, warmup_steps=2, learning_rate=1.0)
    rates = []

    def run(seconds):
        model = torch.nn.Linear(2, 1)

        def loss(batch):
            nonlocal now
            now += seconds
            return model(batch).sum()

        return script.Run("a model", model, loss, iter([torch.zeros(2)] * 99), settings)

    slow, fast = run(20.0), run(7.5)
    for share in (0.5, 1.0):
        slow.train(share)
        fast.train(share)
        rates.append(slow.optimizer.param_groups[-1]["lr"])
    assert (slow.steps, slow.seconds) == (3, 60)  # 20 and 40 s, which is past the half; then 60
    assert (fast.steps, fast.seconds) == (8, 60)
    # The last step of each turn begins after a third and after two thirds of the budget; the first one warms up.
    assert rates == pytest.approx([0.5 * (2 / 3) ** 0.9, (1 / 3) ** 0.9])


def test_what_was_measured_before_a_failure_is_kept(script, arguments, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, torch.nan])
    monkeypatch.setattr(
        script.MaskFormerForInstanceSegmentation,
        "forward",
        lambda self, **inputs: SimpleNamespace(loss=self.class_predictor.bias.sum() * 0 + next(losses)),
    )
    monkeypatch.setattr(script, "evaluate", lambda *arguments, **options: {"mean_iou": 0.5})
    file = tmp_path / "curves.json"
    with pytest.raises(ValueError, match="loss of this package is nan at step 2"):
        script.main(arguments(num_evaluations=3, json=str(file)))
    steps = [point["steps"] for point in json.loads(file.read_text())["curves"]["this package"]]
    assert steps == [0, 1, 2]


def test_a_loss_that_is_not_finite_ends_the_comparison(script, arguments):
    settings = arguments()
    model = torch.nn.Linear(2, 1)
    run = script.Run("a model", model, lambda batch: model(batch).sum() * torch.nan, iter([torch.zeros(2)]), settings)
    with pytest.raises(ValueError, match="loss of a model is nan at step 0"):
        run.train(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": None}, "Give one positive budget: --minutes or --max_steps"),
        ({"minutes": 1.0}, "Give one positive budget"),
        ({"max_steps": 0}, "Give one positive budget"),
        ({"num_evaluations": 0}, "--num_evaluations is 0"),
        ({"num_evaluations": 4}, "--num_evaluations is 4; it must be 1 to the number of steps"),
        ({"json": "missing/curves.json"}, "missing/curves.json cannot be written"),
        ({"json": "."}, "cannot be written: it is a folder"),
        ({"plot": "curves.xyz"}, "must end in .png"),
        ({"batch_size": 5}, "has 4 training images, so --batch_size cannot be larger"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, script, arguments):
    with pytest.raises(ValueError, match=message):
        script.main(arguments(**options))


def test_settings_that_transformers_ignores_are_refused(script, arguments):
    with pytest.raises(ValueError, match="sets train_num_points, mask_padding, which transformers ignores"):
        script.main(arguments({"train_num_points": 64, "mask_padding": True}))


def test_a_model_that_transformers_lacks_is_refused(script, arguments):
    settings = arguments()
    PerPixelBaselineConfig(backbone_config=tiny_config().backbone_config).save_pretrained(settings.config)
    with pytest.raises(ValueError, match="describes a PerPixelBaselineForSemanticSegmentation, which transformers"):
        script.main(settings)
