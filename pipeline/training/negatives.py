"""Negative sampling: K items per step, shared by all positions and ranks.

They are drawn with replacement, keyed by (seed, epoch, position in the data order). Each comes with
the logarithm of its expected count in the step, K times its probability, by which a sampled softmax
corrects its score.

A draw by popularity takes two look-ups for any number of items (Walker's alias method; its
tables are built by prefix sums: Huebschle-Schneider and Sanders, arXiv 1903.00227, section 4).
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.rng import child_keys, high32, key64, low32, position_draws, scaled
from pipeline.stage import MapStage
from pipeline.training.chunks import MaskedWindows

# Makes these draws independent of others with the same key.
_NEGATIVES = 0x3C6EF372


class AliasTable:
    """Draws of 0 ... V - 1 with the given probabilities, float64 [V].

    All cells are equally likely; cell i yields i if a uniform uint32 is below ``keep[i]``, else
    ``other[i]``.
    """

    def __init__(self, probabilities: np.ndarray) -> None:
        size = len(probabilities)
        share = probabilities * size
        keep = np.minimum(share, 1)
        self.other = np.arange(size, dtype=np.int32)
        light, heavy = np.flatnonzero(share < 1), np.flatnonzero(share >= 1)
        # Heavy items, in order, fill up the light cells, in order, from their surplus.
        missing = np.concatenate([[0.0], np.cumsum(1 - share[light])])
        surplus = np.cumsum(share[heavy] - 1)
        giver = np.searchsorted(surplus, missing[:-1], side="right")
        self.other[light] = heavy[np.minimum(giver, len(heavy) - 1)]
        # A heavy item may give more than its surplus; the next heavy item fills its cell up.
        served = np.searchsorted(missing[:-1], surplus, side="left")
        keep[heavy] = np.clip(1 + surplus - missing[served], 0, 1)
        self.other[heavy[:-1]] = heavy[1:]
        self.keep = np.minimum(keep * 2.0**32, 2**32 - 1).astype(np.uint32)

    def __call__(self, cells: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Draws, int64 [N], from uniform cells, int64 [N], and uniform uint32 [N]."""
        return np.where(draws < self.keep[cells], cells, self.other[cells])


class SharedNegatives:
    """Draws ``count`` items per step, in proportion to ``weights`` [V] > 0; None: uniformly."""

    def __init__(
        self, count: int, num_items: int, seed: int, weights: np.ndarray | None = None
    ) -> None:
        self.count, self.num_items, self.seed = count, num_items, seed
        self._table: AliasTable | None = None
        self._log_counts = np.full(num_items, np.log(count / num_items), dtype=np.float32)
        if weights is not None:
            probabilities = weights / weights.sum(dtype=np.float64)
            self._table = AliasTable(probabilities)
            self._log_counts = np.log(count * probabilities).astype(np.float32)

    def __call__(self, epoch: int, samples: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Items int64 [S, K], and logarithms of their expected counts float32 [S, K].

        ``samples`` are the positions of S steps in the epoch's data order.
        """
        keys = child_keys(key64(self.seed, epoch, _NEGATIVES), np.array(samples))
        step_splits = np.arange(len(samples) + 1) * self.count
        items = scaled(position_draws(low32(keys), step_splits), self.num_items)
        if self._table is not None:
            items = self._table(items, position_draws(high32(keys), step_splits))
        items = items.reshape(len(samples), self.count)
        return items + 1, self._log_counts[items]


@dataclass(eq=False)
class DrawNegatives(MapStage[MaskedWindows, MaskedWindows]):
    sampler: SharedNegatives

    def apply(self, chunk: MaskedWindows) -> MaskedWindows:
        negatives, log_counts = self.sampler(chunk.epoch, chunk.step_samples)
        return replace(chunk, negatives=negatives, log_counts=log_counts)
