"""Ranking metrics of leave-one-out evaluation: one relevant item a user.

With the target at rank r (1 = best), HR@k = [r <= k] (equal to Recall@k), NDCG@k = [r <= k] /
log2(r + 1) and MRR = 1 / r, each averaged over users. A tie with the target counts against the
model: r = 1 + the number of other items that score at least as high.

    >>> table = {"HR@10": 0.5, "NDCG@10": 0.25}
"""

import torch

HR_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
METRICS = (
    *(f"HR@{k}" for k in HR_CUTOFFS),
    *(f"NDCG@{k}" for k in NDCG_CUTOFFS),
    "MRR",
)


def metric_sums(ranks: torch.Tensor) -> torch.Tensor:
    """Sums over users, in the order of :data:`METRICS`, and last the number of users.

    Args:
        ranks: int64 [U], 1 = best.

    Returns:
        float64 [len(METRICS) + 1]; sums, not means, so that parts may be added up in any order.
    """
    assert not ranks.numel() or int(ranks.min()) >= 1
    reciprocal = ranks.double().reciprocal()
    gain = torch.log2(ranks.double() + 1).reciprocal()
    sums = [(ranks <= k).sum(dtype=torch.float64) for k in HR_CUTOFFS]
    sums += [torch.where(ranks <= k, gain, 0.0).sum() for k in NDCG_CUTOFFS]
    users = torch.tensor(ranks.numel(), dtype=torch.float64, device=ranks.device)
    return torch.stack([*sums, reciprocal.sum(), users])


def means(sums: torch.Tensor) -> dict[str, float]:
    """Means over users from what :func:`metric_sums` returned, added up over batches and ranks."""
    *totals, users = sums.tolist()
    return {name: total / max(users, 1) for name, total in zip(METRICS, totals, strict=True)}


def format_table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Rows of (label, metrics) as aligned text with a header."""
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{name:>9}" for name in METRICS)]
    for label, row in rows:
        cells = (f"{row[name]:>9.4f}" if name in row else " " * 9 for name in METRICS)
        lines.append(f"{label:<{width}}" + "".join(cells).rstrip())
    return "\n".join(lines)
