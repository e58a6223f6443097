"""The output layer: scores of items, and the loss of the masked positions.

Candidates are the rows to score with: of the whole catalog; with sharded tables, of this rank's
part (:mod:`model.losses.sharded_softmax`); for a sampled loss, of the targets and negatives.

Shapes: M masked positions, C candidates of this rank, K negatives, V items, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.kernels.l2_normalize import unit_rows
from model.losses import sampled
from model.losses.sharded_softmax import (
    NO_TEACHERS,
    Beside,
    TeacherTargets,
    linear_cross_entropy,
)
from model.network.config import HeadConfig


@dataclass(frozen=True)
class CatalogSlice:
    """The items ``low`` ... ``high - 1``, scored by this rank; all items unless ``shared``."""

    low: int
    high: int
    shared: bool


def shard_rows(num_items: int, world_size: int, num_attributes: int = 0) -> int:
    """Rows of a rank's shard: TorchRec gives rank r the rows [r * k, (r + 1) * k), k rounded up.

    The last ranks may have fewer, or none.
    """
    return -(-(num_items + 2 + num_attributes) // world_size)


def catalog_slice(
    num_items: int, rank: int, world_size: int, sharded: bool, num_attributes: int = 0
) -> CatalogSlice:
    """This rank's candidates: the items of its row-wise block of the table.

    With TorchRec's cut of the table each rank finds its candidates in its own memory.
    """
    if not sharded or world_size == 1:
        return CatalogSlice(1, num_items + 1, shared=False)
    block = shard_rows(num_items, world_size, num_attributes)
    low = min(max(rank * block, 1), num_items + 1)
    high = min(max((rank + 1) * block, 1), num_items + 1)
    return CatalogSlice(low, high, shared=True)


class Scored(NamedTuple):
    """What the loss of the masked positions scores.

    Attributes:
        targets: int64 [M] item ids; 0: no target.
        negatives: int64 [K] item ids, of a sampled loss.
        log_counts: float32 [K], logarithms of the negatives' expected counts.
        all_targets: int64 [1], targets of all ranks; None: counted and added up by the loss.
    """

    targets: Tensor
    negatives: Tensor | None = None
    log_counts: Tensor | None = None
    all_targets: Tensor | None = None


class ScoringHead(nn.Module):
    """Scores of the items in ``catalog`` and the loss of masked positions.

    ``is_cosine``: scores are cosines divided by the temperature, else dot products.

    Args:
        num_items: V.
    """

    def __init__(self, config: HeadConfig, catalog: CatalogSlice, num_items: int) -> None:
        super().__init__()
        self.config, self.catalog, self.num_items = config, catalog, num_items
        self.is_cosine = config.logit_temperature > 0

    def project(self, vectors: Tensor) -> Tensor:
        """Unit length for cosine scores, unchanged for dot products; float32 [*, D]."""
        vectors = vectors.float()
        return unit_rows(vectors) if self.is_cosine else vectors

    @property
    def scale(self) -> float:
        """Factor of the scores: 1 / temperature."""
        return 1 / (self.config.logit_temperature or 1.0)

    def start(self, candidates: Tensor, in_backward: bool) -> Beside | None:
        """Start what the exact softmax computes of the candidates alone; before the encoder.

        Args:
            in_backward: as of :meth:`Beside.start`.

        Returns:
            An argument of :meth:`forward`; None for a sampled loss.
        """
        if self.config.loss != "softmax":
            return None
        return Beside.start(candidates, self.is_cosine, in_backward)

    def forward(
        self,
        hidden: Tensor,
        candidates: Tensor,
        scored: Scored,
        teachers: TeacherTargets = NO_TEACHERS,
        sizes: list[int] | None = None,
        beside: Beside | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over the masked positions of all ranks.

        Args:
            hidden: [M, D] vectors of this rank's masked positions.
            candidates: [C, D] rows of the items of this rank's slice; for a sampled loss [M + K, D]
                rows of the targets and the negatives.
            sizes: M of every rank, where the exact softmax is shared; None: exchanged here.
            beside: of :meth:`start`, if it was called.

        Returns:
            The loss, a float32 scalar, scaled so that the mean over ranks of its gradients is the
            gradient of the global mean; float32 [2], this rank's sum of losses and their number.
        """
        if self.config.loss == "softmax":
            losses = linear_cross_entropy(
                hidden.float(),
                beside or Beside.start(candidates, self.is_cosine),
                scored.targets,
                self.catalog.low,
                self.scale,
                self.catalog.shared,
                teachers,
                sizes,
            )
        else:
            losses = self._sampled_losses(hidden, candidates, scored)
        return _global_mean(losses, scored.targets != 0, scored.all_targets)  # 0: the padding item

    def _sampled_losses(self, hidden: Tensor, candidates: Tensor, scored: Scored) -> Tensor:
        """The sampled loss of each position, float32 [M]; arguments as for :meth:`forward`."""
        targets, negatives, log_counts, _ = scored
        assert negatives is not None and log_counts is not None
        hidden, draws = self.project(hidden) * self.scale, negatives.numel()
        own, drawn = self.project(candidates).split([targets.numel(), draws])
        positives, items = (hidden * own).sum(dim=1), (targets, negatives)
        if self.config.loss == "sampled_softmax":
            return sampled.softmax(positives, hidden, drawn, *items, log_counts)
        beta = sampled.gbce_beta(self.config.gbce_calibration, draws, self.num_items)
        return sampled.gbce(positives, hidden @ drawn.T, *items, beta)


def _global_mean(
    losses: Tensor, counted: Tensor, all_counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and report of :meth:`ScoringHead.forward` from the losses of positions, [M].

    Args:
        counted: bool [M], the positions with a target.
        all_counted: int64 [1], their number on all ranks; None: added up here.
    """
    total = torch.where(counted, losses, 0.0).sum()
    count = counted.sum().to(total.dtype)
    report = torch.stack([total.detach(), count])
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if all_counted is not None:
        count = all_counted[0].to(total.dtype)
    elif world_size > 1:
        dist.all_reduce(count)
    return total * world_size / count.clamp(min=1), report
