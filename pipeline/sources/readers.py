"""Read ratings from files as a stream of Arrow tables.

Formats and columns: layout.py; packed files: source_file.py; Parquet: parquet.py. Ids in text files
are read as text, even numeric ones, so that none is rounded, merged or reordered; blanks around an
id do not count.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.errors import UserError
from pipeline.sources.blocks import BOM, encloses, first_record, read_blocks, record_ends
from pipeline.sources.layout import ROLES, Layout, find_separator, split_line, text_layout
from pipeline.sources.parquet import is_parquet, read_parquet
from pipeline.sources.source_file import SourceFile
from pipeline.sources.values import (
    BLANKS,
    NANOSECONDS,
    checked,
    date_mistake,
    first_failing,
    is_number,
    time_mistake,
)
from pipeline.stage import Stage

Types = dict[str, pa.DataType]  # role -> type of its column

_ID = pa.dictionary(pa.int32(), pa.string())
_PARSED_BYTES = 1 << 21  # text that one thread parses at a time
_HEXADECIMAL = re.compile(b"0[xX]")  # as whole numbers Arrow reads it, as others it does not
_UNIT = "\x1f"  # takes the place of "::", for Arrow separates at one byte


class ReadRatings(Stage[pa.Table]):
    """Source stage: files -> tables of about half a million ratings, in file order.

    Columns: ``user`` and ``item`` (text or whole numbers, usually as a dictionary), and if the file
    has them ``rating`` (float64) and ``timestamp`` (int64 in the file's own unit; dates become
    nanoseconds), with ``fraction`` (float64) in tables with times that are not whole
    (pipeline/sources/values.py).

    Once streamed, ``trimmed`` is the number of ratings whose user or item id in a text file had
    blanks around it, which do not count.
    """

    def __init__(
        self, *files: SourceFile | str | Path, columns: str = "", separator: str = ""
    ) -> None:
        super().__init__()
        self.files = [
            file if isinstance(file, SourceFile) else SourceFile(Path(file)) for file in files
        ]
        self.columns, self.separator = columns, separator
        self.trimmed: Counter[str] = Counter()

    def stream(self) -> Iterator[pa.Table]:
        roles: list[str] = []
        self.trimmed.clear()
        for file in self.files:
            rows = 0
            tables = _read_text(file, self.columns, self.separator, self.trimmed)
            if is_parquet(file):
                tables = read_parquet(file, self.columns)
            for table in tables:
                rows += table.num_rows
                found = [role for role in table.column_names if role != "fraction"]
                if found[-1] == "timestamp" and pa.types.is_temporal(table[-1].type):
                    zoned = table[-1].type.tz is not None
                    times = table[-1].cast(pa.int64())
                    table = table.set_column(len(found) - 1, "timestamp", times)
                    found[-1] += " (as dates of a time zone)" if zoned else " (as dates)"
                roles = roles or found
                if found != roles:
                    raise UserError(
                        f"{file} has the columns {', '.join(found)} where "
                        f"{self.files[0]} has {', '.join(roles)}: choose with --columns"
                    )
                yield table
            if not rows:
                raise UserError(f"{file}: no ratings in it")


def _read_text(
    file: SourceFile, columns: str, separator: str, trimmed: Counter[str]
) -> Iterator[pa.Table]:
    layout = None
    separator = find_separator(file.name, separator)
    for first_line, block in read_blocks(file, separator):
        if layout is None:
            first = first_record(block, separator)
            layout = _layout(file, first, columns, separator)
            if layout.has_header:
                first_line += first.count(b"\n")
                block = block[len(first) :]
            types = _types(layout, block)
        try:
            table = _parse_times(block, layout, types)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(_explain(file, layout, types, first_line, block, error)) from error
        yield _trimmed(table, trimmed)


def _layout(file: SourceFile, first: bytes, columns: str, separator: str) -> Layout:
    line = _decode(file, first.rstrip(b"\r\n"))
    if "\r" in (re.sub('"[^"]*"', "", line) if encloses(separator) else line):
        raise UserError(
            f"{file}:1: lines must end in a line feed, not only a carriage return: "
            "convert the file with tr '\\r' '\\n'"
        )
    return text_layout(str(file), file.name, line, columns, separator)


def _parse_times(block: bytes, layout: Layout, types: Types) -> pa.Table:
    """`_parse`; times are parsed as whole numbers, which is fast, up to the first that is none."""
    whole = types.get("timestamp") == pa.int64()
    has_x = b"x" in block or b"X" in block  # far faster than the pattern
    if not (whole and has_x and _HEXADECIMAL.search(block)):
        try:
            return _parse(block, layout, types)
        except (pa.ArrowException, ValueError):
            if not whole:
                raise
    types["timestamp"] = pa.string()
    return _parse(block, layout, types)


def _types(layout: Layout, block: bytes) -> Types:
    """Column types; the first record decides between whole numbers, other numbers and dates."""
    types = {"user": _ID, "item": _ID, "rating": pa.float64(), "timestamp": pa.int64()}
    first = first_record(block.lstrip(b"\r\n"), layout.separator).rstrip(b"\r\n")
    fields = split_line(first.decode(errors="replace"), layout.separator)
    if "timestamp" in layout.places and len(fields) == layout.width:
        text = fields[layout.places["timestamp"]].strip()
        if not text.lstrip("-").isdigit():
            types["timestamp"] = pa.string() if is_number(text) else NANOSECONDS
    return {role: types[role] for role in ROLES if role in layout.places}


def _parse(block: bytes, layout: Layout, types: Types) -> pa.Table:
    """A block of records as a table; raises ValueError or ArrowException at a malformed one."""
    if not block.strip(b"\r\n"):
        return checked(pa.table({role: pa.array([], kind) for role, kind in types.items()}))
    # Between parts Arrow may lose the line feed of a quoted "\r\n".
    if not (b'"' in block and b"\r" in block):
        try:
            return checked(_read_csv(block, layout, types, _PARSED_BYTES))
        except pa.ArrowInvalid:
            if len(block) <= _PARSED_BYTES:
                raise
    return checked(_read_csv(block, layout, types, len(block)))  # a record may be longer


def _read_csv(block: bytes, layout: Layout, types: Types, parsed_bytes: int) -> pa.Table:
    separator = layout.separator
    if separator == "::":
        separator, block = _UNIT, block.replace(b"::", _UNIT.encode())
    if block.startswith(BOM):  # Arrow drops it from the beginning, where it belongs to an id
        block = b"\n" + block
    names = [f"column {at}" for at in range(layout.width)]
    wanted = {role: names[layout.places[role]] for role in types}
    return pacsv.read_csv(
        pa.py_buffer(block),
        pacsv.ReadOptions(column_names=names, block_size=parsed_bytes),
        pacsv.ParseOptions(
            delimiter=separator,
            quote_char='"' if encloses(separator) else False,
            newlines_in_values=encloses(separator) and b'"' in block,
        ),
        pacsv.ConvertOptions(
            include_columns=list(wanted.values()),
            column_types={wanted[role]: kind for role, kind in types.items()},
        ),
    ).rename_columns(list(types))


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


def _explain(
    file: SourceFile, layout: Layout, types: Types, first_line: int, block: bytes, error: Exception
) -> str:
    """A message on the first malformed record of a block that could not be parsed."""
    ends = record_ends(block, layout.separator).tolist()
    bounds = [0, *ends] if ends and ends[-1] == len(block) else [0, *ends, len(block)]

    def mistake(start: int, end: int) -> str:
        try:
            _parse(block[bounds[start] : bounds[end]], layout, types)
        except (pa.ArrowException, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    at = first_failing(len(bounds) - 1, lambda start, end: bool(mistake(start, end)))
    line = first_line + block.count(b"\n", 0, bounds[at])
    where, record = f"{file}:{line}", block[bounds[at] : bounds[at + 1]].rstrip(b"\r\n")
    fields = split_line(_decode(file, record, line), layout.separator)
    if len(fields) != layout.width:
        return f"{where}: {len(fields)} fields where {layout.width} are expected"
    for role, kind in types.items():
        text = fields[layout.places[role]].strip()
        value = f"the {role} {text[:40]!r}"
        if kind == _ID and not text:
            return f"{where}: the {role} id is empty"
        if kind == pa.float64() and not (_arrow_reads(text, kind) and math.isfinite(float(text))):
            return f"{where}: {value} is not a number"
        if kind == pa.string() and time_mistake(text):
            return f"{where}: {value} {time_mistake(text)}"
        if kind == NANOSECONDS and not _arrow_reads(text, NANOSECONDS):
            return f"{where}: {value} {date_mistake(text)}"
    return f"{where}: {mistake(at, at + 1) or str(error).splitlines()[0]}"


def _arrow_reads(text: str, kind: pa.DataType) -> bool:
    try:
        return bool(text) and pa.array([text]).cast(kind) is not None
    except pa.ArrowInvalid:
        return False


def _decode(file: SourceFile, line: bytes, number: int = 1) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 text: {line[:40]!r}") from error
