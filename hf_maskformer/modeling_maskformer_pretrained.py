"""What all models of this package do as transformers' pretrained models: load, save, initialise, set attention."""

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import MaskFormerConfig as StockConfig
from transformers import PreTrainedModel

from .configuration_maskformer import MaskFormerConfig
from .modeling_maskformer_feature_pyramid import switch_attention
from .modeling_maskformer_packing import clear_cache

MAX_PARAMETERS = 10**10  # 40 GB; the largest backbone of transformers has 7e9


class MaskFormerPreTrainedModel(PreTrainedModel):
    """Loading, saving and the initialisation of the paper's code."""

    config_class = MaskFormerConfig
    config: MaskFormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - the base class declares a list
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["TransformerDecoderLayer", "TransformerEncoderLayer", "SwinBlock", "ResNetLayer"]  # noqa: RUF012 - likewise

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As everywhere in transformers; a dictionary may name "decoder_config" and "backbone_config".

        A backbone from transformers that does not have the implementation keeps its own, as our Swin always does.
        """
        if not isinstance(attn_implementation, dict):
            attn_implementation = dict.fromkeys(("", *self.config.sub_configs), attn_implementation)
        unknown = attn_implementation.keys() - {"", *self.config.sub_configs}
        if unknown:
            parts = ", ".join(self.config.sub_configs)
            raise ValueError(f"attn_implementation names {', '.join(sorted(unknown))}, but the parts are {parts}.")
        checked = {
            part: self._check_and_adjust_attn_implementation(name, allow_all_kernels=allow_all_kernels)
            for part, name in attn_implementation.items()
        }
        # No model belongs to the decoder's configuration; transformers' setter would write to the backbone's too.
        for part, config in (("", self.config), ("decoder_config", self.config.decoder_config)):
            if part in checked and config is not None:
                config._attn_implementation_internal = checked[part]
        if "backbone_config" in checked:
            for module in self.modules():
                if isinstance(module, PreTrainedModel) and not isinstance(module, MaskFormerPreTrainedModel):
                    switch_attention(module, checked["backbone_config"])

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution. transformers asks for it to quantise, or for gradient checkpointing with adapters."""
        encoder = self.base_model.get_submodule("pixel_level_module.encoder")
        return next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))

    def post_init(self) -> None:
        # Each model has only some of them, and wrapping policies reject names that they do not find. transformers asks
        # the children of a model for theirs, but a backbone is nested deeper.
        present = {type(module).__name__ for module in self.modules()}
        names = list(type(self)._no_split_modules)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                names += module._no_split_modules or ()
        self._no_split_modules = [name for name in dict.fromkeys(names) if name in present]
        # When loading a checkpoint, nothing is allocated yet: transformers builds models on the meta device first.
        num_parameters = sum(tensor.numel() for tensor in itertools.chain(self.parameters(), self.buffers()))
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"The configuration describes a model of {num_parameters:.1e} parameters, but models here have at most "
                f"{MAX_PARAMETERS:.0e}. Reduce its widths and numbers of layers."
            )
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers.

        Raises:
            OSError: There are no weights, or a weight file is damaged or of another kind.
            ValueError: The configuration is invalid.
            RuntimeError: The shapes of weights do not match the model's.
        """
        check_weight_indices(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if str(pretrained_model_name_or_path).endswith(".json"):
            raise OSError(f"{pretrained_model_name_or_path} is not a weight file. Name the folder that it is in.")
        if "config" in kwargs:
            kwargs["config"] = own_config(kwargs["config"])
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # What transformers passes on from the readers of weights and of their index.
        except (SafetensorError, pickle.UnpicklingError, LookupError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise OSError(
                f"{pretrained_model_name_or_path} cannot be loaded ({reason}). Are its weights damaged or truncated? "
                "Then download them again. Or is an argument of the wrong type?"
            ) from error

    def train(self, mode: bool = True) -> Any:
        if mode:
            clear_cache(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # what moves a model to another device or type
        clear_cache(self)
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        clear_cache(self)  # as torch may swap tensors, which it refuses while anything is cached of them
        return super().load_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every module knows its own initialisation; transformers calls this for those that no checkpoint has filled.
        reset_parameters = getattr(module, "reset_parameters", None)
        if reset_parameters is not None:
            reset_parameters()


def own_config(config: Any) -> Any:
    """Turns transformers' `MaskFormerConfig` into ours, and returns any other configuration unchanged."""
    if not isinstance(config, StockConfig):
        return config
    own = MaskFormerConfig.from_dict(config.to_dict())
    if config._attn_implementation is not None:
        own._attn_implementation = config._attn_implementation
    return own


def check_weight_indices(folder: Any, subfolder: str) -> None:
    """Checks that each weight index in a folder names only files in it; transformers would read any others.

    Raises an OSError; does nothing where no folder is given.
    """
    if not isinstance(folder, str | os.PathLike):
        return
    for path in Path(folder, subfolder).glob("*.index*.json"):  # a variant's name comes in between
        try:
            names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise OSError(f"{path} is not a weight index ({str(error)[:200]}). Download it again.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise OSError(f"{path} names {str(name)[:200]!r}, which is not a file in its folder; do not trust it.")


def first_set(value: bool | None, default: bool | None) -> bool:
    """An argument of a call, or the configuration's field where it is None."""
    return bool(default if value is None else value)
