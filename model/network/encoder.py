"""The bidirectional transformer of BERT4Rec (arXiv 1904.06690, section 3.3), in plain torch.

Rows of a batch have different lengths, so everything that works position by position (norms,
projections, feed-forward) runs on the packed positions of all rows; only attention sees rows.

    items [T, D] + positions -> layer x N -> norm -> rows of the masked positions [M, D]

Inside autocast on CUDA the same runs through the kernels of :mod:`model.kernels.residual`.

Shapes: B rows, L longest row, T positions of all rows, H heads, D width, M masked positions.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from model.kernels import residual
from model.kernels.bf16_linear import gelu_dropout, linear
from model.kernels.dropout_bits import Dropout, new_dropouts
from model.network.attention import RowLayout, SelfAttention
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


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: EncoderConfig, max_len: int) -> None:
        super().__init__()
        width = config.emb_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(
            width, config.nhead, max_len, config.positions, config.attention_dropout
        )
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

    def forward_fused(
        self,
        packed: torch.Tensor,
        normed: torch.Tensor,
        layout: RowLayout,
        wanted: torch.Tensor | None,
        dropouts: list[Dropout | None],
        following: tuple[nn.LayerNorm, torch.dtype],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward` in fewer passes over memory, from one norm to the next.

        Args:
            packed: float32 [T, D].
            normed: half precision [T, D], what the layer's first norm makes of it.
            layout, wanted: as there.
            dropouts: of the attention's branch, inside of the feed-forward, and of its branch.
            following: the norm of who reads the result, and in which dtype.

        Returns:
            float32 [T, D] and, normed by ``following``, [T, D]; or both [M, D].
        """
        mixed = self.attention.mix(normed, layout, wanted)
        if wanted is not None:
            packed = packed.index_select(0, wanted)
        out = self.attention.project_out
        attended = linear(out, mixed, with_bias=False), out.bias  # the bias is added in the pass
        packed, normed = residual.add(
            packed, *attended, self.feed_forward_norm, dropouts[0], normed.dtype
        )
        into, _, _, out = self.feed_forward
        hidden = gelu_dropout(linear(into, normed, with_bias=False), into.bias, dropouts[1])
        fed = linear(out, hidden, with_bias=False), out.bias
        norm, dtype = following
        return residual.add(packed, *fed, norm, dropouts[2], dtype)


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

    def forward(
        self,
        items: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        longest: int,
        left_only: torch.Tensor | None = None,
        steps_ago: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode a jagged batch.

        Args:
            items: float [T, D] embeddings of all positions, row after row.
            offsets: int64 [B+1] starts of the rows in ``items``; no row longer than ``max_len``, or
                one more with second streams.
            masked: int64 [M] positions in ``items`` whose vectors are wanted.
            longest: rows are padded to this for attention; rounded up, it may exceed ``max_len``.
            left_only: bool [W], of the first W rows those in which a position sees only itself and
                earlier ones: true for the first and false for the rest.
            steps_ago: int64 [T], below ``max_len``: there are second streams, as
                :class:`~model.network.attention.RowLayout` says; None: there are none.

        Returns:
            float [M, D].
        """
        return self.encode(items, offsets, masked, left_only, steps_ago, longest)

    def encode(
        self,
        items: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        left_only: torch.Tensor | None,
        steps_ago: torch.Tensor | None = None,
        longest: int | None = None,
    ) -> torch.Tensor:
        """:meth:`forward` of tensors alone, for CUDA graphs: by their shapes and nothing else."""
        limit = self.max_len if steps_ago is None else self.max_len + 1
        longest = limit if longest is None else min(longest, limit)
        layout = RowLayout(offsets, items.shape[0], longest, left_only, steps_ago)
        if residual.takes(items):
            return self._encode_fused(items, layout, masked)
        if self.positions is not None:
            items = items + self.positions(layout.steps_ago)
        packed = self.dropout(self.embedding_norm(items))
        *lower, last = self.layers
        for layer in lower:
            packed = layer(packed, layout)
        # Nobody reads the last layer elsewhere than at the masked positions: its feed-forward
        # runs on them alone, about a fifth of the work.
        return self.final_norm(last(packed, layout, wanted=masked))

    def _encode_fused(
        self, items: torch.Tensor, layout: RowLayout, masked: torch.Tensor
    ) -> torch.Tensor:
        """The same on CUDA inside autocast: what stands between two products is one pass."""
        half, full = torch.get_autocast_dtype("cuda"), torch.float32
        share = self.dropout.p if self.training else 0.0
        first, *dropouts = new_dropouts(share, 1 + 3 * len(self.layers), items.device)
        table = None if self.positions is None else self.positions.weight
        packed, normed = residual.enter(
            items,
            table,
            layout.steps_ago,
            self.embedding_norm,
            self.layers[0].attention_norm,
            first,
            half,
        )
        readers = [(layer.attention_norm, half) for layer in self.layers[1:]]
        for layer, following in zip(self.layers, [*readers, (self.final_norm, full)], strict=True):
            wanted = masked if layer is self.layers[-1] else None
            own, dropouts = dropouts[:3], dropouts[3:]
            packed, normed = layer.forward_fused(packed, normed, layout, wanted, own, following)
        return normed


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases, as BERT (the paper truncates at two deviations)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
