"""Which checkpoints of a training are whole, and where the next can be written."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ..data.workers import DEAD_WORKER


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of Trainer was written to its end."""
    # Trainer writes the state last. A power failure may still lose what was written before it: a file of safetensors
    # says how long it is, and a file of torch is a zip archive, whose directory comes at its end.
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for suffix in ("*.pt", "*.pth") for path in folder.glob(suffix))


def check_writable(folder: Path) -> None:
    """Raises an OSError if no file can be written into a folder, which is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written ({error}). Nothing was trained; name another.") from error


def check_is_new(folder: Path) -> None:
    """Raises a ValueError if a folder holds checkpoints of another training, with which a new one's would mix."""
    checkpoint = last_whole_checkpoint(str(folder))
    if checkpoint is not None:
        raise ValueError(
            f"{folder} holds checkpoints of another run, such as {checkpoint}. Go on with it by "
            "--resume_from_checkpoint auto, name another folder by --output_dir, or remove them."
        )


def last_whole_checkpoint(folder: str | None) -> str | None:
    """The path of the latest checkpoint in an output folder that was written to its end, or None."""
    checkpoints = sort_checkpoints(folder) if folder and Path(folder).is_dir() else []
    return next(filter(is_whole, reversed(checkpoints)), None)


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | None) -> str | bool | None:
    """The checkpoint from which a training goes on, as `MaskFormerTrainer.train` explains; raises a ValueError too."""
    if asked is True or asked == "auto":
        return last_whole_checkpoint(output_dir) or asked is True  # of True, Trainer says that there is none
    if isinstance(asked, str) and not is_whole(asked):
        raise ValueError(
            f"{asked} is no whole checkpoint: it is not there, or its writing was cut off. {way_on(output_dir)}."
        )
    return asked


def way_on(folder: str | None) -> str:
    """How to continue a training that broke off, for the end of an error message."""
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return "There is no earlier checkpoint: start anew"
    return f"{checkpoint} is whole: go on from there by resume_from_checkpoint"


@contextmanager
def named_if_not_written(folder: Path, output_dir: str | None) -> Iterator[None]:
    """Raises an OSError that names the folder and the way on, if the writing of a model to it fails."""
    try:
        yield
    # As below; but errors of a GPU or of other processes, whose weights come together here, are no matter of the disk.
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            f"The model cannot be written to {folder} ({error}). See that there is room. {way_on(output_dir)}."
        ) from error


@contextmanager
def removed_if_cut_off(checkpoint: Path, output_dir: str | None) -> Iterator[None]:
    """Removes a checkpoint whose writing fails, as on a full disk, and raises an OSError that names the way on."""
    try:
        yield
    # A full disk is an OSError where Python writes, but not where safetensors and torch do.
    except (OSError, SafetensorError, RuntimeError) as error:
        # What follows the writing, such as an upload, or what happens meanwhile is no matter of the disk.
        if is_whole(checkpoint) or str(error).startswith(DEAD_WORKER):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise OSError(
            f"{checkpoint} cannot be written ({error}) and was removed. See that there is room; save_total_limit "
            f"bounds how much checkpoints take. {way_on(output_dir)}."
        ) from error
