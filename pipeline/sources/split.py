"""A split of the user's own: --split_path, by the names of files or by a column ``split``."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError, warn_once
from pipeline.formats.readers import ReadRatings
from pipeline.formats.source_file import SourceFile, is_zip, reading, unpacked_name
from pipeline.remote import RemotePath
from pipeline.sources.ratings_files import (
    find_ratings,
    format_of,
    inside,
    names_in,
    numbers_in_order,
)
from pipeline.stage import Stage
from pipeline.tables.names import NoRatings, Wanted
from pipeline.tables.where import Where

# Words in the names of files, or in the column split, that say which part ratings are of.
PART_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def find_split(
    path: Path | RemotePath, name: str, wanted: Wanted
) -> tuple["SplitRatings", SourceFile | None]:
    """The ratings of a split: of the files of each part, else of a column; and the titles' file."""
    with reading(path):
        path.stat()
    is_many = path.is_dir() or (path.is_file() and is_zip(path))
    names = names_in(path) if is_many else []
    parts, tell = _parts(names), warn_once()
    if parts["train"] and parts["test"]:
        files = {part: [inside(path, each) for each in found] for part, found in parts.items()}
        readers = [ReadRatings(*part, wanted=wanted, tell=tell) for part in files.values()]
        every = [each for part in files.values() for each in part]
        whole = ReadRatings(*every, wanted=wanted, tell=tell)
        titles = [each for each in names if unpacked_name(each).endswith(".item")]
        of_item = inside(path, titles[0]) if len(titles) == 1 else None
        return SplitRatings(readers, whole), of_item
    missing = _missing(parts)
    try:
        found, of_item = find_ratings(path, name)
    except UserError as error:
        if not is_many:
            raise
        raise UserError(f"--split_path {path}: {missing}") from error
    of_rows = [_of_rows(wanted, words, missing) for words in PART_WORDS.values()]
    readers = [ReadRatings(*found, wanted=each, tell=tell) for each in of_rows]
    return SplitRatings(readers, ReadRatings(*found, wanted=wanted, tell=tell)), of_item


def _parts(names: list[str]) -> dict[str, list[str]]:
    """The files of each part, by the words in their names, before those of their folders."""
    found: dict[str, list[str]] = {part: [] for part in PART_WORDS}
    for name in sorted(filter(format_of, names), key=numbers_in_order):
        of_each = [_parts_named(each) for each in reversed(name.lower().split("/"))]
        if len(of_each[0]) > 1:
            raise UserError(
                f"--split_path: the name of {name} has words of several parts "
                f"({', '.join(of_each[0])}): rename it, or move it elsewhere"
            )
        if part := next((parts[0] for parts in of_each if len(parts) == 1), ""):
            found[part].append(name)
    return found


def _parts_named(name: str) -> list[str]:
    words = set(re.split(r"[._-]+", name))
    return [part for part, known in PART_WORDS.items() if words & {*known}]


def _missing(parts: dict[str, list[str]]) -> str:
    """Which files of a split are missing, and what there may be in their place."""
    lacking = [part for part in ("train", "test") if not parts[part]]
    expected = " and ".join(
        f"a file of {part} ({' or '.join(PART_WORDS[part])} in its name)" for part in lacking
    )
    found = ", ".join(f"{files[0]} of {part}" for part, files in parts.items() if files)
    beside = f" beside {found}" if found else " in a folder or zip"
    return f"give {expected}{beside}, or a column split"


def _of_rows(wanted: Wanted, words: tuple[str, ...], missing: str) -> Wanted:
    """The rows of one part, by the words for it in the column split."""
    spelled = ", ".join(
        f"{form!r}" for word in words for form in (word, word.title(), word.upper())
    )
    chosen = f"split in ({spelled})"
    rows = Where(f"({wanted.rows.text}) and {chosen}" if wanted.rows else chosen)
    return replace(wanted, rows=rows, of_split=missing)


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
