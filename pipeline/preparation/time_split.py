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
from pipeline.preparation.parts import TEST, TRAINING, VALIDATION
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
    ) -> None:
        super().__init__(source)
        self.points, self.until, self.are_dates, self.name = points, until, are_dates, name

    def chunks(self) -> Iterator[RatingChunk]:
        chunks = list(self.source)
        flag = f"--split_time {','.join(point.text for point in self.points)}"
        if not chunks:
            return
        if chunks[0].timestamp is None:
            raise UserError(
                f"{flag}: {self.name} has no time column; name it with --columns, or leave the "
                "flag out"
            )
        times = np.concatenate([chunk.timestamp for chunk in chunks])
        dates = self.are_dates()
        self.unit = unit = "ns" if dates else checks.time_unit(times, self.name)
        self.times = [point.in_unit(unit, dates) for point in self.points]
        marked = [replace(chunk, part=self._parts(chunk)) for chunk in chunks]
        if self.until is not None:
            end = self.until.in_unit(unit, dates)
            marked = [chunk.where(~_is_late(chunk, end)) for chunk in marked]
        kinds = np.bincount(np.concatenate([chunk.part for chunk in marked]), minlength=3)
        for part, where, point in ((TRAINING, "before", 0), (TEST, "at or after", -1)):
            if not kinds[part]:
                ends = [checks.shown_time(int(end), unit) for end in (times.min(), times.max())]
                raise UserError(
                    f"{flag}: no rating of {self.name} is {where} {self.points[point].text}; they "
                    f"are from {ends[0]} to {ends[1]}"
                )
        yield from marked

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
