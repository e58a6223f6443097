"""The items that may be recommended.

Shapes: V items.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.evaluation.catalog_scores import popularity_penalty
from model.serving.config import Choice
from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from pipeline.serving.histories import dense_ids


class Eligible:
    """The items that a choice and the lists of original ids leave, never padding or the mask token.

    Raises:
        UserError: they leave none.
    """

    def __init__(
        self,
        catalog: Catalog,
        choice: Choice,
        allow: Iterable[object] | None = None,
        deny: Iterable[object] = (),
    ) -> None:
        self.choice, self._counts = choice, catalog.train_counts
        self.k = min(choice.k, len(catalog.items))
        self.mask = np.ones(len(catalog.items) + 2, bool)  # [V + 2]
        self.unknown = 0  # ids of both lists that the catalog does not have
        for ids, value in ((allow, True), (deny, False)):
            if ids is None:
                continue
            found = dense_ids(ids, catalog)
            self.unknown += int((found == 0).sum())
            if value:
                self.mask[:] = False
            self.mask[found] = value
        if choice.cold == "drop":
            self.mask[1:-1] &= catalog.is_trained()
        self.mask[[0, -1]] = False
        if not self.mask.any():
            raise UserError(
                f"none of the {len(catalog.items):,} items may be recommended: check --allow, "
                "--deny and --cold"
            )

    def added(self, scale: float, device: torch.device) -> Tensor:
        """float32 [V + 2] to add to scores, logits divided by ``scale``; -inf leaves an item out.

        The popularity discount is that of an evaluation.
        """
        lowered = torch.zeros(len(self.mask))
        if discount := self.choice.popularity_discount:
            counts = F.pad(torch.from_numpy(self._counts.astype(np.float32)), (1, 1))
            lowered = popularity_penalty(counts) * (discount / scale)
        return torch.where(torch.from_numpy(self.mask), -lowered, -torch.inf).to(device)

    def popular(self) -> tuple[np.ndarray, np.ndarray]:
        """The k most popular items and their training counts: int64 [k], 0 = none; float32 [k]."""
        items = np.flatnonzero(self.mask)
        counts = self._counts[items - 1]
        best = np.argsort(-counts, kind="stable")[: self.k]
        missing = (0, self.k - len(best))
        return np.pad(items[best], missing), np.pad(counts[best].astype(np.float32), missing)
