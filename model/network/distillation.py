"""Trained models that a new one learns from, besides the data (knowledge distillation).

    rows of a batch -+-> the model that is trained -> hidden [M, D] ----------------+-> loss
                     +-> each teacher: table, encoder -> hidden [M, E], logits of --+
                         all items, their probabilities averaged over the teachers

What an item's probability is, several models trained from other seeds know better together than
each of them alone; one model can learn most of it from them. Teachers see the very rows that the
model sees, holes and all, without dropout; they may have other sizes, but the same catalog. Every
rank holds them whole. After Hinton et al. (arXiv 1503.02531) at temperature 1, and born-again
networks (arXiv 1805.04770), whose teachers are no larger than what they teach.

Shapes: T positions, M masked ones, C items of this rank's slice, E a teacher's width.
"""

from dataclasses import dataclass, field

import torch

from model.bert4rec import BERT4Rec
from model.losses.sharded_softmax import TeacherLogits
from model.network.head import CatalogSlice
from pipeline.batches.features import CANDIDATE
from pipeline.errors import UserError


@dataclass(frozen=True)
class TeachersConfig:
    """Who teaches, and how much that counts."""

    teachers: str = field(
        default="",
        metadata={
            "help": "trained models to learn from besides the data: run folders or exported "
            "models, separated by commas"
        },
    )
    teacher_share: float = field(
        default=0.8,
        metadata={"help": "of the loss that is about the teachers' probabilities, not the targets"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.teacher_share <= 1:
            raise UserError(f"--teacher_share must be in (0, 1], not {self.teacher_share}")
        if self.teachers and not all(self.folders):
            raise UserError(f"--teachers {self.teachers!r} names an empty folder: see the commas")

    @property
    def folders(self) -> list[str]:
        """The teachers' folders."""
        return [folder.strip() for folder in self.teachers.split(",")] if self.teachers else []


class Teacher:
    """A trained model as it thinks about a training batch; no part of what is trained.

    Args:
        model: plain, with its weights; kept whole on ``device``.
        catalog: the slice of items that this rank scores.
        dtype: of its products.
    """

    def __init__(
        self, model: BERT4Rec, catalog: CatalogSlice, device: torch.device, dtype: torch.dtype
    ) -> None:
        tables = {
            feature: model.embeddings.embeddings[config.name].weight.detach()
            for config in model.embeddings.embedding_configs()
            for feature in config.feature_names
        }
        self._encoder = model.encoder.to(device).eval().requires_grad_(False)
        self._head = model.head
        self._items = next(iter(tables.values())).to(device)
        rows = tables[CANDIDATE][catalog.low : catalog.high].to(device)
        self._rows = self._head.project(rows).to(dtype)
        cosine = self._head.config.logit_temperature > 0
        self._bound = self._head.scale if cosine else torch.inf

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
        with torch.no_grad():
            items = self._items.index_select(0, ids)
            hidden = self._encoder.encode(items, offsets, masked, left_only, steps_ago)
            hidden = self._head.project(hidden) * self._head.scale
        return TeacherLogits(hidden.to(self._rows.dtype), self._rows, self._bound)


@dataclass(frozen=True)
class Teachers:
    """All teachers, and the share of the loss that is theirs."""

    models: list[Teacher]
    share: float

    def __call__(self, *batch: torch.Tensor | None) -> list[TeacherLogits]:
        """What each thinks; arguments as of :class:`Teacher`."""
        return [teacher(*batch) for teacher in self.models]
