"""Every user's ranks, gathered from all ranks: what metrics of groups of users are made of.

Shapes: T targets, U users with one or several of them, M metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from model.distributed import writing
from model.evaluation.evaluate import Ranking
from model.evaluation.metrics import (
    metric_names,
    metrics_of_several,
    names_of_several,
    one_list,
    user_metrics,
)
from model.losses.sharded_softmax import all_gather_rows
from pipeline.evaluation.holdout import EvalLoader
from pipeline.evaluation.repeats import repeat_ranks
from pipeline.files import check_writable, whole_file
from pipeline.preparation.store import SequenceStore

PROTOCOLS = ("sampled", "full")
# What ranks; the last three are keys of a result's "baselines".
MODEL, POPULARITY, REPEAT_LAST, MOST_FREQUENT, RECENT = (
    "model",
    "popularity",
    "repeat_last",
    "most_frequent",
    "popular_recently",
)


@dataclass(frozen=True)
class RankedUsers:
    """All targets of all evaluated users, by user and place; the same on every rank."""

    users: np.ndarray  # int64 [T], numbers in the sequence store
    places: np.ndarray  # int64 [T], of the targets in the store's items
    scores: np.ndarray  # float32 [T], of the targets
    # What ranked them -> int64 [2, T]: the target's rank by PROTOCOLS, 1 = best.
    ranks: Mapping[str, np.ndarray]
    several: bool = False  # whether a user may have several targets

    def names(self, cutoffs: Sequence[int]) -> tuple[str, ...]:
        """Names of a user's metrics."""
        return names_of_several(cutoffs) if self.several else metric_names(cutoffs)

    def values(
        self, ranks: np.ndarray, cutoffs: Sequence[int], inside: np.ndarray | None = None
    ) -> np.ndarray:
        """The metrics of each user: float64 [M, U].

        Args:
            ranks: int64 [T], a row of ``ranks``.
            inside: bool [T], the targets that count; users without one are left out.
        """
        users = self.users
        if inside is not None:
            ranks, users = ranks[inside], users[inside]
        if self.several:
            return metrics_of_several(ranks, users, cutoffs)
        return user_metrics(ranks, cutoffs)

    def means(
        self, name: str, cutoffs: Sequence[int], inside: np.ndarray | None = None
    ) -> dict[str, dict[str, float]]:
        """Mean metrics by protocol of what ``name`` ranked."""
        names, found = self.names(cutoffs), {}
        for protocol, ranks in zip(PROTOCOLS, self.ranks[name], strict=True):
            of_all = self.values(ranks, cutoffs, inside).mean(axis=1)
            found[protocol] = dict(zip(names, of_all.tolist(), strict=True))
        return found


def gathered(ranking: Ranking, loader: EvalLoader, recent: np.ndarray | None = None) -> RankedUsers:
    """The users of all ranks; called on all of them.

    With seen items kept, also their ranks by both rankings that repeat a user's items.

    Args:
        recent: int64 [2, T], ranks of this rank's targets by recent popularity.
    """
    several = ranking.users is not None
    names = [MODEL, POPULARITY][: len(ranking.ranks) // 2]
    rows = [ranking.ranks.cpu().numpy()]
    if loader.keep_seen:
        names += [REPEAT_LAST, MOST_FREQUENT]
        rows.append(repeat_ranks(loader))
    if recent is not None:
        names.append(RECENT)
        rows.append(recent)
    if several:
        owners = loader.users[loader.users >= 0]
        rows[1:] = [one_list(each, owners) for each in rows[1:]]
    is_user = loader.users >= 0
    users, places = loader.users[is_user], loader.places[is_user]
    scores = ranking.scores.cpu().numpy()
    # Whole numbers below 2^53 and float32 are exact in float64.
    table = np.concatenate([[users], [places], [scores], *rows]).astype(np.float64).T
    if dist.is_initialized() and dist.get_world_size() > 1:
        own = torch.from_numpy(table).to(ranking.ranks.device)
        padded, sizes = all_gather_rows(own)
        is_row = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).flatten()
        table = padded.cpu().numpy()[is_row.numpy()]
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    users, places, scores, *ranks = table.T
    pairs = np.stack(ranks).astype(np.int64).reshape(len(names), len(PROTOCOLS), -1)
    by_name = dict(zip(names, pairs, strict=True))
    users, places = users.astype(np.int64), places.astype(np.int64)
    return RankedUsers(users, places, scores.astype(np.float32), by_name, several)


def check_ranks_file(path: Path) -> None:
    """UserError unless the file can be written."""
    with writing(path, "--per_user"):
        check_writable(path)


def write_ranks(path: Path, users: RankedUsers, store: SequenceStore) -> None:
    """Write a Parquet file with a row for each target, complete or absent; on one rank.

    Columns: user and target (original ids), rank and sampled_rank (1 = best), score of the target.
    """
    catalog, (sampled, full) = store.catalog, users.ranks[MODEL]
    targets = store.items[users.places]
    columns = {
        "user": catalog.users.take(pa.array(users.users)).cast(catalog.user_type),
        "target": catalog.items.take(pa.array(targets - 1)).cast(catalog.item_type),
        "rank": pa.array(full),
        "sampled_rank": pa.array(sampled),
        "score": pa.array(users.scores),
    }
    with writing(path, "--per_user"), whole_file(path) as file:
        pq.write_table(pa.table(columns), file)
