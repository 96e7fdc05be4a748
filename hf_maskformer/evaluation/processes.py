"""Brings together what several processes have counted."""

from copy import copy

from accelerate.utils import gather_object

from .average_precision import AveragePrecision
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality


def merge_over_processes(metric: MeanIoU | PanopticQuality | AveragePrecision) -> None:
    """Gives the metric of every process the counts of all, in the order of the processes.

    To be called by all processes once, after their last image and before `compute`. No image may have been counted by
    two of them, as distributed samplers do that fill up the last batch. Needs a process group, as `accelerate launch`
    sets it up; alone, it does nothing.
    """
    if isinstance(metric, MeanIoU):
        # A tensor of a GPU would be unpickled on that GPU by every process.
        metric.confusion_matrix = metric.confusion_matrix.cpu()
    metrics = gather_object([copy(metric)])
    metric.reset()
    for other in metrics:
        metric.merge(other)
