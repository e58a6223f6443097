"""Read ratings from files, as a stream of Arrow tables.

    reader = ReadRatings("ml-1m/ratings.dat")
    next(reader)      # pyarrow.Table: user, item (dictionary of text), rating (double), timestamp

Formats and how their columns are found: see `pipeline.layout`; packed files: `pipeline.sources`.
Ids are read as text, whatever they look like, so that none is rounded, merged or reordered.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.layout import ROLES, Layout, find_columns, text_layout
from pipeline.sources import SourceFile, reading
from pipeline.stage import Stage

BLOCK_BYTES = 1 << 24  # of text parsed together: about half a million ratings
BLOCK_ROWS = 1 << 19
_ID = pa.dictionary(pa.int32(), pa.string())
_TIME = pa.timestamp("ns")
_BOM = b"\xef\xbb\xbf"


class ReadRatings(Stage[pa.Table]):
    """Source stage: files -> tables of about half a million ratings, in file order.

    Columns: ``user`` and ``item`` (text or whole numbers, usually as a dictionary), and where the
    file has them ``rating`` (float64) and ``timestamp`` (int64 or float64, the file's own unit;
    dates and times become nanoseconds).

    Args:
        files: paths or `SourceFile`s, read one after the other.
        columns: names of user, item[, rating[, timestamp]], "" to find them by well-known names.
        separator: between two fields of a text file, "" to tell it by the file's extension.

    Raises:
        UserError: (while reading) the file is missing, empty, damaged, of another format, has no
            such column, or a line of it makes no sense; the message says ``file:line``.
    """

    def __init__(
        self, *files: SourceFile | str | Path, columns: str = "", separator: str = ""
    ) -> None:
        super().__init__()
        self.files = [
            file if isinstance(file, SourceFile) else SourceFile(Path(file)) for file in files
        ]
        self.columns, self.separator = columns, separator

    def stream(self) -> Iterator[pa.Table]:
        roles: list[str] = []
        for file in self.files:
            rows = 0
            read = _read_parquet if _is_parquet(file) else _read_text
            for table in read(file, self.columns, self.separator):
                rows += table.num_rows
                roles = roles or table.column_names
                if table.column_names != roles:
                    raise UserError(
                        f"{file} has the columns {', '.join(table.column_names)} where "
                        f"{self.files[0]} has {', '.join(roles)}: choose with --columns"
                    )
                yield table
            if not rows:
                raise UserError(f"{file}: no ratings in it")


def _read_text(file: SourceFile, columns: str, separator: str) -> Iterator[pa.Table]:
    layout = None
    for first_line, block in _blocks(file):
        if layout is None:
            line, _, rest = block.partition(b"\n")
            layout = text_layout(str(file), file.name, _decode(file, line), columns, separator)
            if layout.has_header:
                first_line, block = 2, rest
            types = _types(layout, block)
        while True:
            try:
                yield _parse(block, layout, types)
                break
            except (pa.ArrowException, ValueError) as error:
                # Whole numbers may turn into decimal ones later in the file, which is no mistake.
                if types.get("timestamp") == pa.int64():
                    types["timestamp"] = pa.float64()
                    continue
                raise UserError(_explain(file, layout, types, first_line, block, error)) from error


def _blocks(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines of text), about BLOCK_BYTES at a time."""
    with file.open() as stream:
        tail, line = b"", 1
        while True:
            read = stream.read(BLOCK_BYTES)
            block = (tail + read).removeprefix(_BOM) if line == 1 else tail + read
            if b"\0" in block:
                raise UserError(f"{file} is not a text file; known formats: see --dataset_path")
            if not read:
                break
            end = block.rfind(b"\n") + 1
            if not end and len(block) > BLOCK_BYTES:
                raise UserError(f"{file}:{line}: a line of more than {BLOCK_BYTES:,} bytes")
            block, tail = block[:end], block[end:]
            if block:
                yield line, block
                line += block.count(b"\n")
        if block:
            yield line, block


def _types(layout: Layout, block: bytes) -> dict[str, pa.DataType]:
    """Arrow types of the columns; times are whole, decimal or dates as in the first line."""
    types = {"user": _ID, "item": _ID, "rating": pa.float64(), "timestamp": pa.int64()}
    fields = layout.fields(block.lstrip().partition(b"\n")[0].decode(errors="replace"))
    if "timestamp" in layout.places and len(fields) == layout.width:
        text = fields[layout.places["timestamp"]].strip()
        if not text.lstrip("-").isdigit():
            types["timestamp"] = pa.float64() if _number(text) else _TIME
    return {role: types[role] for role in ROLES if role in layout.places}


def _parse(block: bytes, layout: Layout, types: dict[str, pa.DataType]) -> pa.Table:
    """One block of lines as a table.

    Raises:
        pa.ArrowInvalid, ValueError: a line that makes no sense is in it.
    """
    if not block.strip():
        return pa.table({role: pa.array([], kind) for role, kind in types.items()})
    separator = layout.separator
    if separator == "::":
        separator, block = "\t", block.replace(b"::", b"\t")
    names = [f"column {at}" for at in range(layout.width)]
    wanted = {role: names[layout.places[role]] for role in types}
    table = pacsv.read_csv(
        pa.py_buffer(block),
        pacsv.ReadOptions(column_names=names, block_size=1 << 21),
        pacsv.ParseOptions(delimiter=separator, quote_char='"' if layout.quoted else False),
        pacsv.ConvertOptions(
            include_columns=list(wanted.values()),
            column_types={wanted[role]: kind for role, kind in types.items()},
        ),
    ).rename_columns(list(types))
    return _checked(table)


def _checked(table: pa.Table) -> pa.Table:
    """The table with times as numbers, once nothing is missing in it.

    Raises:
        ValueError: an empty id, a missing, infinite or not-a-number rating or timestamp.
    """
    for role in table.column_names:
        column = table[role]
        if column.null_count:
            raise ValueError(f"a {role} is missing")
        if pa.types.is_temporal(column.type):
            column = column.cast(_TIME).cast(pa.int64())
            table = table.set_column(table.column_names.index(role), role, column)
        elif pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py():
            raise ValueError(f"a {role} is not a finite number")
        elif pa.types.is_dictionary(column.type):
            ids = (chunk.dictionary for chunk in column.chunks)
            if any(pc.any(pc.equal(pc.utf8_trim_whitespace(each), "")).as_py() for each in ids):
                raise ValueError(f"a {role} is empty")
    return table


def _explain(
    file: SourceFile,
    layout: Layout,
    types: dict[str, pa.DataType],
    first_line: int,
    block: bytes,
    error: Exception,
) -> str:
    """Which line of the block made no sense, looked for only once parsing has failed."""
    for number, raw in enumerate(block.split(b"\n"), first_line):
        if not raw.strip():
            continue
        fields = layout.fields(_decode(file, raw, number).rstrip("\r"))
        if len(fields) != layout.width:
            return f"{file}:{number}: {len(fields)} fields where {layout.width} are expected"
        for role, kind in types.items():
            text = fields[layout.places[role]].strip()
            if kind == _ID and not text:
                return f"{file}:{number}: the {role} id is empty"
            if kind == pa.float64() and not _number(text):
                return f"{file}:{number}: the {role} {text[:40]!r} is not a number"
            if pa.types.is_temporal(kind) and not _is_time(text):
                return f"{file}:{number}: the {role} {text[:40]!r} is neither a number nor a time"
    last_line = first_line + block.count(b"\n")
    return f"{file}: lines {first_line} to {last_line} cannot be read: {str(error).splitlines()[0]}"


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_time(text: str) -> bool:
    try:
        return bool(text) and pa.array([text]).cast(_TIME) is not None
    except pa.ArrowInvalid:
        return False


def _decode(file: SourceFile, line: bytes, number: int = 1) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 text: {line[:40]!r}") from error


def _is_parquet(file: SourceFile) -> bool:
    with file.open() as stream:
        return stream.read(4) == b"PAR1"


def _read_parquet(file: SourceFile, columns: str, separator: str) -> Iterator[pa.Table]:
    if file.member:
        raise UserError(f"{file}: Parquet inside a zip cannot be streamed; unpack it first")
    try:
        with reading(file), pq.ParquetFile(file.path) as parquet:
            names = parquet.schema_arrow.names
            places = find_columns(str(file), names, columns)
            wanted = [names[place] for place in places.values()]
            row = 0
            for batch in parquet.iter_batches(BLOCK_ROWS, columns=wanted):
                found = {role: batch.column(names[at]) for role, at in places.items()}
                yield _checked_parquet(file, pa.table(found), row)
                row += batch.num_rows
    except pa.ArrowException as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _checked_parquet(file: SourceFile, table: pa.Table, first_row: int) -> pa.Table:
    for at, role in enumerate(table.column_names):
        column = table[role]
        if column.null_count:
            bad = first_row + int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise UserError(f"{file}: row {bad:,} (from 0) has no {role}")
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if role in ("user", "item"):
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                column = column.cast(pa.string()).dictionary_encode()
            elif not pa.types.is_integer(kind):
                raise UserError(f"{file}: the {role} ids are {kind}, not text or whole numbers")
        elif role == "timestamp" and (pa.types.is_integer(kind) or pa.types.is_temporal(kind)):
            column = column if pa.types.is_temporal(kind) else column.cast(pa.int64())
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
        else:
            raise UserError(f"{file}: the {role} column is {kind}, not a number")
        table = table.set_column(at, role, column)
    try:
        return _checked(table)
    except ValueError as error:
        rows = f"rows {first_row:,} to {first_row + table.num_rows:,}"
        raise UserError(f"{file}: {rows}: {error}") from error
