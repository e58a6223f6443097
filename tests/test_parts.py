"""Training, validation and test parts: by hand, by time, by a file; nothing after a point leaks."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.parts import Parts, validation_from_training
from pipeline.preparation.prepare import describe, prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.tables.points import read_points
from pipeline.training.config import WindowConfig
from pipeline.training.windows import WindowTable
from tests.conftest import RunMain, assert_refused

Row = tuple[str, str, int]
# Users a and b; item 9 is rated after 40 only, user c only then.
ROWS: list[Row] = [
    ("a", "1", 10),
    ("a", "2", 20),
    ("a", "3", 30),
    ("a", "4", 40),
    ("a", "9", 45),
    ("a", "4", 46),
    ("b", "1", 12),
    ("b", "2", 31),
    ("b", "5", 41),
    ("b", "5", 42),
    ("c", "9", 50),
]


def table_of(rows: list[Row], **more: list) -> pa.Table:
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    return pa.table({"user": users, "item": items, "time": times} | more)


def split(rows: list[Row], points: str, **flags: Any) -> SequenceStore:
    return prepare(table_of(rows), **{"split_time": points, "min_user_count": 1} | flags)


def by_user(store: SequenceStore, places: np.ndarray, users: np.ndarray) -> dict[str, list[str]]:
    """The original items at ``places``, by original user."""
    found: dict[str, list[str]] = {}
    for user, place in zip(users.tolist(), places.tolist(), strict=True):
        name = store.catalog.users[user].as_py()
        found.setdefault(name, []).append(store.catalog.item_id(int(store.items[place])))
    return found


def targets_of(store: SequenceStore, part: str, every: bool = False) -> dict[str, list[str]]:
    users, places = store.parts.targets(part, store.items, every)
    return by_user(store, places, users)


def trained(store: SequenceStore, on_validation: bool = False) -> dict[str, list[str]]:
    """Every user's items that are in windows."""
    config = WindowConfig(max_len=100, train_on_validation=on_validation)
    windows = WindowTable.build(store, config)
    bounds = windows.bounds(np.arange(len(windows)))
    places = [np.arange(*each) for each in zip(*bounds, strict=True)]
    joined = np.concatenate(places)
    users = np.searchsorted(store.offsets, joined, side="right") - 1
    return by_user(store, joined, users)


def counted(store: SequenceStore) -> dict[str, int]:
    """Training counts by original id, without zeros."""
    pairs = zip(store.catalog.items.to_pylist(), store.catalog.train_counts.tolist(), strict=True)
    return {item: count for item, count in pairs if count}


def test_two_points_by_hand() -> None:
    store = split(ROWS, "30,40")
    assert trained(store) == {"a": ["1", "2"], "b": ["1"]}
    assert trained(store, on_validation=True) == {"a": ["1", "2", "3"], "b": ["1", "2"]}
    assert counted(store) == {"1": 2, "2": 1}
    assert targets_of(store, "validation") == {"a": ["3"], "b": ["2"]}
    # c has no item before the test part.
    assert targets_of(store, "test") == {"a": ["4"], "b": ["5"]}
    assert targets_of(store, "test", every=True) == {"a": ["4", "9"], "b": ["5"]}
    assert store.split == {"by": "time", "points": ["30", "40"], "times": [30, 40]}
    assert store.counts["test"] == {
        "cold_targets": 2,
        "cold_items": 2,
        "ratings": 6,
        "users": 2,
    }
    line = "split by time at 30 and 40: training 3 ratings; validation 2 ratings, 2 users evaluated"
    assert line in describe(store)


def test_before_one_point_the_last_item_is_the_validation_part() -> None:
    store = split(ROWS, "40")
    assert trained(store) == {"a": ["1", "2"], "b": ["1"]}
    assert targets_of(store, "validation", every=True) == {"a": ["3"], "b": ["2"]}
    assert targets_of(store, "test", every=True) == {"a": ["4", "9"], "b": ["5"]}
    store = split(ROWS, "31")  # b has one item before it: it trains
    assert trained(store) == {"a": ["1", "2"], "b": ["1"]}
    assert targets_of(store, "validation") == {"a": ["3"]}
    ends = np.array([[1, 5], [1, 5]])
    assert validation_from_training(ends, np.array([0, 3])).tolist() == [[1, 4], [1, 5]]


def test_points_divide_times_that_are_not_whole() -> None:
    rows = [("a", str(at), at) for at in range(5)]
    times = [0.5, 1.5, 2.5, 2.75, 3.5]
    table = table_of(rows).set_column(2, "time", pa.array(times))
    store = prepare(table, split_time="1.5,2.75", min_user_count=1)
    assert trained(store) == {"a": ["0"]}
    assert targets_of(store, "validation", every=True) == {"a": ["1", "2"]}
    assert targets_of(store, "test", every=True) == {"a": ["3", "4"]}
    assert store.split["times"] == [1_500_000, 2_750_000]
    assert store.times is not None and store.times.tolist()[1] == 1_500_000


def test_ratings_from_a_last_point_on_are_left_out() -> None:
    store = split(ROWS, "30,40", split_until="46")
    assert targets_of(store, "test", every=True) == {"a": ["4", "9"], "b": ["5"]}
    assert len(store.items) == 9
    store = split(ROWS, "30,40", split_until="42")
    assert targets_of(store, "test", every=True) == {"a": ["4"], "b": ["5"]}
    assert store.catalog.items.to_pylist() == ["1", "2", "3", "4", "5"]
    assert store.split["until"] == "42"
    assert "at 30 and 40, until 42: training 3 ratings" in describe(store)
    for until, message in (
        ("35", "--split_until 35: 35 is not after 40"),
        ("2011-01-01", "--split_until 2011-01-01: give dates or numbers, not both"),
        ("soon", "--split_until: 'soon' is neither"),
    ):
        with pytest.raises(UserError) as found:
            split(ROWS, "30,40", split_until=until)
        assert str(found.value).startswith(message), found.value
    message = "no rating of table is at or after 42.5 and before 42.7 (--split_until)"
    with pytest.raises(UserError, match=re.escape(message)):
        split(ROWS, "30,42.5", split_until="42.7")


def test_points_keep_their_unit_if_a_filter_drops_other_times() -> None:
    """The time of a user who is dropped makes the unit unknown, which numbers do not need."""
    start = 1_300_000_000
    rows = [("a", str(at), start + at) for at in range(5)] + [("z", "1", 5 * 10**14)]
    store = split(rows, f"{start + 2},{start + 4}", min_user_count=2)
    assert store.catalog.users.to_pylist() == ["a"]
    assert store.split["times"] == [start + 2, start + 4]
    assert store.counts["times"]["unit"] == "s"


DAY = 86_400
START = 1_300_060_800  # 2011-03-14


@pytest.mark.parametrize("scale", [1, 10**3, 10**6, 10**9])
def test_a_date_is_a_point_in_any_unit(scale: int) -> None:
    rows = [("a", str(day), (START + day * DAY) * scale) for day in range(6)]
    store = split(rows, "2011-03-16, 2011-03-18 00:00:00")
    assert trained(store) == {"a": ["0", "1"]}
    assert targets_of(store, "test") == {"a": ["4"]}
    number = split(rows, f"{(START + 2 * DAY) * scale},{(START + 4 * DAY) * scale}")
    assert number.split["times"] == store.split["times"]
    dates = pa.array([time // scale for _, _, time in rows], pa.timestamp("s"))
    table = table_of(rows).set_column(2, "time", dates)
    as_dates = prepare(table, split_time="2011-03-16,2011-03-18", min_user_count=1)
    assert as_dates.parts.training_end.tolist() == store.parts.training_end.tolist()
    with pytest.raises(UserError, match="--split_time 5: the times of the data are dates"):
        prepare(table, split_time="5", min_user_count=1)


def test_filters_count_the_training_part_alone() -> None:
    # Before 30, a has 2 ratings and b 1; item 1 has 2, item 2 has 1, the others none.
    store = split(ROWS, "30,40", min_user_count=2)
    assert store.catalog.users.to_pylist() == ["a"]
    with pytest.raises(UserError, match="--min_user_count 3 drops all"):
        split(ROWS, "30,40", min_user_count=3)
    more = [*ROWS, ("a", "1", 47), ("b", "1", 48), ("a", "1", 35), ("b", "1", 36)]
    popular = split(more, "30,40", min_item_count=2)
    assert popular.catalog.items.to_pylist() == ["1"]
    # Of the validation and the test part.
    for kept, dropped in ((store, (1, 3)), (popular, (2, 6))):
        assert tuple(kept.counts[part]["dropped"] for part in ("validation", "test")) == dropped
    assert "validation 1 ratings and 1 dropped by filters, 1 users evaluated" in describe(store)


rows_of = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("1234"), st.integers(0, 30)),
    min_size=20,
    max_size=40,
)


@settings(max_examples=60)
@given(rows_of, rows_of, st.integers(8, 20), st.integers(0, 4), st.integers(0, 4))
def test_nothing_at_or_after_the_first_point_is_seen_by_training(
    rows: list[Row], others: list[Row], point: int, users: int, items: int
) -> None:
    before = [row for row in rows if row[2] < point]
    flags = {"min_user_count": users, "min_item_count": items}
    found = []
    for later in (rows, others):
        together = before + [row for row in later if row[2] >= point]
        try:
            store = split(together, f"{point},{point + 5}", **flags)
        except UserError:
            return
        found.append((trained(store), counted(store)))
    assert found[0] == found[1]
    expected = Counter(item for _, item, _ in before)
    if items <= 1 and users <= 1:
        assert found[0][1] == expected


@settings(max_examples=60)
@given(rows_of, rows_of, st.integers(8, 20), st.booleans())
def test_validation_sees_nothing_at_or_after_the_second_point(
    rows: list[Row], others: list[Row], point: int, keep: bool
) -> None:
    """Its histories, targets, seen items and negatives are the same with another test part."""
    # Every item occurs in training, so that both catalogs are the same.
    known = [("z", item, 0) for item in "1234"]
    before = known + [row for row in rows if row[2] < point + 5]
    found = []
    for later in (rows, others):
        together = before + [row for row in later if row[2] >= point + 5]
        together += [("z", "1", 40)]
        try:
            store = split(together, f"{point},{point + 5}")
        except UserError:
            return
        batches = {}
        for batch in EvalLoader(store, "validation", 8, 1, keep_seen=keep):
            name = store.catalog.users[int(batch.users[0])].as_py()
            parts = (batch.features["item"].values(), batch.targets, batch.negatives, batch.seen)
            batches[name] = [set(part.flatten().tolist()) for part in parts]
        found.append(batches)
    assert {name: found[0][name][:2] for name in found[0]} == {
        name: found[1][name][:2] for name in found[1]
    }
    assert found[0] == found[1]


def test_parts_are_the_same_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS))
    config = DataConfig(dataset_path=str(path), cache_dir=str(tmp_path / "c"), min_user_count=1)
    plain = prepare(config)
    assert plain.split == {} and plain.parts.by == "leave_one_out"
    assert not list((tmp_path / "c").rglob("parts.npy"))
    stores = [prepare(config, split_time=points) for points in ("30,40", "30,40", "40")]
    for store, points in zip(stores, ("30,40", "30,40", "40"), strict=True):
        fresh = split(ROWS, points)
        assert store.path is not None and store.split == fresh.split
        for name in ("begin", "training_end", "validation_end", "end"):
            assert getattr(store.parts, name).tolist() == getattr(fresh.parts, name).tolist()
        assert store.train_item_counts.tolist() == fresh.train_item_counts.tolist()
    assert stores[0].path == stores[1].path != stores[2].path != plain.path
    prints = [store.ratings_fingerprint for store in (*stores, plain)]
    assert prints[0] == prints[1] and len(set(prints)) == 2 + (prints[2] != prints[0])


def test_leave_one_out_is_the_last_two_items() -> None:
    parts = Parts.leave_one_out(np.array([0, 5, 7, 10]))
    assert parts.training_end.tolist() == [3, 7, 8]
    assert parts.validation_end.tolist() == [4, 7, 9]
    assert parts.users("test").tolist() == parts.users("validation").tolist() == [0, 2]
    assert parts.excluded_end("validation").tolist() == [5, 7, 10]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("11,12,13", "one point or two; only train.py takes more"),
        ("5,5", "5 is not after 5"),
        ("7,2011-01-01", "give dates or numbers, not both"),
        ("soon", "'soon' is neither a number nor a date"),
        ("5,", "'' is neither a number nor a date"),
        ("03/04/2011", "does not tell the day from the month"),
        ("1e300", "'1e300' is neither"),
        ("nan", "'nan' is neither"),
        ("5", "no rating of table is before 5; they are from 10 to 50"),
        ("20,60", "no rating of table is at or after 60; they are from 10 to 50"),
        ("2011-01-01", "the times of the data are numbers of unknown unit: give a number"),
        ("11,12", "no user of table has ratings of the validation part and some before it"),
    ],
)
def test_points_that_cannot_be(points: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        split(ROWS, points)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_points_are_exact() -> None:
    (point,) = read_points("0.1")
    assert point.value * 10 == 1
    date, zoned = read_points("2011-06-01,2011-06-01T00:00:01Z")
    assert zoned.value - date.value == 10**9


WORDS = ("train", "valid", "test")
PARTS = [
    "train",
    "train",
    "valid",
    "test",
    "test",
    "test",
    "train",
    "valid",
    "test",
    "test",
    "test",
]


def files_of(folder: Path, form: str) -> Path:
    """ROWS with PARTS in a form that ``--split_path`` reads."""
    texts = {word: "user,item,time\n" for word in WORDS}
    for (user, item, time), word in zip(ROWS, PARTS, strict=True):
        texts[word] += f"{user},{item},{time}\n"
    if form == "files":
        for word, text in texts.items():
            (folder / f"mine.{word}.csv").write_text(text)
        (folder / "readme.csv.md").write_text("other")
        return folder
    if form == "inside":  # the files' own names come first
        for word, text in texts.items():
            (folder / "train-test-split" / "test").mkdir(parents=True, exist_ok=True)
            (folder / "train-test-split" / "test" / f"mine.{word}.csv").write_text(text)
        return folder
    if form == "folders":
        for word, text in texts.items():
            (folder / word).mkdir()
            (folder / word / "part-0.csv").write_text(text)
        return folder
    table = table_of(ROWS, split=PARTS)
    if form == "parquet":
        pq.write_table(table, folder / "mine.parquet")
        return folder / "mine.parquet"
    lines = [
        f"{user},{item},{time},{word.upper()}"
        for (user, item, time), word in zip(ROWS, PARTS, strict=True)
    ]
    (folder / "mine.csv").write_text("user,item,time,split\n" + "\n".join(lines) + "\n")
    return folder / "mine.csv"


def of_path(folder: Path, path: Path, **flags: Any) -> SequenceStore:
    known = {"split_path": str(path), "cache_dir": str(folder / "c"), "min_user_count": 1}
    return prepare(DataConfig(**known | flags))


def test_a_file_named_after_two_parts_is_refused(tmp_path: Path) -> None:
    files_of(tmp_path, "files")
    (tmp_path / "mine.train-test.csv").write_text("user,item,time\na,1,5\n")
    named = r"the name of mine\.train-test\.csv has words of several parts \(train, test\): rename"
    with pytest.raises(UserError, match=named):
        of_path(tmp_path, tmp_path)


@pytest.mark.parametrize("form", ["files", "inside", "folders", "parquet", "csv"])
def test_a_split_of_the_users_own(tmp_path: Path, form: str) -> None:
    (data := tmp_path / "data").mkdir()
    store = of_path(tmp_path, files_of(data, form))
    by_time = split(ROWS, "30,40")
    assert store.split == {"by": "file"}
    for name in ("begin", "training_end", "validation_end", "end"):
        assert getattr(store.parts, name).tolist() == getattr(by_time.parts, name).tolist()
    assert store.items.tolist() == by_time.items.tolist()
    assert "split by file: training 3 ratings" in describe(store)
    fewer = of_path(
        tmp_path,
        data if form in ("files", "inside", "folders") else store_file(data),
        where="item != '9'",
    )
    assert targets_of(fewer, "test", every=True) == {"a": ["4"], "b": ["5"]}


def store_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_parts_come_before_times(tmp_path: Path) -> None:
    """A rating of the test part is the last, also if its time is earlier."""
    path = tmp_path / "mine.csv"
    path.write_text("user,item,time,split\na,1,5,test\na,2,9,train\na,3,7,train\na,4,1,dev\n")
    store = of_path(tmp_path, path)
    assert trained(store) == {"a": ["3", "2"]}
    assert targets_of(store, "validation") == {"a": ["4"]}
    assert targets_of(store, "test") == {"a": ["1"]}
    path.write_text("user,item,split\na,1,test\na,2,train\na,3,train\n")  # without validation
    store = of_path(tmp_path, path)
    assert trained(store) == {"a": ["2"]}
    assert targets_of(store, "validation") == {"a": ["3"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("x.train.csv", "x.valid.csv"),
            "give a file of test (test or testing in its name) beside x.train.csv of train, "
            "x.valid.csv of validation, or a column split",
        ),
        (
            ("x.csv", "test/y.csv"),
            "give a file of train (train or training in its name) beside test/y.csv of test",
        ),
        (
            ("part-0.csv", "part-1.csv"),
            "part-0.csv:1: no column 'split' (--split_path); there are user, item; give a file of "
            "train (train or training in its name) and a file of test (test or testing in its name)"
            " in a folder or zip, or a column split",
        ),
        (("train.csv",), "there are user, item; give a file of test (test or testing in its name)"),
        ((), "give a file of train (train or training in its name) and a file of test"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_folders_without_a_split(
    tmp_path: Path, names: tuple[str, ...], message: str, packed: bool
) -> None:
    (data := tmp_path / "data").mkdir()
    for name in names:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("user,item\na,1\n")
    if packed:
        data = Path(shutil.make_archive(str(data), "zip", data))
    with pytest.raises(UserError) as found:
        of_path(tmp_path, data)
    assert str(data) in str(found.value) and message in str(found.value), found.value
    assert "--dataset_path" not in str(found.value)


def test_a_column_split_in_a_file_that_is_called_train(tmp_path: Path) -> None:
    (data := tmp_path / "train").mkdir()
    (data / "train.csv").write_text("user,item,split\na,1,train\na,2,train\na,3,test\n")
    assert targets_of(of_path(tmp_path, data), "test") == {"a": ["3"]}


@pytest.mark.parametrize("form", ["files", "inside", "csv"])
def test_a_warning_about_a_split_comes_once(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column split has its file read for each part, and files of parts have the same columns."""
    lines = {"train": "a,é1,5\na,2,6\n", "valid": "a,3,7\n", "test": "a,4,8\n"}
    (data := tmp_path / "data").mkdir()
    if form == "csv":
        rows = [line + f",{part}\n" for part, text in lines.items() for line in text.splitlines()]
        (data / "mine.csv").write_text("user,item,dateRead,split\n" + "".join(rows), "latin-1")
    else:
        for part, text in lines.items():
            head = "user,item,dateRead\n" + ("a,é0,1\n" if part == "train" else "")
            place = data / (f"x.{part}.csv" if form == "files" else f"{part}/x.csv")
            place.parent.mkdir(exist_ok=True)
            place.write_text(head + text, "latin-1")
    of_path(tmp_path, data)
    warnings = capsys.readouterr().err.splitlines()
    assert sum("dateRead is the time" in line for line in warnings) == 1
    assert sum("read as CP1252" in line for line in warnings) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\na,1\n", "mine.csv:1: no column 'split' (--split_path); there are user, item"),
        (
            "user,item,split\na,1,train\na,2,later\na,2,test\n",
            "1 ratings have a split that is none",
        ),
        ("user,item,split\na,1,train\na,2,dev\n", "mine.csv: no ratings for test"),
        ("user,item,split\na,1,test\na,2,dev\n", "mine.csv: no ratings for train"),
    ],
)
def test_files_without_a_split(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(UserError) as found:
        of_path(tmp_path, path)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_flags_that_do_not_fit(run_main: RunMain, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("user,item\na,1\na,2\na,3\n")
    of_file = f"--dataset_path={path}"
    for flags, message in (
        ([of_file, "--split_time=5"], "--split_time 5: r has no time column"),
        ([of_file, "--split=time"], "--split time needs --split_time"),
        (["--split=file"], "--split file needs --split_path"),
        ([of_file, f"--split_path={path}"], "--split_path names the ratings, too"),
        (["--split=leave_one_out", "--split_time=5"], "--split_time is for --split time"),
        ([f"--split_path={path}", "--split_time=5"], "leave --split_time out"),
        ([of_file, "--targets=all"], "--targets all needs --split_time or --split_path"),
        (["--split_until=5"], "--split_until needs --split_time"),
        ([f"--split_path={tmp_path / 'none.csv'}"], "none.csv; check the path"),
    ):
        assert_refused(run_main, tmp_path, flags, message)
