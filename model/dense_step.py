"""A training step after the lookup: encoder, then the head's loss, on CUDA through CUDA graphs.

    rows of all positions [T, D] -> encoder -> hidden [M, D] -+-> head -> loss
    rows of the candidates [C, D] ----------------------------+

    one rank          one pair of graphs for all of it, one for the optimizer
    several ranks     graphs of the encoder, the optimizer and, where the softmax is sharded and its
                      rows stay where they are, the head with all that it exchanges
    replicated tables     graphs of the encoder

Shapes: T positions of all rows, M masked positions, C candidates, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model.encoder import Encoder
from model.graphs import StepGraphs
from model.head import NO_TARGET, ScoringHead
from model.kernels.unit_rows import gradient_of_split
from model.sharded_softmax import Opinion, ask_for_most


class DenseStep(nn.Module):
    """Loss of looked-up rows; knows nothing of TorchRec and owns no parameter.

    Args:
        encoder, head: used, and registered by somebody else, whose names their weights keep.
    """

    def __init__(self, encoder: Encoder, head: ScoringHead) -> None:
        super().__init__()
        self._parts = (encoder, head)
        self._teachers: Callable[..., list[Opinion]] = lambda *_: []
        self._teacher_share = 0.0
        self._candidates: Callable[[], torch.Tensor] | None = None
        self._whole: StepGraphs | None = None
        self._encode: StepGraphs | None = None
        self._score: StepGraphs | None = None
        self._hooked = False

    def learn_from(self, teachers: Callable[..., list[Opinion]], share: float) -> None:
        """Besides the targets, aim at what ``teachers`` think: :class:`model.teachers.Teachers`."""
        self._teachers, self._teacher_share = teachers, share

    def score_in_place(self, candidates: Callable[[], torch.Tensor]) -> None:
        """Score the rows [C, D] that this gives, not looked-up ones."""
        self._candidates = candidates

    def accelerate(self, compiled: bool, alone: bool, hooked: bool) -> None:
        """Train through CUDA graphs, as far as attention runs on jagged rows; call it on CUDA.

        Args:
            compiled: capture what ``torch.compile`` makes of the encoder: fewer passes over memory,
                at some tens of seconds for the first step.
            alone: there is one rank: nothing between the lookup and its gradients leaves it.
            hooked: autograd is to hand over the encoder's gradients, as DDP wants; never if alone.
        """
        encoder, head = self._parts
        if not all(layer.attention.jagged for layer in encoder.layers):
            return
        body = torch.compile(encoder.encode, dynamic=True) if compiled else encoder.encode
        if alone:
            self._body = body
            self._whole = StepGraphs(self._losses, encoder, hooked=False, is_loss=True)
        else:
            self._encode = StepGraphs(body, encoder, hooked)
            # Exchanges of as many ranks as there are must be captured by all at once: by shapes
            # that all agree upon, which candidates that are looked up have not.
            if self._candidates is not None and head.catalog.shared:
                self._score = StepGraphs(self._shared_losses, head, hooked=False, is_loss=True)
        self._hooked = hooked

    @property
    def shares_graphs(self) -> bool:
        """Whether all ranks replay graphs together, of as many masked positions."""
        return self._score is not None

    def release(self) -> None:
        """Give the graphs up; communicators cannot be closed while a graph sends through them."""
        for graphs in (self._whole, self._encode, self._score):
            if graphs is not None:
                graphs.release()

    @property
    def is_graphed(self) -> bool:
        """Whether gradients of the encoder stay where they are, step after step."""
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
        most_masked: Callable[[], int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's result; arguments as of :class:`Encoder` and :class:`ScoringHead`.

        ``ids``, int64 [T + ...], begins with the item ids of the positions: for teachers.
        ``most_masked`` as in :class:`~pipeline.batch.TrainBatch`.
        """
        encoder, head = self._parts
        if self._candidates is not None:
            candidates = self._candidates()
        ids = ids[: len(items)] if self._teacher_share and ids is not None else None
        graphs = self.training and masked.numel() > 0
        if graphs and self._whole is not None:
            rows = (items, candidates) if self._candidates else (_joined(items, candidates), None)
            loss, report = self._whole(
                *rows, offsets, masked, left_only, steps_ago, targets, negatives, log_counts, ids
            )
            return loss, report.clone()
        if graphs and self._encode is not None:
            (hidden,) = self._encode(items, offsets, masked, left_only, steps_ago)
        else:
            hidden = encoder(items, offsets, masked, longest, left_only, steps_ago)
        together = self.training and self._score is not None and ids is None
        if together and (most := (most_masked or ask_for_most(len(hidden)))()):
            missing = most - len(hidden)
            hidden = F.pad(hidden, (0, 0, 0, missing))
            targets = F.pad(targets, (0, missing), value=NO_TARGET)
            loss, report = self._score(hidden, candidates, targets)
            return loss, report.clone()
        opinions = self._opinions(ids, offsets, masked, left_only, steps_ago)
        return head(
            hidden, candidates, targets, negatives, log_counts, opinions, self._teacher_share
        )

    def _shared_losses(
        self, hidden: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Of positions [M, D] as many as every rank has."""
        _, head = self._parts
        sizes = [len(hidden)] * dist.get_world_size()
        return head(hidden, candidates, targets, sizes=sizes)

    def _opinions(self, ids: torch.Tensor | None, *rows: torch.Tensor | None) -> list[Opinion]:
        return [] if ids is None else self._teachers(ids, *rows)

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
    ) -> tuple[torch.Tensor, ...]:
        _, head = self._parts
        if candidates is None:
            scored = head.num_candidates(targets, negatives)
            rows, candidates = _Split.apply(rows, rows.shape[0] - scored)
        hidden = self._body(rows, offsets, masked, left_only, steps_ago)
        opinions = self._opinions(ids, offsets, masked, left_only, steps_ago)
        return head(
            hidden, candidates, targets, negatives, log_counts, opinions, self._teacher_share
        )


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
