"""Ranking metrics of leave-one-out evaluation: one relevant item per user.

With the target at rank r (1 = best), HR@k = [r <= k] (equal to Recall@k), NDCG@k = [r <= k] /
log2(r + 1) and MRR = 1 / r, each averaged over users. A tie counts against the model: r = 1 + the
number of other items that score at least as high as the target.
"""

import torch

HR_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
METRICS = (*(f"HR@{k}" for k in HR_CUTOFFS), *(f"NDCG@{k}" for k in NDCG_CUTOFFS), "MRR")


def metric_sums(ranks: torch.Tensor) -> torch.Tensor:
    """Sums over users of :data:`METRICS`, and last the number of users; float64.

    Args:
        ranks: int64 [U], 1 = best.
    """
    assert not ranks.numel() or int(ranks.min()) >= 1
    gain = torch.log2(ranks.double() + 1).reciprocal()
    sums = [(ranks <= k).sum(dtype=torch.float64) for k in HR_CUTOFFS]
    sums += [torch.where(ranks <= k, gain, 0.0).sum() for k in NDCG_CUTOFFS]
    users = torch.tensor(ranks.numel(), dtype=torch.float64, device=ranks.device)
    return torch.stack([*sums, ranks.double().reciprocal().sum(), users])


def means(sums: torch.Tensor) -> dict[str, float]:
    """Means over users, from added :func:`metric_sums`."""
    *totals, users = sums.tolist()
    return {name: total / max(users, 1) for name, total in zip(METRICS, totals, strict=True)}
