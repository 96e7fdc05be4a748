"""One way to name a labelled data set on a command line."""

from pathlib import Path

from .check import LabelledDataset
from .columns import load_columns
from .folder import SegmentationFolder


def open_dataset(
    path: str, split: str, image_column: str | None = None, label_column: str = "label", classes: str | None = None
) -> LabelledDataset:
    """Opens one split of a data set of samples with their `labels`.

    Args:
        path: a folder with images/, annotations/ and classes.json; or, with `image_column`, a data set of the Hub or
            on disk that `datasets` reads.
        split: "train", "val", or what the data set calls it.
        image_column, label_column: columns of a `datasets` data set.
        classes: the `classes.json` of a `datasets` data set.

    Raises:
        FileNotFoundError, ValueError: there is no such data set, or it is not well formed.
    """
    if image_column is None:
        if classes is not None:
            raise ValueError(f"classes={classes} is for a data set with columns; a folder has its own classes.json.")
        if not Path(path).is_dir():
            raise FileNotFoundError(
                f"{path} is no folder. Name a folder with images/, annotations/ and classes.json, or give image_column "
                "to read a data set of the Hub."
            )
        return SegmentationFolder(path, split)
    if classes is None:
        raise ValueError(
            f"{path} is read by columns, which do not name the classes. Give the path of a classes.json, such as "
            '{"id2label": {"0": "sky", "1": "road"}}.'
        )
    return load_columns(path, split, image_column, label_column, classes_path=classes)
