"""Read ratings from JSON: an object a line, or an array of objects. Columns: typed.py.

Arrow parses blocks of lines with the types that their first objects have; a block in which another
object has another type is parsed again, object by object.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson

from pipeline.errors import UserError
from pipeline.formats.blocks import BOM, read_blocks
from pipeline.formats.source_file import SourceFile
from pipeline.formats.typed import TypedColumns
from pipeline.tables.names import Wanted
from pipeline.tables.sequences import field_names

JSON_NAMES = (".json", ".jsonl", ".ndjson", ".jl")
_SAMPLE = 200  # objects whose names and types are looked at
_NO_SEPARATOR = ""


def is_json(file: SourceFile) -> bool:
    """Whether a file with JSON's name begins like an object or an array of objects."""
    if not file.name.lower().endswith(JSON_NAMES):
        return False
    return _beginning(file)[:1] in (b"{", b"[", b"")


def _beginning(file: SourceFile) -> bytes:
    with file.open() as stream:
        return stream.read(4096).removeprefix(BOM).lstrip()


def read_json(file: SourceFile, wanted: Wanted, notes: list[str]) -> Iterator[pa.Table]:
    """Checked tables with a column for each role."""
    if _beginning(file)[:1] == b"[":
        yield from _read_array(file, wanted, notes)
        return
    typed = None
    for first_line, block in read_blocks(file, _NO_SEPARATOR):
        lines = _Lines(file, block, first_line)
        if not len(lines):
            continue
        if typed is None:
            typed = _typed(
                [lines.object(at) for at in range(min(_SAMPLE, len(lines)))], file, wanted
            )
            notes += typed.described("JSON lines")
        table = _parse(block, lines, typed)
        if table is None:
            table = _table([lines.object(at) for at in range(len(lines))], typed, lines.place)
        yield typed.ratings(table, lines.place)


def _parse(block: bytes, lines: "_Lines", typed: TypedColumns) -> pa.Table | None:
    """The needed columns by Arrow; None if an object has other types than the first ones."""
    schema = pa.schema([typed.schema.field(name) for name in typed.columns])
    if any(_has_floats(schema.field(name).type) for name in _times(typed)):
        return None  # Arrow would round them
    options = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pajson.ReadOptions(block_size=max(1 << 20, lines.longest + 2))
    try:
        table = pajson.read_json(pa.py_buffer(block), read, options)
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    return table.select(typed.columns) if len(table) == len(lines) else None


def _typed(objects: list[dict[str, Any]], file: SourceFile, wanted: Wanted) -> TypedColumns:
    names = dict.fromkeys(name for each in objects for name in each)
    kinds = [(name, _kind([each.get(name) for each in objects])) for name in names]
    return TypedColumns(str(file), pa.schema(kinds), wanted, file.keys)


def _times(typed: TypedColumns) -> list[str]:
    """The column of the times."""
    role = typed.roles.get("timestamp", "")
    return [column for name, column in field_names(typed.schema).items() if name == role]


class _Lines:
    """The lines of a block that are not blank."""

    def __init__(self, file: SourceFile, block: bytes, first_line: int) -> None:
        self.file = file
        lines = enumerate(block.split(b"\n"), first_line)
        kept = [(number, line) for number, line in lines if line.strip()]
        self.numbers, self.lines = [each[0] for each in kept], [each[1] for each in kept]
        self.longest = max(map(len, self.lines), default=0)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        return f"{self.file}:{self.numbers[row]}"

    def object(self, row: int) -> dict[str, Any]:
        try:
            found = json.loads(self.lines[row], parse_float=_Number, parse_constant=_Number)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place(row)}: not UTF-8 text") from error
        except (ValueError, RecursionError) as error:
            reason = str(error).split(":")[0]
            start = self.lines[row][:40]
            raise UserError(f"{self.place(row)}: not JSON ({reason}): {start!r}") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.place(row)}: a JSON {type(found).__name__}, not an object")
        return found


class _Number(str):
    """A number with a point or an exponent, as it is written."""


def _kind(values: list[Any]) -> pa.DataType:
    """The type that all of these values have; text if they differ."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, list) for value in known):
        return pa.list_(_kind([each for value in known for each in value]))
    if known and all(isinstance(value, dict) for value in known):
        names = dict.fromkeys(name for each in known for name in each)
        return pa.struct([(name, _kind([each.get(name) for each in known])) for name in names])
    kinds = {type(value) for value in known}
    if kinds in ({bool}, {int}):
        whole = all(-(1 << 63) <= value < 1 << 63 for value in known)
        return pa.bool_() if kinds == {bool} else pa.int64() if whole else pa.string()
    return pa.float64() if kinds and kinds <= {int, _Number} else pa.string()


def _has_floats(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _has_floats(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_floats(field.type) for field in kind)
    return pa.types.is_floating(kind)


def _table(
    objects: list[dict[str, Any]], typed: TypedColumns, place: Callable[[int], str]
) -> pa.Table:
    """The needed columns, object by object. Times that are not whole become text: exact."""
    columns = {}
    for name in typed.columns:
        values = [each.get(name) for each in objects]
        kind = pa.float64() if name == typed.roles.get("rating") else _kind(values)
        is_time = name in _times(typed)
        found = []
        for at, value in enumerate(values):
            try:
                found.append(_value(value, kind, is_time))
            except ValueError as error:
                text = f"the {name} {str(value)[:40]!r}"
                raise UserError(f"{place(at)}: {text} {error}") from error
        columns[name] = pa.array(found, _without_floats(kind) if is_time else kind)
    return pa.table(columns)


def _without_floats(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_without_floats(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_floats(field.type)) for field in kind])
    return pa.string() if pa.types.is_floating(kind) else kind


def _value(value: Any, kind: pa.DataType, is_time: bool) -> Any:
    """A JSON value as Arrow takes it; raises ValueError."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_value(each, kind.value_type, is_time) for each in value]
    if pa.types.is_struct(kind):
        return {each.name: _value(value.get(each.name), each.type, is_time) for each in kind}
    if pa.types.is_floating(kind) and not is_time:
        if isinstance(value, (int, _Number)):
            return float(value)
        raise ValueError("is not a number")
    if pa.types.is_string(kind) or pa.types.is_floating(kind):
        if isinstance(value, (list, dict)):
            raise ValueError(f"is a JSON {type(value).__name__}, unlike others")
        return str(value) if isinstance(value, str) else json.dumps(value)
    return value


def _read_array(file: SourceFile, wanted: Wanted, notes: list[str]) -> Iterator[pa.Table]:
    """Tables of an array of objects, which is read whole."""
    with file.open() as stream:
        content = stream.read()
    file.check_unpacked(len(content))
    decoder = json.JSONDecoder(parse_float=_Number, parse_constant=_Number)
    try:
        text = content.decode("utf-8-sig")
        at, starts, objects = text.index("[") + 1, [], []
        while (at := _next(text, at)) < len(text) and text[at] != "]":
            starts.append(at)
            found, at = decoder.raw_decode(text, at)
            objects.append(found)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        reason = str(error).split(":")[0]
        raise UserError(f"{file}:{line}: not JSON ({reason})") from error

    def place(row: int) -> str:
        return f"{file}:{text.count(chr(10), 0, starts[row]) + 1}"

    for row, each in enumerate(objects):
        if not isinstance(each, dict):
            raise UserError(f"{place(row)}: a JSON {type(each).__name__}, not an object")
    if objects:
        typed = _typed(objects[:_SAMPLE], file, wanted)
        notes += typed.described("a JSON array")
        yield typed.ratings(_table(objects, typed, place), place)


def _next(text: str, at: int) -> int:
    """The place of the next character that is neither a blank nor a comma."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
