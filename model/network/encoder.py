"""The bidirectional transformer of BERT4Rec (arXiv 1904.06690, section 3.3), in plain torch.

    items [T, D] + positions + times -> layer x N -> norm -> vectors of the masked positions [M, D]

Norms, projections and feed-forward layers work on the packed positions of all rows; only attention
depends on the rows. Under autocast on CUDA the fused kernels of :mod:`model.kernels.residual`
compute the same.

Shapes: B rows, L longest row, T positions of all rows, D width, M masked positions.
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.kernels import residual
from model.kernels.bf16_linear import gelu_dropout, linear
from model.kernels.random_bits import new_dropouts
from model.kernels.varlen_attention import RowLayout
from model.network.attention import SelfAttention
from model.network.config import EncoderConfig
from model.network.times import TimeVectors, turns_a_second, with_times
from pipeline.batches.times import UNKNOWN, TimeSpan

# offsets, masked, left_only, steps_ago, times of Encoder.forward
Layout = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: EncoderConfig, max_len: int) -> None:
        super().__init__()
        width = config.emb_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, config.nhead, max_len, config.positions)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, packed: Tensor, layout: RowLayout, wanted: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], or [M, D] if only the positions ``wanted``, int64 [M], are needed."""
        attended = self.attention(self.attention_norm(packed), layout, wanted)
        if wanted is not None:
            packed = packed.index_select(0, wanted)
        packed = packed + self.dropout(attended)
        return packed + self.dropout(self.feed_forward(self.feed_forward_norm(packed)))


class Encoder(nn.Module):
    """Contextual vectors of the masked positions.

    Args:
        span: of the times, with ``config.use_times``.
    """

    def __init__(self, config: EncoderConfig, max_len: int, span: TimeSpan | None = None) -> None:
        super().__init__()
        self.max_len = max_len
        self.positions = nn.Embedding(max_len, config.emb_dim) if config.learned_positions else None
        self.embedding_norm = nn.LayerNorm(config.emb_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, max_len) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.apply(_initialise)
        self.times: TimeVectors | None = None
        if config.use_times:
            assert span is not None
            self.times = TimeVectors(config.emb_dim, span.first, span.last)

    def forward(
        self,
        items: Tensor,
        offsets: Tensor,
        masked: Tensor,
        left_only: Tensor | None = None,
        steps_ago: Tensor | None = None,
        times: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Encode the masked positions of a jagged batch: float [M, D].

        Args:
            items: float [T, D], embeddings of all positions, row after row.
            offsets: int64 [B + 1], starts of the rows in ``items``; a row has at most ``max_len``
                positions, or ``max_len + 1`` with second streams.
            masked: int64 [M], positions in ``items`` to encode.
            left_only: bool [V], as in :class:`~model.kernels.varlen_attention.RowLayout`.
            steps_ago: int64 [T], below ``max_len``, as there.
            times: int64 [T, 2], as in ``TrainBatch``; None: all unknown.
            longest: length to which padded attention pads the rows; may exceed ``max_len``. None:
                the longest possible, which depends only on shapes, as CUDA graphs require.
        """
        limit = self.max_len if steps_ago is None else self.max_len + 1
        longest = limit if longest is None else min(longest, limit)
        layout = RowLayout(offsets, items.shape[0], longest, left_only, steps_ago)
        fused = residual.takes(items)
        if self.times is not None:
            dtype = torch.get_autocast_dtype("cuda") if fused else items.dtype
            items, layout = self._with_times(items, layout, times, dtype)
        if fused:
            return self._encode_fused(items, layout, masked)
        if self.positions is not None:
            items = items + self.positions(layout.steps_ago)
        packed = self.dropout(self.embedding_norm(items))
        *lower, last = self.layers
        for layer in lower:
            packed = layer(packed, layout)
        # The loss reads only the masked positions: the last feed-forward runs only on them, about a
        # fifth of the work.
        return self.final_norm(last(packed, layout, wanted=masked))

    def _with_times(
        self, items: Tensor, layout: RowLayout, times: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, RowLayout]:
        """The items with vectors of times added, and the layout with rotations by time.

        Args:
            dtype: of the product that makes the vectors.
        """
        assert self.times is not None
        if times is None:
            times = layout.offsets.new_full((items.shape[0], 2), UNKNOWN)
        items = items + self.times(times, dtype)
        rotation = cast(EncoderLayer, self.layers[0]).attention.rotation
        if rotation is None:
            return items, layout
        frequency, by_place = turns_a_second(rotation), rotation[layout.steps_ago]
        return items, layout.turned(with_times(by_place, times, self.times.first, frequency))

    def _encode_fused(self, items: Tensor, layout: RowLayout, masked: Tensor) -> Tensor:
        """The same on CUDA under autocast: one kernel between two matrix products."""
        half, full = torch.get_autocast_dtype("cuda"), torch.float32
        share = self.dropout.p if self.training else 0.0
        layers = cast(list[EncoderLayer], list(self.layers))
        first, *dropouts = new_dropouts(share, 1 + 3 * len(layers), items.device)
        table = None if self.positions is None else self.positions.weight
        norms = self.embedding_norm, layers[0].attention_norm
        packed, normed = residual.enter(items, table, layout.steps_ago, *norms, first, half)
        following = [(layer.attention_norm, half) for layer in layers[1:]]
        following.append((self.final_norm, full))
        for number, (layer, (norm, dtype)) in enumerate(zip(layers, following, strict=True)):
            # On the attention branch, inside the feed-forward layer, and on its branch.
            on_attention, inside, on_fed = dropouts[3 * number : 3 * number + 3]
            wanted = masked if layer is layers[-1] else None
            mixed = layer.attention.mix(normed, layout, wanted)
            if wanted is not None:
                packed = packed.index_select(0, wanted)
            out = layer.attention.project_out
            attended = linear(out, mixed, with_bias=False), out.bias  # residual.add adds the bias
            packed, normed = residual.add(
                packed, *attended, layer.feed_forward_norm, on_attention, half
            )
            into, out = (cast(nn.Linear, layer.feed_forward[place]) for place in (0, 3))
            hidden = gelu_dropout(linear(into, normed, with_bias=False), into.bias, inside)
            fed = linear(out, hidden, with_bias=False), out.bias
            packed, normed = residual.add(packed, *fed, norm, on_fed, dtype)
        return normed


def _initialise(module: nn.Module) -> None:
    """Weights from normal(0, 0.02) truncated at two standard deviations, as the paper; biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
