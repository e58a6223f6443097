"""Losses over a step's negatives instead of the whole catalog.

    positives    each position's score of its own target                       [M]
    negatives    its scores of the K items drawn for the step, shared          [M, K]

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


def softmax(
    positives: torch.Tensor, negatives: torch.Tensor, hits: torch.Tensor, log_counts: torch.Tensor
) -> torch.Tensor:
    """Sampled softmax cross-entropy of each position: float32 [M].

    Args:
        positives: float32 [M].
        negatives: [M, K], float32 or half precision.
        hits: bool [M, K], draws of the position's own target.
        log_counts: float32 [K], logarithms of the draws' expected counts.
    """
    return F.softplus(_LogSum.apply(negatives, hits, log_counts) - positives)


class _LogSum(torch.autograd.Function):
    """Logarithm of the sum over draws of exp(score) / expected count, hits left out: [M].

    As ``logsumexp`` of the corrected scores, which autograd would keep in four copies.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, hits: torch.Tensor, log_counts: torch.Tensor
    ) -> torch.Tensor:
        masses = scores - log_counts  # float32
        masses.masked_fill_(hits, torch.finfo(masses.dtype).min)
        top = masses.amax(dim=1)
        masses.sub_(top[:, None]).exp_()
        total = masses.sum(dim=1)
        ctx.save_for_backward(masses.to(scores.dtype), total)
        return top + total.log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        masses, total = ctx.saved_tensors
        return masses * (grad / total).to(masses.dtype)[:, None], None, None


def gbce(
    positives: torch.Tensor, negatives: torch.Tensor, hits: torch.Tensor, beta: float
) -> torch.Tensor:
    """Generalised binary cross-entropy of each position (arXiv 2308.07192): float32 [M].

    The sum over its terms, not the mean: gradients K times smaller would meet the optimizers' eps.

    Args:
        positives, negatives, hits: as for :func:`softmax`.
        beta: power of the positive's probability, from :func:`gbce_beta`.
    """
    against = F.softplus(negatives.float()).masked_fill(hits, 0.0).sum(dim=1)
    return beta * F.softplus(-positives) + against


def gbce_beta(calibration: float, num_negatives: int, num_items: int) -> float:
    """How much of the overconfidence that sampling brings is taken back.

    Args:
        calibration: 0 leaves the binary cross-entropy as it is, 1 makes scores as calibrated as
            without sampling.
        num_negatives, num_items: K of V.
    """
    rate = min(1.0, num_negatives / max(1, num_items - 1))
    return 1 - calibration * (1 - rate)
