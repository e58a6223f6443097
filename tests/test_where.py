"""--where: the grammar, the values that it compares, and what it refuses."""

import datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tables.times import date_mistake, read_dates
from pipeline.tables.where import Where

DAYS = [datetime.datetime(2020, 1, 1), datetime.datetime(2020, 7, 1), None]
TABLE = pa.table(
    {
        "event": ["purchase", "view", None],
        "price": ["1.5", "", " 3 "],  # as a text file has it
        "n": [1, 2, 3],
        "day": pa.array(DAYS, pa.timestamp("us")),
        "zoned": pa.array(DAYS, pa.timestamp("ms", "UTC")),
        "paid": [True, False, None],
        "my col": pa.array(["a", "b", "c"]).dictionary_encode(),
        "big": [2**62, 2**62 + 1, 0],
    }
)


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("event == 'purchase' and price > 0", [True, False, None]),
        ("event == 'purchase' or price > 0", [True, None, True]),
        ("event != 'view'", [True, False, None]),
        ("price > 2", [False, None, True]),
        ("price is None", [False, True, False]),
        ("price is not None and not paid", [False, False, None]),
        ("n in (1, 3)", [True, False, True]),
        ("n not in [1, 3]", [False, True, False]),
        ("event in ('view', 'cart')", [False, True, None]),
        ("1 < n <= 3", [False, True, True]),
        ("n > -1", [True, True, True]),
        ("n == '2'", [False, True, False]),
        ("day >= '2020-03-01'", [False, True, None]),
        ("zoned < '2020-01-01T01:00:00+02:00'", [False, False, None]),
        ("zoned < '2020-01-01T03:00:00+02:00'", [True, False, None]),
        ("paid", [True, False, None]),
        ("paid == False", [False, True, None]),
        ("price < n", [False, None, False]),
        ("`my col` == 'b'", [False, True, False]),
        (f"big == {2**62 + 1}", [False, True, False]),
    ],
)
def test_an_expression_holds_for_these_rows(expression: str, holds: list[bool | None]) -> None:
    assert Where(expression).holds(TABLE).to_pylist() == holds


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "cannot be read"),
        ("event = 'x'", "cannot be read"),
        ("(" * 300, "cannot be read"),
        ("__import__('os').remove('x')", "which is no condition"),
        ("day", "compares day with true or false, but it holds dates"),
        ("n + 1 > 2", "neither a column nor a value"),
        ("event.x == 1", "neither a column nor a value"),
        ("1 == 1", "neither a column nor a value"),
        ("n == None", "neither a column nor a value"),
        ("n in 3", "column in .values of one kind."),
        ("n in (1, 'a')", "column in .values of one kind."),
        ("n in ()", "column in .values of one kind."),
        ("n is 3", "column is None"),
        ("event > 3 and event == 'a'", "compares event with a number and with a text"),
        ("day > 3", "compares day with a number, but it holds dates"),
        ("day > 'soon'", "holds 'soon', which is no date"),
        ("event > 3", "--where: the event is not a number"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_reason(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Where(expression).holds(TABLE)
    assert isinstance(caught.value, UserError) or expression == "event > 3"


@given(st.text(st.sampled_from("ab'<>=()1 .,ornit[]`-")))
def test_any_text_is_an_expression_or_refused_in_one_line(text: str) -> None:
    try:
        Where(text)
    except UserError as error:
        assert "\n" not in str(error)


ONE_TIME = [
    "2014-04-07 10:51:09",
    "2014/04/07 10:51:09",
    "2014-4-7 10:51:09.000",
    "2014-04-07T10:51:09,0",
    "Mon Apr  7 10:51:09 2014",
    "Apr 7 2014 10:51:09",
    "April 7, 2014, 10:51:09",
    "7 Apr 2014 10:51:09",
]
ONE_TIME_WITH_A_ZONE = [
    "2014-04-07T10:51:09Z",
    "2014-04-07 10:51:09 UTC",
    "2014-04-07 12:51:09+02",
    "2014-04-07 12:51:09 +0200",
    "2014-04-07T06:21:09-04:30",
    "Mon, 07 Apr 2014 10:51:09 GMT",
    "Mon, 7 Apr 2014 12:51:09 +0200",
    "07/Apr/2014:10:51:09 +0000",
    "Mon Apr 07 10:51:09 UTC 2014",
    "Mon Apr 07 10:51:09 +0000 2014",
    "Mon Apr 07 2014 12:51:09 GMT+0200 (Central European Summer Time)",
]


def test_one_time_in_many_forms() -> None:
    for texts, zone in ((ONE_TIME, None), (ONE_TIME_WITH_A_ZONE, "UTC")):
        found = read_dates(pa.chunked_array([texts]))
        assert set(found.cast(pa.int64()).to_pylist()) == {1396867869 * 10**9}
        assert found.type.tz == zone
    with pytest.raises(ValueError, match="some times have a zone and others have none"):
        read_dates(pa.chunked_array([ONE_TIME + ONE_TIME_WITH_A_ZONE]))


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2014-02-30", "2014-13-01", "10:51", "07.04.2014", "2014-04-07 25:00", "1"],
)
def test_what_is_no_date_is_a_mistake(text: str) -> None:
    assert date_mistake(text)
