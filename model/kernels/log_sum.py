"""The sums of sampled softmax over each position's negatives, on CUDA in one kernel.

Shapes: M positions, K negatives.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

import torch
from torch import Tensor

from model.kernels.compiler import launch, tl, triton

# Scores of a position that a program holds at a time.
_BLOCK = 4096


def takes(scores: Tensor) -> bool:
    """Whether :func:`log_sums` can be called with these scores [M, K]."""
    return triton is not None and scores.is_cuda and scores.is_contiguous() and scores.numel() > 0


def log_sums(
    scores: Tensor, targets: Tensor, negatives: Tensor, log_counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of :func:`model.losses.sampled.log_sums`."""
    count, draws = scores.shape
    tops, totals = torch.empty(2, count, device=scores.device).unbind()
    results = torch.empty_like(scores), tops, totals
    block = min(_BLOCK, triton.next_power_of_2(draws))
    given, lowest = (scores, targets, negatives, log_counts), torch.finfo(torch.float32).min
    sizes = draws, lowest, block, draws <= block
    launch(_log_sums, (count,), *given, results, *sizes, num_warps=8)
    return results


if triton is not None:

    @triton.jit
    def _exponent(scores, negatives, log_counts, draw, inside, target, lowest):  # noqa: ANN202
        value = tl.load(scores + draw, mask=inside, other=0.0).to(tl.float32)
        value -= tl.load(log_counts + draw, mask=inside, other=0.0)
        hit = tl.load(negatives + draw, mask=inside, other=0) == target
        return tl.where(hit, lowest, value)

    @triton.jit
    def _log_sums(
        scores,
        targets,
        negatives,
        log_counts,
        results,
        draws,
        lowest,
        block: tl.constexpr,
        is_whole: tl.constexpr,
    ) -> None:
        masses, tops, totals = results
        position = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + position)
        of = position * draws
        if is_whole:  # a block has all draws
            draw = tl.arange(0, block)
            inside = draw < draws
            value = _exponent(scores + of, negatives, log_counts, draw, inside, target, lowest)
            top = tl.max(tl.where(inside, value, lowest), axis=0)
            mass = tl.where(inside, tl.exp(value - top), 0.0)
            total = tl.sum(mass, axis=0)
            tl.store(masses + of + draw, mass, mask=inside)
        else:
            top, total = lowest, 0.0
            for start in range(0, draws, block):
                draw = start + tl.arange(0, block)
                inside = draw < draws
                value = _exponent(scores + of, negatives, log_counts, draw, inside, target, lowest)
                before = top
                top = tl.maximum(top, tl.max(tl.where(inside, value, lowest), axis=0))
                mass = tl.where(inside, tl.exp(value - top), 0.0)
                total = total * tl.exp(before - top) + tl.sum(mass, axis=0)
            for start in range(0, draws, block):
                draw = start + tl.arange(0, block)
                inside = draw < draws
                value = _exponent(scores + of, negatives, log_counts, draw, inside, target, lowest)
                tl.store(masses + of + draw, tl.exp(value - top), mask=inside)
        tl.store(tops + position, top)
        tl.store(totals + position, total)
