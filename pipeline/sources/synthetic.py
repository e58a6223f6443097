"""Generated ratings with known best possible metrics.

Items are popular by Zipf's law. They also form a ring, like the episodes of a series: the favourite
successors of an item are the next few items on the ring. A user's next item is drawn by

    P(next | history)  ~  (1 - noise) * successor[last item, next]  +  noise * popularity[next]

over the items not yet in the history: no item repeats. Ranking the unseen items by this
probability is the best that any model can do in a full ranking; its HR@10 and NDCG@10 on the actual
targets are the bound for trained models (by chance a model may exceed it on few users).
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.sources.config import SyntheticConfig
from pipeline.stage import Stage

_BLOCK_SCORES = 1 << 22  # most users x items in memory


class SyntheticRatings(Stage[pa.Table]):
    """Source stage: one table (user int64 from 0, item int64 from 1), user by user in time order.

    Once streamed, ``best_possible`` is {"validation" | "test": {"HR@10", "NDCG@10"}}.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__()
        self.config = config
        self.best_possible: dict[str, dict[str, float]] = {}

    def stream(self) -> Iterator[pa.Table]:
        process = RingProcess(self.config)
        histories, lengths = process.draw()
        self.best_possible = {
            split: metrics(process.target_ranks(histories, lengths - back), cutoff=10)
            for split, back in (("validation", 2), ("test", 1))
        }
        users, places = np.nonzero(np.arange(histories.shape[1]) < lengths[:, None])
        yield pa.table({"user": users, "item": histories[users, places] + 1})


class RingProcess:
    """The random process of all users. U users, V items, L = max_length, K successors."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        generator = np.random.default_rng((config.seed, 1))
        popularity = np.arange(1, config.num_items + 1, dtype=np.float64) ** -config.zipf
        generator.shuffle(popularity)
        self.popularity = popularity / popularity.sum()  # [V]
        ring = generator.permutation(config.num_items)
        place = np.argsort(ring)
        ahead = np.arange(1, config.successors + 1)
        self.favourites = ring[(place[:, None] + ahead) % config.num_items]  # [V, K]
        weights = config.decay ** np.arange(config.successors)
        self.weights = weights / weights.sum()  # [K]

    def scores(self, last: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """float64 [B, V]: P(next) before normalisation, 0 for ``seen`` items (bool [B, V]).

        ``last`` is int64 [B], the last item from 0, or -1 for an empty history.
        """
        scores = np.tile(self.config.noise * self.popularity, (len(last), 1))
        rows = np.flatnonzero(last >= 0)[:, None]
        scores[rows, self.favourites[last[rows[:, 0]]]] += (1 - self.config.noise) * self.weights
        scores[seen] = 0
        return scores

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Histories int64 [U, L] of items from 0 (-1 past the end), lengths int64 [U]."""
        config = self.config
        # One row per user, so that a user's history does not depend on the number of users.
        shape = (config.num_users, config.max_length + 1)
        uniform = np.random.default_rng((config.seed, 2)).random(shape)
        spread = config.max_length - config.min_length + 1
        lengths = config.min_length + (uniform[:, -1] * spread).astype(np.int64)
        histories = np.full((config.num_users, config.max_length), -1)
        for block in self._blocks():
            seen = np.zeros((len(uniform[block]), config.num_items), bool)
            last = np.full(len(seen), -1)
            for step in range(config.max_length):
                cumulated = np.cumsum(self.scores(last, seen), axis=1)
                aim = uniform[block, step, None] * cumulated[:, -1:]
                last = (cumulated <= aim).sum(axis=1)
                seen[np.arange(len(seen)), last] = True
                histories[block, step] = last
        histories[np.arange(config.max_length) >= lengths[:, None]] = -1
        return histories, lengths

    def target_ranks(self, histories: np.ndarray, at: np.ndarray) -> np.ndarray:
        """int64 [U]: rank, from 1, of each user's item at place `at` (int64 [U]) in the history.

        It is ranked among all items that occur, by `scores` given the items before it; equal scores
        count against it.
        """
        occurs = np.zeros(self.config.num_items, bool)
        occurs[histories[histories >= 0]] = True
        ranks = np.empty(len(histories), np.int64)
        for block in self._blocks():
            history, place = histories[block], at[block, None]
            rows, places = np.nonzero(np.arange(history.shape[1]) < place)
            seen = np.tile(~occurs, (len(history), 1))
            seen[rows, history[rows, places]] = True
            last = np.take_along_axis(history, place - 1, axis=1)[:, 0]
            scores = self.scores(last, seen)
            target = np.take_along_axis(scores, np.take_along_axis(history, place, axis=1), axis=1)
            ranks[block] = (scores >= target).sum(axis=1)  # at least 1: the target itself
        return ranks

    def _blocks(self) -> Iterator[slice]:
        size = max(1, _BLOCK_SCORES // self.config.num_items)
        for start in range(0, self.config.num_users, size):
            yield slice(start, start + size)


def metrics(ranks: np.ndarray, cutoff: int) -> dict[str, float]:
    """Mean HR and NDCG at a cutoff of targets with these ranks, from 1."""
    hits = ranks <= cutoff
    gains = np.where(hits, 1 / np.log2(ranks + 1), 0)
    return {f"HR@{cutoff}": float(hits.mean()), f"NDCG@{cutoff}": float(gains.mean())}
