"""Time and memory of preparing 20 million ratings in ML-20M's shape.

    python benchmarks/prepare.py                       # makes the file, prepares it, prints figures
    python benchmarks/prepare.py --ratings 1000000     # a smaller one

The file is made with a fixed seed (138,493 users with at least 20 ratings each, 26,744 items, CSV
with a header, sorted by user and item as GroupLens' is) and kept for the next run. Preparation is
measured in a process of its own: wall time and peak memory are its whole, imports included.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

NUM_USERS, NUM_ITEMS, MIN_LENGTH = 138_493, 26_744, 20
_CHUNK_USERS = 4096
_PREPARE = """
import resource, sys
from pipeline.datasets import DataConfig
from pipeline.preparation import describe, prepare
print(describe(prepare(DataConfig(dataset_path=sys.argv[1], cache_dir=sys.argv[2]))))
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def make_ratings(path: Path, num_ratings: int, seed: int = 0) -> None:
    """Write a seeded ratings.csv: log-normal history lengths, Zipf-like items, ML-20M's times."""
    generator = np.random.default_rng(seed)
    num_users = max(1, NUM_USERS * num_ratings // 20_000_000)
    spare = num_ratings - MIN_LENGTH * num_users
    share = generator.lognormal(0, 1.2, num_users)
    edges = np.round(np.cumsum(share) / share.sum() * spare).astype(np.int64)
    lengths = MIN_LENGTH + np.diff(edges, prepend=0)
    weights = np.arange(1, NUM_ITEMS + 1) ** -0.9
    popularity = np.cumsum(weights) / weights.sum()
    item_ids = np.sort(generator.choice(131_262, NUM_ITEMS, replace=False)) + 1
    generator.shuffle(item_ids)
    options = pacsv.WriteOptions(include_header=False)
    with path.open("wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for start in range(0, num_users, _CHUNK_USERS):
            users = np.arange(start, min(start + _CHUNK_USERS, num_users))
            user = np.repeat(users, lengths[users])
            item = item_ids[np.searchsorted(popularity, generator.random(len(user)))]
            order = np.lexsort((item, user))
            table = {
                "user": user + 1,
                "item": item[order],
                "rating": generator.integers(1, 11, len(user)) / 2,
                "time": generator.integers(789_652_009, 1_427_784_002, len(user)),
            }
            pacsv.write_csv(pa.table(table), file, options)


def measure(path: Path) -> tuple[float, float, str]:
    """(seconds, peak GiB, what `describe` says) of preparing the file in a fresh process."""
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _PREPARE, str(path), cache],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
    text, _, peak = done.stdout.rpartition("peak_kib")
    return seconds, int(peak) / 2**20, text.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", type=int, default=20_000_000, help="ratings in the file")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bert4rec-benchmark",
        help="where the file is made and kept",
    )
    parser.add_argument("--delete", action="store_true", help="delete the folder afterwards")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"ratings-{args.ratings}.csv"
    if not path.exists():
        make_ratings(path.with_suffix(".part"), args.ratings)
        path.with_suffix(".part").rename(path)
    seconds, peak, text = measure(path)
    print(text)
    print(
        f"{path.stat().st_size / 1e6:,.0f} MB prepared in {seconds:.1f} s "
        f"({args.ratings / seconds / 1e6:.2f} M ratings/s), peak memory {peak:.2f} GiB, "
        f"{os.cpu_count()} cores"
    )
    if args.delete:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
