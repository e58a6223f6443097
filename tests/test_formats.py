"""A table of formats: in each, the same three users with the same histories."""

import bz2
import datetime
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.preparation.prepare import prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig

HISTORIES = {
    "ann": ["cup", "hat", "pen"],
    "bob": ["hat", "cup", "pen", "cup"],
    "zoe": ["pen", "hat", "cup"],
}
START = 1_400_000_000
# user, item, rating, seconds; not in the order of time.
ROWS = [
    (user, item, 4, START + 1000 * place)
    for user, items in HISTORIES.items()
    for place, item in reversed(list(enumerate(items)))
]
IN_ORDER = sorted(ROWS, key=lambda row: row[3])
COLUMNS = ["user", "item", "rating", "timestamp"]


def when(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def text(rows: list[tuple], header: str = "", separator: str = ",") -> bytes:
    lines = [header] * bool(header) + [separator.join(map(str, row)) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def dated(write: Callable[[datetime.datetime], Any]) -> bytes:
    """CSV with the times as `write` writes them."""
    rows = [(user, item, f'"{write(when(time))}"') for user, item, _, time in ROWS]
    return text(rows, "user,item,date")


def objects(names: list[str], rows: list[tuple] = ROWS) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in rows]


def lines_of_json(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[tuple] = ROWS, names: list[str] = COLUMNS) -> pa.Table:
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def parquet(content: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(content, stream)
    return stream.getvalue()


def arrow(content: pa.Table, stream: bool = False) -> bytes:
    sink = pa.BufferOutputStream()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, content.schema) as writer:
        writer.write_table(content)
    return sink.getvalue().to_pybytes()


def feather(content: pa.Table, version: int = 2) -> bytes:
    stream = io.BytesIO()
    pyarrow.feather.write_feather(content, stream, version=version)
    return stream.getvalue()


def packed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


CSV = text(ROWS, ",".join(COLUMNS))
JSON = lines_of_json(objects(COLUMNS))
BARE = ",".join
PARTS = [ROWS[:3], ROWS[3:5], ROWS[5:]]
SEQUENCES = [
    {"user": user, "items": items, "times": [START + 9 * at for at, _ in enumerate(items)]}
    for user, items in HISTORIES.items()
]
LISTS = table([(each["user"], each["items"]) for each in SEQUENCES], ["user_id", "item_ids"])
SHUFFLED = [
    {
        "user": each["user"],
        "events": [
            {"item": item, "ts": time}
            for time, item in reversed(list(zip(each["times"], each["items"], strict=True)))
        ],
    }
    for each in SEQUENCES
]
UUID = "1b671a64-40d5-491e-99b0-da01ff1f3341"


def uuid_parts(ending: str, write: Callable[[list[tuple]], bytes]) -> dict[str, bytes]:
    names = [f"out/part-{at:05}-{UUID}-c000.{ending}" for at in (2, 10, 11)]
    hidden = {"out/_SUCCESS": b"", "out/.part-00002.crc": b"x", "out/_temporary/0/x.csv": b"x"}
    return dict(zip(names, map(write, PARTS), strict=True)) | hidden


def columns(**changed: pa.Array) -> pa.Table:
    content = table()
    for name, column in changed.items():
        content = content.set_column(content.column_names.index(name), name, column)
    return content


NANO = [row[3] * 10**9 for row in ROWS]
# name: files, flags (path: the first file's, unless given)
FORMATS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    # separators and headers
    "CSV": ({"r.csv": CSV}, {}),
    "TSV": ({"r.tsv": CSV.replace(b",", b"\t")}, {}),
    "semicolons": ({"r.csv": CSV.replace(b",", b";")}, {"separator": ";"}),
    "RecBole": (
        {"r.inter": text(ROWS, "user_id:token\titem_id:token\tr:float\ttimestamp:float", "\t")},
        {},
    ),
    "GroupLens .dat": ({"ratings.dat": text(ROWS, separator="::")}, {}),
    "GroupLens u.data": ({"u.data": text(ROWS, separator="\t")}, {}),
    "pairs in time order": ({"r.txt": text([row[:2] for row in IN_ORDER], separator=" ")}, {}),
    "no header, third column a time": (
        {"r.txt": text([(row[0], row[1], row[3]) for row in ROWS], separator=" ")},
        {},
    ),
    "no header, third column a rating": (
        {"r.txt": text([row[:3] for row in IN_ORDER], separator="\t")},
        {},
    ),
    "no header, user item time rating": (
        {"r.dat": text([(row[0], row[1], row[3], 5) for row in ROWS], separator="::")},
        {},
    ),
    "no header, third column a date": (
        {"r.txt": text([(row[0], row[1], when(row[3]).isoformat()) for row in ROWS], "", "\t")},
        {},
    ),
    "columns by name": (
        {"r.csv": text([row[::-1] for row in ROWS], "d,c,b,a")},
        {"columns": "a,b,,d"},
    ),
    "columns by number": ({"r.csv": text([r[::-1] for r in ROWS])}, {"columns": "4,3,2,1"}),
    "names of a shop": (
        {"r.csv": text([(r[0], r[1], r[3]) for r in ROWS], "Customer ID,StockCode,event_time")},
        {},
    ),
    "CP1252": (
        {
            "r.csv": text([(*row, "é") for row in ROWS], "user,item,r,time,né")
            .decode()
            .encode("cp1252")
        },
        {},
    ),
    "ratings missing": ({"r.csv": CSV.replace(b"cup,4,", b"cup,,")}, {}),
    "ratings true and false": ({"r.csv": CSV.replace(b",4,", b",True,")}, {"min_rating": 1}),
    # packings
    "gzip": ({"r.csv.gz": gzip.compress(CSV)}, {}),
    "bzip2": ({"r.csv.bz2": bz2.compress(CSV)}, {}),
    "xz": ({"r.csv.xz": lzma.compress(CSV)}, {}),
    "zstd": ({"r.csv.zst": packed(CSV, "zstd")}, {}),
    "lz4": ({"r.csv.lz4": packed(CSV, "lz4")}, {}),
    "zip": ({"r.zip": zipped(ratings__csv=CSV)}, {}),
    "zstd in the middle of a name": ({"u.data.zst": packed(text(ROWS, "", "\t"), "zstd")}, {}),
    # times
    "milliseconds": (
        {"r.csv": text([(*row[:3], row[3] * 1000) for row in ROWS], BARE(COLUMNS))},
        {},
    ),
    "fractions of seconds": (
        {"r.csv": text([(*row[:3], f"{row[3]}.25") for row in ROWS], BARE(COLUMNS))},
        {},
    ),
    "ISO 8601": ({"r.csv": dated(lambda d: d.replace(tzinfo=None).isoformat())}, {}),
    "ISO 8601 in UTC": ({"r.csv": dated(lambda d: d.strftime("%Y-%m-%dT%H:%M:%S.277Z"))}, {}),
    "ISO 8601 in several zones": (
        {
            "r.csv": dated(
                lambda d: d.astimezone(
                    datetime.timezone(datetime.timedelta(hours=d.minute % 5 - 2))
                ).isoformat()
            )
        },
        {},
    ),
    "BigQuery's UTC": ({"r.csv": dated(lambda d: d.strftime("%Y-%m-%d %H:%M:%S.5 UTC"))}, {}),
    "Postgres' +00": ({"r.csv": dated(lambda d: d.strftime("%Y-%m-%d %H:%M:%S+00"))}, {}),
    "RFC 2822": ({"r.csv": dated(format_datetime)}, {}),
    "RFC 2822, GMT": ({"r.csv": dated(lambda d: format_datetime(d, usegmt=True))}, {}),
    "ctime": ({"r.csv": dated(lambda d: d.ctime())}, {}),
    "date's output": ({"r.csv": dated(lambda d: d.strftime("%a %b %d %H:%M:%S UTC %Y"))}, {}),
    "a server's log": ({"r.csv": dated(lambda d: d.strftime("%d/%b/%Y:%H:%M:%S +0000"))}, {}),
    "slashes, year first": ({"r.csv": dated(lambda d: d.strftime("%Y/%m/%d %H:%M:%S"))}, {}),
    # JSON
    "JSON lines": ({"r.jsonl": JSON}, {}),
    "Amazon 2014": (
        {
            "reviews_Beauty_5.json.gz": gzip.compress(
                lines_of_json(
                    [
                        each | {"helpful": [0, 1], "reviewText": 'so, "so"\n', "summary": "x"}
                        for each in objects(["reviewerID", "asin", "overall", "unixReviewTime"])
                    ]
                )
            )
        },
        {},
    ),
    "Amazon 2023": (
        {
            "All_Beauty.jsonl.gz": gzip.compress(
                lines_of_json(
                    [
                        {"rating": 5.0, "images": [], "asin": "B1", "parent_asin": item}
                        | {"user_id": user, "timestamp": time * 1000, "verified_purchase": True}
                        for user, item, _, time in ROWS
                    ]
                ).replace(b'"asin": "B1", ', b"")
            )
        },
        {},
    ),
    "JSON lines with fractions and blank lines": (
        {"r.ndjson": JSON.replace(b"000}\n", b"000.5}\r\n\r\n")},
        {},
    ),
    "JSON times with zones": (
        {
            "r.json": lines_of_json(
                [dict(zip(COLUMNS, (*r[:3], when(r[3]).isoformat()), strict=True)) for r in ROWS]
            )
        },
        {},
    ),
    "JSON array": ({"r.json": json.dumps(objects(COLUMNS), indent=1).encode()}, {}),
    "JSON sequences": ({"r.jsonl": lines_of_json(SEQUENCES)}, {}),
    "JSON lists of objects": ({"r.jsonl": lines_of_json(SHUFFLED)}, {}),
    # Parquet and Arrow
    "Parquet": ({"r.parquet": parquet(table())}, {}),
    "Parquet times with a zone": (
        {"r.parquet": parquet(columns(timestamp=pa.array(NANO, pa.timestamp("ns", "Asia/Tokyo"))))},
        {},
    ),
    "Parquet decimals": (
        {"r.parquet": parquet(columns(timestamp=pa.array([Decimal(row[3]) for row in ROWS])))},
        {},
    ),
    "Parquet times as text": (
        {"r.parquet": parquet(columns(timestamp=pa.array([when(r[3]).isoformat() for r in ROWS])))},
        {},
    ),
    "Parquet binary ids": (
        {
            "r.parquet": parquet(
                columns(
                    user=table()["user"].cast(pa.binary()), item=table()["item"].cast(pa.binary())
                )
            )
        },
        {},
    ),
    "Arrow views": (
        {"r.arrow": arrow(columns(user=table()["user"].cast(pa.string_view())))},
        {},
    ),
    "Parquet true and false": (
        {"r.parquet": parquet(columns(rating=pa.array([True] * len(ROWS))))},
        {"min_rating": 1},
    ),
    "Parquet ratings missing": (
        {"r.parquet": parquet(columns(rating=pa.array([None, *[3] * (len(ROWS) - 1)])))},
        {},
    ),
    "Arrow file": ({"r.arrow": arrow(table())}, {}),
    "Arrow stream": ({"data-00000-of-00001.arrow": arrow(table(), stream=True)}, {}),
    "Feather": ({"r.feather": feather(table())}, {}),
    "Feather of version 1": ({"r.feather": feather(table(), version=1)}, {}),
    "dictionaries": ({"r.arrow": arrow(columns(item=table()["item"].dictionary_encode()))}, {}),
    # a row a user
    "Parquet sequences": ({"sequences.parquet": parquet(LISTS)}, {}),
    "Parquet sequences with times": (
        {"sequences.parquet": parquet(pa.Table.from_pylist(SEQUENCES))},
        {},
    ),
    "Parquet lists of structs": (
        {"sequences.parquet": parquet(pa.Table.from_pylist(SHUFFLED))},
        {},
    ),
    "CSV with lists": (
        {
            "r.csv": text(
                [
                    (
                        u,
                        f'"{json.dumps(i)}"'.replace('"', "'")
                        .replace("'[", '"[')
                        .replace("]'", ']"'),
                    )
                    for u, i in HISTORIES.items()
                ],
                "user,items",
            )
        },
        {},
    ),
    "RecBole sequences": (
        {
            "r.inter": text(
                [(u, " ".join(i)) for u, i in HISTORIES.items()],
                "user_id:token\titem_id_list:token_seq",
                "\t",
            )
        },
        {},
    ),
    "rows of items": (
        {"r.txt": text([(u, *i, *i, *i) for u, i in HISTORIES.items()], separator=" ")},
        {"columns": "1,2..."},
    ),
    # folders
    "Spark's CSV": (uuid_parts("csv", lambda rows: text(rows, ",".join(COLUMNS))), {"path": "out"}),
    "Spark's packed CSV": (
        uuid_parts("csv.gz", lambda rows: gzip.compress(text(rows, ",".join(COLUMNS)))),
        {"path": "out"},
    ),
    "Spark's JSON": (
        uuid_parts("json", lambda rows: lines_of_json(objects(COLUMNS, rows))),
        {"path": "out"},
    ),
    "Spark's Parquet": (uuid_parts("parquet", lambda rows: parquet(table(rows))), {"path": "out"}),
    "Arrow parts": (uuid_parts("arrow", lambda rows: arrow(table(rows))), {"path": "out"}),
    "text parts in the order of their numbers": (
        {
            f"d/x.{at}.txt": text([row[:2] for row in rows], separator=" ")
            for at, rows in zip(
                (10, 9, 2), (IN_ORDER[6:], IN_ORDER[3:6], IN_ORDER[:3]), strict=True
            )
        },
        {"path": "d"},
    ),
    "an empty part": ({"d/0.csv": CSV, "d/1.csv": b"", "d/2.csv": CSV[:27]}, {"path": "d"}),
    "Hive": (
        {
            f"d/day=2020-01-{at:02}/hour={at}/{at}.csv": text(rows, ",".join(COLUMNS))
            for at, rows in enumerate(PARTS)
        },
        {"path": "d"},
    ),
    # rows
    "--where": (
        {
            "r.csv": text(
                [(*r, e) for r in ROWS for e in ("view", "buy")], "user,item,price,ts,event"
            )
        },
        {"where": "event == 'buy' and price > 3.5"},
    ),
    "duplicates dropped": ({"r.csv": CSV + text(ROWS)}, {"duplicates": "drop"}),
    "newest first without times": (
        {"r.txt": text([r[:2] for r in IN_ORDER[::-1]], separator=" ")},
        {"file_order": "newest_first"},
    ),
}


def prepared(folder: Path, files: dict[str, bytes], **flags: Any) -> SequenceStore:
    for name, content in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = folder / "data" / (flags.pop("path", "") or next(iter(files)))
    flags = {"min_user_count": 0} | flags
    return prepare(DataConfig(dataset_path=str(path), cache_dir=str(folder / "cache"), **flags))


def histories(store: SequenceStore) -> dict[str, list[str]]:
    items = [store.catalog.item_id(item) for item in store.items.tolist()]
    return {
        user: items[slice(*store.offsets[at : at + 2])]
        for at, user in enumerate(store.catalog.users.to_pylist())
    }


@pytest.mark.parametrize("case", FORMATS)
def test_formats(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    files, flags = FORMATS[case]
    expected = HISTORIES
    if case == "rows of items":
        expected = {user: items * 3 for user, items in HISTORIES.items()}
    assert histories(prepared(tmp_path, files, **flags)) == expected
    warnings = capfd.readouterr().err
    assert ("CP1252" in warnings) == (case == "CP1252")


def test_there_are_enough_formats() -> None:
    assert len(FORMATS) >= 40
