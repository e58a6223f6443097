"""Mark which part each rating is of, by points in time.

marked = MarkParts(EncodeIds(ReadRatings("ratings.csv")), read_points("2011-06-01,2011-09-01"))
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np

from pipeline.errors import UserError
from pipeline.preparation import checks
from pipeline.preparation.held import Held, Joined
from pipeline.preparation.memory import Memory
from pipeline.preparation.parts import PARTS, TEST, TRAINING, VALIDATION
from pipeline.preparation.stages import CountingStage, RatingChunk
from pipeline.tables.points import Point


class MarkParts(CountingStage):
    """Ratings before the first point train, those at the last point or after it test.

    Those between two points are the validation part. Once streamed, ``times`` holds the points in
    ``unit``, that of the data.

    Args:
        points: one or two, ascending.
        until: ratings at it or after it are left out; None: none are.
        are_dates: whether the times are dates; asked when all ratings have been read.
        name: of the data set, for errors.

    Raises:
        UserError: there are no times, a point is of another kind than they are, or there is no
            rating before the first or after the last.
    """

    def __init__(
        self,
        source: CountingStage,
        points: list[Point],
        until: Point | None,
        are_dates: Callable[[], bool],
        name: str,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(source)
        self.memory = memory or Memory()
        self.points, self.until, self.are_dates, self.name = points, until, are_dates, name

    def chunks(self) -> Iterator[RatingChunk]:
        held, joined = Held[RatingChunk](self.memory), Joined(self.memory)
        flag = f"--split_time {','.join(point.text for point in self.points)}"
        is_empty = True
        for chunk in self.source:
            if chunk.timestamp is None:
                raise UserError(
                    f"{flag}: {self.name} has no time column; name it with --columns, or leave the "
                    "flag out"
                )
            joined.add(chunk.timestamp)
            held.add(chunk)
            is_empty = False
        if is_empty:
            return
        times, dates = joined.array(), self.are_dates()
        self.unit = unit = "ns" if dates else checks.time_unit(times, self.name)
        self.times = [point.in_unit(unit, dates) for point in self.points]
        end = None if self.until is None else self.until.in_unit(unit, dates)
        kinds = np.zeros(PARTS, np.int64)
        for chunk in held.drained():
            kept = chunk if end is None else chunk.where(~_is_late(chunk, end))
            parts = self._parts(kept)
            kinds += np.bincount(parts, minlength=PARTS)
            yield replace(kept, part=parts)
        first, last = self.points[0].text, f"at or after {self.points[-1].text}"
        if self.until is not None:
            last += f" and before {self.until.text} (--split_until)"
        for part, where in ((TRAINING, f"before {first}"), (TEST, last)):
            if not kinds[part]:
                ends = [checks.shown_time(each, unit) for each in checks.ends(times)]
                raise UserError(
                    f"{flag}: no rating of {self.name} is {where}; they are from {ends[0]} to "
                    f"{ends[1]}"
                )

    def _parts(self, chunk: RatingChunk) -> np.ndarray:
        """The part of each rating: int8 [N]."""
        parts = np.full(len(chunk.user), TRAINING, np.int8)
        for point, part in zip(self.times, (VALIDATION, TEST)[-len(self.times) :], strict=True):
            parts[_is_late(chunk, point)] = part
        return parts


def _is_late(chunk: RatingChunk, point: Fraction) -> np.ndarray:
    """Which ratings are at the point or after it: bool [N]."""
    assert chunk.timestamp is not None
    whole = math.trunc(point)
    rest = float(point - whole)
    fraction = 0.0 if chunk.fraction is None else chunk.fraction
    return (chunk.timestamp > whole) | ((chunk.timestamp == whole) & (fraction >= rest))


def stored_points(times: list[Fraction], scale: int) -> list[int]:
    """The points in the unit of the store's times, ``scale`` of which make one of the data's.

    A whole time is before a point if it is before its stored point.
    """
    return [math.ceil(point * scale) for point in times]
