"""Reads a `datasets` data set with a column of images and a column of label maps."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from .labels import LabelSet
from .sample import Sample, make_sample

if TYPE_CHECKING:
    import datasets


class SegmentationColumns(Dataset[Sample]):
    """Images and segmentation maps of two columns of a map-style `datasets.Dataset`.

    Both columns have the feature `datasets.Image`; the label map's pixels are class indices. A sample of index i is
    `{"image", "segmentation_map", "name"}`, see `Sample`, decoded when it is asked for.

    Args:
        dataset: one split.
        image_column: name of the column of images.
        label_column: name of the column of label maps.
        labels: the classes; kept as an attribute.
        label_source: where `labels` comes from, for messages.

    Raises:
        ValueError: a column is missing or holds no images.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        image_column: str = "image",
        label_column: str = "label",
        *,
        labels: LabelSet,
        label_source: str = "id2label",
    ) -> None:
        for column in (image_column, label_column):
            _check_column(dataset, column)
        # Reading a row decodes all of its columns, so the unused ones go; a format would decode to something else.
        self._dataset = dataset.select_columns([image_column, label_column]).with_format(None)
        self._image_column = image_column
        self._label_column = label_column
        self.labels = labels
        self.label_source = label_source

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Decodes one sample. Raises a ValueError that names row and column if it is damaged or the two disagree."""
        try:
            row = self._dataset[index]
        except IndexError:
            raise
        # Decoders meet damage with OSError, SyntaxError, EOFError, struct.error and more.
        except Exception as error:
            raise ValueError(f"row {index} cannot be decoded ({error}). Remove it from the data set.") from error
        image, label_image = row[self._image_column], row[self._label_column]
        for column, cell in row.items():
            if cell is None:
                raise ValueError(f"row {index} is empty in column '{column}'. Remove it from the data set.")
        image_source = f"row {index}, column '{self._image_column}'"
        return make_sample(f"row_{index}", image, label_image, image_source, self.map_source(index))

    def map_source(self, index: int) -> str:
        """Says where the segmentation map of a sample comes from, for messages."""
        return f"row {index}, column '{self._label_column}'"


def load_columns(
    path: str, split: str, image_column: str = "image", label_column: str = "label", *, classes_path: str | Path
) -> SegmentationColumns:
    """Loads one split of a data set from the Hub or from disk.

    Args:
        path: a name on the Hub, a folder written by `save_to_disk`, or a folder of Parquet files.
        split: name of the split. For Parquet files `datasets` takes it from the file names ("train-00000.parquet").
        image_column, label_column: as in `SegmentationColumns`.
        classes_path: a `classes.json` (see `LabelSet.from_json`), for which such data sets have no place of their own.

    Raises:
        ValueError: there is no such split; and what `SegmentationColumns` and `LabelSet.from_json` raise.
    """
    return SegmentationColumns(
        _load_split(path, split),
        image_column,
        label_column,
        labels=LabelSet.from_json(classes_path),
        label_source=str(classes_path),
    )


def _load_split(path: str, split: str) -> "datasets.Dataset":
    import datasets

    if (Path(path) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise ValueError(f"{path} has no split '{split}'. Its splits are: {', '.join(splits)}.")
        return splits[split]
    if (Path(path) / "state.json").is_file():
        raise ValueError(
            f"{path} holds a single data set without splits. Save a DatasetDict with the split '{split}' instead."
        )
    return datasets.load_dataset(path, split=split)


def _check_column(dataset: "datasets.Dataset", column: str) -> None:
    import datasets

    if column not in dataset.column_names:
        raise ValueError(f"The data set has no column '{column}'. Its columns are: {', '.join(dataset.column_names)}.")
    feature = dataset.features[column]
    if not isinstance(feature, datasets.Image) or not feature.decode:
        raise ValueError(
            f"Column '{column}' has the feature {feature}, but images are needed. If it holds encoded images or "
            f"paths, use dataset.cast_column('{column}', datasets.Image())."
        )
