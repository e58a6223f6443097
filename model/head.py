"""The output layer: scores of items, and the softmax cross-entropy over all of them.

The rows that score items come from an embedding table, looked up as the feature "candidate":
the item table itself (head "tied") or a table of its own (head "linear"). On one rank, or with
replicated tables, the candidates are the whole catalog. With sharded tables each rank looks up
only its own part of it, and the softmax is computed over the parts:

    hidden of all ranks [M, D] x candidates of this rank [C, D] -> partial logits [M, C]
    all-reduce of row maxima and sums of exponentials -> exact softmax over V = sum of C

so that no rank ever holds V x D values.

Shapes: M masked positions (of this rank; of all ranks inside the sharded loss), C candidates of
this rank, V items, D width.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model.sharded_softmax import sharded_cross_entropy
from pipeline.errors import UserError

NO_TARGET = 0  # the padding item


@dataclass(frozen=True)
class HeadConfig:
    """How a hidden vector turns into scores."""

    head: str = field(
        default="tied",
        metadata={
            "help": "tied: the item table scores items; linear: a table of its own does",
            "choices": ("tied", "linear"),
        },
    )
    logit_temperature: float = field(
        default=0.07,
        metadata={"help": "scores are cosines divided by this; 0 means plain dot products"},
    )

    def __post_init__(self) -> None:
        if self.head not in ("tied", "linear"):
            raise UserError(f"--head must be tied or linear, not {self.head!r}")
        if self.logit_temperature < 0:
            raise UserError(f"--logit_temperature must not be negative: {self.logit_temperature}")


@dataclass(frozen=True)
class CatalogSlice:
    """The half-open range of item ids that this rank scores, and how many ranks share the rest.

    ``shared`` is False where every rank scores the whole catalog (one rank, or replicas).
    """

    low: int
    high: int
    shared: bool


def catalog_slice(num_items: int, rank: int, world_size: int, sharded: bool) -> CatalogSlice:
    """This rank's candidates: its row-wise block of the table without padding and mask rows.

    TorchRec's row-wise sharding gives rank r the rows [r * k, (r + 1) * k), k = ceil(rows / ranks);
    cutting the catalog the same way makes the lookup of candidates local to each rank.
    """
    if not sharded or world_size == 1:
        return CatalogSlice(1, num_items + 1, shared=False)
    block = -(-(num_items + 2) // world_size)
    low = min(max(rank * block, 1), num_items + 1)
    high = min(max((rank + 1) * block, 1), num_items + 1)
    return CatalogSlice(low, high, shared=True)


class SoftmaxHead(nn.Module):
    """Scores of candidates and the loss of masked positions."""

    def __init__(self, config: HeadConfig, catalog: CatalogSlice) -> None:
        super().__init__()
        self.config, self.catalog = config, catalog

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit length for cosine scores, unchanged for dot products; float32 [*, D]."""
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.config.logit_temperature else vectors

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return 1 / (self.config.logit_temperature or 1.0)

    def forward(
        self, hidden: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over the masked positions of all ranks.

        Args:
            hidden: [M, D] vectors of this rank's masked positions.
            candidates: [C, D] rows of the items ``catalog.low`` … ``catalog.high - 1``.
            targets: int64 [M] item ids; 0 where nothing is to be predicted.

        Returns:
            The loss to call ``backward()`` on (float32 scalar), scaled so that the mean over
            ranks of its gradients is the gradient of the global mean; and float32 [2], the sum of
            this rank's losses and their number, detached, for the log.
        """
        hidden, candidates = self.project(hidden) * self.scale, self.project(candidates)
        if self.catalog.shared:
            losses = sharded_cross_entropy(hidden, candidates, targets, self.catalog.low)
        else:
            logits = (hidden @ candidates.T).float()
            low = self.catalog.low
            losses = F.cross_entropy(
                logits, targets - low, reduction="none", ignore_index=NO_TARGET - low
            )
        counted = targets != NO_TARGET
        total = torch.where(counted, losses, 0.0).sum()
        count = counted.sum().to(total.dtype)
        report = torch.stack([total.detach(), count])
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            dist.all_reduce(count)
        return total * world_size / count.clamp(min=1), report
