"""The names of the paper's own checkpoints and ours, as one table that is read in both directions.

`{i}`, `{j}` stand for numbers and `{tail}` for the rest of a name. Where one tensor there is three here, our side is a
tuple: the original keeps query, key and value in one matrix, stacked along the first axis.
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
ORIGINAL_LAYER = "sem_seg_head.predictor.transformer.decoder.layers.{i}"
SWIN_BLOCK = f"{ENCODER}.model.encoder.layers.{{i}}.blocks.{{j}}"
ORIGINAL_BLOCK = "backbone.layers.{i}.blocks.{j}"

Row = tuple[str, str | tuple[str, ...]]

RESNET: list[Row] = [
    ("backbone.stem.conv1.weight", f"{ENCODER}.embedder.embedder.convolution.weight"),
    ("backbone.stem.conv1.norm.{tail}", f"{ENCODER}.embedder.embedder.normalization.{{tail}}"),
    *[
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
    ],
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
# The original counts levels from the finest (1) to the coarsest (4); here they are in the order of computation.
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
]
TRANSFORMER_DECODER: list[Row] = [
    ("sem_seg_head.predictor.query_embed.weight", f"{TRANSFORMER}.queries_embedder.weight"),
    ("sem_seg_head.predictor.input_proj.{tail}", f"{TRANSFORMER}.input_projection.{{tail}}"),
    *[
        row
        for there, here in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn"))
        for row in (
            (
                f"{ORIGINAL_LAYER}.{there}.in_proj_{{tail}}",
                tuple(f"{DECODER_LAYER}.{here}.{name}_proj.{{tail}}" for name in "qkv"),
            ),
            (f"{ORIGINAL_LAYER}.{there}.out_proj.{{tail}}", f"{DECODER_LAYER}.{here}.out_proj.{{tail}}"),
        )
    ],
    (f"{ORIGINAL_LAYER}.linear1.{{tail}}", f"{DECODER_LAYER}.fc1.{{tail}}"),
    (f"{ORIGINAL_LAYER}.linear2.{{tail}}", f"{DECODER_LAYER}.fc2.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm1.{{tail}}", f"{DECODER_LAYER}.self_attn_layer_norm.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm2.{{tail}}", f"{DECODER_LAYER}.encoder_attn_layer_norm.{{tail}}"),
    (f"{ORIGINAL_LAYER}.norm3.{{tail}}", f"{DECODER_LAYER}.final_layer_norm.{{tail}}"),
    ("sem_seg_head.predictor.transformer.decoder.norm.{tail}", f"{TRANSFORMER}.decoder.layernorm.{{tail}}"),
]
HEADS: list[Row] = [
    ("sem_seg_head.predictor.class_embed.{tail}", "class_predictor.{tail}"),
    ("sem_seg_head.predictor.mask_embed.layers.{i}.{tail}", "mask_embedder.{i}.0.{tail}"),
    ("criterion.empty_weight", "criterion.empty_weight"),
]
KEY_TABLE: list[Row] = [*RESNET, *SWIN, *PYRAMID, *TRANSFORMER_DECODER, *HEADS]

# Here, but not in the original: counters of batch normalisation and Swin's unused final norm.
ONLY_HERE = re.compile(rf"(.*\.normalization\.num_batches_tracked|{re.escape(ENCODER)}\.model\.layernorm\..*)")


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors with the original's names ours.

    Both of the original's spellings are read: that of its training checkpoints, and that of its model zoo, which
    leaves out `pixel_decoder.`.

    Raises:
        ValueError: A name that the table does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = _translate(_training_spelling(name), from_original=True)
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
    """Gives tensors with our names (weights, or their gradients) the names of the original's training checkpoints.

    Raises:
        ValueError: A name that the table does not have, or one of query, key and value without the others.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if ONLY_HERE.fullmatch(name):
            continue
        (target,) = _translate(name, from_original=False)
        siblings = _translate(target, from_original=True)
        if len(siblings) == 1:
            renamed[target] = tensor
        else:
            parts.setdefault(target, {})[siblings.index(name)] = tensor
    for target, pieces in parts.items():
        if len(pieces) != 3:
            raise ValueError(f"{target} is made of query, key and value, but only {len(pieces)} of them are given.")
        renamed[target] = torch.cat([pieces[index] for index in range(3)])
    return renamed


def _training_spelling(name: str) -> str:
    head, _, rest = name.partition("sem_seg_head.")
    if head or not rest or rest.startswith(("predictor.", "pixel_decoder.")):
        return name
    return f"sem_seg_head.pixel_decoder.{rest}"


def _translate(name: str, from_original: bool) -> list[str]:
    for pattern, templates in _compiled_table(from_original):
        match = pattern.fullmatch(name)
        if match:
            return [template.format(**match.groupdict()) for template in templates]
    raise ValueError(f"{name} is no tensor of a MaskFormer checkpoint: the key table has no row for it.")


@cache
def _compiled_table(from_original: bool) -> list[tuple[re.Pattern[str], list[str]]]:
    rows = []
    for original, ours in KEY_TABLE:
        our_names = [ours] if isinstance(ours, str) else list(ours)
        if from_original:
            rows.append((_compile(original), our_names))
        else:
            rows.extend((_compile(name), [original]) for name in our_names)
    return rows


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{tail\}", r"(?P<tail>.+)")
    return re.compile(re.sub(r"\\{([ij])\\}", r"(?P<\1>\\d+)", pattern))
