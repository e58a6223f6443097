"""Intervals of metrics, and groups of users by hand; the rest is in tests/test_distributed.py."""

import math

import numpy as np
import pytest

from model.evaluation.details import details, histogram, intervals
from model.evaluation.metrics import metric_names, user_metrics
from model.evaluation.ranked_users import RankedUsers
from model.evaluation.report import format_report
from tests.test_evaluation import HISTORIES, evaluated, of_ranks, store_of

CUTOFFS = (1, 5, 10, 20)


def mean_metrics(ranks: np.ndarray) -> dict[str, float]:
    means = user_metrics(ranks, CUTOFFS).mean(axis=1)
    return dict(zip(metric_names(CUTOFFS), means.tolist(), strict=True))


def test_metrics_of_each_user_have_the_means_of_all() -> None:
    ranks = np.array([1, 3, 5, 21])
    assert mean_metrics(ranks) == pytest.approx(of_ranks(*ranks))
    assert user_metrics(ranks)[0].tolist() == [1, 0, 0, 0]


def test_equal_users_leave_nothing_uncertain() -> None:
    for rank in (1, 7, 1000, 5000):
        bounds = intervals(np.full(9, rank), CUTOFFS, seed=0)
        assert tuple(bounds) == metric_names(CUTOFFS)
        for name, value in mean_metrics(np.array([rank])).items():
            assert bounds[name] == pytest.approx([value, value])


def test_intervals_are_those_of_a_bootstrap_over_users() -> None:
    generator = np.random.default_rng(1)
    ranks = generator.geometric(0.05, size=400)
    ranks[:40] += 1000  # a few are far: resampled as one
    bounds = intervals(ranks, CUTOFFS, seed=3)
    assert bounds == intervals(generator.permutation(ranks), CUTOFFS, seed=3)
    assert bounds != intervals(ranks, CUTOFFS, seed=4)
    drawn = ranks[generator.integers(len(ranks), size=(4000, len(ranks)))]
    for at, (name, value) in enumerate(mean_metrics(ranks).items()):
        means = np.array([user_metrics(sample)[at].mean() for sample in drawn])
        expected = np.quantile(means, (0.025, 0.975))
        low, high = bounds[name]
        assert low < value < high
        # The noise of quantiles of 1000 draws, and the step of a share of 400 users.
        assert [low, high] == pytest.approx(expected, abs=0.2 * means.std() + 1 / 400)
    half = 1.96 * math.sqrt(0.5 * 0.5 / 400)
    low, high = intervals(np.repeat([1, 2], 200), (1,), seed=0)["HR@1"]
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], abs=0.15 * half)


def test_ranks_are_counted_in_growing_intervals() -> None:
    found = histogram(np.array([[1, 2, 3, 5, 6, 80], [50, 51, 1, 1, 1, 1]]), num_items=80)
    assert found["limits"] == [1, 2, 5, 10, 20, 50, 80]
    assert found["sampled"] == [1, 1, 2, 1, 0, 0, 1]
    assert found["full"] == [4, 0, 0, 0, 0, 1, 1]
    assert histogram(np.ones((2, 1), int), num_items=1)["limits"] == [1]


def test_groups_by_hand() -> None:
    # Training parts 1 2 3 | 2 | 4 2 | 2 5: counts 1 4 1 1 1 0. Test targets 5, 3, 2 and 2.
    store = store_of([*HISTORIES, [2, 5, 5, 2]], 6)
    ranks = {"model": np.array([[1, 2, 3, 4], [2, 4, 6, 8]])}
    places = store.offsets[1:] - 1
    users = RankedUsers(np.arange(4), places, np.zeros(4, np.float32), ranks)
    found = details(users, store, "test", (10,), seed=0)

    def named(*ranks: int) -> dict[str, float]:
        return {name: of_ranks(*ranks)[name] for name in ("HR@10", "NDCG@10", "MRR")}

    def group(places: list[int]) -> dict[str, object]:
        sampled, full = (named(*each[places]) for each in ranks["model"])
        approx = {"sampled": pytest.approx(sampled), "full": pytest.approx(full)}
        return {"users": len(places), **approx}

    assert found["groups"] == {
        "history": {"1-4": group([0, 1, 2, 3])},
        # Item 2 is half of all counts; the others share the rest.
        "target_popularity": {"head": group([2, 3]), "middle": group([0, 1])},
        "target": {"repeated": group([2, 3]), "new": group([0, 1])},
    }
    assert found["cold_targets"] == 0
    weights = np.array([1, 1, 1 / 4, 1 / 4])
    gains = 1 / np.log2(np.array([2, 4, 6, 8]) + 1.0)
    assert found["debiased"] == pytest.approx(
        {"HR@10": 1, "NDCG@10": (weights * gains).sum() / weights.sum()}
    )
    assert "baselines" not in found


def test_users_left_out_are_said() -> None:
    result = evaluated([0.6, 0.5, 0.5, 0.4, 0.3, 0.2])
    assert "fewer than 3 items" not in format_report("test", result)
    lines = format_report("test", result | {"users_left_out": 2}).splitlines()
    assert "2 of 5 users have fewer than 3 items: they are trained on and not evaluated" in lines


def test_a_model_below_a_user_s_own_items_is_called_so() -> None:
    result = evaluated([0.6, 0.5, 0.5, 0.4, 0.3, 0.2])
    perfect = {name: {"sampled": of_ranks(1), "full": of_ranks(1)} for name in ("repeat_last",)}
    report = format_report("test", result | {"baselines": perfect}).splitlines()
    assert [line[:30] for line in report if "repeat last" in line] == [
        "sampled, repeat last          ",
        "full, repeat last             ",
    ]
    value = result["full"]["NDCG@10"]
    assert report[-1].startswith(
        f"the model is below repeating the user's own items (NDCG@10 full {value:.4f} against 1.0"
    )
