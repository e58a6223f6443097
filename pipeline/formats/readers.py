"""Read ratings from files of any format as one stream of Arrow tables.

Text: text.py; JSON: jsonlines.py; Parquet, Arrow and ORC: parquet.py; packed files: source_file.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.errors import UserError, warn
from pipeline.formats.jsonlines import is_json, read_json
from pipeline.formats.parquet import is_typed, read_typed
from pipeline.formats.source_file import SourceFile
from pipeline.formats.text import read_text
from pipeline.stage import Stage
from pipeline.tables.encoding import Encoding
from pipeline.tables.names import NoRatings, Wanted
from pipeline.tables.values import with_whole_times


class ReadRatings(Stage[pa.Table]):
    """Source stage: files -> tables of about half a million ratings, in file order.

    Columns: ``user`` and ``item`` (text or whole numbers, usually as a dictionary), and if the file
    has them ``rating`` (float64) and ``timestamp`` (int64 in the file's own unit; dates become
    nanoseconds), with ``fraction`` (float64) in tables with times that are not whole
    (pipeline/tables/values.py).

    Args:
        columns, separator: --columns and --separator; "": by well-known names.
        wanted: in their place, both and the conditions of --where.
        tell: called with each warning.

    Once streamed, ``trimmed`` is the number of ratings whose user or item id in a text file had
    blanks around it, which do not count; ``dates`` tells whether the times are dates;
    ``recognised`` are lines for the user on the files, the format and the columns.
    """

    def __init__(
        self,
        *files: SourceFile | str | Path,
        columns: str = "",
        separator: str = "",
        wanted: Wanted | None = None,
        tell: Callable[[str], None] = warn,
    ) -> None:
        super().__init__()
        self.files = [
            file if isinstance(file, SourceFile) else SourceFile(Path(file)) for file in files
        ]
        self.wanted, self.tell = wanted or Wanted(columns, separator), tell
        self.trimmed: Counter[str] = Counter()
        self.dates = False
        self.recognised: list[str] = []

    def stream(self) -> Iterator[pa.Table]:
        roles: list[str] = []
        any_rows = False
        self.trimmed.clear()
        self.recognised = [_files_line(self.files)]
        for file in self.files:
            rows = 0
            notes = self.recognised if file is self.files[0] else []
            for table in self._tables(file, notes):
                if file is self.files[0]:
                    self._warn_of(notes)
                rows += table.num_rows
                table, form = with_whole_times(table)
                self.dates = form != ""
                found = [role for role in table.column_names if role != "fraction"]
                found[-1] += form
                roles = roles or found
                if found != roles:
                    raise UserError(
                        f"{file} has the columns {', '.join(found)} where "
                        f"{self.files[0]} has {', '.join(roles)}: choose with --columns"
                    )
                yield table
            any_rows |= rows > 0
            if not rows and len(self.files) == 1 and self.wanted.rows is None:
                raise UserError(f"{file}: no ratings in it")
        if not any_rows:
            where = f" for which --where {self.wanted.rows.text!r}" if self.wanted.rows else ""
            raise NoRatings(f"{self.files[0].path}: no ratings in it{where}")

    def _tables(self, file: SourceFile, notes: list[str]) -> Iterator[pa.Table]:
        if is_typed(file):
            return read_typed(file, self.wanted, notes)
        if is_json(file):
            return read_json(file, self.wanted, notes)
        return read_text(file, self.wanted, self.trimmed, notes, Encoding(str(file), self.tell))

    def _warn_of(self, notes: list[str]) -> None:
        """Tell all but the lines on the files and on the format as warnings, and remove them."""
        for note in notes[2:]:
            self.tell(note)
        del notes[2:]


def _files_line(files: list[SourceFile]) -> str:
    if len(files) == 1:
        return f"read: {files[0]}"
    shown = [*files[:3], "...", files[-1]] if len(files) > 4 else files
    return f"read: {len(files):,} files in this order: {', '.join(map(str, shown))}"
