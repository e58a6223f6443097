"""Trained models from which a new one learns, besides the data (knowledge distillation).

    rows of a batch -+-> the model in training -> hidden [M, D] --------------------+-> loss
                     +-> each teacher: table, encoder -> hidden [M, E], logits of --+
                         all items; their probabilities are averaged over the teachers

An ensemble estimates item probabilities better than any of its members; distillation trains one
model to match it. Teachers encode the same masked rows without dropout; they may have other sizes,
but the same catalog. Every rank holds them whole. After Hinton et al. (arXiv 1503.02531) at
temperature 1, and born-again networks (arXiv 1805.04770), whose teachers are no larger than their
students.

Shapes: T positions, M masked ones, C items of this rank's slice, E a teacher's width.
"""

from dataclasses import dataclass

import torch

from model.losses.sharded_softmax import TeacherLogits
from model.network.encoder import Encoder
from model.network.head import ScoringHead


class Teacher:
    """A trained model; no part of the model in training.

    Args:
        encoder, head: its own, on the device of its rows.
        items: [V + 2, E], the rows that it encodes.
        candidates: [C, E], the rows that score this rank's items.
        dtype: of its products.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ScoringHead,
        items: torch.Tensor,
        candidates: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._encoder = encoder.eval().requires_grad_(False)
        self._head, self._items = head, items
        self._rows = head.project(candidates).to(dtype)
        self._bound = head.scale if head.config.logit_temperature > 0 else torch.inf

    @torch.no_grad()
    def __call__(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        masked: torch.Tensor,
        left_only: torch.Tensor | None,
        steps_ago: torch.Tensor | None,
    ) -> TeacherLogits:
        """Its logits at the masked positions.

        Args:
            ids: int64 [T], the items of all rows, mask tokens among them.
            offsets, masked, left_only, steps_ago: as for :class:`~model.network.encoder.Encoder`.
        """
        items = self._items.index_select(0, ids)
        hidden = self._encoder.encode(items, offsets, masked, left_only, steps_ago)
        hidden = self._head.project(hidden) * self._head.scale
        return TeacherLogits(hidden.to(self._rows.dtype), self._rows, self._bound)


@dataclass(frozen=True)
class Teachers:
    """All teachers, and the share of the loss that aims at them, in (0, 1]."""

    models: list[Teacher]
    share: float

    def __call__(self, *batch: torch.Tensor | None) -> list[TeacherLogits]:
        """The logits of each; arguments as of :class:`Teacher`."""
        return [teacher(*batch) for teacher in self.models]
