"""Preparation beyond --memory_gb: the same bytes, and nothing left on disk."""

import errno
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.run.board import compared_flags
from model.run.config_file import lasting_flags
from model.settings.config import RunConfig
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.preparation import memory as memory_room
from pipeline.preparation.checks import in_int64, time_unit
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.held import Held, HeldByUser, Joined
from pipeline.preparation.memory import Memory, blocks, machine_bytes
from pipeline.preparation.prepare import prepare
from pipeline.preparation.stages import RatingChunk
from pipeline.sources.config import DataConfig
from tests.conftest import ROOT

TINY = 1e-8  # GiB: a byte for each stage


def chunk(users: list[int], items: list[int], times: list[int] | None = None) -> RatingChunk:
    time = None if times is None else np.array(times, np.int64)
    return RatingChunk(np.array(users, np.int32), np.array(items, np.int32), timestamp=time)


# Times that need a whole number, a fraction, ranks (too far apart for one key), or are all equal.
TIMES = st.sampled_from(
    [
        st.integers(0, 3),
        st.sampled_from([0.0, 0.25, 1.5, -2.5]),
        st.sampled_from([-(2**62), 2**62, 2**62 + 1, 5]),
        st.integers(1_500_000_000, 1_500_000_003),
        st.none(),
    ]
)
IDS = st.sampled_from(["1", "2", "10", "007", "a", "b c", "é", "-3"])


@st.composite
def logs(draw: st.DrawFn) -> pa.Table:
    """A table in chunks: user, item, rating, and perhaps timestamp."""
    ids = draw(st.sampled_from([IDS, st.integers(-9, 300)]))
    times = draw(draw(st.just(TIMES)))
    count = draw(st.integers(1, 40))
    columns = {
        "user": [draw(ids) for _ in range(count)],
        "item": [draw(ids) for _ in range(count)],
        "rating": [float(draw(st.integers(1, 5))) for _ in range(count)],
        "timestamp": [draw(times) for _ in range(count)],
    }
    table = pa.table(columns)
    if table["timestamp"].null_count:
        table = table.drop_columns("timestamp")
    size = draw(st.integers(1, count))
    return pa.Table.from_batches(table.to_batches(max_chunksize=size))


def written(table: pa.Table, **flags: Any) -> dict[str, bytes] | str:
    """The files of the store of a table, or the user's error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = prepare(table, cache_dir=f"{folder}/cache", **flags)
        except UserError as error:
            return str(error)
        out = Path(folder, "out")
        out.mkdir()
        store.write(out)
        assert not list(Path(folder).glob("cache/*"))
        return {file.name: file.read_bytes() for file in out.iterdir()}


@settings(max_examples=60)
@given(
    table=logs(),
    memory_gb=st.sampled_from([TINY, 3e-6]),
    min_rating=st.sampled_from([None, 2]),
    min_item_count=st.integers(0, 3),
    min_user_count=st.integers(0, 4),
    duplicates=st.sampled_from(["keep", "drop"]),
    file_order=st.sampled_from(["oldest_first", "newest_first"]),
)
def test_the_store_is_the_same(table: pa.Table, memory_gb: float, **flags: Any) -> None:
    assert written(table, memory_gb=memory_gb, **flags) == written(table, **flags)


@settings(max_examples=60)
@given(
    logs(),
    st.sampled_from(["1", "1,2", "1500000001,1500000002", "0.25", "0,5"]),
    st.integers(1, 2),
    st.sampled_from(["oldest_first", "newest_first"]),
)
def test_the_parts_of_a_split_by_time_are_the_same(
    table: pa.Table, points: str, min_item_count: int, file_order: str
) -> None:
    flags = {"split_time": points, "min_item_count": min_item_count, "min_user_count": 1}
    flags |= {"file_order": file_order}
    in_memory = written(table, **flags)
    assert written(table, memory_gb=TINY, **flags) == in_memory


def test_held_chunks_come_back_in_order(tmp_path: Path) -> None:
    held = Held[RatingChunk](Memory(limit=30, folder=tmp_path))
    for each in ([3, 1], [2], [0, 5, 4], [7]):  # 8 bytes a rating: written after 24 more
        held.add(chunk(each, each))
    assert [each.user.tolist() for each in held.drained()] == [[3, 1], [2], [0, 5, 4], [7]]


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (10**6, [[5, 1, 3, 1, 0, 5]]),  # all in memory: in the order of the file
        (24, [[0, 1, 1], [3, 5, 5]]),  # three ratings of 8 bytes each
        (1, [[0], [1, 1], [3], [5, 5]]),
    ],
)
def test_parts_are_ranges_of_users(tmp_path: Path, limit: int, parts: list[list[int]]) -> None:
    held = HeldByUser[RatingChunk](Memory(limit, tmp_path))
    held.add(chunk([5, 1, 3], [1, 2, 3]))
    held.add(chunk([1, 0, 5], [4, 5, 6]))
    found = list(held.parts())
    assert [sorted(part["user"].tolist()) for part in found] == [sorted(part) for part in parts]
    of_five = [
        i for part in found for u, i in zip(part["user"], part["item"], strict=True) if u == 5
    ]
    assert of_five == [1, 6]
    assert held.lengths[:6].tolist() == [1, 2, 0, 1, 0, 2]


def test_users_beyond_16_bits_are_in_ranges_of_several(tmp_path: Path) -> None:
    """A chunk is sorted by the highest 16 bits only: 2**18 users are cells of eight."""
    users = [2**18, 9, 2**18 - 1, 8, 9, 1]
    grouped = GroupByUser(
        iter_of(chunk(users, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1])), memory=Memory(1, tmp_path)
    )
    histories = next(grouped)
    assert histories.items.tolist() == [6, 4, 5, 2, 3, 1]
    assert np.flatnonzero(np.diff(histories.offsets)).tolist() == [1, 8, 9, 2**18 - 1, 2**18]
    assert histories.times is not None and histories.times.tolist() == [1, 3, 2, 5, 4, 6]


class iter_of:
    """A source of given chunks."""

    def __init__(self, *chunks: RatingChunk) -> None:
        self.chunks = chunks

    def reset(self) -> None:
        pass

    def __iter__(self) -> Iterator[RatingChunk]:
        return iter(self.chunks)


def test_blocks_of_mapped_arrays_are_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_room, "_BLOCK", 2)
    memory = Memory(8, tmp_path)
    joined = Joined(memory)
    for part in ([1, 2, 3], [4], [5]):
        joined.add(np.array(part) * 10**9)
    times = joined.array()
    assert isinstance(times, np.memmap) and times.tolist() == [i * 10**9 for i in range(1, 6)]
    assert [part.tolist() for (part,) in blocks(times // 10**9)] == [[1, 2], [3, 4], [5]]
    assert time_unit(times, "r") == "s"
    millionths, unit = in_int64(times, np.full(5, 0.5), "s", memory)
    assert (millionths.tolist(), unit) == ([i * 10**15 + 500_000 for i in range(1, 6)], "us")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"user": ["u"] * 3 + ["v"] * 3, "item": list("abcabc"), "time": range(6)}
    table = pa.table({name: list(column) for name, column in rows.items()})

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    make = tempfile.TemporaryFile
    monkeypatch.setattr(memory_room.tempfile, "TemporaryFile", lambda **at: Full(make(**at)))
    with pytest.raises(UserError) as caught:
        prepare(table, cache_dir=str(tmp_path / "cache"), memory_gb=TINY, min_user_count=0)
    assert str(caught.value) == (
        f"cannot keep ratings in {tmp_path}/cache while they are prepared: No space left on "
        "device; free some or name another folder with --cache_dir, or raise --memory_gb"
    )
    assert not list((tmp_path / "cache").iterdir())


KILLED = """
import os, signal, sys
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.prepare import prepare
from pipeline.sources.config import DataConfig
from tests.conftest import ROOT

GroupByUser._count = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare(DataConfig(dataset_path=sys.argv[1], cache_dir=sys.argv[2], memory_gb=1e-8))
"""


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    """It is killed when it sorts what it has written."""
    lines = [f"u{user},i{item},{item}" for user in range(4) for item in range(5)]
    (tmp_path / "r.csv").write_text("\n".join(["user,item,time", *lines]))
    arguments = [sys.executable, "-c", KILLED, tmp_path / "r.csv", tmp_path / "cache"]
    done = subprocess.run(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and "the rest is in" in done.stderr
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [(path.suffix, path.stat().st_size) for path in left] == [(".lock", 0)]


def test_parts_of_stores_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    stores = tmp_path / "cache" / "stores"
    for name in ("killed", "running"):
        (stores / f".{name}.part").mkdir(parents=True)
        (stores / f".{name}.part" / "items.npy").write_bytes(b"x")
    (tmp_path / "r.csv").write_text("user,item\nu,a\nu,b\nu,c\n")
    with lock(stores / ".running.lock"):
        prepare(
            DataConfig(
                dataset_path=str(tmp_path / "r.csv"),
                cache_dir=str(tmp_path / "cache"),
                min_user_count=0,
            )
        )
    assert [each.name for each in stores.glob(".*.part")] == [".running.part"]


def test_disk_use_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    memory = Memory(1, tmp_path)
    file = memory.file()
    file.write(np.zeros(10**6, np.uint8))
    err = capfd.readouterr().err
    assert err.startswith("--memory_gb is less than the ratings take: the rest is in ")
    assert "on disk: 0.0 GB, free: " in err
    file.write(np.zeros(10**6, np.uint8))
    assert memory.on_disk == memory.written == 2 * 10**6
    file.close()
    assert (memory.on_disk, memory.written) == (0, 2 * 10**6)
    assert capfd.readouterr().err == ""  # a line for each 2 GiB


def test_memory_of_the_machine_or_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = machine_bytes()
    assert whole > 1 << 28
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "absent"]
    files[0].write_text("max\n")
    files[1].write_text(f"{1 << 20}\n")
    monkeypatch.setattr(memory_room, "_limit_files", lambda: iter(files))
    assert machine_bytes() == 1 << 20
    assert Memory.of(None, tmp_path).limit == (1 << 19) / 10
    assert Memory.of(2, tmp_path).limit == (2 << 30) / 10


@pytest.mark.parametrize(
    "places",
    [
        [{"memory_gb": 1}, {"memory_gb": 2}],
        [{"dataset_path": "data/r.csv", "items_path": f"{folder}/items.csv"} for folder in "ab"],
    ],
)
def test_a_run_may_go_on_with_data_elsewhere_or_other_memory(places: list[dict[str, Any]]) -> None:
    one, other = (RunConfig(data=DataConfig(**each)) for each in places)
    assert lasting_flags(one) == lasting_flags(other)
    assert compared_flags(one) == compared_flags(other)
