"""A table of formats: in each, the same three users with the same histories."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.nodes import IterableWrapper

from pipeline.errors import UserError
from pipeline.preparation.__main__ import main
from pipeline.preparation.checks import time_unit
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.prepare import build, describe, prepare
from pipeline.preparation.stages import RatingChunk
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve
from tests.conftest import ROOT

DOCUMENT = ROOT / "docs" / "data.md"

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


def orc(content: pa.Table) -> bytes:
    stream = io.BytesIO()
    pyarrow.orc.write_table(content, stream)
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


def as_view(column: pa.Array) -> pa.Array:
    return pa.array(column.to_pylist(), pa.string_view())


def view(name: str) -> pa.Array:
    return as_view(table()[name])


NANO = [row[3] * 10**9 for row in ROWS]
# name: files, flags (path: the first file's, unless given)
FORMATS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    # separators and headers
    "CSV": ({"r.csv": CSV}, {}),
    "TSV": ({"r.tsv": CSV.replace(b",", b"\t")}, {}),
    "semicolons in quotes, without the flag": (
        {
            "r.csv": b'"User-ID";"ISBN";"title";"time"\n'
            + b"".join(
                b'"%s";"%s";"a; ""b"",\nc";%d\n' % (u.encode(), i.encode(), t)
                for u, i, _, t in ROWS
            )
        },
        {},
    ),
    "tabs in .csv": ({"r.csv": CSV.replace(b",", b"\t")}, {}),
    "commas in .dat": ({"r.dat": text(ROWS)}, {}),
    "a header in .dat": ({"r.dat": text(ROWS, "userID\tartistID\tweight\ttimestamp", "\t")}, {}),
    "a header in .txt": ({"r.txt": text(ROWS, "user item rating timestamp", " ")}, {}),
    "Goodreads": (
        {
            "r.json": lines_of_json(
                [
                    {"user_id": user, "book_id": item, "is_read": True, "rating": 5}
                    | {"date_added": when(time).strftime("%a %b %d %H:%M:%S -0700 %Y")}
                    for user, item, _, time in ROWS
                ]
            )
        },
        {},
    ),
    "KuaiRand": (
        {
            "r.csv": text(
                [(u, i, 20140513, t * 1000) for u, i, _, t in ROWS], "user_id,video_id,date,time_ms"
            )
        },
        {},
    ),
    "Foursquare": (
        {
            "r.csv": text(
                [
                    (u, i, "Bar", when(t).strftime("%a %b %d %H:%M:%S +0000 %Y"))
                    for u, i, _, t in ROWS
                ],
                "userId,venueId,venueCategory,utcTimestamp",
            )
        },
        {},
    ),
    "rows without an id left out": (
        {"r.csv": CSV + b",pen,4,1\n"},
        {"where": "user is not None"},
    ),
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
    "UTF-16": ({"r.csv": CSV.decode().encode("utf-16")}, {}),
    "UTF-16 in gzip": (
        {"r.tsv.gz": gzip.compress(CSV.replace(b",", b"\t").decode().encode("utf-16"))},
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
                )
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
        {"r.arrow": arrow(columns(user=view("user")))},
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
    "ORC": ({"r.orc": orc(table())}, {}),
    "ORC times": (
        {"r.orc": orc(columns(timestamp=pa.array(NANO, pa.timestamp("ns", "UTC"))))},
        {},
    ),
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
    "Spark's ORC": (uuid_parts("orc", lambda rows: orc(table(rows))), {"path": "out"}),
    "ORC sequences": ({"sequences.orc": orc(pa.Table.from_pylist(SHUFFLED))}, {}),
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
    "Hive, users in the names of folders": (
        {
            f"d/user_id={user}/part-0.csv": text([r[1:] for r in ROWS if r[0] == user], "item,r,ts")
            for user in HISTORIES
        },
        {"path": "d"},
    ),
    "Hive, days in the names of folders": (
        {
            f"d/date=2020-01-{at + 1:02} 10%3A00%3A00/{9 - at}.parquet": parquet(
                table([row[:2] for row in IN_ORDER[at : at + 1]], ["user", "item"])
            )
            for at in range(len(ROWS))
        },
        {"path": "d"},
    ),
    "Hive, a column before the name of a folder": (
        {
            f"d/date=2020-01-{9 - at:02}/{at}.csv": text(rows, "user,item,r,event_time")
            for at, rows in enumerate(PARTS)
        },
        {"path": "d"},
    ),
    "Hive, rows by the name of a folder": (
        {
            f"d/event={event}/{at}.csv": text(ROWS, ",".join(COLUMNS))
            for at, event in enumerate(("buy", "view"))
        },
        {"path": "d", "where": "event == 'buy' and rating > 1"},
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


def written(folder: Path, files: dict[str, bytes], path: str = "") -> Path:
    """Write the files; the path of the first one, or of `path`."""
    for name, content in files.items():
        file = folder / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / "data" / (path or next(iter(files)))


def prepared(
    folder: Path, files: dict[str, bytes], in_cache: bool = True, **flags: Any
) -> SequenceStore:
    """The store of the first file, or of the one called `path`."""
    path = written(folder, files, flags.pop("path", ""))
    flags = {"min_user_count": 0} | flags
    config = DataConfig(dataset_path=str(path), cache_dir=str(folder / "cache"), **flags)
    return prepare(config) if in_cache else build(resolve(config), config)


def histories(store: SequenceStore) -> dict[str, list[str]]:
    items = [store.catalog.item_id(item) for item in store.items.tolist()]
    return {
        user: items[slice(*store.offsets[at : at + 2])]
        for at, user in enumerate(store.catalog.users.to_pylist())
    }


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_gives_the_same_histories(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command line, which shows up to eight items of three users."""
    files, flags = FORMATS[case]
    path = written(tmp_path, files, flags.get("path", ""))
    flags = {"dataset_path": path, "cache_dir": tmp_path / "cache", "min_user_count": 0} | flags
    flags.pop("path", None)
    main(
        [
            "--dry_run",
            *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
        ]
    )
    output, warnings = capfd.readouterr()
    shown = re.sub(r" \([^)]*\)", "", output.partition("first histories")[2]).splitlines()[1:]
    if case == "rows of items":
        more = {user: (items * 3)[:8] for user, items in HISTORIES.items()}
        counts = {user: f", ... {3 * len(items)} in all" for user, items in HISTORIES.items()}
    else:
        more, counts = HISTORIES, dict.fromkeys(HISTORIES, "")
    assert shown == [
        f"    {user}: {', '.join(items)}{counts[user]}" for user, items in more.items()
    ]
    assert not (tmp_path / "cache").exists()
    assert ("CP1252" in warnings) == (case == "CP1252")


def test_there_are_enough_formats() -> None:
    assert len(FORMATS) >= 40


def test_the_statement_of_duckdb_makes_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(tmp_path)
    (statement,) = re.findall(r"^-- DuckDB\n(.*?;)\n", DOCUMENT.read_text(), re.M | re.S)
    events = table([(u, i, when(t)) for u, i, _, t in ROWS], ["user_id", "item_id", "ts"])
    base = duckdb.connect()
    base.execute("SET TimeZone = 'UTC'")
    base.register("events", events)
    base.execute(statement)
    store = prepared(tmp_path, {"sequences.parquet": Path("sequences.parquet").read_bytes()})
    assert histories(store) == HISTORIES
    assert store.counts["times"]["unit"] == "ms" and store.times is not None
    assert store.times[:3].tolist() == [1000 * (START + 1000 * at) for at in range(3)]


def refused(folder: Path, files: dict[str, bytes], **flags: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(folder, files, in_cache=False, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/data/", "")


LINE = '{"user": "u", "item": "%s", "time": %s}\n'
J = "".join(LINE % each for each in (("a", 1), ("b", 2), ("c", 3)))
AMBIGUOUS = "".join(f"u{at % 2} i{at} {at}500\n" for at in range(6)).encode()
MIXED = [(u, i, 4, t * (1000 if u == "bob" else 1)) for u, i, _, t in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        (
            "r.txt",
            AMBIGUOUS,
            {},
            'r.txt:1: the third column may be a rating or a time; give --columns "1,2,3" if it is '
            "a rating, \"1,2,,3\" if it is a time; the first lines are 'u0 i0 0500'; 'u1 i1 1500'",
        ),
        (
            "r.txt",
            b"1 2 3 4\n2 3 4 5\n3 2 3 4\n",
            {},
            "r.txt:1: the rows may be ratings or a user and its items each; give --columns "
            '"1,2,3,4" if they are user, item, rating, time, "1,2..." if they are user, item, item',
        ),
        (
            "r.txt",
            b"u a b\nv c\n",
            {},
            'r.txt:1: the third column is neither a rating nor a time; give --columns "1,2..." if',
        ),
        (
            "r.txt",
            b"u\t2010-10-17T01:48:53Z\t30.2\t-97.7\t22\nu\t2010-10-16T01:48:53Z\t30.2\t-97.7\t33\n",
            {},
            "r.txt:1: column 2 is a time; give the numbers of user, item, rating (or none) and "
            'time: for example --columns "1,3,,2"; the first lines are',
        ),
        ("r.txt", b"u 2014-01-01 7\nu 2014-01-02 8\n", {}, "r.txt:1: column 2 is a time"),
        (
            "r.txt",
            b"u 5001 12 1 1544070000\nu 5002 13 2 1544060000\n",
            {},
            "r.txt:1: column 5 is a time; give the numbers of user, item, rating (or none) and "
            'time: for example --columns "1,2,,5"',
        ),
        (
            "r.csv",
            b"user,item,time\nu,a,2015-01-31 11:59:59 PM\n",
            {},
            "r.csv:2: the timestamp '2015-01-31 11:59:59 PM' is of a 12-hour clock, which is not",
        ),
        (
            "r.csv",
            b"user,item,time\nu,a,12 Mai 2014\n",
            {},
            "r.csv:2: the timestamp '12 Mai 2014' is n",
        ),
        (
            "r.csv",
            b'user,item,time\nu,a,"Sunday, 13-Sep-20 12:31:40 GMT"\n',
            {},
            "r.csv:2: the timestamp 'Sunday, 13-Sep-20 12:31:40 GMT' is neither a number nor",
        ),
        ("r.txt", b"1 2\n2 3 4\n", {}, "r.txt:2: 3 fields where 2 are expected; if a row is a use"),
        ("r.txt", b"u a b\nv\n", {"columns": "1,2..."}, "r.txt:2: a row has no item"),
        (
            "r.txt",
            b"u a b\nv c\n",
            {"columns": "1...,2"},
            '--columns with "..." names a user and the first of its items',
        ),
        (
            "r.csv",
            text(MIXED, BARE(COLUMNS)),
            {},
            "the times of r are in several units: 6 in seconds (as 1400000000), 4 in milliseconds "
            "(as 1400000000000); write all in one, or choose rows with --where",
        ),
        (
            "r.csv",
            CSV,
            {"where": "evnt == 'x'"},
            "r.csv:1: no column 'evnt' (--where); there are user, item, rating, timestamp",
        ),
        (
            "r.parquet",
            parquet(table()),
            {"where": "evnt == 'x'"},
            "r.parquet: no column 'evnt' (--where); there are user, item, rating, timestamp",
        ),
        ("r.csv", CSV, {"where": "rating = 4"}, "--where 'rating = 4' cannot be read; write it"),
        ("r.csv", CSV, {"where": "user > 4"}, "r.csv:2: --where: the user is not a number"),
        ("r.csv", CSV, {"where": "rating > 9"}, "r.csv: no ratings in it for which --where 'rat"),
        (
            "r.csv",
            text([r[:2] for r in ROWS], "user,item"),
            {"duplicates": "drop"},
            "--duplicates drop: the data has no time column; leave the flag out",
        ),
        (
            "r.csv",
            CSV.replace(b",4,", b",True,", 2),
            {},
            "r.csv:4: the rating '4' is not true or false",
        ),
        (
            "r.csv",
            CSV.replace(b"pen,4", b"pen,"),
            {"min_rating": 1},
            "r.csv:2: the rating '' is not a number",
        ),
        (
            "r.csv",
            b'user,items,times\nu,"[1, 2]","[1]"\n',
            {},
            "r.csv:2: the timestamp list is not as long as the item list",
        ),
        ("r.jsonl", (J + "{\n").encode(), {}, "r.jsonl:4: not JSON"),
        ("r.jsonl", (J + "[1]\n").encode(), {}, "r.jsonl:4: a JSON list, not an object"),
        ("r.jsonl", (J + "\n" + LINE % ("", 1)).encode(), {}, "r.jsonl:5: the item id is empty"),
        ("r.jsonl", (J + '{"user": "u"}\n').encode(), {}, "r.jsonl:4 has no item"),
        (
            "r.jsonl",
            (J + LINE % ("d", '"x"')).encode(),
            {},
            "r.jsonl:4: the timestamp x is neither a number nor a date",
        ),
        (
            "r.jsonl",
            (J + LINE % ("d", "99999999999999999999")).encode(),
            {},
            "r.jsonl:4: the timestamp 99999999999999999999 does not fit into 64 bits",
        ),
        (
            "r.jsonl",
            (J + LINE.replace('"u"', "[7]") % ("d", 4)).encode(),
            {},
            "r.jsonl:4: the user '[7]' is a JSON list, unlike others",
        ),
        ("r.jsonl", b"\n\n", {}, "r.jsonl: no ratings in it"),
        (
            "r.jsonl",
            (J + LINE % ("d", '"2020-01-01"')).encode(),
            {},
            "r.jsonl:4: some times are numbers and others are dates (time)",
        ),
        ("r.dat", b"1::2::3::4\n1\t2::3::4\n", {}, "r.dat:2: 3 fields where 4 are expected"),
        ("r.dat", b"1::2::3::4\n  \n1::2::3::4\n", {}, "r.dat:2: 1 fields where 4 are expected"),
        ("r.json", b'[{"user": "u", "item": "a"},\n{"user": "u"}]', {}, "r.json:2 has no item"),
        ("r.json", b'[{"user": "u", "item": "a"},\n{"user": }]', {}, "r.json:2: not JSON"),
        ("r.jsonl", b'{"user": "u", "item": "\xe9"}\n', {}, "r.jsonl:1: not UTF-8 text"),
        ("r.arrow", arrow(table())[:-30], {}, "cannot read r.arrow: "),
        ("r.arrow", CSV, {}, "r.arrow is no Arrow file in spite of its name"),
        ("r.csv.zst", packed(CSV * 50, "zstd")[:-5], {}, "cannot read r.csv.zst: Truncated comp"),
        ("r.csv.xz", lzma.compress(CSV)[:-5], {}, "cannot read r.csv.xz: Compressed file ended"),
        ("r.csv.bz2", bz2.compress(CSV)[:-5], {}, "cannot read r.csv.bz2: Compressed file ended"),
        (
            "r.parquet",
            parquet(pa.table({"user": ["u"], "items": [["a", None]]})),
            {},
            "r.parquet: row 0 (from 0) has no item",
        ),
        (
            "r.parquet",
            parquet(pa.table({"user": [1, 2], "items": [["a"], ["b"]], "times": [[1], [2, 3]]})),
            {},
            "r.parquet: row 1 (from 0): the timestamp list is not as long as the item list",
        ),
        (
            "r.parquet",
            parquet(
                pa.table({"user": [1, 2], "item": [1, 2], "ts": ["2020-01-01", "2020-01-01 0:00Z"]})
            ),
            {},
            "r.parquet: row 1 (from 0): some times have a zone and others have none (ts)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) and value.startswith("r.") else "",
)
def test_an_ambiguous_or_wrong_file_is_refused(
    tmp_path: Path, name: str, content: bytes, flags: dict[str, Any], message: str
) -> None:
    assert refused(tmp_path, {name: content}, **flags).startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "flags", "warning"),
    [
        (
            "r.csv",
            b"user,item,date\nu,c,2020-01-02\nu,b,2020-01-01\nu,a,2020-01-01\nv,a,2019-01-01\n",
            {},
            "r begins with the newest ratings, and 2 ratings share a user and a time with another",
        ),
        (
            "r.csv",
            text([(u.replace("zoe", "Ann"), *rest) for u, *rest in ROWS], BARE(COLUMNS)),
            {},
            "1 user ids of r differ from others only in the case of letters, in blanks or in "
            "a final .0, for example 'Ann' and 'ann': they are different users",
        ),
        (
            "r.csv",
            text([(u, i.replace("pen", "h at"), *rest) for u, i, *rest in ROWS], BARE(COLUMNS)),
            {},
            "1 item ids of r differ from others only",
        ),
        ("r.csv", b"user,item\nu,7\nu,7.0\nu,8\n", {}, "1 item ids of r differ from others only"),
        ("r.csv", "user,item\nu,a\nu,a\xa0\nu,b\n".encode(), {}, "1 item ids of r differ from"),
        (
            "r.csv",
            b"user,item\nNULL,a\nNULL,b\nNULL,c\n",
            {},
            "the user id NULL of r is an id like any other: if it stands for a missing one, leave",
        ),
        (
            "r.csv",
            b"user,item,time\nu,a,1600000000\nu,b,0\nu,c,1600000001\nv,a,-1\nv,b,1600000000\n",
            {},
            "2 ratings of r have the time 0 or -1, in 1970: if it stands for a missing one, leave",
        ),
        (
            "r.csv",
            b"user,item,date\nu,a,1970-01-01\nu,b,2020-01-01\nu,c,2020-01-01\n",
            {},
            "1 ratings of r have the time 0 or -1, in 1970",
        ),
        (
            "r.csv",
            b"user,item,dateRead\nu,a,2020-01-02\nu,b,2020-01-01\nu,c,2020-01-01\n",
            {},
            "no column is known as the time, so the order of the rows is taken for that of time; "
            'if dateRead is the time, give --columns "user,item,,time"',
        ),
        (
            "r.parquet",
            parquet(pa.table({"user": ["u"] * 3, "item": ["a", "b", "c"], "t_dat": [3, 2, 1]})),
            {},
            "no column is known as the time",
        ),
        (
            "r.csv",
            b"user,item,Date\nu,a,3\nu,b,2\nu,c,1\n",
            {"columns": "user,item,Date"},
            "--columns 'user,item,Date' takes 'Date' for the rating, and the order of the rows for "
            'that of time; if it is the time, give --columns "user,item,,time"',
        ),
        (
            "r.parquet",
            parquet(pa.table({"user": ["u"] * 3, "item": ["a", "b", "c"], "ts": [3, 2, 1]})),
            {"columns": "user,item,ts"},
            "--columns 'user,item,ts' takes 'ts' for the rating",
        ),
        *(
            (
                name,
                content,
                {"separator": ";"},
                f"flags without effect: --separator (only with text, not with {form})\n",
            )
            for name, content, form in (
                ("r.parquet", parquet(table()), "Parquet"),
                ("r.orc", orc(table()), "ORC"),
                ("r.arrow", arrow(table()), "Arrow"),
                ("r.jsonl", JSON, "JSON lines"),
                ("r.json", json.dumps(objects(COLUMNS)).encode(), "a JSON array"),
            )
        ),
    ],
)
def test_what_may_mean_something_else_is_a_warning(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    flags: dict[str, Any],
    warning: str,
) -> None:
    prepared(tmp_path, {name: content}, **flags)
    assert capfd.readouterr().err.startswith(f"warning: {warning}")


def test_small_numbers_are_no_missing_times(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared(tmp_path, {"r.csv": b"user,item,time\nu,a,-1\nu,b,0\nu,c,1\n"})
    assert not capfd.readouterr().err


def test_newest_first_reverses_equal_times_only(tmp_path: Path) -> None:
    rows = b"user,item,date\nu,d,2020-01-02\nu,c,2020-01-02\nu,b,2020-01-01\nu,a,2020-01-01\n"
    store = prepared(tmp_path, {"r.csv": rows}, file_order="newest_first")
    assert histories(store) == {"u": ["a", "b", "c", "d"]}
    assert histories(prepared(tmp_path, {"r.csv": rows})) == {"u": ["b", "a", "d", "c"]}


def test_baskets_and_duplicates_are_counted(tmp_path: Path) -> None:
    rows = b"user,item,time\nu,a,1\nu,b,1\nu,a,1\nu,c,2\nv,a,1\nv,a,2\nv,a,2\nv,b,3\n"
    kept = prepared(tmp_path, {"r.csv": rows})
    assert histories(kept) == {"u": ["a", "b", "a", "c"], "v": ["a", "a", "a", "b"]}
    assert (kept.counts["times"]["ties"], kept.counts["times"]["duplicates"]) == (5, 2)
    assert "at the same time as another of the user: 5, of these repeated" in describe(kept)
    dropped = prepared(tmp_path, {"r.csv": rows}, duplicates="drop")
    assert histories(dropped) == {"u": ["a", "b", "c"], "v": ["a", "a", "b"]}
    assert dropped.counts["times"]["duplicates"] == 0
    assert dropped.counts["stages"][1]["stage"] == "--duplicates drop"


@pytest.mark.parametrize(
    ("time", "unit", "stored"),
    [
        (lambda s: s, "s", lambda s: s),
        (lambda s: s * 1000 + 7, "ms", lambda s: s * 1000 + 7),
        (lambda s: f"{s}.5", "us", lambda s: s * 10**6 + 500_000),
        (lambda s: when(s).isoformat(), "ns", lambda s: s * 10**9),
        (lambda s: s - START, "", lambda s: s - START),
    ],
)
def test_times_are_kept(
    tmp_path: Path, time: Callable[[int], Any], unit: str, stored: Callable[[int], int]
) -> None:
    content = text([(*row[:3], time(row[3])) for row in ROWS], BARE(COLUMNS))
    store = prepared(tmp_path, {"r.csv": content})
    assert store.counts["times"]["unit"] == unit
    assert store.times is not None and store.times.dtype == "int64"
    first = [stored(START + 1000 * at) for at in range(3)]
    assert store.times.tolist() == [*first, *first, stored(START + 3000), *first]
    assert not store.times.flags.writeable


def test_damaged_times_are_noticed_by_who_reads_them(tmp_path: Path) -> None:
    store = prepared(tmp_path, {"r.csv": CSV})
    assert store.path is not None
    with (store.path / "times.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    opened = SequenceStore.open(store.path)
    with pytest.raises(UserError, match=r"times\.npy is damaged"):
        _ = opened.times
    assert SequenceStore.from_arrays([1, 1, 1], [0, 3], 1).times is None


def test_a_changed_file_of_the_same_age_and_size_is_noticed(tmp_path: Path) -> None:
    first = prepared(tmp_path, {"r.csv": CSV})
    path = tmp_path / "data" / "r.csv"
    status = path.stat()
    path.write_bytes(CSV.replace(b"zoe", b"eve"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare(
        DataConfig(dataset_path=str(path), cache_dir=str(tmp_path / "cache"), min_user_count=0)
    )
    assert second.path != first.path and set(histories(second)) == {"ann", "bob", "eve"}
    assert second.fingerprint["source"][0][2] == len(CSV)


ROWS_OF_ITEMS = [
    ["kind", "item_id", "name", "price"],
    ["x", "pen", "A pen", "1.5"],
    ["y", "cup", "A cup", "2"],
]
COLUMNS_OF_ITEMS = pa.table(
    {"item": ["cup", "pen"], "Title": ["A cup", "A pen"], "kind": ["y", "x"], "price": [2, 1.5]}
)
AS_VIEWS = COLUMNS_OF_ITEMS.set_column(2, "kind", pa.array(["y", "x"], pa.string_view()))
ITEMS = {
    "csv": text([*ROWS_OF_ITEMS, ["z", "pen", "again", "3"]]),
    "tsv": text(ROWS_OF_ITEMS, separator="\t"),
    "item": text(ROWS_OF_ITEMS, separator="\t").replace(b"item_id", b"item_id:token"),
    "jsonl": b'{"id":"cup","name":"A cup","kind":"y","price":2}\n'
    b'{"id":"pen","name":"A pen","kind":"x","price":1.5}\n',
    "parquet": parquet(COLUMNS_OF_ITEMS),
    "arrow": arrow(AS_VIEWS),
}


@pytest.mark.parametrize("ending", ITEMS)
def test_titles_and_attributes_are_read_in_every_format(
    tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"items.{ending}").write_bytes(ITEMS[ending])
    store = prepared(tmp_path, {"r.csv": CSV}, items_path=str(tmp_path / f"items.{ending}"))
    assert store.catalog.items.to_pylist() == ["cup", "hat", "pen"]
    assert store.catalog.titles.to_pylist() == ["A cup", "", "A pen"]
    assert store.catalog.attributes.to_pydict() == {
        "kind": ["y", None, "x"],
        "price": [2, None, 1.5],
    }
    warnings = capfd.readouterr().err
    assert "has no row for 1 of 3 items" in warnings
    assert ("the item of an earlier row" in warnings) == (ending == "csv")


@pytest.mark.parametrize(
    ("name", "content", "attributes"),
    [
        ("i.csv", b"item;name;kind\ncup;A cup;y\n", {"kind": ["y", None, None]}),
        (
            "i.jsonl",
            b'{"item":"cup","name":"A cup","price":2.5}\n\n{"item":"hat","price":"from 3"}\n',
            {"price": ["2.5", "from 3", None]},
        ),
        ("i.json", b'[{"item":"cup",\n"name":"A cup","n":1}]', {"n": [1, None, None]}),
        ("i.jsonl", b'{"item":"cup","name":"A cup","more":{}}\n', {"more": ["{}", None, None]}),
        ("i.csv", b"item, name, kind\ncup,A cup,y\n", {"kind": ["y", None, None]}),
        (
            "i.csv",
            b"item,name,words\ncup,A cup," + b"a b " * (1 << 20) + b"\nhat,,c\n",
            {"words": ["a b " * (1 << 20), "c", None]},
        ),
    ],
    ids=["semicolons", "values of several types", "array", "empty object", "blanks", "long"],
)
def test_tables_of_items_as_they_are_published(
    tmp_path: Path, name: str, content: bytes, attributes: dict[str, list]
) -> None:
    (tmp_path / name).write_bytes(content)
    store = prepared(tmp_path, {"r.csv": CSV}, items_path=str(tmp_path / name), in_cache=True)
    assert store.catalog.titles.to_pylist() == ["A cup", "", ""]
    assert store.catalog.attributes.to_pydict() == attributes


def test_tables_of_items_that_do_not_fit(tmp_path: Path) -> None:
    def message(content: bytes, name: str = "i.csv") -> str:
        (tmp_path / name).write_bytes(content)
        return refused(tmp_path, {"r.csv": CSV}, items_path=str(tmp_path / name))

    assert "several columns are called 'a'" in message(b"item,a,a\ncup,1,2\n")
    assert "several columns are called 'a'" in message(b"item,a:token,a:float\ncup,1,2\n")
    for column in ("item", "title"):
        content = json.dumps({"item": "cup", "title": "a cup"} | {column: ["x"]}).encode()
        assert f"the column {column!r} holds list" in message(content, "i.json")
    assert "cannot tell the item column among a, b" in message(b"a,b\n1,2\n")
    assert "none of the items is in its column 'item'" in message(b"item,b\n1,2\n")
    assert "rename the column 'train_count'" in message(b"item,train_count\ncup,2\n")
    config = {"items_path": str(tmp_path / "none.csv")}
    assert "no such file" in refused(tmp_path, {"r.csv": CSV}, **config)
    folder = refused(tmp_path, {"r.csv": CSV}, items_path=str(tmp_path))
    assert folder == f"cannot read {tmp_path}: it is a folder; name a file"


def test_ids_of_items_are_decoded_as_those_of_ratings(tmp_path: Path) -> None:
    """Text of Windows, which is not Latin-1 in all letters."""
    ratings = "user,item\n" + "a,10 €\na,Œuvre\na,é\n"
    (tmp_path / "i.csv").write_text("item,title\n10 €,“ten”\nŒuvre,œuvre\né,e\n", "cp1252")
    flags = {"items_path": str(tmp_path / "i.csv")}
    store = prepared(tmp_path, {"r.csv": ratings.encode("cp1252")}, **flags)
    items, titles = store.catalog.items.to_pylist(), store.catalog.titles.to_pylist()
    assert dict(zip(items, titles, strict=True)) == {"10 €": "“ten”", "Œuvre": "œuvre", "é": "e"}


class Frame:
    """What pandas, polars and DuckDB have in common."""

    def __init__(self, content: pa.Table) -> None:
        self.content = content

    def __arrow_c_stream__(self, schema: object = None) -> object:
        return self.content.__arrow_c_stream__(schema)


def test_a_table_is_prepared_without_a_file() -> None:
    reader = pa.RecordBatchReader.from_batches(table().schema, table().to_batches(3))
    for data in (table(), Frame(table()), reader, pa.Table.from_pylist(SEQUENCES)):
        store = prepare(data, min_user_count=0)
        assert histories(store) == HISTORIES
        assert store.path is None and store.times is not None
    dated_table = columns(timestamp=pa.array(NANO, pa.timestamp("ns")))
    store = prepare(dated_table, min_user_count=0)
    assert histories(store) == HISTORIES and store.counts["times"]["unit"] == "ns"
    chosen = prepare(table(), min_user_count=0, columns="item,user,,timestamp", where="rating == 4")
    assert chosen.catalog.items.to_pylist() == ["ann", "bob", "zoe"]
    with pytest.raises(UserError, match=r"the table: row 1 \(from 0\) has no item"):
        prepare(pa.table({"user": ["u", "u"], "item": ["a", None]}))
    with pytest.raises(UserError, match="prepare takes a DataConfig or a table with an Arrow"):
        prepare([1, 2])


def test_views_in_every_place() -> None:
    """polars writes string views: as ids, in dictionaries (categories) and in lists."""
    for lists in (False, True):
        ids = LISTS["item_ids"].combine_chunks() if lists else table()["item"].combine_chunks()
        if lists:
            ids = pa.LargeListArray.from_arrays(ids.offsets.cast(pa.int64()), as_view(ids.values))
            content = LISTS.set_column(1, "item_ids", ids)
        else:
            codes = ids.dictionary_encode()
            ids = pa.DictionaryArray.from_arrays(
                codes.indices.cast(pa.uint32()), as_view(codes.dictionary)
            )
            content = columns(item=ids, user=view("user"))
        found = prepare(content, min_user_count=0, where="`user` != 'x'" if not lists else "")
        assert histories(found) == HISTORIES


def test_flags_as_keywords_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(CSV)
    config = DataConfig(dataset_path=str(path), cache_dir=str(tmp_path / "c"))
    assert set(histories(prepare(config, min_user_count=4))) == {"bob"}


def test_dry_run_tells_what_was_recognised_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(CSV)
    flags = [f"--dataset_path={path}", f"--cache_dir={tmp_path / 'c'}", "--min_user_count=4"]
    main([*flags, "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"read: {path}"
    assert lines[1] == (
        "format: text cut at ',', with a header; columns: user = 'user', item = 'item', "
        "rating = 'rating', timestamp = 'timestamp'"
    )
    assert any("--min_user_count 4" in line and "4 ratings" in line for line in lines)
    assert lines[-1] == (
        "    bob: hat (2014-05-13T16:53:20), cup (2014-05-13T17:10:00), "
        "pen (2014-05-13T17:26:40), cup (2014-05-13T17:43:20)"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["r.csv"]
    main(flags)
    assert str(tmp_path / "c") in capsys.readouterr().out
    assert (tmp_path / "c" / "stores").is_dir()
    with pytest.raises(UserError, match="--min_user_count: invalid int value"):
        main(["--min_user_count=x"])


def test_dry_run_of_a_mistake_still_tells_what_was_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(JSON)
    with pytest.raises(UserError, match="--min_user_count 9 drops all"):
        main([f"--dataset_path={path}", "--min_user_count=9", "--dry_run"])
    assert "format: JSON lines; columns: user = 'user' (string)" in capsys.readouterr().out


def test_parts_that_are_not_alike_are_no_parts(tmp_path: Path) -> None:
    assert "no ratings file in it" in refused(tmp_path, {"d/a.csv": CSV, "d/b.csv": CSV}, path="d")
    mixed = {"d/1.csv": CSV, "d/2.jsonl": JSON}
    assert "no ratings file in it" in refused(tmp_path / "x", mixed, path="d")


ID = st.sampled_from(["1", "2", "10", "007", "a", "A", "b c", "é", "-3", '"', "x,y"])
ROW = st.tuples(ID, ID, st.integers(-2, 5), st.integers(0, 4).map(lambda at: START + at))


@settings(max_examples=15)
@given(rows=st.lists(ROW, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_a_table_gives_one_store_in_every_format(rows: list[tuple], cut: int) -> None:
    rows = [*rows, *(("007", "a", 1, START) for _ in range(3))]
    ordered = sorted(rows, key=lambda row: row[3])  # stable
    users = dict.fromkeys(row[0] for row in ordered)
    lists = [
        {
            "user": user,
            "item": [row[1] for row in ordered if row[0] == user],
            "timestamp": [row[3] for row in ordered if row[0] == user],
        }
        for user in users
    ]
    out = io.StringIO()
    csv.writer(out).writerows([COLUMNS, *rows])
    parts = [part for part in (rows[:cut], rows[cut:]) if part]
    forms: dict[str, dict[str, bytes]] = {
        "csv": {"r.csv": out.getvalue().encode()},
        "json": {"r.jsonl": lines_of_json(objects(COLUMNS, rows))},
        "array": {"r.json": json.dumps(objects(COLUMNS, rows)).encode()},
        "parquet": {"r.parquet": parquet(table(rows))},
        "arrow": {"r.arrow": arrow(table(rows), stream=True)},
        "sequences": {"r.parquet": parquet(pa.Table.from_pylist(lists))},
        "JSON sequences": {"r.jsonl": lines_of_json(lists)},
        "parts": {f"r/{at}.arrow": arrow(table(part)) for at, part in enumerate(parts)},
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, files in forms.items():
            path = "r" if form == "parts" else ""
            store = prepared(Path(folder) / form, files, in_cache=False, path=path)
            assert store.times is not None
            ids = [store.catalog.items.to_pylist(), store.catalog.users.to_pylist()]
            arrays = [each.tolist() for each in (store.items, store.offsets, store.times)]
            found[form] = [*arrays, *ids, store.counts["times"]]
    assert all(each == found["csv"] for each in found.values())


def test_ids_in_brackets_are_ids(tmp_path: Path) -> None:
    rows = text([(user, f"[{item}]") for user, items in HISTORIES.items() for item in items])
    store = prepared(tmp_path, {"r.csv": b"user,item\n" + rows}, in_cache=False)
    assert store.catalog.items.to_pylist() == ["[cup]", "[hat]", "[pen]"]


def test_a_delta_table_is_read_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"d/_delta_log/0.json": b"{}", "d/part-0.parquet": parquet(table())}
    assert histories(prepared(tmp_path, files, in_cache=False, path="d")) == HISTORIES
    assert "d is a Delta table: rows that it has deleted are read" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([START, START + 1], "s"),
        ([0, 5, START], "s"),  # 0 for unknown
        ([START * 1000, START * 1000 + 1], "ms"),
        ([START * 10**6], "us"),
        ([START * 10**9], "ns"),
        ([1, 2, 3], ""),
        ([10**9, 10**10, 10**12], ""),  # spread over all sizes: no times of our days
        ([-START, START], "s"),
    ],
)
def test_units_of_time(times: list[int], unit: str) -> None:
    assert time_unit(np.array(times), "r") == unit


@pytest.mark.parametrize(
    ("users", "times", "falls"),
    [
        ([0, 1, 0, 1], [4, 3, 2, 1], True),  # the whole file
        ([0, 0, 1, 1], [2, 1, 5, 4], True),  # each user's part
        ([0, 1, 1, 0], [5, 3, 2, 9], False),  # parts of users, not all in one
        ([0, 0, 1, 1], [2, 2, 3, 3], False),
        ([0, 0, 1, 1], [2, 1, 3, 4], False),
    ],
)
def test_newest_first(users: list[int], times: list[int], falls: bool) -> None:
    chunk = RatingChunk(np.array(users), np.ones(4, np.int32), timestamp=np.array(times))
    grouped = GroupByUser(IterableWrapper([chunk]))
    next(grouped)
    assert grouped.is_newest_first == falls
