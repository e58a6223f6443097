"""For any ratings in any form: the exact order of times, ids kept apart, lines kept whole.

Written and read back through files; the expected values are Python's own.
"""

import itertools
import tempfile
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.formats import blocks
from pipeline.formats import text as text_reader
from pipeline.formats.readers import ReadRatings
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.stages import Densify, EncodeIds
from pipeline.tables.values import first_failing

# Times that float64 merges with their neighbours, and times that it does not hold.
WHOLE = st.builds(
    lambda base, offset: max(-(2**63), min(base + offset, 2**63 - 1)),
    st.sampled_from([0, 2**53, 1_600_000_000_000_000_000, 2**63 - 1, -(2**63), -(2**53)]),
    st.integers(-3, 3),
)
DIGITS = st.sampled_from(["", ".0", ".5", ".1", ".25", ".000000001", ".123456789012345"])
WRITTEN = st.one_of(
    st.builds(lambda whole, digits: f"{whole}{digits}", WHOLE, DIGITS),
    st.floats(-1e-3, 1e18).map(repr),
    st.sampled_from(
        ["1e3", "5e-324", "1e-87", "1.0005E+3", "+1000", "1000.", ".5", "-0.5", "-0", " 7 ", "0.50"]
    ),
)
FLOATS = st.one_of(st.floats(-(2.0**62), 2.0**62), WHOLE.map(float).filter(lambda x: x < 2.0**63))
UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def order(path: Path) -> list[int]:
    """The items of the only user, which are the numbers of their rows, in the order of times."""
    encoded = EncodeIds(ReadRatings(path))
    dense = Densify(encoded)
    (histories,) = GroupByUser(dense)
    return [int(encoded.items[dense.kept_items[item - 1]].as_py()) for item in histories.items]


def expected(times: Sequence[int | Fraction]) -> list[int]:
    return sorted(range(len(times)), key=lambda row: times[row])


def text(*columns: Sequence[object]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in zip(*columns, strict=True))


def order_in_text(times: list[str], block: int) -> list[int]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "r.csv"
        rows = text(["u"] * len(times), range(len(times)), times)
        path.write_text("user,item,time\n" + rows)
        patch.setattr(blocks, "BLOCK_BYTES", block)
        return order(path)


def order_in_parquet(*parts: pa.Array) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "r.parquet", itertools.count()
        with pq.ParquetWriter(path, parquet_schema(parts[0].type)) as writer:
            for part in parts:
                items = list(itertools.islice(rows, len(part)))
                columns = {"user": ["u"] * len(part), "item": items, "time": part}
                writer.write_table(pa.table(columns, parquet_schema(part.type)))
        return order(path)


def parquet_schema(time: pa.DataType) -> pa.Schema:
    return pa.schema([("user", pa.string()), ("item", pa.int64()), ("time", time)])


@settings(max_examples=150)
@given(times=st.lists(WRITTEN, min_size=1, max_size=12), block=st.integers(40, 300))
def test_times_in_text_are_sorted_exactly(times: list[str], block: int) -> None:
    try:
        found = order_in_text(times, block)
    except UserError as error:  # only a float's 17 digits may be too many
        refused = str(error).split("'")[1]
        assert "too many digits" in str(error) or Fraction(refused.strip()) >= 2**63
        rest = Decimal(refused) % 1
        assert Decimal(repr(float(rest))) != rest or abs(Decimal(refused)) >= 2**63
        return
    assert found == expected([Fraction(time.strip()) for time in times])


@settings(max_examples=60)
@given(times=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8), block=st.just(200))
def test_dates_in_text_are_sorted_exactly(times: list[int], block: int) -> None:
    dates = [str(np.datetime64(time, "ns")) for time in times]
    assert order_in_text(dates, block) == expected(times)


@settings(max_examples=60)
@given(times=st.lists(WHOLE, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_whole_times_in_parquet_are_sorted_exactly(times: list[int], cut: int) -> None:
    for kind in (pa.int64(), pa.decimal128(20, 0), pa.decimal256(60, 20)):
        values = times if pa.types.is_integer(kind) else list(map(Decimal, times))
        assert order_in_parquet(pa.array(values, kind)) == expected(times)


@settings(max_examples=60)
@given(
    times=st.lists(
        st.builds(lambda whole, digits: Decimal(f"{whole}{digits}"), WHOLE, DIGITS), min_size=1
    )
)
def test_decimal_times_in_parquet_are_sorted_exactly(times: list[Decimal]) -> None:
    array = pa.array(times, pa.decimal128(36, 16))
    assert order_in_parquet(array) == expected(list(map(Fraction, times)))


@settings(max_examples=60)
@given(times=st.lists(FLOATS, min_size=1, max_size=12), more=st.lists(WHOLE, max_size=3))
def test_float_times_in_parquet_are_sorted_exactly(times: list[float], more: list[int]) -> None:
    whole = [time for time in map(float, more) if time < 2.0**63]
    parts = [pa.array(part, pa.float64()) for part in (times, whole) if part]
    assert order_in_parquet(*parts) == expected(list(map(Fraction, times + whole)))


@settings(max_examples=40)
@given(
    times=st.lists(st.integers(-(2**63) // 10**9 + 1, 2**63 // 10**9 - 1), min_size=1),
    unit=st.sampled_from(list(UNITS)),
    zone=st.sampled_from([None, "UTC", "Asia/Kolkata"]),
)
def test_dates_in_parquet_are_sorted_exactly(times: list[int], unit: str, zone: str) -> None:
    assert order_in_parquet(pa.array(times, pa.timestamp(unit, zone))) == expected(times)


# Ids that a careless reader merges, cuts or ends a line at.
ID = st.one_of(
    st.text(st.sampled_from(' \t7a",;\n\r|'), min_size=1, max_size=6),
    st.lists(st.sampled_from(["\r\n", '"', "7", ",", "\ufeff"]), min_size=1).map("".join),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(["7", " 7", "7 ", "07", "7.0", "+7", "é", "e\u0301", "A", "a", "\u00a07"]),
).filter(lambda each: each.strip())


@settings(max_examples=100)
@given(ids=st.lists(ID, min_size=1, max_size=12))
def test_ids_in_parquet_are_kept_apart(ids: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.parquet"
        pq.write_table(pa.table({"user": ids[::-1], "item": ids}), path)
        encoded = EncodeIds(ReadRatings(path))
        (chunk,) = encoded
    assert [encoded.items[code].as_py() for code in chunk.item.tolist()] == ids
    assert [encoded.users[code].as_py() for code in chunk.user.tolist()] == ids[::-1]
    assert len(encoded.items) == len(set(ids))


@settings(max_examples=150)
@given(
    ids=st.lists(ID, min_size=1, max_size=12),
    notes=st.lists(st.text(st.sampled_from(' ab",\n\r'), max_size=8), min_size=12, max_size=12),
    separator=st.sampled_from([",", ";", "|"]),
    quote_all=st.booleans(),
    block=st.integers(60, 400),
)
def test_ids_in_text_are_kept_apart_except_for_blanks_which_are_counted(
    ids: list[str], notes: list[str], separator: str, quote_all: bool, block: int
) -> None:
    def field(value: str) -> str:
        plain = not quote_all and not set(value) & {separator, '"', "\r", "\n"}
        return value if plain else '"' + value.replace('"', '""') + '"'

    rows = [("a\nnote", "item", "user"), *zip(notes, ids, reversed(ids), strict=False)]
    content = "".join(separator.join(map(field, row)) + "\n" for row in rows)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "r.csv"
        path.write_bytes(content.encode())
        patch.setattr(blocks, "BLOCK_BYTES", max(block, len(max(ids, key=len)) * 9))
        patch.setattr(text_reader, "_PARSED_BYTES", 50)
        source = ReadRatings(path, columns="user,item", separator=separator)
        encoded = EncodeIds(source)
        chunks = list(encoded)
    read = [encoded.items[code].as_py() for chunk in chunks for code in chunk.item.tolist()]
    assert read == [each.strip(" \t") for each in ids]
    trimmed = sum(each != each.strip(" \t") for each in ids)
    assert source.trimmed == ({"user": trimmed, "item": trimmed} if trimmed else {})


@settings(max_examples=200)
@given(content=st.text(st.sampled_from('a",\n\r'), max_size=40), literal=st.booleans())
def test_records_end_where_they_end_for_a_slow_reader(content: str, literal: bool) -> None:
    """A state machine, character by character, agrees on every place."""
    state, ends = "begin", []
    for at, character in enumerate(content):
        if state == "begin" and character == '"':
            state = "inside"
        elif state == "inside":
            state = "mark" if character == '"' else "inside"
        elif state == "mark" and character == '"':
            state = "inside"
        elif character in ",\n\r":
            state = "begin"
            ends += [at + 1] if character == "\n" else []
        else:
            state = "text"
    assert blocks.record_ends(content.encode(), ",").tolist() == ends
    assert blocks.is_open(content.encode(), ",") == (state == "inside")
    line_feeds = [at + 1 for at, character in enumerate(content) if character == "\n"]
    assert blocks.record_ends(content.encode(), "\t").tolist() == line_feeds


@given(count=st.integers(1, 40), bad=st.sets(st.integers(0, 39), min_size=1))
def test_the_first_wrong_row_is_found(count: int, bad: set[int]) -> None:
    bad = {row % count for row in bad}
    assert first_failing(count, lambda low, high: bool(bad & set(range(low, high)))) == min(bad)
