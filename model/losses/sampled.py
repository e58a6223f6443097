"""Losses over a step's negatives instead of the whole catalog.

    positives    each position's score of its own target                       [M]
    scores       those of the K items drawn for the step, shared               [M, K]

An item drawn with probability q stands, on average, K q times among the negatives. ``softmax``
divides its exponential by that: the sum over the negatives is then on average that over all items
but the target, which is scored itself and is no sample, so that the loss tends to the exact
softmax as K grows (the target is not corrected: arXiv 2507.09331 says why). Draws of the target
do not count.

Shapes: M positions, K negatives.
"""

from typing import Any

import torch
import torch.nn.functional as F

from model.kernels import log_sum as kernel


def softmax(
    positives: torch.Tensor,
    scores: torch.Tensor,
    targets: torch.Tensor,
    negatives: torch.Tensor,
    log_counts: torch.Tensor,
) -> torch.Tensor:
    """Sampled softmax cross-entropy of each position: float32 [M].

    Args:
        positives: float32 [M].
        scores: [M, K], float32 or half precision.
        targets: int64 [M], the positions' own items, whose draws do not count.
        negatives: int64 [K], the items drawn.
        log_counts: float32 [K], logarithms of the draws' expected counts.
    """
    return F.softplus(_LogSum.apply(scores, targets, negatives, log_counts) - positives)


def log_sums(
    scores: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor, log_counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the logarithm of a sum over draws is made of; arguments as of :func:`softmax`.

    Returns:
        Like ``scores``, [M, K], exp(score - log count - top), 0 of hits; the largest such exponent
        of each position, top [M]; and the sum of its exponentials [M].
    """
    exponents = scores - log_counts  # float32
    exponents.masked_fill_(_hits(targets, negatives), torch.finfo(exponents.dtype).min)
    tops = exponents.amax(dim=1)
    masses = exponents.sub_(tops[:, None]).exp_()
    return masses.to(scores.dtype), tops, masses.sum(dim=1)


class _LogSum(torch.autograd.Function):
    """Logarithm of the sum over draws of exp(score) / expected count, hits left out: [M].

    As ``logsumexp`` of the corrected scores, which autograd would keep in four copies.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, *known: torch.Tensor) -> torch.Tensor:
        sums = kernel.log_sums if kernel.takes(scores) else log_sums
        masses, tops, totals = sums(scores, *known)
        ctx.save_for_backward(masses, totals)
        return tops + totals.log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        masses, totals = ctx.saved_tensors
        return masses * (grad / totals).to(masses.dtype)[:, None], None, None, None


def gbce(
    positives: torch.Tensor,
    scores: torch.Tensor,
    targets: torch.Tensor,
    negatives: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Generalised binary cross-entropy of each position (arXiv 2308.07192): float32 [M].

    The sum over its terms, not the mean: gradients K times smaller would meet the optimizers' eps.

    Args:
        positives, scores, targets, negatives: as for :func:`softmax`.
        beta: power of the positive's probability, from :func:`gbce_beta`.
    """
    against = F.softplus(scores.float()).masked_fill(_hits(targets, negatives), 0.0).sum(dim=1)
    return beta * F.softplus(-positives) + against


def _hits(targets: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Bool [M, K], draws of a position's own target."""
    return targets[:, None] == negatives


def gbce_beta(calibration: float, num_negatives: int, num_items: int) -> float:
    """How much of the overconfidence that sampling brings is taken back.

    Args:
        calibration: 0 leaves the binary cross-entropy as it is, 1 makes scores as calibrated as
            without sampling.
        num_negatives, num_items: K of V.
    """
    rate = min(1.0, num_negatives / max(1, num_items - 1))
    return 1 - calibration * (1 - rate)
