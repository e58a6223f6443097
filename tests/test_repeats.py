"""Repeated targets: their share, kept seen items, and the rankings that repeat a user's items."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.evaluation.evaluate import evaluate
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader
from pipeline.evaluation.repeats import is_repeated, keeps_seen, repeat_ranks
from pipeline.preparation.store import SequenceStore
from tests.test_evaluation import HISTORIES, SCORES, model_with, of_ranks, store_of


def kept(store: SequenceStore, split: str = "test", **more: int) -> EvalLoader:
    config = HoldoutConfig(eval_negatives=more.pop("negatives", 100))
    loader = EvalLoader(store, split, 8, 2, config, keep_seen=True, **more)
    list(loader)
    return loader


def test_targets_that_repeat_by_hand() -> None:
    # Validation targets 4, 6, 6 and test targets 5, 3, 2: only the last user had 2 before.
    store = store_of([*HISTORIES, [1, 1]], 6)
    users = store.evaluable_users()
    assert is_repeated(store, users, "validation").tolist() == [False, False, False]
    assert is_repeated(store, users, "test").tolist() == [False, False, True]
    assert is_repeated(store, users[[2, 0]], "test").tolist() == [True, False]


@pytest.mark.parametrize(
    ("repeating", "share", "auto"), [(0, 0, False), (1, 0.01, False), (2, 0.02, True)]
)
def test_auto_keeps_seen_items_above_1_percent_of_repeated_validation_targets(
    repeating: int, share: float, auto: bool
) -> None:
    histories = [[1, 1, 2]] * repeating + [[1, 2, 2]] * (100 - repeating) + [[3, 3]]
    store = store_of(histories, 3)
    assert keeps_seen("auto", store) == (auto, share)
    assert keeps_seen("keep", store) == (True, share)
    assert keeps_seen("drop", store) == (False, share)


def test_kept_items_are_candidates_of_both_protocols() -> None:
    store = store_of(HISTORIES, 6)
    loader = kept(store)
    result = evaluate(model_with(SCORES), loader, torch.from_numpy(store.train_item_counts))
    # Targets 5, 3, 2 of scores .3 .5 .5: behind 1 2 3 4; behind 1, tied with 2; the same with 3.
    assert result["full"] == pytest.approx(of_ranks(5, 3, 3))
    # All trained items (1 2 3 4) but the target are negatives.
    assert result["sampled"] == pytest.approx(of_ranks(5, 3, 3))
    # Training counts 1 3 1 1 0 0. 5 ties with 6; 3 ties with 1 and 4 behind 2.
    assert result["popularity"]["full"] == pytest.approx(of_ranks(6, 4, 1))
    assert result["popularity"]["sampled"] == pytest.approx(of_ranks(5, 4, 1))
    for batch in loader:
        assert not batch.seen.numel() and not batch.seen_offsets.any()
        negatives = [set(row) - {0} for row in batch.negatives.tolist()]
        real = zip(batch.targets.tolist(), negatives, batch.users.tolist(), strict=True)
        assert all(found == {1, 2, 3, 4} - {target} for target, found, user in real if user >= 0)


def test_rankings_of_own_items_by_hand() -> None:
    # Before the targets 1, 2 and 5: a user's own items, latest first 3 1 2, most frequent 1 3 2.
    histories = [[1, 2, 1, 3, 1], [1, 2, 1, 3, 2], [1, 2, 1, 3, 5], [4, 4, 4], [5, 4, 6, 6]]
    store = store_of(histories, 6)
    assert store.train_item_counts[1:-1].tolist() == [6, 3, 0, 2, 1, 0]
    _, latest, _, frequent = repeat_ranks(kept(store)).tolist()
    # 5 is behind the own 3 1 2 and 4, which is more popular; 6 is the latest of 6 4 5.
    assert latest == [2, 3, 5, 1, 1]
    assert frequent == [1, 3, 5, 1, 1]
    # Of one negative each: drawn, so it is compared below; here all four trained others.
    sampled = repeat_ranks(kept(store))[[0, 2]].tolist()
    assert sampled == [[1, 2, 4, 1, 1], [1, 2, 4, 1, 1]]


histories = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=6)


@settings(max_examples=60)
@given(
    histories=histories.filter(lambda all_of: max(map(len, all_of)) >= 3),
    split=st.sampled_from(["validation", "test"]),
    world_size=st.integers(1, 3),
    negatives=st.integers(1, 4),
)
def test_rankings_of_own_items_equal_a_plain_sort(
    histories: list[list[int]], split: str, world_size: int, negatives: int
) -> None:
    store = store_of(histories, 9)
    popularity = store.train_item_counts
    for rank in range(world_size):
        loader = kept(store, split, rank=rank, world_size=world_size, negatives=negatives)
        rows = [
            (user, drawn)
            for users, _, all_of in loader.targets_and_negatives()
            for user, drawn in zip(users.tolist(), all_of.tolist(), strict=True)
        ]
        found = repeat_ranks(loader)
        assert found.shape == (4, len(rows))
        for (user, drawn), ranks in zip(rows, found.T.tolist(), strict=True):
            *known, target = histories[user][:-1] if split == "validation" else histories[user]
            assert is_repeated(store, np.array([user]), split) == [target in known]
            latest = {item: place for place, item in enumerate(known)}
            counts = Counter(known)

            def rank_of(
                key: dict[int, tuple[int, ...]], others: list[int], target: int = target
            ) -> int:
                scores = {item: key.get(item, (0, int(popularity[item]))) for item in others}
                return 1 + sum(scores[item] >= scores[target] for item in others if item != target)

            last = {item: (1, latest[item]) for item in latest}
            most = {item: (1, counts[item], latest[item]) for item in latest}
            expected = []
            for key in (last, most):
                for others in ([target, *filter(None, drawn)], [*range(1, 10)]):
                    expected.append(rank_of(key, others))
            assert ranks == expected
