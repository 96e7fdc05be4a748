"""Reads weights files: those of the paper's model zoo and training runs, and backbones trained on ImageNet."""

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
OF_SEVERAL_GPUS = "module."  # the prefix that DistributedDataParallel adds to each name
# Learning rates and scores next to the tensors may be numpy scalars, whose module has had two names.
_SCALAR = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]
# What a checkpoint may contain although the model does not use it.
LEFTOVERS = re.compile(r"pixel_mean|pixel_std|.*\.num_batches_tracked")
# In ImageNet backbones also the classifier, Swin's norm before it, and Swin's attention masks, which are computed here.
BACKBONE_LEFTOVERS = re.compile(
    r"backbone\.(fc|stem\.fc|head|norm)\.(weight|bias)|backbone\.layers\.\d+\.blocks\.\d+\.attn_mask"
)


@dataclass
class OriginalCheckpoint:
    """The tensors of one file.

    Attributes:
        path: the file.
        tensors: by their names in the paper's training code; read-only views of the file if possible.
        source_names: their names in the file, by the same keys.
        is_backbone: whether the file holds only a backbone trained on ImageNet.
        left_out: names in the file that no model needs.
    """

    path: Path
    tensors: dict[str, np.ndarray | Tensor]
    source_names: dict[str, str]
    is_backbone: bool
    left_out: list[str]


def read_checkpoint(path: str | Path) -> OriginalCheckpoint:
    """Reads a `.pkl` of arrays or a `.pth` of tensors, without executing any code from the file.

    Raises:
        ValueError: The file is of another kind, tries to execute code, or holds anything but named tensors.
    """
    path = Path(path)
    content = _load(path)
    # Training saves the state of optimiser and scheduler next to the model.
    tensors = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither in 'model' or 'state_dict' nor at the top level.")
    others = [
        name
        for name, value in tensors.items()
        if not (isinstance(name, str) and (isinstance(value, np.ndarray) or _is_plain(value)))
    ]
    if others:
        raise ValueError(f"{path} holds {others[0]!r}, which is not a plain tensor with a name.")
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
    """A tensor in native byte order, copied if from numpy."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give a downloaded checkpoint, a .pkl or .pth file.")
    if path.suffix == ".pkl":
        return load_pickle(path)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path} is neither a .pkl (arrays) nor a .pth (tensors) file.")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error) or type(error).__name__
        # torch words it differently for modules that it never allows.
        refused = re.search(r"[Uu]nsupported (?:\w+: )?GLOBAL (\S+)", reason)
        if refused:
            raise ValueError(
                f"{path} asks for {refused[1]}, which is refused and was not run. Get another copy, or, if you trust "
                "it, save its tensors alone."
            ) from error
        # torch embeds its reason in advice to turn `weights_only` off.
        own = re.search(r"WeightsUnpickler error:\s*(.+)", reason)
        raise ValueError(
            f"{path} is not a file of tensors, or asks for more than torch.load allows ({own[1] if own else reason}). "
            "Download it again."
        ) from error


def _spelling(path: Path, names: Collection[str]) -> tuple[Callable[[str], str], bool]:
    """A function that converts names to the training code's, and whether the file is only a backbone."""
    if any(name.startswith("sem_seg_head.") for name in names):
        return training_spelling, False
    if "conv1.weight" in names and any(name.startswith("layer1.") for name in names):
        return lambda name: f"backbone.{_from_torchvision(name)}", True
    if "stem.conv1.weight" in names or "patch_embed.proj.weight" in names:
        return lambda name: f"backbone.{name}", True
    raise ValueError(
        f"{path} is not a checkpoint of MaskFormer, the per-pixel baselines, a ResNet or a Swin: it holds "
        f"{', '.join(sorted(names)[:5])}, ..."
    )


def _from_torchvision(name: str) -> str:
    for pattern, replacement in TORCHVISION_RESNET:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name
