"""Read ratings from Parquet files, as a stream of Arrow tables; columns: layout.py."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.sources.layout import find_columns
from pipeline.sources.source_file import SourceFile, reading
from pipeline.sources.values import OUT_OF_RANGE, checked, first_failing, time_mistake

_BLOCK_ROWS = 1 << 19
_MAGIC, _ENCRYPTED = b"PAR1", b"PARE"
_IS_ID = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
_IS_DATE = (pa.types.is_timestamp, pa.types.is_date)


def is_parquet(file: SourceFile) -> bool:
    """Whether a file's first bytes are those of a Parquet file."""
    with file.open() as stream:
        beginning = stream.read(4)
    if beginning == _ENCRYPTED:
        raise UserError(f"{file} is encrypted: decrypt it first")
    if file.name.lower().endswith((".parquet", ".pq")) and beginning not in (_MAGIC, b""):
        raise UserError(f"{file} is no Parquet file in spite of its name; is it complete?")
    return beginning == _MAGIC


def read_parquet(file: SourceFile, columns: str) -> Iterator[pa.Table]:
    """Checked tables of about half a million ratings, with a column for each role."""
    with reading(file), file.path.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise UserError(f"{file}: Parquet in a zip or gzip cannot be streamed; unpack it first")
    try:
        with reading(file), pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            places = find_columns(str(file), names, columns)
            wanted = {role: names[place] for role, place in places.items()}
            if "timestamp" in wanted:
                _check_int96(file, parquet, wanted["timestamp"])
            row = 0
            for batch in parquet.iter_batches(_BLOCK_ROWS, columns=list(wanted.values())):
                found = {role: batch.column(name) for role, name in wanted.items()}
                yield of_arrow(file, pa.table(found), row)
                row += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError, OverflowError, IndexError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def of_arrow(source: SourceFile | str, table: pa.Table, first_row: int = 0) -> pa.Table:
    """Ratings in Arrow's types as ids, float64 ratings and exact times (values.py).

    Args:
        source: for messages.
        table: with a column for each role.
        first_row: of the table in the source.

    Raises:
        UserError: a value is missing, or is not allowed in its column.
    """
    return _checked(source, _converted(source, table, first_row), first_row)


def _converted(file: SourceFile | str, table: pa.Table, first_row: int) -> pa.Table:
    for at, role in enumerate(table.column_names):
        column = table[role]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if column.null_count:
            bad = first_row + int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise UserError(f"{file}: row {bad:,} (from 0) has no {role}")
        column = column.cast(kind)
        if role in ("user", "item"):
            if not any(fits(kind) for fits in _IS_ID):
                raise UserError(f"{file}: the {role} ids are {kind}, not text or whole numbers")
            if not pa.types.is_integer(kind) or kind == pa.uint64():
                column = column.cast(pa.string()).dictionary_encode()
        elif role == "rating" and any(fits(kind) for fits in _IS_NUMBER):
            if kind == pa.float32() or pa.types.is_decimal(kind):  # 4.1 is 4.1, as --min_rating is
                column = column.cast(pa.string())
            column = column.cast(pa.float64())
        elif not any(fits(kind) for fits in (*_IS_NUMBER, *_IS_DATE)) or role == "rating":
            allowed = "a number" if role == "rating" else "a number or a date"
            raise UserError(f"{file}: the {role} column is {kind}, not {allowed}")
        table = table.set_column(at, role, column)
    return table


def _checked(file: SourceFile | str, table: pa.Table, first_row: int) -> pa.Table:
    try:
        return checked(table)
    except ValueError as error:
        raise UserError(_explain(file, table, first_row, error)) from error


def _explain(file: SourceFile | str, table: pa.Table, first_row: int, error: ValueError) -> str:
    """A message on the first row that `checked` refuses."""
    row = first_failing(len(table), lambda start, end: bool(_mistake(table[start:end])))
    table = table.slice(row, 1)
    reason = _mistake(table) or str(error).splitlines()[0]
    if "timestamp" in table.column_names and _mistake(table.select(["timestamp"])):
        time = table["timestamp"]
        text = str(time.cast(pa.string())[0])
        is_date = pa.types.is_temporal(time.type)
        reason = f"the timestamp {text} {OUT_OF_RANGE if is_date else time_mistake(text)}"
    return f"{file}: row {first_row + row:,} (from 0): {reason}"


def _mistake(table: pa.Table) -> str:
    """Why `checked` refuses the table, "" if it does not."""
    try:
        checked(table)
    except ValueError as error:
        return str(error).splitlines()[0]
    return ""


def _check_int96(file: SourceFile, parquet: pq.ParquetFile, name: str) -> None:
    """Refuse times of the old type INT96 (Spark, Hive) that Arrow would wrap around 64 bits."""
    columns = [parquet.schema.column(at) for at in range(len(parquet.schema))]
    if not any(each.path == name and each.physical_type == "INT96" for each in columns):
        return
    with pq.ParquetFile(file.path, coerce_int96_timestamp_unit="us") as coarse:
        row = 0
        for batch in coarse.iter_batches(_BLOCK_ROWS, columns=[name]):
            times = pa.table({"timestamp": batch.column(0).fill_null(0)})
            row += len(_checked(file, times, row))
