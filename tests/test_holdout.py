"""Held-out targets, their inputs and seen items, and the negatives, by hand and by property."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.eval_batch import EvalBatch
from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader, NegativeSampler
from pipeline.preparation.store import SequenceStore

# User 1 has too few items; user 2's target 5 was seen before; item 9 is in no training part.
HISTORIES = [[1, 2, 3, 4, 6], [7, 8], [5, 1, 5, 2, 5], [3, 3, 9]]
NUM_ITEMS = 9
MASK = 10


def store_of(histories: list[list[int]], num_items: int) -> SequenceStore:
    offsets = np.cumsum([0, *map(len, histories)])
    items = [item for history in histories for item in history]
    return SequenceStore.from_arrays(items, offsets, num_items)


def only_batch(split: str, max_len: int = 8, **more: int) -> EvalBatch:
    store = store_of(HISTORIES, NUM_ITEMS)
    (batch,) = EvalLoader(store, split, max_len, batch_size=8, **more)
    return batch


def rows_of(batch: EvalBatch) -> list[list[int]]:
    features = batch.features["item"]
    return [row.tolist() for row in features.values().split(features.lengths().tolist())]


def seen_of(batch: EvalBatch) -> list[list[int]]:
    bounds = batch.seen_offsets.tolist()
    return [batch.seen[low:high].tolist() for low, high in pairwise(bounds)]


def test_validation_by_hand() -> None:
    batch = only_batch("validation")
    assert batch.users.tolist() == [0, 2, 3]
    assert rows_of(batch) == [[1, 2, 3, MASK], [5, 1, 5, MASK], [3, MASK]]
    assert batch.masked.tolist() == [3, 7, 9]
    assert batch.targets.tolist() == [4, 2, 3]
    # User 3's target, 3, was seen before: it must stay rankable.
    assert seen_of(batch) == [[1, 2, 3], [1, 5], []]


def test_test_by_hand() -> None:
    batch = only_batch("test")
    assert rows_of(batch) == [[1, 2, 3, 4, MASK], [5, 1, 5, 2, MASK], [3, 3, MASK]]
    assert batch.masked.tolist() == [4, 9, 12]
    assert batch.targets.tolist() == [6, 5, 9]
    assert seen_of(batch) == [[1, 2, 3, 4], [1, 2], [3]]


def test_inputs_are_cut_to_the_newest_items_and_seen_is_not() -> None:
    batch = only_batch("test", max_len=3)
    assert rows_of(batch) == [[3, 4, MASK], [5, 2, MASK], [3, 3, MASK]]
    assert seen_of(batch) == [[1, 2, 3, 4], [1, 2], [3]]


def test_a_max_len_of_one_leaves_the_mask_token() -> None:
    assert rows_of(only_batch("validation", max_len=1)) == [[MASK]] * 3


def test_few_unseen_items_are_all_taken_and_padded() -> None:
    # Training parts: 1 2 3, 7 8, 5 1 5, 3. Unseen by user 0: 5 7 8; 2: 3 7 8; 3: 1 2 5 7 8.
    batch = only_batch("test")
    negatives = [sorted(row[:5]) for row in batch.negatives.tolist()]
    assert negatives == [[0, 0, 5, 7, 8], [0, 0, 3, 7, 8], [1, 2, 5, 7, 8]]
    assert batch.negatives.shape == (3, 6)  # no more than there are items of positive count
    assert not batch.negatives[:, 5:].any()


def test_filler_rows_where_a_rank_runs_out() -> None:
    store = store_of(HISTORIES, NUM_ITEMS)
    ranks = [list(EvalLoader(store, "test", 8, 2, rank=rank, world_size=2)) for rank in range(2)]
    assert [[batch.users.tolist() for batch in batches] for batches in ranks] == [
        [[0, 3]],
        [[2, -1]],
    ]
    batch = ranks[1][0]
    assert rows_of(batch) == [[5, 1, 5, 2, MASK], [MASK]]
    assert batch.masked.tolist() == [4, 5]
    assert batch.targets.tolist() == [5, 1]
    assert seen_of(batch) == [[1, 2], []]
    assert not batch.negatives[1].any()


def test_a_rank_without_any_user() -> None:
    store = store_of([[1, 2, 3]], 3)
    batches = list(EvalLoader(store, "test", 8, 2, rank=2, world_size=3))
    assert [batch.users.tolist() for batch in batches] == [[-1]]
    assert batches[0].features.values().tolist() == [4]


def test_it_can_be_iterated_again_with_the_same_result() -> None:
    loader = EvalLoader(store_of(HISTORIES, NUM_ITEMS), "test", 8, 1)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 3
    for one, other in zip(first, second, strict=True):
        assert one.negatives.tolist() == other.negatives.tolist()
        assert rows_of(one) == rows_of(other)


def test_errors_are_the_users_to_fix() -> None:
    with pytest.raises(UserError, match="no user has the 3 items"):
        EvalLoader(store_of([[1, 2]], 2), "test", 8, 2)
    with pytest.raises(UserError, match="--eval_negatives must be at least 1, not 0"):
        HoldoutConfig(eval_negatives=0)


def first_draws(counts: list[int], num_users: int, draws: tuple[int, ...]) -> np.ndarray:
    """Two negatives for each of many users without a seen item."""
    sampler = NegativeSampler(np.array([0, *counts, 0]), HoldoutConfig(eval_negatives=2))
    nothing = np.empty(0, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.evaluation.holdout._DRAWS", draws)
        return sampler(np.arange(num_users), nothing)


@pytest.mark.parametrize("draws", [(64,), ()])
def test_negatives_follow_popularity_without_replacement(draws: tuple[int, ...]) -> None:
    # By drawing and by the exact race. Second is 1 after 2 or 3: .3 * 6/7 + .1 * 6/9 = .3238.
    negatives = first_draws([6, 3, 1, 0], 20_000 if draws else 4000, draws)
    first, second = negatives.T
    deviation = 5 * np.sqrt(0.25 / len(negatives))
    for item, share in ((1, 0.6), (2, 0.3), (3, 0.1)):
        assert abs((first == item).mean() - share) < deviation
    for item, share in ((1, 0.3238), (2, 0.4833), (3, 0.1929)):
        assert abs((second == item).mean() - share) < deviation
    assert (first != second).all()


def test_more_rounds_of_draws_change_nothing() -> None:
    counts = list(range(1, 30))
    few = first_draws(counts, 50, (1, 2, 4, 8, 64))
    assert few.tolist() == first_draws(counts, 50, (64,)).tolist()


def test_splits_and_seeds_draw_other_negatives() -> None:
    store = store_of([list(range(1, 200)), [1, 2, 3]], 200)

    def negatives(split: str, seed: int) -> list[int]:
        config = HoldoutConfig(eval_negatives=20, eval_negatives_seed=seed)
        (batch,) = EvalLoader(store, split, 8, 2, config)
        return batch.negatives[1].tolist()

    drawn = [negatives("test", 0), negatives("validation", 0), negatives("test", 1)]
    assert len(set(map(tuple, drawn))) == 3
    assert negatives("test", 0) == drawn[0]


histories = st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=9)


@settings(max_examples=40)
@given(
    histories=histories.filter(lambda all_of: max(map(len, all_of)) >= 3),
    split=st.sampled_from(["validation", "test"]),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    num_negatives=st.integers(1, 12),
)
def test_every_user_once_and_the_same_at_any_batch_and_world_size(
    histories: list[list[int]], split: str, batch_size: int, world_size: int, num_negatives: int
) -> None:
    store, config = store_of(histories, 30), HoldoutConfig(num_negatives)
    trained = {item for one in histories for item in (one[:-2] if len(one) >= 3 else one)}

    def by_user(batch_size: int, world_size: int) -> dict[int, tuple[object, ...]]:
        found: dict[int, tuple[object, ...]] = {}
        shapes = set()
        for rank in range(world_size):
            loader = EvalLoader(store, split, 5, batch_size, config, rank, world_size)
            batches = list(loader)
            shapes.add(tuple(len(batch.users) for batch in batches))
            for batch in batches:
                parts = (batch.targets.tolist(), batch.negatives.tolist())
                rows = zip(
                    batch.users.tolist(), rows_of(batch), seen_of(batch), *parts, strict=True
                )
                for user, *row in rows:
                    assert user not in found or user == -1
                    found[user] = tuple(row)
        assert len(shapes) == 1
        found.pop(-1, None)
        return found

    alone = by_user(100, 1)
    assert by_user(batch_size, world_size) == alone
    assert sorted(alone) == [user for user, one in enumerate(histories) if len(one) >= 3]
    for user, (row, seen, target, negatives) in alone.items():
        history = histories[user]
        known = history[:-2] if split == "validation" else history[:-1]
        assert target == history[len(known)]
        assert row == [*known[-4:], 31]
        assert seen == sorted(set(known) - {target})
        drawn = [item for item in negatives if item]
        unseen = trained - set(history)
        assert len(set(drawn)) == len(drawn) == min(num_negatives, len(unseen))
        assert set(drawn) <= unseen
