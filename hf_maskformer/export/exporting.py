"""Writes a model as one file for ONNX Runtime or `torch.export.load`, and beside it its configuration files."""

import importlib.util
from copy import copy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..image_processing_maskformer_settings import DEFAULT_PANOPTIC_THRESHOLDS
from ..modeling_maskformer_dispatch import PLAIN_TYPES
from ..modeling_maskformer_feature_pyramid import SimpleFeaturePyramid
from ..post_processing_maskformer_inputs import Size, check_thresholds
from .heads import Logits, Panoptic, PerPixelLogits, Semantic

Format = Literal["onnx", "torch_export"]
Output = Literal["logits", "semantic", "panoptic"]
OPSET = 18
SMALLEST_SIDE = 33  # of an image, in pixels: smaller ones leave a single row or column at stride 32
# Nothing of this size is computed. Prime sides and several windows at every stage of any Swin keep sizes apart that the
# program must not take for equal.
EXAMPLE_SIZE = (1061, 1373)


@torch.no_grad()
def export_model(
    model: PreTrainedModel,
    image_processor: MaskFormerImageProcessor,
    folder: str | Path,
    format: Format = "onnx",
    task: Output = "logits",
    size: Size | None = None,
    output_size: Size | None = None,
    **thresholds: float,
) -> Path:
    """Writes the model with `task` inside, and its `config.json` and `preprocessor_config.json`, into a folder.

    Args:
        model: A `MaskFormerForInstanceSegmentation` or a per-pixel baseline, in float32 on the CPU. Its modules keep
            their modes, training or evaluation.
        image_processor: Defines how images become `pixel_values`, and which labels panoptic segmentation fuses.
        folder: Created if missing. Not that of a checkpoint, whose configuration would be overwritten.
        format: "onnx" gives `model.onnx`, "torch_export" gives `model.pt2`.
        task: What the file computes from `pixel_values` (B, 3, H, W); see `heads`.
        size: (H, W) of all images, to which the saved image processor then resizes them. By default any size of at
            least 33 pixels each way, with a ResNet or Swin; with other backbones what their code allows. The batch size
            is always dynamic.
        output_size: (height, width) of the segmentation; by default that of the images.
        thresholds: Of `Panoptic`, for that task only; by default the image processor's `panoptic_thresholds`.

    Returns:
        The path of the file.

    Raises:
        ValueError: Format or task is unknown, the model does not support the task, a threshold does not belong to the
            task or is not a number from 0 to 1, weights are 8-bit, or a size is too small, or missing for a plain
            vision transformer.
        FileExistsError: The folder is a file, or holds a checkpoint.
        ImportError: What ONNX needs is not installed.
    """
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}, but must be one of {get_args(Format)}.")
    if format == "onnx":
        check_installed("onnx", "onnxscript")
    if size is not None and min(size) < SMALLEST_SIDE:
        raise ValueError(f"size is {tuple(size)}, but both sides must have at least {SMALLEST_SIDE} pixels.")
    if size is None and any(isinstance(module, SimpleFeaturePyramid) for module in model.modules()):
        raise ValueError("The backbone splits images into whole patches, so it does not accept every size. Give size.")
    if output_size is not None and min(output_size) < 1:
        raise ValueError(f"output_size is {tuple(output_size)}, but height and width must be positive.")
    if any(type(parameter) not in PLAIN_TYPES for parameter in model.parameters()):
        raise ValueError("8-bit weights cannot be exported. Export the model that was quantised.")
    if (model.dtype, model.device.type) != (torch.float32, "cpu"):
        raise ValueError(f"The model is in {model.dtype} on {model.device}. Export model.float().cpu() instead.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder.")
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if weights:
        raise FileExistsError(
            f"{folder} holds {weights[0].name}, to which its config.json and preprocessor_config.json belong; they "
            f"would be overwritten. Name another folder, such as {folder / 'exported'}."
        )
    head = build_head(model, image_processor, task, output_size, **thresholds)
    modes = [(module, module.training) for module in model.modules()]
    try:
        program = trace(head.eval(), size, getattr(model.config.backbone_config, "num_channels", 3))
    finally:
        for module, is_training in modes:
            module.training = is_training
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / {"onnx": "model.onnx", "torch_export": "model.pt2"}[format]
    if format == "torch_export":
        program.example_inputs = None  # 17 million numbers, which would be saved with it
        torch.export.save(program, path)
    else:
        outputs = list(head.output_names)
        onnx_program: Any = torch.onnx.export(
            program, input_names=["pixel_values"], output_names=outputs, opset_version=OPSET, dynamo=True
        )
        onnx_program.save(path)
    model.config.save_pretrained(folder)
    if size is not None:
        image_processor = at_size(image_processor, size)
    image_processor.save_pretrained(folder)
    return path


def at_size(image_processor: MaskFormerImageProcessor, size: Size) -> MaskFormerImageProcessor:
    """A copy that resizes every image to exactly this size."""
    fixed = copy(image_processor)
    fixed.do_resize, fixed.size = True, {"height": size[0], "width": size[1]}
    fixed.size_divisor, fixed.pad_size = 0, None
    return fixed


def check_installed(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"ONNX needs {', '.join(missing)}: pip install 'hf-maskformer[export]'.")


def build_head(
    model: PreTrainedModel,
    image_processor: MaskFormerImageProcessor,
    task: Output,
    output_size: Size | None = None,
    **thresholds: float,
) -> Any:
    """The module that is exported; see `export_model`."""
    if task not in get_args(Output):
        raise ValueError(f"task is {task!r}, but must be one of {get_args(Output)}.")
    if thresholds and task != "panoptic":
        raise ValueError(f"Only the task 'panoptic' has thresholds, but {task!r} was given {', '.join(thresholds)}.")
    unknown = sorted(thresholds.keys() - DEFAULT_PANOPTIC_THRESHOLDS.keys())
    if unknown:
        raise ValueError(f"There is no {', '.join(unknown)}; thresholds are {', '.join(DEFAULT_PANOPTIC_THRESHOLDS)}.")
    check_thresholds(**thresholds)
    is_per_pixel = is_per_pixel_baseline(model)
    logits: Any = PerPixelLogits(model) if is_per_pixel else Logits(model)  # type: ignore[arg-type]
    if task == "logits":
        if output_size is not None:
            raise ValueError("output_size needs a segmentation: give task='semantic' or 'panoptic', or leave it out.")
        return logits
    if task == "semantic":
        return Semantic(logits, output_size)
    if is_per_pixel:
        raise ValueError("The model is a per-pixel baseline, which has no segments: give task='semantic' or 'logits'.")
    fused = getattr(image_processor, "label_ids_to_fuse", None) or ()
    thresholds = (getattr(image_processor, "panoptic_thresholds", None) or {}) | thresholds
    return Panoptic(logits, label_ids_to_fuse=fused, output_size=output_size, **thresholds)


@torch.no_grad()
def trace(head: nn.Module, size: Size | None = None, num_channels: int = 3) -> ExportedProgram:
    """The program of a module that takes pixel values of any batch size and, unless given, any size."""
    side = Dim.DYNAMIC if size is None else Dim.STATIC
    pixel_values = torch.zeros(2, num_channels, *(size or EXAMPLE_SIZE))
    program = torch.export.export(
        head,
        (pixel_values,),
        dynamic_shapes={"pixel_values": {0: Dim.DYNAMIC, 2: side, 3: side}},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    # Tracing records which sizes leave a tensor of one row or no padding, where its strides could be read in another
    # way. Every operation here supports these sizes too, so these assertions would only reject images.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
