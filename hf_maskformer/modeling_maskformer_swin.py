"""Swin Transformer backbone (arXiv 2103.14030) as MaskFormer uses it: any input size, a norm on each stage's output.

Our own code because transformers' version materialises every attention matrix, at inference too. Where the window does
not divide the feature map, zero padding is added after the first norm and takes part in attention, as in the paper's
code.

Letters: B images, h x w feature map of the stage, C its channels, W windows in one image, N = window x window
positions in a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .modeling_maskformer_dispatch import (
    can_overwrite,
    is_exporting,
    is_hooked,
    is_inference,
    is_traced,
    is_transformed,
    register_operator,
    without_view,
)
from .modeling_maskformer_linear import Linear, project
from .modeling_maskformer_packing import cached, can_cache, computes_in_bfloat16, packing_dtype
from .modeling_maskformer_swin_windows import WindowGrid, Windows, count_parts, pad_to_multiple, window_grid

# The intermediate results of a block are several times as large as its map. At inference on a CPU, attention and
# feed-forward network process few enough positions at a time that most of this stays in the cache, and enough that the
# time to start their products does not matter; likewise the products inside attention.
POSITIONS_AT_ONCE, SCORES_AT_ONCE = 3200, 2**19


class SwinLinear(Linear):
    """A linear layer with the initialisation of Swin's authors."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchProjection(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) to (B, H/4, W/4, C); the image is padded with 0 on the right and below to whole patches."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embeddings = PatchProjection(config)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        padded = pad_to_multiple(pixel_values, self.patch_size, dims=(2, 3))
        patches = self.patch_embeddings.projection(padded).permute(0, 2, 3, 1)
        return self.dropout(self.norm(patches))


class WindowSelfAttention(nn.Module):
    """Attention inside windows with a learned bias per relative position.

    `relative_position_index` is derived from the window, yet it is in every checkpoint, so it is a saved buffer.
    """

    relative_position_index: Tensor

    def __init__(self, config: PreTrainedConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = config.window_size
        self.dropout_probability = config.attention_probs_dropout_prob
        self.query = SwinLinear(dim, dim, bias=config.qkv_bias)
        self.key = SwinLinear(dim, dim, bias=config.qkv_bias)
        self.value = SwinLinear(dim, dim, bias=config.qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window_size - 1) ** 2, num_heads))
        index = torch.empty(self.window_size**2, self.window_size**2, dtype=torch.long)
        self.register_buffer("relative_position_index", index)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        init.copy_(self.relative_position_index, relative_position_index(self.window_size))

    def forward(self, windows: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Takes windows (B W, N, C) and the attention_mask (W, N, N) of shifted windows; returns (B W, N, C)."""
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in project((self.query, self.key, self.value), windows)
        )
        if not self.training and is_inference() and packing_dtype(query):
            is_compiled = torch.compiler.is_compiling()
            attend = torch.ops.hf_maskformer.attend_in_windows if is_compiled else attend_in_windows
            return attend(query, key, value, self._position_bias(torch.float32), attention_mask)
        bias = self._position_bias(query.dtype)
        if attention_mask is not None:
            num_images = windows.shape[0] // attention_mask.shape[0]
            bias = (bias + attention_mask[:, None]).repeat(num_images, 1, 1, 1)  # (B W, heads, N, N)
        bias = bias.to(query.dtype)
        # The layout of the result of torch's own attention differs between the steps of an ONNX export. On a CPU that
        # is not fused either if the bias requires a gradient, and checks all scores for rows of -inf. In a torch.func
        # transform the bias does not tell whether it does. TorchScript keeps torch's own, which is faster.
        wants_gradient = bias.requires_grad or is_transformed()
        needs_gradient_on_cpu = wants_gradient and bias.device.type == "cpu" and not torch.compiler.is_compiling()
        if (is_exporting() and not torch.jit.is_tracing()) or needs_gradient_on_cpu:
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
            weights = F.dropout(scores.softmax(-1), self.dropout_probability, self.training)
            attended = weights.to(value.dtype) @ value
        else:
            dropout = self.dropout_probability if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)

    def _position_bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of each pair of positions, (1, heads, N, N)."""
        num_positions = self.window_size**2

        def arranged() -> Tensor:
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
            return bias.view(num_positions, num_positions, -1).permute(2, 0, 1)[None].to(dtype).contiguous()

        table = self.relative_position_bias_table
        if torch.compiler.is_compiling() or not (can_cache(self) and packing_dtype(table)):
            return arranged()
        return cached(arranged, dtype, None, table, self.relative_position_index)


def attend_in_windows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Attention inside windows at inference on a CPU, a few of them at a time.

    Their products are batched. torch's own attention computes those of each window and head separately, in twice the
    time. In bfloat16 only the products are rounded.

    Takes (B W, heads, N, C/heads) three times, and what is added to the scores, (1, heads, N, N) in float32 and
    (W, N, N); returns (B W, N, C).
    """
    num_windows, num_heads, num_positions, width = query.shape
    output = query.new_empty(num_windows, num_positions, num_heads, width)
    at_once = max(SCORES_AT_ONCE // (num_heads * num_positions**2), 1)
    in_image = num_windows if attention_mask is None else len(attention_mask)
    for image in range(0, num_windows, in_image):
        for first in range(image, image + in_image, at_once):
            part = slice(first, min(first + at_once, image + in_image))
            scores = (query[part] @ key[part].transpose(-1, -2)).float()
            torch.add(bias, scores, alpha=width**-0.5, out=scores)
            if attention_mask is not None:
                scores += attention_mask[part.start - image : part.stop - image, None]
            output[part] = (scores.softmax(-1).to(query.dtype) @ value[part]).transpose(1, 2)
    return output.flatten(2)


def _output_of_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, attention_mask: Tensor | None
) -> Tensor:
    num_windows, num_heads, num_positions, width = query.shape
    return query.new_empty(num_windows, num_positions, num_heads * width)


# The compiler neither unrolls the loop over parts nor specialises on their number.
register_operator(
    "attend_in_windows(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor? attention_mask) -> Tensor",
    attend_in_windows,
    _output_of_attention,
)


class Projection(nn.Module):
    """A linear layer with its dropout; the name `dense` is the one in checkpoints."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.dense = SwinLinear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        return self.dropout(self.dense(states))


class WindowAttention(nn.Module):
    def __init__(self, config: PreTrainedConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self = WindowSelfAttention(config, dim, num_heads)
        self.output = Projection(dim, dim, config.attention_probs_dropout_prob)

    def forward(self, windows: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.output(self.self(windows, attention_mask))


class SwinBlock(GradientCheckpointingLayer):
    """Window attention and feed-forward, each behind its norm; every second block shifts the windows by half."""

    def __init__(self, config: PreTrainedConfig, dim: int, num_heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift = shift
        self.drop_path = drop_path
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = WindowAttention(config, dim, num_heads)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        hidden_dim = int(config.mlp_ratio * dim)
        self.intermediate = Projection(dim, hidden_dim, 0.0)
        self.activation = ACT2FN[config.hidden_act]
        self.output = Projection(hidden_dim, dim, config.hidden_dropout_prob)

    def forward(self, states: Tensor, grids: tuple[Windows, Windows], in_place: bool = False) -> Tensor:
        """Takes (B, h, w, C), and the stage's windows without and with shift; returns (B, h, w, C).

        In place, on a CPU: a few windows and positions at a time, overwriting the states.
        """
        grid = grids[1 if self.shift else 0]
        if not in_place or self.training or states.device.type != "cpu" or is_traced():
            windows = grid.to_windows(self.layernorm_before(states))
            states = states + self._drop_path(grid.to_map(self.attention(windows, grid.attention_mask)))
            return states + self._drop_path(self._feed_forward(states))
        is_half = is_inference() and computes_in_bfloat16(states)
        assert isinstance(grid, WindowGrid)
        normalized = self.layernorm_before(states)
        # Under autocast too, since attention would round them one at a time.
        windows = grid.to_windows(normalized.bfloat16() if is_half else normalized)
        del normalized
        self._attend_in_parts(windows, grid)
        states = states.contiguous()  # so that its parts below are views of it
        states += grid.to_map(windows)
        del windows
        for positions in states.flatten(0, 2).split(POSITIONS_AT_ONCE):
            positions += self._feed_forward(positions)
        return states

    def _attend_in_parts(self, windows: Tensor, grid: WindowGrid) -> None:
        """Replaces the windows (B W, N, C) by their attention output, a few of one image at a time."""
        at_once = max(POSITIONS_AT_ONCE // grid.num_positions, 1)
        for image in windows.unflatten(0, (-1, grid.num_windows)):
            whole, cut = image.tensor_split((grid.num_whole_windows,))
            if len(whole):
                for part in whole.split(at_once):
                    part.copy_(self.attention(part, None))
            if grid.attention_mask is not None:
                attention_masks = grid.attention_mask[len(whole) :].split(at_once)
                for part, attention_mask in zip(cut.split(at_once), attention_masks, strict=True):
                    part.copy_(self.attention(part, attention_mask))

    def _feed_forward(self, states: Tensor) -> Tensor:
        return self.output(self.activation(self.intermediate(self.layernorm_after(states))))

    def _drop_path(self, update: Tensor) -> Tensor:
        """Stochastic depth: leaves the block out for some images and scales up the rest."""
        if not self.training or self.drop_path == 0.0:
            return update
        keep_probability = 1.0 - self.drop_path
        return update * update.new_empty(update.shape[0], 1, 1, 1).bernoulli_(keep_probability).div_(keep_probability)


class PatchMerging(nn.Module):
    """Halves the map: (B, h, w, C) to (B, h/2, w/2, 2C), from the four neighbours in the order of the checkpoints."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = SwinLinear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, states: Tensor) -> Tensor:
        height, width = (count_parts(length, 2) for length in states.shape[1:3])
        states = pad_to_multiple(states, 2, dims=(1, 2))
        neighbours = states.reshape(states.shape[0], height, 2, width, 2, states.shape[-1])
        return self.reduction(self.norm(neighbours.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    def __init__(self, config: PreTrainedConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.window_size = config.window_size
        self.shift = config.window_size // 2
        self.blocks = nn.ModuleList(
            SwinBlock(config, dim, config.num_heads[stage], self.shift * (index % 2), drop_path)
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(dim) if stage < len(config.depths) - 1 else None

    def forward(self, states: Tensor, owns_states: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the stage's output, perhaps overwriting states that it owns, and the input of the next stage."""
        size, device = states.shape[1:3], states.device
        # Once for all blocks: they differ only in the shift.
        grids = (
            window_grid(size, self.window_size, 0, device),
            window_grid(size, self.window_size, self.shift, device),
        )
        is_private = can_overwrite(self)
        for block in self.blocks:
            # A block may have been replaced by a module that keeps its input or output.
            is_plain = type(block) is SwinBlock
            if is_private and is_plain:
                states = block(states if owns_states else states.clone(), grids, in_place=True)
            else:
                states = block(states, grids)
            owns_states = is_plain
        return states, states if self.downsample is None else self.downsample(states)


class SwinEncoder(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        # Stochastic depth grows linearly from the first block to the last.
        drop_paths = iter(torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist())
        self.layers = nn.ModuleList(
            SwinStage(config, stage, [next(drop_paths) for _ in range(depth)])
            for stage, depth in enumerate(config.depths)
        )


class UnusedNorm(nn.Module):
    """The weights of a norm as buffers: saved, but not parameters that distributed training would wait for."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(dim))
        self.register_buffer("bias", torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class SwinTransformer(nn.Module):
    """Holds the weights under the names of the checkpoints; the final norm is in them, but unused."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.encoder = SwinEncoder(config)
        self.layernorm = UnusedNorm(config.embed_dim * 2 ** (len(config.depths) - 1))


class SwinBackbone(nn.Module):
    """Image to four feature maps.

    Args:
        config: Of type `swin` or `maskformer-swin`.

    Shapes:
        pixel_values: (B, 3, H, W), any size.
        returns: four maps (B, C * 2^i, ~H / (4 * 2^i), ~W / (4 * 2^i)).
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.channels = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        self.model = SwinTransformer(config)
        self.hidden_states_norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        states = self.model.embeddings(pixel_values)
        are_own = returns_new_memory(self.model.embeddings)
        feature_maps = []
        for stage, norm in zip(self.model.encoder.layers, self.hidden_states_norms, strict=True):
            if type(stage) is SwinStage:
                states, next_states = stage(states, are_own)
                are_own = not is_hooked(stage) and returns_new_memory(stage.downsample)
            else:
                states, next_states = stage(states)
                are_own = False
            feature_maps.append(without_view(norm(states).permute(0, 3, 1, 2)))
            states = next_states
        return feature_maps


def returns_new_memory(module: nn.Module | None) -> bool:
    """Whether nobody else reads a module's output: it, or a part of it, may be a replacement that keeps it."""
    if module is None or not can_overwrite(module):
        return False
    return {type(part) for part in module.modules()} <= MODULES_RETURNING_NEW_MEMORY


MODULES_RETURNING_NEW_MEMORY = {
    PatchEmbedding,
    PatchProjection,
    PatchMerging,
    SwinLinear,
    nn.Conv2d,
    nn.LayerNorm,
    nn.Dropout,
}


def relative_position_index(window_size: int) -> Tensor:
    """(N, N): the row of the bias table for each pair of positions in a window, on the CPU."""
    # Wherever the model is built: on the meta device, where loading builds it, each of these operations is slow.
    axis = torch.arange(window_size, device="cpu")
    rows, columns = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    row_offsets = rows[:, None] - rows + window_size - 1
    column_offsets = columns[:, None] - columns + window_size - 1
    return row_offsets * (2 * window_size - 1) + column_offsets
