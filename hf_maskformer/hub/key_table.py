"""Maps the tensor names of the paper's checkpoints to ours, as one table that is read in both directions.

`{i}`, `{j}` stand for numbers and `{tail}` for the rest of a name. Where one tensor there is three here, our side is a
tuple: the original stores query, key and value in one matrix, stacked along the first axis.
"""

import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

ENCODER = "model.pixel_level_module.encoder"
PIXEL_DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
DECODER_LAYER = f"{TRANSFORMER}.decoder.layers.{{i}}"
ORIGINAL_DECODER = "sem_seg_head.predictor.transformer.decoder"
ORIGINAL_LAYER = f"{ORIGINAL_DECODER}.layers.{{i}}"
SWIN_BLOCK = f"{ENCODER}.model.encoder.layers.{{i}}.blocks.{{j}}"
ORIGINAL_BLOCK = "backbone.layers.{i}.blocks.{j}"

Row = tuple[str, str | tuple[str, ...]]
CompiledRow = tuple[re.Pattern[str], list[str]]


def attention_rows(there: str, here: str) -> list[Row]:
    """The rows of an attention module."""
    return [
        (f"{there}.in_proj_{{tail}}", tuple(f"{here}.{name}_proj.{{tail}}" for name in "qkv")),
        (f"{there}.out_proj.{{tail}}", f"{here}.out_proj.{{tail}}"),
    ]


def encoder_rows(there: str, here: str) -> list[Row]:
    """The rows of transformer encoder layers, and of the norm that follows them in a pre-norm model."""
    layer_there, layer_here = f"{there}.layers.{{i}}", f"{here}.layers.{{i}}"
    return [
        *attention_rows(f"{layer_there}.self_attn", f"{layer_here}.self_attn"),
        (f"{layer_there}.linear1.{{tail}}", f"{layer_here}.fc1.{{tail}}"),
        (f"{layer_there}.linear2.{{tail}}", f"{layer_here}.fc2.{{tail}}"),
        (f"{layer_there}.norm1.{{tail}}", f"{layer_here}.self_attn_layer_norm.{{tail}}"),
        (f"{layer_there}.norm2.{{tail}}", f"{layer_here}.final_layer_norm.{{tail}}"),
        (f"{there}.norm.{{tail}}", f"{here}.layernorm.{{tail}}"),
    ]


STEM = f"{ENCODER}.embedder.embedder"
PLAIN_STEM: list[Row] = [
    ("backbone.stem.conv1.weight", f"{STEM}.convolution.weight"),
    ("backbone.stem.conv1.norm.{tail}", f"{STEM}.normalization.{{tail}}"),
]
DEEP_STEM: list[Row] = [
    row
    for index in range(3)
    for row in (
        (f"backbone.stem.conv{index + 1}.weight", f"{STEM}.{index}.convolution.weight"),
        (f"backbone.stem.conv{index + 1}.norm.{{tail}}", f"{STEM}.{index}.normalization.{{tail}}"),
    )
]
RESNET: list[Row] = [
    row
    for stage in range(4)
    for there, here in (("shortcut", "shortcut"), ("conv1", "layer.0"), ("conv2", "layer.1"), ("conv3", "layer.2"))
    for row in (
        (
            f"backbone.res{stage + 2}.{{i}}.{there}.weight",
            f"{ENCODER}.encoder.stages.{stage}.layers.{{i}}.{here}.convolution.weight",
        ),
        (
            f"backbone.res{stage + 2}.{{i}}.{there}.norm.{{tail}}",
            f"{ENCODER}.encoder.stages.{stage}.layers.{{i}}.{here}.normalization.{{tail}}",
        ),
    )
]
SWIN: list[Row] = [
    ("backbone.patch_embed.proj.{tail}", f"{ENCODER}.model.embeddings.patch_embeddings.projection.{{tail}}"),
    ("backbone.patch_embed.norm.{tail}", f"{ENCODER}.model.embeddings.norm.{{tail}}"),
    (
        f"{ORIGINAL_BLOCK}.attn.qkv.{{tail}}",
        tuple(f"{SWIN_BLOCK}.attention.self.{name}.{{tail}}" for name in ("query", "key", "value")),
    ),
    (f"{ORIGINAL_BLOCK}.attn.proj.{{tail}}", f"{SWIN_BLOCK}.attention.output.dense.{{tail}}"),
    (f"{ORIGINAL_BLOCK}.attn.{{tail}}", f"{SWIN_BLOCK}.attention.self.{{tail}}"),
    (f"{ORIGINAL_BLOCK}.norm1.{{tail}}", f"{SWIN_BLOCK}.layernorm_before.{{tail}}"),
    (f"{ORIGINAL_BLOCK}.norm2.{{tail}}", f"{SWIN_BLOCK}.layernorm_after.{{tail}}"),
    (f"{ORIGINAL_BLOCK}.mlp.fc1.{{tail}}", f"{SWIN_BLOCK}.intermediate.dense.{{tail}}"),
    (f"{ORIGINAL_BLOCK}.mlp.fc2.{{tail}}", f"{SWIN_BLOCK}.output.dense.{{tail}}"),
    ("backbone.layers.{i}.downsample.{tail}", f"{ENCODER}.model.encoder.layers.{{i}}.downsample.{{tail}}"),
    *[(f"backbone.norm{stage}.{{tail}}", f"{ENCODER}.hidden_states_norms.{stage}.{{tail}}") for stage in range(4)],
]
# The original numbers levels from the finest (1) to the coarsest (4); here they are in the order of computation.
PYRAMID: list[Row] = [
    ("sem_seg_head.pixel_decoder.layer_4.weight", f"{PIXEL_DECODER}.fpn.stem.0.weight"),
    ("sem_seg_head.pixel_decoder.layer_4.norm.{tail}", f"{PIXEL_DECODER}.fpn.stem.1.{{tail}}"),
    *[
        row
        for layer, level in enumerate((3, 2, 1))
        for there, here in ((f"adapter_{level}", f"layers.{layer}.proj"), (f"layer_{level}", f"layers.{layer}.block"))
        for row in (
            (f"sem_seg_head.pixel_decoder.{there}.weight", f"{PIXEL_DECODER}.fpn.{here}.0.weight"),
            (f"sem_seg_head.pixel_decoder.{there}.norm.{{tail}}", f"{PIXEL_DECODER}.fpn.{here}.1.{{tail}}"),
        )
    ],
    ("sem_seg_head.pixel_decoder.mask_features.{tail}", f"{PIXEL_DECODER}.mask_projection.{{tail}}"),
    ("sem_seg_head.pixel_decoder.input_proj.{tail}", f"{PIXEL_DECODER}.input_projection.{{tail}}"),
    *encoder_rows("sem_seg_head.pixel_decoder.transformer.encoder", f"{PIXEL_DECODER}.encoder"),
]
TRANSFORMER_DECODER: list[Row] = [
    ("sem_seg_head.predictor.query_embed.weight", f"{TRANSFORMER}.queries_embedder.weight"),
    ("sem_seg_head.predictor.input_proj.{tail}", f"{TRANSFORMER}.input_projection.{{tail}}"),
    *encoder_rows("sem_seg_head.predictor.transformer.encoder", f"{TRANSFORMER}.encoder"),
    *attention_rows(f"{ORIGINAL_LAYER}.self_attn", f"{DECODER_LAYER}.self_attn"),
    *attention_rows(f"{ORIGINAL_LAYER}.multihead_attn", f"{DECODER_LAYER}.encoder_attn"),
    (f"{ORIGINAL_LAYER}.linear1.{{tail}}", f"{DECODER_LAYER}.fc1.{{tail}}"),
    (f"{ORIGINAL_LAYER}.linear2.{{tail}}", f"{DECODER_LAYER}.fc2.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm1.{{tail}}", f"{DECODER_LAYER}.self_attn_layer_norm.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm2.{{tail}}", f"{DECODER_LAYER}.encoder_attn_layer_norm.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm3.{{tail}}", f"{DECODER_LAYER}.final_layer_norm.{{tail}}"),
    (f"{ORIGINAL_DECODER}.norm.{{tail}}", f"{TRANSFORMER}.decoder.layernorm.{{tail}}"),
]
HEADS: list[Row] = [
    ("sem_seg_head.predictor.class_embed.{tail}", "class_predictor.{tail}"),
    ("sem_seg_head.predictor.mask_embed.layers.{i}.{tail}", "mask_embedder.{i}.0.{tail}"),
    ("criterion.empty_weight", "criterion.empty_weight"),
    # The per-pixel baseline's.
    ("sem_seg_head.predictor.weight", "classifier.weight"),
    ("sem_seg_head.predictor.bias", "classifier.bias"),
]
KEY_TABLE: list[Row] = [*RESNET, *SWIN, *PYRAMID, *TRANSFORMER_DECODER, *HEADS]

# Here, but not in the original: counters of batch normalisation and Swin's unused final norm.
ONLY_HERE = re.compile(rf"(.*\.normalization\.num_batches_tracked|{re.escape(ENCODER)}\.model\.layernorm\..*)")


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from the original's names to ours.

    Both of the original's spellings are accepted: that of its training checkpoints, and that of its model zoo, which
    omits `pixel_decoder.`.

    Raises:
        ValueError: A name is not in the table.
    """
    renamed: dict[str, Tensor] = {}
    rows = _rows_from_original(deep_stem="backbone.stem.conv2.weight" in tensors)
    for name, tensor in tensors.items():
        targets = _translate(training_spelling(name), rows)
        pieces = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
        renamed.update(zip(targets, pieces, strict=True))
    for name in [name for name in renamed if name.endswith(".normalization.running_mean")]:
        renamed[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    last_norm = renamed.get(f"{ENCODER}.hidden_states_norms.3.weight")
    if last_norm is not None:
        renamed[f"{ENCODER}.model.layernorm.weight"] = torch.ones_like(last_norm)
        renamed[f"{ENCODER}.model.layernorm.bias"] = torch.zeros_like(last_norm)
    return renamed


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors (weights, or their gradients) from our names to those of the original's training checkpoints.

    Raises:
        ValueError: A name is not in the table, or one of query, key and value is given without the others.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if ONLY_HERE.fullmatch(name):
            continue
        (target,) = _translate(name, _rows_to_original())
        siblings = _translate(target, _rows_from_original(deep_stem=True))
        if len(siblings) == 1:
            renamed[target] = tensor
        else:
            parts.setdefault(target, {})[siblings.index(name)] = tensor
    for target, pieces in parts.items():
        if len(pieces) != 3:
            raise ValueError(f"{target} is made of query, key and value, but only {len(pieces)} of them are given.")
        renamed[target] = torch.cat([pieces[index] for index in range(3)])
    return renamed


def training_spelling(name: str) -> str:
    """Normalises a name from a training checkpoint or the model zoo to the former, with `pixel_decoder.`."""
    head, _, rest = name.partition("sem_seg_head.")
    if head or not rest or rest.startswith(("predictor.", "pixel_decoder.")):
        return name
    return f"sem_seg_head.pixel_decoder.{rest}"


def _translate(name: str, rows: list[CompiledRow]) -> list[str]:
    for pattern, templates in rows:
        match = pattern.fullmatch(name)
        if match:
            return [template.format(**match.groupdict()) for template in templates]
    raise ValueError(f"{name} is not a tensor of a MaskFormer checkpoint: the key table has no row for it.")


@cache
def _rows_from_original(deep_stem: bool) -> list[CompiledRow]:
    # Both stems use the same name for their first convolution.
    table = [*(DEEP_STEM if deep_stem else PLAIN_STEM), *KEY_TABLE]
    return [(_compile(original), [ours] if isinstance(ours, str) else list(ours)) for original, ours in table]


@cache
def _rows_to_original() -> list[CompiledRow]:
    table = [*PLAIN_STEM, *DEEP_STEM, *KEY_TABLE]
    return [
        (_compile(name), [original]) for original, ours in table for name in ([ours] if isinstance(ours, str) else ours)
    ]


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{tail\}", r"(?P<tail>.+)")
    return re.compile(re.sub(r"\\{([ij])\\}", r"(?P<\1>\\d+)", pattern))
