"""What recommend.py does with its flags: whose histories, which items, where to."""

from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from model.distributed import Ranks, from_first_rank
from model.nodes import prepared_data
from model.run.trained import TrainedRun
from model.serving.config import RecommendFlags
from model.serving.eligible import Eligible
from model.serving.output import check_output, row_writer
from model.serving.recommender import Recommender
from model.serving.rows import ItemRows, Lists, UserRows
from model.serving.shown import format_history, format_list
from model.settings.config import EvalFlags
from pipeline.errors import UserError
from pipeline.files import open_regular
from pipeline.preparation.catalog import Catalog
from pipeline.serving import histories as known
from pipeline.serving.histories import KnownHistories, item_number
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve
from pipeline.tables.values import BLANKS


def answer(flags: RecommendFlags, ranks: Ranks) -> None:
    """Recommend what the flags describe; rank 0 prints or writes it."""
    output = Path(flags.output)
    if flags.output:
        from_first_rank(ranks, lambda: check_output(output))
    allow, deny = _read_ids("allow", flags.allow), _read_ids("deny", flags.deny)
    at = known.moment(flags.at, "--at") if flags.at else None
    places = {name: getattr(flags, name) for name in ("dataset_path", "items_path", "cache_dir")}
    run = TrainedRun(EvalFlags(flags.checkpoint, **places))
    catalog = run.catalog()
    if flags.similar is not None:
        item = item_number(flags.similar, catalog)
        recommender = Recommender.of_run(run, catalog, ranks, flags.batch_size)
        lists = recommender.similar_items(
            item, recommender.eligible(flags.choice, allow, deny or ())
        )
        ranks.say(f"similar to {catalog.item_id(item)}  {catalog.title(item)}".rstrip())
        _give(lists, ItemRows(catalog), recommender, output, "cosine")
        return
    histories = histories_of(flags, run, catalog, ranks)
    recommender = Recommender.of_run(run, catalog, ranks, flags.batch_size)
    recommender.report_unknown(histories)
    histories = recommender.requested(histories, at, "--at")
    eligible = recommender.eligible(flags.choice, allow, deny or ())
    if flags.all or flags.histories:
        write_all(recommender, histories, eligible, output)
        return
    ranks.say(format_history(catalog, histories.items))
    (lists,) = recommender.lists(histories, eligible)
    scored_by = "count" if histories.empty()[0] else "score"
    _give(lists, UserRows(catalog, histories), recommender, output, scored_by)


def histories_of(
    flags: RecommendFlags, run: TrainedRun, catalog: Catalog, ranks: Ranks
) -> KnownHistories:
    """The histories to recommend from.

    Raises:
        UserError: there is no such user, or a file cannot be read.
    """
    if flags.history is not None:
        ids = [each.strip(BLANKS) for each in flags.history.split(",")]
        return known.of_lists([[each for each in ids if each]], catalog)
    if flags.histories:
        path, columns, separator = flags.histories, flags.columns, flags.separator
        data = DataConfig(dataset_path=path, columns=columns, separator=separator)
        kept = run.config.data.min_rating, run.span is not None
        return known.of_ratings(resolve(data).ratings, catalog, *kept)
    from_first_rank(ranks, run.check_places)
    store = prepared_data(run.config.data, ranks)
    run.check_catalog(store)
    if run.other_ratings(store):
        ranks.warn(
            f"the histories are of other ratings than {run.folder} was trained on: give those by "
            "--dataset_path, unless these are meant"
        )
    everyone = known.of_store(store, run.span is not None)
    if flags.user is None:
        return everyone
    place = pc.index(store.catalog.users, flags.user).as_py()
    if place < 0:
        raise UserError(
            f"--user {flags.user}: no such user in the training data; give the items of somebody "
            "new by --history"
        )
    return everyone.only(np.array([place]))


def write_all(
    recommender: Recommender, histories: KnownHistories, eligible: Eligible, output: Path
) -> None:
    """Recommend to all users on all ranks; rank 0 writes the rows."""
    ranks = recommender.ranks
    around = _progress if ranks.is_first else iter
    lists = recommender.lists(histories, eligible, around)
    if not ranks.is_first:
        for _ in lists:
            pass
        return
    count = 0
    with row_writer(output, UserRows(recommender.catalog, histories)) as write:
        for block in lists:
            write(block)
            count += int((block.items > 0).sum())
    users = "1 user" if len(histories) == 1 else f"{len(histories):,} users"
    ranks.say(f"{output}: {count:,} rows for {users}")


def _progress(batches: Any) -> Any:
    """A progress bar, on a terminal only."""
    return tqdm(batches, desc="recommending", unit=" batches", disable=None)


def _give(
    lists: Lists, rows: ItemRows, recommender: Recommender, output: Path, scored_by: str
) -> None:
    """Print one list, or write it where there is an ``--output``."""
    ranks = recommender.ranks
    if output == Path():
        ranks.say(format_list(recommender.catalog, lists, scored_by))
    elif ranks.is_first:
        with row_writer(output, rows) as write:
            write(lists)
        ranks.say(f"{output}: {int((lists.items > 0).sum()):,} rows")


def _read_ids(flag: str, path: str) -> list[str] | None:
    """The ids in a file, one a line; None without a file."""
    if not path:
        return None
    try:
        with open_regular(Path(path)) as file:
            lines = [line.strip(BLANKS + "\n") for line in TextIOWrapper(file, "utf-8-sig")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--{flag} {path} cannot be read: {reason}") from error
    ids = [line for line in lines if line]
    if not ids:
        raise UserError(f"--{flag} {path}: no ids in it; write one a line")
    return ids
