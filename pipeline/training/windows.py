"""Cut every user's training part into windows of at most ``max_len`` items.

A history no longer than ``max_len`` is one window. A longer one gets windows of exactly ``max_len``
items that step back from its newest item, so that the newest items always end a window; the oldest
window starts at the first item, whatever the step left over. Nine items, ``max_len`` 4,
``window_stride`` 0.75 (3 items)::

    items    a b c d e f g h i
    window 2           f g h i
    window 1     c d e f
    window 0 a b c d                 (one step back would start before a)

``window_stride`` 1 makes windows overlap only in that oldest one; TorchRec's example uses 0.1.
Every item is in at least one window, and no window crosses two users or reaches a held-out item
(``train_on_validation`` holds out the test item alone).
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.training.sampler import Chunk, ChunkStage


@dataclass(frozen=True)
class WindowConfig:
    """How long windows are and how much they overlap."""

    max_len: int = field(default=100, metadata={"help": "most items in a window"})
    window_stride: float = field(
        default=1.0,
        metadata={"help": "step between a long history's windows, as a share of max_len"},
    )
    train_on_validation: bool = field(
        default=False,
        metadata={
            "help": "train on the validation items too, evaluate nothing meanwhile and test the "
            "last model: for a final run of a recipe that was chosen before"
        },
    )

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise UserError(f"--max_len must be at least 1, not {self.max_len}")
        if not 0.0 < self.window_stride <= 1.0:
            raise UserError(
                f"--window_stride must be in (0, 1], not {self.window_stride}: "
                "it is a share of --max_len (1 = no overlap)"
            )

    @property
    def stride(self) -> int:
        """Items between the starts of two windows, at least 1."""
        return max(1, round(self.max_len * self.window_stride))


@dataclass(frozen=True, eq=False)
class WindowTable:
    """All windows, by user and within a user from the oldest to the newest.

    Attributes:
        start: int64 [W], first position of the window in ``store.items``.
        end: int64 [W], one past its last position; 1 <= end - start <= max_len.
        user: int64 [W], whose window it is.
    """

    start: np.ndarray
    end: np.ndarray
    user: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def build(cls, store: SequenceStore, config: WindowConfig) -> "WindowTable":
        """The windows over the training parts of all users of ``store``."""
        lengths = store.train_lengths()
        if config.train_on_validation:
            lengths[store.evaluable_users()] += 1
        overhang = np.maximum(lengths - config.max_len, 0)
        per_user = np.where(lengths > 0, 1 + -(-overhang // config.stride), 0)

        user = np.repeat(np.arange(len(lengths)), per_user)
        first_window = np.cumsum(per_user) - per_user
        steps_back = (per_user + first_window - 1)[user] - np.arange(len(user))

        begin = np.asarray(store.offsets[:-1], dtype=np.int64)
        newest_start = (begin + overhang)[user]
        start = np.maximum(newest_start - steps_back * config.stride, begin[user])
        end = np.minimum(start + config.max_len, (begin + lengths)[user])
        return cls(start=start, end=end, user=user)


def jagged_positions(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The flat positions of B ranges one after the other: int64 [sum(end - start)].

    Args:
        start: int64 [B], first position of each range.
        end: int64 [B], one past the last; not below ``start``.
    """
    lengths = end - start
    positions = np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    positions += _counted(len(positions).bit_length())[: len(positions)]
    return positions


@lru_cache(maxsize=2)
def _counted(size_bits: int) -> np.ndarray:
    """int64 0 .. 2**size_bits - 1, kept: making it anew costs as much as using it."""
    return np.arange(1 << size_bits)


class CutWindows(ChunkStage[Chunk]):
    """Copy the chunk's windows out of the memory-mapped histories: sets values and offsets."""

    def __init__(self, source: BaseNode[Chunk], items: np.ndarray, table: WindowTable) -> None:
        super().__init__(source)
        self.items = np.asarray(items)
        self.table = table

    def apply(self, chunk: Chunk) -> Chunk:
        start, end = self.table.start[chunk.windows], self.table.end[chunk.windows]
        chunk.offsets = np.concatenate([[0], np.cumsum(end - start)])
        # Rows lie far apart in memory. These reads do not wait for one another and bring the rows
        # into the cache; the gather alone would wait for each row in turn (half the speed).
        self.items[start], self.items[end - 1]
        # No position is out of range, so clipping changes none; it spares a pass that looks.
        chunk.values = np.take(self.items, jagged_positions(start, end), mode="clip")
        return chunk
