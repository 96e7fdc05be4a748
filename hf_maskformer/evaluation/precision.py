"""The precision of inference."""

from typing import Any, Literal

import torch
from transformers import TorchAoConfig

Precision = Literal["float32", "bfloat16", "float16", "int8_weights", "int8"]


def loading_options(precision: Precision | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a model in this precision; None keeps that of the checkpoint.

    "int8_weights" stores the weights of linear layers in 8 bits and computes in float32; "int8" also quantises the
    inputs of these layers dynamically, per position, and multiplies integers. Convolutions are not quantised.

    Raises:
        ImportError: an 8-bit precision without torchao.
    """
    if precision is None:
        return {}
    if not precision.startswith("int8"):
        return {"dtype": getattr(torch, precision)}
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError(f"The precision {precision} needs torchao: pip install torchao ({error}).") from error
    config = Int8WeightOnlyConfig() if precision == "int8_weights" else Int8DynamicActivationInt8WeightConfig()
    return {"dtype": torch.float32, "quantization_config": TorchAoConfig(config)}
