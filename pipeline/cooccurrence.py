"""Which items occur near each other in the training parts of histories.

Two items at most ``SPAN`` places apart in a history are a pair, of the weight 1 / distance::

    history  a b a c      a b 1 + 1, a c 1 + 1/3, b c 1/2      a with itself is no pair

Held-out items are in no pair.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.jagged import jagged_positions
from pipeline.preparation.store import SequenceStore
from pipeline.rng import key64, permuted

SPAN = 5
# Ratings that are read at most, of users drawn by the seed: a pair takes some 20 bytes, and there
# are up to SPAN for each rating.
MOST_RATINGS = 1 << 22
# Makes this draw independent of others with the same seed.
_USERS = 0x3C6EF372
_DISTANCE_BITS = 3


@dataclass(frozen=True, eq=False)
class Pairs:
    """P different pairs of items, each once, the lower id first, ascending."""

    low: np.ndarray  # int64 [P], dense ids
    high: np.ndarray  # int64 [P]
    weight: np.ndarray  # float64 [P], above 0


def pairs_of(store: SequenceStore, seed: int, train_on_validation: bool = False) -> Pairs:
    """The pairs in the items that are trained on, of all users or of as many as are read."""
    items, user = _training_items(store, seed, train_on_validation)
    coded = [np.zeros(0, np.int64)]
    for distance in range(1, SPAN + 1):
        one, other = items[:-distance], items[distance:]
        is_pair = (user[:-distance] == user[distance:]) & (one != other)
        one, other = one[is_pair], other[is_pair]
        # Pairs and distances in one number: sorting it sorts both.
        pair = np.minimum(one, other) * (store.num_items + 1) + np.maximum(one, other)
        coded.append(pair << _DISTANCE_BITS | distance)
    codes = np.sort(np.concatenate(coded))
    pair, distances = codes >> _DISTANCE_BITS, codes & ((1 << _DISTANCE_BITS) - 1)
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    weight = np.add.reduceat(1 / distances, first) if len(first) else np.zeros(0)
    return Pairs(*np.divmod(pair[first], store.num_items + 1), weight)


def _training_items(
    store: SequenceStore, seed: int, train_on_validation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Dense ids, history after history, and whose they are: int64 [R] each."""
    begin, end = store.parts.begin, store.parts.trained_end(train_on_validation)
    users = np.arange(len(begin))
    if (end - begin).sum() > MOST_RATINGS:
        users = permuted(users, len(users), key64(seed, _USERS))
        users = users[np.cumsum((end - begin)[users]) <= MOST_RATINGS]
    begin, end = begin[users], end[users]
    items = store.items[jagged_positions(begin, end)].astype(np.int64)
    return items, np.repeat(users, end - begin)
