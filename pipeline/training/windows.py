"""Cut every user's training part into windows of at most ``max_len`` items.

A history of at most ``max_len`` items is one window. A longer one is cut into windows of exactly
``max_len`` items, from its newest item backwards in steps of the stride; the oldest window starts
at the first item. Nine items, ``max_len`` 4, ``window_stride`` 0.75 (3 items)::

    items    a b c d e f g h i
    window 2           f g h i
    window 1     c d e f
    window 0 a b c d                 (a whole step back would start before a)

Every item of a training part is in at least one window; no window crosses users or holds a held-out
item. With ``window_stride`` 1 only the oldest window overlaps its successor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.batches.times import UNKNOWN, ItemTimes
from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.store import SequenceStore
from pipeline.rng import below, child_keys, key64, low32
from pipeline.stage import MapStage
from pipeline.training.chunks import JaggedWindows, SampledWindows
from pipeline.training.config import MAX_COPIES, WindowConfig

_HELD = 1 << 24  # windows whose places are held (256 MiB); those of more are computed when needed
_BLOCK = 1 << 20
_GATHERED = 1 << 15  # items gathered at a time, on average
# Share of windows without times: the model also learns to encode histories that have none.
_TIMELESS_SHARE = 0.05
# Makes these draws independent of others with the same key.
_TIMELESS = 0x1F83D9AB


@dataclass(eq=False)
class WindowTable:
    """All W windows, by user, and from the oldest to the newest window of a user.

    ``shared``: arrays that are the same on all ranks, made by its argument or by another rank.
    """

    begin: np.ndarray  # int64 [U], first item of each user
    lengths: np.ndarray  # int64 [U], items of each user's training part
    config: WindowConfig
    shared: Callable[[Callable[[], list[np.ndarray]]], list[np.ndarray]] = lambda make: make()

    def __post_init__(self) -> None:
        overhang = np.maximum(self.lengths - self.config.max_len, 0)
        per_user = np.where(self.lengths > 0, 1 + -(-overhang // self.config.stride), 0)
        self._first = splits(per_user)  # windows before those of each user
        self._held: list[np.ndarray] = []
        if len(self) <= _HELD:
            users = np.repeat(np.arange(len(per_user)), per_user)
            self._held = self.shared(lambda: [_paired(*self._cut(np.arange(len(self)), users))])

    @classmethod
    def build(cls, store: SequenceStore, config: WindowConfig, **shared: Any) -> "WindowTable":
        """Cut all users' training parts."""
        parts = store.parts
        trained = parts.trained_end(config.train_on_validation)
        return cls(parts.begin, trained - parts.begin, config, **shared)

    def __len__(self) -> int:
        return int(self._first[-1])

    def bounds(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and end (int64 [N]) of windows: ``store.items[start:end]``, 1 to max_len items."""
        if self._held:
            bounds = np.take(self._held[0], windows, mode="clip")  # all are in range
            return bounds["start"], bounds["end"]
        return self._cut(windows, np.searchsorted(self._first, windows, "right") - 1)

    def mean_length(self) -> float:
        """Items of a window, on average."""
        parts = (np.arange(at, min(at + _BLOCK, len(self))) for at in range(0, len(self), _BLOCK))
        return sum(int(np.subtract(*self.bounds(part)).sum()) for part in parts) / -len(self)

    def _cut(self, windows: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin, lengths, max_len = self.begin[users], self.lengths[users], self.config.max_len
        steps_back = self._first[users + 1] - 1 - windows
        newest_start = begin + np.maximum(lengths - max_len, 0)
        start = np.maximum(newest_start - steps_back * self.config.stride, begin)
        return start, np.minimum(start + max_len, begin + lengths)


def _paired(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Both bounds of each window side by side: finding a window waits for one read of memory."""
    pairs = np.empty(len(start), dtype=[("start", start.dtype), ("end", end.dtype)])
    pairs["start"], pairs["end"] = start, end
    return pairs


@dataclass(eq=False)
class CutWindows(MapStage[SampledWindows, JaggedWindows]):
    """Copy the windows' items out of the memory-mapped histories."""

    items: np.ndarray
    table: WindowTable

    def apply(self, chunk: SampledWindows) -> JaggedWindows:
        start, end = self.table.bounds(chunk.windows)
        lengths = end - start
        if len(lengths) and (lengths == lengths[0]).all():
            values = _runs(self.items, int(lengths[0]))[start].view(self.items.dtype)
        else:
            values = self._gathered(start, end)
        return JaggedWindows(**vars(chunk), values=values, offsets=splits(lengths))

    def _gathered(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The items start:end (int64 [B]) of rows of any lengths: int32 [T]."""
        offsets = splits(end - start)
        values = np.empty(offsets[-1], dtype=self.items.dtype)
        # Blocks of rows, so that what one call reads of memory is in the cache for the next.
        rows = 1 + _GATHERED * len(start) // (len(values) + 1)
        for low in range(0, len(start), rows):
            first, after = start[low : low + rows], end[low : low + rows]
            # These independent reads bring the rows, far apart in memory, into the cache. Without
            # them the gather below would wait for each row in turn (half the speed).
            # All positions are in range: "clip" changes none and skips the range check.
            self.items.take(first, mode="clip"), self.items.take(after - 1, mode="clip")
            out = values[offsets[low] : offsets[min(low + rows, len(start))]]
            np.take(self.items, jagged_positions(first, after), mode="clip", out=out)
        return values


def _runs(items: np.ndarray, length: int) -> np.ndarray:
    """A view: entry i is the items i:i+length as one opaque value, which NumPy copies whole."""
    run = np.dtype((np.void, length * items.itemsize))
    return np.ndarray(len(items) - length + 1, run, items, strides=items.strides)


@dataclass(eq=False)
class AddTimes(MapStage[JaggedWindows, JaggedWindows]):
    """Give the windows' items their times; in a share of the windows all are unknown."""

    times: ItemTimes
    table: WindowTable
    seed: int

    def apply(self, chunk: JaggedWindows) -> JaggedWindows:
        times = self.times.rows(*self.table.bounds(chunk.windows))
        keys = key64(self.seed, chunk.epoch, _TIMELESS)
        draws = low32(child_keys(keys, chunk.windows * MAX_COPIES + chunk.copies))
        timeless = np.repeat(below(draws, _TIMELESS_SHARE), np.diff(chunk.offsets))
        times[timeless] = UNKNOWN
        return replace(chunk, times=times)
