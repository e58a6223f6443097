"""Titles and attributes of the items, from a table of them.

    --items_path movies.csv      movieId,title,genres: the title by its name, the rest attributes

GroupLens' movies.dat (``::``) and u.item (``|``) have no header: the title is the second field.
"""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.feather
import pyarrow.json as pajson
import pyarrow.parquet as pq

from pipeline.errors import UserError, warn
from pipeline.formats.jsonlines import is_json
from pipeline.formats.layout import split_line
from pipeline.formats.parquet import is_typed
from pipeline.formats.source_file import SourceFile, reading
from pipeline.formats.typed import without_views
from pipeline.remote import seekable
from pipeline.tables.encoding import as_cp1252
from pipeline.tables.names import canonical, known_places, list_names, several, untyped
from pipeline.tables.values import BLANKS

_SEPARATORS = {"dat": "::", "csv": ",", "item": "\t", "tsv": "\t"}
_TITLES = ("title", "name", "itemname", "producttitle", "movietitle", "description")
_LARGEST_BLOCK = (1 << 31) - 1  # of Arrow
_RESERVED = ("item", "title", "train_count", "validation_count")  # columns of the catalog


def read_titles(file: SourceFile, items: pa.StringArray) -> pa.StringArray:
    """string [V]: the titles of the items with these original ids, "" if the file has none.

    The title is the column called title or name, else the second field of a line in GroupLens'
    movies.dat (``::``), movies.csv and u.item (``|``) and in RecBole's ``.item`` (tab); the text is
    UTF-8 or Latin-1.
    """
    extension = file.name.rsplit(".", 1)[-1]
    separator = "|" if file.name == "u.item" else _SEPARATORS[extension]
    text = io.StringIO(_text(file), newline=None)
    lines = (line.rstrip("\n") for line in text)  # not at "\x85"
    fields = [split_line(line, separator) for line in lines if separator in line]
    place = 1
    if fields and extension in ("csv", "item") and separator != "|":
        names = [canonical(name) for name in fields[0]]
        place = next((names.index(name) for name in _TITLES[:2] if name in names), 1)
    titles = {line[0].strip(): line[place].strip() for line in fields if len(line) > place}
    return pa.array([titles.get(item, "") for item in items.to_pylist()], pa.string())


def read_items(file: SourceFile, items: pa.StringArray) -> tuple[pa.StringArray, pa.Table]:
    """Titles (string [V], "" if there is none) and attributes (V rows, null if there are none).

    The table has a header or is Parquet, Arrow or JSON lines. Its item column has a well-known
    name; the attributes are all columns but the item and the title.
    """
    table = _table(file)
    names = table.column_names
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(several(str(file), repeated[0], None))
    key = names[_item_place(file, names)]
    titles = next((name for name in names if canonical(name) in _TITLES and name != key), None)
    if clash := [name for name in names if name in _RESERVED and name not in (key, titles)]:
        raise UserError(f"{file}: rename the column {clash[0]!r}: the catalog has one of that name")
    ids = pc.utf8_trim(_texts(file, table, key), BLANKS)
    rows = pc.index_in(items, ids.combine_chunks())
    if rows.null_count == len(rows):
        raise UserError(
            f"{file}: none of the items is in its column {key!r}; is it the item column? Known "
            f"columns are {list_names(names)}"
        )
    if rows.null_count:
        warn(f"{file} has no row for {rows.null_count:,} of {len(items):,} items")
    if later := len(ids) - len(pc.unique(ids)):
        warn(f"{file}: {later:,} rows have the item of an earlier row; the first one is taken")
    found = table.take(rows).combine_chunks()
    title = pa.repeat("", len(items))
    if titles is not None:
        text = _texts(file, found, titles).fill_null("")
        title = pa.concat_arrays(text.chunks) if text.num_chunks else title
    rest = found.select([name for name in names if name not in (key, titles)])
    for at, attribute in enumerate(rest.schema):
        if "struct<>" in str(attribute.type):  # Parquet has no objects without fields
            text = _as_text(rest[at].to_pylist())
            rest = rest.set_column(at, attribute.name, text)
    return title.cast(pa.string()), rest


def _table(file: SourceFile) -> pa.Table:
    try:
        with reading(file):
            if is_typed(file):
                with file.open() as stream:
                    is_parquet = stream.read(4) == b"PAR1"
                read = pq.read_table if is_parquet else pyarrow.feather.read_table
                return without_views(read(seekable(file.path)))
            if is_json(file):
                with file.open() as stream:
                    return _of_json(stream.read())
            extension = file.name.rsplit(".", 1)[-1].lower()
            if extension not in ("csv", "item", "tsv"):
                raise UserError(
                    f"{file}: a table of items is .csv, .tsv, .item, .json, .parquet or .arrow"
                )
            text = _text(file)
            first, separator = text.partition("\n")[0], _SEPARATORS[extension]
            if separator not in first:
                separator = next((mark for mark in ",\t;|" if mark in first), separator)
            content = pa.py_buffer(text.encode())
            parse = pacsv.ParseOptions(delimiter=separator, newlines_in_values=extension == "csv")
            # A row of any length fits one block.
            whole = pacsv.ReadOptions(block_size=min(max(1, content.size), _LARGEST_BLOCK))
            header = pacsv.open_csv(content, whole, parse).schema.names
            kinds = {header[_item_place(file, header)]: pa.string()}
            table = pacsv.read_csv(content, whole, parse, pacsv.ConvertOptions(column_types=kinds))
            return table.rename_columns([untyped(name).strip() for name in table.column_names])
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from error


def _texts(file: SourceFile, table: pa.Table, name: str) -> pa.ChunkedArray:
    try:
        return table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(
            f"{file}: the column {name!r} holds {table[name].type}, not text or numbers: rename it"
        ) from error


def _of_json(content: bytes) -> pa.Table:
    """The table of lines of JSON, or of an array; a column with values of several types is text."""
    try:
        return pajson.read_json(pa.py_buffer(content))
    except pa.ArrowInvalid as error:
        try:
            text = content.decode("utf-8-sig").strip()
            lines = filter(str.strip, text.split("\n"))
            rows = json.loads(text) if text.startswith("[") else [*map(json.loads, lines)]
        except (ValueError, RecursionError):
            raise error from None
        if not all(isinstance(row, dict) for row in rows):
            raise
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return _as_text(values)


def _as_text(values: list[Any]) -> pa.Array:
    texts = (v if isinstance(v, str | None) else json.dumps(v, default=str) for v in values)
    return pa.array(texts, pa.string())


def _item_place(file: SourceFile, names: list[str]) -> int:
    plain = [canonical(name) for name in names]
    places = known_places("item", names) or [at for at, name in enumerate(plain) if name == "id"]
    if not places:
        raise UserError(
            f"{file}: cannot tell the item column among {list_names(names)}: call it item_id"
        )
    return places[0]


def _text(file: SourceFile) -> str:
    with file.open() as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return as_cp1252(content)  # as ratings, whose ids have to be the same text
