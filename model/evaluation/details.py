"""Who is served how well, and how sure that is: metrics of groups of users, intervals.

All are computed from the ranks of all users in their order, so that they are the same to the last
bit on any number of ranks.

With several targets of a user, a metric is of the user's targets together, and in a group of
targets only those of the group are relevant.

Shapes: U users, T targets, M metrics.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.evaluation.metrics import metric_names, user_metrics
from model.evaluation.ranked_users import (
    MODEL,
    MOST_FREQUENT,
    PROTOCOLS,
    RECENT,
    REPEAT_LAST,
    RankedUsers,
)
from pipeline.evaluation.repeats import history_bounds, is_repeated
from pipeline.preparation.store import SequenceStore

# First history lengths of the groups after the first.
_LENGTHS = (5, 10, 20, 50, 100)
_RESAMPLES, _CONFIDENCE = 1000, 0.95
# Farther ranks are resampled as one, of their mean 1 / rank: they matter to MRR alone.
_FARTHEST = 1000


def details(
    users: RankedUsers, store: SequenceStore, split: str, cutoffs: Sequence[int], seed: int
) -> dict[str, Any]:
    """What a result holds beside the metrics of all users.

    Returns:
        ``intervals``: of the metrics, [low, high] at 95 %, by protocol;
        ``baselines``: metrics of the rankings that repeat a user's items, and of recent
            popularity, if users have them;
        ``debiased``: full HR and NDCG of each target alone, weighted by 1 / its training count;
        ``cold_targets``: share of targets without training counts;
        ``rank_histogram``: ``limits``, and by protocol the number of targets whose rank is at most
            each limit and above the one before it;
        ``groups``: metrics by history length, by the target's popularity, of repeated targets.
    """
    ranks = users.ranks[MODEL]
    counts = store.train_item_counts[store.items[users.places]]
    found: dict[str, Any] = {
        "intervals": {
            name: intervals_of_several(users, of_all, cutoffs, seed)
            if users.several
            else intervals(of_all, cutoffs, seed)
            for name, of_all in zip(PROTOCOLS, ranks, strict=True)
        }
    }
    baselines = {
        name: users.means(name, cutoffs)
        for name in (REPEAT_LAST, MOST_FREQUENT, RECENT)
        if name in users.ranks
    }
    if baselines:
        found["baselines"] = baselines
    found["debiased"] = _debiased(ranks[PROTOCOLS.index("full")], counts, cutoffs)
    found["cold_targets"] = float((counts == 0).mean())
    found["rank_histogram"] = histogram(ranks, store.num_items)
    groups: dict[str, dict[str, Any]] = {}
    for kind, name, inside in _groups(users, counts, store, split):
        if inside.any():
            of_group = users.means(MODEL, cutoffs, inside)
            members = len(np.unique(users.users[inside]))
            groups.setdefault(kind, {})[name] = {"users": members, **of_group}
    return found | {"groups": groups}


def histogram(ranks: np.ndarray, num_items: int) -> dict[str, list[int]]:
    """How many of int64 [2, T] ranks are in each interval, by protocol."""
    steps = (step * 10**power for power in range(len(str(num_items))) for step in (1, 2, 5))
    limits = [limit for limit in steps if limit < num_items] + [num_items]
    found = {"limits": limits}
    for name, of_all in zip(PROTOCOLS, ranks, strict=True):
        places = np.searchsorted(limits, of_all, side="left")
        found[name] = np.bincount(places, minlength=len(limits)).tolist()
    return found


def intervals(ranks: np.ndarray, cutoffs: Sequence[int], seed: int) -> dict[str, list[float]]:
    """95 % intervals of the means of int64 [U] ranks: percentiles of a bootstrap over users.

    Drawing U users with replacement is one multinomial draw of how often each rank occurs.
    """
    farthest = max(_FARTHEST, *cutoffs)
    near, counts = np.unique(ranks[ranks <= farthest], return_counts=True)
    values = user_metrics(near, cutoffs)  # [M, distinct ranks]
    if len(far := ranks[ranks > farthest]):
        values = np.hstack([values, user_metrics(far, cutoffs).mean(axis=1, keepdims=True)])
        counts = np.append(counts, len(far))
    drawn = np.random.default_rng(seed).multinomial(
        len(ranks), counts / len(ranks), size=_RESAMPLES
    )
    return _percentiles(metric_names(cutoffs), drawn @ values.T / len(ranks))


def intervals_of_several(
    users: RankedUsers, ranks: np.ndarray, cutoffs: Sequence[int], seed: int
) -> dict[str, list[float]]:
    """The same for users with several targets, drawn user by user."""
    values, generator = users.values(ranks, cutoffs), np.random.default_rng(seed)
    size = values.shape[1]
    means = np.empty((_RESAMPLES, len(values)))
    for draw in range(_RESAMPLES):
        counts = np.bincount(generator.integers(size, size=size), minlength=size)
        means[draw] = values @ counts / size
    return _percentiles(users.names(cutoffs), means)


def _percentiles(names: Sequence[str], means: np.ndarray) -> dict[str, list[float]]:
    """[low, high] of each of M metrics by its resampled means, float64 [resamples, M]."""
    outside = (1 - _CONFIDENCE) / 2
    bounds = np.quantile(means, (outside, 1 - outside), axis=0)
    return dict(zip(names, bounds.T.tolist(), strict=True))


def _debiased(ranks: np.ndarray, counts: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """Self-normalised inverse propensities; the propensity of a target is its training count."""
    weights = 1 / np.maximum(counts, 1)
    values = user_metrics(ranks, cutoffs) @ weights / weights.sum()
    named = zip(metric_names(cutoffs), values.tolist(), strict=True)
    return {name: value for name, value in named if name != "MRR"}


def _groups(
    users: RankedUsers, counts: np.ndarray, store: SequenceStore, split: str
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Kind, name and members, bool [T], of each group."""
    begin, end = history_bounds(store, users.users, split)
    for low, high in zip((1, *_LENGTHS), (*_LENGTHS, 0), strict=True):
        name = f"{low}-{high - 1}" if high else f"{low} or more"
        length = end - begin
        yield "history", name, (length >= low) & ((length < high) | (high == 0))
    more_popular = _share_of_more_popular(counts, store.train_item_counts)
    edges = (("head", 0, 1 / 3), ("middle", 1 / 3, 2 / 3), ("tail", 2 / 3, 2))
    for name, from_share, to_share in edges:
        yield "target_popularity", name, (more_popular >= from_share) & (more_popular < to_share)
    repeated = is_repeated(store, users.users, split, users.places)
    yield "target", "repeated", repeated
    yield "target", "new", ~repeated


def _share_of_more_popular(counts: np.ndarray, train_item_counts: np.ndarray) -> np.ndarray:
    """The share of all training counts that belongs to items with a larger count: float64 [U]."""
    ascending = np.sort(train_item_counts)
    beyond = np.append(np.cumsum(ascending[::-1])[::-1], 0)
    return beyond[np.searchsorted(ascending, counts, side="right")] / max(1, ascending.sum())
