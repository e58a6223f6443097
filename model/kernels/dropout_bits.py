"""Dropout masks computed inside kernels from a seed, so that none is stored.

    generator of the device -> seeds int32 [N, 4], one for each place with dropout
    seed, row, column -> hash -> keep or drop, the same in forward and backward

torch draws the seeds: they follow ``torch.cuda.manual_seed``, and each replay of a CUDA graph draws
new ones. Philox, with ten times the arithmetic, would take longer than the kernels' memory traffic.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton would interpret a kernel's annotations

from dataclasses import dataclass
from typing import Any

import torch

from model.kernels.compiler import tl, triton

_BITS = 31  # compared bits of a hash


@dataclass(frozen=True)
class Dropout:
    """Dropout at one place."""

    share: float  # dropped share of the values, in (0, 1)
    seed: torch.Tensor  # int32 [4], on the device


def new_dropouts(share: float, places: int, device: torch.device) -> list[Dropout | None]:
    """Dropout at ``places`` places, seeded by one draw; all None if ``share`` is 0."""
    if not share:
        return [None] * places
    seeds = torch.randint(2**31 - 1, (places, 4), dtype=torch.int32, device=device)
    return [Dropout(share, seed) for seed in seeds]


def dropout_options(dropout: Dropout | None) -> dict[str, Any]:
    """The arguments ``seed``, ``limit`` and ``scale`` of a kernel with dropout."""
    if dropout is None:
        return {"seed": None, "limit": 0, "scale": 1.0}
    limit = min(round(dropout.share * 2**_BITS), 2**_BITS - 1)
    return {"seed": dropout.seed, "limit": limit, "scale": 1 / (1 - dropout.share)}


kept: Any = None
drop: Any = None

if triton is not None:

    @triton.jit
    def _mix(bits):
        """A bijection of uint32 in which every bit depends on every bit (Wellons, lowbias32)."""
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        return bits ^ (bits >> 16)

    @triton.jit
    def kept(seed, row, column, limit: tl.constexpr):
        """Whether dropout keeps the values of ``row`` [R] and ``column`` [C]: bool [R, C]."""
        row = row.to(tl.uint32)
        one = _mix(_mix(row ^ tl.load(seed).to(tl.uint32)) + tl.load(seed + 1).to(tl.uint32))
        two = _mix(_mix(row ^ tl.load(seed + 2).to(tl.uint32)) + tl.load(seed + 3).to(tl.uint32))
        # As _mix, with the second key added on the way.
        bits = one[:, None] ^ (column.to(tl.uint32) * 0x9E3779B9)[None, :]
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D + two[:, None]
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits = bits ^ (bits >> 16)
        return (bits >> 1).to(tl.int32) >= limit

    @triton.jit
    def drop(values, seed, row, column, limit: tl.constexpr, scale: tl.constexpr):
        """Dropout of values [R, C]; without a seed they are unchanged."""
        if seed is not None:
            values = tl.where(kept(seed, row, column, limit), values * scale, 0.0)
        return values
