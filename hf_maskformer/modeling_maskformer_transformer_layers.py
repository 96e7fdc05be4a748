"""Building blocks of the transformers in MaskFormer: attention, feed-forward, encoder layers, sine positions.

Letters: B images, Q queries, D width, P = h x w positions of a feature map, the memory that is attended to.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .configuration_maskformer_parts import MaskFormerTransformerConfig, is_of_type
from .modeling_maskformer_dispatch import without_view
from .modeling_maskformer_linear import Linear, project


class AttentionProjection(Linear):
    """A projection of an attention layer, initialised as in the paper's code: Xavier, bias 0.

    Args:
        dim: Width.
        num_stacked: How many projections share one matrix there, whose whole shape sets the bound.
    """

    def __init__(self, dim: int, num_stacked: int) -> None:
        self.gain = math.sqrt(2 / (1 + num_stacked))
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=self.gain)
        nn.init.zeros_(self.bias)


class FeedForwardLinear(Linear):
    """A layer of the feed-forward network: Xavier, as in the paper's code."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys carry positions and whose values do not.

    It is computed by the configuration's `attn_implementation`: any function of transformers' attention interface.
    """

    is_causal = False  # transformers' functions read it

    def __init__(self, config: PreTrainedConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        # Not read from the configuration in each pass: torch.compile treats such a number as dynamic, and cannot handle
        # that where layers are recomputed (gradient checkpointing).
        self.dropout = config.attention_dropout
        self.q_proj = AttentionProjection(dim, num_stacked=3)
        self.k_proj = AttentionProjection(dim, num_stacked=3)
        self.v_proj = AttentionProjection(dim, num_stacked=3)
        self.out_proj = AttentionProjection(dim, num_stacked=1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_attentions: bool = False,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes (B, Q, D), (B, P, D), (B, P, D) and which positions may be attended to, (B, P) bool, by default all.

        Returns (B, Q, D) and, if requested, the weights (B, heads, Q, P).
        """
        if query is key:
            projected = (*project((self.q_proj, self.k_proj), query), self.v_proj(value))
        else:
            projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        query, key, value = (states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in projected)
        implementation = self.config._attn_implementation or "sdpa"
        mask = None
        if output_attentions:
            implementation = "eager"  # the others do not return the weights
        if memory_mask is not None:
            # Flash attention supports masks for text only, whose queries and keys are padded alike.
            if is_flash_attention_requested(requested_attention_implementation=implementation):
                implementation = "sdpa"
            mask = mask_for(implementation, memory_mask, query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=query.shape[-1] ** -0.5)
        return self.out_proj(attended.flatten(2)), weights if output_attentions else None


def mask_for(implementation: str, memory_mask: Tensor, query: Tensor) -> Tensor | BlockMask:
    """The mask by which an attention function lets queries (B, heads, Q, D/heads) attend to positions, (B, P) bool.

    Returns what is added to the scores, (B, 1, Q, P). On a CPU, torch 2.13 corrupts memory when flex attention adds it;
    that gets its own kind of mask.
    """
    (num_images, num_positions), num_queries = memory_mask.shape, query.shape[2]
    if implementation == "flex_attention":
        return create_block_mask(
            lambda image, head, index, position: memory_mask[image, position],
            num_images,
            None,
            num_queries,
            num_positions,
            device=str(query.device),
        )
    mask = query.new_zeros(memory_mask.shape).masked_fill(~memory_mask, -torch.inf)
    return mask[:, None, None, :].expand(-1, 1, num_queries, -1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, with the signature of transformers' attention interface.

    Takes (B, heads, Q, D/heads), (B, heads, P, D/heads) twice and what is added to the scores, (B, 1, Q, P) or None.
    Returns (B, Q, heads, D/heads) and the weights before dropout, (B, heads, Q, P).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), weights


class TransformerLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: sublayers with residuals and norms, the last one a feed-forward network.

    Args:
        config: The transformers' configuration.
        dim: Width.
        ffn_dim: Width inside the feed-forward network.
    """

    def __init__(self, config: PreTrainedConfig, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.pre_norm = has_pre_norm(config)
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = FeedForwardLinear(dim, ffn_dim)
        self.fc2 = FeedForwardLinear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.activation = ACT2FN[config.activation_function]

    def before(self, norm: nn.LayerNorm, states: Tensor) -> Tensor:
        """The input of a sublayer."""
        return norm(states) if self.pre_norm else states

    def after(self, norm: nn.LayerNorm, states: Tensor, update: Tensor) -> Tensor:
        """The states after a sublayer whose output is `update`."""
        states = states + F.dropout(update, self.dropout, self.training)
        return states if self.pre_norm else norm(states)

    def feed_forward(self, states: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(self.before(self.final_layer_norm, states)))
        hidden = F.dropout(hidden, self.activation_dropout, self.training)
        return self.after(self.final_layer_norm, states, self.fc2(hidden))


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention among the positions of a feature map, feed-forward."""

    def __init__(self, config: PreTrainedConfig, dim: int) -> None:
        super().__init__(config, dim, config.encoder_ffn_dim)
        self.self_attn = Attention(config, dim, config.encoder_attention_heads)

    def forward(self, memory: Tensor, memory_positions: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Takes (B, P, D), (P, D) or (B, P, D), and which positions are not padding, (B, P) bool; returns (B, P, D)."""
        value = self.before(self.self_attn_layer_norm, memory)
        placed = value + memory_positions
        update, _ = self.self_attn(placed, placed, value, memory_mask=memory_mask)
        return self.feed_forward(self.after(self.self_attn_layer_norm, memory, update))


class TransformerEncoder(nn.Module):
    """Encoder layers over a feature map.

    Shapes:
        features: (B, D, h, w).
        returns: (B, D, h, w).
    """

    def __init__(self, config: PreTrainedConfig, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerEncoderLayer(config, dim) for _ in range(num_layers))
        # Post-norm layers already end with a norm.
        self.layernorm = nn.LayerNorm(dim) if has_pre_norm(config) else None

    def forward(self, features: Tensor, memory_sizes: Tensor | None = None) -> Tensor:
        """With `memory_sizes` (B, 2), how many rows and columns hold an image, nothing attends to the others."""
        memory, memory_positions, memory_mask = as_memory(features, memory_sizes)
        for layer in self.layers:
            memory = layer(memory, memory_positions, memory_mask)
        if self.layernorm is not None:
            memory = self.layernorm(memory)
        return without_view(memory.transpose(1, 2).unflatten(2, features.shape[-2:]))


def has_pre_norm(config: PreTrainedConfig) -> bool:
    """Whether the layers normalise their input; those of type `detr` never do."""
    return is_of_type(config, MaskFormerTransformerConfig) and config.pre_norm


def as_memory(features: Tensor, memory_sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A feature map (B, D, h, w) as memory for attention: it as (B, P, D), its sine positions, and the memory mask.

    The mask, (B, P) bool, excludes all but the `memory_sizes` (B, 2) rows and columns that hold an image; None without
    these.
    """
    size = features.shape[-2:]
    memory = features.flatten(2).transpose(1, 2)
    positions = sine_positions(size, memory.shape[-1], memory.device, memory_sizes).to(memory.dtype)
    return memory, positions, None if memory_sizes is None else positions_inside(size, memory_sizes)


def sine_positions(size: Sequence[int], width: int, device: torch.device, memory_sizes: Tensor | None = None) -> Tensor:
    """Sine and cosine of the normalised row and column of each position, (P, width), float32.

    The first half of the width encodes the row, the second the column; sines and cosines alternate. Rows run from
    2 pi / h to 2 pi, so the code depends on the size of the map; or with `memory_sizes` (B, 2) on that of each image in
    it, (B, P, width). Always float32: half precision is off by 0.02.
    """
    per_axis = width // 2
    exponents = torch.arange(per_axis, device=device, dtype=torch.float32).div(2, rounding_mode="floor") * 2 / per_axis
    wavelengths = 10000**exponents
    codes = []
    for axis, length in enumerate(size):
        extent = length if memory_sizes is None else memory_sizes[:, axis, None]
        coordinates = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (extent + 1e-6) * 2 * math.pi
        angles = coordinates[..., None] / wavelengths
        codes.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2))
    rows, columns = codes
    height, width_of_map = size
    rows = rows[..., :, None, :].expand(*rows.shape[:-1], width_of_map, -1)
    columns = columns[..., None, :, :].expand(*columns.shape[:-2], height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(-3, -2)


def positions_inside(size: Sequence[int], memory_sizes: Tensor) -> Tensor:
    """Which positions of a map of this size lie in the top left part (B, 2) that each image covers, (B, P) bool."""
    rows, columns = (
        torch.arange(length, device=lengths.device) < lengths[:, None]
        for length, lengths in zip(size, memory_sizes.unbind(1), strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)
