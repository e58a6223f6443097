"""The paired test of two models, against all signs and against a known distribution."""

from itertools import product
from math import comb

import numpy as np
import pytest

from model.evaluation.comparison import compare, format_comparison, p_value
from model.evaluation.ranked_users import RankedUsers
from tests.test_evaluation import of_ranks


def users_of(full: list[int], sampled: list[int] | None = None) -> RankedUsers:
    ranks = {"model": np.array([sampled or full, full])}
    users = np.arange(len(full))
    return RankedUsers(users, users, np.zeros(len(full), np.float32), ranks)


@pytest.mark.parametrize(
    "differences", [[0.5, 0.5, 0.25, -0.1, 0.0, 1.0, 0.3, 0.3], [1.0, -1.0, 0.0], [0.1] * 9]
)
def test_p_is_the_share_of_signs_that_do_as_much(differences: list[float]) -> None:
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    exact = np.mean([each >= abs(sum(differences)) - 1e-9 for each in sums])
    found = p_value(np.array(differences), np.random.default_rng(0))
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


def test_many_sizes_are_tested_as_normal() -> None:
    generator = np.random.default_rng(2)
    differences = generator.normal(0.03, 1, size=4000)
    normal = p_value(differences, generator)
    signs = generator.choice((-1, 1), size=(2000, 4000))
    drawn = np.mean(np.abs(signs @ differences) >= abs(differences.sum()))
    assert 0.01 < normal < 0.5
    assert normal == pytest.approx(drawn, abs=0.04)


def test_no_difference_is_no_evidence() -> None:
    assert p_value(np.zeros(5), np.random.default_rng(0)) == 1


def test_two_models_by_hand() -> None:
    # 12 users of rank 2 become 1, 3 the other way: a sign test of 15 flips.
    one, other = users_of([2] * 12 + [1] * 3 + [7]), users_of([1] * 12 + [2] * 3 + [7])
    found = compare(one, other, (1, 10), seed=0)
    for protocol in ("sampled", "full"):
        difference = found[protocol]["HR@1"]
        assert (difference.one, difference.other) == (3 / 16, 12 / 16)
        exact = 2 * sum(comb(15, wins) for wins in range(12, 16)) / 2**15
        assert difference.p == pytest.approx(exact, abs=0.008)
        deviation = np.std([1] * 12 + [-1] * 3 + [0])
        assert difference.half_width == pytest.approx(1.96 * deviation / 4)
        assert found[protocol]["HR@10"].p == 1
        ndcg = found[protocol]["NDCG@10"]
        assert ndcg.other == pytest.approx(of_ranks(*[1] * 12, *[2] * 3, 7)["NDCG@10"])
        assert ndcg.p == pytest.approx(exact, abs=0.008)
    lines = format_comparison(["a", "b"], found, "test", 16).splitlines()
    assert lines[0] == "test, 16 users of both"
    starts = ["sampled, a", "sampled, b", "  difference", "  ± (95 %)", "  p ", "   "]
    assert all(line.startswith(start) for line, start in zip(lines[2:8], starts, strict=True))
    assert lines[4].split()[1] == "0.5625"
    assert lines[-1].startswith("b is better than a by full NDCG@10: +0.")
    lines = format_comparison(["b", "a"], compare(other, one, (1, 10), 0), "test", 16).splitlines()
    assert lines[-1].startswith("a is worse than b by full NDCG@10: -0.")


def test_each_protocol_has_its_own_ranks() -> None:
    found = compare(users_of([1, 1], [2, 3]), users_of([1, 1], [1, 1]), (1, 10), seed=0)
    assert found["full"]["HR@1"].one == 1 and found["sampled"]["HR@1"].one == 0
