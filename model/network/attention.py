"""Attention within the rows of a jagged batch.

    jagged   a b c | d e | f g h     FlashAttention on the packed rows: half precision on CUDA
    padded   a b c / . d e / f g h   the reference, on any device and in any precision

Shapes: B rows, L longest row, T positions of all rows, M wanted positions, H heads, K width of a
head, W windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.bf16_linear import linear
from model.kernels.varlen_attention import RowLayout, attend, takes


def attend_padded(layout: RowLayout, projected: Tensor) -> Tensor:
    """Rotated queries, keys and values [T, 3, H, K] -> [T, H, K], with rows padded to L."""
    longest, windows = layout.longest, layout.windows
    cell = (layout.row + 1) * longest - 1 - layout.from_end  # [T] in the flattened grid
    grid = projected.new_zeros(layout.rows * longest, *projected.shape[1:])
    grid = grid.index_copy(0, cell, projected).view(layout.rows, longest, 3, *grid.shape[2:])
    query, key, value = grid.permute(2, 0, 3, 1, 4)  # each [B, H, L, K]
    columns = torch.arange(longest, device=cell.device)
    earlier, itself = columns <= columns[:, None], columns == columns[:, None]  # [L, L]
    lengths = layout.offsets.diff()[:, None]
    filled = (columns >= longest - lengths)[:, None]  # [B, 1, L]
    # Keys (columns) that a query attends to in its row. Padding and empty rows get visible keys,
    # too: a softmax over no key would be NaN.
    visible = filled | (lengths == 0)[:, None]
    if layout.left_only is not None:
        left_only = F.pad(layout.left_only, (0, layout.rows - layout.left_only.numel()))
        visible = (visible & (earlier | ~left_only[:, None, None])) | itself  # [B, L, L]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
    if windows:
        first, second = slice(0, windows), slice(windows, 2 * windows)
        # Keys of the window, then of its second stream, that its queries attend to: [W, L, 2 L].
        # Rows are padded on the left and a second stream is one longer: its position t is in the
        # column of the window's position t - 1.
        before = earlier & filled[first]
        visible = torch.cat([before, itself.expand_as(before)], dim=2)
        second_mixed = F.scaled_dot_product_attention(
            query[second],
            torch.cat([key[first], key[second]], dim=2),
            torch.cat([value[first], value[second]], dim=2),
            attn_mask=visible[:, None],
        )
        mixed = torch.cat([mixed[first], second_mixed, mixed[2 * windows :]])
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cell)


class SelfAttention(nn.Module):
    """Multi-head attention within rows: jagged in half precision on CUDA, else padded."""

    rotation: Tensor | None

    def __init__(self, width: int, heads: int, max_len: int, positions: str) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        rotation = _rotations(max_len, width // heads) if positions == "rotary" else None
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, packed: Tensor, layout: RowLayout, wanted: Tensor | None) -> Tensor:
        """[T, D] -> [T, D], or [M, D] if only the positions ``wanted``, int64 [M], are needed."""
        return self.project_out(self.mix(packed, layout, wanted))

    def mix(self, packed: Tensor, layout: RowLayout, wanted: Tensor | None) -> Tensor:
        """:meth:`forward` without the output projection."""
        projected = linear(self.project_in, packed).view(packed.shape[0], 3, self.heads, -1)
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if half and projected.is_cuda and takes(projected.shape[-1]):
            mixed = attend(projected, layout, self.rotation)
        else:
            if self.rotation is not None:
                projected = _rotate(projected, self.rotation[layout.steps_ago])
            mixed = attend_padded(layout, projected)
        mixed = mixed if wanted is None else mixed.index_select(0, wanted)
        return mixed.flatten(1)


def _rotations(max_len: int, width: int) -> Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864): float [L, 2, width / 2]."""
    frequency = 10_000 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(max_len)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _rotate(projected: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries and keys [T, 3, H, K] by their positions' angles [T, 2, K / 2]."""
    cos, sin = rotation.to(projected.dtype)[:, None, None].unbind(-2)
    low, high = projected[:, :2].chunk(2, dim=-1)
    turned = torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)
    return torch.cat([turned, projected[:, 2:]], dim=1)
