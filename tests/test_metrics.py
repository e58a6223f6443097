"""Ranking metrics against values worked out by hand."""

import math

import pytest
import torch

from model.evaluation.metrics import CUTOFFS, METRICS, metric_names, metric_sums, named_means
from model.evaluation.report import format_table


def of_ranks(*ranks: int, cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
    sums = metric_sums(torch.tensor(ranks, dtype=torch.int64), cutoffs)
    return named_means(sums, metric_names(cutoffs))


def test_metrics_of_four_ranks_by_hand() -> None:
    # Gains 1, 1/2, 1/log2(6) and, beyond every cutoff, none.
    found = of_ranks(1, 3, 5, 21)
    assert found == pytest.approx(
        {
            "HR@1": 1 / 4,
            "HR@5": 3 / 4,
            "HR@10": 3 / 4,
            "HR@20": 3 / 4,
            "NDCG@5": (1 + 1 / 2 + 1 / math.log2(6)) / 4,
            "NDCG@10": (1 + 1 / 2 + 1 / math.log2(6)) / 4,
            "NDCG@20": (1 + 1 / 2 + 1 / math.log2(6)) / 4,
            "MRR": (1 + 1 / 3 + 1 / 5 + 1 / 21) / 4,
        }
    )
    assert tuple(found) == METRICS


@pytest.mark.parametrize("cutoff", [1, 5, 10, 20])
def test_the_cutoff_itself_counts_and_the_next_does_not(cutoff: int) -> None:
    assert of_ranks(cutoff)[f"HR@{cutoff}"] == 1
    assert of_ranks(cutoff + 1)[f"HR@{cutoff}"] == 0


def test_the_best_is_1_in_every_metric() -> None:
    assert of_ranks(1, 1) == dict.fromkeys(METRICS, 1.0)


def test_sums_of_parts_add_up() -> None:
    parts = metric_sums(torch.tensor([1, 7])) + metric_sums(torch.tensor([2, 30, 11]))
    whole = metric_sums(torch.tensor([1, 7, 2, 30, 11]))
    torch.testing.assert_close(parts, whole)
    assert parts.dtype == torch.float64 and parts[-1] == 5


def test_zero_users_do_not_divide_by_zero() -> None:
    assert of_ranks() == dict.fromkeys(METRICS, 0.0)


def test_the_table_is_aligned_and_leaves_unknown_cells_empty() -> None:
    rows = [("model", dict.fromkeys(METRICS, 0.25)), ("best", {"HR@10": 0.5, "NDCG@10": 1.0})]
    header, model, best = format_table(rows).splitlines()
    assert header.split() == list(METRICS)
    assert model.split() == ["model"] + ["0.2500"] * len(METRICS)
    assert best.split() == ["best", "0.5000", "1.0000"]
    for name, value in (("HR@10", "0.5000"), ("NDCG@10", "1.0000")):
        end = header.index(f" {name} ") + len(name) + 1
        assert best[:end].endswith(value)


def test_other_cutoffs_by_hand() -> None:
    assert metric_names((1, 4)) == ("HR@1", "HR@4", "NDCG@4", "MRR")  # NDCG@1 is HR@1
    assert of_ranks(1, 3, 7, cutoffs=(2, 3, 10)) == pytest.approx(
        {
            "HR@2": 1 / 3,
            "HR@3": 2 / 3,
            "HR@10": 1,
            "NDCG@2": 1 / 3,
            "NDCG@3": (1 + 1 / 2) / 3,
            "NDCG@10": (1 + 1 / 2 + 1 / 3) / 3,
            "MRR": (1 + 1 / 3 + 1 / 7) / 3,
        }
    )
    wide = of_ranks(1, 3, 7, cutoffs=(10, 1000))
    header, row = format_table([("model", wide)]).splitlines()
    assert header.split() == ["HR@10", "HR@1000", "NDCG@10", "NDCG@1000", "MRR"]
    assert len(row) == len(header)
