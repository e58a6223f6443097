"""One process that groups ratings by user, in time order, in one of several ways; for data.py.

    python benchmarks/grouping.py spilled ratings.parquet folder 4

``memory``, ``spilled``   preparation with all ratings in memory, or with --memory_gb
``polars``, ``duckdb``    a Parquet file with the lists of items and times of each user, made by
                          these packages (`pip install polars duckdb`); they number, filter and
                          check nothing. DuckDB may take the memory; polars has no bound for it.
"""

import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WAYS = ("memory", "spilled", "polars", "duckdb")


def main(way: str, path: str, folder: str, memory_gb: float) -> None:
    """Group, then print the seconds of processor time and the kernel's peak of resident KiB."""
    if way in ("memory", "spilled"):
        _prepare(path, folder, 1e6 if way == "memory" else memory_gb)
    elif way == "polars":
        _by_polars(path, folder)
    else:
        _by_duckdb(path, folder, memory_gb)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("measured", used.ru_utime + used.ru_stime, used.ru_maxrss)


def _prepare(path: str, folder: str, memory_gb: float) -> None:
    from pipeline.preparation.prepare import describe, prepare
    from pipeline.sources.config import DataConfig

    config = DataConfig(dataset_path=path, cache_dir=folder, memory_gb=memory_gb)
    print(describe(prepare(config)))


def _by_polars(path: str, folder: str) -> None:
    import polars

    scan = polars.scan_parquet if path.endswith(".parquet") else polars.scan_csv
    rows = scan(path).sort("timestamp", maintain_order=True)
    lists = rows.group_by("userId").agg("movieId", "timestamp")
    lists.sink_parquet(f"{folder}/sequences.parquet")


def _by_duckdb(path: str, folder: str, memory_gb: float) -> None:
    import duckdb

    config: dict[str, Any] = {"memory_limit": f"{memory_gb}GiB", "temp_directory": folder}
    lists = (
        "SELECT userId, list(movieId ORDER BY timestamp) AS movieId, "
        f"list(timestamp ORDER BY timestamp) AS timestamp FROM '{path}' GROUP BY userId"
    )
    duckdb.connect(config=config).execute(f"COPY ({lists}) TO '{folder}/sequences.parquet'")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
