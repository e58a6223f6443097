"""Scores of a catalog that may be too large to look up at once, for evaluation.

    slice of this rank -> parts of PART_ITEMS -> rows [C, D], looked up -> scores [U, C] of each

A large slice is looked up and scored part by part, and every time anew; its rows stay on the device
for the next users if they take ``KEPT_BYTES`` at most.

Shapes: U users, C items of a part, D width, V items.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.bert4rec import BERT4Rec
from model.network.head import CatalogSlice
from pipeline.batches.features import CANDIDATE, jagged_items, with_candidates

# Items of a part, and what all parts' rows may take on the device between users.
PART_ITEMS = 2**18
KEPT_BYTES = 2 << 30

# Parts of the catalog with their scores [U, C]; gone through more than once.
Scored = Iterable[tuple[CatalogSlice, torch.Tensor]]


class CatalogScores:
    """This rank's slice, part by part; the same number of parts on every rank.

    Args:
        bert: the model.
        lowered: float32 [V + 2], what the score of each item is lowered by; None: by nothing.
    """

    def __init__(
        self, bert: BERT4Rec, device: torch.device, lowered: torch.Tensor | None = None
    ) -> None:
        self.bert, self.device, self._lowered = bert, device, lowered
        whole = bert.head.catalog
        self.shared = whole.shared
        largest = torch.tensor(whole.high - whole.low)
        if self.shared:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self.part_items = max(1, min(int(largest), PART_ITEMS))
        starts = range(whole.low, whole.low + max(1, int(largest)), self.part_items)
        ends = (start + self.part_items for start in starts)
        self.parts = [
            CatalogSlice(min(start, whole.high), min(end, whole.high), whole.shared)
            for start, end in zip(starts, ends, strict=True)
        ]
        first = self._rows(self.parts[0])
        keep = 4 * int(largest) * first.shape[1] <= KEPT_BYTES
        self._kept = [first, *map(self._rows, self.parts[1:])] if keep else None

    def scored(self, hidden: torch.Tensor) -> Scored:
        """Scores of the parts for users [U, D]; of a single one, computed once."""
        scores = _Parts(self, hidden)
        return list(scores) if len(self.parts) == 1 else scores

    def part_scores(
        self, part: CatalogSlice, rows: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """float32 [U, C] of one part."""
        scores = hidden @ rows.T
        return scores if self._lowered is None else scores - self._lowered[part.low : part.high]

    def counted(self, counts: torch.Tensor, users: int) -> Scored:
        """The same scores, float32 [V + 2] by item, for all users."""
        return [(part, counts[part.low : part.high].expand(users, -1)) for part in self.parts]

    def __iter__(self) -> Iterator[tuple[CatalogSlice, torch.Tensor]]:
        rows = self._kept or map(self._rows, self.parts)
        return zip(self.parts, rows, strict=True)

    def _rows(self, part: CatalogSlice) -> torch.Tensor:
        """Scoring rows [C, D], looked up as the training step does."""
        nothing = jagged_items(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        features = with_candidates(nothing.to(self.device), (part.low, part.high))
        return self.bert.head.project(self.bert.embeddings(features)[CANDIDATE].values())


@dataclass
class _Parts:
    """Scores of all parts, computed anew whenever they are gone through."""

    catalog: CatalogScores
    hidden: torch.Tensor

    def __iter__(self) -> Iterator[tuple[CatalogSlice, torch.Tensor]]:
        for part, rows in self.catalog:
            yield part, self.catalog.part_scores(part, rows, self.hidden)
