"""Converts checkpoints of the paper's code, and ImageNet backbones, to folders that `from_pretrained` loads."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..data.labels import shorten
from ..evaluation.tasks import task_for
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..training.presets import Config, Model, model_class
from .conversion_card import conversion_card
from .key_table import from_original, to_original
from .model_card import CARD_FILE
from .original_checkpoint import OriginalCheckpoint, as_tensor, read_checkpoint

logger = logging.get_logger(__name__)


def convert_checkpoint(
    source: str | Path, output: str | Path, config: Config, image_processor: MaskFormerImageProcessor
) -> Model:
    """Converts a checkpoint and writes the folder: configuration, weights, image processor and model card.

    The folder appears once it is complete, or not at all. A backbone alone gives a model whose other weights are
    random, with a warning.

    Args:
        source: a `.pkl` or `.pth` file; see `read_checkpoint`.
        output: the folder, new or empty.
        config: the configuration that the weights belong to, from `Preset` or `OriginalConfig`.
        image_processor: the matching image processor.

    Returns:
        The model.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: Tensors are unknown, missing or of another shape; they are named (the first five of each kind),
            and no model is built.
    """
    with whole_folder(Path(output)) as folder:
        checkpoint = read_checkpoint(source)
        model = load_original(checkpoint, config)
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        conversion_card(checkpoint, config, task_for(image_processor), Path(output).name).save(folder / CARD_FILE)
    return model


def load_original(checkpoint: OriginalCheckpoint, config: Config) -> Model:
    """Builds a configuration's model with the weights of an original checkpoint. Raises like `convert_checkpoint`."""
    weights = tensors_for(checkpoint, config)
    if checkpoint.left_out:
        logger.info(f"Skipped from {checkpoint.path}, as no model needs it: {shorten(checkpoint.left_out, limit=20)}.")
    model = model_class(config)(config)
    random, _ = model.load_state_dict(weights, strict=not checkpoint.is_backbone)
    if checkpoint.is_backbone:
        logger.warning(
            f"{checkpoint.path} holds a backbone only: {len(random)} other tensors of the model, such as {random[-1]}, "
            "are randomly initialised. Train the model before using it."
        )
    return model.eval()


def load_original_backbone(model: Model, path: str | Path) -> None:
    """Loads a backbone trained on ImageNet, a `.pth` or `.pkl` file (see `read_checkpoint`), into a model.

    Raises:
        ValueError: The file holds a whole model, or tensors of another backbone; they are named.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_backbone:
        raise ValueError(
            f"{path} holds a whole model. To fine-tune it, convert it with scripts/convert_checkpoint.py and give the "
            "folder as --checkpoint."
        )
    model.load_state_dict(tensors_for(checkpoint, model.config), strict=False)


def tensors_for(checkpoint: OriginalCheckpoint, config: Config) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of a configuration's model; an error unless names and shapes match."""
    expected = original_shapes(config)
    if checkpoint.is_backbone:
        expected = {name: tensor for name, tensor in expected.items() if _is_in_backbone_files(name)}
    _check(checkpoint, expected)
    return from_original({name: as_tensor(value) for name, value in checkpoint.tensors.items()})


def original_shapes(config: Config) -> dict[str, Tensor]:
    """The tensors of a model under the original's names, on the meta device to save memory."""
    with torch.device("meta"):
        return to_original(model_class(config)(config).state_dict())


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to write into, which is moved to `output` at the end, and removed on an error.

    Raises:
        FileExistsError: `output` is a file, a non-empty folder, or the current one.
    """
    output = output.resolve()  # follows links
    if output == Path.cwd():
        raise FileExistsError(f"{output} is the current folder, which cannot be replaced. Choose a new one.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Choose a new one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Next to the output, because only a folder on the same disk can be moved atomically.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = scratch / "folder"  # mkdtemp's own is not readable by other users
        folder.mkdir()
        yield folder
        folder.replace(output)
    finally:
        shutil.rmtree(scratch)


def _is_in_backbone_files(name: str) -> bool:
    # MaskFormer's Swin has a norm after each stage, which ImageNet training does not have.
    return name.startswith("backbone.") and not name.startswith(tuple(f"backbone.norm{stage}." for stage in range(4)))


def _check(checkpoint: OriginalCheckpoint, expected: Mapping[str, Tensor]) -> None:
    given, names = checkpoint.tensors, checkpoint.source_names
    unknown = [names[name] for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    misshapen = [
        f"{names[name]} ({_describe(given[name])} there, {_describe(tensor)} in the model)"
        for name, tensor in expected.items()
        if name in given and _describe(given[name]) != _describe(tensor)
    ]
    broken = [names[name] for name, value in given.items() if not _is_finite(value)]
    problems = [
        f"{problem} {shorten(found)}"
        for problem, found in (
            ("unknown to the model:", unknown),
            ("missing from the file:", missing),
            ("of another shape:", misshapen),
            ("NaN or infinite:", broken),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"{checkpoint.path} does not match the configuration. Tensors {'; '.join(problems)}. Check that it is the "
            "configuration of this checkpoint, and that the file is complete."
        )


def _is_finite(value: np.ndarray | Tensor) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return value.dtype.kind != "f" or bool(np.isfinite(value).all())


def _describe(tensor: Any) -> str:
    """Shape, and whether the type is an integer: weights of any precision are accepted."""
    # Not by the name of numpy's type, which is a code for other byte orders.
    is_float = tensor.is_floating_point() if isinstance(tensor, Tensor) else tensor.dtype.kind == "f"
    return f"{list(tensor.shape)}{'' if is_float else ' integers'}"
