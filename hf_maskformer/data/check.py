"""Reads a whole data set before training and reports everything that would stop training later."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from .labels import LabelSet, labels_of, shorten
from .sample import Sample, check_sizes, crowds_of, required_fields

# Samples that are submitted to the threads at a time, so that a long data set does not build up a long queue.
BLOCK = 1024

logger = logging.get_logger(__name__)


class LabelledDataset(Protocol):
    """A map-style data set of samples that knows its classes."""

    labels: LabelSet

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass
class DataReport:
    """What `inspect_samples` found.

    Attributes:
        num_samples: samples read.
        problems: what would stop training, one line each.
        empty_segments: segments that are listed but have no pixel, one line for each sample that has any. They are left
            out of training.
        pixels: pixels of each class, (K,) int64; crowds are not counted.
        num_crowds: number of crowds with pixels, which training leaves out.
        num_ignored: pixels of label maps that have the value `ignore_index`.
        occurrences: samples in which each class occurs, (K,) int64.
    """

    num_samples: int = 0
    problems: list[str] = field(default_factory=list)
    empty_segments: list[str] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_crowds: int = 0
    num_ignored: int = 0
    occurrences: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def check_samples(dataset: LabelledDataset, num_workers: int = 8) -> None:
    """Reads every sample and raises one error that lists what is wrong with them.

    Detects damaged files, labels that differ in size from their image, maps with several channels, ids without a label,
    and labels that are neither a class nor ignored. Warns of classes that never occur. Shows a progress bar. A data set
    may name the source of a map in a method `map_source(index)` and that of its classes in an attribute `label_source`.

    Args:
        dataset: a data set of this package, or any other with samples of the same form.
        num_workers: threads that read in parallel. Decoding releases the GIL.

    Raises:
        ValueError: the first 10 problems, and their total number.
    """
    report = inspect_samples(dataset, num_workers)
    problems = report.problems
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        shown = f"{count}, of which the first 10" if len(problems) > 10 else count
        raise ValueError(f"The data set of {len(dataset)} samples has {shown}:\n  " + "\n  ".join(problems[:10]))
    missing = missing_classes(report, labels_of(dataset))
    if missing:
        logger.warning(missing)


def inspect_samples(dataset: LabelledDataset, num_workers: int = 8) -> DataReport:
    """Reads every sample as `check_samples` does, and reports instead of raising. Accepts streamed data sets too."""
    num_labels = labels_of(dataset).num_labels
    report = DataReport(pixels=np.zeros(num_labels, np.int64), occurrences=np.zeros(num_labels, np.int64))
    findings = _inspect_all(dataset, num_workers) if hasattr(dataset, "__len__") else _inspect_stream(dataset)
    total = len(dataset) if hasattr(dataset, "__len__") else None
    for finding in tqdm(findings, total=total, desc="Checking samples", unit="sample"):
        report.num_samples += 1
        report.problems.extend(finding.problems)
        report.empty_segments.extend(finding.empty_segments)
        report.num_crowds += finding.num_crowds
        if len(finding.pixels):
            report.pixels += finding.pixels
            report.num_ignored += finding.num_ignored
            report.occurrences += finding.pixels > 0
    if not report.problems:
        report.problems.extend(_problems_of_the_whole(report, labels_of(dataset)))
    return report


def missing_classes(report: DataReport, labels: LabelSet) -> str:
    """Names the classes that have no pixel in any sample; empty if there are none, or if problems were found."""
    missing = [labels.id2label[label] for label in np.flatnonzero(report.pixels == 0).tolist()]
    # Nothing is counted for samples with a problem.
    if not missing or report.problems:
        return ""
    return (
        f"{len(missing)} of {labels.num_labels} classes have no pixel in any of {report.num_samples} samples: "
        f"{shorten(missing)}.{f' {_hint_at_masks(report, labels)}' if _is_background_alone(report) else ''}"
    )


def _problems_of_the_whole(report: DataReport, labels: LabelSet) -> Iterator[str]:
    """Problems that no single sample shows, since each is well formed."""
    if report.num_crowds and not report.pixels.any():
        yield (
            f"All objects with pixels are crowds ({report.num_crowds} with iscrowd 1), which training leaves out and "
            "no metric scores. Set iscrowd to 0 for single objects: some tools write 1 for every mask."
        )
    elif report.num_samples and not report.pixels.any():
        yield (
            f"None of {report.num_samples} samples has a pixel of any class, so there is nothing to train on. "
            "Look for missing annotations, or for an ignore_index that is the value of a class."
        )
    elif labels.num_labels == 2 and _is_background_alone(report):
        yield f"No sample has a pixel of class 1 ({labels.id2label[1]!r}). {_hint_at_masks(report, labels)}"


def _is_background_alone(report: DataReport) -> bool:
    """Whether all pixels are either class 0 or ignored, and both occur."""
    return report.num_ignored > 0 and report.pixels[0] > 0 and not report.pixels[1:].any()


def _hint_at_masks(report: DataReport, labels: LabelSet) -> str:
    share = report.num_ignored / (report.num_ignored + report.pixels.sum())
    lowest, ignored = int(labels.do_reduce_labels), labels.ignore_index
    return (
        f"{share:.2%} of all pixels are ignored, having the value {ignored}. In masks of {lowest} and {ignored}, write "
        f"the value of the class, {lowest + 1} or another, instead of {ignored}."
    )


def report_as_table(report: DataReport, labels: LabelSet) -> str:
    """One line per class, the most frequent first: its share of all labelled pixels, and how many samples have it."""
    total = max(int(report.pixels.sum()), 1)
    lines = [f"{'label':>5}  {'pixels':>8}  {'samples':>8}  name"]
    for label in np.argsort(-report.pixels, kind="stable").tolist():
        share, samples = report.pixels[label] / total, report.occurrences[label]
        lines.append(f"{label:>5}  {share:>8.3%}  {samples:>8}  {labels.id2label[label]}")
    return "\n".join(lines)


def report_as_json(report: DataReport, labels: LabelSet) -> dict[str, Any]:
    """The report for `json.dumps`, with pixels and samples by class name."""
    classes = {
        name: {"pixels": int(report.pixels[label]), "samples": int(report.occurrences[label])}
        for label, name in labels.id2label.items()
    }
    return {
        "num_samples": report.num_samples,
        "problems": report.problems,
        "empty_segments": report.empty_segments,
        "num_crowds": report.num_crowds,
        "classes": classes,
    }


def _inspect_all(dataset: LabelledDataset, num_workers: int) -> Iterator[DataReport]:
    def inspect(index: int) -> DataReport:
        try:
            sample = dataset[index]
        except ValueError as error:
            return DataReport(problems=[str(error)])
        problem = _problem_of_form(sample, index)
        if problem:
            return DataReport(problems=[problem])
        source = dataset.map_source(index) if hasattr(dataset, "map_source") else sample["name"]
        return _inspect(sample, dataset, source)

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:  # 0, as everywhere, means no extra ones
        for start in range(0, len(dataset), BLOCK):
            yield from pool.map(inspect, range(start, min(start + BLOCK, len(dataset))))


def _inspect_stream(dataset: Any) -> Iterator[DataReport]:
    try:
        for index, sample in enumerate(dataset):
            problem = _problem_of_form(sample, index)
            yield DataReport(problems=[problem]) if problem else _inspect(sample, dataset, sample["name"])
    # An error that ends a stream ends the check too.
    except ValueError as error:
        yield DataReport(problems=[str(error)])


def _problem_of_form(sample: Any, index: int) -> str:
    """What a sample of another reader lacks, or an empty text."""
    missing = [field for field in required_fields(sample) if field not in sample]
    if missing:
        return (
            f"Sample {index} has no {', '.join(missing)}. Give it image, name, and segmentation_map, or masks "
            "and labels (docs/data.md, your own reader)."
        )
    if not isinstance(sample["image"], Image.Image):
        return f"The image of sample {index} is of type {type(sample['image']).__name__}. Make it a PIL image in RGB."
    return ""


def _inspect(sample: Sample, dataset: Any, source: str) -> DataReport:
    """Checks one sample. The report's `num_samples` and `occurrences` stay empty."""
    label_source = getattr(dataset, "label_source", "id2label")
    try:
        if "masks" in sample:
            return _inspect_masks(sample, labels_of(dataset), source, label_source)
        return _inspect_map(sample, labels_of(dataset), source, label_source)
    except ValueError as error:
        return DataReport(problems=[str(error)])


def _inspect_map(sample: Sample, labels: LabelSet, source: str, label_source: str) -> DataReport:
    check_sizes(sample["image"], sample["segmentation_map"].shape, sample["name"], source)
    values, counts = np.unique(sample["segmentation_map"], return_counts=True)
    present = values.tolist()
    id_to_label = sample.get("instance_id_to_semantic_id")
    empty: list[str] = []
    num_crowds = 0
    if id_to_label is not None:
        if id_to_label.get(labels.ignore_index, labels.ignore_index) != labels.ignore_index:
            raise ValueError(
                f"{source} gives a segment the id {labels.ignore_index}, which marks pixels without a segment "
                "(ignore_index), so training would leave it out. Give it another id."
            )
        ignored = {labels.ignore_index, 0} if labels.do_reduce_labels else {labels.ignore_index}
        without_label = sorted(set(present) - set(id_to_label) - ignored)
        if without_label:
            raise ValueError(
                f"{source} contains the ids {shorten(without_label)}, which instance_id_to_semantic_id lacks. Add "
                "them, or set their pixels to ignore_index."
            )
        # Readers renumber segments in list order, so their position in the list identifies them.
        without_pixel = [place for place, segment_id in enumerate(id_to_label) if segment_id not in present]
        if without_pixel:
            empty.append(f"{source} has no pixel of segments {shorten(without_pixel)} in its list, counted from 0.")
        has_label = np.array([value in id_to_label and value != labels.ignore_index for value in present], dtype=bool)
        is_crowd = np.isin(values[has_label], sample.get("crowd_ids", ()))
        values = np.array([id_to_label[value] for value in values[has_label].tolist()], dtype=np.int64)
        counts = counts[has_label] * ~is_crowd
        num_crowds = int(is_crowd.sum())
    _check_labels(values, source, labels, label_source)
    classes = labels.class_map(values)
    is_class = classes != labels.ignore_index
    num_ignored = 0 if id_to_label is not None else counts[values == labels.ignore_index].sum()
    pixels = np.bincount(classes[is_class], counts[is_class], minlength=labels.num_labels)
    return DataReport(
        empty_segments=empty,
        pixels=pixels.astype(np.int64),
        num_crowds=num_crowds,
        num_ignored=int(num_ignored),
    )


def _inspect_masks(sample: Sample, labels: LabelSet, source: str, label_source: str) -> DataReport:
    masks = sample["masks"]
    check_sizes(sample["image"], masks.shape[1:], sample["name"], source)
    is_crowd = crowds_of(sample)
    if not len(masks) == len(sample["labels"]) == len(is_crowd):
        raise ValueError(
            f"{source} has {len(masks)} masks, {len(sample['labels'])} labels and {len(is_crowd)} values of "
            "iscrowd. Give one of each for every object."
        )
    if len(masks) and not 0 <= sample["labels"].min() <= sample["labels"].max() < labels.num_labels:
        unknown = sorted({label for label in sample["labels"].tolist() if not 0 <= label < labels.num_labels})
        raise ValueError(f"{source} contains label {shorten(unknown)}, but {label_source} has {labels.num_labels}.")
    given = np.asarray(sample.get("area", np.zeros(len(masks))))
    if given.shape != (len(masks),) or not ((given >= 0) & (given < np.inf)).all():
        raise ValueError(f"{source} has the area {given.tolist()} for {len(masks)} masks. Give one pixel count each.")
    areas = masks.sum(axis=(1, 2))
    empty = np.flatnonzero(areas == 0).tolist()
    line = f"{source} has no pixel of objects {shorten(empty)} in its list, counted from 0."
    return DataReport(
        empty_segments=[line] if empty else [],
        num_crowds=int((is_crowd & (areas > 0)).sum()),
        pixels=np.bincount(sample["labels"], areas * ~is_crowd, minlength=labels.num_labels).astype(np.int64),
    )


def _check_labels(values: np.ndarray, source: str, labels: LabelSet, label_source: str) -> None:
    unknown = labels.unknown_values(values)
    if not unknown:
        return
    first = int(labels.do_reduce_labels)
    raise ValueError(
        f"{source} contains label {shorten(unknown)}, but {label_source} has {labels.num_labels} labels, which are "
        f"{first} to {labels.num_labels - 1 + first} in the files, and ignore_index {labels.ignore_index}. "
        f"Complete id2label, set ignore_index, set do_reduce_labels (now {labels.do_reduce_labels}) to "
        f"{not labels.do_reduce_labels}, or fix the file."
    )
