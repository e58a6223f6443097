"""Windows by hand, and properties for any history."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchdata.nodes import IterableWrapper

from pipeline.errors import UserError
from pipeline.jagged import jagged_positions
from pipeline.preparation.store import SequenceStore
from pipeline.training import windows
from pipeline.training.chunks import SampledWindows
from pipeline.training.config import WindowConfig
from pipeline.training.windows import CutWindows, WindowTable


def table_of(lengths: list[int], max_len: int, window_stride: float) -> list[tuple[int, int, int]]:
    """(user, start, end) of every window of users with histories of these lengths."""
    offsets = np.cumsum([0, *lengths])
    store = SequenceStore.from_arrays(np.ones(offsets[-1]), offsets, num_items=1)
    table = WindowTable.build(store, WindowConfig(max_len, window_stride))
    start, end = table.bounds(np.arange(len(table)))
    user = np.searchsorted(offsets, start, side="right") - 1
    return list(zip(user.tolist(), start.tolist(), end.tolist(), strict=True))


def test_the_example_of_the_module() -> None:
    # 11 items, the last two held out: nine train; steps of 3 from the newest window [5, 9).
    assert table_of([11], 4, 0.75) == [(0, 0, 4), (0, 2, 6), (0, 5, 9)]


def test_with_stride_1_only_the_oldest_window_overlaps() -> None:
    assert table_of([12], 4, 1.0) == [(0, 0, 4), (0, 2, 6), (0, 6, 10)]


def test_an_exact_multiple_has_no_overlap() -> None:
    assert table_of([10], 4, 1.0) == [(0, 0, 4), (0, 4, 8)]


def test_a_step_is_at_least_one_item() -> None:
    assert table_of([6], 2, 0.1) == [(0, 0, 2), (0, 1, 3), (0, 2, 4)]


def test_train_on_validation_adds_the_validation_item() -> None:
    offsets = np.cumsum([0, 2, 3, 7])
    store = SequenceStore.from_arrays(np.ones(12), offsets, num_items=1)
    table = WindowTable.build(store, WindowConfig(10, train_on_validation=True))
    # No item of two is held out; of three and of seven only the last.
    assert list(zip(*table.bounds(np.arange(3)), strict=True)) == [(0, 2), (2, 4), (5, 11)]


def test_no_window_crosses_users() -> None:
    # Two items only train; of three one trains; seven leave five, one more than a window.
    assert table_of([2, 3, 7], 4, 1.0) == [(0, 0, 2), (1, 2, 3), (2, 5, 9), (2, 6, 10)]


def test_a_user_without_items_has_no_window() -> None:
    assert table_of([0, 1, 0], 4, 1.0) == [(1, 0, 1)]


def test_no_user_at_all() -> None:
    assert table_of([], 4, 1.0) == []


def test_windows_of_one_item() -> None:
    assert table_of([4], 1, 1.0) == [(0, 0, 1), (0, 1, 2)]


@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    max_len=st.integers(1, 9),
    window_stride=st.floats(0.01, 1.0),
)
def test_every_training_item_is_covered_and_no_held_out_one(
    lengths: list[int], max_len: int, window_stride: float
) -> None:
    found = table_of(lengths, max_len, window_stride)
    begins = np.cumsum([0, *lengths])
    assert len(set(found)) == len(found)
    for user, length in enumerate(lengths):
        train = length - 2 if length >= 3 else length
        mine = [(start, end) for owner, start, end in found if owner == user]
        covered = {item for start, end in mine for item in range(start, end)}
        assert covered == set(range(begins[user], begins[user] + train))
        expected = min(max_len, train)
        assert all(end - start == expected for start, end in mine)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    max_len=st.integers(1, 9),
    window_stride=st.floats(0.01, 1.0),
)
def test_windows_that_are_not_held_are_the_same(
    lengths: list[int], max_len: int, window_stride: float
) -> None:
    held = table_of(lengths, max_len, window_stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_HELD", 0)
        patch.setattr(windows, "_BLOCK", 3)
        assert table_of(lengths, max_len, window_stride) == held
        offsets = np.cumsum([0, *lengths])
        store = SequenceStore.from_arrays(np.ones(offsets[-1]), offsets, num_items=1)
        table = WindowTable.build(store, WindowConfig(max_len, window_stride))
        if held:
            sizes = [end - start for _, start, end in held]
            assert table.mean_length() == sum(sizes) / len(sizes)


@pytest.mark.parametrize("gathered", [1, 4, 1 << 15])
@pytest.mark.parametrize(
    ("chosen", "items"),
    [
        ([2, 0, 2], [5, 6, 7, 1, 2, 3, 5, 6, 7]),  # all of three items
        ([1, 2, 0, 3], [4, 5, 6, 7, 1, 2, 3, 7, 8, 9]),
        ([], []),
    ],
)
def test_items_of_windows(
    chosen: list[int], items: list[int], gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_GATHERED", gathered)
    store = SequenceStore.from_arrays(range(1, 10), [0, 3, 4, 9], num_items=9)
    # Windows 1 2 3 | 4 | 5 6 7 and 7 8 9.
    config = WindowConfig(max_len=3, window_stride=0.67)
    table = WindowTable(np.array([0, 3, 4]), np.array([3, 1, 5]), config)
    of_chunk = SampledWindows(
        epoch=0,
        step_samples=[len(chosen)],
        window_splits=np.array([0, len(chosen)]),
        windows=np.array(chosen, dtype=np.int64),
        copies=np.zeros(len(chosen), dtype=np.int64),
    )
    cut = next(CutWindows(IterableWrapper([of_chunk]), store.items, table))
    assert cut.values.tolist() == items
    assert cut.values.dtype == np.int32
    assert cut.offsets.tolist() == np.cumsum([0, *([1, 3][row != 1] for row in chosen)]).tolist()


def test_jagged_positions() -> None:
    positions = jagged_positions(np.array([5, 0, 9]), np.array([8, 1, 9]))
    assert positions.tolist() == [5, 6, 7, 0]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_len", 0), ("window_stride", 0.0), ("window_stride", 1.1), ("window_stride", -1.0)],
)
def test_flags_out_of_range_are_named(flag: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{flag} must"):
        WindowConfig(**{flag: value})
