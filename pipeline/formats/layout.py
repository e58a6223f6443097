"""The layout of a ratings file: its separator and the places of user, item, rating and time.

ratings.csv   userId,movieId,rating,timestamp     header, ","     (GroupLens, TSV with tabs)
ml.inter      user_id:token  item_id:token  ...   header, tab     (RecBole)
ratings.dat   1::1193::5::978300760               no header, "::" (GroupLens)
u.data        196  242  3  881250949              no header, tab  (MovieLens 100K)
beauty.txt    1 17                                no header, one space; time order
"""

import csv
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pipeline.errors import UserError
from pipeline.tables.headerless import roles_by_values
from pipeline.tables.names import (
    LISTS,
    Wanted,
    canonical,
    check_columns,
    find_columns,
    known_places,
    unread_time,
    untyped,
)
from pipeline.tables.sequences import looks_like_list

_SEPARATORS = {"csv": ",", "tsv": "\t", "inter": "\t", "data": "\t", "dat": "::", "txt": " "}
_MARKS = ("::", "\t", ",", ";", "|")
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
    lists: tuple[str, ...] = ()  # roles whose fields are lists
    rest: bool = False  # all fields from the item's place on are items: user item item item ...
    conditions: dict[str, int] = field(default_factory=dict)  # places of the columns of --where
    names: tuple[str, ...] = ()  # of the columns, if there is a header
    columns: str | None = ""  # --columns

    @property
    def described(self) -> list[str]:
        """The layout as lines for the user."""
        columns = {
            role: repr(self.names[at]) if self.names else f"column {at + 1}"
            for role, at in self.places.items()
        }
        if self.rest:
            columns["item"] += " and all after it"
        for role in self.lists:
            columns[role] += " (lists)"
        header = "with a header" if self.has_header else "without a header"
        found = ", ".join(f"{role} = {column}" for role, column in columns.items())
        line = f"format: text cut at {_spell(self.separator)}, {header}; columns: {found}"
        named = {role: self.names[at] for role, at in self.places.items()} if self.names else {}
        return [line, *unread_time(self.names, named, self.columns)]


def split_line(line: str, separator: str) -> list[str]:
    """The fields of a line."""
    if separator in QUOTING and '"' in line:
        with suppress(csv.Error):  # a carriage return in the middle
            return next(csv.reader([line], delimiter=separator))
    return line.split(separator)


def find_separator(name: str, separator: str) -> str:
    """The separator by the flag, or else by the file's name; "" if neither tells."""
    return _SPELLED.get(separator.lower(), separator) or _SEPARATORS.get(_extension(name), "")


def other_separator(separator: str, records: Callable[[str], Sequence[str]]) -> str:
    """The only mark that cuts all records into as many fields, if `separator` cuts none; else "".

    Args:
        records: the first records of a file with a separator, which decides what marks enclose.
    """
    if not separator or any(
        len(split_line(record, separator)) > 1 for record in records(separator)[:1]
    ):
        return ""
    widths = {mark: {len(split_line(each, mark)) for each in records(mark)} for mark in _MARKS}
    found = [mark for mark, counts in widths.items() if len(counts) == 1 and max(counts) > 1]
    return found[0] if len(found) == 1 else ""


def text_layout(
    where: str, name: str, records: Sequence[str], wanted: Wanted, keys: Sequence[str] = ()
) -> Layout:
    """The layout of a text file with this name and these first records.

    `keys` are the names of further columns, whose places follow those of the file.
    """
    extension, line = _extension(name), records[0]
    separator = _checked_separator(where, name, line, wanted)
    rows = [split_line(record, separator) for record in records]
    names = [field.strip().strip('"') for field in rows[0]]
    if len(names) < 2:
        raise _wrong_separator(where, line, separator)
    numbers = check_columns(wanted.columns) if wanted.columns else {}
    if numbers and all(re.fullmatch(r"[0-9]+(\.\.\.)?", number) for number in numbers.values()):
        layout = _by_numbers(where, numbers, Layout(separator, len(names), {}, has_header=False))
    elif extension in _HEADERLESS and not numbers and not _is_header(names):
        try:
            places = roles_by_values(rows)
        except ValueError as error:
            shown = "; ".join(repr(record[:60]) for record in records[:3])
            raise UserError(f"{where}:1: {error}; the first lines are {shown}") from error
        rest = places is None
        places = places or {"user": 0, "item": 1}
        layout = Layout(separator, len(names), places, has_header=False, rest=rest)
    else:
        width = len(names)
        names += [key for key in keys if key not in names]
        places = find_columns(f"{where}:1", names, wanted.columns, width)
        layout = Layout(separator, width, places, True, names=tuple(names), columns=wanted.columns)
        if len(rows) > 1 and max(places.values()) < width == len(rows[1]):
            layout = replace(layout, lists=_lists(names[:width], rows[1:], places))
    return replace(layout, conditions=_conditions(where, names, layout, wanted))


def _checked_separator(where: str, name: str, line: str, wanted: Wanted) -> str:
    """The separator of a text file with this name and first line.

    Raises:
        UserError: neither the name nor --separator tells it, or it is none.
    """
    separator = find_separator(name, wanted.separator)
    if not separator:
        raise UserError(
            f"{where}: cannot tell the format from the name {name!r}; known are .csv .tsv .inter "
            ".dat .data .txt .json .jsonl .ndjson .parquet .orc .arrow .feather .ipc, also .gz "
            ".bz2 .xz .zst .lz4 of text; or give --separator and --columns"
        )
    if separator != "::" and not (len(separator) == 1 and separator.isascii()):
        ascii_only = "" if separator.isascii() else ": ASCII only"
        raise UserError(
            f'--separator must be one character, "tab" or "::", not {separator!r}{ascii_only}'
        )
    return "\t" if _extension(name) == "txt" and separator == " " and "\t" in line else separator


def _is_header(names: Sequence[str]) -> bool:
    """Whether a first line holds well-known names of a user and an item column."""
    return all(known_places(role, names) for role in ("user", "item"))


def _by_numbers(where: str, numbers: dict[str, str], layout: Layout) -> Layout:
    """The layout with the places that --columns gives as numbers from 1."""
    rest = numbers["item"].endswith("...")
    places = {role: int(number.removesuffix("...")) - 1 for role, number in numbers.items()}
    for place in places.values():
        if not 0 <= place < layout.width:
            missing = f"no column {place + 1} (--columns); there are {layout.width}"
            raise UserError(f"{where}:1: {missing}")
    if (rest and len(numbers) > 2) or any(
        number.endswith("...") for role, number in numbers.items() if role != "item"
    ):
        raise UserError(
            '--columns with "..." names a user and the first of its items: for example "1,2..."'
        )
    return replace(layout, places=places, rest=rest)


def _lists(names: Sequence[str], rows: Sequence[Sequence[str]], places: dict[str, int]) -> tuple:
    """The roles whose fields are lists written as text."""
    width = len(names)
    rows = [row for row in rows if len(row) == width]

    def is_list(role: str) -> bool:
        name, values = names[places[role]], [row[places[role]].strip() for row in rows]
        is_plural = name.endswith(":token_seq") or canonical(name) in LISTS.split()
        several = any(re.search(r"[\s,;|]", value) for value in values)
        return (is_plural or several) and (
            all(map(looks_like_list, values)) or (is_plural and several)
        )

    if "item" not in places or not rows or not is_list("item"):
        return ()
    others = (role for role in ("rating", "timestamp") if role in places)
    count = len(re.findall(r"[^\s,;|]+", rows[0][places["item"]]))
    return (
        "item",
        *(
            role
            for role in others
            if looks_like_list(rows[0][places[role]])
            or (count > 1 and len(re.findall(r"[^\s,;|]+", rows[0][places[role]])) == count)
        ),
    )


def _conditions(where: str, names: Sequence[str], layout: Layout, wanted: Wanted) -> dict[str, int]:
    """The place of each column that --where names; without a header, these are the roles."""
    found = {}
    for name in wanted.rows.columns if wanted.rows else ():
        if layout.has_header:
            matches = [at for at, each in enumerate(names) if name in (each, untyped(each))]
        else:
            matches = [layout.places[name]] if name in layout.places else []
        if not matches:
            known = names if layout.has_header else list(layout.places)
            raise UserError(wanted.no_column(f"{where}:1", name, known))
        if layout.rest or layout.lists:
            raise UserError("--where cannot choose among rows with lists in text: use Parquet")
        found[name] = matches[0]
    return found


def _extension(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower() if "." in name else ""


def _wrong_separator(where: str, line: str, separator: str) -> UserError:
    counts = {mark: len(split_line(line, mark)) for mark in (*_MARKS, " ")}
    likely = max(counts, key=lambda mark: counts[mark])
    hint = "; a ratings file has at least a user and an item column"
    if counts[likely] > 1:
        hint = f"; is it {_spell(likely)}? Give --separator"
    return UserError(
        f"{where}:1: one column only when cut at {_spell(separator)}: {line[:60]!r}{hint}"
    )


def _spell(separator: str) -> str:
    return {"\t": "a tab", " ": "a space"}.get(separator, repr(separator))
