"""Losses over a step's negatives instead of the whole catalog.

An item drawn with probability q is expected K q times among the negatives. ``softmax`` divides its
exponential by that count: the sum over the negatives then has the expectation of the sum over all
items but the target, and the loss tends to the exact softmax as K grows. The target is scored
itself, without correction (arXiv 2507.09331). A position ignores negatives equal to its target
(hits).

Shapes: M positions, K negatives, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import log_sum as kernel
from model.kernels.l2_normalize import product_dtype


def softmax(
    positives: Tensor,
    hidden: Tensor,
    drawn: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_counts: Tensor,
) -> Tensor:
    """Sampled softmax cross-entropy of each position: float32 [M].

    Args:
        positives: float32 [M], scores of the targets.
        hidden, drawn: float32 [M, D] and [K, D], vectors of the positions and of the negatives;
            their products are the scores, bfloat16 inside autocast.
        targets: int64 [M] item ids.
        negatives: int64 [K] item ids, as drawn.
        log_counts: float32 [K], logarithms of the negatives' expected counts.
    """
    sums = _LogSum.apply(hidden, drawn, product_dtype(hidden), targets, negatives, log_counts)
    return F.softplus(sums - positives)


def log_sums(
    scores: Tensor, targets: Tensor, negatives: Tensor, log_counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of each position's log-sum-exp, in which hits do not count.

    They are masses [M, K] in the dtype of ``scores``, exp(score - log count - top), tops [M], the
    largest exponents, and totals [M], the sums of the masses.
    """
    exponents = scores - log_counts  # float32
    exponents.masked_fill_(targets[:, None] == negatives, torch.finfo(exponents.dtype).min)
    tops = exponents.amax(dim=1)
    masses = exponents.sub_(tops[:, None]).exp_()
    return masses.to(scores.dtype), tops, masses.sum(dim=1)


class _LogSum(torch.autograd.Function):
    """The log-sum-exp [M] of :func:`log_sums`; autograd's would keep four copies of the scores.

    In the backward pass, too, a position's weight multiplies its vector, not its K masses.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, drawn: Tensor, dtype: torch.dtype, *known: Tensor
    ) -> Tensor:
        hidden, drawn = hidden.to(dtype), drawn.to(dtype)
        scores = hidden @ drawn.T
        sums = kernel.log_sums if kernel.takes(scores) else log_sums
        masses, tops, totals = sums(scores, *known)
        ctx.save_for_backward(hidden, drawn, masses, totals)
        return tops + totals.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, drawn, masses, totals = ctx.saved_tensors
        weights = (grad / totals)[:, None]
        of_drawn = masses.T @ (hidden * weights).to(hidden.dtype)
        return (masses @ drawn) * weights, of_drawn.to(weights.dtype), *([None] * 4)


def gbce(
    positives: Tensor, scores: Tensor, targets: Tensor, negatives: Tensor, beta: float
) -> Tensor:
    """Generalised binary cross-entropy of each position (arXiv 2308.07192): float32 [M].

    The sum of its terms, not the mean: gradients K times smaller would be near the optimizers' eps.
    Arguments as for :func:`softmax`; ``beta`` from :func:`gbce_beta`.
    """
    hits = targets[:, None] == negatives
    against = F.softplus(scores.float()).masked_fill(hits, 0.0).sum(dim=1)
    return beta * F.softplus(-positives) + against


def gbce_beta(calibration: float, num_negatives: int, num_items: int) -> float:
    """The power of the positive's probability, against the overconfidence caused by sampling.

    Calibration 0 is plain binary cross-entropy, 1 calibrates scores as well as without sampling.
    """
    rate = min(1.0, num_negatives / max(1, num_items - 1))
    return 1 - calibration * (1 - rate)
