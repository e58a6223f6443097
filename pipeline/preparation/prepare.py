"""From a data set's name to its sequence store.

Each filter is one pass, in this order, as in TorchRec's examples/bert4rec; dropping users may leave
items with fewer than --min_item_count ratings.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.preparation import stages
from pipeline.preparation.catalog import Catalog, read_titles
from pipeline.preparation.store import SequenceStore, open_or_build
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import DataSource, resolve


def prepare(config: DataConfig) -> SequenceStore:
    """The data set's sequence store, from the cache folder or else built."""
    source = resolve(config)
    return open_or_build(source.store_path, source.fingerprint, lambda: build(source, config))


def build(source: DataSource, config: DataConfig) -> SequenceStore:
    """Run all preparation stages; the store is in memory."""
    encoded = stages.EncodeIds(source.ratings)
    rated = stages.FilterRatings(encoded, config.min_rating)
    popular = stages.FilterItems(rated, config.min_item_count)
    active = stages.FilterUsers(popular, config.min_user_count)
    dense = stages.Densify(active)
    histories = next(stages.GroupByUser(dense), None)
    kept: list[dict[str, Any]] = [{"stage": "read"} | encoded.counts]
    filters: dict[str, stages.CountingStage] = {
        f"--min_item_count {config.min_item_count}": popular,
        f"--min_user_count {config.min_user_count}": active,
    }
    if config.min_rating is not None:
        filters = {f"--min_rating {config.min_rating:g}": rated} | filters
    for flag, stage in filters.items():
        if not stage.counts["ratings"]:
            raise UserError(
                f"{flag} drops all of the {kept[-1]['ratings']:,} ratings of {config.name}: "
                "lower it"
            )
        kept.append({"stage": flag} | stage.counts)
    assert histories is not None
    store = SequenceStore(histories.items, histories.offsets, len(dense.kept_items))
    if kept[0]["ratings"] == kept[-1]["ratings"]:  # none was dropped
        store.best_possible = getattr(source.ratings, "best_possible", None)
    if not len(store.evaluable_users()):
        dropping = [
            after["stage"].split()[0]
            for before, after in pairwise(kept)
            if after["ratings"] < before["ratings"]
        ]
        advice = f"lower {' and '.join(dropping)}, or " if dropping else ""
        raise UserError(
            f"no user of {config.name} has 3 items, which training, validation and test need: "
            f"{advice}check --columns"
        )
    items = encoded.items.take(pa.array(dense.kept_items))
    titles = read_titles(source.titles, items) if source.titles else pa.repeat("", len(items))
    users = encoded.users.take(pa.array(dense.kept_users))
    types = encoded.types["item"], encoded.types["user"]
    store.catalog = Catalog(items, titles, store.train_item_counts[1:-1], users, *types)
    store.counts = {"name": config.name, "stages": kept} | _measure(store)
    store.counts["trimmed"] = dict(getattr(source.ratings, "trimmed", {}))
    return store


def _measure(store: SequenceStore) -> dict[str, Any]:
    shortest, median, longest = np.quantile(store.lengths(), [0, 0.5, 1]).tolist()
    history = {"min": int(shortest), "median": median, "max": int(longest)}
    counts: dict[str, Any] = {"history": history, "evaluable_users": len(store.evaluable_users())}
    for split in ("validation", "test"):
        targets = store.targets(split)
        cold = targets[store.train_item_counts[targets] == 0]
        counts[split] = {"cold_targets": len(cold), "cold_items": len(np.unique(cold))}
    return counts


def describe(store: SequenceStore) -> str:
    """Output size of each stage, history lengths and cold targets, as text for the user."""
    counts = store.counts
    lines = [f"{counts['name']}: what each stage kept"]
    for stage in counts["stages"]:
        kept = "  ".join(f"{stage[what]:>12,} {what}" for what in ("ratings", "users", "items"))
        lines.append(f"  {stage['stage']:<20}{kept}")
    history, users = counts["history"], counts["evaluable_users"]
    lines.append(
        f"  history lengths: min {history['min']:,}, median {history['median']:,g}, "
        f"max {history['max']:,}; users evaluated: {users:,} of {store.num_users:,}"
    )
    cold = "; ".join(
        f"{split} {counts[split]['cold_targets']:,} targets ({counts[split]['cold_items']:,} items)"
        for split in ("validation", "test")
    )
    lines.append(f"  cold (never in a training part): {cold}")
    if trimmed := counts.get("trimmed"):  # not in stores of earlier versions
        what = ", ".join(f"{role} ids of {ratings:,} ratings" for role, ratings in trimmed.items())
        lines.append(f"  blanks around ids in text were removed: {what}")
    for split, best in (store.best_possible or {}).items():
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in best.items())
        lines.append(f"  best possible on {split} (full ranking): {metrics}")
    return "\n".join(lines)
