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

from dataclasses import dataclass

import numpy as np

from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.store import SequenceStore
from pipeline.stage import MapStage
from pipeline.training.chunks import JaggedWindows, SampledWindows
from pipeline.training.config import WindowConfig


@dataclass(frozen=True, eq=False)
class WindowTable:
    """All W windows, by user, and from the oldest to the newest window of a user.

    Window w is ``store.items[start[w]:end[w]]``, 1 to ``max_len`` items.
    """

    start: np.ndarray  # int64 [W]
    end: np.ndarray  # int64 [W]

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def build(cls, store: SequenceStore, config: WindowConfig) -> "WindowTable":
        """Cut all users' training parts."""
        parts = store.parts
        trained = parts.validation_end if config.train_on_validation else parts.training_end
        lengths = trained - parts.begin
        overhang = np.maximum(lengths - config.max_len, 0)
        per_user = np.where(lengths > 0, 1 + -(-overhang // config.stride), 0)

        user = np.repeat(np.arange(len(lengths)), per_user)
        first_window = np.cumsum(per_user) - per_user
        steps_back = (per_user + first_window - 1)[user] - np.arange(len(user))

        begin = np.asarray(store.offsets[:-1], dtype=np.int64)
        newest_start = (begin + overhang)[user]
        start = np.maximum(newest_start - steps_back * config.stride, begin[user])
        end = np.minimum(start + config.max_len, (begin + lengths)[user])
        return cls(start, end)


@dataclass(eq=False)
class CutWindows(MapStage[SampledWindows, JaggedWindows]):
    """Copy the windows' items out of the memory-mapped histories."""

    items: np.ndarray
    table: WindowTable

    def apply(self, chunk: SampledWindows) -> JaggedWindows:
        start, end = self.table.start[chunk.windows], self.table.end[chunk.windows]
        # These independent reads bring the rows, far apart in memory, into the cache. Without them
        # the gather below would wait for each row in turn (half the speed).
        self.items[start], self.items[end - 1]
        # All positions are in range: "clip" changes none and skips the range check.
        values = np.take(self.items, jagged_positions(start, end), mode="clip")
        return JaggedWindows(**vars(chunk), values=values, offsets=splits(end - start))
