"""Tables of ratings: types of the columns, and checks of their values.

    user, item   text, usually as a dictionary, or whole numbers
    rating       float64
    timestamp    int64 or float64, or dates

A reader's tables pass through ``times_as_numbers(checked(table))``.
"""

import pyarrow as pa
import pyarrow.compute as pc

ID = pa.dictionary(pa.int32(), pa.string())
TIME = pa.timestamp("ns")
EXACT = 1 << 53  # float64 holds every whole number up to this


def checked(table: pa.Table) -> pa.Table:
    """The table, with dates in nanoseconds; raises ValueError at a value that is not allowed."""
    for at, role in enumerate(table.column_names):
        column = table[role]
        if column.null_count:
            raise ValueError(f"a {role} is missing")
        if pa.types.is_temporal(column.type):
            table = table.set_column(at, role, column.cast(TIME))
        elif pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py():
            raise ValueError(f"a {role} is not a finite number")
        elif pa.types.is_dictionary(column.type):
            for ids in (chunk.dictionary for chunk in column.chunks):
                ids.validate(full=True)  # Parquet may hold text that is no UTF-8
                if pc.any(pc.equal(pc.utf8_trim_whitespace(ids), "")).as_py():
                    raise ValueError(f"a {role} is empty")
    return table


def times_as_numbers(table: pa.Table) -> pa.Table:
    """The table with dates as int64 nanoseconds since 1970."""
    for at, name in enumerate(table.column_names):
        if pa.types.is_temporal(table[name].type):
            table = table.set_column(at, name, table[name].cast(pa.int64()))
    return table
