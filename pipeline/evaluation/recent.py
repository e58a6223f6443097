"""Items that were popular in the last days before the held-out ones, for splits by time.

    scores = recent_scores(store, "test", days=7)         int64 [V + 2], None without such a split
    ranks = ranks_by(loader, scores)                      of this rank's targets, by both protocols

Only ratings before the split's own point count; items with as many are in the order of training
counts. Shapes: T targets of this rank, V items.
"""

import numpy as np

from pipeline.evaluation.holdout import EvalLoader
from pipeline.jagged import jagged_positions
from pipeline.preparation.checks import UNITS
from pipeline.preparation.parts import SPLITS
from pipeline.preparation.store import SequenceStore

# Of which validation chooses.
DAYS = (1, 7, 30, 90)
_SECONDS = 86_400


def recent_scores(store: SequenceStore, split: str, days: int) -> np.ndarray | None:
    """A score that is larger for items rated more often in the ``days`` before the split's point.

    None if the split is not by time, or the unit of the times is unknown.
    """
    unit = store.time_unit
    if "times" not in store.split or unit not in UNITS or store.times is None:
        return None
    point = store.split["times"][SPLITS.index(split) if len(store.split["times"]) > 1 else 0]
    known = jagged_positions(store.parts.begin, store.parts.history_end(split))
    recent = known[store.times[known] >= point - days * _SECONDS * UNITS[unit]]
    counts = np.bincount(store.items[recent], minlength=store.num_items + 2)
    overall = store.train_item_counts
    return counts * (int(overall.max()) + 1) + overall


def ranks_by(loader: EvalLoader, scores: np.ndarray) -> np.ndarray:
    """The targets' ranks among negatives and among all items: int64 [2, T]; a tie is a loss.

    Args:
        scores: int64 [V + 2], the same for all users.
    """
    ascending, found = np.sort(scores[1:-1]), [np.empty((2, 0), np.int64)]
    for batch in loader:
        own = int((batch.users >= 0).sum())  # fillers come last
        targets, negatives = batch.targets[:own].numpy(), batch.negatives[:own].numpy()
        of_target, seen = scores[targets], batch.seen.numpy()
        rows = np.repeat(np.arange(own), np.diff(batch.seen_offsets[: own + 1].numpy()))
        ahead = (scores[negatives] >= of_target[:, None]) & (negatives > 0)
        full = len(ascending) - np.searchsorted(ascending, of_target, side="left")
        full -= np.bincount(rows[scores[seen] >= of_target[rows]], minlength=own)
        found.append(np.stack([1 + ahead.sum(axis=1), full]))
    return np.concatenate(found, axis=1)
