"""An epoch's shuffled samples, split over steps and ranks.

A sample is one of ``dupe_factor`` copies of a window: number ``copy * windows + window``. The order
of an epoch is a permutation keyed by (seed, epoch), the same on every rank. A step trains the next
``train_batch_size`` times world size samples; each rank takes a contiguous part::

    9 samples, batch 2, 2 ranks        rank 0       rank 1
    step 0                             s0 s1        s2 s3
    step 1                             s4 s5        s6 s7
    step 2 (what is left, split)       filler       s8
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.rng import key64, permuted
from pipeline.training.chunks import SampledWindows

_HELD = 1 << 26  # samples whose order is held (256 MiB); that of more is computed when needed


@dataclass(eq=False)
class ShuffledSamples(BaseNode[SampledWindows]):
    """The windows of this rank's next steps, from ``sample`` of ``epoch`` until epoch ``stop``."""

    num_windows: int
    dupe_factor: int
    batch_size: int
    seed: int
    rank: int
    world_size: int
    steps_per_chunk: int

    def __post_init__(self) -> None:
        super().__init__()
        assert 0 <= self.rank < self.world_size
        self.num_samples = self.num_windows * self.dupe_factor
        self.global_batch_size = self.batch_size * self.world_size
        self._order, self._order_epoch = np.empty(0, dtype=np.uint32), -1

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"epoch": 0, "sample": 0, "stop": 1}
        self._epoch, self._sample, self._stop = state["epoch"], state["sample"], state["stop"]

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "sample": self._sample, "stop": self._stop}

    def next(self) -> SampledWindows:
        if self._sample >= self.num_samples:
            if self._epoch + 1 >= self._stop:
                raise StopIteration
            self._epoch, self._sample = self._epoch + 1, 0
        size = self.global_batch_size
        steps = min(self.steps_per_chunk, max(1, (self.num_samples - self._sample) // size))
        first = self._sample
        self._sample = min(first + steps * size, self.num_samples)

        # Only the last, partial step has fewer than `size` samples; it is a separate chunk.
        per_step = (self._sample - first) // steps
        low = per_step * self.rank // self.world_size
        high = per_step * (self.rank + 1) // self.world_size
        mine = self._ordered(first, per_step, steps, slice(low, high))
        copies = mine // self.num_windows
        return SampledWindows(
            epoch=self._epoch,
            step_samples=[first + per_step * (step + 1) for step in range(steps)],
            window_splits=np.arange(steps + 1) * (high - low),
            windows=mine - copies * self.num_windows,
            copies=copies,
        )

    def _ordered(self, first: int, per_step: int, steps: int, part: slice) -> np.ndarray:
        """The samples of a part of each step, from place ``first`` of the epoch: int64 [N]."""
        key = key64(self.seed, self._epoch)
        if self.num_samples > _HELD:
            begins = first + per_step * np.arange(steps)
            places = begins[:, None] + np.arange(part.start, part.stop)
            return permuted(places.reshape(-1), self.num_samples, key)
        if self._order_epoch != self._epoch:
            self._order = np.arange(self.num_samples, dtype=np.uint32)
            np.random.Generator(np.random.Philox(key=key)).shuffle(self._order)
            self._order_epoch = self._epoch
        of_steps = self._order[first : first + steps * per_step].reshape(steps, per_step)
        return of_steps[:, part].astype(np.int64).reshape(-1)
