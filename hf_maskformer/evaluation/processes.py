"""Merges metrics across processes."""

from copy import copy

from accelerate.utils import gather_object

from .average_precision import AveragePrecision
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality


def merge_over_processes(metric: MeanIoU | PanopticQuality | AveragePrecision) -> None:
    """Merges the counts of all processes into the metric of each, in process order.

    All processes must call it once, after their last image and before `compute`. No image may have been counted by
    two of them, as happens with distributed samplers that pad the last batch. Needs a process group, as set up by
    `accelerate launch`; in a single process it does nothing.
    """
    if isinstance(metric, MeanIoU):
        # A GPU tensor would be unpickled on that GPU by every process.
        metric.confusion_matrix = metric.confusion_matrix.cpu()
    metrics = gather_object([copy(metric)])
    metric.reset()
    for other in metrics:
        metric.merge(other)
