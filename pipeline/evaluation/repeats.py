"""Targets that the user had before: how many, and two rankings that repeat a user's own items.

    history a b a c, target a     repeat last       c a b, then all other items by popularity
                                  most frequent     a c b, then all other items by popularity

Repeat last: the latest item first. Most frequent: of equally frequent items, the later one first.
Other items with the target's popularity are ahead of it: a tie counts against a ranking.

Shapes: B users, each as often as it has targets, N negatives of each, E distinct (user, item) pairs
of their histories.
"""

from functools import lru_cache

import numpy as np

from pipeline.evaluation.holdout import EvalLoader
from pipeline.jagged import jagged_positions
from pipeline.preparation.store import SequenceStore

# Above it, --seen auto keeps seen items. HR may be wrong by this share if they are dropped: a
# repeated target then is the only seen item that is ranked.
REPEATED_SHARE = 0.01
_USERS_AT_ONCE = 1 << 16


def is_repeated(
    store: SequenceStore, users: np.ndarray, split: str, places: np.ndarray | None = None
) -> np.ndarray:
    """Whether each user's target is in the history before it: bool [B] of int64 [B].

    Args:
        places: of the targets in the store's items; None: right after the histories.
    """
    found = [np.zeros(0, bool)]
    for at in range(0, len(users), _USERS_AT_ONCE):
        block = slice(at, at + _USERS_AT_ONCE)
        begin, end = history_bounds(store, users[block], split)
        targets = store.items[end if places is None else places[block]]
        rows = np.repeat(np.arange(len(begin)), end - begin)
        same = store.items[jagged_positions(begin, end)] == targets[rows]
        found.append(np.bincount(rows[same], minlength=len(begin)) > 0)
    return np.concatenate(found)


def history_bounds(
    store: SequenceStore, users: np.ndarray, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where each user's history begins, int64 [B], and where it ends and the targets begin."""
    return store.offsets[users], store.parts.history_end(split)[users]


def keeps_seen(choice: str, store: SequenceStore) -> tuple[bool, float]:
    """Whether ``--seen`` keeps seen items as candidates, and the share of repeated targets.

    The share is that of users whose validation target is in their history before it.
    """
    share = _repeated_share(store)
    return choice == "keep" or (choice == "auto" and share > REPEATED_SHARE), share


@lru_cache(maxsize=1)  # asked for by every evaluation of a run, and reads all histories
def _repeated_share(store: SequenceStore) -> float:
    users = store.evaluable_users("validation")
    return float(is_repeated(store, users, "validation").mean()) if len(users) else 0.0


def repeat_ranks(loader: EvalLoader) -> np.ndarray:
    """The targets' ranks by both rankings: int64 [4, B] of this rank's B targets.

    Rows: repeat last, among the negatives and among all items; most frequent, the same.
    """
    found = [np.empty((4, 0), np.int64)]
    for users, places, negatives in loader.targets_and_negatives():
        found.append(_ranks(loader.store, loader.split, users, places, negatives))
    return np.concatenate(found, axis=1)


def _ranks(
    store: SequenceStore,
    split: str,
    users: np.ndarray,
    places: np.ndarray,
    negatives: np.ndarray,
) -> np.ndarray:
    begin, end = history_bounds(store, users, split)
    popularity, id_bound = store.train_item_counts, store.num_items + 2
    rows = np.repeat(np.arange(len(users)), end - begin)
    # The last of equal keys in a stable sort is the item's latest occurrence.
    keys = rows * id_bound + store.items[jagged_positions(begin, end)]
    order = np.argsort(keys, kind="stable")
    pairs, first, counts = np.unique(keys[order], return_index=True, return_counts=True)  # [E]
    latest, row = order[first + counts - 1], pairs // id_bound
    size = np.bincount(row, minlength=len(users))

    targets = store.items[places]
    wanted = np.concatenate([targets[:, None], negatives], axis=1).astype(np.int64)  # [B, 1 + N]
    wanted_keys = np.arange(len(users))[:, None] * id_bound + wanted
    at = np.minimum(np.searchsorted(pairs, wanted_keys), len(pairs) - 1)
    owned = pairs[at] == wanted_keys
    # Items outside the history that are at least as popular as the target, with the target.
    ascending = np.sort(popularity[1:-1])
    others = store.num_items - np.searchsorted(ascending, popularity[targets], side="left")
    others -= np.bincount(
        row[popularity[pairs % id_bound] >= popularity[targets][row]], minlength=len(users)
    )
    ranks = []
    for by in ((-latest, row), (-latest, -counts, row)):
        place = np.empty(len(pairs), np.int64)  # in the user's own list, from 1
        place[np.lexsort(by)] = 1 + np.arange(len(pairs)) - np.repeat(np.cumsum(size) - size, size)
        # Own items score above all popularities, the best of them most.
        score = np.where(owned, popularity.max() + 1 + len(pairs) - place[at], popularity[wanted])
        ahead = (score[:, 1:] >= score[:, :1]) & (negatives > 0)
        ranks += [
            1 + ahead.sum(axis=1),
            np.where(owned[:, 0], place[at[:, 0]], size + others),
        ]
    return np.stack(ranks)
