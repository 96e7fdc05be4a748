"""Writes a data set as Parquet files that `SegmentationColumns` and the Hub read."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .check import LabelledDataset
from .labels import LabelSet, labels_of
from .rle import encode_rle
from .sample import Sample, crowds_of
from .segments import renumber

if TYPE_CHECKING:
    import datasets

# Rows that are buffered until they are written, and that a stream reads at a time.
ROWS_AT_ONCE = 64


def write_parquet(dataset: LabelledDataset, folder: str | Path, split: str, samples_per_file: int = 1000) -> list[Path]:
    """Writes one split to `folder`/data/SPLIT-*.parquet and its classes to `folder`/classes.json.

    Images are stored as the bytes of their files if the data set has them (`image_path`), otherwise as PNG; maps as
    PNG, masks as compressed RLE. Several files let processes and workers share a stream. The files appear only once all
    of them are complete. Shows a progress bar.

    Returns:
        The files.

    Raises:
        ValueError: there is no sample or one cannot be read, a map holds values that a PNG cannot, samples have both
            forms, `datasets` does not accept the split's name, or the folder has other classes, other files of the
            split, or files that do not belong to a Parquet data set.
    """
    labels = labels_of(dataset)
    if len(dataset) == 0:
        raise ValueError(f"The {split} split is empty, so there is nothing to write.")
    if not re.fullmatch(r"\w+(\.\w+)*", split) or split == "all":
        raise ValueError(f"`datasets` reads no split called {split!r}: use letters, digits and _, but not all.")
    if "masks" in dataset[0]:  # whose labels always start at 0
        labels = replace(labels, do_reduce_labels=False)
    folder = Path(folder)
    _check_is_for_parquet(folder)
    classes = folder / "classes.json"
    if classes.is_file() and LabelSet.from_json(classes) != labels:
        raise ValueError(f"{classes} holds other classes. Write this data set to another folder.")
    num_files = -(-len(dataset) // samples_per_file)
    paths = [folder / "data" / f"{split}-{number:05}-of-{num_files:05}.parquet" for number in range(num_files)]
    _check_other_files(paths, split)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    partial = [path.with_suffix(".partial") for path in paths]
    try:
        _write_files(dataset, partial, samples_per_file)
        for path, complete in zip(partial, paths, strict=True):
            os.replace(path, complete)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    if not classes.is_file():
        labels.to_json(classes)
    return paths


def _write_files(dataset: LabelledDataset, paths: list[Path], samples_per_file: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = _features(dataset[0])
    with tqdm(total=len(dataset), desc="Writing samples", unit="sample") as bar:
        for number, path in enumerate(paths):
            indices = range(number * samples_per_file, min((number + 1) * samples_per_file, len(dataset)))
            with pq.ParquetWriter(path, features.arrow_schema) as writer:
                for start in range(0, len(indices), ROWS_AT_ONCE):
                    rows = [_row(dataset, index) for index in indices[start : start + ROWS_AT_ONCE]]
                    _check_columns(rows, features)
                    writer.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema))
                    bar.update(len(rows))


def _features(sample: Sample) -> "datasets.Features":
    import datasets

    integer = datasets.Value("int64")
    columns: dict[str, Any] = {"image": datasets.Image(), "name": datasets.Value("string")}
    if "masks" in sample:
        is_crowd, number, text = datasets.Value("bool"), datasets.Value("float64"), datasets.Value("string")
        columns["objects"] = [
            {"label": integer, "iscrowd": is_crowd, "area": number, "size": [integer], "counts": text}
        ]
    else:
        columns["label"] = datasets.Image()
        if "instance_id_to_semantic_id" in sample:
            columns["segments_info"] = [{"id": integer, "category_id": integer, "iscrowd": datasets.Value("bool")}]
    return datasets.Features(columns)


def _row(dataset: Any, index: int) -> dict[str, Any]:
    sample: Sample = dataset[index]
    if hasattr(dataset, "image_path"):
        path = dataset.image_path(index)
        image = {"bytes": path.read_bytes(), "path": path.name}
    else:
        image = {"bytes": _png(sample["image"]), "path": None}
    row: dict[str, Any] = {"image": image, "name": sample["name"]}
    if "masks" in sample:
        areas = sample["area"].tolist() if "area" in sample else [None] * len(sample["masks"])
        objects = zip(sample["masks"], sample["labels"].tolist(), crowds_of(sample).tolist(), areas, strict=True)
        return row | {
            "objects": [
                {
                    "label": label,
                    "iscrowd": iscrowd,
                    "area": area,
                    "size": list(mask.shape),
                    "counts": encode_rle(mask),
                }
                for mask, label, iscrowd, area in objects
            ]
        }
    segmentation_map = sample["segmentation_map"]
    if "instance_id_to_semantic_id" in sample:
        segmentation_map, row["segments_info"] = _segments(sample, labels_of(dataset))
    return row | {"label": {"bytes": _png(_as_image(segmentation_map, sample["name"])), "path": None}}


def _segments(sample: Sample, labels: LabelSet) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Numbers the segments of a map from 1, in the order of their list; 0 is void."""
    id_to_label = sample["instance_id_to_semantic_id"]
    number_of_id = {segment_id: number for number, segment_id in enumerate(id_to_label, start=1)}
    void = {labels.ignore_index: 0}
    if labels.do_reduce_labels and 0 not in id_to_label:
        void[0] = 0
    numbers, unknown = renumber(sample["segmentation_map"], number_of_id | void)
    if unknown:
        raise ValueError(
            f"{sample['name']} contains ids that instance_id_to_semantic_id lacks. Add them, or set their pixels to "
            "ignore_index."
        )
    segments_info = [
        {
            "id": number_of_id[segment_id],
            "category_id": labels.category_ids[label] if labels.category_ids else label,
            "iscrowd": segment_id in sample.get("crowd_ids", ()),
        }
        for segment_id, label in id_to_label.items()
    ]
    return numbers, segments_info


def _as_image(segmentation_map: np.ndarray, name: str) -> Image.Image:
    lowest, highest = int(segmentation_map.min()), int(segmentation_map.max())
    if lowest < 0 or highest >= 2**16:
        raise ValueError(f"{name} has a map with values from {lowest} to {highest}; a PNG holds 0 to 65535.")
    return Image.fromarray(segmentation_map.astype(np.uint8 if highest < 256 else np.uint16))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _check_columns(rows: list[dict[str, Any]], features: "datasets.Features") -> None:
    for row in rows:
        if row.keys() != features.keys():
            raise ValueError(
                f"{row['name']} has {', '.join(row)}, but other samples {', '.join(features)}. Write each kind to its "
                "own folder."
            )


def _check_is_for_parquet(folder: Path) -> None:
    # This protects above all the data set itself, whose layout would no longer be recognised.
    known = ("data", "classes.json", "README.md")
    others = sorted(path.name for path in folder.glob("*") if path.name not in known and path.name[0] != ".")
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, which does not belong to a Parquet data set. Write to a new folder."
        )


def _check_other_files(paths: list[Path], split: str) -> None:
    # Reading the folder would include these too.
    digits = "[0-9]" * 5
    others = sorted(set(paths[0].parent.glob(f"{split}-{digits}-of-{digits}.parquet")) - set(paths))
    if others:
        raise ValueError(
            f"{others[0].parent} holds files of an earlier {split}, such as {others[0].name}. Remove them, or write to "
            "another folder."
        )
