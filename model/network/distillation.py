"""Knowledge distillation: a model learns from the data and from trained models.

    rows of a batch -+-> the model in training -> hidden [M, D] --------------------+-> loss
                     +-> each teacher: table, encoder -> hidden [M, E], logits of --+
                         all items; their probabilities are averaged over the teachers

Teachers may have other sizes, but the same catalog; they are not sharded. After Hinton et
al. (arXiv 1503.02531) at temperature 1, and born-again networks (arXiv 1805.04770).

Shapes: T positions, M masked ones, C items of this rank's slice, E a teacher's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.losses.sharded_softmax import TeacherLogits
from model.network.encoder import Encoder, Layout
from model.network.head import ScoringHead


class Teacher:
    """A trained model; not part of the model in training.

    Args:
        items: [V + 2, E], the rows that it encodes.
        candidates: [C, E], the rows that score this rank's items.
        dtype: of its matrix products.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ScoringHead,
        items: Tensor,
        candidates: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._encoder = encoder.eval().requires_grad_(False)
        self.uses_times = encoder.times is not None
        self._head, self._items = head, items
        self._rows = head.project(candidates).to(dtype)
        self._bound = head.scale if head.is_cosine else torch.inf

    @torch.no_grad()
    def __call__(self, ids: Tensor, layout: Layout) -> TeacherLogits:
        """Its logits at the masked positions; ``ids``, int64 [T], are the items of all rows."""
        hidden = self._encoder(self._items.index_select(0, ids), *layout)
        hidden = self._head.project(hidden) * self._head.scale
        return TeacherLogits(hidden.to(self._rows.dtype), self._rows, self._bound)


@dataclass(frozen=True)
class Teachers:
    """All teachers, and their share of the loss, in (0, 1]."""

    models: list[Teacher]
    share: float

    @property
    def use_times(self) -> bool:
        """Whether one of them reads times."""
        return any(teacher.uses_times for teacher in self.models)
