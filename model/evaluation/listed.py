"""What users' best items are: how much of the catalog they cover, how popular they are.

coverage@k     share of the catalog that is in any list of k items
popularity@k   mean training count of the listed items
novelty@k      mean of -log2(training count / all training counts) of the listed items, in bits; an
               item without training counts as one with a count of 1

Shapes: U users of a block, L lengths of lists, V items.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.evaluation.catalog_scores import CatalogScores
from model.evaluation.top_items import top_items, whole_chunks
from model.evaluation.users import EncodedUsers

# Longer lists would cost more than the ranks.
LONGEST = 100


class ListedItems:
    """Counts how often each item is listed; its own users of each rank.

    Args:
        lengths: of the lists, ascending.
        lowered: float32 [V + 2], subtracted from the items' scores.
    """

    def __init__(
        self, num_items: int, lengths: Sequence[int], lowered: Tensor | None, device: torch.device
    ) -> None:
        self._lengths = [min(length, num_items) for length in lengths]
        self._names = list(lengths)
        nothing = torch.zeros(num_items + 2, device=device)
        self._added = nothing if lowered is None else -lowered
        # Row l: items at the places of list l that are beyond list l - 1.
        size = len(lengths), num_items + 2
        self._counts = torch.zeros(size, dtype=torch.int64, device=device)

    def add(self, users: EncodedUsers, catalog: CatalogScores) -> None:
        """List the best items of a block of users; called on all ranks."""
        parts = ((part, whole_chunks(rows)) for part, rows in catalog.rows_of_parts())
        items, _ = top_items(users, parts, self._added, self._lengths[-1], catalog.shared)
        for row, (low, high) in enumerate(pairwise([0, *self._lengths])):
            places = items[users.first, low:high].flatten()
            self._counts[row].index_add_(0, places, torch.ones_like(places))

    def metrics(self, train_item_counts: np.ndarray) -> dict[str, float]:
        """Metrics over the lists of all ranks, the same on every rank.

        Args:
            train_item_counts: int64 [V + 2].
        """
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        counts = self._counts.cumsum(dim=0).cpu().numpy()[:, 1:-1]
        popularity = train_item_counts[1:-1].astype(np.float64)
        novelty = np.log2(popularity.sum() / np.maximum(popularity, 1))
        found: dict[str, float] = {}
        for name, values in (("coverage", None), ("popularity", popularity), ("novelty", novelty)):
            for length, listed in zip(self._names, counts, strict=True):
                shares = listed / max(1, listed.sum())
                value = (listed > 0).mean() if values is None else shares @ values
                found[f"{name}@{length}"] = float(value)
        return found
