"""Random bits computed inside kernels by a hash: dropout masks, rounding to half precision.

    generator of the device -> seeds int32 [N, 4], one for each place with dropout
    seed, row, column -> hash -> keep or drop, the same in forward and backward
    step, row of a table, column -> hash -> round up or down, the same on CPU and on all ranks

torch draws the seeds: they follow ``torch.cuda.manual_seed``, and each replay of a CUDA graph draws
new ones; it reads the step's part of the second hash from device memory. Philox, with ten times
the arithmetic, would take longer than the kernels' memory traffic.

An fp16 row is updated in float32, and its values are rounded to one of their two neighbours at
random, in proportion to the distance from each, as FBGEMM does by default: rounded to the nearest,
they would not move by steps smaller than half their spacing.

Shapes: S rows, D width.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton would interpret a kernel's annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.compiler import tl, triton

_BITS = 31  # compared bits of a hash for dropout
# The least normal fp16, below which all are equally far apart, and the largest.
_LEAST, _LARGEST = 2.0**-14, 65504.0
# A float32 has 13 bits of fraction more than an fp16.
_MORE = (1 << 13) - 1
_WORD, _COLUMN = (1 << 32) - 1, 0x9E3779B9


class Dropout(NamedTuple):
    """Dropout at one place, an argument of kernels."""

    seed: torch.Tensor  # int32 [4], on the device
    limit: Any  # constexpr int: a value is dropped if its hash is below
    scale: Any  # constexpr float: factor of the others


def new_dropouts(share: float, places: int, device: torch.device) -> list[Dropout | None]:
    """Dropout of a share of the values, in [0, 1), at ``places`` places; all None if it is 0.

    One draw seeds them all.
    """
    if not share:
        return [None] * places
    limit = tl.constexpr(min(round(share * 2**_BITS), 2**_BITS - 1))
    seeds = torch.randint(2**31 - 1, (places, 4), dtype=torch.int32, device=device)
    return [Dropout(seed, limit, tl.constexpr(1 / (1 - share))) for seed in seeds]


def mixed(bits: Any) -> Any:
    """:func:`_mix` of an int, or a tensor of int64, in [0, 2^32)."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _WORD
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _WORD
    return bits ^ (bits >> 16)


def random_bits(key: int, rows: Tensor, width: int) -> Tensor:
    """int64 [S, D] in [0, 2^32) for the rows, int64 [S]; ``key`` is in [0, 2^32)."""
    column = torch.arange(width, device=rows.device) * _COLUMN
    return mixed((mixed((rows & _WORD) ^ key)[:, None] + column) & _WORD)


def rounded_at_random(values: Tensor, bits: Tensor) -> Tensor:
    """Float32 values as fp16, each by its random bits, int64; its expectation is the value."""
    size = values.abs()
    is_small = size < _LEAST
    lifted = torch.where(is_small, size + _LEAST, size).view(torch.int32)
    whole = ((lifted + (bits & _MORE).int()) & ~_MORE).view(torch.float32)
    whole = torch.where(is_small, whole - _LEAST, whole)
    found = torch.where(values < 0, 0.0 - whole, whole)
    return torch.where(size < _LARGEST, found, values).half()


drop: Any = None
round_at_random: Any = None

if triton is not None:
    _SMALL, _LARGE = tl.constexpr(_LEAST), tl.constexpr(_LARGEST)
    _REST, _KEPT, _STRIDE = map(tl.constexpr, (_MORE, _WORD - _MORE, _COLUMN))

    @triton.jit
    def _mix(bits):
        """A bijection of uint32 in which every bit depends on every bit (Wellons, lowbias32)."""
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        return bits ^ (bits >> 16)

    @triton.jit
    def drop(values, dropout, row, column):
        """Dropout, if not None, of values [R, C], those of ``row`` [R] and ``column`` [C]."""
        if dropout is not None:
            seed, row = dropout.seed, row.to(tl.uint32)
            one = _mix(row ^ tl.load(seed).to(tl.uint32))
            one = _mix(one + tl.load(seed + 1).to(tl.uint32))
            two = _mix(row ^ tl.load(seed + 2).to(tl.uint32))
            two = _mix(two + tl.load(seed + 3).to(tl.uint32))
            # As _mix, with the second key added on the way.
            bits = one[:, None] ^ (column.to(tl.uint32) * 0x9E3779B9)[None, :]
            bits = (bits ^ (bits >> 16)) * 0x7FEB352D + two[:, None]
            bits = (bits ^ (bits >> 15)) * 0x846CA68B
            bits = bits ^ (bits >> 16)
            stays = (bits >> 1).to(tl.int32) >= dropout.limit
            values = tl.where(stays, values * dropout.scale, 0.0)
        return values

    @triton.jit
    def round_at_random(values, key, row, column):
        """As :func:`random_bits` and :func:`rounded_at_random`; float32 values."""
        bits = _mix(row.to(tl.uint32) ^ tl.load(key).to(tl.uint32, bitcast=True))
        bits = _mix(bits + column.to(tl.uint32) * _STRIDE)
        size = tl.abs(values)
        is_small = size < _SMALL
        lifted = tl.where(is_small, size + _SMALL, size).to(tl.uint32, bitcast=True)
        whole = ((lifted + (bits & _REST)) & _KEPT).to(tl.float32, bitcast=True)
        whole = tl.where(is_small, whole - _SMALL, whole)
        found = tl.where(values < 0, 0.0 - whole, whole)
        return tl.where(size < _LARGE, found, values)
