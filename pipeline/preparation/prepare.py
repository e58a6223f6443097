"""From a data set's name to its sequence store.

Each filter is one pass, in this order, as in TorchRec's examples/bert4rec; dropping users may leave
items with fewer than --min_item_count ratings.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.formats.parquet import ReadTable
from pipeline.preparation import checks, stages
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.grouping import DropDuplicates, GroupByUser, Histories
from pipeline.preparation.items import read_items, read_titles
from pipeline.preparation.memory import Memory
from pipeline.preparation.parts import (
    BY_TIME,
    SPLITS,
    TEST,
    VALIDATION,
    validation_from_training,
)
from pipeline.preparation.store import SequenceStore, open_or_build
from pipeline.preparation.time_split import MarkParts, stored_points
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import DataSource, items_file, resolve, wanted
from pipeline.tables.points import Point, read_points


def prepare(data: Any, **flags: Any) -> SequenceStore:
    """The sequence store of a data set, from the cache folder or else built; or of a table.

    Args:
        data: a `DataConfig`; or anything with an Arrow stream (a data frame of pandas or polars, an
            Arrow table or reader, a DuckDB relation), whose store is in memory.
        flags: fields of `DataConfig`, for a table: ``columns``, ``where``, ``min_user_count``, ...

    Raises:
        UserError: a flag or the data are wrong.
    """
    if isinstance(data, DataConfig):
        config = replace(data, **flags)
        if config.split_time:
            _points(config)  # before data are looked for
        source = resolve(config)
        store = open_or_build(source.store_path, source.fingerprint, lambda: build(source, config))
        checks.warn_of_change(store)
        return store
    if not hasattr(data, "__arrow_c_stream__"):
        raise UserError(
            f"prepare takes a DataConfig or a table with an Arrow stream, not {type(data).__name__}"
        )
    config = DataConfig(**{"dataset_name": "table", "dataset_path": "table"} | flags)
    rows = ReadTable(data, wanted(config))
    return build(DataSource(rows, items_file(config), {}, config.cache_folder), config)


def build(source: DataSource, config: DataConfig) -> SequenceStore:
    """Run all preparation stages; the store is in memory, a large one mapped from unnamed files."""
    memory = Memory.of(config.memory_gb, config.cache_folder)
    encoded = stages.EncodeIds(source.ratings, memory)
    single = DropDuplicates(encoded, memory) if config.duplicates == "drop" else encoded
    rated = stages.FilterRatings(single, config.min_rating)
    marked = None
    if config.split_by == BY_TIME:
        are_dates = partial(getattr, source.ratings, "dates", False)
        marked = MarkParts(rated, *_points(config), are_dates, config.name, memory)
    parted = rated if marked is None else marked
    popular = stages.FilterItems(parted, config.min_item_count, memory)
    active = stages.FilterUsers(popular, config.min_user_count, memory)
    dense = stages.Densify(active, memory)
    grouped = GroupByUser(dense, config.file_order == "newest_first", memory)
    histories = next(grouped, None)
    filters: dict[str, stages.CountingStage] = {}
    if single is not encoded:
        filters["--duplicates drop"] = single
    if config.min_rating is not None:
        filters[f"--min_rating {config.min_rating:g}"] = rated
    filters[f"--min_item_count {config.min_item_count}"] = popular
    filters[f"--min_user_count {config.min_user_count}"] = active
    kept = _kept(encoded, filters, config.name)
    assert histories is not None
    store = _with_parts(histories, len(dense.kept_items), config, marked)
    _check_targets(store, config, kept)
    if not store.split and kept[0]["ratings"] == kept[-1]["ratings"]:  # none was dropped
        store.best_possible = getattr(source.ratings, "best_possible", None)
    store.catalog = _catalog(source, config, encoded, dense, store.train_item_counts[1:-1])
    store.counts = {"name": config.name, "stages": kept} | _measure(store)
    dropped = parted.ratings_of_parts - dense.ratings_of_parts
    for split, part in zip(SPLITS, (VALIDATION, TEST), strict=True):
        if dropped[part]:
            store.counts[split]["dropped"] = int(dropped[part])
    dates = getattr(source.ratings, "dates", False)
    _keep_times(store, histories, grouped, dates, marked, memory)
    checks.warn_of_order(grouped, config.name)
    for role, ids in (("user", encoded.users), ("item", encoded.items)):
        checks.warn_of_look_alikes(ids, role, config.name)
    store.counts["trimmed"] = dict(getattr(source.ratings, "trimmed", {}))
    return store


def _kept(
    encoded: stages.EncodeIds, filters: Mapping[str, stages.CountingStage], name: str
) -> list[dict[str, Any]]:
    """What was read and what each filter kept, by its flag; UserError if that is nothing."""
    kept: list[dict[str, Any]] = [{"stage": "read"} | encoded.counts]
    for flag, stage in filters.items():
        if not stage.counts["ratings"]:
            raise UserError(
                f"{flag} drops all of the {kept[-1]['ratings']:,} ratings of {name}: lower it"
            )
        kept.append({"stage": flag} | stage.counts)
    return kept


def _catalog(
    source: DataSource,
    config: DataConfig,
    encoded: stages.EncodeIds,
    dense: stages.Densify,
    train_counts: np.ndarray,
) -> Catalog:
    """The catalog of the kept items and users; ``train_counts``: int64 [V]."""
    items = encoded.items.take(pa.array(dense.kept_items))
    titles, attributes = pa.repeat("", len(items)), None
    if source.titles and config.items_path:
        titles, attributes = read_items(source.titles, items)
    elif source.titles:
        titles = read_titles(source.titles, items)
    return Catalog(
        items,
        titles,
        train_counts,
        encoded.users.take(pa.array(dense.kept_users)),
        item_type=encoded.types["item"],
        user_type=encoded.types["user"],
        attributes=attributes,
    )


def _points(config: DataConfig) -> tuple[list[Point], Point | None]:
    """The points of --split_time, and that of --split_until.

    Raises:
        UserError: they are no points, or do not ascend; there are more than two.
    """
    points = read_points(config.split_time)
    if len(points) > 2:
        raise UserError(
            f"--split_time {config.split_time}: one point or two; only train.py takes more, and "
            "trains once for each two"
        )
    if not config.split_until:
        return points, None
    *points, until = read_points(config.split_time, config.split_until)
    return points, until


def _with_parts(
    histories: Histories, num_items: int, config: DataConfig, marked: MarkParts | None
) -> SequenceStore:
    """The store of the histories, with the parts that time or a file made, if one did."""
    ends, split = histories.ends, dict[str, Any]()
    if ends is not None:
        has_validation = (ends[1] > ends[0]).any() if marked is None else len(marked.points) == 2
        if not has_validation:
            ends = validation_from_training(ends, histories.offsets[:-1])
        split["by"] = config.split_by
    if marked is not None:
        split["points"] = [point.text for point in marked.points]
        if marked.until is not None:
            split["until"] = marked.until.text
    return SequenceStore(histories.items, histories.offsets, num_items, ends=ends, split=split)


def _check_targets(store: SequenceStore, config: DataConfig, kept: list[dict[str, Any]]) -> None:
    """UserError unless each split has a user with a target and a history before it."""
    if not store.split:
        if len(store.evaluable_users()):
            return
        dropping = [
            after["stage"].split()[0]
            for before, after in pairwise(kept)
            if after["ratings"] < before["ratings"]
        ]
        remedies = [
            "give --duplicates keep" if flag == "--duplicates" else f"lower {flag}"
            for flag in dropping
        ]
        advice = f"{' and '.join(remedies)}, or " if remedies else ""
        raise UserError(
            f"no user of {config.name} has 3 items, which training, validation and test need: "
            f"{advice}check --columns, or hold out by time with --split_time"
        )
    flag = f"--split_path {config.split_path}"
    if config.split_by == BY_TIME:
        flag = f"--split_time {config.split_time}"
    for split in SPLITS:
        if not len(store.evaluable_users(split)):
            raise UserError(
                f"{flag}: no user of {config.name} has ratings of the {split} part and some before "
                "it: choose another split, or lower --min_user_count"
            )


def _keep_times(
    store: SequenceStore,
    histories: Histories,
    grouped: GroupByUser,
    are_dates: bool,
    marked: MarkParts | None,
    memory: Memory,
) -> None:
    """The times, their unit, how many are equal, and points, in the store and its counts."""
    if histories.times is None:
        return
    name = store.counts["name"]
    unit = "ns" if are_dates else checks.time_unit(histories.times, name)
    if unit:
        checks.warn_of_missing(histories.times, name)
    times, unit = checks.in_int64(histories.times, histories.fractions, unit, memory)
    store.times = times
    if marked is not None:
        scale = 1 if times is histories.times else checks.FINER
        store.split["times"] = stored_points(marked.times, scale)
    first, last = checks.ends(times)
    store.counts["times"] = {
        "unit": unit,
        "first": first,
        "last": last,
        "ties": grouped.ties,
        "duplicates": grouped.duplicates,
    }


def _measure(store: SequenceStore) -> dict[str, Any]:
    shortest, median, longest = np.quantile(store.lengths(), [0, 0.5, 1]).tolist()
    history = {"min": int(shortest), "median": median, "max": int(longest)}
    counts: dict[str, Any] = {"history": history, "evaluable_users": len(store.evaluable_users())}
    for split in SPLITS:
        targets = store.targets(split)
        cold = targets[store.train_item_counts[targets] == 0]
        counts[split] = {"cold_targets": len(cold), "cold_items": len(np.unique(cold))}
        if store.split:
            begin, end = store.parts.history_end(split), store.parts.targets_end(split)
            users = len(store.evaluable_users(split))
            counts[split] |= {"ratings": int((end - begin).sum()), "users": users}
    return counts


def _split_line(store: SequenceStore) -> str:
    split, counts = store.split, store.counts
    training = int((store.parts.training_end - store.parts.begin).sum())
    how = f" at {' and '.join(split['points'])}" if "points" in split else ""
    how += f", until {split['until']}" if "until" in split else ""
    parts = []
    for name in SPLITS:
        about = counts[name]
        dropped = f" and {about['dropped']:,} dropped by filters" if "dropped" in about else ""
        parts.append(
            f"{name} {about['ratings']:,} ratings{dropped}, {about['users']:,} users evaluated"
        )
    return f"split by {split['by']}{how}: training {training:,} ratings; {', '.join(parts)}"


def _times_line(times: dict[str, Any]) -> str:
    unit = times["unit"]
    shown = [checks.shown_time(times[end], unit) for end in ("first", "last")]
    line = f"times ({unit or 'of unknown unit'}): {shown[0]} to {shown[1]}"
    if times["ties"]:
        line += f"; ratings at the same time as another of the user: {times['ties']:,}"
    if times["duplicates"]:
        line += f", of these repeated (same item): {times['duplicates']:,}"
    return line


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
    if store.split:
        lines.append(f"  {_split_line(store)}")
    if times := counts.get("times"):  # not in stores of earlier versions
        lines.append(f"  {_times_line(times)}")
    cold = "; ".join(
        f"{split} {counts[split]['cold_targets']:,} targets ({counts[split]['cold_items']:,} items)"
        for split in SPLITS
    )
    lines.append(f"  cold (never in a training part): {cold}")
    if trimmed := counts.get("trimmed"):  # not in stores of earlier versions
        what = ", ".join(f"{role} ids of {ratings:,} ratings" for role, ratings in trimmed.items())
        lines.append(f"  blanks around ids in text were removed: {what}")
    for split, best in (store.best_possible or {}).items():
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in best.items())
        lines.append(f"  best possible on {split} (full ranking): {metrics}")
    return "\n".join(lines)
