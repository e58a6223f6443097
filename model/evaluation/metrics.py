"""Ranking metrics of one relevant item per user, or of several.

With the target at rank r (1 = best), HR@k = [r <= k] (equal to Recall@k), NDCG@k = [r <= k] /
log2(r + 1) and MRR = 1 / r, each averaged over users. NDCG@1 is HR@1 and left out. A tie counts
against the model: r = 1 + the number of other items that score at least as high as the target.

With n targets of a user at the ranks r1 < r2 < ... of one list:

    HR@k       whether any is among the first k
    Recall@k   number of those among the first k / n
    NDCG@k     sum of 1 / log2(r + 1) over r <= k / the same sum over the ranks 1 ... min(n, k)
    MRR        1 / r1
    MAP        mean over the n targets of i / ri, the precision at each of them

Of one target they are the metrics above; Recall@k is HR@k and MAP is MRR then.

Shapes: T targets, U users, M metrics.
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


def names_of_several(cutoffs: Sequence[int]) -> tuple[str, ...]:
    """Names of the metrics of several targets, in the order of the table."""
    recall = (f"Recall@{k}" for k in cutoffs)
    ndcg = (f"NDCG@{k}" for k in cutoffs if k > 1)
    return (*(f"HR@{k}" for k in cutoffs), *recall, *ndcg, "MRR", "MAP")


def metrics_of_several(
    ranks: np.ndarray, users: np.ndarray, cutoffs: Sequence[int] = CUTOFFS
) -> np.ndarray:
    """:func:`names_of_several` of each user: float64 [M, U].

    Args:
        ranks: int64 [T], distinct for the targets of a user.
        users: int64 [T], whose targets they are, ascending.
    """
    if not len(ranks):
        return np.zeros((len(names_of_several(cutoffs)), 0))
    ranks = ranks[np.lexsort((ranks, users))]
    first = np.flatnonzero(np.diff(users, prepend=-1))
    counts = np.diff(first, append=len(users))
    place = 1 + np.arange(len(users)) - np.repeat(first, counts)  # from 1
    gains = 1 / np.log2(np.arange(2, counts.max() + 2))
    best = np.cumsum(gains)
    hits = [np.add.reduceat((ranks <= k).astype(np.int64), first) for k in cutoffs]
    ndcg = [
        np.add.reduceat(np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0), first)
        / best[np.minimum(counts, k) - 1]
        for k in cutoffs
        if k > 1
    ]
    return np.stack(
        [
            *((hit > 0).astype(np.float64) for hit in hits),
            *(hit / counts for hit in hits),
            *ndcg,
            1 / ranks[first],
            np.add.reduceat(place / ranks, first) / counts,
        ]
    )


def one_list(ranks: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Ranks of a user's targets in one list, distinct: int64 [2 or 4, T], as ``ranks``.

    Rows alternate: ranks among a user's negatives alone, which the user's other targets join here
    in the order of the next row, and ranks among all items, where equal ranks are targets that tie:
    of m with the rank r, behind all others of their score, the ranks are r - m + 1 ... r.

    Args:
        users: int64 [T], whose targets they are, ascending.
    """
    settled = ranks.copy()
    first = np.flatnonzero(np.diff(users, prepend=-1))
    place = np.arange(len(users)) - np.repeat(first, np.diff(first, append=len(users)))
    for row, of_row in enumerate(ranks):
        if row % 2 == 0:
            settled[row, np.lexsort((ranks[row + 1], of_row, users))] += place
            continue
        order = np.lexsort((of_row, users))
        ordered = of_row[order]
        changes = (np.diff(ordered, prepend=-1) != 0) | (place == 0)
        last = np.append(np.flatnonzero(changes)[1:], len(ordered)) - 1  # of each run of ties
        run = np.cumsum(changes) - 1
        settled[row, order] -= last[run] - np.arange(len(ordered))
    return settled


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


def named_means(sums: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Means over users, from the sums of the named metrics and the number of users."""
    *totals, users = sums.tolist()
    return {name: total / max(users, 1) for name, total in zip(names, totals, strict=True)}


def sums_of_several(
    ranks: torch.Tensor, users: torch.Tensor, cutoffs: Sequence[int] = CUTOFFS
) -> torch.Tensor:
    """Sums over users of :func:`names_of_several`, then users and targets; float64.

    Args:
        ranks, users: as of :func:`metrics_of_several`.
    """
    values = metrics_of_several(ranks.cpu().numpy(), users.numpy(), cutoffs)
    sums = np.concatenate([values.sum(axis=1), [values.shape[1], len(users)]])
    return torch.from_numpy(sums).to(ranks.device)


def user_metrics(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> np.ndarray:
    """:func:`metric_names` of each user: float64 [M, U] of int64 [U] ranks."""
    hits = [ranks <= k for k in cutoffs]
    gain = 1 / np.log2(ranks + 1.0)
    gains = [np.where(hit, gain, 0) for hit, k in zip(hits, cutoffs, strict=True) if k > 1]
    return np.stack([*(hit.astype(np.float64) for hit in hits), *gains, 1 / ranks])
