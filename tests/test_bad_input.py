"""Ratings files through train.py: each is read correctly or rejected with one line.

Accepted files are compared with the prepared store, history by history; rejected ones leave none.
"""

import base64
import gzip
import io
import os
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from pipeline.formats import source_file as sources
from pipeline.preparation.store import SequenceStore
from tests.conftest import TINY, RunMain, assert_one_line, assert_refused

HEAD = b"user,item,rating,timestamp\n"
BODY = b"1,10,4,1\n1,11,4,2\n1,12,4,3\n2,11,4,1\n2,12,4,2\n2,13,4,3\n"
CSV = HEAD + BODY
HISTORIES = {"1": ["10", "11", "12"], "2": ["11", "12", "13"]}
FLAGS = ("--recipe=none", "--min_user_count=0", "--num_epochs=1")


def parquet(options: dict[str, Any] | None = None, **columns: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **(options or {}))
    return stream.getvalue()


class PlainKeys(encryption.KmsClient):
    """Keys that are wrapped by no key."""

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)


def encrypted_parquet() -> bytes:
    """Parquet whose footer is plain and whose item column is encrypted."""
    properties = encryption.CryptoFactory(lambda _: PlainKeys()).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration("a", column_keys={"b": ["item"]}, plaintext_footer=True),
    )
    return parquet({"encryption_properties": properties}, user=[1], item=[1])


def zipped(*members: tuple[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def encrypted() -> bytes:
    """A zip whose headers mark its member as encrypted."""
    content = bytearray(zipped(("ratings.csv", CSV), how=zipfile.ZIP_STORED))
    content[6] |= 1
    content[content.find(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def packed_by(method: int) -> bytes:
    """A zip whose headers say that its member is packed by this method."""
    content = bytearray(zipped(("ratings.csv", CSV)))
    content[8] = content[content.find(b"PK\x01\x02") + 10] = method
    return bytes(content)


PARQUET = parquet(
    user=[1, 1, 1, 2, 2, 2], item=[10, 11, 12, 11, 12, 13], timestamp=[1, 2, 3, 1, 2, 3]
)
MORE = {"3": ["10", "x"]}

# Files of a folder, the one that is --dataset_path ("." is the folder), the resulting histories.
READ: dict[str, tuple[dict[str, bytes], str, dict[str, list[str]]]] = {
    "as it should be": ({"r.csv": CSV}, "r.csv", HISTORIES),
    "duplicate rows": (
        {"r.csv": CSV + BODY},
        "r.csv",
        {user: [item for item in items for _ in range(2)] for user, items in HISTORIES.items()},
    ),
    "unsorted": (
        {"r.csv": HEAD + b"".join(reversed(BODY.splitlines(keepends=True)))},
        "r.csv",
        HISTORIES,
    ),
    "mixed line ends": ({"r.csv": CSV.replace(b"\n", b"\r\n", 3)}, "r.csv", HISTORIES),
    "an old Mac's line end in the middle": (
        {"r.csv": CSV.replace(b"1,11,4,2\n", b"1,11,4,2\r")},
        "r.csv",
        HISTORIES,
    ),
    "byte order mark": ({"r.csv": b"\xef\xbb\xbf" + CSV}, "r.csv", HISTORIES),
    "no last line end": ({"r.csv": CSV[:-1]}, "r.csv", HISTORIES),
    "spaces around numbers": ({"r.csv": CSV.replace(b",4,", b", 4 , ")}, "r.csv", HISTORIES),
    "negative ids": (
        {"r.csv": CSV.replace(b"\n1,", b"\n-1,")},
        "r.csv",
        {"-1": HISTORIES["1"], "2": HISTORIES["2"]},
    ),
    "ids larger than 64 bits": (
        {"r.csv": CSV.replace(b",10,", b",99999999999999999999,")},
        "r.csv",
        HISTORIES | {"1": ["99999999999999999999", "11", "12"]},
    ),
    "ids as text": (
        {"r.csv": HEAD + "ü,a b,4,1\nü,NaN,4,2\nü,007,4,3\nü,NULL,4,4\n".encode()},
        "r.csv",
        {"ü": ["a b", "NaN", "007", "NULL"]},
    ),
    "a line end inside quotation marks": (
        {"r.csv": CSV + b'3,10,4,1\n3,"x\ny",4,2\n'},
        "r.csv",
        HISTORIES | {"3": ["10", "x\ny"]},
    ),
    "decimal timestamps among whole ones": (
        {"r.csv": CSV + b"3,10,4,1\n3,x,4,1.5\n"},
        "r.csv",
        HISTORIES | MORE,
    ),
    "whole timestamps that float64 would merge, after a decimal one": (
        {
            "r.csv": HEAD
            + b"1,a,4,0.5\n"
            + b"".join(b"1,%d,4,160000000000000000%d\n" % (n, n) for n in (3, 2, 1))
        },
        "r.csv",
        {"1": ["a", "1", "2", "3"]},
    ),
    "the same before it": (
        {
            "r.csv": HEAD
            + b"".join(b"1,%d,4,160000000000000000%d\n" % (n, n) for n in (3, 2, 1))
            + b"1,a,4,0.5\n"
        },
        "r.csv",
        {"1": ["a", "1", "2", "3"]},
    ),
    "a decimal timestamp just above a whole one": (
        {"r.csv": HEAD + b"1,b,4,5.00000000000000000001\n1,a,4,5\n1,c,4,6\n"},
        "r.csv",
        {"1": ["a", "b", "c"]},
    ),
    "blanks around ids": (
        {"r.csv": HEAD + b"1, 10,4,1\n1 ,10 ,4,2\n 1,10,4,3\n"},
        "r.csv",
        {"1": ["10"] * 3},
    ),
    "negative ratings": (
        {"r.csv": HEAD + b"1,10,-1,1\n1,11,-9.5,2\n1,12,1e300,3\n"},
        "r.csv",
        {"1": ["10", "11", "12"]},
    ),
    "quotation marks inside unquoted text": (
        {"r.csv": b'user,item,x\n1,a,5" pipe\n1,b,"x\ny 6"" z"\n1,c,7" 8"\n'},
        "r.csv",
        {"1": ["a", "b", "c"]},
    ),
    "a header with a line end": (
        {"r.csv": b'user,"a\nb",item\n1,x,10\n1,y,11\n1,z,12\n'},
        "r.csv",
        {"1": ["10", "11", "12"]},
    ),
    "a line end of Windows inside quotation marks": (
        {"r.csv": CSV.replace(b"\n", b"\r\n") + b'3,10,4,1\r\n3,"x\r\ny",4,2\r\n'},
        "r.csv",
        HISTORIES | {"3": ["10", "x\r\ny"]},
    ),
    "a tab where :: separates": (
        {"r.dat": b"1::a::4::1::x\ty\n1::b::4::2::z\n1::c::4::3::\n"},
        "r.dat",
        {"1": ["a", "b", "c"]},
    ),
    "Parquet decimal timestamps": (
        {
            "r.parquet": parquet(
                user=[1] * 3,
                item=[3, 2, 1],
                time=pa.array(
                    [Decimal(1600000000000000000 + n) for n in (3, 2, 1)], pa.decimal128(20, 0)
                ),
            )
        },
        "r.parquet",
        {"1": ["1", "2", "3"]},
    ),
    "Parquet ids with blanks": (
        {"r.parquet": parquet(user=[1] * 4, item=["7 ", "7", " 7", "7\n"])},
        "r.parquet",
        {"1": ["7 ", "7", " 7", "7\n"]},
    ),
    "timestamps at the ends of 64 bits": (
        {"r.csv": CSV + b"3,x,4,9223372036854775807\n3,10,4,-9223372036854775808\n"},
        "r.csv",
        HISTORIES | MORE,
    ),
    "one user": ({"r.csv": HEAD + BODY[:27]}, "r.csv", {"1": HISTORIES["1"]}),
    "one item": ({"r.csv": HEAD + b"1,7,4,1\n1,7,4,2\n1,7,4,3\n"}, "r.csv", {"1": ["7"] * 3}),
    "a user of one rating": ({"r.csv": CSV + b"3,10,4,1\n"}, "r.csv", HISTORIES | {"3": ["10"]}),
    "gzipped": ({"r.csv.gz": gzip.compress(CSV)}, "r.csv.gz", HISTORIES),
    "called gzipped": ({"r.csv.gz": CSV}, "r.csv.gz", HISTORIES),
    "a zip that wants out of its folder": (
        {"in/r.zip": zipped(("../../ratings.csv", CSV))},
        "in/r.zip",
        HISTORIES,
    ),
    "a zip that wants to the root": ({"r.zip": zipped(("/ratings.csv", CSV))}, "r.zip", HISTORIES),
    "a folder with a stray file": ({"ratings.csv": CSV, "notes.md": b"x"}, ".", HISTORIES),
    "Parquet": ({"r.parquet": PARQUET}, "r.parquet", HISTORIES),
    "Parquet by another name": ({"r.csv": PARQUET}, "r.csv", HISTORIES),
    "Parquet parts and stray files": (
        {"a.parquet": PARQUET, "b.parquet": PARQUET, "_SUCCESS": b"", ".crc": b"x", "README": b""},
        ".",
        {user: [item for item in items for _ in range(2)] for user, items in HISTORIES.items()},
    ),
    "Parquet ids larger than 63 bits": (
        {"r.parquet": parquet(user=pa.array([2**63 + 5] * 3, pa.uint64()), item=[3, 1, 2])},
        "r.parquet",
        {"9223372036854775813": ["3", "1", "2"]},
    ),
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("case", READ)
def test_accepted_files(run_main: RunMain, tmp_path: Path, run_dir: Path, case: str) -> None:
    files, path, histories = READ[case]
    data = tmp_path / "data"
    write(data, files)
    cache_dir = tmp_path / "cache"
    flags = [f"--dataset_path={data / path}", f"--cache_dir={cache_dir}", f"--run_dir={run_dir}"]
    outcome = run_main("train", *TINY, *FLAGS, *flags)
    assert outcome.code == 0, outcome.err
    (folder,) = (cache_dir / "stores").glob("[!.]*")
    store = SequenceStore.open(folder)
    items = [store.catalog.item_id(item) for item in store.items.tolist()]
    found = {
        user: items[slice(*store.offsets[at : at + 2])]
        for at, user in enumerate(store.catalog.users.to_pylist())
    }
    assert found == histories
    assert f"{sum(map(len, histories.values()))} ratings" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "runs"]


GZIP = gzip.compress(CSV * 50)
ONE = [1, 1, 1]
# File, content, error line; FILE stands for the file's path.
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("r.csv", b"", "FILE: no ratings in it"),
    "header only": ("r.csv", HEAD, "FILE: no ratings in it"),
    "blank lines only": ("r.csv", b"\n\n\n", "FILE:1: one column only when cut at ','"),
    "wrong separator": (
        "r.csv",
        CSV.replace(b",", b";") + b"1;2\n",
        "FILE:1: one column only when cut at ',': 'user;item;rating;timestamp'; is it ';'? Give "
        "--separator",
    ),
    "no header": ("r.csv", BODY, "FILE:1: cannot tell the user column among 1, 10, 4, 1"),
    "missing column": (
        "r.csv",
        b"user,rating\n1,2\n",
        "FILE:1: cannot tell the item column among user, rating; name them with --columns",
    ),
    "a column twice": (
        "r.csv",
        b"user,item,item\n1,2,3\n",
        "FILE:1: several columns are called 'item': rename them, or choose others with --columns",
    ),
    "a comment first": ("r.csv", b"# mine\n" + CSV, "FILE:1: one column only"),
    "header twice": ("r.csv", CSV + CSV, "FILE:8: the rating 'rating' is not a number"),
    "text in a number column": (
        "r.csv",
        CSV + b"1,2,four,4\n",
        "FILE:8: the rating 'four' is not a number",
    ),
    "Python's way to write a number": (
        "r.csv",
        CSV + b"1,2,1_0,4\n",
        "FILE:8: the rating '1_0' is not a number",
    ),
    "a comma for a point": (
        "r.csv",
        CSV.replace(b"1,10,4,1", b"1,10,4,5,1"),
        "FILE:2: 5 fields where 4 are expected",
    ),
    "NaN": ("r.csv", CSV + b"1,2,NaN,4\n", "FILE:8: the rating 'NaN' is not a number"),
    "infinity": ("r.csv", CSV + b"1,2,1e400,4\n", "FILE:8: the rating '1e400' is not a number"),
    "no timestamp": ("r.csv", CSV + b"1,2,3,\n", "FILE:8: the timestamp '' is not a number"),
    "timestamp larger than 64 bits": (
        "r.csv",
        CSV + b"1,2,3,99999999999999999999\n",
        "FILE:8: the timestamp '99999999999999999999' does not fit into 64 bits",
    ),
    "a timestamp of too many digits": (
        "r.csv",
        CSV + b"1,2,3,0.3\n1,2,3,0.30000000000000001\n",
        "FILE:9: the timestamp '0.30000000000000001' has too many digits after the point to be "
        "compared exactly: round the times",
    ),
    "a timestamp beyond float64": (
        "r.csv",
        CSV.replace(b",1\n", b",1e400\n"),
        "FILE:2: the timestamp '1e400' does not fit into 64 bits",
    ),
    "a hexadecimal timestamp": (
        "r.csv",
        CSV + b"1,2,3,0x10\n",
        "FILE:8: the timestamp '0x10' is not a number",
    ),
    "a date before nanoseconds": (
        "r.csv",
        b"user,item,date\n1,2,2020-01-01\n1,3,0001-01-01\n",
        "FILE:3: the timestamp '0001-01-01' is not between 1677-09-22 and 2262-04-11: 64 bits of",
    ),
    "a date after nanoseconds": (
        "r.csv",
        b"user,item,date\n1,2,9999-12-31 00:00:00\n",
        "FILE:2: the timestamp '9999-12-31 00:00:00' is not between 1677-09-22 and 2262-04-11",
    ),
    "a time with a zone beside times without one": (
        "r.csv",
        b"user,item,date\n1,2,2014-04-07\n1,2,2014-04-07T10:51:09.277Z\n",
        "FILE:3: the timestamp '2014-04-07T10:51:09.277Z' has a time zone, the first one has none",
    ),
    "a time without a zone beside times with one": (
        "r.csv",
        b"user,item,date\n1,2,2014-04-07T10:51:09+02:00\n1,2,2014-04-07\n",
        "FILE:3: the timestamp '2014-04-07' has no time zone, the first one has one",
    ),
    "a zone by its name": (
        "r.csv",
        b"user,item,date\n1,2,2014-04-07 10:51:09 CET\n",
        "FILE:2: the timestamp '2014-04-07 10:51:09 CET' has the time zone CET, which is not read",
    ),
    "day or month first": (
        "r.csv",
        b"user,item,date\n1,2,07/04/2014\n",
        "FILE:2: the timestamp '07/04/2014' does not tell the day from the month",
    ),
    "a time finer than nanoseconds": (
        "r.csv",
        b"user,item,date\n1,2,2020-01-01 00:00:00.0123456789\n",
        "FILE:2: the timestamp '2020-01-01 00:00:00.0123456789' is not written like 2015-01-31",
    ),
    "an empty id": ("r.csv", CSV + b"1, ,3,4\n", "FILE:8: the item id is empty"),
    "a quotation mark left open": (
        "r.csv",
        CSV + b'1,"2,3,4\n' + BODY,
        "FILE:8: a quotation mark is opened and not closed",
    ),
    "a quotation mark left open in the last column": (
        "r.csv",
        b'user,item\n1,a\n1,"b\n1,c\n1,d\n',
        "FILE:3: a quotation mark is opened and not closed",
    ),
    "a mistake after quoted line ends": (
        "r.csv",
        HEAD + b'1,"x\n\ny",4,1\n' * 3 + b"1,2,four,4\n",
        "FILE:11: the rating 'four' is not a number",
    ),
    "a line of blanks": ("r.csv", CSV + b"   \n" + BODY, "FILE:8: 1 fields where 4 are expected"),
    "a line that is too long": (
        "r.csv",
        CSV + b"3," + b"x" * (40 << 20) + b",4,1\n",
        "FILE:8: a line of more than 16,777,216 bytes",
    ),
    "a line cut off": ("r.csv", CSV[:-4], "FILE:7: 3 fields where 4 are expected"),
    "an old Mac's line ends": (
        "r.csv",
        CSV.replace(b"\n", b"\r"),
        "FILE:1: lines must end in a line feed, not only a carriage return",
    ),
    "UTF-8, then latin-1": (
        "r.csv",
        CSV.replace(b",10,", ",ü,".encode()) + "1,é,3,4\n".encode("latin-1"),
        "FILE:8: not UTF-8 text: b'1,\\xe9,3,4'",
    ),
    "UTF-16 without a mark": (
        "r.csv",
        CSV.decode().encode("utf-16-be"),
        "FILE looks like UTF-16 without a byte order mark: convert it to UTF-8",
    ),
    "UTF-16 cut off": (
        "r.csv",
        CSV.decode().encode("utf-16")[:-1],
        "cannot read FILE: it is no utf-16 text, as which it begins; is it complete?",
    ),
    "text called ORC": ("r.orc", CSV, "FILE is no ORC file in spite of its name"),
    "half an ORC file": ("r.orc", b"ORC" + b"0" * 80, "cannot read FILE: "),
    "unknown format": ("r.json", CSV, "FILE: cannot tell the format from the name 'r.json'"),
    "gzip cut off": ("r.csv.gz", GZIP[:-20], "cannot read FILE: Compressed file ended before"),
    "gzip with a flipped byte": (
        "r.csv.gz",
        GZIP[:-8] + bytes([GZIP[-8] ^ 1]) + GZIP[-7:],
        "cannot read FILE: CRC check failed",
    ),
    "gzip in gzip": ("r.csv.gz", gzip.compress(GZIP), "FILE is not a text file"),
    "a bomb in one line": (
        "r.csv.gz",
        gzip.compress(b"0" * (20 << 20)),
        "FILE:1: a line of more than 16,777,216 bytes",
    ),
    "half a Parquet file": (
        "r.parquet",
        PARQUET[: len(PARQUET) // 2],
        "cannot read FILE: Parquet magic bytes not found in footer",
    ),
    "text called Parquet": ("r.parquet", CSV, "FILE is no Parquet file in spite of its name"),
    "Parquet without a user": (
        "r.parquet",
        parquet(user=[1, None], item=[1, 2]),
        "FILE: row 1 (from 0) has no user",
    ),
    "Parquet text that is no UTF-8": (
        "r.parquet",
        parquet(user=pa.array([b"\xff"]).view(pa.string()), item=[1]),
        "FILE: row 0 (from 0): Invalid UTF8 sequence at string index 0",
    ),
    "Parquet ids that are no ids": (
        "r.parquet",
        parquet(user=[1.5], item=[1]),
        "FILE: the user ids are double, not text or whole numbers",
    ),
    "Parquet times in words": (
        "r.parquet",
        parquet(user=ONE, item=ONE, time=["1", "2", "soon"]),
        "FILE: row 2 (from 0): the timestamp soon is neither a number nor a date like 2015-01-31",
    ),
    "Parquet times of the year 9999": (
        "r.parquet",
        parquet(user=ONE, item=ONE, time=np.array(["2020", "9999", "2021"], "datetime64[us]")),
        "FILE: row 1 (from 0): the timestamp 9999-01-01 00:00:00.000000 is not between 1677-09-22",
    ),
    "Parquet times of the year 9999 in the old type": (  # wrapped around 64 bits by Arrow
        "r.parquet",
        parquet(
            {"use_deprecated_int96_timestamps": True},
            user=ONE,
            item=ONE,
            time=np.array(["2020", "9999", "2021"], "datetime64[us]"),
        ),
        "FILE: row 1 (from 0): the timestamp 9999-01-01 00:00:00.000000 is not between 1677-09-22",
    ),
    "Parquet times that are durations": (
        "r.parquet",
        parquet(user=ONE, item=ONE, time=np.array([1, 2, 3], "timedelta64[s]")),
        "FILE: the timestamp column is duration[s], not a number or a date",
    ),
    "Parquet times that are no numbers": (
        "r.parquet",
        parquet(user=ONE, item=ONE, time=[1.0, 2.0, float("nan")]),
        "FILE: row 2 (from 0): the timestamp nan is not a number",
    ),
    "Parquet decimal times of too many digits": (
        "r.parquet",
        parquet(
            user=ONE, item=ONE, time=[Decimal("0.3"), Decimal("0.30000000000000001"), Decimal(1)]
        ),
        "FILE: row 1 (from 0): the timestamp 0.30000000000000001 has too many digits after the",
    ),
    "Parquet in gzip": (
        "r.parquet.gz",
        gzip.compress(PARQUET),
        "FILE: Parquet in a zip or gzip cannot be streamed; unpack it first",
    ),
    "Parquet in zip": (
        "r.zip",
        zipped(("r.parquet", PARQUET)),
        "FILE/r.parquet: Parquet in a zip or gzip cannot be streamed; unpack it first",
    ),
    "a zip packed by another program": (
        "r.zip",
        packed_by(97),
        "cannot read FILE/ratings.csv: That compression method is not supported; unpack it your",
    ),
    "Parquet encrypted with its footer": (
        "r.parquet",
        b"PARE" + PARQUET[4:-4] + b"PARE",
        "FILE is encrypted: decrypt it first",
    ),
    "Parquet encrypted but for its footer": (
        "r.parquet",
        encrypted_parquet(),
        "FILE is encrypted: decrypt it first",
    ),
    "Parquet times larger than 64 bits": (
        "r.parquet",
        parquet(user=ONE, item=ONE, time=pa.array([2**63] * 3, pa.uint64())),
        "FILE: row 0 (from 0): the timestamp 9223372036854775808 does not fit into 64 bits",
    ),
    "zip cut off": ("r.zip", zipped(("ratings.csv", CSV))[:-9], "cannot read FILE: File is not a"),
    "zip without ratings": ("r.zip", zipped(), "FILE: no ratings file in it; looked for"),
    "zip with two": (
        "r.zip",
        zipped(("a/ratings.csv", CSV), ("b/ratings.csv", CSV)),
        "FILE: several ratings files (a/ratings.csv, b/ratings.csv) in it; give the file itself",
    ),
    "zip in zip": ("r.zip", zipped(("r.zip", zipped())), "FILE/r.zip is not a text file"),
    "zip with a bomb": (
        "r.zip",
        zipped(("ratings.csv", b"0" * (20 << 20))),
        "FILE/ratings.csv:1: a line of more than 16,777,216 bytes",
    ),
    "encrypted zip": ("r.zip", encrypted(), "FILE/ratings.csv is encrypted: decrypt it first"),
    "a number after dates": (
        "r.csv",
        HEAD + b"1,1,1,2020-01-01\n1,2,1,1600000000\n",
        "FILE:3: the timestamp '1600000000' is a number, the first one is none: write all in one",
    ),
    "a date after numbers": (
        "r.csv",
        HEAD + b"1,1,1,1.5\n1,2,1,2020-01-01\n",
        "FILE:3: the timestamp '2020-01-01' is a date, the first one is a number: write all in one",
    ),
    "a date after whole numbers": (
        "r.csv",
        HEAD + b"1,1,1,1\n1,2,1,2020-01-01\n",
        "FILE:3: the timestamp '2020-01-01' is a date, the first one is a number: write all in one",
    ),
    "one rating": ("r.csv", HEAD + b"1,1,1,1\n", "no user of r has 3 items"),
    "all histories of length 2": (
        "r.csv",
        HEAD + b"".join(b"%d,%d,4,1\n" % (user, item) for user in range(9) for item in (1, 2)),
        "no user of r has 3 items, which training, validation and test need: check --columns, "
        "or hold out by time with --split_time",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejected_files(run_main: RunMain, tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    flags = [*FLAGS, f"--dataset_path={path}"]
    assert_refused(run_main, tmp_path, flags, message.replace("FILE", str(path)))


def test_a_zip_bomb_of_valid_lines(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BOMB_BYTES", 1 << 20)
    path = tmp_path / "r.csv.gz"
    path.write_bytes(gzip.compress(HEAD + b"1,1,1,1\n" * 200_000))  # 1.6 MB of it
    message = f"{path} unpacks to more than 200 times its size: it looks like a bomb"
    assert_refused(run_main, tmp_path, [*FLAGS, f"--dataset_path={path}"], message)


def two_kinds_of_time(folder: Path) -> str:
    seconds = np.array([1, 2, 3], "datetime64[s]")
    write(folder, {"a.parquet": PARQUET})
    write(folder, {"b.parquet": parquet(user=ONE, item=ONE, timestamp=seconds)})
    return (
        f"{folder}/b.parquet has the columns user, item, timestamp (as dates) where "
        f"{folder}/a.parquet has user, item, timestamp: choose with --columns"
    )


def dates_with_and_without_a_zone(folder: Path) -> str:
    times = pa.array([1, 2, 3], pa.timestamp("s"))
    write(folder, {"a.parquet": parquet(user=ONE, item=ONE, timestamp=times)})
    zoned = times.cast(pa.timestamp("s", "Asia/Tokyo"))
    write(folder, {"b.parquet": parquet(user=ONE, item=ONE, timestamp=zoned)})
    return (
        f"{folder}/b.parquet has the columns user, item, timestamp (with a zone) where "
        f"{folder}/a.parquet has user, item, timestamp (as dates): choose with --columns"
    )


def a_part_that_is_none(folder: Path) -> str:
    write(folder, {"a.parquet": PARQUET, "b.parquet": CSV})
    return f"{folder}/b.parquet is no Parquet file in spite of its name; is it complete?"


def two_files(folder: Path) -> str:
    write(folder, {"a.csv": CSV, "b.csv": CSV})
    return f"{folder}: no ratings file in it; looked for ratings.csv, ratings.dat, u.data; give"


def empty_folder(folder: Path) -> str:
    folder.mkdir()
    return f"{folder}: no ratings file in it"


def nothing_there(folder: Path) -> str:
    return f"no such file: {folder}; check the path"


def link_to_itself(folder: Path) -> str:
    folder.symlink_to(folder.name)
    return f"cannot read {folder}: Too many levels of symbolic links"


def pipe(folder: Path) -> str:
    os.mkfifo(folder)
    return f"{folder} is neither a file nor a folder: give one"


@pytest.mark.parametrize(
    "make",
    [
        two_kinds_of_time,
        dates_with_and_without_a_zone,
        a_part_that_is_none,
        two_files,
        empty_folder,
        nothing_there,
        link_to_itself,
        pipe,
    ],
)
def test_rejected_paths(run_main: RunMain, tmp_path: Path, make: Callable[[Path], str]) -> None:
    path = tmp_path / "data"
    message = make(path)
    assert_refused(run_main, tmp_path, [*FLAGS, f"--dataset_path={path}"], message)


def test_a_file_without_read_permission(run_main: RunMain, tmp_path: Path) -> None:
    assert run_main("train", "--dataset_path=none.csv").code == 2  # imports all libraries
    path = tmp_path / "r.csv"
    path.write_bytes(CSV)
    path.chmod(0)
    tmp_path.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root can read every file
    try:
        outcome = run_main("train", f"--dataset_path={path}")
    finally:
        os.seteuid(user)
    assert_one_line(outcome, "train", f"cannot read {path}: Permission denied")
    assert [each.name for each in tmp_path.iterdir()] == ["r.csv"]
