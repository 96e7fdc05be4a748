"""The optimiser's parameter groups: the backbone has its own learning rate, and some parameters no weight decay."""

from typing import Any

from torch import nn

BACKBONE = "pixel_level_module.encoder."
PYRAMID = "pixel_level_module.encoder.levels."  # new layers on top of a pretrained vision transformer
# Never decayed, as in the paper's code: norms, embeddings, Swin's position bias; nor similar ones of other backbones.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
UNDECAYED_NAMES = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "position_embeddings",
    "cls_token",
    "register_tokens",
    "lambda1",
    "layer_scale_parameter",
)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, backbone_learning_rate_factor: float
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into backbone and the rest, each with and without weight decay.

    Norms, embeddings and Swin's position bias are not decayed; biases of other layers are, as in the paper's code.
    Raises a ValueError if nothing is trainable.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_decayed = not isinstance(module, (*NORMS, nn.Embedding)) and name not in UNDECAYED_NAMES
                is_backbone = BACKBONE in f"{module_name}." and PYRAMID not in f"{module_name}."
                groups.setdefault((is_backbone, is_decayed), []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model has requires_grad=True, so there is nothing to train.")
    return [
        {
            "params": parameters,
            "lr": learning_rate * (backbone_learning_rate_factor if is_backbone else 1.0),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        # The backbone last: Trainer logs the learning rate of the first group.
        for (is_backbone, is_decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
