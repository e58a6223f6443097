"""Flags of the evaluation, in train.py and eval.py: what they change, record and refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from tests.conftest import TINY, RunMain, assert_one_line

NUM_ITEMS = 12


def repeating_ratings(folder: Path) -> Path:
    """40 users x 30 events over 12 items: nearly every target is in its user's history."""
    generator = np.random.default_rng(5)
    path = folder / "ratings.csv"
    rows = [
        f"u{user},i{item},{time}"
        for user in range(40)
        for time, item in enumerate(generator.integers(NUM_ITEMS, size=30))
    ]
    path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    return path


def read_result(folder: Path, name: str = "eval_test") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def ratings(tmp_path: Path) -> tuple[str, ...]:
    """Flags of a training on repeating ratings."""
    flags = (f"--dataset_path={repeating_ratings(tmp_path)}", f"--cache_dir={tmp_path / 'cache'}")
    return (*TINY, *flags, "--num_epochs=1", f"--run_dir={tmp_path / 'run'}")


def test_seen_items_are_kept_where_targets_repeat(
    run_main: RunMain, ratings: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = run_main("train", *ratings)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("seen items")]
    share = read_result(run, "config")["evaluation"]["repeated_validation_targets"]
    assert 0.8 < share < 1
    assert line.startswith(f"seen items: keep (--seen auto; {share:.1%} of validation targets are")
    assert "full (all items, seen ones kept)" in outcome.out
    config, result = read_result(run, "config"), read_result(run)
    assert config["flags"]["seen"] == config["evaluation"]["seen"] == "keep"
    assert result["protocol"]["seen"] == "keep"
    assert result["protocol"]["repeated_validation_targets"] == share
    # 12 items at random: 10 of 12 hit. Dropped, hardly another item is left to rank.
    assert result["full"]["HR@1"] < 0.4

    evaluate = ("eval", f"--checkpoint={run}")
    outcome = run_main(*evaluate, "--seen=drop")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("test, 40 users, seen items not as in training (drop)\n")
    assert "seen ones removed" in outcome.out
    assert read_result(run) == result
    dropped = read_result(run, "eval_test-seen-drop")
    assert dropped["full"]["HR@10"] == 1 and dropped["full"]["HR@1"] > 0.6
    for flags in ([], ["--seen=auto"], ["--seen=keep"]):
        assert run_main(*evaluate, *flags).code == 0
        assert read_result(run)["full"] == pytest.approx(result["full"])

    more = (*ratings, "--resume=auto", "--num_epochs=2")
    message = f"{run} was trained with --seen keep, not drop: give the same value"
    assert_one_line(run_main("train", *more, "--seen=drop"), "train", message)
    assert run_main("train", *more).code == 0


def test_seen_items_are_dropped_where_targets_do_not_repeat(
    run_main: RunMain, run_dir: Path, cache_dir: Path
) -> None:
    flags = (*TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", "--num_epochs=1")
    outcome = run_main("train", *flags)
    assert "seen items: drop (--seen auto; 0.0% of validation targets" in outcome.out
    assert "full, best possible" in outcome.out
    assert read_result(run_dir)["protocol"]["seen"] == "drop"
    # What is best possible repeats no item: another protocol.
    outcome = run_main("eval", f"--checkpoint={run_dir}", "--seen=keep")
    assert outcome.code == 0, outcome.err
    assert "full, best possible" not in outcome.out


@pytest.mark.parametrize("given", ["0", "5,", "1,x", "-3", "1.5", "", "\u0663", "1" * 5000])
def test_cutoffs_are_whole_numbers(given: str) -> None:
    with pytest.raises(UserError, match="--metrics_at must be whole numbers from 1, with commas"):
        HoldoutConfig(metrics_at=given)


def test_metrics_at_other_cutoffs(
    run_main: RunMain, ratings: tuple[str, ...], tmp_path: Path
) -> None:
    assert HoldoutConfig(metrics_at="7, 3,7").cutoffs == (3, 7, 10)
    run = tmp_path / "run"
    message = "--metrics_at 3,13: the catalog has 12 items, fewer than 13"
    assert_one_line(run_main("train", *ratings, "--metrics_at=3,13"), "train", message)
    assert not run.exists()
    outcome = run_main("train", *ratings, "--metrics_at=12,3")
    assert outcome.code == 0, outcome.err
    names = ["HR@3", "HR@10", "HR@12", "NDCG@3", "NDCG@10", "NDCG@12", "MRR"]
    result = read_result(run)
    for row in (result["sampled"], result["full"], result["popularity"]["full"]):
        assert list(row) == names and row["HR@12"] == 1
    assert names in [line.split() for line in outcome.out.splitlines()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "validation/full/NDCG@12" in lines[-1]
    assert run_main("eval", f"--checkpoint={run}", "--metrics_at=1").code == 0
    again = read_result(run)
    assert list(again["full"]) == ["HR@1", "HR@10", "NDCG@10", "MRR"]
    assert again["full"]["NDCG@10"] == pytest.approx(result["full"]["NDCG@10"])
    for flag, message in (
        ("1,z", "--metrics_at must be whole numbers"),
        ("14", "the catalog has 12"),
    ):
        outcome = run_main("eval", f"--checkpoint={run}", f"--metrics_at={flag}")
        assert_one_line(outcome, "eval", message)
