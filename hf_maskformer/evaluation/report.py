"""The figures of an evaluation as JSON and as a table."""

import math
from collections.abc import Mapping
from typing import Any

PER_CATEGORY = "per_category_"


def as_json(figures: Mapping[str, Any], id2label: Mapping[int, str]) -> dict[str, Any]:
    """Makes the figures of `MeanIoU.compute` serialisable: per-class arrays become {class: value, None if absent}."""
    return {
        name: {id2label[label]: None if math.isnan(score) else float(score) for label, score in enumerate(value)}
        if name.startswith(PER_CATEGORY)
        else value
        for name, value in figures.items()
    }


def as_table(figures: Mapping[str, Any], id2label: Mapping[int, str]) -> str:
    """Formats the figures of `MeanIoU.compute` in percent: one line per class, then the means."""
    per_class = [
        (id2label[label], iou, accuracy)
        for label, (iou, accuracy) in enumerate(
            zip(figures["per_category_iou"], figures["per_category_accuracy"], strict=True)
        )
    ]
    rows = [*per_class, ("mean", figures["mean_iou"], figures["mean_accuracy"])]
    width = max(len("class"), *(len(name) for name, *_ in rows))
    lines = [f"{'class':<{width}}     IoU  accuracy"]
    lines += [f"{name:<{width}}  {100 * iou:6.2f}    {100 * accuracy:6.2f}" for name, iou, accuracy in rows]
    lines.append(f"Pixel accuracy {100 * figures['overall_accuracy']:.2f}, ")
    lines[-1] += f"frequency-weighted IoU {100 * figures['frequency_weighted_iou']:.2f}. All in percent."
    return "\n".join(lines)
