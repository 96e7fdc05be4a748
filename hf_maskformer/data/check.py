"""Walks a data set before training and reports everything that would stop it later."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from .labels import LabelSet, shorten
from .sample import Sample, check_sizes


class LabelledDataset(Protocol):
    """A map-style data set of samples that knows its classes."""

    labels: LabelSet

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def check_samples(dataset: LabelledDataset, num_workers: int = 8) -> None:
    """Reads every sample and raises one error that lists what is wrong with them.

    Found are damaged files, maps with several channels, maps whose size is not their image's, and labels that are
    neither a class nor ignored. Shows a progress bar. A data set may name the origin of a map by a method
    `map_source(index)` and that of its classes by an attribute `label_source`.

    Args:
        dataset: a data set of this package, or any other of the same sample form.
        num_workers: threads that read at the same time. Decoding runs outside Python's lock.

    Raises:
        ValueError: the first 10 problems, and how many there are.
    """
    problems: list[str] = []
    with ThreadPoolExecutor(num_workers) as pool:
        found = pool.map(lambda index: _find_problems(dataset, index), range(len(dataset)))
        for new_problems in tqdm(found, total=len(dataset), desc="Checking samples", unit="sample"):
            problems.extend(new_problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        shown = f"{count}, of which the first 10" if len(problems) > 10 else count
        raise ValueError(f"The data set of {len(dataset)} samples has {shown}:\n  " + "\n  ".join(problems[:10]))


def _find_problems(dataset: Any, index: int) -> list[str]:
    labels: LabelSet = dataset.labels
    try:
        sample = dataset[index]
        source = dataset.map_source(index) if hasattr(dataset, "map_source") else sample["name"]
        check_sizes(sample["image"], sample["segmentation_map"], sample["name"], source)
    except ValueError as error:
        return [str(error)]

    values = np.unique(sample["segmentation_map"])
    id_to_label = sample.get("instance_id_to_semantic_id")
    if id_to_label is not None:
        ignored = {labels.ignore_index, 0} if labels.do_reduce_labels else {labels.ignore_index}
        without_label = sorted(set(values.tolist()) - set(id_to_label) - ignored)
        if without_label:
            return [f"{source} contains the ids {shorten(without_label)}, which instance_id_to_semantic_id lacks."]
        ids = set(values.tolist()) & set(id_to_label) - {labels.ignore_index}
        values = np.array([id_to_label[segment_id] for segment_id in sorted(ids)], dtype=np.int64)
    return _find_label_problems(values, source, labels, getattr(dataset, "label_source", "id2label"))


def _find_label_problems(values: np.ndarray, source: str, labels: LabelSet, label_source: str) -> list[str]:
    unknown = labels.unknown_values(values)
    if not unknown:
        return []
    first = int(labels.do_reduce_labels)
    return [
        f"{source} contains label {shorten(unknown)}, but {label_source} has {labels.num_labels} labels, which are "
        f"{first} to {labels.num_labels - 1 + first} in the files, and ignore_index {labels.ignore_index}. "
        f"Complete id2label, set ignore_index, or set do_reduce_labels (now {labels.do_reduce_labels}) to "
        f"{not labels.do_reduce_labels}, or repair the file."
    ]
