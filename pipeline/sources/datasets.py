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
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError, warn
from pipeline.remote import RemotePath
from pipeline.sources.config import MOVIELENS, DataConfig, expanded_place
from pipeline.sources.download import download
from pipeline.sources.readers import ReadRatings
from pipeline.sources.source_file import (
    SourceFile,
    is_zip,
    reading,
    unpacked_name,
    zip_members,
)
from pipeline.sources.synthetic import SyntheticRatings
from pipeline.stage import Stage
from pipeline.tables.names import NoRatings, Wanted
from pipeline.tables.where import Where

_RATINGS_FILE = {"ml-100k": "u.data", "ml-1m": "ratings.dat"}  # the others: ratings.csv
# GroupLens' ratings files, and the titles beside them.
_TITLES_FILE = {"ratings.csv": "movies.csv", "ratings.dat": "movies.dat", "u.data": "u.item"}
_PART_NAMES = {
    "parquet": ("parquet", "pq"),
    "orc": ("orc",),
    "arrow": ("arrow", "feather", "ipc", "arrows"),
    "json": ("json", "jsonl", "ndjson", "jl"),
} | {ending: (ending,) for ending in ("csv", "tsv", "inter", "dat", "data", "txt")}
_NUMBERS = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+|[0-9]+"  # Spark's part-00000-UUID-c000.csv
# Words in the names of files, or in the column split, that say which part ratings are of.
PART_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_DEEPEST = 8  # folders in folders, also where a link leads back
_RANDOM_CHUNK = 1 << 19
_READING = 3  # raised when the same file gives other ratings, so that no store of before is reused


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
    if config.dataset_name == "random":
        flags |= {key: value for key, value in vars(config).items() if key.startswith("random_")}
        flags["data_seed"] = config.data_seed
        origin: Any = "random"
        ratings: Stage[pa.Table] = RandomRatings(
            config.random_user_count,
            config.random_item_count,
            config.random_size,
            skew=config.random_skew,
            rating=config.min_rating or 0.0,  # so that none is dropped
            seed=config.data_seed,
        )
    elif config.dataset_name == "synthetic" and not config.ratings_path:
        origin = ["synthetic ring", vars(config.synthetic())]
        ratings = SyntheticRatings(config.synthetic())
    else:
        flag = "split_path" if config.split_path else "dataset_path"
        path = expanded_place(flag, config.ratings_path)
        if not config.ratings_path:
            path = download(config.dataset_name, config.cache_folder)
        parts, titles = find_parts(path) if config.split_path else ({}, None)
        files = [file for part in parts.values() for file in part]
        if not files:
            files, titles = find_ratings(path, config.dataset_name)
        if config.items_path:
            titles = SourceFile(expanded_place("items_path", config.items_path))
        origin = [file.stamp() for file in (*files, titles) if file]
        read = ("columns", "separator", "where", "duplicates", "file_order")
        flags |= {flag: getattr(config, flag) for flag in read} | {"reading": _READING}
        ratings = ReadRatings(*files, wanted=wanted(config))
        if config.split_path:
            ratings = SplitRatings(_readers(parts, files, config), ratings)
    if config.split_by != "leave_one_out":  # stores of earlier versions have no such key
        flags["split"] = [config.split_by, config.split_time, config.split_until]
    fingerprint = json.loads(json.dumps({"source": origin, "flags": flags}))
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    store_path = config.cache_folder / "stores" / f"{config.name}-{digest}"
    return DataSource(ratings, titles, fingerprint, store_path)


def wanted(config: DataConfig) -> Wanted:
    """What the flags tell the readers."""
    rows = Where(config.where) if config.where else None
    return Wanted(config.columns, config.separator, rows, config.min_rating is not None)


def find_ratings(path: Path | RemotePath, name: str) -> tuple[list[SourceFile], SourceFile | None]:
    """The ratings files and the titles file of a data set.

    The path is a ratings file; a zip or folder that holds one (GroupLens' layout, one ``.inter``,
    or one file only); a folder of parts: Parquet files, or files of one other format whose names
    differ only in numbers; or, for a MovieLens data set, a folder that holds NAME/ or NAME.zip.
    In a MovieLens data set only its own ratings file is accepted, so that the folder of another one
    is an error.
    """
    with reading(path):
        path.stat()
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder; see --dataset_path")
    if path.is_file() and not is_zip(path):
        beside = path.with_name(_titles_file(path.name))
        return [SourceFile(path)], SourceFile(beside) if beside.is_file() else None
    if (path / "_delta_log").is_dir():
        warn(
            f"{path} is a Delta table: rows that it has deleted are read, too; export it as Parquet"
        )
    is_movielens, ratings_file = name in MOVIELENS, _RATINGS_FILE.get(name, "ratings.csv")
    if path.is_dir() and is_movielens:
        inner, archive = path / name, path / f"{name}.zip"
        if inner.is_dir():
            return find_ratings(inner, name)
        if archive.is_file() and not (path / ratings_file).is_file():
            return find_ratings(archive, name)
    names = _files_below(path) if path.is_dir() else zip_members(path)
    wanted = (ratings_file, f"{name}.inter") if is_movielens else tuple(_TITLES_FILE)
    found = []
    for each in names:
        plain = unpacked_name(each.rsplit("/", 1)[-1])
        if plain in wanted or (plain.endswith(".inter") and not is_movielens):
            found.append(each)
    depth = min((each.count("/") for each in found), default=0)
    found = sorted(each for each in found if each.count("/") == depth)
    parts = _parts(names)
    if not found and parts and (not is_movielens or _format(parts[0]) == "parquet"):
        return [_inside(path, each) for each in sorted(parts, key=_numbers_in_order)], None
    if not found and not is_movielens and len(names) == 1:
        found = names
    if len(found) != 1:
        what = f"several ratings files ({', '.join(found[:5])})" if found else "no ratings file"
        expected = "" if found else f"; looked for {', '.join(wanted)}"
        raise UserError(f"{path}: {what} in it{expected}; give the file with --dataset_path")
    folder, _, file = found[0].rpartition("/")
    titles = f"{folder}/{_titles_file(file)}".lstrip("/")
    return [_inside(path, found[0])], _inside(path, titles) if titles in names else None


def find_parts(
    path: Path | RemotePath,
) -> tuple[dict[str, list[SourceFile]], SourceFile | None]:
    """The files of each part by the words in their names, and the titles beside RecBole's.

    No files: the path is one file, or no names tell a training and a test part.
    """
    with reading(path):
        path.stat()
    if not path.is_dir() and not is_zip(path):
        return {}, None
    names = _files_below(path) if path.is_dir() else zip_members(path)
    found: dict[str, list[SourceFile]] = {part: [] for part in PART_WORDS}
    for name in sorted(filter(_format, names), key=_numbers_in_order):
        words = set(re.split(r"[/._-]+", name.lower()))
        parts = [part for part, known in PART_WORDS.items() if words & {*known}]
        if len(parts) == 1:
            found[parts[0]].append(_inside(path, name))
    if not found["train"] or not found["test"]:
        return {}, None
    titles = [name for name in names if unpacked_name(name).endswith(".item")]
    return found, _inside(path, titles[0]) if len(titles) == 1 else None


def _readers(
    parts: dict[str, list[SourceFile]], files: list[SourceFile], config: DataConfig
) -> list[ReadRatings]:
    """Readers of the training, validation and test part: of its files, or of its rows."""
    if parts:
        return [ReadRatings(*part, wanted=wanted(config)) for part in parts.values()]
    readers = []
    for words in PART_WORDS.values():
        spelled = ", ".join(
            f"{form!r}" for word in words for form in (word, word.title(), word.upper())
        )
        chosen = f"split in ({spelled})"
        rows = Where(f"({config.where}) and {chosen}" if config.where else chosen)
        of_part = replace(wanted(config), rows=rows, of_split=True)
        readers.append(ReadRatings(*files, wanted=of_part))
    return readers


class SplitRatings(Stage[pa.Table]):
    """Source stage: the ratings of a split of the user's own, with a column ``part``.

    It is int8: 0 for training, 1 for validation, 2 for test. Other attributes are as those of
    :class:`ReadRatings`.

    Args:
        readers: of the three parts; that of validation may be without files or ratings.
        whole: of all ratings, to find those that no part has.
    """

    def __init__(self, readers: list[ReadRatings], whole: ReadRatings) -> None:
        super().__init__()
        self.readers, self.whole = readers, whole
        self.dates = False
        self.recognised: list[str] = []
        self.trimmed: Counter[str] = Counter()

    def stream(self) -> Iterator[pa.Table]:
        count, columns = 0, None
        self.recognised, self.trimmed = [], Counter()
        for part, reader in enumerate(self.readers):
            if not reader.files:
                continue
            try:
                for table in reader:
                    count += len(table)
                    found = [name for name in table.column_names if name != "fraction"]
                    columns = columns or (found, reader.dates)
                    if columns != (found, reader.dates):
                        raise UserError(
                            f"{reader.files[0]} has not the columns of {self.readers[0].files[0]}, "
                            "or times written in another way: choose with --columns"
                        )
                    yield table.append_column("part", pa.array(np.full(len(table), part, np.int8)))
            except NoRatings as error:
                names = list(PART_WORDS)
                if names[part] != "validation":
                    file = reader.files[0].path
                    raise UserError(f"--split_path {file}: no ratings for {names[part]}") from error
            self.recognised += reader.recognised
            self.trimmed += reader.trimmed
            self.dates |= reader.dates
        if self.readers[0].wanted.of_split:
            others = sum(map(len, self.whole)) - count
            if others:
                raise UserError(
                    f"--split_path {self.whole.files[0]}: {others:,} ratings have a split that is "
                    f"none of {', '.join(word for words in PART_WORDS.values() for word in words)}"
                )


class RandomRatings(Stage[pa.Table]):
    """Source stage: uniformly drawn users and items, in time order.

    Like the random data of TorchRec's examples/bert4rec, but seeded and drawn in chunks. With a
    ``skew`` s > 0, item k of 1 ... V has the share of the integral of x ** -s from k to k + 1.
    """

    def __init__(
        self, users: int, items: int, size: int, *, rating: float, seed: int, skew: float = 0.0
    ) -> None:
        super().__init__()
        self.users, self.items, self.size = users, items, size
        self.rating, self.seed, self.skew = rating, seed, skew

    def stream(self) -> Iterator[pa.Table]:
        for start in range(0, self.size, _RANDOM_CHUNK):
            generator = np.random.default_rng((self.seed, start))
            size = min(_RANDOM_CHUNK, self.size - start)
            users = generator.integers(self.users, size=size)
            items = self._items(generator, size)
            rating = np.full(size, self.rating)
            yield pa.table({"user": users, "item": items, "rating": rating})

    def _items(self, generator: np.random.Generator, size: int) -> np.ndarray:
        if not self.skew:
            return generator.integers(self.items, size=size)
        # Where the integral from 1 is a uniform share of the integral to V + 1.
        drawn, power = generator.random(size), 1 - self.skew
        if abs(power) < 1e-9:
            found = (self.items + 1.0) ** drawn
        else:
            found = (1 + drawn * ((self.items + 1.0) ** power - 1)) ** (1 / power)
        return np.minimum(found.astype(np.int64), self.items) - 1


def _parts(names: list[str]) -> list[str]:
    """The files of a data set in parts; none if it is not clear which files are its parts.

    Parquet describes itself. Files of other formats are parts of one if their names differ only in
    numbers and the values of Hive's folders (part-00000-3f2a.csv, country=de/part-0.csv).
    """
    by_format: dict[str, list[str]] = {}
    for name in names:
        if kind := _format(name):
            by_format.setdefault(kind, []).append(name)
    if "parquet" in by_format:
        return by_format["parquet"]
    if len(by_format) != 1:
        return []
    (found,) = by_format.values()
    alike = {re.sub(_NUMBERS, "0", re.sub("=[^/]*/", "=/", name)) for name in found}
    return found if len(alike) == 1 else []


def _format(name: str) -> str:
    """The format that a file's name tells, "" if none."""
    ending = unpacked_name(name.lower()).rpartition(".")[2]
    return next((kind for kind, endings in _PART_NAMES.items() if ending in endings), "")


def _numbers_in_order(name: str) -> tuple[list[str | int], str]:
    """A key by which part.2 is before part.10."""
    parts: list[str | int] = re.split(r"([0-9]+)", name)
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, name


def _titles_file(ratings_file: str) -> str:
    """Name of the file with the titles ("-" if the format has none)."""
    name = unpacked_name(ratings_file)
    if name.endswith(".inter"):
        return name.removesuffix(".inter") + ".item"
    return _TITLES_FILE.get(name, "-")


def _inside(path: Path | RemotePath, name: str) -> SourceFile:
    folders = [each.partition("=") for each in name.split("/")[:-1]]
    keys = tuple((key, unquote(value)) for key, equals, value in folders if key and equals)
    return SourceFile(path / name, keys=keys) if path.is_dir() else SourceFile(path, name, keys)


def _files_below(folder: Path | RemotePath) -> list[str]:
    """Names of the files in a folder and its subfolders, except hidden ones (.x, _SUCCESS)."""
    if isinstance(folder, RemotePath):
        with reading(folder):
            found = folder.files_below()
        return sorted(name for name in found if all(map(_is_shown, name.split("/"))))
    found = []
    with reading(folder):
        for below, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            inner = Path(below).relative_to(folder)
            folders[:] = [] if len(inner.parts) > _DEEPEST else filter(_is_shown, folders)
            paths = (Path(below, name) for name in files if _is_shown(name))
            found += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "_"))


def _raise(error: OSError) -> None:
    raise error
