"""With how many bits a model predicts."""

from typing import Any, Literal

import torch
from transformers import TorchAoConfig

Precision = Literal["float32", "bfloat16", "float16", "int8_weights", "int8"]


def loading_options(precision: Precision | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a model of this precision; None leaves that of the checkpoint.

    Of the integers, "int8_weights" stores the weights of linear layers in 8 bits and computes in float32; "int8" also
    rounds what these layers get, to 8 bits per position, and multiplies integers. Convolutions stay as they are.

    Raises:
        ImportError: 8 bits without torchao.
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
