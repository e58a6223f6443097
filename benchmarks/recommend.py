"""How fast a model recommends: users per second, from histories in memory to a Parquet file.

    python benchmarks/recommend.py ml-20m --share 0.02        on CPU, 2 % of the users
    python benchmarks/recommend.py million video-games        on a GPU
    torchrun --nproc_per_node 2 benchmarks/recommend.py million
    python benchmarks/recommend.py million --profile          where the time goes

A random model of 2 layers and random histories of half to one and a half times the row's length;
seen items are dropped. The lists of 32 users are compared with a sort of all scores in float64.
Beside the file, on one rank: the seconds of ``recommended``, which returns the rows as a table, as
RecTools' ``recommend`` does. Where RecTools can be imported: the users per second of its BERT4Rec
of the same sizes, after one training step. Seconds of the cores (``cpu_seconds``) can be compared
even if other processes used the machine. The results go to results/recommend-<device>.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit, processor
from benchmarks.sampling import Place, Sampled, kernels
from model.distributed import Ranks, from_first_rank, start
from model.ending import exit_rank
from model.run.build import build_model
from model.run.config_file import versions
from model.run.execution import plan_execution
from model.serving.answer import write_all
from model.serving.config import Choice
from model.serving.recommender import Recommender
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from pipeline.files import write_json
from pipeline.jagged import splits
from pipeline.preparation.catalog import Catalog
from pipeline.serving.histories import KnownHistories

LAYERS, HEADS, COMPARED = 2, 4, 32
IN_MEMORY = 4_000_000  # most rows of a table
STAGES: dict[Place, str] = {
    ("serving/batches.py", "_batch"): "thread: batches",
    ("pipeline/stage.py", "__next__"): "wait for a batch",
    ("evaluation/users.py", "encode"): "launch encoder",
    ("serving/vectors.py", "_best"): "launch scores and top-k",
    ("serving/vectors.py", "checked"): "wait for the device",
    ("serving/vectors.py", "_on_host"): "launch copies",
    ("serving/rows.py", "table"): "thread: rows",
    ("serving/output.py", "sink"): "thread: Parquet",
    ("serving/output.py", "write"): "wait for the threads",
    ("serving/output.py", "row_writer"): "wait for the threads",
    ("pipeline/files.py", "whole_file"): "fsync of the file",
}


@dataclass(frozen=True)
class Row:
    """Sizes of a catalog, its users and a model."""

    users: int
    items: int
    length: int
    width: int
    k: int


ROWS = {
    "million": Row(1_000_000, 1_000_000, 50, 128, 100),
    "video-games": Row(30_000, 23_000, 100, 256, 20),
    "ml-20m": Row(138_000, 27_000, 200, 256, 20),
}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that the work takes, and seconds of all of this process's threads on their cores."""
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def speeds(users: int, seconds: float, cpu_seconds: float) -> dict[str, float]:
    """Of a number of users."""
    rates = {"users_per_second": users / seconds, "users_per_cpu_second": users / cpu_seconds}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, **rates}


def random_histories(row: Row, users: int) -> KnownHistories:
    """Histories of uniformly drawn items, of ``row.length`` on average."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(row.length // 2, row.length + row.length // 2 + 1, size=users)
    items = draws.integers(1, row.items + 1, size=lengths.sum(), dtype=np.int32)
    return KnownHistories(pa.array(np.arange(users)), items, splits(lengths))


def random_recommender(row: Row, ranks: Ranks, batch_size: int | None) -> Recommender:
    """A model with initial weights; original ids are whole numbers."""
    sizes = f"--emb_dim={row.width}", f"--nhead={HEADS}", f"--num_layers={LAYERS}"
    config: RunConfig = FlagParser("", RunConfig).parse([f"--max_len={row.length}", *sizes])
    model = build_model(config, row.items, ranks, plan_execution(config, row.items, ranks))
    ids = pa.array(np.arange(row.items)).cast(pa.string())
    counts = np.ones(row.items, np.int64)
    no_titles = pa.repeat("", row.items)
    catalog = Catalog(ids, no_titles, counts, ids[:1], pa.int64(), pa.int64())
    return Recommender(model, catalog, row.length, ranks, batch_size)


def measure(
    name: str,
    share: float,
    ranks: Ranks,
    folder: Path,
    batch_size: int | None,
    profiled: bool = False,
) -> dict[str, Any]:
    """Recommend to a share of a row's users; the users per second and the seconds for all."""
    row = ROWS[name]
    users = max(1, int(share * row.users))
    recommender = random_recommender(row, ranks, batch_size)
    histories = random_histories(row, users)
    eligible = recommender.eligible(Choice(k=row.k), None, ())
    warm = 4 * recommender.batch_size * ranks.world_size
    some = histories.only(np.arange(min(users, warm)))
    write_all(recommender, some, eligible, folder / "warm.parquet")
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    output = folder / "recs.parquet"
    seconds, cpu_seconds = timed(lambda: write_all(recommender, histories, eligible, output))
    found: dict[str, Any] = {"row": name, **vars(row), "measured_users": users}
    found |= {"ranks": ranks.world_size, "threads": torch.get_num_threads()}
    found["batch_size"] = recommender.batch_size
    found |= speeds(users, seconds, cpu_seconds) | {"seconds_for_all": row.users * seconds / users}
    if ranks.device.type == "cuda":
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    if profiled:
        with Sampled(STAGES) as sampled:
            write_all(recommender, histories, eligible, output)
        found["profile"] = {"seconds_of_stages": sampled.seconds}
        if ranks.device.type == "cuda":
            work = partial(write_all, recommender, some, eligible, folder / "warm.parquet")
            found["profile"] |= {f"kernels, {len(some):,} users": kernels(work)}
    if ranks.world_size == 1:
        if row.k * users <= IN_MEMORY:
            call = partial(recommender.recommended, histories, row.k)
            found["table_seconds"] = min(timed(call)[0] for _ in range(3))
        found["same_as_sorted"] = same_as_sorted(recommender, histories, row.k, output)
    return found


def same_as_sorted(
    recommender: Recommender, histories: KnownHistories, k: int, output: Path
) -> float:
    """Share of places of the first users' lists that equal those of all scores, sorted."""
    some = histories.only(np.arange(min(COMPARED, len(histories))))
    vectors = torch.from_numpy(recommender.user_vectors(some)).double()
    scores = vectors @ torch.from_numpy(recommender.item_vectors()).double().T
    for user in range(len(some)):
        scores[user, some.items[some.offsets[user] : some.offsets[user + 1]] - 1] = -torch.inf
    expected = scores.topk(k).indices.numpy().ravel()
    written = pq.ParquetFile(output).read_row_group(0, ["item"])["item"].to_numpy()
    return float((written[: len(expected)] == expected).mean())


def of_rectools(name: str, share: float) -> dict[str, Any]:
    """RecTools' users per second on the same sizes, after one training step.

    Raises:
        ImportError: RecTools, pandas or pytorch-lightning is missing.
    """
    import pandas
    from pytorch_lightning import Trainer
    from rectools.dataset import Dataset
    from rectools.models.nn.transformers.bert4rec import BERT4RecModel

    row = ROWS[name]
    users = max(1, int(share * row.users))
    histories = random_histories(row, users)
    lengths = np.diff(histories.offsets)
    # One more user, not recommended to, who has rated every item: else the model lacks some.
    user = np.concatenate([np.repeat(np.arange(users), lengths), np.full(row.items, users)])
    item = np.concatenate([histories.items, np.arange(1, row.items + 1)])
    frame = pandas.DataFrame({"user_id": user, "item_id": item, "weight": 1.0})
    frame["datetime"] = pandas.to_datetime(np.arange(len(frame)), unit="s")
    dataset = Dataset.construct(frame)
    sizes = {"n_factors": row.width, "n_blocks": LAYERS, "n_heads": HEADS}
    model = BERT4RecModel(session_max_len=row.length, **sizes)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    model._trainer = Trainer(max_steps=1, enable_checkpointing=False, **quiet)
    model.fit(dataset)
    taken = timed(lambda: model.recommend(np.arange(users), dataset, k=row.k, filter_viewed=True))
    return speeds(users, *taken)


def main() -> None:
    """Measure, print on rank 0, keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--share", type=float, default=1.0, help="of the users")
    parser.add_argument("--batch_size", type=int, help="users per batch and rank")
    parser.add_argument("--rectools_share", type=float, help="of the users (default: --share)")
    parser.add_argument("--skip_rectools", action="store_true")
    parser.add_argument("--profile", action="store_true", help="run again, and say what takes time")
    parser.add_argument("--folder", type=Path, help="of the written rows (default: temporary)")
    parser.add_argument("--out", type=Path, help="results (default: results/recommend-*.json)")
    flags = parser.parse_args()
    ranks = start()
    made = from_first_rank(ranks, lambda: tempfile.mkdtemp(prefix="recs-", dir=flags.folder))
    out = flags.out or ROOT / "benchmarks" / "results" / f"recommend-{ranks.device.type}.json"
    kept = json.loads(out.read_text()) if out.exists() else []
    try:
        for name in flags.rows:
            found = measure(name, flags.share, ranks, Path(made), flags.batch_size, flags.profile)
            if ranks.is_first and not flags.skip_rectools:
                try:
                    found["rectools"] = of_rectools(name, flags.rectools_share or flags.share)
                except ImportError as error:
                    found["rectools"] = f"not measured: {error}"
            found |= {"processor": processor(), "commit": commit(), "versions": versions()}
            ranks.say(json.dumps(found, indent=2))
            same = {"row": name, "ranks": ranks.world_size}
            kept = [each for each in kept if not same.items() <= each.items()] + [found]
            if ranks.is_first:
                write_json(out, kept)
    finally:
        if ranks.is_first:
            shutil.rmtree(made)
    exit_rank()


if __name__ == "__main__":
    main()
