"""Slots of a step: the most different rows that any rank requests of any shard."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import slots
from pipeline.training.chunks import MaskedWindows
from pipeline.training.shape_buckets import bucket_size
from pipeline.training.slots import CountSlots

MASK_TOKEN = 19  # 20 rows in 4 blocks of 5


def counter(mask_token: int = MASK_TOKEN, shard_rows: int = 5, world_size: int = 4) -> CountSlots:
    return CountSlots(None, shard_rows, world_size, mask_token, lambda sizes: sizes[None])


def chunk_of(*steps: list[int]) -> MaskedWindows:
    """Steps of one row each, without masked positions."""
    ends = np.cumsum([0, *map(len, steps)])
    none = np.zeros(0, dtype=np.int64)
    return MaskedWindows(
        epoch=0,
        step_samples=[0] * len(steps),
        window_splits=np.arange(len(steps) + 1),
        windows=none,
        copies=none,
        values=np.concatenate([np.array(step, dtype=np.int32) for step in steps]),
        offsets=ends,
        row_splits=np.arange(len(steps) + 1),
        masked=none,
        targets=none.astype(np.int32),
        mask_splits=np.zeros(len(steps) + 1, dtype=np.int64),
    )


@pytest.mark.parametrize("marked_rows", [0, slots._MARKED_ROWS])
@pytest.mark.parametrize(
    ("ids", "most"),
    [
        ([1, 1, 7, 2, 8, 8], 2),
        ([19, 19, 19], 1),  # the mask token, once
        ([15, 16, 17, 18, 19, 19, 1], 5),
        ([0], 1),
    ],
)
def test_different_ids_of_the_fullest_block(
    ids: list[int], most: int, marked_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_MARKED_ROWS", marked_rows)
    stage = counter()
    for _ in range(2):  # marks of the first count are gone
        assert stage.different(np.array(ids, dtype=np.int32)) == most


@pytest.mark.parametrize("compared", [3, 4])
def test_ids_of_each_block(compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_COMPARED", compared)
    parts = [np.array([0, 4, 5, 9, 9], dtype=np.int32), np.array([15, 19])]
    assert counter()._in_blocks(parts).tolist() == [2, 3, 0, 2]


@given(
    st.lists(st.lists(st.integers(0, MASK_TOKEN), min_size=1, max_size=40), min_size=1, max_size=6),
)
def test_slots_are_enough_and_never_fall(steps: list[list[int]]) -> None:
    stage = counter()
    found = [int(stage.apply(chunk_of(step)).slots[0]) for step in steps]
    assert found == sorted(found)
    most = 1
    for step, number in zip(steps, found, strict=True):
        blocks = [len({i for i in step if i // 5 == block}) for block in range(4)]
        most = max(most, *blocks)
        # Rounded up to a bucket; ids are counted as different ones where that has room for them.
        assert most <= number < most + bucket_size(most)


def test_the_largest_rank_decides_and_candidates_count() -> None:
    stage = CountSlots(None, 5, 4, MASK_TOKEN, lambda sizes: np.stack([sizes, sizes + 9]))
    assert stage.apply(chunk_of([1], [2])).slots.tolist() == [16, 16]
    chunk = replace(
        chunk_of([1, 2], [6]),
        targets=np.array([3, 7, 8], dtype=np.int32),
        mask_splits=np.array([0, 1, 3]),
        negatives=np.array([[4, 4], [9, 10]]),
    )
    stage = counter()
    requested = [np.concatenate(parts).tolist() for parts in slots._requested(chunk)]
    assert requested == [[1, 2, 3, 4, 4], [6, 7, 8, 9, 10]]
    assert stage.apply(chunk).slots.tolist() == [8, 8]


def test_few_repeated_ids_are_not_counted_as_different(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    real = CountSlots.different
    monkeypatch.setattr(
        CountSlots, "different", lambda stage, ids: counted.append(1) or real(stage, ids)
    )
    stage = counter(mask_token=999, shard_rows=250)
    rng = np.random.default_rng(0)
    for _ in range(50):
        stage.apply(chunk_of(rng.choice(999, 200, replace=False).tolist()))
    assert 1 <= len(counted) < 10
