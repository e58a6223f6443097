"""The vector of a user from a padded history, in plain torch that torch.export and ONNX can hold.

    histories [B, L] + mask token -> rows of the item table -> encoder -> vector of the mask [B, D]

The training encoder works on jagged rows; this module has its weights and equals it in float32.

Shapes: B users, L items of the longest history, D width, V items, H heads, K width of a head.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bert4rec import BERT4Rec
from model.network.attention import SelfAttention, rotated
from model.network.encoder import EncoderLayer
from model.network.times import turns_a_second, with_times
from pipeline.batches.times import UNKNOWN


class PaddedEncoder(nn.Module):
    """Vectors whose product with an item's vector is its score.

    Args:
        bert: a plain model; its weights are shared, not copied.
    """

    frequency: Tensor

    def __init__(self, bert: BERT4Rec) -> None:
        super().__init__()
        encoder = bert.encoder
        self.longest = encoder.max_len - 1  # one position is the mask token's
        self._is_cosine = bert.head.is_cosine
        self._left_only = bert.left_only
        self.positions, self.embedding_norm = encoder.positions, encoder.embedding_norm
        self.layers, self.final_norm = encoder.layers, encoder.final_norm
        self.times = encoder.times
        rotation = cast(EncoderLayer, encoder.layers[0]).attention.rotation
        if self.times is not None and rotation is not None:
            # A tensor, because ONNX rounds constants of the code to float32.
            self.register_buffer("frequency", turns_a_second(rotation))

    def forward(self, histories: Tensor, item_table: Tensor, times: Tensor | None = None) -> Tensor:
        """float32 [B, D].

        Args:
            histories: int64 [B, L], items 1 ... V, oldest first, padded with 0 on the left; L is
                at most ``longest``.
            item_table: float [V + 2, D]: padding, items, mask token.
            times: int64 [B, L + 2], for a model that reads times, in seconds since 1970 or
                `UNKNOWN`: of the item before the first one, of the items, and of the request. All
                are unknown, or those of the items and of the request are known.
        """
        mask = torch.full_like(histories[:, :1], item_table.shape[0] - 1)
        items = torch.cat([histories, mask], dim=1)
        columns = torch.arange(items.shape[1], device=items.device)
        steps_ago = columns.flip(0)
        # Padding attends to itself: a softmax over no key would be NaN.
        itself = columns == columns[:, None]
        visible = (items > 0)[:, None]
        if self._left_only:
            visible = visible & (columns <= columns[:, None])
        visible = (visible | itself)[:, None]  # [B, 1, L, L]
        layers = cast(list[EncoderLayer], list(self.layers))
        rotation = layers[0].attention.rotation
        turns = None if rotation is None else rotation[steps_ago]  # [L + 1, 2, K / 2]
        hidden = F.embedding(items, item_table).float()
        if self.positions is not None:
            hidden = hidden + self.positions(steps_ago)
        if self.times is not None:
            assert times is not None
            given = _with_gaps(times)
            hidden = hidden + self.times(given, torch.float32).view_as(hidden)
            if turns is not None:
                turns = turns.repeat(items.shape[0], 1, 1)
                turns = with_times(turns, given, self.times.first, self.frequency)
                turns = turns.view(items.shape[0], 1, items.shape[1], 2, -1)
        hidden = self.embedding_norm(hidden)
        for layer in layers:
            is_last = layer is layers[-1]
            attended = _attend(layer, hidden, visible, turns, is_last)
            hidden = hidden[:, -1:] if is_last else hidden
            hidden = hidden + attended
            hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        vectors = self.final_norm(hidden[:, 0])
        return F.normalize(vectors, dim=-1) if self._is_cosine else vectors


def _with_gaps(times: Tensor) -> Tensor:
    """Seconds and gaps, [B (L + 1), 2], of times [B, L + 2]."""
    before, seconds = times[:, :-1], times[:, 1:]
    gaps = (seconds - before).clamp(min=0)
    gaps = gaps.masked_fill((seconds == UNKNOWN) | (before == UNKNOWN), UNKNOWN)
    return torch.stack([seconds, gaps], dim=-1).flatten(0, 1)


def _attend(
    layer: EncoderLayer, hidden: Tensor, visible: Tensor, turns: Tensor | None, is_last: bool
) -> Tensor:
    """Attention [B, L, D]; of the last position only, [B, 1, D], if ``is_last``."""
    attention: SelfAttention = layer.attention
    projected = attention.project_in(layer.attention_norm(hidden))
    projected = projected.unflatten(-1, (3, attention.heads, -1))  # [B, L, 3, H, K]
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, K]
    if turns is not None:
        cos, sin = turns.unbind(-2)  # [L, K / 2] or [B, 1, L, K / 2]
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    if is_last:
        query, visible = query[:, :, -1:], visible[:, :, -1:]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return attention.project_out(mixed.transpose(1, 2).flatten(2))
