"""Times as input: vectors to add to those of the items, and angles between queries and keys.

    seconds 978300760, gap 60 -> knots and weights -> learned rows, summed
                              -> turns of queries and keys: attention sees differences of times

    gap       seconds since the user's item before, on a logarithmic scale: two knots an octave
    period    64 knots at equal distances over the training ratings; drift of popularity
    hour      24 knots around the clock, UTC
    weekday   7

Between two knots the vector is the mean of theirs, weighted by distance: a knot of few ratings
learns from its neighbours' too. Rows begin at zero: what was never trained adds nothing.

Shapes: T positions of all rows, D width, K width of a head.
"""

import math

import torch
from torch import Tensor, nn

from model.kernels.bf16_linear import linear
from pipeline.batches.times import UNKNOWN

_GAPS, _PERIODS, _HOURS, _WEEKDAYS = 62, 64, 24, 7
_A_OCTAVE = 2  # knots
_NO_GAP, _NO_TIME, _COLUMNS = 157, 158, 160  # rows after the knots; 160: aligned products
_PERIOD, _HOUR, _WEEKDAY = _GAPS, _GAPS + _PERIODS, _GAPS + _PERIODS + _HOURS
_DAY = 86_400
# Radians a second of the fastest and the slowest turn: of a minute and of four years.
_FASTEST, _SLOWEST = 1 / 60, 1 / (4 * 365.25 * _DAY)


class TimeVectors(nn.Module):
    """Learned vectors of times, all zero at first.

    Args:
        first, last: seconds since 1970 between which the knots of the periods are.
    """

    def __init__(self, width: int, first: int, last: int) -> None:
        super().__init__()
        self.first, self.length = first, max(1, last - first)
        self.rows = nn.Linear(_COLUMNS, width, bias=False)
        nn.init.zeros_(self.rows.weight)

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, 2] -> [T, D]; ``dtype``: of the product."""
        columns, weights = self.knots(times)
        shares = torch.zeros(times.shape[0], _COLUMNS, dtype=dtype, device=times.device)
        # Different columns: the order of the writes changes nothing.
        return linear(self.rows, shares.scatter(1, columns, weights.to(dtype)))

    def knots(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Columns, int64 [T, 7], different ones in each row, and their weights, float32 [T, 7].

        Two each of gap, period and hour, one of the weekday. If gap or time is unknown, a column of
        its own replaces the first, and the others have no weight.
        """
        seconds, gaps = times.unbind(1)
        has_time, has_gap = seconds != UNKNOWN, gaps != UNKNOWN
        seconds = torch.where(has_time, seconds, self.first)
        gap = (1 + gaps.clamp(min=0)).float().log2() * _A_OCTAVE
        period = (seconds - self.first).float() * ((_PERIODS - 1) / self.length)
        hour = (seconds % _DAY).float() * (_HOURS / _DAY)
        gap, period = gap.clamp(max=_GAPS - 1), period.clamp(0, _PERIODS - 1)
        gap_knot, period_knot = _knot(gap, _GAPS), _knot(period, _PERIODS)
        hour_knot = hour.long()
        weekday = (seconds // _DAY + 3) % _WEEKDAYS  # 1 January 1970 was a Thursday
        columns = [
            torch.where(has_gap, gap_knot, _NO_GAP),
            gap_knot + 1,
            torch.where(has_time, _PERIOD + period_knot, _NO_TIME),
            _PERIOD + period_knot + 1,
            _HOUR + hour_knot,
            _HOUR + (hour_knot + 1) % _HOURS,
            _WEEKDAY + weekday,
        ]
        of_gap, of_period, of_hour = gap - gap_knot, period - period_knot, hour - hour_knot
        known = has_time.float()
        weights = [
            torch.where(has_gap, 1 - of_gap, 1.0),
            torch.where(has_gap, of_gap, 0.0),
            torch.where(has_time, 1 - of_period, 1.0),
            of_period * known,
            (1 - of_hour) * known,
            of_hour * known,
            known,
        ]
        return torch.stack(columns, dim=1), torch.stack(weights, dim=1)


def _knot(place: Tensor, knots: int) -> Tensor:
    """The knot before each place in 0 ... ``knots`` - 1, and before the last one: int64 [T]."""
    return place.long().clamp(max=knots - 2)


def turns_a_second(rotation: Tensor) -> Tensor:
    """Frequencies of the pairs of a rotation, [T, 2, K / 2], that time turns: float64 [K / 4]."""
    pairs = rotation.shape[2] // 2
    steps = torch.arange(pairs, device=rotation.device, dtype=torch.float64)
    frequency = _FASTEST * (_SLOWEST / _FASTEST) ** (steps / max(1, pairs - 1))
    return frequency / (2 * math.pi)


def with_times(rotation: Tensor, times: Tensor, first: int, frequency: Tensor) -> Tensor:
    """Rotations of positions, [T, 2, K / 2], with every second pair turned by time instead.

    Attention then depends on differences of times. Angles of unknown times are zero.

    Args:
        first: seconds since 1970 that have the angle zero.
        frequency: that of :func:`turns_a_second`.
    """
    seconds = torch.where(times[:, 0] == UNKNOWN, 0, times[:, 0] - first)
    # float64, and whole turns removed: an angle may be 10^7.
    turns = seconds[:, None] * frequency
    angle = (turns - turns.floor()).float() * (2 * math.pi)
    by_time = torch.stack([angle.cos(), angle.sin()], dim=1)  # [T, 2, pairs]
    mixed = rotation.clone()
    mixed[..., 1 : 2 * len(frequency) : 2] = by_time
    return mixed
