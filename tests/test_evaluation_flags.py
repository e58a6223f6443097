"""Flags of the evaluation, in train.py and eval.py: what they change, record and refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from tests.conftest import TINY, RunMain, assert_one_line, read_log

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
    rows += ["short,i0,1", "short,i1,2"]  # too few to hold two out
    path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    return path


def read_result(folder: Path, name: str = "eval_test") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def ratings(tmp_path: Path) -> tuple[str, ...]:
    """Flags of a training on repeating ratings."""
    flags = (f"--dataset_path={repeating_ratings(tmp_path)}", f"--cache_dir={tmp_path / 'cache'}")
    flags += ("--min_user_count=0", "--num_epochs=1")
    return (*TINY, *flags, f"--run_dir={tmp_path / 'run'}")


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
    assert (result["users"], result["users_left_out"]) == (40, 1)
    assert "1 of 41 users have fewer than 3 items" in outcome.out
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

    # recommend.py ranks as the run did: every item is in the history.
    for flags, rows in (([], 12), (["--seen=keep"], 12), (["--seen=drop"], 0)):
        table = tmp_path / "lists.csv"
        recommend = ("recommend", f"--checkpoint={run}", "--user=u1", "--k=12")
        assert run_main(*recommend, f"--output={table}", *flags).code == 0
        assert len(table.read_text().splitlines()) == 1 + rows

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
    assert "NDCG@12" in read_log(run)[-1]["full"]
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


def numbered_ratings(path: Path, *more: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """30 users (100, 101, ...) x 8 different ones of 20 items (7, 8, ...): none repeats."""
    generator = np.random.default_rng(6)
    rows = [
        (100 + user, 7 + int(item), time)
        for user in range(30)
        for time, item in enumerate(generator.permutation(20)[:8])
    ]
    columns = zip(*rows, *more, strict=True)
    pq.write_table(pa.table(dict(zip(("user", "item", "timestamp"), columns, strict=True))), path)
    return rows


def test_ranks_of_every_user_in_a_file(run_main: RunMain, tmp_path: Path) -> None:
    ratings, run = tmp_path / "ratings.parquet", tmp_path / "run"
    rows = numbered_ratings(ratings)
    flags = (f"--dataset_path={ratings}", f"--cache_dir={tmp_path / 'cache'}", "--num_epochs=1")
    assert run_main("train", *TINY, *flags, f"--run_dir={run}").code == 0
    evaluate, path = ("eval", f"--checkpoint={run}"), tmp_path / "new" / "ranks.parquet"
    for split, place in (("test", -1), ("validation", -2)):
        outcome = run_main(*evaluate, f"--split={split}", f"--per_user={path}", "--batch_size=4")
        assert outcome.code == 0, outcome.err
        table = pq.read_table(path)
        assert table.schema.names == ["user", "target", "rank", "sampled_rank", "score"]
        assert table.schema.types == [*[pa.int64()] * 4, pa.float32()]
        found = table.to_pydict()
        by_user = {user: [item for u, item, _ in rows if u == user] for user in found["user"]}
        assert sorted(by_user) == list(range(100, 130))
        assert found["target"] == [by_user[user][place] for user in found["user"]]
        result = read_result(run, f"eval_{split}")
        for column, protocol in (("rank", "full"), ("sampled_rank", "sampled")):
            mean = np.mean([1 / rank for rank in found[column]])
            assert result[protocol]["MRR"] == pytest.approx(mean)
        assert len(set(found["score"])) > 10
        assert max(map(abs, found["score"])) <= 1 + 1e-6  # cosines
    before = path.read_bytes()
    for name, message in ((tmp_path / "x.csv", "must end with .parquet"), (run, "must end with")):
        assert_one_line(run_main(*evaluate, f"--per_user={name}"), "eval", message)
    (tmp_path / "folder.parquet").mkdir()
    outcome = run_main(*evaluate, f"--per_user={tmp_path / 'folder.parquet'}")
    assert_one_line(outcome, "eval", "folder.parquet cannot be written: it is a folder")
    assert path.read_bytes() == before
    assert not [*tmp_path.rglob("*.part")]


def test_two_models_are_compared(run_main: RunMain, tmp_path: Path) -> None:
    ratings, others = tmp_path / "ratings.parquet", tmp_path / "other.parquet"
    later = tmp_path / "later.parquet"
    numbered_ratings(ratings)
    numbered_ratings(others, (100, 26, 9), (101, 26, 9))
    flags = (*TINY, f"--cache_dir={tmp_path / 'cache'}", "--num_epochs=1", "--metrics_at=5")
    for name, seed in (("a", 1), ("b", 2)):
        run = f"--run_dir={tmp_path / name}"
        train = ("train", *flags, f"--dataset_path={ratings}", run, f"--seed={seed}")
        assert run_main(*train).code == 0
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    results = [read_result(Path(run)) for run in pair]
    before = [(tmp_path / name / "eval_test.json").stat().st_mtime_ns for name in "ab"]
    outcome = run_main("eval", "--compare", *pair)
    assert outcome.code == 0, outcome.err
    title, *rows = outcome.out.splitlines()
    assert title == "test, 30 users of both"
    table = {row.rsplit(maxsplit=5)[0].strip(): row.split()[-5:] for row in rows[:-1]}
    for run, result in zip(pair, results, strict=True):
        for protocol in ("sampled", "full"):
            row = table[f"{protocol}, {run}"]
            assert row == [f"{value:.4f}" for value in result[protocol].values()]
    change = results[1]["full"]["NDCG@10"] - results[0]["full"]["NDCG@10"]
    assert f"by full NDCG@10: {change:+.4f} ± " in rows[-1]
    assert rows[-1].startswith(f"{pair[1]} is not shown to differ from {pair[0]} by full NDCG@10")
    outcome = run_main("eval", "--compare", pair[0], pair[0])
    assert "+0.0000 ± 0.0000, p 1.0000" in outcome.out.splitlines()[-1]
    # What is not as in training is said of each model.
    numbered_ratings(later, (100, 7, 99))
    more = ("--seen=keep", "--popularity_discount=0.5", f"--dataset_path={later}")
    outcome = run_main("eval", "--compare", *pair, *more)
    noted = "popularity discount 0.5, seen items not as in training (keep), on other ratings than"
    for row, run in zip(outcome.out.splitlines()[1:], pair, strict=False):
        assert row.startswith(f"{run}: {noted} those of training (")
    after = [(tmp_path / name / "eval_test.json").stat().st_mtime_ns for name in "ab"]
    assert before == after

    wrong = [
        ((), "--checkpoint is needed"),
        (("--compare", *pair, "--checkpoint", pair[0]), "leave --checkpoint out"),
        (("--compare", *pair, "--per_user=x.parquet"), "--per_user needs --checkpoint"),
        (("--compare", pair[0]), "--compare: expected 2 arguments"),
    ]
    for given, message in wrong:
        assert_one_line(run_main("eval", *given), "eval", message)
    more = (f"--dataset_path={others}", f"--run_dir={tmp_path / 'c'}")
    assert run_main("train", *flags, *more).code == 0
    outcome = run_main("eval", "--compare", pair[0], str(tmp_path / "c"))
    assert_one_line(outcome, "eval", "trained on different ratings")
