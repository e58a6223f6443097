"""Who trains what when: the shuffled samples of an epoch, dealt out to steps and ranks.

A sample is one of ``dupe_factor`` copies of a window: number ``copy * windows + window``. The order
of an epoch is a permutation keyed by (seed, epoch), the same on every rank; step g trains samples
``order[g * G:(g + 1) * G]``, G being ``train_batch_size`` times the world size, and each rank takes
its contiguous part::

    9 samples, batch 2, 2 ranks        rank 0       rank 1
    step 0                             s0 s1        s2 s3
    step 1                             s4 s5        s6 s7
    step 2 (what is left, split)       filler       s8

So every sample is trained once an epoch, whatever the world size.

Stages work on chunks: one rank's rows of several consecutive steps. NumPy's fixed cost a call is
then paid once for all of them, which makes small batches cheap. As every draw is keyed by its
window, chunks change no number.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.rng import key64


@dataclass(eq=False)
class Chunk:
    """One rank's rows of one or more consecutive steps, as it fills up stage by stage.

    Attributes:
        epoch: the epoch.
        step_samples: samples consumed by all ranks after each of the chunk's S steps.
        row_splits: int64 [S + 1]; step s has rows row_splits[s]:row_splits[s + 1], perhaps none.
        windows: int64 [B], the rows' windows.
        copies: int64 [B], which copy of the window.
        values: int32 [T], the rows' items.
        offsets: int64 [B + 1], where rows begin in the values.
        masked: int64 [M], flat positions masked, ascending.
        targets: int32 [M], the items there.
        left_only: bool [B], rows that attend to the left alone; None if there never are any. Of the
            rows that are windows alone: later stages add others behind them.
        steps_ago: int64 [T], how many items of its history come after a position; None where that
            is how many positions of its row do.
        mask_splits: int64 [S + 1]; step s has masked[mask_splits[s]:mask_splits[s + 1]]. Set by
            a stage that adds entries out of order; else the steps' positions tell.
        step_windows: int64 [S], rows of each step that are windows, set when rows are chosen.
        negatives: int64 [S, K], items drawn for each step; None if there are none.
        log_counts: float32 [S, K], logarithms of how often each was to be expected.
        alike: bool [S], steps that have equal shapes on all ranks; None: nobody asked.
    """

    epoch: int
    step_samples: list[int]
    row_splits: np.ndarray
    windows: np.ndarray
    copies: np.ndarray
    values: np.ndarray | None = None
    offsets: np.ndarray | None = None
    masked: np.ndarray | None = None
    targets: np.ndarray | None = None
    mask_splits: np.ndarray | None = None
    left_only: np.ndarray | None = None
    steps_ago: np.ndarray | None = None
    negatives: np.ndarray | None = None
    log_counts: np.ndarray | None = None
    alike: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.step_windows = np.diff(self.row_splits)


class ShuffledSamples(BaseNode[Chunk]):
    """The source: which windows this rank trains in the next steps.

    Its state is {"epoch", "sample", "stop"}; one must be given to ``reset`` to choose the epochs:
    from ``epoch`` on, to the end of the one before ``stop``.
    """

    def __init__(
        self,
        num_windows: int,
        dupe_factor: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        steps_per_chunk: int = 1,
    ) -> None:
        super().__init__()
        assert 0 <= rank < world_size
        self.num_windows = num_windows
        self.num_samples = num_windows * dupe_factor
        self.global_batch_size = batch_size * world_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_chunk = steps_per_chunk
        self._order = np.empty(0, dtype=np.int64)
        self._order_epoch: int | None = None
        self._epoch, self._sample, self._stop = 0, 0, 1

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"epoch": 0, "sample": 0, "stop": 1}
        self._epoch, self._sample, self._stop = state["epoch"], state["sample"], state["stop"]

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "sample": self._sample, "stop": self._stop}

    def next(self) -> Chunk:
        if self._sample >= self.num_samples:
            if self._epoch + 1 >= self._stop:
                raise StopIteration
            self._epoch, self._sample = self._epoch + 1, 0
        size = self.global_batch_size
        steps = min(self.steps_per_chunk, max(1, (self.num_samples - self._sample) // size))
        first = self._sample
        self._sample = min(first + steps * size, self.num_samples)
        samples = self._epoch_order()[first : self._sample]

        # Only the last, partial step has other than `size` samples, and it is a chunk of its own.
        per_step = len(samples) // steps
        low = per_step * self.rank // self.world_size
        high = per_step * (self.rank + 1) // self.world_size
        mine = samples.reshape(steps, per_step)[:, low:high].reshape(-1).astype(np.int64)
        copies = mine // self.num_windows
        return Chunk(
            epoch=self._epoch,
            step_samples=[first + per_step * (step + 1) for step in range(steps)],
            row_splits=np.arange(steps + 1) * (high - low),
            windows=mine - copies * self.num_windows,
            copies=copies,
        )

    def _epoch_order(self) -> np.ndarray:
        """The epoch's permutation of all samples: uint32 where that is enough, else int64."""
        if self._order_epoch != self._epoch:
            dtype = np.uint32 if self.num_samples < 2**32 else np.int64
            self._order = np.arange(self.num_samples, dtype=dtype)
            key = key64(self.seed, self._epoch)
            np.random.Generator(np.random.Philox(key=key)).shuffle(self._order)
            self._order_epoch = self._epoch
        return self._order


Made = TypeVar("Made")


class ChunkStage(BaseNode[Made], Generic[Made]):
    """A stage that makes one thing of each chunk; its state is its source's."""

    def __init__(self, source: BaseNode[Chunk]) -> None:
        super().__init__()
        self.source = source

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def get_state(self) -> dict[str, Any]:
        return self.source.state_dict()

    def next(self) -> Made:
        return self.apply(next(self.source))

    def apply(self, chunk: Chunk) -> Made:
        raise NotImplementedError
