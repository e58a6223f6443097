"""Every user's ranks, gathered from all ranks: what metrics of groups of users are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from model.distributed import writing
from model.evaluation.evaluate import Ranking
from model.losses.sharded_softmax import all_gather_rows
from pipeline.evaluation.holdout import EvalLoader
from pipeline.evaluation.repeats import history_bounds, repeat_ranks
from pipeline.files import check_writable, whole_file
from pipeline.preparation.store import SequenceStore

PROTOCOLS = ("sampled", "full")
MODEL, POPULARITY, REPEAT_LAST, MOST_FREQUENT = (
    "model",
    "popularity",
    "repeat_last",
    "most_frequent",
)


@dataclass(frozen=True)
class RankedUsers:
    """All U evaluated users, ascending; the same on every rank."""

    users: np.ndarray  # int64 [U], numbers in the sequence store
    scores: np.ndarray  # float32 [U], of the targets
    # What ranked them -> int64 [2, U]: the target's rank by PROTOCOLS, 1 = best.
    ranks: Mapping[str, np.ndarray]


def gathered(ranking: Ranking, loader: EvalLoader) -> RankedUsers:
    """The users of all ranks; called on all of them.

    With seen items kept, also their ranks by both rankings that repeat a user's items.
    """
    names = [MODEL, POPULARITY][: len(ranking.ranks) // 2]
    rows = [ranking.ranks.cpu().numpy()]
    if loader.keep_seen:
        names += [REPEAT_LAST, MOST_FREQUENT]
        rows.append(repeat_ranks(loader))
    users = loader.users[loader.users >= 0]
    # Whole numbers below 2^53 and float32 are exact in float64.
    table = np.concatenate([[users], [ranking.scores.cpu().numpy()], *rows]).astype(np.float64).T
    if dist.is_initialized() and dist.get_world_size() > 1:
        own = torch.from_numpy(table).to(ranking.ranks.device)
        padded, sizes = all_gather_rows(own)
        is_row = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).flatten()
        table = padded.cpu().numpy()[is_row.numpy()]
    table = table[np.argsort(table[:, 0])]
    users, scores, *ranks = table.T
    pairs = np.stack(ranks).astype(np.int64).reshape(len(names), len(PROTOCOLS), -1)
    by_name = dict(zip(names, pairs, strict=True))
    return RankedUsers(users.astype(np.int64), scores.astype(np.float32), by_name)


def check_ranks_file(path: Path) -> None:
    """UserError unless the file can be written."""
    with writing(f"--per_user {path}"):
        check_writable(path)


def write_ranks(path: Path, users: RankedUsers, store: SequenceStore, split: str) -> None:
    """Write a Parquet file with a row for each user, complete or absent; on one rank.

    Columns: user and target (original ids), rank and sampled_rank (1 = best), score of the target.
    """
    catalog, (sampled, full) = store.catalog, users.ranks[MODEL]
    targets = store.items[history_bounds(store, users.users, split)[1]]
    columns = {
        "user": catalog.users.take(pa.array(users.users)).cast(catalog.user_type),
        "target": catalog.items.take(pa.array(targets - 1)).cast(catalog.item_type),
        "rank": pa.array(full),
        "sampled_rank": pa.array(sampled),
        "score": pa.array(users.scores),
    }
    with writing(f"--per_user {path}"), whole_file(path) as file:
        pq.write_table(pa.table(columns), file)
