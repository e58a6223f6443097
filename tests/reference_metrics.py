"""All metrics of an evaluation again, in plain loops over users and items."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

BACK = {"validation": 2, "test": 1}
GROUPS = {"1-4": range(1, 5), "5-9": range(5, 10), "10-19": range(10, 20)}


def metrics(ranks: Sequence[int], cutoffs: Sequence[int]) -> dict[str, float]:
    """Means of users with these ranks."""
    found = {f"HR@{k}": sum(r <= k for r in ranks) for k in cutoffs}
    for k in cutoffs:
        if k > 1:
            found[f"NDCG@{k}"] = sum(math.log(2) / math.log(r + 1) for r in ranks if r <= k)
    found["MRR"] = sum(1 / r for r in ranks)
    return {name: value / len(ranks) for name, value in found.items()}


def rank(scores: dict[int, Any], target: int, others: Sequence[int]) -> int:
    """1 and the others that score at least as high."""
    return 1 + sum(scores[item] >= scores[target] for item in others if item != target)


def reference(
    histories: dict[int, list[int]],
    users: Sequence[int],
    num_items: int,
    split: str,
    scores: dict[int, list[float]],
    negatives: dict[int, list[int]],
    keep: bool,
    cutoffs: Sequence[int],
) -> dict[str, Any]:
    """What ``measure`` returns for these users, without intervals and facts.

    Args:
        histories: items of every user, also of those that are only trained on.
        users: the evaluated ones; their ``scores`` of items 1..V, from place 0 on.
        negatives: of each of them.
    """
    counts: Counter[int] = Counter()
    for history in histories.values():
        counts.update(history[:-2] if len(history) >= 3 else history)
    total = sum(counts.values())
    catalog = range(1, num_items + 1)
    popularity = {item: counts[item] for item in catalog}
    ranks: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("model", "popularity", "repeat_last", "most_frequent")
    }
    lists, targets, known_items = [], [], []
    for user in users:
        known = histories[user][: -BACK[split]]
        target = histories[user][len(known)]
        candidates = [item for item in catalog if keep or item == target or item not in known]
        own = dict(zip(catalog, scores[user], strict=True))
        latest = {item: place for place, item in enumerate(known)}
        times = Counter(known)
        by = {
            "model": own,
            "popularity": popularity,
            "repeat_last": {i: (i in latest, latest.get(i, counts[i])) for i in catalog},
            "most_frequent": {
                i: (i in latest, times[i] if i in latest else counts[i], latest.get(i, 0))
                for i in catalog
            },
        }
        for name, each in by.items():
            drawn = [item for item in negatives[user] if item]
            ranks[name].append((rank(each, target, drawn), rank(each, target, candidates)))
        lists.append(sorted(candidates, key=lambda item: (-own[item], item)))
        targets.append(target)
        known_items.append(known)

    def both(name: str, places: Sequence[int]) -> dict[str, dict[str, float]]:
        chosen = [ranks[name][place] for place in places]
        return {
            protocol: metrics([pair[at] for pair in chosen], cutoffs)
            for at, protocol in enumerate(("sampled", "full"))
        }

    everyone = range(len(users))
    found: dict[str, Any] = {"users": len(users), **both("model", everyone)}
    found["popularity"] = both("popularity", everyone)
    if keep:
        found["baselines"] = {
            name: both(name, everyone) for name in ("repeat_last", "most_frequent")
        }
    found["cold_targets"] = sum(counts[target] == 0 for target in targets) / len(users)
    weights = [1 / max(1, counts[target]) for target in targets]
    of_each = [metrics([pair[1]], cutoffs) for pair in ranks["model"]]
    found["debiased"] = {
        name: sum(w * each[name] for w, each in zip(weights, of_each, strict=True)) / sum(weights)
        for name in of_each[0]
        if name != "MRR"
    }
    found["lists"] = {}
    for k in cutoffs:
        listed = [item for items in lists for item in items[:k]]
        found["lists"] |= {
            f"coverage@{k}": len(set(listed)) / num_items,
            f"popularity@{k}": sum(counts[item] for item in listed) / len(listed),
            f"novelty@{k}": sum(math.log2(total / max(1, counts[item])) for item in listed)
            / len(listed),
        }
    beyond = [sum(c for c in counts.values() if c > counts[t]) / total for t in targets]
    members = {
        "history": {
            name: [at for at in everyone if len(known_items[at]) in lengths]
            for name, lengths in GROUPS.items()
        },
        "target_popularity": {
            "head": [at for at in everyone if 3 * beyond[at] < 1],
            "middle": [at for at in everyone if 1 <= 3 * beyond[at] < 2],
            "tail": [at for at in everyone if 3 * beyond[at] >= 2],
        },
        "target": {
            "repeated": [at for at in everyone if targets[at] in known_items[at]],
            "new": [at for at in everyone if targets[at] not in known_items[at]],
        },
    }
    found["groups"] = {
        kind: {
            name: {"users": len(places), **both("model", places)}
            for name, places in groups.items()
            if places
        }
        for kind, groups in members.items()
    }
    return found
