"""Attention within the rows of a jagged batch, on jagged positions or padded ones.

    jagged   values a b c | d e | f g h     FlashAttention takes the rows as they lie
    padded   a b c / . d e / f g h          any device, precision, bias and dropout

Shapes: B rows, L longest row, T positions of all rows, M wanted ones, H heads, W width of a head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.bf16_linear import linear
from model.kernels.varlen_attention import JaggedRows, attend, takes


class RowLayout:
    """Where the positions of a jagged batch are, seen from their rows.

    Positions are counted from the row's end: an index means "how many steps ago", 0 for the newest
    item, whatever the length of the history. Several positions may have the same.

    Args:
        offsets: int64 [B+1] starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [W], which of the first W rows have positions that see only themselves and
            what came before, those first; None: every position sees its whole row.
        steps_ago: int64 [T], if it is not how far a position is from its row's end. Then rows
            W ... 2 W - 1 are second streams: position t of such a row, one longer than row w, sees
            itself and the first t positions of row w, and nobody sees it.
    """

    def __init__(
        self,
        offsets: torch.Tensor,
        num_positions: int,
        longest: int,
        left_only: torch.Tensor | None = None,
        steps_ago: torch.Tensor | None = None,
    ) -> None:
        self.offsets, self.rows, self.longest = offsets, offsets.numel() - 1, longest
        self.left_only = left_only
        self.row = torch.repeat_interleave(
            torch.arange(self.rows, device=offsets.device),
            offsets.diff(),
            output_size=num_positions,  # the host knows T: no synchronisation
        )
        self.flat = torch.arange(num_positions, device=offsets.device)
        self.from_end = offsets[1:][self.row] - self.flat - 1  # [T]
        self.steps_ago = self.from_end if steps_ago is None else steps_ago
        # W where there are second streams, else 0.
        self.windows = 0 if steps_ago is None or left_only is None else left_only.numel()

    def attend_jagged(self, projected: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """FlashAttention over the rows as they lie: [T, 3, H, W] (q, k, v) -> [T, H, W].

        Args:
            rotation: float32 [max_len, 2, W / 2], rotates queries and keys by their positions.
        """
        rows = JaggedRows(self.offsets.int(), self.longest, self.left_only, self.windows)
        return attend(projected, rows, rotation, self.steps_ago)

    def attend_padded(
        self, projected: torch.Tensor, bias: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        """The same for any device and precision, with rows padded to L: [T, 3, H, W] -> [T, H, W].

        Args:
            bias: [H, L, L], added to the attention scores.
            dropout: on the attention probabilities.
        """
        cell = (self.row + 1) * self.longest - 1 - self.from_end  # [T] in the flattened grid
        grid = projected.new_zeros(self.rows * self.longest, *projected.shape[1:])
        grid = grid.index_copy(0, cell, projected).view(self.rows, self.longest, 3, *grid.shape[2:])
        query, key, value = grid.permute(2, 0, 3, 1, 4)  # each [B, H, L, W]
        mask = self._visible()[:, None]  # [B, 1, 1 or L, L]
        if bias is not None:
            mask = torch.where(mask, bias.to(query.dtype), float("-inf"))  # [B, H, L, L]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        if self.windows:
            first, second = slice(0, self.windows), slice(self.windows, 2 * self.windows)
            asked = F.scaled_dot_product_attention(
                query[second],
                torch.cat([key[first], key[second]], dim=2),
                torch.cat([value[first], value[second]], dim=2),
                attn_mask=self._asked()[:, None],
                dropout_p=dropout,
            )
            mixed = torch.cat([mixed[first], asked, mixed[2 * self.windows :]])
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cell)

    def _asked(self) -> torch.Tensor:
        """What second rows see of their first row and of themselves: bool [W, L, 2 L].

        Rows are padded to the left, and second ones are one longer: the position before which a
        query stands is in the next column.
        """
        columns = torch.arange(self.longest, device=self.offsets.device)
        lengths = self.offsets.diff()[: self.windows, None, None]
        earlier = (columns <= columns[:, None]) & (columns >= self.longest - lengths)  # [W, L, L]
        itself = torch.eye(self.longest, dtype=torch.bool, device=self.offsets.device)
        return torch.cat([earlier, itself.expand_as(earlier)], dim=2)

    def _visible(self) -> torch.Tensor:
        """What a query (rows) sees of the keys (columns) of its padded row: bool [B, 1 or L, L]."""
        columns = torch.arange(self.longest, device=self.offsets.device)
        lengths = self.offsets.diff()[:, None]
        # Padded queries, and empty rows, see something: a softmax over nothing would be NaN.
        visible = ((columns >= self.longest - lengths) | (lengths == 0))[:, None]  # [B, 1, L]
        if self.left_only is None:
            return visible
        earlier = columns <= columns[:, None]  # [L, L]
        itself = torch.eye(self.longest, dtype=torch.bool, device=self.offsets.device)
        left_only = F.pad(self.left_only, (0, self.rows - self.left_only.numel()))
        return (visible & (earlier | ~left_only[:, None, None])) | itself  # [B, L, L]


class SelfAttention(nn.Module):
    """Multi-head attention of every position to all positions of its row.

    Without bias and dropout, in half precision on CUDA, the jagged rows are attended as they lie
    (:mod:`model.kernels.varlen_attention`); else they are padded, for
    ``scaled_dot_product_attention``.
    """

    def __init__(
        self, width: int, heads: int, max_len: int, positions: str, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.rotary = positions == "rotary"
        self.distance_bias: nn.Parameter | None = None
        steps = torch.arange(max_len)
        if positions == "bias":
            self.distance_bias = nn.Parameter(torch.zeros(heads, 2 * max_len - 1))
            distance = steps[None, :] - steps[:, None] + max_len - 1  # [L, L] in [0, 2L-2]
            self.register_buffer("distance", distance, persistent=False)
        if self.rotary:
            self.register_buffer("rotation", _rotations(max_len, width // heads), persistent=False)

    @property
    def jagged(self) -> bool:
        """Whether attention may run on jagged rows, as far as that depends on the configuration."""
        plain = self.distance_bias is None and not (self.training and self.dropout)
        return plain and takes(self.project_in.in_features // self.heads)

    def forward(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [M, D] for the ``wanted`` int64 [M] positions alone."""
        return self.project_out(self.mix(packed, layout, wanted))

    def mix(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """What :meth:`forward` projects in the end: as that, [T, D] or [M, D]."""
        projected = linear(self.project_in, packed).view(packed.shape[0], 3, self.heads, -1)
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if self.jagged and half and projected.is_cuda:
            mixed = layout.attend_jagged(projected, self.rotation if self.rotary else None)
        else:
            if self.rotary:
                projected = _rotate(projected, self.rotation[layout.steps_ago])
            dropout = self.dropout if self.training else 0.0
            mixed = layout.attend_padded(projected, self._bias(layout.longest), dropout)
        mixed = mixed if wanted is None else mixed.index_select(0, wanted)
        return mixed.flatten(1)

    def _bias(self, longest: int) -> torch.Tensor | None:
        if self.distance_bias is None:
            return None
        return self.distance_bias[:, self.distance[:longest, :longest]]  # [H, L, L]


def _rotations(max_len: int, width: int) -> torch.Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864): float [L, 2, width / 2]."""
    frequency = 10_000 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(max_len)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(projected: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate queries and keys [T, 3, H, W] by their positions' angles [T, 2, W / 2]."""
    cos, sin = rotation.to(projected.dtype)[:, None, None].unbind(-2)
    low, high = projected[:, :2].chunk(2, dim=-1)
    turned = torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)
    return torch.cat([turned, projected[:, 2:]], dim=1)
