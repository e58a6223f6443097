"""Random ratings, of uniform or skewed items, for measuring speed."""

import math
from collections.abc import Iterator
from itertools import count

import numpy as np
import pyarrow as pa

from pipeline.stage import Stage

_RANDOM_CHUNK = 1 << 19


class RandomRatings(Stage[pa.Table]):
    """Source stage: randomly drawn users and items, in time order.

    Uniform, like the random data of TorchRec's examples/bert4rec, but seeded and drawn in chunks.
    With a ``skew`` s > 0, the k-th most frequent of V items has the share of the integral of
    x ** -s from k to k + 1. Frequent items are spread evenly over the ids, as if these were hashed.
    """

    def __init__(
        self, users: int, items: int, size: int, *, rating: float, seed: int, skew: float = 0.0
    ) -> None:
        super().__init__()
        self.users, self.items, self.size = users, items, size
        self.rating, self.seed, self.skew = rating, seed, skew

    def stream(self) -> Iterator[pa.Table]:
        for start in range(0, self.size, _RANDOM_CHUNK):
            generator = np.random.default_rng((self.seed, start))
            size = min(_RANDOM_CHUNK, self.size - start)
            users = generator.integers(self.users, size=size)
            items = self._items(generator, size)
            rating = np.full(size, self.rating)
            yield pa.table({"user": users, "item": items, "rating": rating})

    def _items(self, generator: np.random.Generator, size: int) -> np.ndarray:
        if not self.skew:
            return generator.integers(self.items, size=size)
        # Where the integral from 1 is a uniform share of the integral to V + 1.
        drawn, power = generator.random(size), 1 - self.skew
        if abs(power) < 1e-9:
            found = (self.items + 1.0) ** drawn
        else:
            found = (1 + drawn * ((self.items + 1.0) ** power - 1)) ** (1 / power)
        rank = np.minimum(found.astype(np.int64), self.items) - 1
        return rank * _stride(self.items) % self.items


def _stride(items: int) -> int:
    """A number near the golden section: its multiples modulo ``items`` are all ids, any first ones
    of them spread evenly."""
    golden = round(items * (math.sqrt(5) - 1) / 2)
    near = (golden + sign * distance for distance in count() for sign in (1, -1))
    return next(stride for stride in near if math.gcd(stride, items) == 1)
