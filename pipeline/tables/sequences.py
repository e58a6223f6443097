"""A row a user, with lists -> a row a rating, in the order of the lists.

user  item           timestamp            user  item  timestamp
ann   [cup, hat]     [10, 20]      ->     ann   cup   10
                                          ann   hat   20
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

_BRACKETS = r"^\s*[\[({]|[\])}]\s*$"  # of a list written as text
_BETWEEN = r"[\s,;|]+"


def is_list(kind: pa.DataType) -> bool:
    types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_one(kind) for is_one in types)


def is_list_of_structs(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_struct(kind.value_type)


def field_names(schema: pa.Schema) -> dict[str, str]:
    """The column of each name: a list of structs has the names of its fields."""
    found: dict[str, str] = {}
    for field in schema:
        inside = field.type.value_type if is_list_of_structs(field.type) else []
        found |= {each.name: field.name for each in inside} or {field.name: field.name}
    return found


def open_structs(table: pa.Table) -> pa.Table:
    """The table with a column of lists for each field of its lists of structs (`field_names`)."""
    for name in table.column_names:
        if not is_list_of_structs(table[name].type):
            continue
        lists = table[name].combine_chunks()
        table = table.drop_columns([name])
        lengths = pc.fill_null(pc.list_value_length(lists), 0).cast(pa.int32())
        offsets = pc.cumulative_sum(pa.concat_arrays([pa.array([0], pa.int32()), lengths]))
        elements = lists.flatten()
        for field in elements.type:
            column = pa.ListArray.from_arrays(offsets, pc.struct_field(elements, field.name))
            if field.name not in table.column_names:
                table = table.append_column(field.name, column)
    return table


def explode(table: pa.Table) -> pa.Table:
    """The table with a row for each element of its lists; values that are no list are repeated.

    Raises:
        ValueError: a list is longer or shorter than the items of its row.
    """
    lists = [name for name in table.column_names if is_list(table[name].type)]
    if not lists:
        return table
    if "item" not in lists:
        raise ValueError(f"the {lists[0]} is a list and the item is none")
    table = table.combine_chunks()
    length = _lengths(table["item"])
    for name in lists:
        if not pc.all(pc.equal(_lengths(table[name]), length)).as_py():
            raise ValueError(f"the {name} list is not as long as the item list")
    rows = pc.list_parent_indices(table["item"])
    columns = {
        name: pc.list_flatten(table[name]) if name in lists else table[name].take(rows)
        for name in table.column_names
    }
    return pa.table(columns)


def _lengths(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.list_value_length(lists), 0).cast(pa.int64())


def split_lists(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """list<string> of lists written as text: "[1, 2]", "1 2", "['a', 'b']"."""
    text = pc.replace_substring_regex(text.cast(pa.string()), _BRACKETS, "")
    text = pc.utf8_trim_whitespace(pc.replace_substring_regex(text, "[\"']", ""))
    lists = pc.split_pattern_regex(text, _BETWEEN)
    return pc.if_else(pc.equal(text, ""), pa.scalar([], lists.type), lists)


def split_rows(lines: pa.ChunkedArray, separator: str, user: int, first: int) -> pa.Table:
    """Rows like ``user item item item``: the fields at `user`, and from `first` on, as columns."""
    lines = pc.utf8_rtrim(lines, " \t\r")
    fields = pc.split_pattern(lines, separator).combine_chunks()
    if isinstance(fields, pa.ChunkedArray):
        fields = fields.chunk(0)
    if pc.any(pc.less_equal(pc.list_value_length(fields), max(user, first))).as_py():
        raise ValueError("a row has no item")
    lists = pc.list_slice(fields, first)
    return pa.table({"user": pc.list_element(fields, user), "item": lists})


def looks_like_list(text: str) -> bool:
    """Whether a text is written like a list in brackets."""
    return re.match(r"^\s*\[.*\]\s*$", text, re.S) is not None
