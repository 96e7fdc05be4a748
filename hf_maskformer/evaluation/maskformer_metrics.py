"""The metrics as one module for `evaluate.load`, from this file or from a copy of it in a Space on the Hub.

    import evaluate
    from hf_maskformer.evaluation import maskformer_metrics

    metric = evaluate.load(maskformer_metrics.__file__, "panoptic_quality", num_labels=133, thing_ids=range(80))
    metric.add_batch(predictions=predictions, references=references)
    figures = metric.compute()

The other names are "mean_iou" and "average_precision". With the options passed to `load`, as above, images are counted
as they come and none is stored; evaluate's own storage, which holds maps as lists of numbers, is not used.
"""

from typing import Any

import datasets
import evaluate

from hf_maskformer import AveragePrecision, MeanIoU, PanopticQuality

METRICS: dict[str, type[MeanIoU] | type[PanopticQuality] | type[AveragePrecision]] = {
    "mean_iou": MeanIoU,
    "panoptic_quality": PanopticQuality,
    "average_precision": AveragePrecision,
}

LABEL = datasets.Value("int64")
MAP = datasets.Sequence(datasets.Sequence(LABEL))
SEGMENTS = {"segmentation": MAP, "segments_info": [{"id": datasets.Value("int64"), "label_id": LABEL}]}
OBJECTS = {"masks": datasets.Sequence(MAP), "labels": datasets.Sequence(LABEL)}
FEATURES = {
    "mean_iou": {"predictions": MAP, "references": MAP},
    "panoptic_quality": {"predictions": SEGMENTS, "references": SEGMENTS},
    "average_precision": {
        "predictions": {**OBJECTS, "scores": datasets.Sequence(datasets.Value("float64"))},
        "references": OBJECTS,
    },
}


class MaskformerMetrics(evaluate.Metric):
    """One of `METRICS`, with the interface of `evaluate`'s metrics."""

    def __init__(self, config_name: str | None = None, **settings: Any) -> None:
        if config_name not in METRICS:
            raise ValueError(f"There is no metric {config_name!r}. Pass evaluate.load one of {', '.join(METRICS)}.")
        if settings.get("num_process", 1) > 1:
            raise ValueError(
                "Several processes do not exchange counts through files. Use "
                f"hf_maskformer.{METRICS[config_name].__name__} and call merge_over_processes before compute()."
            )
        names = ("num_labels", "ignore_index", "thing_ids")
        options = {name: settings.pop(name) for name in names if name in settings}
        self._counter = METRICS[config_name](**options) if options else None
        super().__init__(config_name, **settings)

    def _info(self) -> evaluate.MetricInfo:
        metric = METRICS[self.config_name]
        return evaluate.MetricInfo(
            description=metric.__doc__ or "",
            citation="",
            inputs_description=metric.add.__doc__ or "",
            features=datasets.Features(FEATURES[self.config_name]),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **_: Any) -> None:
        """Adds one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None, **_: Any) -> None:
        """Adds several images."""
        if self._counter is None:
            raise ValueError("Images are counted as they come: pass evaluate.load the options, such as num_labels=150.")
        self._counter.add_batch(predictions=predictions, references=references)

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any]:
        """Returns the figures over all images added and those passed here, and resets.

        The options of the metric may be passed here instead of to `evaluate.load` if the images are too.
        """
        if options and self._counter is not None:
            raise ValueError(f"The options were set in evaluate.load; leave out {', '.join(options)}.")
        counter = METRICS[self.config_name](**options) if self._counter is None else self._counter
        if predictions is not None:
            counter.add_batch(predictions=predictions, references=references)
        return counter.compute()
