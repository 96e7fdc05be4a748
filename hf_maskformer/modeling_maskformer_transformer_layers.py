"""What the transformers in MaskFormer are made of: attention, feed-forward, encoder layers, sine positions.

Letters: B images, Q queries, D width, P = h x w positions of a feature map.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_maskformer_parts import MaskFormerTransformerConfig, is_of_type


class AttentionProjection(nn.Linear):
    """A projection of an attention layer, initialised as in the paper's code: Xavier, bias 0.

    Args:
        dim: Width.
        num_stacked: How many projections share one matrix there, whose bound is that of its whole shape.
    """

    def __init__(self, dim: int, num_stacked: int) -> None:
        self.gain = math.sqrt(2 / (1 + num_stacked))
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=self.gain)
        nn.init.zeros_(self.bias)


class FeedForwardLinear(nn.Linear):
    """A layer of the feed-forward network: Xavier, as in the paper's code."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys carry positions and whose values do not."""

    def __init__(self, config: PreTrainedConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.q_proj = AttentionProjection(dim, num_stacked=3)
        self.k_proj = AttentionProjection(dim, num_stacked=3)
        self.v_proj = AttentionProjection(dim, num_stacked=3)
        self.out_proj = AttentionProjection(dim, num_stacked=1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Takes (B, Q, D), (B, P, D), (B, P, D); returns (B, Q, D) and, if asked for, the weights (B, heads, Q, P)."""
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            weights = scores.softmax(-1)
            attended = F.dropout(weights, dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights if output_attentions else None


class TransformerLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: sublayers with residuals and norms, the last one a feed-forward network.

    Args:
        config: The transformers' configuration.
        dim: Width.
        ffn_dim: Width inside the feed-forward network.
    """

    def __init__(self, config: PreTrainedConfig, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.config = config
        self.pre_norm = has_pre_norm(config)
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
        states = states + F.dropout(update, self.config.dropout, self.training)
        return states if self.pre_norm else norm(states)

    def feed_forward(self, states: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(self.before(self.final_layer_norm, states)))
        hidden = F.dropout(hidden, self.config.activation_dropout, self.training)
        return self.after(self.final_layer_norm, states, self.fc2(hidden))


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention among the positions of a feature map, feed-forward."""

    def __init__(self, config: PreTrainedConfig, dim: int) -> None:
        super().__init__(config, dim, config.encoder_ffn_dim)
        self.self_attn = Attention(config, dim, config.encoder_attention_heads)

    def forward(self, image: Tensor, positions: Tensor) -> Tensor:
        """Takes (B, P, D) and (P, D); returns (B, P, D)."""
        value = self.before(self.self_attn_layer_norm, image)
        update, _ = self.self_attn(value + positions, value + positions, value)
        return self.feed_forward(self.after(self.self_attn_layer_norm, image, update))


class TransformerEncoder(nn.Module):
    """Encoder layers over a feature map.

    Shapes:
        features: (B, D, h, w).
        returns: (B, D, h, w).
    """

    def __init__(self, config: PreTrainedConfig, dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerEncoderLayer(config, dim) for _ in range(num_layers))
        # Post-norm layers end with a norm of their own.
        self.layernorm = nn.LayerNorm(dim) if has_pre_norm(config) else None

    def forward(self, features: Tensor) -> Tensor:
        image = features.flatten(2).transpose(1, 2)
        positions = sine_positions(features.shape[-2:], image.shape[-1], image.device).to(image.dtype)
        for layer in self.layers:
            image = layer(image, positions)
        if self.layernorm is not None:
            image = self.layernorm(image)
        return image.transpose(1, 2).unflatten(2, features.shape[-2:])


def has_pre_norm(config: PreTrainedConfig) -> bool:
    """Whether the layers normalise their input; those of type `detr` never do."""
    return is_of_type(config, MaskFormerTransformerConfig) and config.pre_norm


def sine_positions(size: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Sine and cosine of the normalised row and column of each position, (P, width), float32.

    The first half of the width encodes the row, the second the column; sines and cosines alternate. Rows run from
    2 pi / h to 2 pi, so the code depends on the size of the map. Always float32: half precision is off by 0.02.
    """
    per_axis = width // 2
    exponents = torch.arange(per_axis, device=device, dtype=torch.float32).div(2, rounding_mode="floor") * 2 / per_axis
    wavelengths = 10000**exponents
    codes = []
    for length in size:
        coordinates = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (length + 1e-6) * 2 * math.pi
        angles = coordinates[:, None] / wavelengths
        codes.append(torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1))
    rows, columns = codes
    height, width_of_map = size
    return torch.cat(
        (rows[:, None].expand(-1, width_of_map, -1), columns[None].expand(height, -1, -1)), dim=-1
    ).flatten(0, 1)
