"""COCO's matching of predictions with objects, and its precision-recall curve: pure functions of arrays.

D predictions and G reference objects of one label in one image, N predictions of one label in all images, T IoU
thresholds, A = 4 area ranges (all, small, medium, large), R recalls.
"""

from itertools import pairwise

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# Ranges include both ends, so an object of exactly 32 x 32 pixels is both small and medium.
AREAS = np.array([[0, 1e10], *pairwise([0, 32**2, 96**2, 1e10])])


def is_outside(areas: np.ndarray) -> np.ndarray:
    """Which areas are outside each range, (A, N)."""
    return (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])


def match(
    ious: np.ndarray, is_outside_of_range: np.ndarray, is_crowd: np.ndarray, areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds hits (true positives) and false alarms (false positives); other predictions are not counted.

    Each prediction, in score order, is matched with the unmatched object of highest IoU, if the IoU reaches the
    threshold; objects that count take precedence over others. A crowd region can be matched any number of times.

    Args:
        ious: (D, G), the predictions by descending score.
        is_outside_of_range: (A, G), objects that do not count in an area range.
        is_crowd: (G,), objects that never count.
        areas: (D,), of the predictions.

    Returns hits and false alarms, (D, A, T) bool.
    """
    num_predictions, num_objects = ious.shape
    shape = (len(AREAS), len(THRESHOLDS), num_objects)
    counts = np.broadcast_to(~(is_outside_of_range | is_crowd)[:, None], shape)
    is_free = np.ones(shape, dtype=bool)
    is_true_positive = np.zeros((num_predictions, *shape[:2]), dtype=bool)
    is_matched = is_true_positive.copy()
    # Predictions below the lowest threshold everywhere are skipped, as are most with a low score.
    for prediction in np.flatnonzero((ious >= THRESHOLDS[0]).any(1)):
        reaches = is_free & (ious[prediction] >= THRESHOLDS[:, None])
        reaches_counted = reaches & counts
        is_true_positive[prediction] = reaches_counted.any(-1)
        is_matched[prediction] = reaches.any(-1)
        reaches = np.where(is_true_positive[prediction][..., None], reaches_counted, reaches)
        # Ties in IoU go to the last object, as in COCO's code.
        best = num_objects - 1 - np.where(reaches, ious[prediction], -1)[..., ::-1].argmax(-1)
        taken = is_matched[prediction][..., None] & (np.arange(num_objects) == best[..., None])
        is_free &= ~taken | is_crowd
    is_false_positive = ~is_matched & ~is_outside(areas).T[..., None]
    return is_true_positive, is_false_positive


def curve(is_true_positive: np.ndarray, is_false_positive: np.ndarray, num_objects: int) -> np.ndarray:
    """Returns the interpolated precision at each recall (the highest at that recall or above), (T, R).

    Args:
        is_true_positive, is_false_positive: (N, T), by descending score.
        num_objects: reference objects, at least one.
    """
    true_positives, false_positives = is_true_positive.cumsum(0), is_false_positive.cumsum(0)
    recall = true_positives / num_objects
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    precision = np.concatenate([precision, np.zeros((1, precision.shape[1]))])  # recalls that are never reached
    places = np.array([np.searchsorted(column, RECALLS) for column in recall.T])
    return np.take_along_axis(precision.T, places, axis=1)
