"""Ranking metrics of leave-one-out evaluation: one relevant item per user.

With the target at rank r (1 = best), HR@k = [r <= k] (equal to Recall@k), NDCG@k = [r <= k] /
log2(r + 1) and MRR = 1 / r, each averaged over users. NDCG@1 is HR@1 and left out. A tie counts
against the model: r = 1 + the number of other items that score at least as high as the target.
"""

from collections.abc import Sequence

import numpy as np
import torch

CUTOFFS = (1, 5, 10, 20)


def metric_names(cutoffs: Sequence[int]) -> tuple[str, ...]:
    """Names of the metrics at ascending cutoffs, in the order of the table."""
    ndcg = (f"NDCG@{k}" for k in cutoffs if k > 1)
    return (*(f"HR@{k}" for k in cutoffs), *ndcg, "MRR")


METRICS = metric_names(CUTOFFS)


def metric_sums(ranks: torch.Tensor, cutoffs: Sequence[int] = CUTOFFS) -> torch.Tensor:
    """Sums over users of :func:`metric_names`, and last the number of users; float64.

    Args:
        ranks: int64 [U], 1 = best.
    """
    assert not ranks.numel() or int(ranks.min()) >= 1
    gain = torch.log2(ranks.double() + 1).reciprocal()
    sums = [(ranks <= k).sum(dtype=torch.float64) for k in cutoffs]
    sums += [torch.where(ranks <= k, gain, 0.0).sum() for k in cutoffs if k > 1]
    users = torch.tensor(ranks.numel(), dtype=torch.float64, device=ranks.device)
    return torch.stack([*sums, ranks.double().reciprocal().sum(), users])


def means(sums: torch.Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over users, from added :func:`metric_sums`."""
    *totals, users = sums.tolist()
    names = metric_names(cutoffs)
    return {name: total / max(users, 1) for name, total in zip(names, totals, strict=True)}


def user_metrics(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> np.ndarray:
    """:func:`metric_names` of each user: float64 [M, U] of int64 [U] ranks."""
    hits = [ranks <= k for k in cutoffs]
    gain = 1 / np.log2(ranks + 1.0)
    gains = [np.where(hit, gain, 0) for hit, k in zip(hits, cutoffs, strict=True) if k > 1]
    return np.stack([*(hit.astype(np.float64) for hit in hits), *gains, 1 / ranks])


def mean_metrics(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over users of int64 [U] ranks, by name."""
    values = user_metrics(ranks, cutoffs).mean(axis=1)
    return dict(zip(metric_names(cutoffs), values.tolist(), strict=True))
