"""Rows with types (Parquet, Arrow, JSON, data frames) -> checked tables of ratings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.tables.names import OTHER_RATING, Wanted, find_columns, several, unread_time
from pipeline.tables.sequences import explode, field_names, open_structs
from pipeline.tables.times import OUT_OF_RANGE, date_mistake, read_dates
from pipeline.tables.values import checked, first_failing, is_number, time_mistake

_IS_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_IS_ID = (*_IS_TEXT, pa.types.is_integer)
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
_IS_DATE = (pa.types.is_timestamp, pa.types.is_date)


@dataclass(frozen=True)
class TypedColumns:
    """The columns of a source that `Wanted` asks for, and their conversion."""

    where: str  # the source's name in errors
    schema: pa.Schema
    wanted: Wanted
    keys: tuple[tuple[str, str], ...] = ()  # columns that are the same in each row

    @cached_property
    def fields(self) -> dict[str, str]:
        """The source's column of each name; a key is its own column."""
        found = field_names(self.schema)
        return found | {key: key for key, _ in self.keys if key not in found}

    @cached_property
    def roles(self) -> dict[str, str]:
        """Name of each role's column; also fields of lists of structs have names."""
        names = list(self.fields)
        own = len(field_names(self.schema))
        places = find_columns(self.where, names, self.wanted.columns, own)
        for name in (names[place] for place in places.values()):
            if self.schema.names.count(name) > 1:
                raise UserError(several(self.where, name, self.wanted.columns))
        return {role: names[place] for role, place in places.items()}

    def described(self, form: str) -> list[str]:
        """The columns as lines for the user."""
        columns = {role: self.fields[name] for role, name in self.roles.items()}
        kinds = {  # other columns may have the same name twice
            role: self.schema.field(column).type
            if column in self.schema.names
            else "a folder's name"
            for role, column in columns.items()
        }
        found = ", ".join(f"{role} = {name!r} ({kinds[role]})" for role, name in self.roles.items())
        lines = [f"format: {form}; columns: {found}"]
        if self.wanted.separator:
            lines.append(f"flags without effect: --separator (only with text, not with {form})")
        return lines + unread_time(list(self.fields), self.roles, self.wanted.columns)

    @cached_property
    def columns(self) -> list[str]:
        """The source's columns that are needed."""
        fields, rows = self.fields, self.wanted.rows
        conditions = list(rows.columns) if rows else []
        if rows and (missing := rows.missing(list(fields))):
            raise UserError(self.wanted.no_column(self.where, missing[0], list(fields)))
        needed = dict.fromkeys(fields[name] for name in (*self.roles.values(), *conditions))
        return [name for name in needed if name in self.schema.names]

    def ratings(self, table: pa.Table, place: Callable[[int], str]) -> pa.Table:
        """A checked table; in errors `place` names a row of the given one."""
        try:
            return self._ratings(table)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(self._explain(table, place, error)) from error

    def check_times(self, times: pa.Table, place: Callable[[int], str]) -> None:
        """Raise the error of the first time that `ratings` would refuse."""
        only = TypedColumns(self.where, times.schema, self.wanted)
        only.__dict__["roles"] = {"timestamp": times.column_names[0]}
        only.ratings(times, place)

    def _ratings(self, table: pa.Table) -> pa.Table:
        table = open_structs(without_views(table))
        for key, value in self.keys:
            if key not in table.column_names:
                table = table.append_column(key, pa.repeat(value, len(table)))
        if self.wanted.rows is not None:
            table = table.filter(self.wanted.rows.holds(table))
        table = pa.table({role: table[name] for role, name in self.roles.items()})
        table = explode(table)
        for at, (role, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
            table = table.set_column(at, role, self._converted(role, column))
        return checked(table, self.wanted.needs_rating)

    def _converted(self, role: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        kind = column.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
            column = column.cast(kind)
        is_text = _is(kind, _IS_TEXT)
        if column.null_count and (role != "rating" or self.wanted.needs_rating):
            raise ValueError(f"a {role} is missing")
        if pa.types.is_null(kind):
            return column.cast(pa.float64() if role == "rating" else pa.string())
        if role in ("user", "item"):
            if not _is(kind, _IS_ID):
                raise UserError(
                    f"{self.where}: the {role} ids are {kind}, not text or whole numbers"
                )
            if not pa.types.is_integer(kind) or kind == pa.uint64():
                column = column.cast(pa.string()).dictionary_encode()
        elif role == "rating":
            if not (_is(kind, _IS_NUMBER) or pa.types.is_boolean(kind)):
                advice = "" if self.wanted.columns is None else f": {OTHER_RATING}"
                raise UserError(f"{self.where}: the rating column is {kind}, not a number{advice}")
            if kind == pa.float32() or pa.types.is_decimal(kind):  # 4.1 is 4.1, as --min_rating is
                column = column.cast(pa.string())
            column = column.cast(pa.float64())
        elif is_text:
            column = column.cast(pa.string())
            if len(column) and not is_number(column[0].as_py().strip()):
                column = read_dates(column)
        elif not _is(kind, (*_IS_NUMBER, *_IS_DATE)):
            raise UserError(f"{self.where}: the timestamp column is {kind}, not a number or a date")
        elif pa.types.is_temporal(kind):
            return _in_utc(column)
        return column

    def _explain(self, table: pa.Table, place: Callable[[int], str], error: ValueError) -> str:
        """A message on the first row that cannot be converted."""
        row = first_failing(len(table), lambda start, end: bool(self._mistake(table[start:end])))
        one = table.slice(row, 1)
        reason = self._mistake(one) or str(error).splitlines()[0]
        if not self._mistake(one):  # it does not fit to the rows before it
            return self._explain_times(table, place, reason)
        if found := [role for role in self.roles if reason == f"a {role} is missing"]:
            return f"{place(row)} has no {found[0]}"
        return f"{place(row)}: {self._of_time(one) or reason}"

    def _explain_times(self, table: pa.Table, place: Callable[[int], str], reason: str) -> str:
        """A message where each row is right, but the rows are written in different ways."""
        row = first_failing(len(table), lambda start, end: bool(self._mistake(table[:end])))
        if "is not a number" in reason or "is no date" in reason:
            reason = "some times are numbers and others are dates"
        return f"{place(row)}: {reason} ({self.roles.get('timestamp', '')})"

    def _of_time(self, one: pa.Table) -> str:
        """What is wrong with the time of a row, with its text; "" if nothing is."""
        if self.roles.get("timestamp", "") not in field_names(self.schema):
            return ""
        time = _elements(open_structs(without_views(one))[self.roles["timestamp"]])
        if len(time) != 1 or time.null_count:
            return ""
        text = str(time.cast(pa.string())[0])
        if pa.types.is_temporal(time.type):
            try:
                checked(pa.table({"timestamp": _in_utc(time)}))
                return ""
            except ValueError:
                return f"the timestamp {text} {OUT_OF_RANGE}"
        mistake = time_mistake(text)
        if mistake and _is(time.type, _IS_TEXT) and not is_number(text.strip()):
            mistake = date_mistake(text)
        return f"the timestamp {text} {mistake}" if mistake else ""

    def _mistake(self, table: pa.Table) -> str:
        """Why the table cannot be converted, "" if it can."""
        try:
            self._ratings(table)
        except ValueError as error:
            return str(error).splitlines()[0]
        return ""


def without_views(table: pa.Table) -> pa.Table:
    """The table without string and binary views, for which Arrow lacks most functions."""
    kinds = [_without_view(field.type) for field in table.schema]
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))


def _without_view(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        values = _without_view(kind.value_type)
        return kind if values == kind.value_type else pa.dictionary(kind.index_type, values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        values = _without_view(kind.value_type)
        is_plain = values == kind.value_type and not pa.types.is_list_view(kind)
        return kind if is_plain else pa.large_list(values)
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_view(field.type)) for field in kind])
    return kind


def _elements(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The elements of a column of lists; another column as it is."""
    return pc.list_flatten(column) if pa.types.is_nested(column.type) else column


def _in_utc(times: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times of any zone in UTC; those without a zone stay without."""
    if pa.types.is_timestamp(times.type) and times.type.tz is not None:
        return times.cast(pa.timestamp(times.type.unit, "UTC"))
    return times


def _is(kind: pa.DataType, kinds: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(each(kind) for each in kinds)
