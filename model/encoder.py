"""The bidirectional transformer of BERT4Rec (arXiv 1904.06690, section 3.3), in plain torch.

Rows of a batch have different lengths, so everything that works position by position (norms,
projections, feed-forward) runs on the packed positions of all rows; only attention sees rows.

    items [T, D] + positions -> layer x N -> norm -> rows of the masked positions [M, D]

Shapes: B rows, L longest row, T positions of all rows, H heads, D width, M masked positions.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from model.graphs import StepGraphs
from pipeline.errors import UserError

POSITIONS = ("bias", "rotary", "none")
# "No key to the right of the query" in the words of torch up to 2.10 and from 2.11 on.
_ONLY_LEFT: dict[str, Any] = (
    {"is_causal": True}
    if "is_causal" in inspect.signature(varlen_attn).parameters
    else {"window_size": (-1, 0)}
)


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
            "help": "how attention sees distance: bias per head and distance (learned), rotary, or "
            "none",
            "choices": POSITIONS,
        },
    )
    learned_positions: bool = field(
        default=True,
        metadata={
            "help": "add a learned vector for how many steps ago a position is; without it a "
            "position that sees its left alone is encoded as if its row ended there"
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
        if self.positions == "none" and not self.learned_positions:
            raise UserError(
                "--positions none needs --learned_positions true: else the order of items is lost"
            )
        if self.positions == "rotary" and self.emb_dim // self.nhead % 2:
            raise UserError(
                f"--positions rotary needs heads of even width, not {self.emb_dim // self.nhead}: "
                "change --nhead or --emb_dim"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1), not {getattr(self, name)}")


class RowLayout:
    """Where the positions of a jagged batch are, seen from their rows.

    Positions are counted from the row's end: an index means "how many steps ago", 0 for the newest
    item, whatever the length of the history.

    Args:
        offsets: int64 [B+1] starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [B], rows whose positions see only themselves and what came before, all of
            them before the others; None: every position sees its whole row.
    """

    def __init__(
        self,
        offsets: torch.Tensor,
        num_positions: int,
        longest: int,
        left_only: torch.Tensor | None = None,
    ) -> None:
        self.offsets, self.rows, self.longest = offsets, offsets.numel() - 1, longest
        self.left_only = left_only
        self.row = torch.repeat_interleave(
            torch.arange(self.rows, device=offsets.device),
            offsets.diff(),
            output_size=num_positions,  # the host knows T: no synchronisation
        )
        self.flat = torch.arange(num_positions, device=offsets.device)
        self.steps_ago = offsets[1:][self.row] - self.flat - 1  # [T]

    def attend_jagged(self, projected: torch.Tensor) -> torch.Tensor:
        """FlashAttention over the rows as they lie: [T, 3, H, W] (q, k, v) -> [T, H, W].

        Rows with left context alone are one causal call, the others a second one; to either, the
        rows of the other are empty.
        """
        starts = self.offsets.int()
        if self.left_only is None:
            return self._flash(projected, starts, causal=False)
        split = starts.index_select(0, self.left_only.sum()[None])  # [1], on the device
        is_left = (self.flat < split)[:, None, None]  # [T, 1, 1]
        # Neither call writes what lies outside its rows, in its gradients either: `where` on both
        # sides keeps that memory, whatever is in it, out of the results.
        left = torch.where(is_left[..., None], projected, 0)
        right = torch.where(is_left[..., None], 0, projected)
        return torch.where(
            is_left,
            self._flash(left, torch.minimum(starts, split), causal=True),
            self._flash(right, torch.maximum(starts, split), causal=False),
        )

    def _flash(self, projected: torch.Tensor, starts: torch.Tensor, causal: bool) -> torch.Tensor:
        query, key, value = projected.unbind(1)
        only_left = _ONLY_LEFT if causal else {}
        return varlen_attn(
            query, key, value, starts, starts, self.longest, self.longest, **only_left
        )

    def attend_padded(
        self, projected: torch.Tensor, bias: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        """The same for any device and precision, with rows padded to L: [T, 3, H, W] -> [T, H, W].

        Args:
            bias: [H, L, L], added to the attention scores.
            dropout: on the attention probabilities.
        """
        cell = (self.row + 1) * self.longest - 1 - self.steps_ago  # [T] in the flattened grid
        grid = projected.new_zeros(self.rows * self.longest, *projected.shape[1:])
        grid = grid.index_copy(0, cell, projected).view(self.rows, self.longest, 3, *grid.shape[2:])
        query, key, value = grid.permute(2, 0, 3, 1, 4)  # each [B, H, L, W]
        mask = self._visible()[:, None]  # [B, 1, 1 or L, L]
        if bias is not None:
            mask = torch.where(mask, bias.to(query.dtype), float("-inf"))  # [B, H, L, L]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cell)

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
        return (visible & (earlier | ~self.left_only[:, None, None])) | itself  # [B, L, L]


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

    @property
    def jagged(self) -> bool:
        """Whether attention may run on jagged rows, as far as that depends on the configuration."""
        return self.distance_bias is None and not (self.training and self.dropout)

    def forward(
        self, packed: torch.Tensor, layout: RowLayout, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [M, D] for the ``wanted`` int64 [M] positions alone."""
        projected = self.project_in(packed).view(packed.shape[0], 3, self.heads, -1)
        if self.rotary:
            projected = _rotate(projected, self.rotation[layout.steps_ago])
        half = projected.dtype in (torch.bfloat16, torch.float16)
        if self.jagged and half and projected.is_cuda:
            mixed = layout.attend_jagged(projected)
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = layout.attend_padded(projected, self._bias(layout.longest), dropout)
        mixed = mixed if wanted is None else mixed.index_select(0, wanted)
        return self.project_out(mixed.flatten(1))

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
        self.positions = None
        if config.learned_positions:
            self.positions = nn.Embedding(max_len, config.emb_dim)
        self.embedding_norm = nn.LayerNorm(config.emb_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, max_len) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.apply(_initialise)
        self._graphs: StepGraphs | None = None

    def accelerate(self, compiled: bool, hooked: bool = True) -> None:
        """Train through CUDA graphs, as far as attention runs on jagged rows; call it on CUDA.

        Args:
            compiled: capture what ``torch.compile`` makes of the encoder: fewer passes over memory,
                at some tens of seconds for the first step.
            hooked: as in :class:`~model.graphs.StepGraphs`.
        """
        if all(layer.attention.jagged for layer in self.layers):
            body = torch.compile(self._encode, dynamic=True) if compiled else self._encode
            self._graphs = StepGraphs(body, list(self.parameters()), hooked)

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
            left_only: bool [B], rows in which a position sees only itself and earlier ones, true
                for the first rows and false for the rest.

        Returns:
            float [M, D].
        """
        if self._graphs is not None and self.training and masked.numel():
            return self._graphs(items, offsets, masked, left_only)
        return self._encode(items, offsets, masked, left_only, min(longest, self.max_len))

    def _encode(
        self,
        items: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        left_only: torch.Tensor | None,
        longest: int | None = None,
    ) -> torch.Tensor:
        layout = RowLayout(offsets, items.shape[0], longest or self.max_len, left_only)
        if self.positions is not None:
            items = items + self.positions(layout.steps_ago)
        packed = self.dropout(self.embedding_norm(items))
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
