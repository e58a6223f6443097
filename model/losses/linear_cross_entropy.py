"""Softmax cross-entropy over a catalog without storing a logit for every position and item.

    loss = log sum_j exp(h . c_j) - h . c_target

The first term's gradient for h is the mean of the c_j weighted by the softmax; its gradient for c_j
is the sum of the h with the same weights. Attention computes both, tile by tile in registers:

    forward     attention(queries h, keys c, values c)  -> weighted means [M, D], log-sum-exp [M]
    backward    attention(queries c, keys h, values v)  -> the candidates' gradient [C, D]
                v = weight x h / exp(log-sum-exp); multiplying by attention's own sums turns its
                means back into sums

The backward pass needs logits whose exponentials cannot overflow: cosines divided by a temperature.
Without a bound, or a kernel for the width or dtype, plain matrix products score the candidates
block by block.

Vectors are float32 (float64 in tests), or bfloat16 inside autocast: then a mean candidate has an
error of at most 1/256 of its length; a learned position's small gradient has the same error.

Shapes: M positions, C candidates, D width.
"""

from typing import Any

import torch
from torch import Tensor

from model.kernels.l2_normalize import sum_dtype

# Exponentials of logits up to this, their sums over 1e9 rows, and the inverses fit into float32.
MAX_BOUND = 60.0
# Memory of a block of logits where there is no fused kernel.
BLOCK_BYTES = 128 << 20
# FlashAttention on CUDA takes vectors of at most this many values, a multiple of these.
_WIDEST, _STEP = 256, 8
# Its queries of a program, and programs for each multiprocessor, up to which it
# divides the keys between programs, too.
_PROGRAM_QUERIES, _DIVIDING_PROGRAMS = 128, 0.8
# The part of the multiprocessors that have work, on average over the rounds, which is enough.
_BUSY_ENOUGH = 0.9


def softmax_means(
    hidden: Tensor, candidates: Tensor, bound: float, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each position's mean candidate, [M, D] or [M, E], under its softmax, and its log-sum-exp [M].

    Both are float32 at least; zeros and -infinity without candidates.

    Args:
        hidden: [M, D].
        candidates: [C, D] of the same dtype; C may be 0.
        bound: upper bound of the logits' absolute values; infinity if there is none.
        values: [C, E] of the same dtype, averaged instead of the candidates.
    """
    values = candidates if values is None else values
    if hidden.shape[0] and candidates.shape[0] and _is_fused(hidden, bound, values):
        means, sums = _attend(hidden, candidates, values)
        return means.to(sums.dtype), sums
    dtype = sum_dtype(hidden)
    means = hidden.new_zeros(hidden.shape[0], values.shape[1], dtype=dtype)
    if not candidates.shape[0]:
        return means, means.new_full((hidden.shape[0],), -torch.inf)
    top = means.new_full((hidden.shape[0],), torch.finfo(dtype).min)
    total = torch.zeros_like(top)
    size = _block_size(hidden)
    for block, valued in zip(candidates.split(size), values.split(size), strict=True):
        logits = (hidden @ block.T).to(dtype)  # [M, a block]
        higher = torch.maximum(top, logits.amax(dim=1))
        weights = logits.sub_(higher[:, None]).exp_()
        shrink = (top - higher).exp_()
        total = total * shrink + weights.sum(dim=1)
        means = means * shrink[:, None] + (weights.to(valued.dtype) @ valued).to(dtype)
        top = higher
    return means.div_(total[:, None]), top + total.log()


def target_logits(hidden: Tensor, target_rows: Tensor, bound: float) -> Tensor:
    """Each position's logit [M] of its target's row [M, D], rounded as in :func:`softmax_means`."""
    logits = (hidden * target_rows.to(sum_dtype(hidden))).sum(dim=1)
    fused = _is_fused(hidden, bound, target_rows)
    return logits if fused else logits.to(hidden.dtype).to(logits.dtype)


def weighted_hidden(
    hidden: Tensor,
    candidates: Tensor,
    log_sums: Tensor,
    weights: Tensor,
    bound: float,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each candidate, the sum of weight x probability x hidden vector over all positions.

    It is returned as two factors, [C, D] or [C, E] and [C], to save a pass over the catalog.

    Args:
        hidden, candidates, bound: as for :func:`softmax_means`.
        log_sums: [M], over all candidates of all ranks.
        weights: [M], of the positions' losses.
        values: [M, E] of the same dtype, summed instead of the hidden vectors.
    """
    values = hidden if values is None else values
    if hidden.shape[0] and candidates.shape[0] and _is_fused(hidden, bound, values):
        scaled = values * (weights * (-log_sums).exp())[:, None]
        means, sums = _attend(candidates, hidden, scaled.to(hidden.dtype))
        return means, sums.exp_()
    weighted = (values * weights[:, None]).to(hidden.dtype)
    mixed = candidates.new_zeros(len(candidates), values.shape[1], dtype=sum_dtype(hidden))
    size = _block_size(hidden)
    for block, target in zip(candidates.split(size), mixed.split(size), strict=True):
        logits = (block @ hidden.T).to(mixed.dtype)  # [a block, M]
        probabilities = logits.sub_(log_sums).exp_()
        target.copy_(probabilities.to(hidden.dtype) @ weighted)
    return mixed, mixed.new_ones(mixed.shape[0])


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(queries @ keys.T) @ values [N, D], and the log-sum-exp [N] of its logits."""
    # ``scaled_dot_product_attention`` calls the same operators, but hides the log-sum-exp.
    if not queries.is_cuda:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return _of_one_head(fused, queries, keys, values)
    fused = torch.ops.aten._scaled_dot_product_flash_attention
    processors = torch.cuda.get_device_properties(queries.device).multi_processor_count
    size = query_part(len(queries), processors)
    if size == len(queries):
        return _of_one_head(fused, queries, keys, values)
    parts = [_of_one_head(fused, part, keys, values) for part in queries.split(size)]
    means, sums = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(sums)


def query_part(count: int, processors: int) -> int:
    """How many of ``count`` queries a call of FlashAttention should get on so many multiprocessors.

    All queries, if they are so few that it divides the keys, or if their programs fill whole rounds
    of the multiprocessors; else equal parts, for each of which it divides the keys. On an H200,
    with 125,000 keys of width 128, 14,336 and 20,000 queries took 1.24 and 1.35 times as long as in
    two parts, 33,792 (two rounds) .87 times as long as in three.
    """
    programs, most = -(-count // _PROGRAM_QUERIES), int(_DIVIDING_PROGRAMS * processors)
    rounds = -(-programs // processors)
    if programs <= most or programs >= _BUSY_ENOUGH * rounds * processors:
        return count
    parts = -(-programs // most)
    return -(-programs // parts) * _PROGRAM_QUERIES


def _of_one_head(
    fused: Any, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`_attend`, by one call of the operator ``fused``."""
    heads = (part[None, None] for part in (queries, keys, values))  # [1, 1, N, D]
    means, sums, *_ = fused(*heads, scale=1.0)
    return means[0, 0], sums[0, 0]


def _is_fused(hidden: Tensor, bound: float, values: Tensor) -> bool:
    if bound > MAX_BOUND or values.shape[1] != hidden.shape[1]:
        return False
    if not hidden.is_cuda:
        return hidden.dtype in (torch.float32, torch.float64, torch.bfloat16)
    # Not float16: inverse sums of exponentials underflow in it.
    width = hidden.shape[1]
    return hidden.dtype == torch.bfloat16 and width <= _WIDEST and width % _STEP == 0


def _block_size(hidden: Tensor) -> int:
    """Candidates in a block whose float32 logits take at most ``BLOCK_BYTES``."""
    return max(1, BLOCK_BYTES // (4 * max(1, len(hidden))))
