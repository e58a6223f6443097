"""The generator: deterministic, no repeated items, and no ranking beats its best metrics."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.preparation.prepare import describe, prepare
from pipeline.sources.config import DataConfig, SyntheticConfig
from pipeline.sources.synthetic import RingProcess, SyntheticRatings, metrics

SMALL = SyntheticConfig(num_users=60, num_items=40, min_length=5, max_length=9, seed=3)


def histories(config: SyntheticConfig) -> list[list[int]]:
    table = next(SyntheticRatings(config))
    users, items = (table[name].to_numpy() for name in ("user", "item"))
    return [items[users == user].tolist() for user in np.unique(users)]


def test_same_seed_same_data_and_another_seed_another() -> None:
    assert histories(SMALL) == histories(SyntheticConfig(**vars(SMALL)))
    assert histories(SMALL) != histories(SyntheticConfig(**(vars(SMALL) | {"seed": 4})))


def test_fewer_users_are_the_first_of_more() -> None:
    assert histories(SyntheticConfig(**(vars(SMALL) | {"num_users": 7}))) == histories(SMALL)[:7]


def test_nothing_repeats_and_lengths_are_in_range() -> None:
    found = histories(SMALL)
    assert len(found) == 60
    assert {len(each) for each in found} <= set(range(5, 10))
    assert all(len(set(each)) == len(each) for each in found)
    assert {item for each in found for item in each} <= set(range(1, 41))


def test_blocks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SyntheticRatings(SMALL)
    expected = next(whole)
    monkeypatch.setattr("pipeline.sources.synthetic._BLOCK_SCORES", 40 * 7)
    parts = SyntheticRatings(SMALL)
    assert next(parts).equals(expected)
    assert parts.best_possible == whole.best_possible


def tiny_process() -> RingProcess:
    """3 of 4 items popular as .4 .3 .2 .1; item 0 is followed by 3, the others by 0; noise 1/2."""
    config = SyntheticConfig(
        num_users=2, num_items=8, min_length=3, max_length=4, successors=1, noise=0.5
    )
    process = RingProcess(config)
    process.popularity = np.array([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    process.favourites = np.array([[3], [0], [0], [0], [0], [0], [0], [0]])
    return process


def test_scores_by_hand() -> None:
    seen = np.zeros((2, 8), bool)
    seen[0, 0] = True
    scores = tiny_process().scores(np.array([0, -1]), seen)
    assert scores[0, :4].tolist() == [0, 0.15, 0.1, 0.55]  # .5 * popularity, + .5 for item 3
    assert scores[1, :4].tolist() == [0.2, 0.15, 0.1, 0.05]  # nothing known yet: popularity


def test_target_ranks_by_hand() -> None:
    paths = np.array([[0, 2, 1, -1], [1, 0, 3, 2]])
    # user 0: after 0, item 2 competes with 1 (.15 > .1) and 3 (.55): rank 3; after 2, item 1 with 3
    # user 1: after 1, item 0 is the favourite: rank 1; after 0, item 3 is
    assert tiny_process().target_ranks(paths, np.array([1, 1])).tolist() == [3, 1]
    assert tiny_process().target_ranks(paths, np.array([2, 2])).tolist() == [1, 1]


def test_ties_count_against_the_target() -> None:
    process = tiny_process()
    process.popularity = np.full(8, 0.125)
    paths = np.array([[0, 1, -1, -1], [0, 3, 2, 1]])
    # user 0: items 1 and 2 are equal behind the favourite 3, the others do not occur: rank 3
    assert process.target_ranks(paths, np.array([1, 1])).tolist() == [3, 1]


def test_metrics_by_hand() -> None:
    found = metrics(np.array([1, 2, 10, 11]), cutoff=10)
    assert found["HR@10"] == 0.75
    assert found["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(11)) / 4)


def test_drawn_items_follow_the_scores() -> None:
    """Over many users the first two items have the frequencies of their probabilities."""
    config = SyntheticConfig(num_users=20_000, num_items=12, min_length=3, max_length=3)
    process = RingProcess(config)
    paths, _ = process.draw()
    first = np.bincount(paths[:, 0], minlength=12) / 20_000
    assert np.abs(first - process.popularity).max() < 0.02
    likely = int(process.popularity.argmax())
    after = paths[paths[:, 0] == likely, 1]
    seen = np.arange(12)[None] == likely
    expected = process.scores(np.array([likely]), seen)[0]
    expected /= expected.sum()
    assert np.abs(np.bincount(after, minlength=12) / len(after) - expected).max() < 0.03


def test_no_other_ranking_beats_the_best_possible() -> None:
    config = SyntheticConfig(num_users=2000, num_items=100, min_length=10, max_length=20)
    ratings = SyntheticRatings(config)
    next(ratings)
    best = ratings.best_possible["test"]["HR@10"]
    process = RingProcess(config)
    paths, lengths = process.draw()
    popularity_only = RingProcess(config)
    popularity_only.favourites = np.random.default_rng(0).permuted(process.favourites, axis=0)
    guessed = metrics(popularity_only.target_ranks(paths, lengths - 1), 10)["HR@10"]
    assert 0.1 < guessed < best - 0.2 < 0.8


def test_store_claims_the_best_possible_only_when_nothing_was_dropped(tmp_path: Path) -> None:
    flags = {"synthetic_user_count": 50, "synthetic_item_count": 90, "cache_dir": str(tmp_path)}
    store = prepare(DataConfig(**flags))
    ratings = SyntheticRatings(DataConfig(**flags).synthetic())
    next(ratings)
    assert store.best_possible == ratings.best_possible
    assert f"HR@10 {store.best_possible['test']['HR@10']:.4f}" in describe(store)
    filtered = prepare(DataConfig(min_item_count=9, **flags))
    assert filtered.best_possible is None and "best possible" not in describe(filtered)


def test_sizes_are_checked() -> None:
    with pytest.raises(UserError, match="--synthetic_item_count must be at least 80"):
        DataConfig(synthetic_item_count=79)
    with pytest.raises(UserError, match="--synthetic_user_count must be at least 1"):
        DataConfig(synthetic_user_count=0)
