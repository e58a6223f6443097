"""A training step after the lookup: encoder, then the head's loss, on CUDA through CUDA graphs.

    rows of all positions [T, D] -> encoder -> hidden [M, D] -+-> head -> loss
    rows of the candidates [C, D] ----------------------------+

    a shard of one's own kernels       nothing here: ``model/step/train_step.py`` captures whole steps
    one rank otherwise, or ranks that exchange rows by sizes known to all
                                       one pair of graphs for all of it, one for the optimizer
    several ranks otherwise            graphs of the encoder and the optimizer
    replicated tables                  graphs of the encoder

Shapes: T positions of all rows, M masked positions, C candidates, D width; U rows that this rank
has looked up for all.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from model.kernels.l2_normalize import gradient_of_split
from model.losses.sharded_softmax import Opinion
from model.network.encoder import Encoder
from model.network.head import ScoringHead
from model.step.graphs import StepGraphs


class Exchange(Protocol):
    """What a step asks of ranks that look up for each other: ``tables/gathered_rows.py``."""

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows of those [U, D] that each rank has looked up for all."""


class DenseStep(nn.Module):
    """Loss of looked-up rows; knows nothing of TorchRec and owns no parameter.

    Args:
        encoder, head: used, and registered by somebody else, whose names their weights keep.

    Attributes:
        exchange: where ranks look up for each other in training; None: they do not.
        is_whole: the step, from the lookup to the optimizer, may be captured as it is; somebody who
            wants to see its parts may make it False for a while.
    """

    def __init__(self, encoder: Encoder, head: ScoringHead) -> None:
        super().__init__()
        self._parts = (encoder, head)
        self._teachers: Callable[..., list[Opinion]] = lambda *_: []
        self._teacher_share = 0.0
        self._candidates: Callable[[], torch.Tensor] | None = None
        self._whole: StepGraphs | None = None
        self._encode: StepGraphs | None = None
        self._body: Callable[..., torch.Tensor] | None = None
        self.exchange: Exchange | None = None
        self.is_whole = False
        self._hooked = False

    def learn_from(self, teachers: Callable[..., list[Opinion]], share: float) -> None:
        """Besides the targets, aim at what ``teachers`` think."""
        self._teachers, self._teacher_share = teachers, share

    def score_in_place(self, candidates: Callable[[], torch.Tensor]) -> None:
        """Score the rows [C, D] that this gives, not looked-up ones."""
        self._candidates = candidates

    @property
    def is_alike(self) -> bool:
        """Whether all ranks take the same steps through graphs, if any do."""
        return self.exchange is not None

    def accelerate(
        self, compiled: bool, alone: bool, hooked: bool, capturable: bool = False
    ) -> None:
        """Train through CUDA graphs, as far as attention runs on jagged rows; call it on CUDA.

        Args:
            compiled: capture what ``torch.compile`` makes of the encoder: fewer passes over memory,
                at some tens of seconds for the first step.
            alone: there is one rank: nothing between the lookup and its gradients leaves it.
            hooked: autograd is to hand over the encoder's gradients, as DDP wants; never if alone.
            capturable: so are the lookup and the tables' update.
        """
        encoder, _ = self._parts
        if not all(layer.attention.jagged for layer in encoder.layers):
            return
        body = torch.compile(encoder.encode, dynamic=True) if compiled else encoder.encode
        whole = alone or self.exchange is not None
        if whole:
            self._body = body
        if whole and capturable:
            self.is_whole = True
        elif whole:
            self._whole = StepGraphs(self._losses, encoder, hooked=False, is_loss=True)
        else:
            self._encode = StepGraphs(body, encoder, hooked)
        self._hooked = hooked

    def release(self) -> None:
        """Give the graphs up; communicators cannot be closed while a graph sends through them."""
        for graphs in (self._whole, self._encode):
            if graphs is not None:
                graphs.release()

    @property
    def is_graphed(self) -> bool:
        """Whether gradients of the encoder stay where they are, from replay to replay."""
        return self._whole is not None or (self._encode is not None and not self._hooked)

    def forward(
        self,
        items: torch.Tensor,
        candidates: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        targets: torch.Tensor,
        longest: int,
        left_only: torch.Tensor | None = None,
        steps_ago: torch.Tensor | None = None,
        negatives: torch.Tensor | None = None,
        log_counts: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        alike: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's result; arguments as of :class:`Encoder` and :class:`ScoringHead`.

        Args:
            items: [T, D]; or [U, D], in which those of a sampled loss contain the candidates.
            ids: int64 [T + ...], begins with the item ids of the positions: for teachers.
            alike: as in :class:`~pipeline.batches.batch.TrainBatch`.
        """
        encoder, _ = self._parts
        ids = ids if self._teacher_share else None
        given = (offsets, masked, left_only, steps_ago, targets, negatives, log_counts, ids)
        graphs = self.training and alike and masked.numel() > 0
        rows: tuple[torch.Tensor, torch.Tensor | None] = items, candidates
        if self._candidates is not None:
            rows = items, self._candidates()
        elif self._body is not None or (self.exchange is not None and negatives is not None):
            rows = _joined(items, candidates), None
        if graphs and self._whole is not None:
            loss, report = self._whole(*rows, *given)
            return loss, report.clone()

        def encode(
            rows: torch.Tensor,
            offsets: torch.Tensor,
            masked: torch.Tensor,
            left_only: torch.Tensor | None,
            steps_ago: torch.Tensor | None,
        ) -> torch.Tensor:
            if graphs and self._encode is not None:
                return self._encode(rows, offsets, masked, left_only, steps_ago)[0]
            if graphs and self.is_whole:
                assert self._body is not None
                return self._body(rows, offsets, masked, left_only, steps_ago)
            return encoder(rows, offsets, masked, longest, left_only, steps_ago)

        return self._losses(*rows, *given, encode=encode)

    def _losses(
        self,
        rows: torch.Tensor,
        candidates: torch.Tensor | None,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        left_only: torch.Tensor | None,
        steps_ago: torch.Tensor | None,
        targets: torch.Tensor,
        negatives: torch.Tensor | None,
        log_counts: torch.Tensor | None,
        ids: torch.Tensor | None,
        encode: Callable[..., torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        _, head = self._parts
        scored = head.num_candidates(targets, negatives)
        if candidates is None and negatives is None:  # looked up for this rank alone
            rows, candidates = _Split.apply(rows, rows.shape[0] - scored)
        sizes = None
        if self.exchange is not None:
            rows = self.exchange.collect(rows)
            sizes = [len(masked)] * dist.get_world_size() if head.catalog.shared else None
        if candidates is None:
            rows, candidates = _Split.apply(rows, rows.shape[0] - scored)
        layout = offsets, masked, left_only, steps_ago
        encode = encode or self._body
        assert encode is not None
        hidden = encode(rows, *layout)
        opinions = [] if ids is None else self._teachers(ids[: len(rows)], *layout)
        share = self._teacher_share
        return head(hidden, candidates, targets, negatives, log_counts, opinions, share, sizes)


class _Split(torch.autograd.Function):
    """Rows of both features; their gradients are joined without copying a large catalog's."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rows[:count], rows[count:]

    @staticmethod
    def backward(
        ctx: Any, items: torch.Tensor, candidates: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return gradient_of_split(items, candidates), None


def _joined(items: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Rows of both features as one tensor [T + C, D]: the one that the lookup has split, if it has.

    A large catalog's rows are neither copied here, nor their gradients joined by another copy.
    """
    if not len(candidates):
        return items
    base = items._base
    if (
        base is not None
        and base is candidates._base
        and base.shape == (len(items) + len(candidates), *items.shape[1:])
        and items.storage_offset() == base.storage_offset()
        and candidates.data_ptr() == base[len(items) :].data_ptr()
    ):
        return base
    return torch.cat([items, candidates])
