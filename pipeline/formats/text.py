"""Read ratings from text: CSV and its kin, as checked Arrow tables.

Formats and columns: layout.py. Ids are read as text, even numeric ones, so that none is rounded,
merged or reordered; blanks around an id do not count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.errors import UserError
from pipeline.formats.blocks import BOM, encloses, read_blocks, record_ends, records_in
from pipeline.formats.layout import (
    Layout,
    find_separator,
    other_separator,
    split_line,
    text_layout,
)
from pipeline.formats.source_file import SourceFile, reading
from pipeline.tables.encoding import Encoding
from pipeline.tables.names import OTHER_RATING, ROLES, Wanted
from pipeline.tables.sequences import explode, split_lists, split_rows
from pipeline.tables.times import MIXED, NANOSECONDS, ZONED, date_mistake, read_dates
from pipeline.tables.values import BLANKS, checked, first_failing, is_number, time_mistake

Types = dict[str, pa.DataType]  # role -> type of its column

_ID = pa.dictionary(pa.int32(), pa.string())
_PARSED_BYTES = 1 << 21  # text that one thread parses at a time
_HEXADECIMAL = re.compile(b"0[xX]")  # as whole numbers Arrow reads it, as others it does not
_UNIT = "\x1f"  # takes the place of "::", for Arrow separates at one byte
_BEGINNING = 1 << 16  # bytes in which another separator is looked for
_SAMPLE = 1000  # records that are looked at to recognise the columns


def read_text(
    file: SourceFile, wanted: Wanted, trimmed: Counter[str], notes: list[str], encoding: Encoding
) -> Iterator[pa.Table]:
    """Checked tables of about half a million ratings, with a column for each role.

    Args:
        trimmed: counts, for each role, the ids that had blanks around them.
        notes: gets a line for the user on the format and the columns, and another one if a column
            that may be the time is not read.
    """
    begun = False
    try:
        for table in _read(file, wanted, trimmed, notes, encoding):
            begun = True
            yield table
    except UserError:
        separator = "" if begun or wanted.separator else _other_separator(file)
        if not separator:
            raise
        wanted = replace(wanted, separator=separator)
        yield from _read(file, wanted, trimmed, notes, encoding)


def _other_separator(file: SourceFile) -> str:
    """The separator of a file whose name stands for another one, "" if none is certain."""
    with reading(file), file.open() as stream:
        block = stream.read(_BEGINNING)
    whole, named = len(block) < _BEGINNING, find_separator(file.name, "")
    return other_separator(named, lambda separator: records_in(block, separator, whole))


def _read(
    file: SourceFile, wanted: Wanted, trimmed: Counter[str], notes: list[str], encoding: Encoding
) -> Iterator[pa.Table]:
    text = None
    separator = find_separator(file.name, wanted.separator)
    for first_line, block in read_blocks(file, separator):
        block = encoding.as_utf8(block, first_line)
        if text is None:
            ends = record_ends(block, separator)[: _SAMPLE + 1].tolist() or [len(block)]
            layout = _layout(file, block, ends, wanted)
            if layout.has_header:
                first_line += block.count(b"\n", 0, ends[0])
                block = block[ends[0] :]
            text = _Text(file, layout, wanted, block)
            notes += layout.described
        yield _trimmed(text.table(block, first_line), trimmed)


def _layout(file: SourceFile, block: bytes, ends: list[int], wanted: Wanted) -> Layout:
    separator = find_separator(file.name, wanted.separator)
    starts = [0, *ends[:-1]]
    records = [block[a:b].rstrip(b"\r\n").decode() for a, b in zip(starts, ends, strict=True)]
    line = records[0]
    if "\r" in (re.sub('"[^"]*"', "", line) if encloses(separator) else line):
        raise UserError(
            f"{file}:1: lines must end in a line feed, not only a carriage return: "
            "convert the file with tr '\\r' '\\n'"
        )
    records = [line, *filter(str.strip, records[1:])]
    return text_layout(str(file), file.name, records, wanted, [key for key, _ in file.keys])


class _Text:
    """The records of a text file with a known layout, as tables."""

    def __init__(self, file: SourceFile, layout: Layout, wanted: Wanted, block: bytes) -> None:
        self.file, self.layout, self.wanted = file, layout, wanted
        keys = dict(file.keys)
        # Values of the columns after those of the file, which are the same in each record.
        self.keys = [keys[name] for name in layout.names[layout.width :]]
        self.types = _types(layout, block, self.keys)
        # Names of all columns, by place: a file's own may be equal.
        self.columns = [f"column {at}" for at in range(layout.width + len(self.keys))]

    def table(self, block: bytes, first_line: int) -> pa.Table:
        """A block of whole records as a checked table."""
        try:
            return self._parse_times(block)
        except UserError:
            raise
        except (pa.ArrowException, ValueError) as error:
            raise UserError(self._explain(first_line, block, error)) from error

    def _parse_times(self, block: bytes) -> pa.Table:
        """`_parse_dates`; whole numbers as times are fast until another number."""
        whole = self.types.get("timestamp") == pa.int64()
        has_x = b"x" in block or b"X" in block  # far faster than the pattern
        if not (whole and has_x and _HEXADECIMAL.search(block)):
            try:
                return self._parse_dates(block)
            except (pa.ArrowException, ValueError):
                if not whole:
                    raise
        self.types["timestamp"] = pa.string()
        return self._parse(block)

    def _parse_dates(self, block: bytes) -> pa.Table:
        """`_parse`; dates as Arrow reads them are fast, others are read as text."""
        try:
            return self._parse(block)
        except (pa.ArrowException, ValueError):
            if self.types.get("timestamp") not in (NANOSECONDS, ZONED):
                raise
            return self._parse(block, written_dates=True)

    def _parse(self, block: bytes, written_dates: bool = False) -> pa.Table:
        """A block of records as a table; raises ValueError or ArrowException at a malformed one."""
        if not block.strip(b"\r\n"):
            columns = {role: pa.array([], kind) for role, kind in self.types.items()}
            return checked(pa.table(columns))
        if self.layout.rest:
            return self._of_rows(block)
        # Between parts Arrow may lose the line feed of a quoted "\r\n".
        if not (b'"' in block and b"\r" in block):
            try:
                return self._read_csv(block, written_dates, _PARSED_BYTES)
            except pa.ArrowInvalid:
                if len(block) <= _PARSED_BYTES:
                    raise
        return self._read_csv(block, written_dates, len(block))  # a record may be longer

    def _read_csv(self, block: bytes, written_dates: bool, parsed_bytes: int) -> pa.Table:
        """`_parse` by Arrow's reader, a thread of which takes ``parsed_bytes`` at a time."""
        layout, types = self.layout, self.types
        kinds = {layout.places[role]: kind for role, kind in types.items()}
        if written_dates or layout.lists:
            text = ["timestamp"] if not layout.lists else types
            kinds |= {layout.places[role]: pa.string() for role in text if role in types}
        kinds = {place: pa.string() for place in layout.conditions.values()} | kinds
        names, separator = self.columns, layout.separator
        read = {names[place]: kind for place, kind in kinds.items() if place < layout.width}
        if separator == "::":
            separator, block = _UNIT, block.replace(b"::", _UNIT.encode())
        if block.startswith(BOM):  # Arrow drops it from the beginning, where it belongs to an id
            block = b"\n" + block
        found = pacsv.read_csv(
            pa.py_buffer(block),
            pacsv.ReadOptions(column_names=names[: layout.width], block_size=parsed_bytes),
            pacsv.ParseOptions(
                delimiter=separator,
                quote_char='"' if encloses(separator) else False,
                newlines_in_values=encloses(separator) and b'"' in block,
            ),
            pacsv.ConvertOptions(include_columns=[*read], column_types=read, null_values=[""]),
        )
        for place, kind in kinds.items():
            if place >= layout.width:
                column = _repeated(self.keys[place - layout.width], len(found), kind)
                found = found.append_column(names[place], column)
        return self._ratings(found, written_dates)

    def _ratings(self, found: pa.Table, written_dates: bool) -> pa.Table:
        """The ratings for which --where holds, from the columns that are needed."""
        layout, types, names = self.layout, self.types, self.columns
        table = pa.table({role: found[names[layout.places[role]]] for role in types})
        if layout.lists:
            return self._of_lists(table)
        if written_dates:
            dates = read_dates(table["timestamp"])
            if dates.type != types["timestamp"]:
                raise ValueError(MIXED)
            table = table.set_column(table.num_columns - 1, "timestamp", dates)
        if self.wanted.rows is not None:
            conditions = {name: found[names[at]] for name, at in layout.conditions.items()}
            if written_dates:
                conditions |= {
                    name: table["timestamp"]
                    for name, at in layout.conditions.items()
                    if at == layout.places["timestamp"]
                }
            table = table.filter(self.wanted.rows.holds(pa.table(conditions)))
        return checked(table, self.wanted.needs_rating)

    def _of_rows(self, block: bytes) -> pa.Table:
        """The ratings of rows like ``user item item item``."""
        lines = [line for line in block.decode().split("\n") if line.strip()]
        places, text = self.layout.places, pa.chunked_array([lines], pa.string())
        rows = split_rows(text, self.layout.separator, places["user"], places["item"])
        return self._of_lists(rows)

    def _of_lists(self, table: pa.Table) -> pa.Table:
        """The ratings of a table of text, in which some columns hold lists."""
        for at, role in enumerate(table.column_names):
            if role in self.layout.lists:
                table = table.set_column(at, role, split_lists(table[role]))
        table = explode(table)
        for at, role in enumerate(table.column_names):
            column = table[role]
            if role in ("user", "item"):
                column = pa.chunked_array([column.combine_chunks().cast(pa.string())], pa.string())
                column = column.dictionary_encode()
            elif role == "rating":
                column = column.cast(pa.float64())
            elif len(column) and not is_number(column[0].as_py() or ""):
                column = read_dates(column)
            table = table.set_column(at, role, column)
        return checked(table, self.wanted.needs_rating)

    def _explain(self, first_line: int, block: bytes, error: Exception) -> str:
        """A message on the first malformed record of a block that could not be parsed."""
        layout = self.layout
        ends = record_ends(block, layout.separator).tolist()
        bounds = [0, *ends] if ends and ends[-1] == len(block) else [0, *ends, len(block)]

        def mistake(start: int, end: int) -> str:
            try:
                self._parse_dates(block[bounds[start] : bounds[end]])
            except (pa.ArrowException, ValueError) as error:
                return str(error).splitlines()[0]
            return ""

        at = first_failing(len(bounds) - 1, lambda start, end: bool(mistake(start, end)))
        line = first_line + block.count(b"\n", 0, bounds[at])
        where = f"{self.file}:{line}"
        record = block[bounds[at] : bounds[at + 1]].rstrip(b"\r\n").decode()
        fields = split_line(record, layout.separator)
        reason = mistake(at, at + 1) or str(error).splitlines()[0]
        if layout.rest or layout.lists or reason.startswith("--where"):
            return f"{where}: {reason}"
        if len(fields) != layout.width:
            unnamed = not (layout.has_header or self.wanted.columns or layout.separator == "::")
            rows = unnamed and len(fields) > 1
            hint = '; if a row is a user and its items: --columns "1,2..."' if rows else ""
            return f"{where}: {len(fields)} fields where {layout.width} are expected{hint}"
        fields += self.keys
        texts = ((role, fields[layout.places[role]].strip()) for role in self.types)
        mistakes = (self._field_mistake(role, text) for role, text in texts)
        return f"{where}: {next(filter(None, mistakes), reason)}"

    def _field_mistake(self, role: str, text: str) -> str:
        """What is wrong with a field of a role, "" if nothing is."""
        kind, value = self.types[role], f"the {role} {text[:40]!r}"
        if kind == _ID and not text:
            return f"the {role} id is empty"
        if kind == pa.float64() and not (
            (not text and not self.wanted.needs_rating)
            or (_arrow_reads(text, kind) and math.isfinite(float(text)))
        ):
            if role == "rating" and not date_mistake(text):
                return f"{value} is a date: {OTHER_RATING}"
            return f"{value} is not a number"
        if kind == pa.bool_() and not _arrow_reads(text, kind):
            return f"{value} is not true or false"
        if kind == pa.string() and (mistake := time_mistake(text)):
            if not date_mistake(text):
                mistake = "is a date, the first one is a number: write all in one way"
            return f"{value} {mistake}"
        if kind in (NANOSECONDS, ZONED) and is_number(text):
            return f"{value} is a number, the first one is none: write all in one way"
        if kind in (NANOSECONDS, ZONED) and not _arrow_reads(text, kind):
            zone = "has no time zone" if kind == ZONED else "has a time zone"
            other = "has one" if kind == ZONED else "has none"
            return f"{value} {date_mistake(text) or f'{zone}, the first one {other}'}"
        return ""


def _types(layout: Layout, block: bytes, keys: list[str]) -> Types:
    """Column types; the first record decides between whole numbers, other numbers and dates."""
    types = {"user": _ID, "item": _ID, "rating": pa.float64(), "timestamp": pa.int64()}
    ends = record_ends(block := block.lstrip(b"\r\n"), layout.separator)
    first = block[: ends[0] if len(ends) else None].rstrip(b"\r\n")
    fields = split_line(first.decode(errors="replace"), layout.separator)
    if len(fields) == layout.width and not layout.rest:
        fields += keys
        by_role = {role: fields[place].strip() for role, place in layout.places.items()}
        if by_role.get("rating", "").lower() in ("true", "false"):
            types["rating"] = pa.bool_()
        time = by_role.get("timestamp", "0")
        if not time.lstrip("-").isdigit():
            types["timestamp"] = pa.string() if is_number(time) else _kind_of_date(time)
    return {role: types[role] for role in ROLES if role in layout.places}


def _repeated(value: str, count: int, kind: pa.DataType) -> pa.ChunkedArray:
    column = pa.chunked_array([pa.repeat(value, count)], pa.string())
    if kind in (NANOSECONDS, ZONED):
        return read_dates(column).cast(kind)
    return column.dictionary_encode() if kind == _ID else column.cast(kind)


def _kind_of_date(text: str) -> pa.DataType:
    try:
        return read_dates(pa.chunked_array([[text]])).type
    except ValueError:
        return NANOSECONDS


def _trimmed(table: pa.Table, counts: Counter[str]) -> pa.Table:
    """The table with ids without blanks around them; adds the ratings that had some to `counts`."""
    for at, role in enumerate(("user", "item")):
        chunks = []
        for chunk in table[role].chunks:
            ids = pc.utf8_trim(chunk.dictionary, BLANKS)
            if not ids.equals(chunk.dictionary):
                differ = pc.not_equal(ids, chunk.dictionary)
                counts[role] += pc.sum(differ.take(chunk.indices)).as_py()
                chunk = pa.DictionaryArray.from_arrays(chunk.indices, ids)
            chunks.append(chunk)
        table = table.set_column(at, role, pa.chunked_array(chunks, _ID))
    return table


def _arrow_reads(text: str, kind: pa.DataType) -> bool:
    try:
        return bool(text) and pa.array([text]).cast(kind) is not None
    except pa.ArrowInvalid:
        return False
