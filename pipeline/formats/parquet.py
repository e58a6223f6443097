"""Read ratings from Parquet, ORC and Arrow (IPC, Feather) files, and from streams of Arrow tables.

The conversion of their columns: typed.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.orc
import pyarrow.parquet as pq

from pipeline.errors import UserError, warn
from pipeline.formats.source_file import SourceFile, reading
from pipeline.formats.typed import TypedColumns
from pipeline.remote import seekable
from pipeline.stage import Stage
from pipeline.tables.names import Wanted
from pipeline.tables.values import with_whole_times

_BLOCK_ROWS = 1 << 19
_MAGIC, _ENCRYPTED, _ORC = b"PAR1", b"PARE", b"ORC"
_ARROW_FILE, _ARROW_STREAM, _FEATHER_1 = b"ARRO", b"\xff\xff\xff\xff", b"FEA1"
_NAMES = {
    (".parquet", ".pq"): ("Parquet", (_MAGIC,)),
    (".orc",): ("ORC", (_ORC,)),
    (".arrow", ".feather", ".ipc", ".arrows"): ("Arrow", (_ARROW_FILE, _ARROW_STREAM, _FEATHER_1)),
}
_BROKEN = (pa.ArrowException, UnicodeDecodeError, OverflowError, IndexError)


def is_typed(file: SourceFile) -> bool:
    """Whether a file's first bytes are those of a Parquet, an ORC or an Arrow file."""
    with file.open() as stream:
        beginning = stream.read(4)
    if beginning == _ENCRYPTED:
        raise UserError(f"{file} is encrypted: decrypt it first")
    for endings, (name, magics) in _NAMES.items():
        if file.name.lower().endswith(endings) and beginning and not beginning.startswith(magics):
            raise UserError(f"{file} is no {name} file in spite of its name; is it complete?")
    return _form(beginning) != ""


def _form(beginning: bytes) -> str:
    """The format of a file with these first bytes, "" if it is none of these."""
    found = (name for name, magics in _NAMES.values() if beginning.startswith(magics))
    return next(found, "")


def read_typed(file: SourceFile, wanted: Wanted, notes: list[str]) -> Iterator[pa.Table]:
    """Checked tables of about half a million ratings, with a column for each role."""
    with reading(file), file.path.open("rb") as stream:
        beginning = stream.read(4)
    form = _form(beginning)
    if file.member or not form:
        with file.open() as stream:
            form = _form(stream.read(4))
        raise UserError(f"{file}: {form} in a zip or gzip cannot be streamed; unpack it first")
    try:
        with reading(file):
            if form == "Parquet":
                yield from _read_parquet(file, wanted, notes)
            elif form == "ORC":
                yield from _read_orc(file, wanted, notes)
            else:
                yield from _read_arrow(file, beginning, wanted, notes)
    except _BROKEN as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _read_parquet(file: SourceFile, wanted: Wanted, notes: list[str]) -> Iterator[pa.Table]:
    # With pre_buffer what is read of the file stays in memory until it is closed.
    with pq.ParquetFile(
        seekable(file.path), pre_buffer=False, page_checksum_verification=True
    ) as parquet:
        typed = TypedColumns(str(file), parquet.schema_arrow, wanted, file.keys)
        notes += typed.described("Parquet")
        time = typed.roles.get("timestamp")
        if time is not None:
            _check_int96(file, parquet, time, typed)
        batches = parquet.iter_batches(_BLOCK_ROWS, columns=typed.columns)
        yield from _ratings(typed, batches)


def _read_orc(file: SourceFile, wanted: Wanted, notes: list[str]) -> Iterator[pa.Table]:
    with seekable(file.path) as stream:
        orc = pyarrow.orc.ORCFile(stream)
        typed = TypedColumns(str(file), orc.schema, wanted, file.keys)
        notes += typed.described("ORC")
        stripes = (orc.read_stripe(at, typed.columns) for at in range(orc.nstripes))
        yield from _ratings(typed, stripes)


def _read_arrow(
    file: SourceFile, beginning: bytes, wanted: Wanted, notes: list[str]
) -> Iterator[pa.Table]:
    if beginning == _FEATHER_1:
        table = pyarrow.feather.read_table(seekable(file.path))
        yield from _arrow_ratings(file, table.schema, table.to_batches(), wanted, notes)
        return
    local = isinstance(file.path, Path)
    with pa.memory_map(str(file.path)) if local else seekable(file.path) as stream:
        if beginning == _ARROW_STREAM:
            source = pa.ipc.open_stream(stream)
            yield from _arrow_ratings(file, source.schema, source, wanted, notes)
            return
        source = pa.ipc.open_file(stream)
        batches = map(source.get_batch, range(source.num_record_batches))
        yield from _arrow_ratings(file, source.schema, batches, wanted, notes)


def _arrow_ratings(
    file: SourceFile, schema: pa.Schema, batches: Any, wanted: Wanted, notes: list[str]
) -> Iterator[pa.Table]:
    typed = TypedColumns(str(file), schema, wanted, file.keys)
    notes += typed.described("Arrow")
    return _ratings(typed, batches)


def _ratings(typed: TypedColumns, batches: Any) -> Iterator[pa.Table]:
    first = 0
    for batch in batches:
        table = pa.table(batch.select(typed.columns))
        if len(table):
            yield typed.ratings(table, partial(_place, typed.where, first))
        first += len(table)


def _place(where: str, first: int, row: int) -> str:
    return f"{where}: row {first + row:,} (from 0)"


class ReadTable(Stage[pa.Table]):
    """Source stage: anything with an Arrow stream -> tables of ratings, as `ReadRatings` makes.

    A data frame of pandas or polars, an Arrow table or reader, a DuckDB relation.
    """

    def __init__(self, data: Any, wanted: Wanted) -> None:
        super().__init__()
        self.data, self.wanted = data, wanted
        self.dates = False  # once streamed: whether the times are dates

    def stream(self) -> Iterator[pa.Table]:
        try:
            reader = pa.RecordBatchReader.from_stream(self.data)
            typed = TypedColumns("the table", reader.schema, self.wanted)
            for line in typed.described("a table")[1:]:
                warn(line)
            for table in _ratings(typed, reader):
                table, form = with_whole_times(table)
                self.dates = form != ""
                yield table
        except _BROKEN as error:
            raise UserError(f"cannot read the table: {str(error).splitlines()[0]}") from error


def _check_int96(file: SourceFile, parquet: pq.ParquetFile, name: str, typed: TypedColumns) -> None:
    """Refuse times of the old type INT96 (Spark, Hive) that Arrow would wrap around 64 bits."""
    columns = [parquet.schema.column(at) for at in range(len(parquet.schema))]
    if not any(each.path == name and each.physical_type == "INT96" for each in columns):
        return
    with pq.ParquetFile(
        seekable(file.path), pre_buffer=False, coerce_int96_timestamp_unit="us"
    ) as coarse:
        row = 0
        for batch in coarse.iter_batches(_BLOCK_ROWS, columns=[name]):
            times = pa.table({name: batch.column(0).fill_null(0)})
            typed.check_times(times, partial(_place, typed.where, row))
            row += len(times)
