"""Files of rows, complete or absent: Parquet, CSV or JSON lines, by the file's extension.

One thread makes the rows of a block, another writes them, while the device scores the next ones.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from model.distributed import writing
from model.serving.rows import ItemRows, Lists
from pipeline.errors import UserError
from pipeline.files import check_writable, whole_file

_ROW_GROUP = 1 << 20
_BLOCKS_AHEAD = 4

Sink = Callable[[pa.Table], None]


def check_output(path: Path) -> None:
    """Check before the model is loaded that a file can be written; UserError if not."""
    with writing(path, "--output"):
        if path.is_dir():
            raise UserError(f"--output {path} is a folder: name a file in it")
        check_writable(path)


@contextmanager
def row_writer(path: Path, rows: ItemRows) -> Iterator[Callable[[Lists], None]]:
    """A function that writes the rows of a block; the file appears when the ``with`` block ends.

    Raises:
        UserError: the file cannot be written.
    """
    sinks: dict[str, Callable[[IO[bytes], pa.Schema], AbstractContextManager[Sink]]]
    sinks = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
    waiting: deque[Future[None]] = deque()
    with (
        writing(path, "--output"),
        whole_file(path) as file,
        sinks[path.suffix.lower()](file, rows.schema) as sink,
        ThreadPoolExecutor(1) as maker,
        ThreadPoolExecutor(1) as writer,
    ):

        def write(lists: Lists) -> None:
            if len(waiting) >= _BLOCKS_AHEAD:
                waiting.popleft().result()
            made = maker.submit(rows.table, lists)
            waiting.append(writer.submit(lambda: sink(made.result())))

        yield write
        while waiting:
            waiting.popleft().result()


@contextmanager
def _parquet(file: IO[bytes], schema: pa.Schema) -> Iterator[Sink]:
    """Groups of about a million rows."""
    group: list[pa.Table] = []
    # Numbers of a score, most of which occur once, would fill a dictionary in vain.
    repeated = [name for name in schema.names if name != "score"]
    with pq.ParquetWriter(file, schema, use_dictionary=repeated) as writer:

        def flush() -> None:
            writer.write_table(pa.concat_tables([schema.empty_table(), *group]))
            group.clear()

        def sink(table: pa.Table) -> None:
            group.append(table)
            if sum(each.num_rows for each in group) >= _ROW_GROUP:
                flush()

        yield sink
        flush()


@contextmanager
def _csv(file: IO[bytes], schema: pa.Schema) -> Iterator[Sink]:
    with pacsv.CSVWriter(file, schema) as writer:
        yield writer.write_table


@contextmanager
def _json_lines(file: IO[bytes], schema: pa.Schema) -> Iterator[Sink]:
    def sink(table: pa.Table) -> None:
        parts: list[pa.Array | str] = []
        for at, name in enumerate(schema.names):
            parts += [("{" if at == 0 else ", ") + f'"{name}": ', _json(table[name])]
        lines = pc.binary_join_element_wise(*parts, "}\n", "")
        if len(lines):
            # The texts are one after the other in the array's memory.
            size = pc.sum(pc.binary_length(lines)).as_py()
            file.write(memoryview(lines.buffers()[2])[:size])

    yield sink


def _json(column: pa.ChunkedArray) -> pa.Array:
    """The values as JSON; each different text is escaped once."""
    if column.type != pa.string():
        return column.cast(pa.string()).combine_chunks()
    encoded = column.combine_chunks().dictionary_encode()
    texts = [json.dumps(text, ensure_ascii=False) for text in encoded.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(encoded.indices)
