"""The training loader: every window once per epoch, at any world size, from any sample."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.train_batch import TrainBatch
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.rng import permuted
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import AllSizes, RankShare, TrainLoader
from pipeline.training.negatives import SharedNegatives

NUM_ITEMS = 400
MASK_TOKEN = NUM_ITEMS + 1
# Histories of 1..14 items; no item occurs twice, so that a window is known by its items.
LENGTHS = [5, 1, 14, 2, 9, 3, 6, 12, 4, 7, 1, 11, 8]
WINDOWS = WindowConfig(max_len=5, window_stride=0.6)

Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def store() -> SequenceStore:
    offsets = np.cumsum([0, *LENGTHS])
    return SequenceStore.from_arrays(np.arange(1, offsets[-1] + 1), offsets, NUM_ITEMS)


def loader(rank: int = 0, world_size: int = 1, batch_size: int = 2, **more: int) -> TrainLoader:
    return TrainLoader(
        store(),
        WINDOWS,
        MaskConfig(mask_prob=0.3, mask_last_share=0.2, dupe_factor=more.pop("dupe_factor", 2)),
        LoaderConfig(train_batch_size=batch_size, **more),
        RankShare(rank, world_size),
    )


def rows_of(batches: Iterable[TrainBatch]) -> list[Row]:
    """(values after masking, masked positions in the row, targets) of every real row, in order."""
    rows: list[Row] = []
    for batch in (each.unpack() for each in batches):
        features = batch.features["item"]
        offsets = np.cumsum([0, *features.lengths().tolist()])
        owner = np.searchsorted(offsets, batch.masked.numpy(), side="right") - 1
        assert batch.num_windows in (0, len(offsets) - 1)
        for row in range(batch.num_windows):
            values = features.values()[offsets[row] : offsets[row + 1]].tolist()
            masked = (batch.masked.numpy()[owner == row] - offsets[row]).tolist()
            targets = batch.targets.numpy()[owner == row].tolist()
            rows.append((tuple(values), tuple(masked), tuple(targets)))
    return rows


def windows_of(rows: list[Row]) -> Counter[tuple[int, ...]]:
    """How often each window, unmasked, is among the rows."""
    windows: Counter[tuple[int, ...]] = Counter()
    for values, masked, targets in rows:
        items = list(values)
        for position, target in zip(masked, targets, strict=True):
            items[position] = target
        windows[tuple(items)] += 1
    return windows


# The windows of LENGTHS by hand: 5 -> 3 train (1 window), 14 -> 12 train: starts 0 1 4 7 (4),
# 9 -> 7: 0 2 (2), 6 -> 4 (1), 12 -> 10: 0 2 5 (3), 7 -> 5 (1), 11 -> 9: 0 1 4 (3), 8 -> 6: 0 1 (2),
# and one each of 1, 2, 3, 4, 1.
NUM_WINDOWS = 1 + 4 + 2 + 1 + 3 + 1 + 3 + 2 + 5


@pytest.mark.parametrize("held", [True, False])
def test_an_epoch_trains_every_copy_of_every_window_once(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:  # as in epochs of more than 67 million samples
        monkeypatch.setattr("pipeline.training.sampler._HELD", 0)
        monkeypatch.setattr("pipeline.training.windows._HELD", 0)
    one = loader()
    assert one.num_windows == NUM_WINDOWS
    assert one.num_samples == 2 * NUM_WINDOWS
    batches = list(one.epoch(0))
    assert len(batches) == one.steps_per_epoch == NUM_WINDOWS
    windows = windows_of(rows_of(batches))
    assert len(windows) == NUM_WINDOWS
    assert set(windows.values()) == {2}


def test_windows_hold_training_items_only() -> None:
    ends = np.cumsum(LENGTHS)
    held_out = {
        int(item)
        for end, length in zip(ends, LENGTHS, strict=True)
        if length >= 3
        for item in (end - 1, end)
    }
    seen = {item for window in windows_of(rows_of(loader().epoch(0))) for item in window}
    assert seen == set(range(1, ends[-1] + 1)) - held_out


def test_batches_are_jagged_int64_and_free_of_padding() -> None:
    batch = next(loader(batch_size=NUM_WINDOWS).epoch(0)).unpack()
    features = batch.features
    assert features.keys() == ["item"]
    assert features.values().dtype == features.lengths().dtype == torch.int64
    assert batch.masked.dtype == batch.targets.dtype == torch.int64
    lengths = features.lengths().tolist()
    assert len(set(lengths)) > 1 and sum(lengths) == features.values().numel()
    assert features.length_per_key() == [sum(lengths)]
    assert features.values().min() >= 1 and features.values().max() <= MASK_TOKEN


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_any_world_size_trains_the_same_rows(world_size: int, batch_size: int) -> None:
    alone = rows_of(loader(batch_size=2).epoch(3))
    loaders = [loader(rank, world_size, batch_size) for rank in range(world_size)]
    ranks = [list(one.epoch(3)) for one in loaders]
    assert {len(batches) for batches in ranks} == {loaders[0].steps_per_epoch}
    assert Counter(row for batches in ranks for row in rows_of(batches)) == Counter(alone)


def test_a_step_of_two_ranks_equals_one_of_a_single_rank_at_twice_the_batch() -> None:
    alone = list(loader(batch_size=6).epoch(0))
    first, second = (list(loader(rank, 2, batch_size=3).epoch(0)) for rank in range(2))
    for whole, left, right in zip(alone, first, second, strict=True):
        assert Counter(rows_of([left, right])) == Counter(rows_of([whole]))


def test_the_last_step_is_split_evenly_with_filler_rows_for_the_rest() -> None:
    # 22 samples, 4 ranks, batch 5: one full step of 20, then 2 samples over 4 ranks.
    assert NUM_WINDOWS == 22
    last = [list(loader(rank, 4, 5, dupe_factor=1).epoch(0))[-1] for rank in range(4)]
    assert [batch.num_windows for batch in last] == [0, 1, 0, 1]
    filler = last[0].unpack()
    assert filler.features.values().tolist() == [MASK_TOKEN]
    assert filler.features.lengths().tolist() == [1]
    assert filler.masked.tolist() == filler.targets.tolist() == []


def test_more_ranks_than_windows() -> None:
    batches = [list(loader(rank, 50, dupe_factor=1).epoch(0)) for rank in range(50)]
    assert {len(one) for one in batches} == {1}
    assert sum(one[0].num_windows for one in batches) == NUM_WINDOWS


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1), cut=st.integers(0, 300))
def test_a_computed_permutation_is_one(size: int, key: int, cut: int) -> None:
    whole = permuted(np.arange(size), size, key).tolist()
    assert sorted(whole) == list(range(size))
    assert whole == [
        *permuted(np.arange(min(cut, size)), size, key).tolist(),
        *permuted(np.arange(min(cut, size), size), size, key).tolist(),
    ]


def test_a_computed_permutation_is_even() -> None:
    """Each of 100 places goes to each quarter about as often (1,000 keys: 250 +- 14)."""
    found = np.array([permuted(np.arange(100), 100, key) for key in range(1000)])
    counts = np.stack([(found // 25 == quarter).sum(0) for quarter in range(4)])
    assert 180 < counts.min() <= counts.max() < 320  # five standard deviations
    # Neighbours do not stay neighbours: 2 % of the pairs are by chance.
    assert 0.015 < (np.abs(np.diff(found)) == 1).mean() < 0.025


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("chunk_items", [1, 40, 90])
def test_the_chunk_size_changes_nothing(
    chunk_items: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:
        monkeypatch.setattr("pipeline.training.sampler._HELD", 0)
    expected = rows_of(loader(batch_size=4).epoch(0))
    monkeypatch.setattr("pipeline.training.loader._CHUNK_ITEMS", chunk_items)
    assert rows_of(loader(batch_size=4).epoch(0)) == expected


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = rows_of(loader().epoch(0))
    assert rows_of(loader().epoch(0)) == first
    again = loader()
    assert rows_of(again.epoch(1)) != first
    assert rows_of(again.epoch(0)) == first
    assert rows_of(loader(seed=1).epoch(0)) != first


@pytest.mark.parametrize("prefetch_batches", [1, 8, 100])
@pytest.mark.parametrize("consumed", [0, 1, 7, 22])
def test_resume_is_exact_with_any_prefetch(prefetch_batches: int, consumed: int) -> None:
    whole = rows_of(loader().epoch(2))
    interrupted = loader(prefetch_batches=prefetch_batches)
    before = rows_of(islice(interrupted.epoch(2), consumed))
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert state == {"epoch": 2, "sample": 2 * consumed}
    resumed = loader()
    assert resumed.steps_left(state["sample"]) == resumed.steps_per_epoch - consumed
    assert before + rows_of(resumed.epoch(**state)) == whole
    assert resumed.state_dict() == {"epoch": 2, "sample": 44}


@pytest.mark.parametrize("sample", [0, 6, 44])
def test_epochs_follow_each_other_without_a_break(sample: int) -> None:
    one = loader(prefetch_batches=3)
    rows = rows_of(loader().epoch(2, sample)) if sample < 44 else []
    for epoch in (3, 4):
        rows += rows_of(loader().epoch(epoch))
    batches, found = one.epoch(2, sample, stop=5), []
    for batch in batches:
        found += rows_of([batch])
        if len(found) == len(rows) - 44:  # the last of epoch 3 was handed out
            assert one.state_dict() == {"epoch": 3, "sample": 44}
    assert found == rows
    assert one.state_dict() == {"epoch": 4, "sample": 44}


def test_a_new_epoch_ends_the_iterator_of_the_one_before() -> None:
    one = loader(prefetch_batches=3)
    first = one.epoch(0)
    next(first)
    again = rows_of(one.epoch(1))
    assert again == rows_of(loader().epoch(1))
    assert list(first) == []
    assert one.state_dict() == {"epoch": 1, "sample": 44}


def test_an_epoch_may_be_consumed_in_segments() -> None:
    one = loader(prefetch_batches=3)
    batches, rows = one.epoch(0), []
    for step in range(0, one.steps_per_epoch, 5):
        rows += rows_of(islice(batches, 5))
        assert one.state_dict() == {"epoch": 0, "sample": min(2 * (step + 5), 44)}
    assert rows == rows_of(loader().epoch(0))


@settings(max_examples=25)
@given(
    world_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch_sizes=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    steps=st.integers(0, 6),
)
def test_resume_at_other_world_and_batch_sizes_skips_and_repeats_nothing(
    world_sizes: list[int], batch_sizes: list[int], steps: int
) -> None:
    rows: list[Row] = []
    state = {"epoch": 1, "sample": 0}
    for part, (world_size, batch_size) in enumerate(zip(world_sizes, batch_sizes, strict=False)):
        stop = None if part + 1 == len(world_sizes) else steps
        after = []
        for rank in range(world_size):
            one = loader(rank, world_size, batch_size)
            rows += rows_of(islice(one.epoch(**state), stop))
            after.append(one.state_dict())
        assert all(other == after[0] for other in after)
        state = after[0]
    assert Counter(rows) == Counter(rows_of(loader().epoch(1)))


def test_every_batch_has_the_candidate_range() -> None:
    one = TrainLoader(
        store(), WINDOWS, MaskConfig(), LoaderConfig(8), RankShare(0, 30), candidate_range=(1, 9)
    )
    assert {batch.candidate_range for batch in one.epoch(0)} == {(1, 9)}


def test_no_window_raises_a_user_error() -> None:
    empty = SequenceStore.from_arrays([], [0], 1)
    with pytest.raises(UserError, match="no history to train on"):
        TrainLoader(empty, WINDOWS, MaskConfig(), LoaderConfig())


@pytest.mark.parametrize("flag", ["train_batch_size", "prefetch_batches"])
def test_flags_out_of_range_are_named(flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag} must be at least 1, not 0"):
        LoaderConfig(**{flag: 0})


@pytest.mark.parametrize("few_shapes", [True, False])
@pytest.mark.parametrize("two_stream", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_examples_have_the_parts_and_divisors_of_batches(
    world_size: int, two_stream: bool, few_shapes: bool
) -> None:
    def of_rank(all_sizes: AllSizes | None) -> TrainLoader:
        return TrainLoader(
            store(),
            WINDOWS,
            MaskConfig(mask_prob=0.3, left_context_share=0.5, two_stream=two_stream),
            LoaderConfig(train_batch_size=3),
            RankShare(
                world_size=world_size,
                all_sizes=all_sizes,
                shard_rows=None if all_sizes is None else 201,
            ),
            negatives=SharedNegatives(7, NUM_ITEMS, seed=0),
            few_shapes=few_shapes,
        )

    def refused(sizes: np.ndarray) -> np.ndarray:
        raise AssertionError("an example is made without other ranks")

    exchanges = world_size > 1
    examples = [*of_rank(refused if exchanges else None).examples()]
    alike = of_rank((lambda sizes: np.stack([sizes] * world_size)) if exchanges else None)
    batches = list(islice(alike.epoch(0), 3))
    assert len(batches) == 3 and len(examples) > 3
    for batch, example in zip(batches, examples, strict=False):
        assert batch.packed.names == example.packed.names
        assert batch.candidate_range == example.candidate_range
        if few_shapes:  # multiples of 8, or the same
            pairs = zip(batch.packed.sizes, example.packed.sizes, strict=True)
            assert all(one == other or one % 8 == other % 8 == 0 for one, other in pairs)
