"""Attention within the rows of a jagged batch.

    jagged   a b c | d e | f g h     packed rows (varlen_attention.py): half precision on CUDA
    padded   a b c / . d e / f g h   on any device and in any precision (padded.py)

Shapes: T positions of all rows, M wanted positions, D width, H heads, K width of a head, L longest
row.
"""

import torch
from torch import Tensor, nn

from model.kernels.bf16_linear import linear
from model.kernels.varlen_attention import RowLayout, attend, takes
from model.network.padded import attend_padded, attend_padded_by_length


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
        rotation, row = self.rotation, layout.steps_ago
        if layout.rotation is not None:
            rotation, row = layout.rotation, layout.place
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if half and projected.is_cuda and takes(projected.shape[-1]):
            mixed = attend(projected, layout, rotation, row)
        else:
            if rotation is not None:
                projected = _rotate(projected, rotation[row])
            # On CUDA the host would wait for the lengths.
            padded = attend_padded_by_length if projected.device.type == "cpu" else attend_padded
            mixed = padded(layout, projected)
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
    return torch.cat([rotated(projected[:, :2], cos, sin), projected[:, 2:]], dim=1)


def rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors [..., K] rotated by the cosines and sines of their angles, [..., K / 2].

    Value i of the first half and value i of the second are a pair.
    """
    low, high = vectors.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)
