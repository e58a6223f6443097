"""Times of items, as the model reads them: seconds since 1970, and since the user's item before.

    history     a    b    c    d
    seconds   100  100  160  400
    gap         -    0   60  240        -: `UNKNOWN`, of a user's first item

Gaps are those of the whole history: a window that begins with c has the gap 60 there.

Shapes: B rows, T positions of all rows.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.checks import UNITS
from pipeline.preparation.memory import blocks
from pipeline.preparation.store import SequenceStore

# Far from every time, also after a subtraction of one.
UNKNOWN = -(1 << 62)
# Seconds since 1970, beyond those of all times.
LATEST = 1 << 40


@dataclass(frozen=True)
class TimeSpan:
    """The times that a log spans, in seconds since 1970; a model that reads times has it."""

    first: int  # of the training parts
    last: int
    newest: int  # of the whole log

    def __post_init__(self) -> None:
        assert self.first <= self.last <= self.newest


def has_times(store: SequenceStore) -> bool:
    """Whether a store has times of a known unit, by its manifest."""
    return store.time_unit in UNITS


class ItemTimes:
    """The times of a store's items.

    Raises:
        UserError: there are none, or their unit is unknown.
    """

    def __init__(self, store: SequenceStore) -> None:
        name = store.counts.get("name", "the data")
        if store.times is None:
            raise UserError(
                f"--use_times, of the model or a teacher: {name} has no times: name their column "
                "with --columns, or train without the flag"
            )
        if not has_times(store):
            raise UserError(
                f"--use_times, of the model or a teacher: the times of {name} are numbers of "
                "unknown unit: give dates or seconds since 1970, or train without the flag"
            )
        self._times, self._scale = np.asarray(store.times), UNITS[store.time_unit]
        self._offsets, self._parts, self._name = store.offsets, store.parts, name

    def seconds(self, places: np.ndarray | slice) -> np.ndarray:
        """Seconds since 1970 of the items at these places of the store: int64."""
        times = self._times[places]
        return times if self._scale == 1 else times // self._scale

    def rows(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Seconds and gaps of the items start:end (int64 [B]) of B rows, none empty: [T, 2]."""
        seconds = self.seconds(jagged_positions(start, end))
        is_first = self._offsets[np.searchsorted(self._offsets, start)] == start
        before = np.where(is_first, UNKNOWN, self.seconds(start - 1))
        return with_gaps(seconds, splits(end - start)[:-1], before)

    def fingerprint(self) -> str:
        """Hash of the seconds of all items, whatever the unit of their times."""
        digest = hashlib.sha256()
        for (part,) in blocks(self._times):
            digest.update(np.ascontiguousarray(part // self._scale).data)
        return digest.hexdigest()[:16]

    def span(self, train_on_validation: bool = False) -> TimeSpan:
        """The span of the training parts, with the validation parts if these train, too.

        Raises:
            UserError: it begins long before all times, which would leave one period for the others.
        """
        parts = self._parts
        ends = parts.trained_end(train_on_validation)
        trained = ends > parts.begin
        first = self.seconds(parts.begin[trained]).min()
        last = self.seconds(ends[trained] - 1).max()
        newest = self.seconds(parts.end[parts.end > parts.begin] - 1).max()
        if first <= -LATEST:
            raise UserError(
                f"--use_times: {self._name} has the time {int(first)} in seconds since 1970: leave "
                "such ratings out by --where, or train without the flag"
            )
        return TimeSpan(int(first), int(last), int(max(last, newest)))


def with_gaps(seconds: np.ndarray, begins: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Seconds, int64 [T], with the seconds since the position before in its row: int64 [T, 2].

    Args:
        begins: int64 [B], first positions of the rows, none of which is empty.
        before: int64 [B], seconds of the items before these, or `UNKNOWN`.
    """
    earlier = np.empty_like(seconds)
    earlier[1:] = seconds[:-1]
    earlier[begins] = before
    known = (seconds != UNKNOWN) & (earlier != UNKNOWN)
    gaps = np.where(known, np.maximum(seconds - earlier, 0), UNKNOWN)
    return np.stack([seconds, gaps], axis=1)
