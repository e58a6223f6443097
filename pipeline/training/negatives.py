"""Negative sampling: K items per step, shared by all positions and ranks.

They are drawn with replacement, keyed by (seed, epoch, position in the data order). Each comes with
the logarithm of its expected count in the step, K times its probability, by which a sampled softmax
corrects its score.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.rng import child_keys, high32, key64, low32, position_draws, scaled
from pipeline.stage import MapStage
from pipeline.training.alias_table import AliasTable
from pipeline.training.chunks import MaskedWindows

# Makes these draws independent of others with the same key.
_NEGATIVES = 0x3C6EF372


class SharedNegatives:
    """Draws ``count`` of V items per step.

    Args:
        train_counts: int [V]; an item is drawn in proportion to its count plus 1, so that one
            without training ratings is drawn sometimes. None: all are drawn alike.
    """

    def __init__(
        self, count: int, num_items: int, seed: int, train_counts: np.ndarray | None = None
    ) -> None:
        self.count, self.num_items, self.seed = count, num_items, seed
        self._popular = None if train_counts is None else _Popular(train_counts)

    def __call__(self, epoch: int, samples: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Items int64 [S, K], and logarithms of their expected counts float32 [S, K].

        ``samples`` are the positions of S steps in the epoch's data order.
        """
        keys = child_keys(key64(self.seed, epoch, _NEGATIVES), np.array(samples))
        shape = len(samples), self.count
        step_splits = np.arange(len(samples) + 1) * self.count
        items = scaled(position_draws(low32(keys), step_splits), self.num_items)
        if self._popular is None:
            log_counts = np.full(shape, np.log(self.count / self.num_items), dtype=np.float32)
            return items.reshape(shape) + 1, log_counts
        items = self._popular.table(items, position_draws(high32(keys), step_splits))
        log_counts = np.log(self.count * self._popular.probabilities(items)).astype(np.float32)
        return items.reshape(shape) + 1, log_counts.reshape(shape)


class _Popular:
    """Probabilities in proportion to counts plus 1, and draws."""

    def __init__(self, counts: np.ndarray) -> None:
        self._counts, self._total = counts, float(counts.sum() + len(counts))
        self.table = AliasTable(len(counts), lambda part: self._of(counts[part]))

    def probabilities(self, items: np.ndarray) -> np.ndarray:
        """float64 [N], of some of 0 ... V - 1."""
        return self._of(np.take(self._counts, items, mode="clip"))  # all are in range

    def _of(self, counts: np.ndarray) -> np.ndarray:
        return (counts + 1) / self._total


@dataclass(eq=False)
class DrawNegatives(MapStage[MaskedWindows, MaskedWindows]):
    sampler: SharedNegatives

    def apply(self, chunk: MaskedWindows) -> MaskedWindows:
        negatives, log_counts = self.sampler(chunk.epoch, chunk.step_samples)
        return replace(chunk, negatives=negatives, log_counts=log_counts)
