"""Read ratings from files as a stream of Arrow tables.

Formats and columns: layout.py; packed files: source_file.py. Ids in text files are read as text,
even if they are numbers, so that none is rounded, merged or reordered.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.sources.layout import QUOTING, ROLES, Layout, find_columns, split_line, text_layout
from pipeline.sources.source_file import SourceFile, reading
from pipeline.stage import Stage

BLOCK_BYTES = 1 << 24  # text parsed at a time: about half a million ratings
BLOCK_ROWS = 1 << 19
EXACT = 1 << 53  # float64 holds every whole number up to this
Types = dict[str, pa.DataType]  # role -> type of its column

_ID = pa.dictionary(pa.int32(), pa.string())
_TIME = pa.timestamp("ns")
_IS_ID = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
_BOM = b"\xef\xbb\xbf"
# Arrow's message on a whole number that does not fit into 64 bits.
_WHOLE_NUMBER = re.compile(r"to int64: invalid value '\s*[+-]?[0-9]+\s*'")


class ReadRatings(Stage[pa.Table]):
    """Source stage: files -> tables of about half a million ratings, in file order.

    Columns: ``user`` and ``item`` (text or whole numbers, usually as a dictionary), and if the file
    has them ``rating`` (float64) and ``timestamp`` (int64 or float64 in the file's own unit; dates
    become nanoseconds).
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
            tables = _read_text(file, self.columns, self.separator)
            if _is_parquet(file):
                tables = _read_parquet(file, self.columns)
            for table in tables:
                rows += table.num_rows
                found = table.column_names
                if found[-1] == "timestamp" and pa.types.is_temporal(table[-1].type):
                    times = table[-1].cast(pa.int64())
                    table = table.set_column(len(found) - 1, "timestamp", times)
                    found[-1] += " (as dates)"
                roles = roles or found
                if found != roles:
                    raise UserError(
                        f"{file} has the columns {', '.join(found)} where "
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
            if b"\r" in line.removesuffix(b"\r"):
                raise UserError(
                    f"{file}:1: lines must end in a line feed, not only a carriage return: "
                    "convert the file with tr '\\r' '\\n'"
                )
            layout = text_layout(str(file), file.name, _decode(file, line), columns, separator)
            if layout.has_header:
                first_line, block = 2, rest
            types = _types(layout, block)
        try:
            yield _parse_times(file, block, layout, types)
        except UserError:
            raise
        except (pa.ArrowException, ValueError) as error:
            raise UserError(_explain(file, layout, types, first_line, block, error)) from error


def _parse_times(file: SourceFile, block: bytes, layout: Layout, types: Types) -> pa.Table:
    """`_parse`; switches to decimal times if whole ones are followed by decimal ones."""
    try:
        return _parse(block, layout, types)
    except (pa.ArrowException, ValueError) as error:
        if types.get("timestamp") != pa.int64() or _WHOLE_NUMBER.search(str(error)):
            raise
        table = _parse(block, layout, types | {"timestamp": pa.float64()})
    if pc.max(pc.abs(table["timestamp"])).as_py() >= EXACT:  # float64 rounds them
        raise UserError(
            f"{file}: decimal timestamps among whole ones above 2^53 cannot be compared exactly: "
            "write all in one way"
        )
    types["timestamp"] = pa.float64()
    return table


def _blocks(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Complete lines, about BLOCK_BYTES at a time, and the number of the first one."""
    with file.open() as stream:
        tail, line, unpacked = b"", 1, 0
        while True:
            read = stream.read(BLOCK_BYTES)
            unpacked += len(read)
            file.check_unpacked(unpacked)
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


def _types(layout: Layout, block: bytes) -> Types:
    """Column types; the first line decides between whole, decimal and date times."""
    types = {"user": _ID, "item": _ID, "rating": pa.float64(), "timestamp": pa.int64()}
    line = block.lstrip().partition(b"\n")[0].decode(errors="replace")
    fields = split_line(line, layout.separator)
    if "timestamp" in layout.places and len(fields) == layout.width:
        text = fields[layout.places["timestamp"]].strip()
        if not text.lstrip("-").isdigit():
            types["timestamp"] = pa.float64() if _is_number(text) else _TIME
    return {role: types[role] for role in ROLES if role in layout.places}


def _parse(block: bytes, layout: Layout, types: Types) -> pa.Table:
    """One block of lines as a table; raises pa.ArrowInvalid or ValueError at a malformed line."""
    if not block.strip():
        return pa.table({role: pa.array([], kind) for role, kind in types.items()})
    separator, quote = layout.separator, '"' if layout.separator in QUOTING else False
    if separator == "::":
        separator, block = "\t", block.replace(b"::", b"\t")
    names = [f"column {at}" for at in range(layout.width)]
    wanted = {role: names[layout.places[role]] for role in types}
    table = pacsv.read_csv(
        pa.py_buffer(block),
        pacsv.ReadOptions(column_names=names, block_size=1 << 21),
        pacsv.ParseOptions(delimiter=separator, quote_char=quote),
        pacsv.ConvertOptions(
            include_columns=list(wanted.values()),
            column_types={wanted[role]: kind for role, kind in types.items()},
        ),
    ).rename_columns(list(types))
    return _checked(table)


def _checked(table: pa.Table) -> pa.Table:
    """The table, with dates in nanoseconds; raises ValueError at a value that is not allowed."""
    for at, role in enumerate(table.column_names):
        column = table[role]
        if column.null_count:
            raise ValueError(f"a {role} is missing")
        if pa.types.is_temporal(column.type):
            table = table.set_column(at, role, column.cast(_TIME))
        elif pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py():
            raise ValueError(f"a {role} is not a finite number")
        elif pa.types.is_dictionary(column.type):
            for ids in (chunk.dictionary for chunk in column.chunks):
                ids.validate(full=True)  # Parquet may hold text that is no UTF-8
                if pc.any(pc.equal(pc.utf8_trim_whitespace(ids), "")).as_py():
                    raise ValueError(f"a {role} is empty")
    return table


def _explain(
    file: SourceFile, layout: Layout, types: Types, first_line: int, block: bytes, error: Exception
) -> str:
    """A message on the first malformed line of a block that could not be parsed."""
    for number, raw in enumerate(block.split(b"\n"), first_line):
        if not raw.strip():
            continue
        where = f"{file}:{number}"
        fields = split_line(_decode(file, raw, number).rstrip("\r"), layout.separator)
        if len(fields) != layout.width:
            return f"{where}: {len(fields)} fields where {layout.width} are expected"
        for role, kind in types.items():
            text = fields[layout.places[role]].strip()
            value = f"the {role} {text[:40]!r}"
            if kind == _ID and not text:
                return f"{where}: the {role} id is empty"
            if kind in (pa.float64(), pa.int64()) and not _is_number(text):
                return f"{where}: {value} is not a number"
            if kind == pa.int64() and not -(1 << 63) <= float(text) < 1 << 63:
                return f"{where}: {value} does not fit into 64 bits"
            if kind == _TIME and not _arrow_reads(text, _TIME):
                return f"{where}: {value} is neither a number nor a time between 1678 and 2262"
    last_line = first_line + block.count(b"\n")
    return f"{file}: lines {first_line} to {last_line} cannot be read: {str(error).splitlines()[0]}"


def _is_number(text: str) -> bool:
    """Whether Arrow reads a finite number; Python accepts more ("1_0")."""
    return _arrow_reads(text, pa.float64()) and math.isfinite(float(text))


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


def _is_parquet(file: SourceFile) -> bool:
    with file.open() as stream:
        beginning = stream.read(4)
    if file.name.lower().endswith((".parquet", ".pq")) and beginning not in (b"PAR1", b""):
        raise UserError(f"{file} is no Parquet file in spite of its name; is it complete?")
    return beginning == b"PAR1"


def _read_parquet(file: SourceFile, columns: str) -> Iterator[pa.Table]:
    if file.member:
        raise UserError(f"{file}: Parquet inside a zip cannot be streamed; unpack it first")
    try:
        with reading(file), pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            places = find_columns(str(file), names, columns)
            wanted = {role: names[place] for role, place in places.items()}
            row = 0
            for batch in parquet.iter_batches(BLOCK_ROWS, columns=list(wanted.values())):
                found = {role: batch.column(name) for role, name in wanted.items()}
                yield _checked_parquet(file, pa.table(found), row)
                row += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError, OverflowError, IndexError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _checked_parquet(file: SourceFile, table: pa.Table, first_row: int) -> pa.Table:
    for at, role in enumerate(table.column_names):
        column = table[role]
        if column.null_count:
            bad = first_row + int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise UserError(f"{file}: row {bad:,} (from 0) has no {role}")
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if role in ("user", "item"):
            if not any(fits(kind) for fits in _IS_ID):
                raise UserError(f"{file}: the {role} ids are {kind}, not text or whole numbers")
            column = column.cast(kind)
            if not pa.types.is_integer(kind) or kind == pa.uint64():
                column = column.cast(pa.string()).dictionary_encode()
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
