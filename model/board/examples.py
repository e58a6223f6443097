"""What five fixed users of the validation split are recommended, at every evaluation.

Shapes: U users, k items of each, V items, D width.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from model.board.markdown import escaped, table
from model.distributed import Ranks
from model.evaluation.catalog_scores import CatalogScores
from model.evaluation.evaluate import exact
from model.evaluation.top_items import top_items, whole_chunks
from model.evaluation.users import EncodedUsers, encode
from model.tables.distribute import unwrap
from pipeline.batches.times import ItemTimes
from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore
from pipeline.serving.batches import HistoryBatches
from pipeline.serving.histories import KnownHistories

_USERS, _ITEMS = 5, 10
_SHOWN = 3  # newest items of a history
_TARGET = "✓"


class Examples:
    """Recommendations to users at equal distances in the data, as Markdown.

    As in the full ranking, items of the history are left out, but not the target.

    Args:
        max_len: most items of a history, mask token included.
        keep_seen: leave the history's items among those to recommend.
    """

    def __init__(
        self,
        model: nn.Module,
        store: SequenceStore,
        max_len: int,
        ranks: Ranks,
        keep_seen: bool = False,
    ) -> None:
        self._model, self._store, self._ranks = model, store, ranks
        evaluable = store.evaluable_users("validation")
        places = np.linspace(0, len(evaluable) - 1, min(_USERS, len(evaluable)))
        self._users = evaluable[places.astype(np.int64)]
        begin, end = store.offsets[self._users], store.parts.history_end("validation")[self._users]
        self._targets = store.items[end]
        places = jagged_positions(begin, end)
        times = at = None
        if unwrap(model).encoder.times is not None:
            seconds = ItemTimes(store).seconds
            times, at = seconds(places), seconds(end)  # the targets'
        users, items = pa.nulls(len(begin)), store.items[places]
        self._histories = KnownHistories(users, items, splits(end - begin), times=times, at=at)
        sizes = store.num_items, max_len, len(self._users)
        # The users are those of rank 0; the other ranks have filler rows.
        self._batches = HistoryBatches(
            self._histories,
            *sizes,
            keep_seen=keep_seen,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

    def __call__(self) -> str | None:
        """A table for rank 0, None on other ranks; called on all, with a detached pipeline."""
        found = self.found()
        return self._table(found) if self._ranks.is_first else None

    def found(self) -> np.ndarray:
        """int64 [U, k], best first, 0 = none. Vectors that are not finite count as zeros."""
        (batch,) = self._batches
        bert, device = unwrap(self._model), self._ranks.device
        count = min(_ITEMS, self._store.num_items)
        added = torch.zeros(self._store.num_items + 2, device=device)
        added[[0, -1]] = -torch.inf
        with torch.no_grad(), exact(self._model):
            users = self._without_targets(encode(bert, batch.to(device, non_blocking=True)))
            catalog = CatalogScores(bert, device, laid_out=whole_chunks)
            parts = ((part, rows.nan_to_num()) for part, rows in catalog.rows_of_parts())
            items, _ = top_items(users, parts, added, count, catalog.shared)
        return items[: len(self._users)].cpu().numpy()

    def _without_targets(self, users: EncodedUsers) -> EncodedUsers:
        """The users without their targets among their seen items."""
        targets = torch.zeros_like(users.targets)
        targets[: len(self._targets)] = torch.from_numpy(self._targets.astype(np.int64))
        is_target = users.seen == targets[users.seen_row]
        hidden = users.hidden.nan_to_num()
        return replace(users, hidden=hidden, seen=users.seen.masked_fill(is_target, 0))

    def _table(self, found: np.ndarray) -> str:
        """A column for each user: newest items of the history, target, recommendations."""
        catalog, offsets = self._store.catalog, self._histories.offsets
        columns = []
        for row, user in enumerate(self._users.tolist()):
            history = self._histories.items[offsets[row] : offsets[row + 1]].tolist()
            target = int(self._targets[row])
            shown = [_name(catalog, item) for item in history[-_SHOWN:]]
            shown = [""] * (_SHOWN - len(shown)) + shown
            best = [_marked(catalog, item, target) for item in found[row].tolist()]
            head = f"user {escaped(catalog.users[user].as_py())}, {len(history):,} items"
            columns.append([head, *shown, f"**{_name(catalog, target)}**", *best])
        # TensorBoard breaks words of narrow columns: the heading makes the first one wide enough.
        labels = [f"history, target {_TARGET}, best items"]
        labels += [*(f"\u2212{n}" for n in range(_SHOWN, 0, -1)), _TARGET]
        labels += [f"{rank}" for rank in range(1, found.shape[1] + 1)]
        header, *rows = zip(labels, *columns, strict=True)
        return table(header, rows)


def _name(catalog: Catalog, item: int) -> str:
    return escaped(catalog.title(item) or catalog.item_id(item))


def _marked(catalog: Catalog, item: int, target: int) -> str:
    if not item:
        return ""
    return f"**{_name(catalog, item)}** {_TARGET}" if item == target else _name(catalog, item)
