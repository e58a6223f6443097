"""Dropout masks computed inside kernels from a seed, so that none is stored.

    generator of the device -> seeds int32 [N, 4], one for each place with dropout
    seed, row, column -> hash -> keep or drop, the same in forward and backward

torch draws the seeds: they follow ``torch.cuda.manual_seed``, and each replay of a CUDA graph draws
new ones. Philox, with ten times the arithmetic, would take longer than the kernels' memory traffic.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton would interpret a kernel's annotations

from typing import Any, NamedTuple

import torch

from model.kernels.compiler import tl, triton

_BITS = 31  # compared bits of a hash


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


drop: Any = None

if triton is not None:

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
