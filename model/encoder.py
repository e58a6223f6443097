"""The bidirectional transformer of BERT4Rec (arXiv 1904.06690, section 3.3), in plain torch.

Rows of a batch have different lengths, so everything that works position by position (norms,
projections, feed-forward) runs on the packed positions of all rows; only attention sees rows.

    items [T, D] + positions -> layer x N -> norm -> rows of the masked positions [M, D]

Shapes: B rows, L longest row, T positions of all rows, H heads, D width, M masked positions.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from pipeline.errors import UserError

POSITIONS = ("bias", "rotary", "none")


@dataclass(frozen=True)
class EncoderConfig:
    """Size and regularisation of the encoder; ``max_len`` comes from the windows."""

    emb_dim: int = field(default=64, metadata={"help": "width of item embeddings and layers"})
    nhead: int = field(default=2, metadata={"help": "attention heads; divides --emb_dim"})
    num_layers: int = field(default=2, metadata={"help": "transformer layers"})
    dropout: float = field(default=0.2, metadata={"help": "dropout on embeddings and residuals"})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "dropout on attention probabilities"}
    )
    positions: str = field(
        default="rotary",
        metadata={
            "help": "how attention sees distance, besides learned positions: bias per head and "
            "distance (learned), rotary, or none",
            "choices": POSITIONS,
        },
    )

    def __post_init__(self) -> None:
        for name in ("emb_dim", "nhead", "num_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.emb_dim % 4:
            raise UserError(
                f"--emb_dim must be a multiple of 4, not {self.emb_dim}: the embedding kernels "
                "read rows in groups of four values"
            )
        if self.emb_dim % self.nhead:
            raise UserError(
                f"--nhead {self.nhead} does not divide --emb_dim {self.emb_dim}: "
                "every head gets an equal part of the width"
            )
        if self.positions not in POSITIONS:
            raise UserError(f"--positions must be one of {', '.join(POSITIONS)}")
        if self.positions == "rotary" and self.emb_dim // self.nhead % 2:
            raise UserError(
                f"--positions rotary needs heads of even width, not {self.emb_dim // self.nhead}: "
                "change --nhead or --emb_dim"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1), not {getattr(self, name)}")


class RowLayout:
    """Where the packed positions of a jagged batch lie in a padded [B, L] grid.

    Rows are aligned at their end, column L-1 holds the newest item, and positions are counted from
    there: an index means "how many steps ago" whatever the length of the history.

    Args:
        offsets: int64 [B+1] starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [B], rows whose positions see only themselves and what came before; None:
            every position sees its whole row.
    """

    def __init__(
        self,
        offsets: torch.Tensor,
        num_positions: int,
        longest: int,
        left_only: torch.Tensor | None = None,
    ) -> None:
        rows = offsets.numel() - 1
        self.offsets, self.rows, self.longest = offsets, rows, longest
        row = torch.repeat_interleave(
            torch.arange(rows, device=offsets.device),
            offsets.diff(),
            output_size=num_positions,  # the host knows T: no synchronisation
        )
        flat = torch.arange(num_positions, device=offsets.device)
        self.steps_ago = offsets[1:][row] - flat - 1  # [T], 0 = newest
        self.cell = (row + 1) * longest - 1 - self.steps_ago  # [T] in the flattened grid
        columns = torch.arange(longest, device=offsets.device)
        self.visible = (columns >= longest - offsets.diff()[:, None])[:, None]  # [B, 1, L]
        self.left_only = left_only
        if left_only is not None:
            earlier = columns <= columns[:, None]  # [L, L]
            # A padded query sees itself: a softmax over nothing would be NaN.
            self.visible = (self.visible & (earlier | ~left_only[:, None, None])) | torch.eye(
                longest, dtype=torch.bool, device=offsets.device
            )  # [B, L, L]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [B, L, C], zeros where a row has no item."""
        grid = packed.new_zeros(self.rows * self.longest, packed.shape[1])
        return grid.index_copy(0, self.cell, packed).view(self.rows, self.longest, -1)

    def pack(self, grid: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        """[B, L, C] -> [T, C], or [M, C] for the ``wanted`` int64 [M] packed positions."""
        cell = self.cell if wanted is None else self.cell.index_select(0, wanted)
        return grid.reshape(self.rows * self.longest, -1).index_select(0, cell)


class SelfAttention(nn.Module):
    """Multi-head attention of every position to all positions of its row.

    Without bias and dropout, in half precision on CUDA, the jagged rows are attended as they lie
    (``varlen_attn``, FlashAttention); else they are padded for ``scaled_dot_product_attention``.
    """

    def __init__(self, config: EncoderConfig, max_len: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.nhead, config.attention_dropout
        self.project_in = nn.Linear(config.emb_dim, 3 * config.emb_dim)
        self.project_out = nn.Linear(config.emb_dim, config.emb_dim)
        self.rotary = config.positions == "rotary"
        self.distance_bias: nn.Parameter | None = None
        steps = torch.arange(max_len)
        if config.positions == "bias":
            self.distance_bias = nn.Parameter(torch.zeros(config.nhead, 2 * max_len - 1))
            distance = steps[None, :] - steps[:, None] + max_len - 1  # [L, L] in [0, 2L-2]
            self.register_buffer("distance", distance, persistent=False)
        if self.rotary:
            self.register_buffer(
                "rotation", _rotations(max_len, config.emb_dim // config.nhead), persistent=False
            )

    def forward(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [M, D] for the ``wanted`` positions alone."""
        projected = self.project_in(packed).view(packed.shape[0], 3, self.heads, -1)
        if self.rotary:
            projected = _rotate(projected, self.rotation[layout.steps_ago])
        dropout = self.dropout if self.training else 0.0
        jagged = self.distance_bias is None and not dropout and projected.is_cuda
        jagged = jagged and layout.left_only is None
        if jagged and projected.dtype in (torch.bfloat16, torch.float16):
            query, key, value = projected.unbind(1)
            starts = layout.offsets.int()
            mixed = varlen_attn(query, key, value, starts, starts, layout.longest, layout.longest)
            mixed = mixed if wanted is None else mixed.index_select(0, wanted)
            return self.project_out(mixed.flatten(1))
        return self.project_out(self._padded(projected, layout, dropout, wanted))

    def _padded(
        self,
        projected: torch.Tensor,
        layout: RowLayout,
        dropout: float,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        grid = layout.pad(projected.flatten(1))  # [B, L, 3D]
        query, key, value = grid.view(layout.rows, layout.longest, 3, self.heads, -1).permute(
            2, 0, 3, 1, 4
        )  # each [B, H, L, D/H]
        mask = layout.visible[:, None]  # [B, 1, 1 or L, L]
        if self.distance_bias is not None:
            distance = self.distance[: layout.longest, : layout.longest]
            bias = self.distance_bias[:, distance].to(query.dtype)  # [H, L, L]
            mask = torch.where(mask, bias, float("-inf"))  # [B, H, L, L]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return layout.pack(mixed.transpose(1, 2), wanted)


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


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: EncoderConfig, max_len: int) -> None:
        super().__init__()
        width = config.emb_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(config, max_len)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [M, D] for the ``wanted`` int64 [M] positions alone."""
        attended = self.attention(self.attention_norm(packed), layout, wanted)
        if wanted is not None:
            packed = packed.index_select(0, wanted)
        packed = packed + self.dropout(attended)
        return packed + self.dropout(self.feed_forward(self.feed_forward_norm(packed)))


class Encoder(nn.Module):
    """Contextual vectors of the masked positions."""

    def __init__(self, config: EncoderConfig, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self.positions = nn.Embedding(max_len, config.emb_dim)
        self.embedding_norm = nn.LayerNorm(config.emb_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, max_len) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.apply(_initialise)

    def forward(
        self,
        items: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        longest: int,
        left_only: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode a jagged batch.

        Args:
            items: float [T, D] embeddings of all positions, row after row.
            offsets: int64 [B+1] starts of the rows in ``items``; no row longer than ``max_len``.
            masked: int64 [M] positions in ``items`` whose vectors are wanted.
            longest: rows are padded to this for attention; rounded up, it may exceed ``max_len``.
            left_only: bool [B], rows in which a position sees only itself and earlier ones.

        Returns:
            float [M, D].
        """
        layout = RowLayout(offsets, items.shape[0], min(longest, self.max_len), left_only)
        packed = self.embedding_norm(items + self.positions(layout.steps_ago))
        packed = self.dropout(packed)
        *lower, last = self.layers
        for layer in lower:
            packed = layer(packed, layout)
        # Nobody reads the last layer elsewhere than at the masked positions: its feed-forward
        # runs on them alone, about a fifth of the work.
        return self.final_norm(last(packed, layout, wanted=masked))


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases, as BERT (the paper truncates at two deviations)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
