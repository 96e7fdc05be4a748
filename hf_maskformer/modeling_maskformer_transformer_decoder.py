"""Transformer decoder: queries attend to the stride-32 features of the image (paper, section 3.2).

Letters: B images, L decoder layers, Q queries, D query width, P = h x w positions of the stride-32 feature map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .modeling_maskformer_pixel_decoder import XavierConv2d


@dataclass
class TransformerModuleOutput(ModelOutput):
    """What the queries became.

    Args:
        last_hidden_state: (B, Q, D), after the last layer and the final norm.
        intermediate_states: (L, B, Q, D), every layer's output after the final norm, which all layers share.
        hidden_states: L + 1 tensors (B, Q, D) if asked for: the input (zeros), every layer's output but the last
            before the norm, and `last_hidden_state`.
        attentions: L tensors (B, heads, Q, P) if asked for: where each query looked in the image.
    """

    last_hidden_state: Tensor | None = None
    intermediate_states: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


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

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.decoder_attention_heads
        self.q_proj = AttentionProjection(config.d_model, num_stacked=3)
        self.k_proj = AttentionProjection(config.d_model, num_stacked=3)
        self.v_proj = AttentionProjection(config.d_model, num_stacked=3)
        self.out_proj = AttentionProjection(config.d_model, num_stacked=1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_attentions: bool = False,
        is_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes (B, Q, D), (B, P, D), (B, P, D) and which positions may be attended to, (B, P), by default all.

        Returns (B, Q, D) and, if asked for, the weights (B, heads, Q, P).
        """
        mask = None if is_image is None else is_image[:, None, None, :]
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.softmax(-1)
            attended = F.dropout(weights, dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights if output_attentions else None


class TransformerDecoderLayer(GradientCheckpointingLayer):
    """Self-attention among the queries, cross-attention to the image, feed-forward; each followed by its norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = FeedForwardLinear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = FeedForwardLinear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = ACT2FN[config.activation_function]

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        image: Tensor,
        image_positions: Tensor,
        output_attentions: bool,
        is_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes (B, Q, D), (Q, D), (B, P, D), (P, D) or (B, P, D), and which positions are no padding, (B, P).

        Returns (B, Q, D) and the cross-attention if asked for.
        """
        at_positions = queries + query_positions
        update, _ = self.self_attn(at_positions, at_positions, queries)
        queries = self.self_attn_layer_norm(queries + self._dropout(update))

        update, weights = self.encoder_attn(
            queries + query_positions, image + image_positions, image, output_attentions, is_image
        )
        queries = self.encoder_attn_layer_norm(queries + self._dropout(update))

        hidden = F.dropout(self.activation(self.fc1(queries)), self.config.activation_dropout, self.training)
        return self.final_layer_norm(queries + self._dropout(self.fc2(hidden))), weights

    def _dropout(self, states: Tensor) -> Tensor:
        return F.dropout(states, self.config.dropout, self.training)


class TransformerDecoder(nn.Module):
    """The layers and the norm that all their outputs share."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layernorm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        image: Tensor,
        image_positions: Tensor,
        output_attentions: bool,
        is_image: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Returns the output of every layer before the norm, and its cross-attention."""
        states, attentions = [], []
        for layer in self.layers:
            queries, weights = layer(queries, query_positions, image, image_positions, output_attentions, is_image)
            states.append(queries)
            attentions.append(weights)
        return states, attentions


class TransformerModule(nn.Module):
    """Learned queries, sine positions and the decoder.

    Args:
        in_channels: Channels of the stride-32 feature map. It is projected only if they differ from the decoder's
            width, as in the paper's code.
        config: The decoder's configuration.
    """

    def __init__(self, in_channels: int, config: PreTrainedConfig) -> None:
        super().__init__()
        self.queries_embedder = nn.Embedding(config.num_queries, config.d_model)
        self.input_projection = (
            XavierConv2d(in_channels, config.d_model, kernel_size=1) if in_channels != config.d_model else None
        )
        self.decoder = TransformerDecoder(config)

    def forward(
        self,
        features: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        image_sizes: Tensor | None = None,
    ) -> TransformerModuleOutput:
        """Takes the stride-32 feature map (B, C, h, w).

        With `image_sizes` (B, 2), how many of its rows and columns hold an image, the others are left out.
        """
        if self.input_projection is not None:
            features = self.input_projection(features)
        image = features.flatten(2).transpose(1, 2)  # (B, P, D)
        positions = sine_positions(features.shape[-2:], features.shape[1], features.device, image_sizes)
        positions = positions.to(features.dtype)
        is_image = None if image_sizes is None else positions_inside(features.shape[-2:], image_sizes)
        query_positions = self.queries_embedder.weight
        queries = query_positions.new_zeros(features.shape[0], *query_positions.shape)

        states, attentions = self.decoder(queries, query_positions, image, positions, output_attentions, is_image)
        intermediate_states = self.decoder.layernorm(torch.stack(states))
        return TransformerModuleOutput(
            last_hidden_state=intermediate_states[-1],
            intermediate_states=intermediate_states,
            hidden_states=(queries, *states[:-1], intermediate_states[-1]) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def sine_positions(size: Sequence[int], width: int, device: torch.device, image_sizes: Tensor | None = None) -> Tensor:
    """Sine and cosine of the normalised row and column of each position, (P, width), float32.

    The first half of the width encodes the row, the second the column; sines and cosines alternate. Rows run from
    2 pi / h to 2 pi, so the code depends on the size of the map; or with `image_sizes` (B, 2) on that of each image in
    it, (B, P, width). Always float32: half precision is off by 0.02.
    """
    per_axis = width // 2
    exponents = torch.arange(per_axis, device=device, dtype=torch.float32).div(2, rounding_mode="floor") * 2 / per_axis
    wavelengths = 10000**exponents
    codes = []
    for axis, length in enumerate(size):
        extent = length if image_sizes is None else image_sizes[:, axis, None]
        coordinates = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (extent + 1e-6) * 2 * math.pi
        angles = coordinates[..., None] / wavelengths
        codes.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2))
    rows, columns = codes
    height, width_of_map = size
    rows = rows[..., :, None, :].expand(*rows.shape[:-1], width_of_map, -1)
    columns = columns[..., None, :, :].expand(*columns.shape[:-2], height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(-3, -2)


def positions_inside(size: Sequence[int], image_sizes: Tensor) -> Tensor:
    """Which positions of a map of this size lie in the top left part (B, 2) that each image takes, (B, P) bool."""
    rows, columns = (
        torch.arange(length, device=image_sizes.device) < image_sizes[:, axis, None] for axis, length in enumerate(size)
    )
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)
