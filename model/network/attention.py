"""Attention within the rows of a jagged batch, on jagged positions or padded ones.

    jagged   a b c | d e | f g h     FlashAttention on the packed rows: half precision on CUDA
    padded   a b c / . d e / f g h   the reference, on any device and in any precision

Shapes: B rows, L longest row, T positions of all rows, M wanted positions, H heads, K width of a
head, W windows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.bf16_linear import linear
from model.kernels.varlen_attention import JaggedRows, attend, takes


class RowLayout:
    """The rows of a jagged batch, and which positions attend to which.

    Positions are counted from the row's end: index 0 is the newest item, whatever the length of the
    history. Several positions may have the same index.

    Args:
        offsets: int64 [B + 1], starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [W], whether each of the first W rows has left context alone (a position
            attends to itself and earlier ones); those that do come first. None: in every row all
            positions attend to all.
        steps_ago: int64 [T], position indices, if the batch has second streams. Then rows
            W ... 2 W - 1 are second streams: position t of such a row, which is one longer than
            row w, attends to itself and to the first t positions of row w; no other position
            attends to it. None: the index is the distance from the row's end.
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
        """FlashAttention on the packed rows: queries, keys and values [T, 3, H, K] -> [T, H, K].

        Args:
            rotation: float32 [max_len, 2, K / 2], rotates queries and keys by their positions.
        """
        rows = JaggedRows(self.offsets.int(), self.longest, self.left_only, self.windows)
        return attend(projected, rows, rotation, self.steps_ago)

    def attend_padded(self, projected: torch.Tensor) -> torch.Tensor:
        """The same with rows padded to L, on any device: rotated [T, 3, H, K] -> [T, H, K]."""
        cell = (self.row + 1) * self.longest - 1 - self.from_end  # [T] in the flattened grid
        grid = projected.new_zeros(self.rows * self.longest, *projected.shape[1:])
        grid = grid.index_copy(0, cell, projected).view(self.rows, self.longest, 3, *grid.shape[2:])
        query, key, value = grid.permute(2, 0, 3, 1, 4)  # each [B, H, L, K]
        mask = self._visible()[:, None]  # [B, 1, 1 or L, L]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self.windows:
            first, second = slice(0, self.windows), slice(self.windows, 2 * self.windows)
            second_mixed = F.scaled_dot_product_attention(
                query[second],
                torch.cat([key[first], key[second]], dim=2),
                torch.cat([value[first], value[second]], dim=2),
                attn_mask=self._visible_to_second()[:, None],
            )
            mixed = torch.cat([mixed[first], second_mixed, mixed[2 * self.windows :]])
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cell)

    def _visible_to_second(self) -> torch.Tensor:
        """Keys that a second stream's query attends to: bool [W, L, 2 L].

        The first L columns are those of the window, the others its second stream's. Rows are padded
        on the left and a second stream is one longer, so its position t is in the column of the
        window's position t - 1.
        """
        columns = torch.arange(self.longest, device=self.offsets.device)
        lengths = self.offsets.diff()[: self.windows, None, None]
        earlier = (columns <= columns[:, None]) & (columns >= self.longest - lengths)  # [W, L, L]
        itself = torch.eye(self.longest, dtype=torch.bool, device=self.offsets.device)
        return torch.cat([earlier, itself.expand_as(earlier)], dim=2)

    def _visible(self) -> torch.Tensor:
        """Keys (columns) that a query attends to in its padded row: bool [B, 1 or L, L]."""
        columns = torch.arange(self.longest, device=self.offsets.device)
        lengths = self.offsets.diff()[:, None]
        # Padding and empty rows attend to something too: a softmax over nothing would be NaN.
        visible = ((columns >= self.longest - lengths) | (lengths == 0))[:, None]  # [B, 1, L]
        if self.left_only is None:
            return visible
        earlier = columns <= columns[:, None]  # [L, L]
        itself = torch.eye(self.longest, dtype=torch.bool, device=self.offsets.device)
        left_only = F.pad(self.left_only, (0, self.rows - self.left_only.numel()))
        return (visible & (earlier | ~left_only[:, None, None])) | itself  # [B, L, L]


class SelfAttention(nn.Module):
    """Multi-head attention within rows: jagged in half precision on CUDA, else padded."""

    rotation: torch.Tensor

    def __init__(self, width: int, heads: int, max_len: int, positions: str) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.rotary = positions == "rotary"
        if self.rotary:
            self.register_buffer("rotation", _rotations(max_len, width // heads), persistent=False)

    @property
    def jagged(self) -> bool:
        """Whether the kernels of jagged attention support this width of a head."""
        return takes(self.project_in.in_features // self.heads)

    def forward(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [M, D] if only the positions ``wanted``, int64 [M], are needed."""
        return self.project_out(self.mix(packed, layout, wanted))

    def mix(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """:meth:`forward` without the output projection."""
        projected = linear(self.project_in, packed).view(packed.shape[0], 3, self.heads, -1)
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if self.jagged and half and projected.is_cuda:
            mixed = layout.attend_jagged(projected, self.rotation if self.rotary else None)
        else:
            if self.rotary:
                projected = _rotate(projected, self.rotation[layout.steps_ago])
            mixed = layout.attend_padded(projected)
        mixed = mixed if wanted is None else mixed.index_select(0, wanted)
        return mixed.flatten(1)


def _rotations(max_len: int, width: int) -> torch.Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864): float [L, 2, width / 2]."""
    frequency = 10_000 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(max_len)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(projected: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate queries and keys [T, 3, H, K] by their positions' angles [T, 2, K / 2]."""
    cos, sin = rotation.to(projected.dtype)[:, None, None].unbind(-2)
    low, high = projected[:, :2].chunk(2, dim=-1)
    turned = torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)
    return torch.cat([turned, projected[:, 2:]], dim=1)
