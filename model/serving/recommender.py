"""A trained model that recommends, in original ids.

    recommender = Recommender.load("runs/ml-1m", device="cpu")
    recommender.recommend([["1193", "661"], ["2571"]], k=10)    # a pandas DataFrame
    recommender.similar("1193")

`recommended` and `similar_to` return the same as a pyarrow Table, without pandas.

`lists` is what recommend.py uses: on any number of ranks, in dense ids, block by block.

Shapes: U users, k items of each, D width, V items.
"""

import atexit
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from model.distributed import Ranks
from model.ending import silence_libraries
from model.run.trained import TrainedRun
from model.serving.config import Choice
from model.serving.eligible import Eligible
from model.serving.rows import ItemRows, Lists, UserRows
from model.serving.vectors import Vectors
from model.settings.config import EvalFlags
from pipeline.batches.eval_batch import EvalBatch
from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from pipeline.serving import histories as known
from pipeline.serving.batches import HistoryBatches
from pipeline.serving.histories import KnownHistories, item_number

# Positions of a batch, without --batch_size, and most users of one. On CPU the layers' outputs of
# more positions leave the caches, and allocating them takes as long as computing them.
BATCH_POSITIONS, BATCH_USERS = {"cpu": 1 << 12, "cuda": 1 << 18}, 1 << 12

# A call changes the modes of model and torch, and the model's modules hold its batch.
_ONE_CALL = threading.Lock()

# Lists of item ids, or ratings as a pandas DataFrame or a pyarrow Table.
Histories = Any


class Recommender:
    """Recommends the items of a catalog by a BERT4Rec, possibly sharded over the ranks.

    Calls from several threads wait for each other.

    Args:
        max_len: most items of a history, mask token included.
        batch_size: users per batch and rank; None: by the number of positions.
        min_rating: ratings below it do not belong to a history; None: all do.
        seen: what ``seen="trained"`` stands for, "drop" or "keep".
        newest: of a model that reads times, the newest one of its log, in seconds since 1970.

    Raises:
        UserError: catalog and model do not fit, or the model's vectors are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        catalog: Catalog,
        max_len: int,
        ranks: Ranks,
        batch_size: int | None = None,
        min_rating: float | None = None,
        seen: str = "drop",
        newest: int | None = None,
    ) -> None:
        self.model, self.catalog, self.ranks = model.eval(), catalog, ranks
        self.max_len, self.min_rating, self.seen = max_len, min_rating, seen
        self.newest = newest
        positions = BATCH_POSITIONS[ranks.device.type]
        self.batch_size = batch_size or max(1, min(BATCH_USERS, positions // max_len))
        self._vectors = Vectors(model, ranks)
        if len(catalog.items) != self._vectors.num_items:
            raise UserError(
                f"the catalog has {len(catalog.items)} items, the model "
                f"{self._vectors.num_items}: they belong to different runs"
            )

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "Recommender":
        """The model of a run folder or an export, on one device (default: a GPU if there is one).

        Raises:
            UserError: there is no such model, or it is damaged.
        """
        run = TrainedRun(EvalFlags(checkpoint=str(path)))
        return cls.of_run(run, run.catalog(), _alone(device))

    @classmethod
    def of_run(
        cls, run: TrainedRun, catalog: Catalog, ranks: Ranks, batch_size: int | None = None
    ) -> "Recommender":
        """The model of a run, sharded over the ranks, with the run's catalog."""
        config = run.config
        # An earlier version recorded no choice: it dropped them.
        seen = "keep" if config.holdout.seen == "keep" else "drop"
        return cls(
            run.model(ranks),
            catalog,
            config.windows.max_len,
            ranks,
            batch_size,
            min_rating=config.data.min_rating,
            seen=seen,
            newest=None if run.span is None else run.span.newest,
        )

    def recommend(self, histories: Histories, k: int = 10, **options: Any) -> Any:
        """:meth:`recommended` as a pandas DataFrame."""
        return _data_frame(self.recommended(histories, k, **options))

    def similar(self, item: object, k: int = 10, **options: Any) -> Any:
        """:meth:`similar_to` as a pandas DataFrame."""
        return _data_frame(self.similar_to(item, k, **options))

    def recommended(
        self,
        histories: Histories,
        k: int = 10,
        seen: str = "trained",
        allow: Iterable[object] | None = None,
        deny: Iterable[object] = (),
        cold: str = "drop",
        popularity_discount: float = 0.0,
        at: object = None,
    ) -> pa.Table:
        """The best k items of each user, a row each: user, rank, item, score[, title].

        A user without a known item gets the most popular items: then there is a column
        ``popularity``, true for these users, whose scores are training counts.

        Args:
            histories: lists of item ids, oldest first (the users are numbered from 0), or a table
                of ratings with columns such as user, item, timestamp, a pandas DataFrame or a
                pyarrow Table (the users come in ascending order).
            seen: "keep" recommends items of the history too, "drop" does not; "trained" is as the
                run ranked them.
            allow: recommend only these items.
            deny: never recommend these items.
            cold: "keep" recommends items without a training rating too.
            popularity_discount: as in eval.py.
            at: for a model that reads times and a table that has them, when the users are
                recommended to: a date or a number, as in ratings; None: the newest time known.
        """
        given = self.requested(self.histories_of(histories), _moment(at))
        eligible = self.eligible(Choice(k, seen, cold, popularity_discount), allow, deny)
        rows = UserRows(self.catalog, given)
        with _ONE_CALL:
            tables = [*map(rows.table, self.lists(given, eligible))]
        return pa.concat_tables([rows.schema.empty_table(), *tables])

    def similar_to(
        self,
        item: object,
        k: int = 10,
        allow: Iterable[object] | None = None,
        deny: Iterable[object] = (),
        cold: str = "drop",
    ) -> pa.Table:
        """The k items with the largest cosine to this one's vector: rank, item, score[, title]."""
        eligible = self.eligible(Choice(k, cold=cold), allow, deny)
        with _ONE_CALL:
            found = self.similar_items(item_number(item, self.catalog), eligible)
        return ItemRows(self.catalog).table(found)

    def item_vectors(self) -> np.ndarray:
        """float32 [V, D] in the catalog's order; their products with user vectors are scores."""
        with _ONE_CALL:
            return self._vectors.of_items()

    def user_vectors(self, histories: Histories, at: object = None) -> np.ndarray:
        """float32 [U, D], in the order of :meth:`recommend`."""
        given = self.histories_of(histories, without="their vectors are one and the same")
        given = self.requested(given, _moment(at))
        batches = self._batches(given, keep_seen=True)
        with _ONE_CALL:
            none = np.empty((0, self._vectors.width), np.float32)
            return np.concatenate([none, *self._vectors.of_users(batches)])[: len(given)]

    def histories_of(
        self, given: Histories, without: str = "ranked by popularity"
    ) -> KnownHistories:
        """Histories in dense ids; warns of unknown items, and ``without`` any of what follows."""
        if isinstance(given, KnownHistories):
            return given
        if hasattr(given, "columns") and not isinstance(given, pa.Table):
            try:
                given = pa.Table.from_pandas(given, preserve_index=False)
            except (pa.ArrowException, ValueError) as error:  # such as ids of two types
                reason = ": ".join(map(str, error.args))
                raise UserError(f"the data frame: {reason}") from error
        if isinstance(given, pa.Table):
            ratings = known.ratings_in_memory(given)
            kept = self.min_rating, self.newest is not None
            found = known.of_ratings(ratings, self.catalog, *kept)
        else:
            found = known.of_lists(list(given), self.catalog)
        self.report_unknown(found, without)
        return found

    def report_unknown(
        self, histories: KnownHistories, without: str = "ranked by popularity"
    ) -> None:
        """Warn of unknown items and of users who have no other."""
        if histories.unknown:
            total = histories.unknown + int(histories.offsets[-1])
            self.ranks.warn(
                f"{histories.unknown:,} of {total:,} items in the histories are unknown to the "
                "model: left out"
            )
        if empty := int(histories.empty().sum()):
            self.ranks.warn(f"{empty:,} of {len(histories):,} users have no known item: {without}")

    def requested(
        self, histories: KnownHistories, at: int | None, flag: str = "at"
    ) -> KnownHistories:
        """The histories, recommended to ``at`` this time, if the model reads times.

        Args:
            flag: what the user calls ``at``.

        Raises:
            UserError: there is a time, but the model reads none, or the histories have none.
        """
        if at is not None and self.newest is None:
            raise UserError(f"{flag}: the model reads no times, it was trained without --use_times")
        if at is not None and histories.times is None:
            raise UserError(
                f"{flag}: the histories have no times (or of unknown unit): leave it out"
            )
        return histories if self.newest is None else histories.requested(at, self.newest)

    def eligible(
        self, choice: Choice, allow: Iterable[object] | None, deny: Iterable[object]
    ) -> Eligible:
        """The items that may be recommended; warns of unknown ones in the lists."""
        if choice.seen == "trained":
            choice = replace(choice, seen=self.seen)
        found = Eligible(self.catalog, choice, allow, deny)
        if found.unknown:
            self.ranks.warn(
                f"the model does not know {found.unknown:,} of the ids to allow or deny"
            )
        return found

    def lists(
        self,
        histories: KnownHistories,
        eligible: Eligible,
        around: Callable[..., Iterable[EvalBatch]] = iter,
    ) -> Iterator[Lists]:
        """Recommendations for all users, in their order, the same on every rank.

        Args:
            around: wraps the batches, for a progress bar.
        """
        added = eligible.added(self._vectors.scale, self.ranks.device)
        popular, counts = eligible.popular()
        empty, first = histories.empty(), 0
        batches = self._batches(histories, eligible.choice.seen == "keep")
        for found in self._vectors.best(around(batches), added, eligible.k):
            rows = min(len(found[0]), len(histories) - first)
            items, scores = (each[:rows] for each in found)
            without = empty[first : first + rows]
            items[without], scores[without] = popular, counts
            yield Lists(first, items, scores)
            first += rows

    def similar_items(self, item: int, eligible: Eligible) -> Lists:
        """The items with the largest cosine to the vector of a dense id, without itself."""
        if not self.catalog.is_trained()[item - 1]:
            self.ranks.warn(
                "the item has no training rating: its vector is random, or with --item_attributes "
                "the sum of those of its attributes"
            )
        added = eligible.added(self._vectors.scale, self.ranks.device)
        items, scores = self._vectors.similar(item, added, eligible.k)
        return Lists(0, items.cpu().numpy(), scores.cpu().numpy())

    def _batches(self, histories: KnownHistories, keep_seen: bool) -> HistoryBatches:
        sizes = len(self.catalog.items), self.max_len, self.batch_size
        ranks = self.ranks.rank, self.ranks.world_size
        return HistoryBatches(histories, *sizes, keep_seen, *ranks)


def _alone(device: str | torch.device | None) -> Ranks:
    """This process as the only rank; TorchRec needs a process group."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        silence_libraries()
        backend = "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # Left to the interpreter's end, gloo's threads may abort the process.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if dist.get_world_size() > 1:
        raise UserError("Recommender.load works in one process: on several ranks use recommend.py")
    return Ranks(0, 1, 1, chosen)


def _moment(at: object) -> int | None:
    return None if at is None else known.moment(at, "at")


def _data_frame(table: pa.Table) -> Any:
    try:
        import pandas  # noqa: F401  optional: only these data frames need it
    except ImportError as error:
        raise UserError("a data frame needs pandas: pip install pandas") from error
    return table.to_pandas()
