"""The data sets by name, and the files or generators of their ratings.

    --dataset_name synthetic                               generated, best possible metrics known
    --dataset_name random --random_size 8000000            uniform, for measuring speed
    --dataset_name ml-1m                                   downloaded from GroupLens once
    --dataset_name ml-1m --dataset_path ~/data             ~/data/ml-1m.zip, or ~/data/ml-1m/, or
                                                           ~/data/ratings.dat
    --dataset_path clicks.csv --columns "who,what,,when"   any ratings file (layout.py)

`resolve(DataConfig(dataset_name="ml-1m")).ratings` streams tables of ratings.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.formats.readers import ReadRatings
from pipeline.formats.source_file import SourceFile
from pipeline.sources.config import DataConfig, expanded_place
from pipeline.sources.download import download
from pipeline.sources.random_ratings import RandomRatings
from pipeline.sources.ratings_files import find_ratings
from pipeline.sources.split import find_split
from pipeline.sources.synthetic import SyntheticRatings
from pipeline.stage import Stage
from pipeline.tables.names import Wanted
from pipeline.tables.where import Where

_READING = 4  # raised when the same file gives other ratings, so that no store of before is reused


@dataclass(frozen=True)
class DataSource:
    """The ratings of a data set, and the folder of the store that is prepared from them."""

    ratings: Stage[pa.Table]
    titles: SourceFile | None
    fingerprint: dict[str, Any]  # all that the store depends on, as JSON values
    store_path: Path


def resolve(config: DataConfig) -> DataSource:
    """Find the data set's ratings; download them if need be."""
    flags: dict[str, Any] = {
        flag: getattr(config, flag) for flag in ("min_rating", "min_item_count", "min_user_count")
    }
    titles = None
    if config.generated == "random":
        flags |= {key: value for key, value in vars(config).items() if key.startswith("random_")}
        flags["data_seed"] = config.data_seed
        if config.random_skew:  # stores of earlier versions have the most frequent items first
            flags["random_ids"] = "scattered"
        origin: Any = "random"
        ratings: Stage[pa.Table] = RandomRatings(
            config.random_user_count,
            config.random_item_count,
            config.random_size,
            skew=config.random_skew,
            rating=config.min_rating or 0.0,  # so that none is dropped
            seed=config.data_seed,
        )
    elif config.generated == "synthetic":
        origin = ["synthetic ring", vars(config.synthetic())]
        ratings = SyntheticRatings(config.synthetic())
    else:
        flag = "split_path" if config.split_path else "dataset_path"
        path = expanded_place(flag, config.ratings_path)
        if not config.ratings_path:
            path = download(config.dataset_name, config.cache_folder)
        if config.split_path:
            ratings, titles = find_split(path, config.dataset_name, wanted(config))
            files = ratings.whole.files
        else:
            files, titles = find_ratings(path, config.dataset_name)
            ratings = ReadRatings(*files, wanted=wanted(config))
        titles = items_file(config) or titles
        origin = [file.stamp() for file in (*files, titles) if file]
        read = ("columns", "separator", "where", "duplicates", "file_order")
        flags |= {flag: getattr(config, flag) for flag in read} | {"reading": _READING}
    if config.split_by != "leave_one_out":  # stores of earlier versions have no such key
        flags["split"] = [config.split_by, config.split_time, config.split_until]
    fingerprint = json.loads(json.dumps({"source": origin, "flags": flags}))
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    store_path = config.cache_folder / "stores" / f"{config.name}-{digest}"
    return DataSource(ratings, titles, fingerprint, store_path)


def items_file(config: DataConfig) -> SourceFile | None:
    """The table of --items_path; None without the flag."""
    if not config.items_path:
        return None
    return SourceFile(expanded_place("items_path", config.items_path))


def wanted(config: DataConfig) -> Wanted:
    """What the flags tell the readers."""
    rows = Where(config.where) if config.where else None
    return Wanted(config.columns, config.separator, rows, config.min_rating is not None)
