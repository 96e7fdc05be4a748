"""Transformer decoder: queries attend to the stride-32 features of the image (paper, section 3.2).

Letters: B images, L decoder layers, Q queries, D query width, P = h x w positions of the stride-32 feature map, the
memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .configuration_maskformer_parts import MaskFormerTransformerConfig, is_of_type
from .modeling_maskformer_pixel_decoder import XavierConv2d
from .modeling_maskformer_transformer_layers import (
    Attention,
    TransformerEncoder,
    TransformerLayer,
    as_memory,
    has_pre_norm,
)


class TransformerModuleOutput(NamedTuple):
    """The decoded queries.

    Args:
        last_hidden_state: (B, Q, D), after the last layer and the final norm.
        intermediate_states: (L, B, Q, D), every layer's output after the final norm, which all layers share.
        hidden_states: L + 1 tensors (B, Q, D), if requested: the input (zeros), every layer's output but the last
            before the norm, and `last_hidden_state`.
        attentions: L tensors (B, heads, Q, P), if requested: the cross-attention weights.
    """

    last_hidden_state: Tensor
    intermediate_states: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class TransformerDecoderLayer(TransformerLayer):
    """Self-attention among the queries, cross-attention to the image, feed-forward."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, config.d_model, config.decoder_ffn_dim)
        self.self_attn = Attention(config, config.d_model, config.decoder_attention_heads)
        self.encoder_attn = Attention(config, config.d_model, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        output_attentions: bool,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes (B, Q, D), (Q, D), (B, P, D), (P, D) or (B, P, D), and which positions are not padding, (B, P) bool.

        Returns (B, Q, D) and the cross-attention weights if requested.
        """
        value = self.before(self.self_attn_layer_norm, queries)
        placed = value + query_positions
        update, _ = self.self_attn(placed, placed, value)
        queries = self.after(self.self_attn_layer_norm, queries, update)

        query = self.before(self.encoder_attn_layer_norm, queries) + query_positions
        update, weights = self.encoder_attn(query, memory + memory_positions, memory, output_attentions, memory_mask)
        queries = self.after(self.encoder_attn_layer_norm, queries, update)
        return self.feed_forward(queries), weights


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
        memory: Tensor,
        memory_positions: Tensor,
        output_attentions: bool,
        memory_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Returns the output of every layer before the norm, and its cross-attention."""
        states, attentions = [], []
        for layer in self.layers:
            queries, weights = layer(queries, query_positions, memory, memory_positions, output_attentions, memory_mask)
            states.append(queries)
            attentions.append(weights)
        return states, attentions


class TransformerModule(nn.Module):
    """Learned queries, sine positions and the decoder; an encoder before it only if the configuration has one.

    Args:
        in_channels: Channels of the stride-32 feature map. It is projected only if they differ from the decoder's
            width, as in the paper's code.
        config: The decoder's configuration, of type `detr` or our own.
    """

    def __init__(self, in_channels: int, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_queries = config.num_queries  # an adapter around the embedding does not tell how many it has
        self.queries_embedder = nn.Embedding(self.num_queries, config.d_model)
        self.input_projection = (
            XavierConv2d(in_channels, config.d_model, kernel_size=1) if in_channels != config.d_model else None
        )
        # The encoder fields of type `detr` are DETR's own; in a MaskFormer's file they are ignored.
        num_encoder_layers = config.encoder_layers if is_of_type(config, MaskFormerTransformerConfig) else 0
        # As in the original, a pre-norm model has the encoder's final norm even without encoder layers.
        has_encoder = num_encoder_layers > 0 or has_pre_norm(config)
        self.encoder = TransformerEncoder(config, config.d_model, num_encoder_layers) if has_encoder else None
        self.decoder = TransformerDecoder(config)

    def forward(
        self,
        memory: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        memory_sizes: Tensor | None = None,
    ) -> TransformerModuleOutput:
        """Takes the stride-32 feature map (B, C, h, w).

        With `memory_sizes` (B, 2), how many of its rows and columns hold an image, the others are masked.
        """
        if self.input_projection is not None:
            memory = self.input_projection(memory)
        if self.encoder is not None:
            memory = self.encoder(memory, memory_sizes)
        memory, memory_positions, memory_mask = as_memory(memory, memory_sizes)  # (B, P, D)
        # Through the module, since weights that are offloaded or sharded are loaded when their module is called.
        numbers = torch.arange(self.num_queries, device=memory.device)
        query_positions = self.queries_embedder(numbers)
        queries = query_positions.new_zeros(memory.shape[0], *query_positions.shape)

        states, attentions = self.decoder(
            queries, query_positions, memory, memory_positions, output_attentions, memory_mask
        )
        intermediate_states = self.decoder.layernorm(torch.stack(states))
        last_hidden_state = intermediate_states[-1]
        return TransformerModuleOutput(
            last_hidden_state=last_hidden_state,
            intermediate_states=intermediate_states,
            hidden_states=(queries, *states[:-1], last_hidden_state) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
