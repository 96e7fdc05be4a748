"""Reads the files that weights come in: the paper's model zoo and training runs, and backbones trained on ImageNet."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .key_table import training_spelling
from .unpickling import load_pickle

TORCHVISION_RESNET = [
    (r"conv1\.weight", "stem.conv1.weight"),
    (r"bn1\.(.+)", r"stem.conv1.norm.\1"),
    *[
        row
        for stage in (1, 2, 3, 4)
        for row in (
            (rf"layer{stage}\.(\d+)\.conv(\d)\.weight", rf"res{stage + 1}.\1.conv\2.weight"),
            (rf"layer{stage}\.(\d+)\.bn(\d)\.(.+)", rf"res{stage + 1}.\1.conv\2.norm.\3"),
            (rf"layer{stage}\.(\d+)\.downsample\.0\.weight", rf"res{stage + 1}.\1.shortcut.weight"),
            (rf"layer{stage}\.(\d+)\.downsample\.1\.(.+)", rf"res{stage + 1}.\1.shortcut.norm.\2"),
        )
    ],
]
OF_SEVERAL_GPUS = "module."  # what DistributedDataParallel puts before each name
# Learning rates and scores beside the tensors may be numbers of numpy, which has called their module by two names.
_SCALAR = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]
# What a checkpoint may hold although the model has no place for it.
LEFTOVERS = re.compile(r"pixel_mean|pixel_std|.*\.num_batches_tracked")
# In ImageNet backbones also: the classifier, Swin's norm before it, and Swin's attention masks, computed here.
BACKBONE_LEFTOVERS = re.compile(
    r"backbone\.(fc|stem\.fc|head|norm)\.(weight|bias)|backbone\.layers\.\d+\.blocks\.\d+\.attn_mask"
)


@dataclass
class OriginalCheckpoint:
    """The tensors of one file.

    Attributes:
        path: the file.
        tensors: by the names of the paper's training code; read-only views of the file where possible.
        source_names: the names that they have in the file, by those.
        is_backbone: whether the file holds a backbone trained on ImageNet and nothing else.
        left_out: names in the file that no model needs.
    """

    path: Path
    tensors: dict[str, np.ndarray | Tensor]
    source_names: dict[str, str]
    is_backbone: bool
    left_out: list[str]


def read_checkpoint(path: str | Path) -> OriginalCheckpoint:
    """Reads a `.pkl` of arrays or a `.pth` of tensors, without running anything that the file asks for.

    Raises:
        ValueError: The file is of another kind, tries to do more, or holds something else than named tensors.
    """
    path = Path(path)
    content = _load(path)
    # Training writes the state of optimiser and schedule beside the model.
    tensors = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither under 'model' or 'state_dict' nor at its top.")
    others = [
        name
        for name, value in tensors.items()
        if not (isinstance(name, str) and (isinstance(value, np.ndarray) or _is_plain(value)))
    ]
    if others:
        raise ValueError(f"{path} holds {others[0]!r}, which is no plain tensor with a name.")
    prefix = OF_SEVERAL_GPUS if all(name.startswith(OF_SEVERAL_GPUS) for name in tensors) else ""
    rename, is_backbone = _spelling(path, {name.removeprefix(prefix) for name in tensors})

    checkpoint = OriginalCheckpoint(path, {}, {}, is_backbone, [])
    for source_name, value in tensors.items():
        name = rename(source_name.removeprefix(prefix))
        if LEFTOVERS.fullmatch(name) or (is_backbone and BACKBONE_LEFTOVERS.fullmatch(name)):
            checkpoint.left_out.append(source_name)
            continue
        if name in checkpoint.tensors:
            raise ValueError(
                f"{path} holds {source_name} and {checkpoint.source_names[name]}, two spellings of the same tensor."
            )
        checkpoint.tensors[name] = value
        checkpoint.source_names[name] = source_name
    return checkpoint


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def as_tensor(value: np.ndarray | Tensor) -> Tensor:
    """A tensor of its own, in the byte order of this machine."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Name a downloaded checkpoint, a .pkl or .pth file.")
    if path.suffix == ".pkl":
        return load_pickle(path)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path} is neither a .pkl (arrays) nor a .pth (tensors) file.")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error) or type(error).__name__
        refused = re.search(r"Unsupported \w+: GLOBAL (\S+)", reason)
        if refused:
            raise ValueError(
                f"{path} asks for {refused[1]}, which is refused and was not run. Take another copy, or save the "
                "tensors alone where you trust it."
            ) from error
        raise ValueError(
            f"{path} is no file of tensors, or asks for more than torch.load allows ({reason}). Download it again."
        ) from error


def _spelling(path: Path, names: Collection[str]) -> tuple[Callable[[str], str], bool]:
    """How names become those of the training code, and whether the file is a backbone only."""
    if any(name.startswith("sem_seg_head.") for name in names):
        return training_spelling, False
    if "conv1.weight" in names and any(name.startswith("layer1.") for name in names):
        return lambda name: f"backbone.{_from_torchvision(name)}", True
    if "stem.conv1.weight" in names or "patch_embed.proj.weight" in names:
        return lambda name: f"backbone.{name}", True
    raise ValueError(
        f"{path} is no checkpoint of MaskFormer or of the per-pixel baselines, no ResNet and no Swin: it holds "
        f"{', '.join(sorted(names)[:5])}, ..."
    )


def _from_torchvision(name: str) -> str:
    for pattern, replacement in TORCHVISION_RESNET:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name
