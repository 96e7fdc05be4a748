"""The paper's courses of the learning rate, against numbers worked out by hand from its formulas."""

import pytest
import torch
from test_training import our_trainer

from hf_maskformer import MaskFormerTrainingArguments
from hf_maskformer.training.recipes import RECIPES
from hf_maskformer.training.schedules import learning_rate_schedule


def learning_rate(preset, step):
    options = RECIPES[preset].options()
    factor = learning_rate_schedule(
        options["paper_schedule"],
        options["max_steps"],
        options["warmup_steps"],
        options["warmup_factor"],
        options.get("lr_milestones", []),
    )
    return options["learning_rate"] * factor(step)


@pytest.mark.parametrize(
    ("preset", "step", "expected"),
    [
        # 1e-4 (1 - step / 160000)^0.9
        ("ade20k-r50", 0, 1e-4),
        ("ade20k-r50", 80_000, 5.3588673e-5),
        ("ade20k-r50", 144_000, 1.2589254e-5),
        ("ade20k-r50", 160_000, 0.0),
        ("ade20k-r50", 160_001, 0.0),
        # 6e-5 (1e-6 (1 - a) + a) (1 - step / 160000)^0.9 with a = step / 1500, and without the middle from 1500 on
        ("ade20k-swin-tiny", 0, 6e-11),
        ("ade20k-swin-tiny", 750, 6e-5 * 0.5000005 * 0.99578026),
        ("ade20k-swin-tiny", 1500, 6e-5 * 0.99155852),
        ("ade20k-swin-tiny", 80_000, 3.2153204e-5),
        # Whole, then a tenth from step 369600 on; ten steps of warm-up from the whole to the whole
        ("coco-panoptic-r50", 0, 1e-4),
        ("coco-panoptic-r50", 5, 1e-4),
        ("coco-panoptic-r50", 369_599, 1e-4),
        ("coco-panoptic-r50", 369_600, 1e-5),
        ("coco-panoptic-r50", 554_399, 1e-5),
        ("coco-panoptic-swin-base", 0, 6e-11),
        ("coco-panoptic-swin-base", 150, 6e-5 * 0.1000009),
        ("coco-panoptic-swin-base", 1500, 6e-5),
        ("coco-panoptic-swin-base", 400_000, 6e-6),
    ],
)
def test_learning_rates_of_recipes_are_the_original_s(preset, step, expected):
    assert learning_rate(preset, step) == pytest.approx(expected, rel=1e-6, abs=1e-20)


def test_the_trainer_follows_the_schedule_in_every_group(tmp_path):
    trainer = our_trainer(tmp_path, paper_schedule="poly", warmup_steps=2, warmup_factor=0.5, max_steps=4)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    factors = [0.5, 0.75 * 0.75**0.9, 0.5**0.9, 0.25**0.9]
    for factor, rates in zip(factors, seen, strict=True):
        assert rates == pytest.approx([1e-4 * factor, 1e-4 * factor, 1e-5 * factor, 1e-5 * factor], rel=1e-9)


def test_a_schedule_can_be_stored_and_resumed(tmp_path):
    schedulers = []
    for _ in range(2):
        trainer = our_trainer(tmp_path, paper_schedule="steps", lr_milestones=[0.5])
        trainer.create_optimizer_and_scheduler(num_training_steps=4)
        schedulers.append(trainer.lr_scheduler)
    first, second = schedulers
    for _ in range(2):
        first.optimizer.step()
        first.step()
    torch.save(first.state_dict(), tmp_path / "scheduler.pt")
    second.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert second.get_last_lr() == first.get_last_lr() == pytest.approx([1e-5, 1e-5, 1e-6, 1e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paper_schedule": "linear"}, "paper_schedule is 'linear'; it must be one of poly, steps"),
        ({"paper_schedule": "poly", "warmup_factor": 2.0}, "warmup_factor is 2.0, but it is a fraction"),
        ({"paper_schedule": "poly", "warmup_factor": -0.1}, "warmup_factor is -0.1, but it is a fraction"),
        ({"paper_schedule": "steps", "lr_milestones": [300.0]}, r"lr_milestones is \[300.0\]; they must be fractions"),
        ({"paper_schedule": "steps", "lr_milestones": [0.0, 0.5]}, "lr_milestones is .* between 0 and 1"),
        ({"paper_schedule": "steps", "lr_milestones": [0.5, 1.0]}, "lr_milestones is .* between 0 and 1"),
    ],
)
def test_settings_of_no_schedule_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MaskFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_milestone_is_the_nearest_step():
    factor = learning_rate_schedule("steps", 100, 0, 1.0, [0.29, 2 / 3])  # 0.29 * 100 is a little less than 29
    assert [factor(step) for step in (28, 29, 66, 67)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_milestones_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ascending between 0 and 1"):
        MaskFormerTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, paper_schedule="steps", lr_milestones=[0.9, 0.5]
        )


def test_the_warm_up_may_be_a_share_of_the_run(tmp_path):
    trainer = our_trainer(tmp_path, paper_schedule="poly", warmup_steps=0.5, warmup_factor=0.0)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    factors = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(3)]
    assert factors == pytest.approx([0, 0.5 * 0.75**0.9, 0.5**0.9])
