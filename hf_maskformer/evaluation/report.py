"""Formats the figures of an evaluation as JSON and as a table."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PER_CATEGORY = "per_category_"


def as_json(figures: Mapping[str, Any], id2label: Mapping[int, str]) -> dict[str, Any]:
    """Makes the figures of a metric serialisable: classes by name, and None for NaN."""
    content: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "per_category":
            content[name] = {
                id2label[label]: {kind: _number(score) for kind, score in scores.items()}
                for label, scores in value.items()
            }
        elif name.startswith(PER_CATEGORY):
            content[name] = {id2label[label]: _number(score) for label, score in enumerate(value)}
        else:
            content[name] = _number(value)
    return content


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures over all classes, without NaNs."""
    return {
        name: value for name, value in figures.items() if not name.startswith("per_category") and not math.isnan(value)
    }


def as_table(figures: Mapping[str, Any], id2label: Mapping[int, str]) -> str:
    """Formats the figures of a metric in percent: one line per class with any figure, then the means."""
    columns: tuple[str, ...]
    scores: dict[int, tuple[float, ...]]
    means: dict[str, tuple[float, ...]]
    rest: dict[str, str] = {}
    if "mean_iou" in figures:
        columns = ("IoU", "accuracy")
        scores = dict(enumerate(zip(figures["per_category_iou"], figures["per_category_accuracy"], strict=True)))
        means = {"mean": (figures["mean_iou"], figures["mean_accuracy"])}
        rest = {"pixel accuracy": "overall_accuracy", "frequency-weighted IoU": "frequency_weighted_iou"}
    elif "pq" in figures:
        columns = ("PQ", "SQ", "RQ")
        scores = {label: (s["pq"], s["sq"], s["rq"]) for label, s in figures["per_category"].items()}
        kinds = (("things", "_things"), ("stuff", "_stuff"), ("mean", ""))
        means = {kind: tuple(figures[name + suffix] for name in ("pq", "sq", "rq")) for kind, suffix in kinds}
    else:
        columns = ("AP", "AP50", "AP75")
        scores = {label: (s["ap"], s["ap50"], s["ap75"]) for label, s in figures["per_category"].items()}
        means = {"mean": (figures["ap"], figures["ap50"], figures["ap75"])}
        rest = {f"{name[:2].upper()} {name[3:]}": name for name in ("ap_small", "ap_medium", "ap_large")}
        rest |= {f"AR of {most}": f"ar{most}" for most in (1, 10, 100)}
    return _table(columns, scores, means, {title: figures[name] for title, name in rest.items()}, id2label)


def _table(
    columns: tuple[str, ...],
    scores: Mapping[int, tuple[float, ...]],
    means: Mapping[str, tuple[float, ...]],
    rest: Mapping[str, float],
    id2label: Mapping[int, str],
) -> str:
    rows = [(id2label[label], values) for label, values in scores.items() if not np.isnan(values).all()]
    num_absent = len(scores) - len(rows)
    rows += [(name, values) for name, values in means.items() if not np.isnan(values).all()]
    width = max(len("class"), *(len(name) for name, _ in rows))
    lines = [f"{'class':<{width}}" + "".join(f"{column:>10}" for column in columns)]
    lines += [f"{name:<{width}}" + "".join(f"{100 * value:10.2f}" for value in values) for name, values in rows]
    notes = [f"{title} {100 * value:.2f}" for title, value in rest.items() if not math.isnan(value)]
    last = f"All in percent{''.join(f'; {note}' for note in notes)}."
    if num_absent:
        last += f" {num_absent} classes that do not occur are left out."
    return "\n".join([*lines, last])


def _number(value: float) -> float | int | None:
    return None if math.isnan(value) else value if isinstance(value, int) else float(value)
