"""Turns checkpoints of the paper's code, and ImageNet backbones, into folders that `from_pretrained` loads."""

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

    The folder appears when all of it is written, or not at all. From a backbone alone comes a model whose other weights
    are random, which a warning says.

    Args:
        source: a `.pkl` or `.pth` file; see `read_checkpoint`.
        output: the folder, new or empty.
        config: the model that the weights belong to, of `Preset` or `OriginalConfig`.
        image_processor: the one that goes with it.

    Returns:
        The model.

    Raises:
        FileExistsError: There is something at `output`.
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
    """Builds the model of a configuration with the weights of an original checkpoint. Raises as convert_checkpoint."""
    weights = tensors_for(checkpoint, config)
    if checkpoint.left_out:
        logger.info(f"Left out of {checkpoint.path}, as no model needs it: {shorten(checkpoint.left_out, limit=20)}.")
    model = model_class(config)(config)
    random, _ = model.load_state_dict(weights, strict=not checkpoint.is_backbone)
    if checkpoint.is_backbone:
        logger.warning(
            f"{checkpoint.path} holds a backbone only: {len(random)} other tensors of the model, such as {random[-1]}, "
            "are as initialised, which is random. Train the model before using it."
        )
    return model.eval()


def load_original_backbone(model: Model, path: str | Path) -> None:
    """Gives a model the weights of a backbone trained on ImageNet, a `.pth` or `.pkl` file (see `read_checkpoint`).

    Raises:
        ValueError: The file holds a whole model, or tensors of another backbone; they are named.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_backbone:
        raise ValueError(
            f"{path} holds a whole model. To go on from it, convert it by scripts/convert_checkpoint.py and give the "
            "folder as --checkpoint."
        )
    model.load_state_dict(tensors_for(checkpoint, model.config), strict=False)


def tensors_for(checkpoint: OriginalCheckpoint, config: Config) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names of a configuration's model, all there and of its shapes, or an error."""
    expected = original_shapes(config)
    if checkpoint.is_backbone:
        expected = {name: tensor for name, tensor in expected.items() if _is_in_backbone_files(name)}
    _check(checkpoint, expected)
    return from_original({name: as_tensor(value) for name, value in checkpoint.tensors.items()})


def original_shapes(config: Config) -> dict[str, Tensor]:
    """The tensors of a model by the original's names, without memory: on the meta device."""
    with torch.device("meta"):
        return to_original(model_class(config)(config).state_dict())


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `output` at the end, and vanishes on an error.

    Raises:
        FileExistsError: `output` is a file, a folder with something in it, or the current one.
    """
    output = output.resolve()  # of a link, what it leads to
    if output == Path.cwd():
        raise FileExistsError(f"{output} is the current folder, which cannot be replaced. Name a new one.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name a new one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, because only a folder on the same disk can be moved in one step.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = scratch / "folder"  # mkdtemp's own is closed to other users
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
            ("missing in the file:", missing),
            ("of another shape:", misshapen),
            ("NaN or infinite:", broken),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"{checkpoint.path} does not fit the configuration. Tensors {'; '.join(problems)}. Is it the configuration "
            "of this very checkpoint, and the file whole?"
        )


def _is_finite(value: np.ndarray | Tensor) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return value.dtype.kind != "f" or bool(np.isfinite(value).all())


def _describe(tensor: Any) -> str:
    """Shape, and whether the numbers are whole: weights of any precision are taken."""
    # The name of a type of numpy in another byte order is a code.
    is_float = tensor.is_floating_point() if isinstance(tensor, Tensor) else tensor.dtype.kind == "f"
    return f"{list(tensor.shape)}{'' if is_float else ' whole numbers'}"
