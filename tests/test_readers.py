"""Reading ratings files: every format, every packing, every mistake."""

import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.formats import blocks, text
from pipeline.formats.readers import ReadRatings
from pipeline.formats.source_file import SourceFile

ROWS = {
    "user": ["1", "1", "2"],
    "item": ["10", "7", "10"],
    "rating": [5.0, 3.5, 1.0],
    "timestamp": [30, 20, 10],
}
CSV = b"userId,movieId,rating,timestamp\n1,10,5,30\n1,7,3.5,20\n2,10,1,10\n"
INTER = CSV.replace(
    b"userId,movieId,rating,timestamp",
    b"user_id:token,item_id:token,rating:float,timestamp:float",
).replace(b",", b"\t")
BODY = CSV.partition(b"\n")[2]


def read(*files: Path | SourceFile, **flags: str) -> dict[str, list]:
    return pa.concat_tables(
        list(ReadRatings(*files, **flags)), promote_options="default"
    ).to_pydict()


def plain_id(value: object) -> str | None:
    """A test id without the content of files: gzip's holds the time, so it changes."""
    return "" if isinstance(value, bytes) else None


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ratings.csv", CSV),
        ("ratings.tsv", CSV.replace(b",", b"\t")),
        ("x.inter", INTER),
        ("ratings.dat", BODY.replace(b",", b"::")),
        ("u.data", BODY.replace(b",", b"\t")),
        ("x.txt", BODY.replace(b",", b" ")),
        ("bom.csv", b"\xef\xbb\xbf" + CSV),
        ("bom.dat", b"\xef\xbb\xbf" + BODY.replace(b",", b"::")),
        ("crlf.csv", CSV.replace(b"\n", b"\r\n")),
        ("crlf.dat", BODY.replace(b",", b"::").replace(b"\n", b"\r\n")),
        ("no_newline_at_end.csv", CSV[:-1]),
        ("blank_lines.csv", CSV + b"\n\n"),
        ("quoted.csv", CSV.replace(b"userId", b'"userId"').replace(b"10", b'"10"')),
        ("UPPER.CSV", CSV.upper()),
    ],
    ids=plain_id,
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_separators_headers_and_packing_change_no_row(
    tmp_path: Path, name: str, content: bytes, packed: bool
) -> None:
    if packed:
        name, content = name + ".gz", gzip.compress(content)
    assert read(write(tmp_path / name, content)) == ROWS


def test_zip_member_is_streamed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ml/ratings.csv", CSV)
    assert read(SourceFile(tmp_path / "ml.zip", "ml/ratings.csv")) == ROWS
    assert [each.name for each in tmp_path.iterdir()] == ["ml.zip"]


def test_pairs_in_time_order(tmp_path: Path) -> None:
    pairs = read(write(tmp_path / "beauty.txt", b"1 1\n1 2\n2 1\n"))
    assert pairs == {"user": ["1", "1", "2"], "item": ["1", "2", "1"]}


@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({key: pa.array(ROWS[key]) for key in ROWS})
    table = table.set_column(0, "user_id", table["user"].cast(kind)).append_column(
        "other", pa.array([None] * 3)
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", tmp_path / "a.parquet", columns="user_id,item,rating")
    assert [str(user) for user in found["user"]] == ROWS["user"] * 2
    assert found["rating"] == ROWS["rating"] * 2 and "timestamp" not in found


def test_parquet_times_keep_their_order(tmp_path: Path) -> None:
    times = pa.array([5_000_001, 5_000_000, 7], pa.timestamp("ns"))
    table = pa.table({"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": times})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")["timestamp"] == [5_000_001, 5_000_000, 7]


def test_parquet_files_must_agree(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "item": [1], "time": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user": [1], "item": [1]}), tmp_path / "b.parquet")
    with pytest.raises(
        UserError, match=r"b\.parquet has the columns user, item where .*a\.parquet"
    ):
        read(tmp_path / "a.parquet", tmp_path / "b.parquet")


def test_parquet_times_of_different_units_compare(tmp_path: Path) -> None:
    for name, unit in (("a", "s"), ("b", "ms")):
        times = pa.array([2], pa.timestamp(unit))
        columns = {"user": [1], "item": [1], "timestamp": times}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    found = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert found["timestamp"] == [2_000_000_000, 2_000_000]


def test_ids_are_text_and_nothing_is_rounded(tmp_path: Path) -> None:
    ids = ["007", "7", "-1", "99999999999999999999", "NA", "1e3", "é"]
    lines = "".join(f"{each},x,{2**53 + at}\n" for at, each in enumerate(ids))
    found = read(write(tmp_path / "a.csv", ("user,item,timestamp\n" + lines).encode()))
    assert found["user"] == ids
    assert found["timestamp"] == [2**53 + at for at in range(len(ids))]


def test_a_byte_order_mark_belongs_to_an_id_except_in_front_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.csv", "\ufeffuser,item\n\ufeff1,a\n1,b\n\ufeff1,c\n".encode())
    for size in (20, 1000):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        assert read(file)["user"] == ["\ufeff1", "1", "\ufeff1"]


def test_columns_by_name_in_any_place(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"when,junk,what,who\n9,z,i,u\n8,z,j,u\n")
    found = read(file, columns="who,what,,when")
    assert found == {"user": ["u", "u"], "item": ["i", "j"], "timestamp": [9, 8]}


def test_columns_by_number_have_no_header(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"i;u;9\nj;u;8\n")
    found = read(file, columns="2,1,,3", separator=";")
    assert found == {"user": ["u", "u"], "item": ["i", "j"], "timestamp": [9, 8]}


def test_typed_name_without_its_type(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x.inter", INTER), columns="user_id,item_id") == {
        key: ROWS[key] for key in ("user", "item")
    }


@pytest.mark.parametrize(
    ("times", "whole", "fraction"),
    [
        (["9.0", "8e0"], [9, 8], None),
        (["9", "8.5"], [9, 8], [0.0, 0.5]),  # whole first, decimal later
        (["0.5", "1600000000000000003"], [0, 1600000000000000003], [0.5, 0.0]),
        (["1600000000000000003", "-1.25"], [1600000000000000003, -1], [0.0, -0.25]),
        (["1970-01-01 00:00:01", "1970-01-01T00:00:00"], [1_000_000_000, 0], None),
        (["-5", "-6"], [-5, -6], None),
        (["+5", "5."], [5, 5], None),
    ],
)
def test_a_time_is_its_whole_part_and_the_rest(
    tmp_path: Path, times: list[str], whole: list[int], fraction: list[float] | None
) -> None:
    lines = "".join(f"u,i,{time}\n" for time in times)
    file = write(tmp_path / "a.csv", f"user,item,timestamp\n{lines}".encode())
    found = read(file)
    assert (found["timestamp"], found.get("fraction")) == (whole, fraction)


def test_chunks_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + CSV[:-1])
    for size in (33, 40, 60):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        assert read(file) == ROWS


def test_resumes_at_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 33)
    reader = ReadRatings(write(tmp_path / "a.csv", CSV))
    next(reader)
    state, rest = reader.state_dict(), [table.to_pydict() for table in reader]
    assert len(rest) >= 1
    reader.reset(state)
    assert [table.to_pydict() for table in reader] == rest


HEADER = b"user,item,rating,timestamp\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv: no ratings"),
        ("a.csv", HEADER, r"a\.csv: no ratings"),
        ("a.csv", b"\n\n", r"a\.csv:1: one column only"),
        (
            "a.csv",
            CSV.replace(b",", b";") + b"1;2\n",
            r"a\.csv:1: one column only .* ';'\? Give --separator",
        ),
        ("a.tsv", CSV + b"1,2\n", r"a\.tsv:1: one column only when cut at a tab: .* ','"),
        ("a.csv", b"a,b,c\n1,2,3\n", r"a\.csv:1: cannot tell the user column among a, b, c"),
        ("a.csv", b"user,b\n1,2\n", r"a\.csv:1: cannot tell the item column among user, b"),
        ("a.csv", BODY, r"a\.csv:1: cannot tell the user column among 1, 10, 5, 30; .*no header"),
        ("a.csv", HEADER + b"1,2,3,4\n1,2,3\n", r"a\.csv:3: 3 fields where 4 are expected"),
        ("a.csv", HEADER + b"\n1,2,3,4\n\n1,2,x,4\n", r"a\.csv:5: the rating 'x' is not a number"),
        ("a.csv", HEADER + b"1,2,nan,4\n", r"a\.csv:2: the rating 'nan' is not a number"),
        ("a.csv", HEADER + b"1,2,2015-01-31,4\n", r"the rating '2015-01-31' is a date: .*,,time"),
        ("a.csv", HEADER + b"1,2,inf,4\n", r"a\.csv:2: the rating 'inf' is not a number"),
        ("a.csv", HEADER + b"1,2,,4\n", r"a\.csv:2: the rating '' is not a number"),
        ("a.csv", HEADER + b"1,2,3,4\n1,2,3,NaN\n", r"a\.csv:3: the timestamp 'NaN' is not"),
        ("a.csv", HEADER + b"1,2,3,4\n1,2,3,soon\n", r"a\.csv:3: the timestamp 'soon' is not"),
        ("a.csv", HEADER + b"1,2,3,soon\n", r"a\.csv:2: the timestamp 'soon' is neither"),
        ("a.csv", HEADER + b"1,2,3,2015-99-01\n", r"a\.csv:2: the timestamp '2015-99-01'"),
        ("a.csv", HEADER + b"1,2,3,4\n,2,3,4\n", r"a\.csv:3: the user id is empty"),
        ("a.csv", HEADER + b"1, ,3,4\n", r"a\.csv:2: the item id is empty"),
        ("a.csv", HEADER + b"1,\xc3\xa9,3,4\n1,\xe9,3,4\n", r"a\.csv:3: not UTF-8"),
        ("a.csv", b"\xe9,item\n1,2\n", r"a\.csv:1: cannot tell the user column among \?, item"),
        ("a.dat", b"1::2::3::4\n1::2::3\n", r"a\.dat:2: 3 fields where 4 are expected"),
        ("a.dat", b"1,2,3,4\n1,2\n", r"a\.dat:1: one column only when cut at '::'.* ','"),
        ("a.txt", b"1 2\n1  2\n", r"a\.txt:2: 3 fields where 2 are expected"),
        ("a.csv", b"user,item\n\x00\x01\n", r"a\.csv is not a text file"),
        ("a.png", b"\x89PNG\r\n\x1a\n\x00\x00", r"a\.png is not a text file"),
        ("a.json", b'{"user": 1}\n', r"a\.json: cannot tell the item column among user"),
        ("a.json", CSV, r"cannot tell the format from the name 'a\.json'"),
        ("noextension", CSV, r"cannot tell the format from the name 'noextension'"),
        ("a.csv.gz", gzip.compress(CSV * 999)[:-20], r"cannot read .*a\.csv\.gz"),
        ("a.csv.gz", b"\x1f\x8b\x08 nonsense", r"cannot read .*a\.csv\.gz"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"cannot read .*a\.parquet"),
        ("a.parquet", b"not parquet,x\n", r"a\.parquet is no Parquet file in spite of its name"),
    ],
    ids=plain_id,
)
def test_mistakes_in_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"columns": "userId,nope"},
            r"a\.csv:1: no column 'nope' \(--columns\); there are userId, m",
        ),
        ({"columns": "1,9"}, r"a\.csv:1: no column 9 \(--columns\); there are 4"),
        ({"columns": "user"}, "--columns must name user,item"),
        ({"columns": ",item"}, "--columns must name user,item"),
        ({"columns": "a,b,c,d,e"}, "--columns must name user,item"),
        ({"separator": "ab"}, "--separator must be one character"),
        ({"separator": "é"}, "--separator must be one character, .* not 'é': ASCII only"),
        ({"separator": "tab"}, "one column only when cut at a tab"),
    ],
)
def test_mistakes_in_flags(tmp_path: Path, flags: dict[str, str], message: str) -> None:
    file = write(tmp_path / "a.csv", CSV)
    with pytest.raises(UserError, match=message):
        read(file, **flags)


QUOTED = b'u,i\n1,"a\n""b"\n2,"c" \n3,'


@pytest.mark.parametrize(
    ("field", "separator"),
    [
        (b'"a"b', b","),
        (b'"a" b', b","),
        (b'"a""b"c', b";"),
        (b'"a"b"c"', b","),
        (b'"a\nb"c', b","),
        (b'""b', b";"),
        (b'"a""b" "', b","),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n4,x\n"])
def test_text_after_a_closing_quotation_mark(
    tmp_path: Path, field: bytes, separator: bytes, end: bytes
) -> None:
    """Arrow joins both parts: "a"b and ab would be one item."""
    content = (QUOTED + field + end).replace(b",", separator)
    path = write(tmp_path / "x.csv", content)
    line = 5 + field.count(b"\n")
    with pytest.raises(UserError, match=rf"x\.csv:{line}: text follows a closing quotation mark"):
        read(path, columns="u,i", separator=separator.decode())


def test_marks_that_close_at_the_end_of_a_field(tmp_path: Path) -> None:
    rows = b'"a""b",1\n"c" ,3\nd"e"f,4\n"g,\n""h""","5"\n'
    found = read(write(tmp_path / "x.csv", b"i,u\n" + rows), columns="u,i")
    assert found == {"user": ["1", "3", "4", "5"], "item": ['a"b', "c", 'd"e"f', 'g,\n"h"']}


def test_bad_line_is_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    file = write(tmp_path / "a.csv", HEADER + b"1,2,3,4\n" * 50 + b"1,2,bad,4\n" + b"1,2,3,4\n" * 9)
    with pytest.raises(UserError, match=r"a\.csv:52: the rating 'bad'"):
        read(file)


def test_a_line_longer_than_a_block_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    with pytest.raises(UserError, match=r"a\.csv:1: a line of more than 64 bytes"):
        read(write(tmp_path / "a.csv", b"x" * 1000))


@pytest.mark.parametrize(
    "note",
    [
        b"x" * (6 << 20),
        b"x" * (17 << 20),
        b'"' + b"quoted\n" * (1 << 20) + b'"',
        b'"' + b"so are these lines of it\n" * (1 << 20) + b'"',
    ],
    ids=["6 MB", "17 MB", "7 MB of quoted lines", "25 MB of quoted lines"],
)
def test_records_longer_than_a_block_are_read(tmp_path: Path, note: bytes) -> None:
    rows = b"1,10,%s\n1,11,z\n1,12,z\n" % note
    file = write(tmp_path / "a.csv", b"user,item,note\n" + rows)
    assert read(file) == {"user": ["1"] * 3, "item": ["10", "11", "12"]}
    write(file, b"user,item,note\n" + rows + b"1,,z\n")
    line = 5 + note.count(b"\n")
    with pytest.raises(UserError, match=rf"a\.csv:{line}: the item id is empty"):
        read(file)


def test_quoted_line_ends_of_windows_are_kept_at_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_PARSED_BYTES", 64)
    for before in range(1, 64):
        row = b'"' + b"x" * before + b'\r\n","i"\r\n'
        file = write(tmp_path / "a.csv", b"user,item\r\n" + row * 3)
        assert read(file)["user"] == ["x" * before + "\r\n"] * 3


def test_an_open_quotation_mark_in_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    file = write(tmp_path / "a.csv", HEADER + b'1,2,3,4\n1,"2,3,4\n' + b"1,2,3,4\n" * 50)
    with pytest.raises(UserError, match=r"a\.csv:3: a line of more than 64 bytes; is a quotation"):
        read(file)


@pytest.mark.parametrize(
    "time", [pa.array([1.5, 2, 3]), pa.array([1, 2, 3], pa.float32()), pa.array([1, 2, 3])]
)
def test_parquet_parts_may_write_times_in_different_ways(tmp_path: Path, time: pa.Array) -> None:
    for at, part in enumerate((pa.array([2**53 + 1] * 3), time)):
        columns = {"user": [1] * 3, "item": [1] * 3, "time": part}
        pq.write_table(pa.table(columns), tmp_path / f"{at}.parquet")
    found = read(tmp_path / "0.parquet", tmp_path / "1.parquet")
    assert found["timestamp"] == [2**53 + 1] * 3 + [1, 2, 3]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.decimal128(3, 1)])
def test_parquet_ratings_are_the_numbers_that_are_written(
    tmp_path: Path, kind: pa.DataType
) -> None:
    ratings = pa.array(["4.1", "-1.0"]).cast(kind)
    columns = {"user": [1, 1], "item": [1, 2], "rating": ratings}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")["rating"] == [4.1, -1.0]


def test_a_link_to_itself_is_not_called_incomplete(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to("a.csv")
    with pytest.raises(UserError, match=r"a\.csv: Too many levels of symbolic links$"):
        read(tmp_path / "a.csv")


def test_missing_file_and_damaged_zip(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*nope\.csv"):
        read(tmp_path / "nope.csv")
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path)
    content = CSV * 500
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", content)
    damaged = bytearray((tmp_path / "a.zip").read_bytes())
    damaged[60] ^= 255
    write(tmp_path / "b.zip", bytes(damaged))
    with pytest.raises(UserError, match=r"cannot read .*b\.zip"):
        read(SourceFile(tmp_path / "b.zip", "a.csv"))
    with pytest.raises(UserError, match="no such member"):
        read(SourceFile(tmp_path / "a.zip", "other.csv"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1.5], "item": [1]}, "user ids are double, not text or whole numbers"),
        ({"user": [1, None], "item": [1, 2]}, r"row 1 \(from 0\) has no user"),
        ({"user": ["", "a"], "item": [1, 2]}, "the user id is empty"),
        ({"user": [1], "item": [1], "rating": [float("nan")]}, "a rating is not a finite number"),
        (
            {"user": [1], "item": [1], "rating": ["5"]},
            'rating column is string, not a number: .* or none: "user,item,,time"',
        ),
        ({"user": [1], "stuff": [1]}, "cannot tell the item column among user, stuff"),
        ({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())}, "no ratings in it"),
    ],
)
def test_mistakes_in_parquet(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet")
