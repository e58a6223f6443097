"""The layout of a ratings file: its separator and the places of user, item, rating and time.

    ratings.csv   userId,movieId,rating,timestamp     header, ","     (GroupLens, TSV with tabs)
    ml.inter      user_id:token  item_id:token  ...   header, tab     (RecBole)
    ratings.dat   1::1193::5::978300760               no header, "::" (GroupLens)
    u.data        196  242  3  881250949              no header, tab  (MovieLens 100K)
    beauty.txt    1 17                                no header, one space; time order

`--columns` names user, item[, rating[, timestamp]] in this order, e.g. "customer,asin,stars,date".
An empty name skips a column ("user,item,,time"); numbers are places, from 1, in a file without a
header ("1,2,4,3"). Without the flag, columns are found by the well-known names below.
"""

import csv
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.errors import UserError

ROLES = ("user", "item", "rating", "timestamp")
_KNOWN = {
    "user": "user_id userid user uid reviewerid customer_id customerid visitorid session_id",
    "item": "item_id itemid item movieid movie_id iid sid asin parent_asin product_id productid "
    "business_id book_id artist_id track_id",
    "rating": "rating ratings stars overall score",
    "timestamp": "timestamp time ts unixreviewtime unix_timestamp date datetime",
}
_SEPARATORS = {"csv": ",", "tsv": "\t", "inter": "\t", "data": "\t", "dat": "::", "txt": " "}
_HEADERLESS = {"dat", "data", "txt"}
# With these separators quotation marks enclose fields; with others they belong to an id.
QUOTING = ",;|"
csv.field_size_limit(sys.maxsize)  # of this process; the default is 131,072 characters
_SPELLED = {"tab": "\t", "\\t": "\t", "space": " ", "comma": ",", "semicolon": ";", "pipe": "|"}


@dataclass(frozen=True)
class Layout:
    """The layout of one text file."""

    separator: str
    width: int  # fields of a line
    places: dict[str, int]  # place, from 0, of each role that the file has
    has_header: bool


def split_line(line: str, separator: str) -> list[str]:
    """The fields of a line."""
    if separator in QUOTING and '"' in line:
        with suppress(csv.Error):  # a carriage return in the middle
            return next(csv.reader([line], delimiter=separator))
    return line.split(separator)


def check_columns(columns: str) -> dict[str, str]:
    """Name or number of each role's column by --columns."""
    names = [name.strip() for name in columns.split(",")]
    if not 2 <= len(names) <= len(ROLES) or not all(names[:2]):
        raise UserError(
            f"--columns must name user,item[,rating[,timestamp]], not {columns!r}: "
            'for example "user_id,item_id,rating,timestamp"'
        )
    given = [name for name in names if name]
    if len(set(given)) < len(given):
        raise UserError(f"--columns {columns!r} names a column twice: give each another one")
    return {role: name for role, name in zip(ROLES, names, strict=False) if name}


def find_separator(name: str, separator: str) -> str:
    """The separator by the flag, or else by the file's name; "" if neither tells."""
    return _SPELLED.get(separator.lower(), separator) or _SEPARATORS.get(_extension(name), "")


def text_layout(where: str, name: str, line: str, columns: str, separator: str) -> Layout:
    """The layout of a text file with this name, first record and `find_separator`."""
    extension = _extension(name)
    if not separator:
        raise UserError(
            f"{where}: cannot tell the format from the name {name!r}; known are .csv .tsv .inter "
            ".dat .data .txt .parquet, also .gz of each; or give --separator and --columns"
        )
    if separator != "::" and not (len(separator) == 1 and separator.isascii()):
        ascii_only = "" if separator.isascii() else ": ASCII only"
        raise UserError(
            f'--separator must be one character, "tab" or "::", not {separator!r}{ascii_only}'
        )
    if extension == "txt" and separator == " " and "\t" in line:
        separator = "\t"
    names = [field.strip().strip('"') for field in split_line(line, separator)]
    if len(names) < 2:
        raise _wrong_separator(where, line, separator)
    wanted = check_columns(columns) if columns else {}
    if wanted and all(re.fullmatch("[0-9]+", number) for number in wanted.values()):
        places = {role: int(number) - 1 for role, number in wanted.items()}
        for place in places.values():
            if not 0 <= place < len(names):
                raise UserError(
                    f"{where}:1: no column {place + 1} (--columns); there are {len(names)}"
                )
    elif extension in _HEADERLESS and not wanted:
        places = {role: place for place, role in enumerate(ROLES[: len(names)])}
    else:
        return Layout(separator, len(names), find_columns(f"{where}:1", names, columns), True)
    return Layout(separator, len(names), places, has_header=False)


def find_columns(where: str, names: Sequence[str], columns: str | None) -> dict[str, int]:
    """Place of each role, from 0, among column names; ``columns``: None for a table in memory."""
    wanted = check_columns(columns) if columns else {}
    plain = [_untyped(name).lower() for name in names]
    places = {}
    for role in wanted or ROLES:
        if wanted:
            column = wanted[role]
            matches = [at for at, name in enumerate(names) if column in (name, _untyped(name))]
        else:
            matches = [plain.index(name) for name in _KNOWN[role].split() if name in plain]
        if matches:
            places[role] = matches[0]
            if names.count(names[matches[0]]) > 1:
                other = "" if columns is None else ", or choose others with --columns"
                raise UserError(
                    f"{where}: several columns are called {names[matches[0]]!r}: rename them{other}"
                )
        elif wanted:
            raise UserError(f"{where}: no column {column!r} (--columns); there are {_list(names)}")
        elif role in ("user", "item"):
            cause = f"{where}: cannot tell the {role} column among {_list(names)}; "
            if columns is None:
                raise UserError(f"{cause}rename them to user, item[, rating[, timestamp]]")
            raise UserError(
                f'{cause}name them with --columns "user,item[,rating[,timestamp]]", or by numbers '
                '("1,2,3,4") if the file has no header'
            )
    return places


def _extension(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower() if "." in name else ""


def _untyped(name: str) -> str:
    """RecBole's ``user_id:token`` without the type."""
    return name.split(":")[0]


def _wrong_separator(where: str, line: str, separator: str) -> UserError:
    counts = {mark: len(split_line(line, mark)) for mark in ("::", "\t", ",", ";", "|", " ")}
    likely = max(counts, key=lambda mark: counts[mark])
    hint = "; a ratings file has at least a user and an item column"
    if counts[likely] > 1:
        hint = f"; is it {_spell(likely)}? Give --separator"
    return UserError(
        f"{where}:1: one column only when cut at {_spell(separator)}: {line[:60]!r}{hint}"
    )


def _spell(separator: str) -> str:
    return {"\t": "a tab", " ": "a space"}.get(separator, repr(separator))


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(re.sub(r"[^\x20-\x7e]", "?", name)[:40] for name in names[:20])
    return shown + (", ..." if len(names) > 20 else "")
