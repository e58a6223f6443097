"""Scores of a catalog that may be too large to look up at once, for evaluation.

    slice of this rank -> parts of PART_ITEMS -> rows [C, D], looked up -> scores [U, C] of each

The rows of a slice of at most ``KEPT_BYTES`` stay on the device for the next users; a larger slice
is looked up part by part for every block of users.

Shapes: U users, C items of a part, D width, V items.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from model.bert4rec import BERT4Rec
from model.network.head import CatalogSlice
from pipeline.batches.features import Ids, jagged_items, with_candidates

PART_ITEMS = 2**18
KEPT_BYTES = 2 << 30

# Returns the parts of the catalog with their scores [U, C]; called more than once.
Scored = Callable[[], Iterable[tuple[CatalogSlice, Tensor]]]


def popularity_penalty(counts: Tensor) -> Tensor:
    """What a popularity discount of 1 subtracts from logits, float32, by items' training counts.

    An item of count 0, whose logit was never trained, is lowered like the most popular one.
    """
    penalty = (counts.float() + 1).log()
    return torch.where(counts > 0, penalty, penalty.max())


class CatalogScores:
    """This rank's slice of the catalog in parts; every rank has the same number of them.

    Args:
        lowered: float32 [V + 2], subtracted from the items' scores.
        laid_out: applied to the scoring rows of each part.
        part_items: most items of a part; None: ``PART_ITEMS``.
    """

    def __init__(
        self,
        bert: BERT4Rec,
        device: torch.device,
        lowered: Tensor | None = None,
        laid_out: Callable[[Tensor], Tensor] | None = None,
        part_items: int | None = None,
    ) -> None:
        self._bert, self._device, self._lowered = bert, device, lowered
        self._laid_out = laid_out
        whole = bert.head.catalog
        self.shared = whole.shared
        largest = torch.tensor(whole.high - whole.low)
        if self.shared:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        self.part_items = max(1, min(int(largest), part_items or PART_ITEMS))
        self.parts = [
            CatalogSlice(min(at, whole.high), min(at + self.part_items, whole.high), whole.shared)
            for at in range(whole.low, whole.low + max(1, int(largest)), self.part_items)
        ]
        first = self._rows(self.parts[0])
        keep = 4 * int(largest) * first.shape[1] <= KEPT_BYTES
        self._kept = [first, *map(self._rows, self.parts[1:])] if keep else None

    def scored(self, hidden: Tensor) -> Scored:
        """Scores of the users' vectors [U, D]; with a single part, computed only once."""
        if len(self.parts) > 1:
            return partial(self._scores, hidden)
        scores = list(self._scores(hidden))
        return lambda: scores

    def counted(self, counts: Tensor, users: int) -> Scored:
        """``counts``, float32 [V + 2] by item, as the scores of every user."""
        scores = [(part, counts[part.low : part.high].expand(users, -1)) for part in self.parts]
        return lambda: scores

    def rows_of_parts(self) -> Iterator[tuple[CatalogSlice, Tensor]]:
        """Each part with its scoring rows [C, D]; on every rank, the same number of times."""
        yield from zip(self.parts, self._kept or map(self._rows, self.parts), strict=True)

    def _scores(self, hidden: Tensor) -> Iterator[tuple[CatalogSlice, Tensor]]:
        for part, rows in self.rows_of_parts():
            scores = hidden @ rows.T
            if self._lowered is not None:
                scores = scores - self._lowered[part.low : part.high]
            yield part, scores

    def _rows(self, part: CatalogSlice) -> Tensor:
        """Scoring rows [C, D], looked up as the training step does."""
        no_rows = jagged_items(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        features = with_candidates(no_rows.to(self._device), (part.low, part.high))
        found = self._bert.candidate_rows(self._bert.embeddings(Ids(features)), part.low)
        rows = self._bert.head.project(found)
        return rows if self._laid_out is None else self._laid_out(rows)
