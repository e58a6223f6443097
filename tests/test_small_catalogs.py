"""No catalog is too small for the ranks: every sharding, head and loss, trained and evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.distributed import Ranks
from tests.conftest import torchrun
from tests.workers import small_catalogs


def assert_as_one_rank(num_ranks: int, every: int, one_rank: Ranks, folder: Path) -> None:
    outcome = torchrun(num_ranks, "tests/workers/small_catalogs.py", folder, str(every))
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads((folder / f"{num_ranks}.json").read_text())
    expected = small_catalogs.answers(one_rank, every)
    assert found.keys() == expected.keys()
    for case, answer in expected.items():
        assert found[case]["losses"] == pytest.approx(answer["losses"], abs=1e-4), case
        for protocol in ("full", "sampled"):
            assert found[case][protocol] == pytest.approx(answer[protocol]), case


def test_three_ranks_equal_one(one_rank: Ranks, tmp_path: Path) -> None:
    # Every seventh case: all catalogs, shardings, heads and losses, though not all combinations.
    assert_as_one_rank(3, 7, one_rank, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_combination_equals_one_rank(num_ranks: int, one_rank: Ranks, tmp_path: Path) -> None:
    assert_as_one_rank(num_ranks, 1, one_rank, tmp_path)
