"""Speed and memory of the data pipeline: preparing 20 million ratings, and the training loader.

    python benchmarks/data.py                         both tables below, a few minutes
    python benchmarks/data.py --only loader           or --only preparation
    python benchmarks/data.py --ratings 1000000 --seconds 1
    python benchmarks/data.py --only preparation --ratings 200000000 --format parquet \\
        --memory_gb 4 --ways spilled duckdb

**Preparation** makes a file of ratings of ML-20M's shape with a fixed seed (138,493 users with at
least 20 ratings each, 26,744 items, sorted by user and item as GroupLens' file is) and keeps it for
the next run. New processes then prepare it, or group it by another package (grouping.py); wall
time, processor time and the kernel's peak memory include their imports.

**Loader** measures how fast one core cuts, masks and batches windows, without a model. The 20
million ratings are random, seeded and in memory; all histories have one length: every window is
full. Batches go through the same stages as in training, including the prefetching thread, in a
process bound to one core. Each row is the best of three periods. "sequences/CPU s" divides by
processor time instead of wall time; both agree on an idle core. "MiB" is the memory that the
process has gained since before its first batch.

Both results are added to ``--out``.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.grouping import WAYS
from benchmarks.machine import ROOT, commit, processor
from model.run.config_file import versions
from pipeline.batches.train_batch import PackedBatch
from pipeline.preparation.store import SequenceStore
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import TrainLoader

NUM_RATINGS, NUM_USERS, NUM_ITEMS, MIN_LENGTH = 20_000_000, 138_493, 26_744, 20
# Items per window, windows per batch, goal in sequences/s.
CASES = (
    (100, 256, 400_000),
    (200, 256, None),
    (16, 8, None),
    (16, 128, None),
    (16, 1024, 2_000_000),
    (16, 4096, None),
)
_CHUNK_USERS = 4096
_FIRST_TIME, _LAST_TIME = 789_652_009, 1_427_784_002
COLUMNS = ("userId", "movieId", "rating", "timestamp")
# Preparation ----------------------------------------------------------------------------------


def make_ratings(path: Path, num_ratings: int, shuffled: bool = False, seed: int = 0) -> None:
    """Write seeded ratings: log-normal history lengths, Zipf-like items, ML-20M's dates.

    The path ends in .csv or .parquet. Above ML-20M's number of ratings there are proportionally
    more users, and with ten times as many four times as many items. The order is GroupLens', by
    user and item, or if `shuffled` that of the random times, about as a log's.
    """
    generator = np.random.default_rng(seed)
    num_users = max(1, NUM_USERS * num_ratings // NUM_RATINGS)
    num_items = round(NUM_ITEMS * max(1.0, num_ratings / NUM_RATINGS) ** math.log10(4))
    spare = num_ratings - MIN_LENGTH * num_users
    share = generator.lognormal(0, 1.2, num_users)
    edges = np.round(np.cumsum(share) / share.sum() * spare).astype(np.int64)
    lengths = MIN_LENGTH + np.diff(edges, prepend=0)
    weights = np.arange(1, num_items + 1) ** -0.9
    popularity = np.cumsum(weights) / weights.sum()
    item_ids = np.sort(generator.choice(5 * num_items, num_items, replace=False)) + 1
    generator.shuffle(item_ids)
    whole = np.repeat(np.arange(num_users, dtype=np.int32), lengths) if shuffled else None
    if whole is not None:
        generator.shuffle(whole)
    rows = max(1, _CHUNK_USERS * num_ratings // num_users)
    with _writer(path) as write:
        for start in range(
            0, num_ratings if shuffled else num_users, rows if shuffled else _CHUNK_USERS
        ):
            if whole is not None:
                user = whole[start : start + rows].astype(np.int64)
            else:
                users = np.arange(start, min(start + _CHUNK_USERS, num_users))
                user = np.repeat(users, lengths[users])
            item = item_ids[np.searchsorted(popularity, generator.random(len(user)))]
            time = generator.integers(_FIRST_TIME, _LAST_TIME, len(user))
            if whole is None:
                item = item[np.lexsort((item, user))]
            else:
                time = (
                    _FIRST_TIME
                    + (start + np.arange(len(user))) * (_LAST_TIME - _FIRST_TIME) // num_ratings
                )
            rating = generator.integers(1, 11, len(user)) / 2
            write(dict(zip(COLUMNS, (user + 1, item, rating, time), strict=True)))


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[dict[str, np.ndarray]], None]]:
    """A function that writes columns to the end of a new CSV or Parquet file."""
    kinds = [pa.int64(), pa.int64(), pa.float64(), pa.int64()]
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    make = pq.ParquetWriter if path.suffix == ".parquet" else pacsv.CSVWriter
    with make(path, schema) as writer:
        yield lambda columns: writer.write_table(pa.table(columns, schema))


def ratings_file(folder: Path, num_ratings: int, kind: str, order: str) -> Path:
    """The generated file, made if it is not there; kind is csv or parquet, order user or time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ratings-{num_ratings}-by-{order}.{kind}"
    if not path.exists():
        part = folder / f".part.{kind}"
        make_ratings(part, num_ratings, shuffled=order == "time")
        part.rename(path)
    return path


def grouping(path: Path, way: str, memory_gb: float) -> dict[str, Any]:
    """Seconds, seconds of processor time, peak GiB and output of a new process that groups."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        script = ROOT / "benchmarks" / "grouping.py"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, script, way, path, folder, str(memory_gb)],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        return {"way": way, "failed": done.stderr.strip().splitlines()[-1]}
    text, _, measured = done.stdout.rpartition("measured")
    cpu, peak = measured.split()
    row = {"way": way, "seconds": seconds, "cpu_seconds": float(cpu), "peak_gib": int(peak) / 2**20}
    return row | {"kept": text.rstrip()}


def preparation(
    path: Path, num_ratings: int, ways: Sequence[str], memory_gb: float
) -> dict[str, Any]:
    """Measure each way, print its row; returns all."""
    megabytes = path.stat().st_size / 1e6
    print(f"{path.name}: {num_ratings:,} ratings, {megabytes:,.0f} MB; --memory_gb {memory_gb:g}")
    print("| way | s | CPU s | peak GiB |\n|---|---|---|---|")
    rows = []
    for way in ways:
        rows.append(row := grouping(path, way, memory_gb))
        if "failed" in row:
            cells = [row["failed"], "-", "-"]
        else:
            cells = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_gib']:.2f}"]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)
    kept = next((row["kept"] for row in rows if row.get("kept")), "")
    print(f"{kept}\n")
    of_all = {"file": path.name, "ratings": num_ratings, "megabytes": megabytes}
    return of_all | {"memory_gb": memory_gb, "rows": rows}


# Loader ---------------------------------------------------------------------------------------


def made_store(length: int, num_ratings: int) -> SequenceStore:
    """Users with ``length`` training items each and two held-out ones."""
    num_users = num_ratings // (length + 2)
    items = np.random.default_rng(0).integers(
        1, NUM_ITEMS + 1, num_users * (length + 2), dtype=np.int32
    )
    return SequenceStore.from_arrays(items, np.arange(num_users + 1) * (length + 2), NUM_ITEMS)


def loading(length: int, batch: int, num_ratings: int, seconds: float) -> dict[str, Any]:
    """Sequences/s, masked positions/s, sequences per second of processor time, and memory."""
    torch.set_num_threads(1)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # hides a notice
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    loader = TrainLoader(
        made_store(length, num_ratings),
        WindowConfig(max_len=length),
        MaskConfig(mask_prob=0.2, mask_last_share=0.05),
        LoaderConfig(train_batch_size=batch),
    )
    before = _resident()
    batches = chain.from_iterable(loader.epoch(epoch) for epoch in count())
    _stretch(batches, seconds / 10)
    sequences, positions, of_cpu = max(_stretch(batches, seconds / 3) for _ in range(3))
    return {
        "length": length,
        "batch": batch,
        "sequences_per_second": sequences,
        "masked_per_second": positions,
        "sequences_per_cpu_second": of_cpu,
        "held_mib": (_resident() - before) / 2**20,
    }


def _stretch(batches: Iterator[PackedBatch], seconds: float) -> tuple[float, ...]:
    sequences = positions = 0
    start = now = time.perf_counter()
    cpu_start = time.process_time()
    while now - start < seconds:
        batch = next(batches).unpack()
        sequences += batch.num_windows
        positions += len(batch.masked)
        now = time.perf_counter()
    passed, used = now - start, time.process_time() - cpu_start
    return sequences / passed, positions / passed, sequences / used


def _resident() -> int:
    """Resident bytes of this process; 0 on systems without /proc."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _loading_lines(num_ratings: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure each row of the loader's table in a new process and print it."""
    print("| length | batch | sequences/s | of goal | masked positions/s | sequences/CPU s | MiB |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for length, batch, goal in CASES:
        with context.Pool(1) as pool:
            row = pool.apply(loading, (length, batch, num_ratings, seconds))
        speed = row["sequences_per_second"]
        cells = [length, batch, f"{speed:,.0f}", f"{speed / goal:.2f}" if goal else "-"]
        cells += [f"{row['masked_per_second']:,.0f}", f"{row['sequences_per_cpu_second']:,.0f}"]
        print("|", *(f"{cell} |" for cell in [*cells, f"{row['held_mib']:.0f}"]), flush=True)
        yield row


def main() -> None:
    """Measure both, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("preparation", "loader"))
    parser.add_argument("--ratings", type=int, default=NUM_RATINGS)
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv")
    parser.add_argument("--order", choices=("user", "time"), default="user")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--memory_gb", type=float, default=1.0, help="of spilled, and of DuckDB")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured per loader row")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bert4rec-benchmark",
        help="folder of the generated ratings file",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    facts = {"hardware": processor(), "versions": versions(), "commit": commit()}
    print(f"{facts['hardware']}; commit {facts['commit']}; {facts['versions']}\n")
    if options.only != "loader":
        path = ratings_file(options.folder, options.ratings, options.format, options.order)
        prepared = preparation(path, options.ratings, options.ways, options.memory_gb)
        found.setdefault("preparation", {})[path.name] = facts | prepared
    if options.only != "preparation":
        found["loader"] = facts | {"rows": list(_loading_lines(options.ratings, options.seconds))}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
