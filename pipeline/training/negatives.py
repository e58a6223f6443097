"""Items that a step's predictions are held against, when not against all: drawn, not enumerated.

A step has one set of K draws, with replacement, for all its positions and all ranks. They are a
function of (seed, epoch, position in the data order) alone: another number of ranks, or a resumed
run, draws the same. Each comes with the logarithm of its expected count in the step, K x its
probability, by which a sampled softmax corrects its score.

    SharedNegatives(4096, num_items, seed, store.train_item_counts[1:-1] + 1)    by popularity
    SharedNegatives(4096, num_items, seed)                                         uniformly

Draws by popularity take two look-ups each, whatever the number of items (Walker's alias method;
the tables are made by prefix sums: Huebschle-Schneider and Sanders, arXiv 1903.00227, section 4).
"""

from dataclasses import dataclass, field

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.errors import UserError
from pipeline.rng import child_keys, high32, key64, low32, position_draws, scaled
from pipeline.training.sampler import Chunk, ChunkStage

# Parts these draws from others that come from the same key.
_NEGATIVES = 0x3C6EF372


@dataclass(frozen=True)
class NegativesConfig:
    """How many negatives a step has, where the loss wants any."""

    train_negatives: int = field(
        default=4096,
        metadata={"help": "items drawn for each step, shared by its positions (sampled losses)"},
    )

    def __post_init__(self) -> None:
        if self.train_negatives < 1:
            raise UserError(f"--train_negatives must be at least 1, not {self.train_negatives}")


class AliasTable:
    """Draws of 0 ... V - 1 with given probabilities.

    Cells are equally likely; cell i is i where a uniform uint32 is below ``keep[i]``, else
    ``other[i]``.

    Args:
        probabilities: float64 [V], sums to 1.
    """

    def __init__(self, probabilities: np.ndarray) -> None:
        size = len(probabilities)
        share = probabilities * size
        keep = np.minimum(share, 1)
        self.other = np.arange(size, dtype=np.int32)
        light, heavy = np.flatnonzero(share < 1), np.flatnonzero(share >= 1)
        # Light cells are filled up in order from the surplus of heavy ones, in order.
        missing = np.concatenate([[0.0], np.cumsum(1 - share[light])])
        surplus = np.cumsum(share[heavy] - 1)
        giver = np.searchsorted(surplus, missing[:-1], side="right")
        self.other[light] = heavy[np.minimum(giver, len(heavy) - 1)]
        # A heavy item that gave more than its surplus lacks it in its own cell: the next one gives.
        served = np.searchsorted(missing[:-1], surplus, side="left")
        keep[heavy] = np.clip(1 + surplus - missing[served], 0, 1)
        self.other[heavy[:-1]] = heavy[1:]
        self.keep = np.minimum(keep * 2.0**32, 2**32 - 1).astype(np.uint32)

    def __call__(self, cells: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int64 [N] drawn by uniform cells int64 [N] and uniform uint32 [N]."""
        return np.where(draws < self.keep[cells], cells, self.other[cells])


class SharedNegatives:
    """Draws the negatives of steps.

    Args:
        count: K, draws a step.
        num_items: V.
        seed: part of the key.
        weights: [V], how likely items 1 ... V are, up to a factor, all positive; None: equally.
    """

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
        """Items int64 [S, K] and the logarithms of their expected counts float32 [S, K] of S steps.

        Args:
            epoch: the epoch.
            samples: each step's position in the data order; with the epoch, the key.
        """
        keys = child_keys(key64(self.seed, epoch, _NEGATIVES), np.array(samples))
        whole = np.arange(len(samples) + 1) * self.count
        items = scaled(position_draws(low32(keys), whole), self.num_items)
        if self._table is not None:
            items = self._table(items, position_draws(high32(keys), whole))
        items = items.reshape(len(samples), self.count)
        return items + 1, self._log_counts[items]


class DrawNegatives(ChunkStage[Chunk]):
    """Give each of the chunk's steps its negatives: sets negatives and log_counts."""

    def __init__(self, source: BaseNode[Chunk], sampler: SharedNegatives) -> None:
        super().__init__(source)
        self.sampler = sampler

    def apply(self, chunk: Chunk) -> Chunk:
        chunk.negatives, chunk.log_counts = self.sampler(chunk.epoch, chunk.step_samples)
        return chunk
