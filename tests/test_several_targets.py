"""Several targets of a user (--targets all), by hand and against plain lists."""

import json
import math
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.distributed import Ranks
from model.evaluation.details import details
from model.evaluation.evaluate import rank_users, summed
from model.evaluation.metrics import (
    metrics_of_several,
    names_of_several,
    one_list,
    user_metrics,
)
from model.evaluation.ranked_users import gathered
from model.run.measure import recent_days
from model.settings.config import RunConfig
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader
from pipeline.evaluation.recent import DAYS, ranks_by, recent_scores
from pipeline.preparation.store import SequenceStore
from tests.conftest import TINY, RunMain, assert_one_line
from tests.test_evaluation import model_with

CUTOFFS = (1, 2, 10)
V = 9


def parted(histories: list[tuple[list[int], list[int], list[int]]]) -> SequenceStore:
    """A store of training, validation and test items of each user."""
    sizes = np.array([[len(part) for part in history] for history in histories])
    offsets = np.concatenate([[0], np.cumsum(sizes.sum(axis=1))])
    store = SequenceStore.from_arrays(
        [item for history in histories for part in history for item in part], offsets, V
    )
    store.ends = offsets[:-1] + np.cumsum(sizes, axis=1).T[:2]
    store.split = {"by": "file"}
    return store


def of_user(ranks: list[int]) -> dict[str, float]:
    """The metrics of one user by their definitions."""
    ranks, found = sorted(ranks), {}
    for k in CUTOFFS:
        found[f"HR@{k}"] = float(min(ranks) <= k)
        found[f"Recall@{k}"] = sum(r <= k for r in ranks) / len(ranks)
        if k > 1:
            best = sum(1 / math.log2(place + 1) for place in range(1, min(len(ranks), k) + 1))
            found[f"NDCG@{k}"] = sum(1 / math.log2(r + 1) for r in ranks if r <= k) / best
    found["MRR"] = 1 / min(ranks)
    found["MAP"] = sum(at / rank for at, rank in enumerate(ranks, 1)) / len(ranks)
    return found


def mean_of(users: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in users) / len(users) for name in users[0]}


def ranks_in_list(scores: dict[int, Any], targets: list[int], others: list[int]) -> list[int]:
    """Places of the targets in one list, behind the others of their score."""
    order = sorted([*targets, *others], key=lambda item: (-scores[item], item in targets))
    return [1 + order.index(target) for target in targets]


def test_metrics_by_hand() -> None:
    # The first user's targets are at 1, 3 and 20, the second's only one at 2.
    found = metrics_of_several(np.array([3, 20, 1, 2]), np.array([4, 4, 4, 7]), (2, 10))
    named = dict(zip(names_of_several((2, 10)), found.tolist(), strict=True))
    best = 1 + 1 / math.log2(3)
    assert named["HR@2"] == [1, 1] and named["HR@10"] == [1, 1]
    assert named["Recall@2"] == pytest.approx([1 / 3, 1])
    assert named["Recall@10"] == pytest.approx([2 / 3, 1])
    assert named["NDCG@2"] == pytest.approx([1 / best, 1 / math.log2(3)])
    assert named["NDCG@10"] == pytest.approx([1.5 / (best + 0.5), 1 / math.log2(3)])
    assert named["MRR"] == [1, 0.5]
    assert named["MAP"] == pytest.approx([(1 + 2 / 3 + 3 / 20) / 3, 0.5])
    assert metrics_of_several(np.zeros(0, int), np.zeros(0, int), (10,)).shape == (5, 0)


def test_one_target_of_each_has_the_usual_metrics() -> None:
    ranks = np.array([1, 4, 11])
    several = dict(
        zip(
            names_of_several(CUTOFFS),
            metrics_of_several(ranks, np.arange(3), CUTOFFS),
            strict=False,
        )
    )
    for name, values in zip(
        ("HR@2", "NDCG@10", "MRR"), user_metrics(ranks, CUTOFFS)[[1, 4, 5]], strict=False
    ):
        assert several[name].tolist() == pytest.approx(values.tolist())
    assert several["Recall@2"].tolist() == several["HR@2"].tolist()
    assert several["MAP"].tolist() == several["MRR"].tolist()


@given(st.lists(st.integers(0, 3), min_size=V, max_size=V), st.integers(1, 4), st.integers(0, 9))
def test_ties_of_a_users_targets_count_once(scores: list[int], count: int, seed: int) -> None:
    items = np.random.default_rng(seed).permutation(V)
    targets, others = items[:count].tolist(), items[count:].tolist()
    by = dict(enumerate(scores))
    alone = [1 + sum(by[other] >= by[target] for other in others) for target in targets]
    whole = [sum(value >= by[target] for value in scores) for target in targets]
    # Beside another user, whose only target ties with nothing.
    users = np.array([0] * count + [1])
    settled = one_list(np.array([[*alone, 5], [*whole, 5]]), users)
    expected = sorted(ranks_in_list(by, targets, others))
    for row in settled:
        assert sorted(row[:-1].tolist()) == expected and row[-1] == 5
        # Each target has its own: one of a larger score is ahead.
        for (one, rank), (other, behind) in permutations(zip(targets, row, strict=False), 2):
            assert rank < behind or by[one] <= by[other]


parts = st.lists(st.integers(1, V), max_size=5)
users_of = st.lists(st.tuples(parts, parts, parts), min_size=1, max_size=5)


@settings(max_examples=40)
@given(
    users_of,
    st.permutations(range(V)),
    st.sampled_from(["validation", "test"]),
    st.booleans(),
    st.integers(1, 7),
)
def test_evaluation_equals_plain_lists(
    histories: list[tuple[list[int], list[int], list[int]]],
    order: list[int],
    split: str,
    keep: bool,
    batch_size: int,
) -> None:
    histories = [([1, 2, 2], [3, 1], [4, 2, 4]), *histories]
    store, scores = parted(histories), [each / V for each in order]
    config = HoldoutConfig(eval_negatives=3, targets="all")
    loader = EvalLoader(store, split, 8, batch_size, config, keep_seen=keep)
    counts = torch.from_numpy(store.train_item_counts)
    ranking = rank_users(model_with(scores), loader, counts, negatives=3, list_lengths=CUTOFFS)
    result, users = summed(ranking, CUTOFFS), gathered(ranking, loader)

    negatives = {
        int(user): [item for item in row.tolist() if item]
        for owners, _, drawn in loader.targets_and_negatives()
        for user, row in zip(owners, drawn, strict=True)
    }
    by = dict(enumerate(scores, 1))
    popularity = {item: int(store.train_item_counts[item]) for item in range(1, V + 1)}
    expected: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("sampled", "full", "popularity")
    }
    listed, pairs, fewer = [], [], 0
    for user, (training, validation, test) in enumerate(histories):
        known = training if split == "validation" else training + validation
        targets = list(dict.fromkeys(validation if split == "validation" else test))
        if not known or not targets:
            continue
        pairs += [(user, target) for target in targets]
        others = [i for i in range(1, V + 1) if i not in targets and (keep or i not in known)]
        drawn = negatives[user]
        unrated = {i for i in popularity if popularity[i]} - set(targets)
        unrated -= set() if keep else set(known + validation) | set(test if split == "test" else [])
        assert len(drawn) == min(3, len(unrated), len(set(drawn))) and set(drawn) <= unrated
        fewer += len(drawn) < 3
        expected["sampled"].append(of_user(ranks_in_list(by, targets, drawn)))
        expected["full"].append(of_user(ranks_in_list(by, targets, others)))
        expected["popularity"].append(of_user(ranks_in_list(popularity, targets, others)))
        listed.append(sorted([*targets, *others], key=lambda item: -by[item])[:2])
    for protocol in ("sampled", "full"):
        assert result[protocol] == pytest.approx(mean_of(expected[protocol]))
    assert result["popularity"]["full"] == pytest.approx(mean_of(expected["popularity"]))
    assert (result["users"], result["targets"]) == (len(listed), len(pairs))
    assert result.get("fewer_negatives", 0) == fewer
    assert users.users.tolist() == [user for user, _ in pairs]
    assert store.items[users.places].tolist() == [target for _, target in pairs]
    assert ranking.listed is not None
    found = ranking.listed.metrics(store.train_item_counts)
    assert found["coverage@2"] == pytest.approx(len({i for row in listed for i in row}) / V)
    # Every user's list counts once.
    flat = [item for row in listed for item in row]
    assert found["popularity@2"] == pytest.approx(np.mean([popularity[item] for item in flat]))


@settings(max_examples=40)
@given(users_of, st.integers(1, 4), st.integers(1, 4))
def test_a_user_is_whole_on_one_rank(
    histories: list[tuple[list[int], list[int], list[int]]], world_size: int, batch_size: int
) -> None:
    store = parted([([1], [2], [3, 4, 3]), *histories])
    config = HoldoutConfig(targets="all")
    loaders = [
        EvalLoader(store, "test", 8, batch_size, config, rank, world_size)
        for rank in range(world_size)
    ]
    assert len({len(loader.users) for loader in loaders}) == 1
    owners = [set(loader.users.tolist()) - {-1} for loader in loaders]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(store.evaluable_users())
    pairs = sorted(
        pair
        for loader in loaders
        for pair in zip(loader.users.tolist(), loader.places.tolist(), strict=True)
        if pair[0] >= 0
    )
    users, places = store.parts.targets("test", store.items, every=True)
    assert pairs == list(zip(users.tolist(), places.tolist(), strict=True))
    for loader in loaders:
        batches = list(loader)
        firsts = np.concatenate([batch.is_first.numpy() for batch in batches])
        assert firsts.sum() == len(set(loader.users.tolist()) - {-1})
        for batch in batches:
            lengths = batch.features["item"].lengths().tolist()
            assert all(
                length == 1
                for length, (one, other) in zip(
                    lengths[1:], pairwise(batch.users.tolist()), strict=True
                )
                if one == other
            )


def test_groups_count_only_their_targets() -> None:
    # Item 1 is the head. The user's targets 1 (repeated) and 9 (cold) are at 1 and 4.
    store = parted([([1, 1, 1, 2], [3], [9, 1])])
    config = HoldoutConfig(eval_negatives=1, targets="all")
    loader = EvalLoader(store, "test", 8, 4, config, keep_seen=True)
    model = model_with([9, 8, 7, 5, 4, 3, 2, 1, 6])
    ranking = rank_users(model, loader, torch.from_numpy(store.train_item_counts))
    found = details(gathered(ranking, loader), store, "test", (10,), seed=0)
    groups = found["groups"]["target"]
    assert groups["repeated"]["users"] == groups["new"]["users"] == 1
    assert groups["repeated"]["full"]["MAP"] == 1
    assert groups["new"]["full"]["MAP"] == pytest.approx(1 / 4)
    assert found["cold_targets"] == 0.5
    # By 1 / training count: 1 / 3 of item 1, 1 of item 9.
    gain = 1 / math.log2(5)
    assert found["debiased"]["NDCG@10"] == pytest.approx((1 / 3 + gain) / (4 / 3))
    assert found["intervals"]["full"]["MAP"] == pytest.approx([0.75, 0.75])


def test_recent_popularity_by_hand() -> None:
    store = parted([([1, 2, 2], [3], [4]), ([1, 1, 3], [4], [2])])
    day = 86_400
    store.times = np.array([1, 9, 9, 12, 20, 2, 3, 9, 12, 20]) * day
    assert recent_scores(store, "test", 1) is None  # the split is not by time
    store.split = {"by": "time", "points": ["10", "15"], "times": [10 * day, 15 * day]}
    assert recent_scores(store, "test", 1) is None  # unknown unit
    store.counts["times"] = {"unit": "s"}
    # Training counts 1: 3, 2: 2, 3: 1. In the last day before 10: 2 twice, 3 once.
    week, day_ = (recent_scores(store, "validation", days) for days in (8, 1))
    assert week is not None and day_ is not None
    assert day_[1:5].tolist() == [3, 2 * 4 + 2, 4 + 1, 0]
    assert week[1:5].tolist() == [2 * 4 + 3, 2 * 4 + 2, 4 + 1, 0]
    # Before 15, the validation items count too: 3 and 4 once in the last 4 days.
    late = recent_scores(store, "test", 4)
    assert late is not None and late[1:5].tolist() == [3, 2, 4 + 1, 4]
    loader = EvalLoader(store, "test", 8, 4, HoldoutConfig(eval_negatives=9), keep_seen=True)
    # Targets 4 and 2, behind 3; behind 3, 4 and 1. Untrained 4 is no negative.
    assert ranks_by(loader, late).tolist() == [[2, 3], [2, 4]]
    dropped = EvalLoader(store, "test", 8, 4, HoldoutConfig(eval_negatives=9))
    list(dropped)
    assert ranks_by(dropped, late)[1].tolist() == [1, 1]


def test_validation_chooses_the_days_of_recent_popularity(one_rank: Ranks) -> None:
    # Ratings of the items 1, 4, 2 and 3 on days 1, 78, 96 and 99; the validation target is 2.
    rated = ((1, 9, 1), (4, 8, 78), (2, 5, 96), (3, 2, 99))
    store = parted([([item for item, count, _ in rated for _ in range(count)], [2], [1])])
    days = np.repeat([day for *_, day in rated], [count for _, count, _ in rated])
    store.times = np.append(days, [100, 110]) * 86_400
    store.split = {"by": "time", "points": ["100", "110"], "times": [100 * 86_400, 110 * 86_400]}
    store.counts["times"] = {"unit": "s"}
    config = RunConfig(holdout=HoldoutConfig(seen="keep", eval_negatives=3))
    loader = EvalLoader(store, "validation", 8, 4, config.holdout, keep_seen=True)
    ranks = {}
    for last in DAYS:
        scores = recent_scores(store, "validation", last)
        assert scores is not None
        ranks[last] = ranks_by(loader, scores)[1].tolist()
    # On the last day 3, then by training counts 1, 4, 2; in 7 days 2, 3; in 30 days 4, 2.
    assert ranks == {1: [4], 7: [1], 30: [2], 90: [2]}
    assert recent_days(config, store, one_rank) == 7
    store.counts["times"] = {"unit": ""}
    assert recent_days(config, store, one_rank) is None


def ratings(folder: Path, days: int = 60) -> Path:
    """40 users x 60 days, a rating a day, of 25 items that change with the time."""
    generator, path = np.random.default_rng(3), folder / "ratings.csv"
    rows = [
        f"u{user},i{day // 10 * 3 + generator.integers(8)},{1_300_060_800 + day * 86_400 + user}"
        for user in range(40)
        for day in range(days)
    ]
    path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    return path


def test_a_run_for_each_window(run_main: RunMain, tmp_path: Path) -> None:
    run, path = tmp_path / "run", ratings(tmp_path)
    flags = (*TINY, f"--dataset_path={path}", f"--cache_dir={tmp_path / 'c'}", "--num_epochs=1")
    rolling = (*flags, "--split_time=2011-04-03,2011-04-13,2011-04-23,2011-05-03")
    outcome = run_main("train", *rolling)
    assert_one_line(outcome, "train", "trains 3 times: give --run_dir")
    outcome = run_main(
        "train", *flags, "--split_time=2011-04-03,2011-04-13,2011-04-01", "--run_dir=x"
    )
    assert_one_line(outcome, "train", "2011-04-01 is not after 2011-04-13")
    # A window that cannot be evaluated is refused before the first one trains.
    late = "--split_time=2011-04-03,2011-04-13,2011-04-23,2031-05-03"
    outcome = run_main("train", *flags, late, f"--run_dir={run}")
    assert_one_line(outcome, "train", "no rating of ratings is at or after 2031-05-03")
    late = "--split_time=2011-04-03,2011-04-13,2011-04-23 00:01:00,2011-04-23 01:00:00"
    outcome = run_main("train", *flags, late, f"--run_dir={run}")
    lacking = (
        "is at or after 2011-04-23 00:01:00 and before 2011-04-23 01:00:00 (--split_until); they"
    )
    assert_one_line(outcome, "train", lacking)
    assert not run.exists()
    outcome = run_main("train", *rolling, f"--run_dir={run}", "--split_until=2011-05-08")
    assert outcome.code == 0, outcome.err
    results = [
        json.loads((run / f"window-{number}" / "eval_test.json").read_text())
        for number in (1, 2, 3)
    ]
    points = ["2011-04-03", "2011-04-13", "2011-04-23", "2011-05-03", "2011-05-08"]
    for at, result in enumerate(results):
        assert result["protocol"]["points"] == points[at : at + 2]
        assert result["protocol"]["until"] == points[at + 2]
    *_, header, first, second, third, mean = outcome.out.strip().splitlines()
    assert header.split()[:2] == ["HR@1", "HR@5"]
    for row, at in ((first, 0), (second, 1), (third, 2)):
        assert row.startswith(f"{points[at]},{points[at + 1]} until {points[at + 2]}, 40 users ")
        assert row.split()[-1] == f"{results[at]['full']['MRR']:.4f}"
    expected = np.mean([result["full"]["MRR"] for result in results])
    assert mean.split()[-1] == f"{expected:.4f}"
    # Each window is a run like any other.
    assert run_main("eval", f"--checkpoint={run / 'window-2'}").code == 0
    outcome = run_main("eval", f"--checkpoint={run}")
    assert_one_line(outcome, "eval", f"several windows: give one of them, such as {run}/window-1")
    # The last window had an end, which another point takes away or moves.
    log = (run / "window-1" / "metrics.jsonl").stat().st_mtime_ns
    for more in ((), ("--split_until=2011-05-09",)):
        outcome = run_main("train", *rolling, f"--run_dir={run}", "--resume=auto", *more)
        assert outcome.code == 2
        end = " until 2011-05-09" if more else ""
        assert outcome.err.splitlines()[-1].endswith(
            f"window-3 was trained with --split_time 2011-04-23,2011-05-03 until 2011-05-08, not "
            f"2011-04-23,2011-05-03{end}: give the same value, or choose another --run_dir"
        )
        # It is refused before an earlier window goes on.
        assert log == (run / "window-1" / "metrics.jsonl").stat().st_mtime_ns
    # A folder holds windows or a run, not both.
    single = (*flags, "--split_time=2011-04-03,2011-04-13")
    outcome = run_main("train", *single, f"--run_dir={run}", "--resume=auto")
    assert_one_line(outcome, "train", "run holds the runs of several windows: choose another")
    outcome = run_main("train", *rolling, f"--run_dir={run / 'window-1'}", "--resume=auto")
    assert_one_line(outcome, "train", "window-1 holds a run: choose another folder for those of s")
    assert (
        json.loads((run / "window-2" / "eval_test.json").read_text())["full"] == results[1]["full"]
    )


def test_a_run_by_time(run_main: RunMain, tmp_path: Path) -> None:
    """Training, evaluation, comparison and resume keep to the split."""
    run, path = tmp_path / "run", ratings(tmp_path)
    flags = (*TINY, f"--dataset_path={path}", f"--cache_dir={tmp_path / 'c'}", "--num_epochs=1")
    by_time = (*flags, "--split_time=2011-04-13,2011-05-03", "--targets=all")
    outcome = run_main("train", *by_time, f"--run_dir={run}")
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "eval_test.json").read_text())
    protocol = result["protocol"]
    assert (protocol["split"], protocol["targets"]) == ("time", "all")
    assert protocol["points"] == ["2011-04-13", "2011-05-03"]
    assert result["recent_days"] in (1, 7, 30, 90)
    assert f"full, popular in the last {result['recent_days']} days" in outcome.out
    assert (
        "Recall@10" in result["full"] and "MAP" in result["baselines"]["popular_recently"]["full"]
    )
    assert f"test, 40 users with {result['targets']} targets" in outcome.out
    config = json.loads((run / "config.json").read_text())
    assert config["evaluation"] == protocol

    ranks = tmp_path / "ranks.parquet"
    outcome = run_main("eval", f"--checkpoint={run}", f"--per_user={ranks}")
    assert outcome.code == 0, outcome.err
    again = json.loads((run / "eval_test.json").read_text())
    assert again["full"] == result["full"] and again["groups"] == result["groups"]
    assert pq.read_table(ranks).num_rows == result["targets"]

    def refused(*more: str) -> str:
        outcome = run_main("train", *flags, f"--run_dir={run}", "--resume=auto", *more)
        assert outcome.code == 2
        return outcome.err

    assert "was trained with --split_time 2011-04-13,2011-05-03, not" in refused("--targets=next")
    same = "--split_time=2011-04-13,2011-05-03"
    assert "was trained with --targets all, not next" in refused(same)

    other = tmp_path / "other"
    assert run_main("train", *flags, f"--run_dir={other}").code == 0
    outcome = run_main("eval", f"--checkpoint={other}", "--targets=all")
    assert_one_line(outcome, "eval", "other was trained with --split leave_one_out")
    outcome = run_main("eval", "--compare", run, other)
    assert_one_line(outcome, "eval", "they were trained on different ratings or splits")
    taught = run_main("train", *by_time, f"--run_dir={tmp_path / 't'}", "--teachers", other)
    assert "was trained on other ratings of these items, or with another split" in taught.err
    outcome = run_main("recommend", f"--checkpoint={run}", "--user=u1")
    assert outcome.code == 0, outcome.err


def test_a_model_is_evaluated_by_other_targets_than_in_training(
    run_main: RunMain, tmp_path: Path
) -> None:
    run, path, file = tmp_path / "run", ratings(tmp_path), tmp_path / "ranks.parquet"
    flags = (*TINY, f"--dataset_path={path}", f"--cache_dir={tmp_path / 'c'}", "--num_epochs=1")
    split = ("--split_time=2011-04-28,2011-05-03", "--min_item_count=20")
    outcome = run_main("train", *flags, *split, f"--run_dir={run}")
    assert outcome.code == 0, outcome.err
    trained = json.loads((run / "eval_test.json").read_text())
    assert trained["protocol"]["targets"] == "next" and "targets" not in trained
    # 45 days of 60 train, the test part begins after 50.
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    training = Counter(item for at, (_, item, _) in enumerate(rows) if at % 60 < 45)
    dropped = sum(training[item] < 20 for at, (_, item, _) in enumerate(rows) if at % 60 >= 50)
    assert trained["ratings_dropped"] == dropped > 0
    assert f"{dropped:,} ratings of this part are not evaluated: their items or" in outcome.out

    ranks: dict[str, dict[str, list[int]]] = {}
    for targets in ("next", "all"):
        evaluate = ("eval", f"--checkpoint={run}", f"--targets={targets}")
        outcome = run_main(*evaluate, f"--per_user={file}")
        assert outcome.code == 0, outcome.err
        ranks[targets] = {}
        for row in pq.read_table(file).to_pylist():
            ranks[targets].setdefault(row["user"], []).append(row["rank"])
    assert outcome.out.startswith("test, 40 users with ")
    assert "targets, targets not as in training (all)\n" in outcome.out
    assert json.loads((run / "eval_test.json").read_text())["full"] == trained["full"]
    result = json.loads((run / "eval_test-targets-all.json").read_text())
    assert result["protocol"]["targets"] == result["other_targets"] == "all"
    # The next item is the first target of each user, in the same list (seen items are kept).
    assert ranks["next"] == {user: of_all[:1] for user, of_all in ranks["all"].items()}
    expected = mean_of([of_user(of_all) for of_all in ranks["all"].values()])
    assert max(map(len, ranks["all"].values())) > 3
    for name in ("HR@10", "Recall@10", "NDCG@10", "MRR", "MAP"):
        assert result["full"][name] == pytest.approx(expected[name])
    first = [1 / of_next[0] for of_next in ranks["next"].values()]
    assert trained["full"]["MRR"] == pytest.approx(np.mean(first))

    outcome = run_main("eval", "--compare", run, run, "--targets=all")
    assert outcome.out.startswith("test, 40 users of both\n") and "MAP" in outcome.out
