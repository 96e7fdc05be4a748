"""Finds the complete checkpoints of a run, and checks that the next can be written."""

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


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of Trainer is complete."""
    # Trainer writes the state last. A power failure may still lose what was written before it: a safetensors file
    # stores its own length, and a torch file is a zip archive, whose directory is at its end.
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
    """Raises an OSError if a folder is not writable; it is created if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir {folder} is not writable ({error}). Nothing was trained; choose another.") from error


def check_is_new(folder: Path) -> None:
    """Raises a ValueError if a folder holds checkpoints of another run, with which those of a new one would mix."""
    checkpoint = last_complete_checkpoint(str(folder))
    if checkpoint is not None:
        raise ValueError(
            f"{folder} holds checkpoints of another run, such as {checkpoint}. Resume it with "
            "--resume_from_checkpoint auto, choose another folder with --output_dir, or remove them."
        )


def last_complete_checkpoint(folder: str | None) -> str | None:
    """The path of the latest complete checkpoint in an output folder, or None."""
    checkpoints = sort_checkpoints(folder) if folder and Path(folder).is_dir() else []
    return next(filter(is_complete, reversed(checkpoints)), None)


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | None) -> str | bool | None:
    """The checkpoint from which to resume, as in `MaskFormerTrainer.train`, including its ValueError."""
    if asked is True or asked == "auto":
        return last_complete_checkpoint(output_dir) or asked is True  # for True, Trainer raises if there is none
    if isinstance(asked, str) and not is_complete(asked):
        if not Path(asked).exists():
            raise ValueError(f"{asked} does not exist. Name a folder checkpoint-N of a run, or auto for the last one.")
        raise ValueError(
            f"{asked} is not a complete checkpoint: writing it was cut off, or it is another folder. "
            f"{how_to_resume(output_dir)}."
        )
    return asked


def how_to_resume(folder: str | None) -> str:
    """How to continue an interrupted run, for the end of an error message."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return "There is no earlier checkpoint: start again"
    return f"{checkpoint} is complete: resume from it with resume_from_checkpoint"


def how_to_start_over(folder: str | None) -> str:
    """How to continue a run that diverged, for an error message: resumed, it would keep its learning rate."""
    checkpoint = last_complete_checkpoint(folder)
    start = "Start again" if checkpoint is None else f"Start a new run from {checkpoint} (--checkpoint)"
    return f"{start}, with a lower learning_rate, a smaller max_grad_norm or in higher precision"


@contextmanager
def named_if_not_written(folder: Path, output_dir: str | None) -> Iterator[None]:
    """Raises an OSError that names the folder and how to continue, if writing a model to it fails."""
    try:
        yield
    # As below; but errors of a GPU or of other processes, whose weights are gathered here, have nothing to do with it.
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            f"The model cannot be written to {folder} ({error}). Check the free disk space. "
            f"{how_to_resume(output_dir)}."
        ) from error


@contextmanager
def removed_if_incomplete(checkpoint: Path, output_dir: str | None) -> Iterator[None]:
    """Removes a checkpoint if writing it fails, as on a full disk, and raises an OSError that says how to continue."""
    try:
        yield
    # A full disk raises OSError where Python writes, but not where safetensors and torch do.
    except (OSError, SafetensorError, RuntimeError) as error:
        # Errors after the writing, such as in an upload, or of other threads have nothing to do with the disk.
        if is_complete(checkpoint) or str(error).startswith(DEAD_WORKER):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise OSError(
            f"{checkpoint} cannot be written ({error}) and was removed. Check the free disk space; save_total_limit "
            f"limits the number of checkpoints. {how_to_resume(output_dir)}."
        ) from error
