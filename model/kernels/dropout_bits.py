"""Which values dropout keeps, decided inside kernels and not written down.

    generator of the device -> seeds int32 [N, 4], one for each place
    seed, row, column -> hash -> kept or not, the same forward and backward

The seeds are drawn by torch: they follow ``torch.cuda.manual_seed``, and a CUDA graph that is
replayed draws others. What they say about a value is a hash of where it is: the row's two keys are
mixed from all of the seed, and the column is mixed with both. That is a tenth of the arithmetic of
Philox, which takes longer than the memory that a kernel reads meanwhile.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton takes annotations of a kernel for its own

from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

# Hashes are compared as numbers of so many bits.
_BITS = 31


@dataclass(frozen=True)
class Dropout:
    """Dropout at one place.

    Attributes:
        share: of the values that is dropped, in (0, 1).
        seed: int32 [4], on the device.
    """

    share: float
    seed: torch.Tensor


def new_dropouts(share: float, places: int, device: torch.device) -> list[Dropout | None]:
    """Dropout at so many places, all from one draw of the device's generator; None without any."""
    if not share:
        return [None] * places
    seeds = torch.randint(2**31 - 1, (places, 4), dtype=torch.int32, device=device)
    return [Dropout(share, seed) for seed in seeds]


def dropout_options(
    dropout: Dropout | None, other: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The seed (``other`` where there is none) and what else kernels are told about dropout."""
    if dropout is None:
        return other, {"limit": 0, "scale": 1.0, "drops": False}
    limit = min(round(dropout.share * 2**_BITS), 2**_BITS - 1)
    return dropout.seed, {"limit": limit, "scale": 1 / (1 - dropout.share), "drops": True}


kept = None

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
