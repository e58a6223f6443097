"""The ratings files of a path: a file, or what a folder or zip holds."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import UserError, warn
from pipeline.formats.source_file import SourceFile, is_zip, reading, unpacked_name, zip_members
from pipeline.remote import RemotePath
from pipeline.sources.config import MOVIELENS

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
_DEEPEST = 8  # folders in folders, also where a link leads back


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
        raise UserError(f"{path} is neither a file nor a folder: give one")
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
    names = names_in(path)
    wanted = (ratings_file, f"{name}.inter") if is_movielens else tuple(_TITLES_FILE)
    found = _least_deep(names, wanted if is_movielens else (*wanted, ".inter"))
    parts = _parts(names)
    if not found and parts and (not is_movielens or format_of(parts[0]) == "parquet"):
        return [inside(path, each) for each in sorted(parts, key=numbers_in_order)], None
    if not found and not is_movielens and len(names) == 1:
        found = names
    if len(found) != 1:
        raise UserError(f"{path}: {_not_one(found, names, wanted)}")
    folder, _, file = found[0].rpartition("/")
    titles = f"{folder}/{_titles_file(file)}".lstrip("/")
    return [inside(path, found[0])], inside(path, titles) if titles in names else None


def _least_deep(names: list[str], wanted: tuple[str, ...]) -> list[str]:
    """The wanted files in the fewest folders, ascending; a name that begins with "." is an end."""
    plain = {each: unpacked_name(each.rsplit("/", 1)[-1]) for each in names}
    ends = tuple(each for each in wanted if each.startswith("."))
    found = [each for each in names if plain[each] in wanted or plain[each].endswith(ends)]
    depth = min((each.count("/") for each in found), default=0)
    return sorted(each for each in found if each.count("/") == depth)


def _not_one(found: list[str], names: list[str], wanted: tuple[str, ...]) -> str:
    """What is wrong if several ratings files were found, or none, among these names."""
    if found:
        return f"several ratings files ({', '.join(found[:5])}) in it; give the file itself"
    shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    others = f" (there are {shown}; names of parts differ only in numbers)" * (len(names) > 1)
    return f"no ratings file in it; looked for {', '.join(wanted)}; give the file itself{others}"


def names_in(path: Path | RemotePath) -> list[str]:
    """Names of the files in a folder and its subfolders, or in a zip archive."""
    return _files_below(path) if path.is_dir() else zip_members(path)


def _parts(names: list[str]) -> list[str]:
    """The files of a data set in parts; none if it is not clear which files are its parts.

    Parquet describes itself. Files of other formats are parts of one if their names differ only in
    numbers and the values of Hive's folders (part-00000-3f2a.csv, country=de/part-0.csv).
    """
    by_format: dict[str, list[str]] = {}
    for name in names:
        if kind := format_of(name):
            by_format.setdefault(kind, []).append(name)
    if "parquet" in by_format:
        return by_format["parquet"]
    if len(by_format) != 1:
        return []
    (found,) = by_format.values()
    alike = {re.sub(_NUMBERS, "0", re.sub("=[^/]*/", "=/", name)) for name in found}
    return found if len(alike) == 1 else []


def format_of(name: str) -> str:
    """The format that a file's name tells, "" if none."""
    ending = unpacked_name(name.lower()).rpartition(".")[2]
    return next((kind for kind, endings in _PART_NAMES.items() if ending in endings), "")


def numbers_in_order(name: str) -> tuple[list[str | int], str]:
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


def inside(path: Path | RemotePath, name: str) -> SourceFile:
    """A file by its name in a folder or a zip archive, with the keys in its folders' names."""
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
