"""Reads data sets of the `datasets` library, from disk or streamed, whose columns hold images and labels."""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from .folder import CHOOSE_SPLIT
from .labels import LabelSet
from .rle import decode_mask
from .sample import (
    Sample,
    check_is_exact,
    decode_image,
    empty_masks,
    fit_image,
    make_sample,
    make_sample_of_masks,
)
from .segments import make_sample_of_segments, number_segments, split_class_and_instance

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# Columns that are read if present.
SEGMENTS_COLUMN = "segments_info"
OBJECTS_COLUMN = "objects"
NAME_COLUMN = "name"

# Shards into which a data set of `save_to_disk` is split when streamed.
NUM_SHARDS = 64
# Rows, still encoded, in the shuffle buffer of a stream: a few hundred MB of photographs.
SHUFFLE_BUFFER = 1000


class SegmentationColumns(Dataset[Sample]):
    """Images and their labels in columns of a map-style `datasets.Dataset`.

    Images and label maps have the feature `datasets.Image`. The columns determine what a row's labels are:

    - with a column `objects`, masks that may overlap: for each object its `label` (a class, from 0), `iscrowd`,
      optionally `area`, and mask, as COCO's RLE: `size` (height, width) and compressed `counts`;
    - with a column `segments_info`, a map of ids (one channel, or red + 256 green + 65536 blue) and for each segment
      its `id`, `category_id` (see `LabelSet.category_ids`) and optionally `iscrowd`;
    - with `instance_maps=True`, an RGB map whose red channel is the class and whose green channel is the instance;
    - otherwise a map of classes.

    A column `name` names the samples; without it they are called row_0, row_1, ...

    Args:
        dataset: one split.
        image_column: name of the column of images.
        label_column: name of the column of label maps.
        labels: the classes; stored as an attribute.
        label_source: where `labels` comes from, for messages.
        instance_maps: whether label maps hold class and instance.

    Raises:
        ValueError: a column is missing or holds no images, the data set has a transform, or `labels` says that the
            labels of `objects` count from 1.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        image_column: str = "image",
        label_column: str = "label",
        *,
        labels: LabelSet,
        label_source: str = "id2label",
        instance_maps: bool = False,
    ) -> None:
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a transform (set_transform or with_transform), which would not be called. Use "
                "dataset.map, or AugmentedDataset of hf_maskformer.data.augmented."
            )
        self._reader = _RowReader(dataset, image_column, label_column, labels, instance_maps)
        # Reading a row decodes all of its columns, so unused ones are dropped; a format would decode differently.
        self._dataset = self._reader.encoded(dataset.select_columns(self._reader.columns).with_format(None))
        self.labels = labels
        self.label_source = label_source

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Decodes one sample. Raises a ValueError naming row and column if image or labels are damaged or disagree."""
        return self._reader.sample(self._dataset[index], index)

    def map_source(self, index: int) -> str:
        """Where the segmentation map of a sample comes from, for messages."""
        return self._reader.label_source(index)


class StreamedColumns(IterableDataset[Sample]):
    """The same columns of a streamed `datasets.IterableDataset`, one sample after another.

    Nothing is downloaded or decoded before it is needed. With worker processes, `datasets` gives each its own shards.
    Each worker numbers its own rows.

    Args, Raises: as in `SegmentationColumns`.
    """

    def __init__(
        self,
        dataset: "datasets.IterableDataset",
        image_column: str = "image",
        label_column: str = "label",
        *,
        labels: LabelSet,
        label_source: str = "id2label",
        instance_maps: bool = False,
    ) -> None:
        # The columns of some sources are known only once they are read.
        dataset = dataset if dataset.features is not None else _with_features(dataset)
        self._reader = _RowReader(dataset, image_column, label_column, labels, instance_maps)
        self._dataset = self._reader.encoded(dataset.select_columns(self._reader.columns))
        self.labels = labels
        self.label_source = label_source

    def __iter__(self) -> Iterator[Sample]:
        rows = iter(self._dataset)
        index = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise ValueError(f"the stream cannot be read any further after {index} rows ({error}).") from error
            yield self._reader.sample(row, index)
            index += 1

    def shuffle(self, seed: int = 0, buffer_size: int = SHUFFLE_BUFFER) -> "StreamedColumns":
        """The stream in an order that depends on seed and epoch: shards in random order, rows from a shuffle buffer.

        Rows are then numbered in that order.
        """
        shuffled = copy(self)
        shuffled._dataset = self._dataset.shuffle(seed=seed, buffer_size=buffer_size)
        return shuffled

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles a shuffled stream; training loops call this."""
        self._dataset.set_epoch(epoch)


class _RowReader:
    """Turns rows into samples."""

    def __init__(
        self, dataset: Any, image_column: str, label_column: str, labels: LabelSet, instance_maps: bool
    ) -> None:
        names = dataset.column_names
        self._image_column, self._label_column = image_column, label_column
        self._labels, self._instance_maps = labels, instance_maps
        self._token = next(iter((getattr(dataset, "_token_per_repo_id", None) or {}).values()), None)
        self._extra_column = None
        if OBJECTS_COLUMN in names and label_column not in names:
            self._label_column = self._extra_column = OBJECTS_COLUMN
            if labels.do_reduce_labels:
                raise ValueError(
                    "The labels in column 'objects' count from 0, so do_reduce_labels must be false for these classes."
                )
        else:
            _check_column(dataset, label_column)
            if SEGMENTS_COLUMN in names and not instance_maps:
                self._extra_column = SEGMENTS_COLUMN
        _check_column(dataset, image_column)
        extra = [column for column in (self._extra_column, NAME_COLUMN) if column in names]
        self.columns = list(dict.fromkeys([image_column, self._label_column, *extra]))
        self._image_features = {
            column: dataset.features[column] for column in (image_column, label_column) if column in self.columns
        }

    def encoded(self, dataset: Any) -> Any:
        """The data set with images still encoded: `datasets` would apply the EXIF orientation when decoding."""
        for column, feature in self._image_features.items():
            dataset = dataset.cast_column(column, replace(feature, decode=False))
        return dataset

    def label_source(self, index: int) -> str:
        return f"row {index}, column '{self._label_column}'"

    def sample(self, row: dict[str, Any], index: int) -> Sample:
        for column, cell in row.items():
            if cell is None:
                raise ValueError(f"row {index} is empty in column '{column}'. Remove it from the data set.")
        row = row | {column: self._decoded(row[column], column, index) for column in self._image_features}
        name, image = str(row.get(NAME_COLUMN, f"row_{index}")), row[self._image_column]
        image_source, source = f"row {index}, column '{self._image_column}'", self.label_source(index)
        if self._extra_column == OBJECTS_COLUMN:
            return self._masks(row, name, image_source, source)
        label_image = row[self._label_column]
        if self._extra_column == SEGMENTS_COLUMN:
            segments = number_segments(label_image, _as_rows(row[SEGMENTS_COLUMN]), self._labels, source)
        elif self._instance_maps:
            segments = split_class_and_instance(label_image, self._labels.ignore_index, source)
        else:
            return make_sample(name, image, label_image, image_source, source)
        return make_sample_of_segments(name, image, segments, image_source, source)

    def _decoded(self, cell: Any, column: str, index: int) -> Image.Image:
        from datasets import DownloadConfig
        from datasets.utils.file_utils import xopen

        feature = self._image_features[column]
        if isinstance(cell, Image.Image):
            return cell  # already decoded by a filter or map of the stream
        content = cell["bytes"]
        if content is None:
            # In a stream this may be in an archive or behind a URL.
            try:
                with xopen(cell["path"], "rb", download_config=DownloadConfig(token=self._token)) as file:
                    content = file.read()
            except OSError as error:
                raise ValueError(f"row {index}, column '{column}': {cell['path']} cannot be read ({error}).") from error
        try:
            image = decode_image(content)
        # On damaged files decoders raise OSError, SyntaxError, EOFError, struct.error and more.
        except Exception as error:
            raise ValueError(
                f"row {index}, column '{column}' cannot be decoded ({error}). Remove the row from the data set."
            ) from error
        if column == self._label_column:
            check_is_exact(image, f"row {index}, column '{column}'")
        return image.convert(feature.mode) if feature.mode and image.mode != feature.mode else image

    def _masks(self, row: dict[str, Any], name: str, image_source: str, source: str) -> Sample:
        objects, image = _as_rows(row[OBJECTS_COLUMN]), row[self._image_column]
        for number, entry in enumerate(objects):
            missing = sorted(name for name in ("label", "size", "counts") if (entry or {}).get(name) is None)
            if missing:
                raise ValueError(
                    f"{source}: object {number} has no {', '.join(missing)}. Store each mask as a compressed COCO RLE."
                )
        # The size of the masks tells whether they were drawn on the stored image or on the upright one.
        size = tuple(objects[0]["size"]) if objects else ImageOps.exif_transpose(image).size[::-1]
        image = fit_image(image, size, image_source, source)
        masks = empty_masks(len(objects), size, source)
        for number, (mask, entry) in enumerate(zip(masks, objects, strict=True)):
            try:
                mask[:] = decode_mask(entry, size)
            except ValueError as error:
                raise ValueError(f"{source}: object {number} {error}.") from error
        return make_sample_of_masks(name, image, masks, [entry["label"] for entry in objects], objects, source)


def load_columns(
    path: str,
    split: str,
    image_column: str = "image",
    label_column: str = "label",
    *,
    classes_path: str | Path,
    instance_maps: bool = False,
    streaming: bool = False,
) -> SegmentationColumns | StreamedColumns:
    """Loads one split of a data set from the Hub or from disk.

    Args:
        path: a name on the Hub, a folder written by `save_to_disk`, or a folder of Parquet files.
        split: name of the split. For Parquet files `datasets` takes it from the file names ("train-00000.parquet").
        image_column, label_column, instance_maps: as in `SegmentationColumns`.
        classes_path: a `classes.json` (see `LabelSet.from_json`), since such data sets do not contain one.
        streaming: whether to stream rows instead of downloading everything first.

    Raises:
        ValueError: there is no such split, or a file on disk is truncated; and what `SegmentationColumns` and
            `LabelSet.from_json` raise.
    """
    reader: Any = StreamedColumns if streaming else SegmentationColumns
    return reader(
        _load_split(path, split, streaming),
        image_column,
        label_column,
        labels=LabelSet.from_json(classes_path),
        label_source=str(classes_path),
        instance_maps=instance_maps,
    )


def _load_split(path: str, split: str, streaming: bool) -> Any:
    import datasets

    _check_files(Path(path))
    if (Path(path) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise ValueError(f"{path} has no split '{split}'. Its splits are: {', '.join(splits)}. {CHOOSE_SPLIT}")
        if not streaming:
            return splits[split]
        # In shards, to divide among worker processes and to reshuffle in each epoch.
        return splits[split].to_iterable_dataset(num_shards=max(1, min(NUM_SHARDS, len(splits[split]))))
    if (Path(path) / "state.json").is_file():
        raise ValueError(
            f"{path} holds a single data set without splits. Save a DatasetDict with the split '{split}' instead."
        )
    folder = Path(path).absolute()
    if folder.is_dir() and glob.has_magic(str(folder)):
        raise ValueError(f"`datasets` treats the path {folder} as a pattern. Rename folders with [, ], * or ?.")
    try:
        if not streaming and Path(path).is_dir() and not (Path(path) / "README.md").is_file():
            # Otherwise `datasets` would prepare all splits. A README may hold settings.
            builder = datasets.load_dataset_builder(path)
            files = (builder.config.data_files or {}).get(split)
            if builder.name == "parquet" and files:
                data_files, features = {split: [glob.escape(file) for file in files]}, builder.info.features
                return datasets.load_dataset("parquet", data_files=data_files, features=features, split=split)
        return datasets.load_dataset(path, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError):
        raise
    # Damaged files raise many kinds of error, which do not name the file.
    except Exception as error:
        reason = str(error.__cause__ or error)
        remedy = f" {CHOOSE_SPLIT}" if "Unknown split" in reason else ""
        raise ValueError(f"Split '{split}' of {path} cannot be read ({reason}).{remedy}") from error


def _check_files(folder: Path) -> None:
    """Raises a ValueError that names a truncated file; a stream would reach it only during training."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted([*folder.rglob("*.parquet"), *folder.rglob("*.arrow")])
    for path in paths:
        try:
            if path.suffix == ".parquet":
                pq.read_metadata(path)
            else:
                pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}). Download or write it again.") from error
    _warn_of_missing_files(paths)


def _warn_of_missing_files(paths: Sequence[Path]) -> None:
    """Warns of gaps in numbered files. An error would prevent using a part of a large data set."""
    found: Counter[tuple[Path, str, int]] = Counter()
    for path in paths:
        numbered = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem)
        if numbered:
            found[path.parent / numbered[1], path.suffix, int(numbered[2])] += 1
    for (split, suffix, total), count in found.items():
        if count < total:
            logger.warning(f"Only {count} of the {total} files {split}-*{suffix} exist; the rest is not read.")


def _with_features(dataset: "datasets.IterableDataset") -> "datasets.IterableDataset":
    """The stream with its columns inferred from its first rows."""
    try:
        return dataset._resolve_features()
    except Exception as error:  # from Arrow, the user's functions, or the source's reader
        raise ValueError(
            f"The columns of the stream cannot be inferred from its rows ({error}). Where a map or generator creates "
            "images, declare the columns there: features=datasets.Features({'image': datasets.Image(), ...})."
        ) from error


def _as_rows(cell: Any) -> list[dict[str, Any]]:
    """A list of dictionaries, also where `datasets` turned it into a dictionary of lists."""
    if isinstance(cell, dict):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return cell


def _check_column(dataset: Any, column: str) -> None:
    import datasets

    if column not in dataset.column_names:
        raise ValueError(f"The data set has no column '{column}'. Its columns are: {', '.join(dataset.column_names)}.")
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Image):
        raise ValueError(
            f"Column '{column}' has the feature {feature}, but images are needed. If it holds encoded images or "
            f"paths, use dataset.cast_column('{column}', datasets.Image())."
        )
