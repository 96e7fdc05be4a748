"""The learning rate schedules of the paper's recipes: a factor for each optimiser step.

They differ from transformers' schedules of the same shapes: warm-up multiplies the decay instead of delaying it, and
starts at a fraction of the learning rate instead of 0.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, get_args

ScheduleName = Literal["poly", "steps"]
POWER = 0.9
STEP_FACTOR = 0.1


def learning_rate_schedule(
    name: str, num_steps: int, warmup_steps: int, warmup_factor: float, milestones: Sequence[float]
) -> Callable[[int], float]:
    """The function from a step, counted from 0, to the learning rate factor.

    Args:
        name: "poly" or "steps".
        num_steps: length of the run.
        warmup_steps, warmup_factor: see `warmup`.
        milestones: for "steps", as fractions of the run.
    """
    falls = [round(milestone * num_steps) for milestone in milestones]

    def factor(step: int) -> float:
        rise = warmup(step, warmup_steps, warmup_factor)
        if name == "steps":
            return rise * STEP_FACTOR ** bisect_right(falls, step)
        # The scheduler is called once more after the last step.
        return rise * max(1 - step / num_steps, 0.0) ** POWER

    return factor


def check_schedule(name: str, warmup_factor: float, milestones: Sequence[float]) -> None:
    """Raises a ValueError if there is no such schedule."""
    if name not in get_args(ScheduleName):
        raise ValueError(f"paper_schedule is {name!r}; it must be one of {', '.join(get_args(ScheduleName))}.")
    if not 0 <= warmup_factor <= 1:
        raise ValueError(f"warmup_factor is {warmup_factor}, but it is a fraction of learning_rate: 0 to 1.")
    if sorted(milestones) != list(milestones) or not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(
            f"lr_milestones is {list(milestones)}; they must be fractions of the run, ascending between 0 and 1."
        )


def warmup(step: int, warmup_steps: int, warmup_factor: float) -> float:
    """Rises linearly from `warmup_factor` at step 0 to 1 at step `warmup_steps`."""
    if step >= warmup_steps:
        return 1.0
    share = step / warmup_steps
    return warmup_factor * (1 - share) + share
