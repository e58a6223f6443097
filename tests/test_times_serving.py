"""Times of histories and of requests: read, recommended by, exported; a run from end to end."""

import json
import shutil
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from model.bert4rec import BERT4Rec, ModelConfig
from model.distributed import Ranks
from model.evaluation.evaluate import evaluate
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import CatalogSlice
from model.programs import recommender as exported
from model.serving.config import Choice
from model.serving.recommender import Recommender
from pipeline.batches.times import UNKNOWN, ItemTimes, TimeSpan
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.formats.readers import ReadRatings
from pipeline.preparation.catalog import Catalog
from pipeline.serving.batches import HistoryBatches
from pipeline.serving.histories import KnownHistories, moment, of_lists, of_ratings
from tests.conftest import ROOT, TINY, RunMain, assert_one_line, run_process, torchrun
from tests.test_evaluation import store_of

U = UNKNOWN
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
CATALOG = Catalog(pa.array(list("abcde")), pa.repeat("", 5), np.ones(5, np.int64), pa.array(["u"]))
DAY = 86400


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("2000-12-31 22:12:40", 978300760),
        ("2000-12-31T23:12:40.9+01:00", 978300760),
        (978300760, 978300760),
        ("978300760999", 978300760),
        (978300760.5, 978300760),
    ],
)
def test_moments_are_dates_or_numbers_as_in_ratings(given: object, seconds: int) -> None:
    assert moment(given, "--at") == seconds


@pytest.mark.parametrize("given", ["soon", "7", 10**30, "1/2/2003"])
def test_other_moments_are_refused(given: object) -> None:
    with pytest.raises(UserError, match="--at"):
        moment(given, "--at")


# Ratings of two users; x is unknown, and the last of v.
LINES = ["v,a,{0}", "v,b,{1}", "v,x,{2}", "w,c,{1}"]
FORMS = {
    "seconds": (["1000000100", "1000000160", "1000000200"], True),
    "milliseconds": (["1000000100500", "1000000160000", "1000000200000"], True),
    "dates": (["2001-09-09 01:48:20", "2001-09-09 01:49:20", "2001-09-09 01:50:00"], True),
    "fractions": (["1000000100.5", "1000000160.5", "1000000200"], True),
    "of unknown unit": (["1", "2", "3"], False),
}


@pytest.mark.parametrize("form", FORMS)
def test_histories_of_a_file_have_its_times(form: str, tmp_path: Path) -> None:
    times, known = FORMS[form]
    (tmp_path / "new.csv").write_text("\n".join(["user,item,time", *LINES]).format(*times))
    found = of_ratings(ReadRatings(tmp_path / "new.csv"), CATALOG, with_times=True)
    assert found.items.tolist() == [1, 2, 3]
    assert (found.times is not None) == known
    if known:
        assert (found.times - 10**9).tolist() == [100, 160, 160]
    assert of_ratings(ReadRatings(tmp_path / "new.csv"), CATALOG).times is None


HISTORIES = KnownHistories(
    pa.array(["v", "w", "new"]),
    np.array([1, 2, 3, 4], np.int32),
    np.array([0, 3, 4, 4]),
    times=np.array([100, 160, 400, 900]),
)


def test_a_request_is_at_the_newest_time_unless_it_is_given() -> None:
    assert HISTORIES.requested(None, newest=500).at.tolist() == [500, 900, 500]
    later = HISTORIES.requested(300, newest=500)
    assert later.at.tolist() == [300, 300, 300]
    assert later.requested(None, newest=500) is later
    chosen = later.only(np.array([1, 0]))
    assert chosen.times.tolist() == [900, 100, 160, 400] and chosen.at.tolist() == [300, 300]
    assert of_lists([["a"]], CATALOG).requested(300, newest=500).at is None


def test_batches_have_the_times_of_items_and_requests() -> None:
    (batch,) = HistoryBatches(HISTORIES.requested(500, newest=0), 5, 3, 3)
    # The newest two items and the request of v, w before its last item, a user without items.
    assert batch.times.tolist() == [
        *([160, 60], [400, 240], [500, 100]),
        *([900, U], [500, 0]),
        [500, U],
    ]
    (without,) = HistoryBatches(replace(HISTORIES, times=None), 5, 3, 3)
    assert without.times is None


def model_of(num_items: int, span: TimeSpan, **flags: Any) -> BERT4Rec:
    """With weights that make times count."""
    encoder = EncoderConfig(8, 2, use_times=True, **flags)
    config = ModelConfig(num_items, 8, encoder, HeadConfig(), span=span)
    model = BERT4Rec(config, CatalogSlice(1, num_items + 1, shared=False))
    torch.manual_seed(5)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.eval()


def test_hit_rates_are_those_of_the_full_ranking_at_the_targets_times() -> None:
    generator = np.random.default_rng(1)
    histories = [generator.permutation(60)[: generator.integers(3, 20)] + 1 for _ in range(40)]
    store = store_of(histories, 60)
    times = [np.sort(generator.integers(10**9, 10**9 + 99 * DAY, len(h))) for h in histories]
    store.times, store.counts = np.concatenate(times), {"times": {"unit": "s"}}
    item_times = ItemTimes(store)
    model, counts = model_of(60, item_times.span()), torch.from_numpy(store.train_item_counts)
    full, without = (
        evaluate(model, EvalLoader(store, "test", 8, 16, times=each), counts)
        for each in (item_times, None)
    )
    assert full["full"] != without["full"]

    before = KnownHistories(
        pa.array(range(40)),
        np.concatenate([history[:-1] for history in histories]).astype(np.int32),
        np.cumsum([0, *(len(history) - 1 for history in histories)]),
        times=np.concatenate([each[:-1] for each in times]),
        at=np.array([each[-1] for each in times]),
    )
    recommender = Recommender(model, store.catalog, 8, ALONE, batch_size=7, newest=0)
    eligible = recommender.eligible(Choice(k=20, cold="keep"), None, ())
    items = np.concatenate([block.items for block in recommender.lists(before, eligible)])
    hits = items == np.array([history[-1] for history in histories])[:, None]
    for k in (1, 5, 10, 20):
        assert hits[:, :k].any(axis=1).mean() == full["full"][f"HR@{k}"]


def test_a_time_that_cannot_be_used_is_refused() -> None:
    timeless = Recommender(model_of(5, TimeSpan(0, 9, 9)), CATALOG, 8, ALONE, newest=None)
    with pytest.raises(UserError, match="the model reads no times"):
        timeless.recommended([["a"]], at="2001-02-03")
    reads = Recommender(model_of(5, TimeSpan(0, 9, 9)), CATALOG, 8, ALONE, newest=9)
    with pytest.raises(UserError, match="the histories have no times"):
        reads.recommended([["a"]], at="2001-02-03")


@dataclass(frozen=True)
class Trained:
    """A run on ratings of 50 users with 12 items each, and its export."""

    folder: Path
    cache: Path
    command: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        return ["--checkpoint", str(self.folder / "run"), "--cache_dir", str(self.cache)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Trained:
    folder, lines = tmp_path_factory.mktemp("times"), ["user,item,timestamp"]
    generator = np.random.default_rng(0)
    for user in range(50):
        times = np.sort(generator.integers(10**9, 10**9 + 999 * DAY, 12))
        items = generator.permutation(40)[:12]
        lines += [f"{user},i{item},{time}" for item, time in zip(items, times, strict=True)]
    (folder / "ratings.csv").write_text("\n".join(lines))
    data = [f"--dataset_path={folder / 'ratings.csv'}", f"--cache_dir={cache_dir}", "--max_len=8"]
    command = [*TINY[:1], *TINY[4:], *data, "--use_times", "--lr=0.02"]
    more = [f"--run_dir={folder / 'run'}", f"--export_root={folder / 'exported'}"]
    outcome = run_process(ROOT / "train.py", *command, *more)
    assert outcome.code == 0, outcome.err
    return Trained(folder, cache_dir, tuple(command))


def test_two_ranks_evaluate_the_checkpoint_of_an_unfinished_run_as_one_its_export(
    trained: Trained, run_main: RunMain, tmp_path: Path
) -> None:
    outcome = run_main("eval", *trained.flags)
    assert outcome.code == 0, outcome.err
    alone = json.loads((trained.folder / "run" / "eval_test.json").read_text())
    run = tmp_path / "unfinished"
    shutil.copytree(trained.folder / "run", run, ignore=shutil.ignore_patterns("model", "results"))
    outcome = torchrun(2, ROOT / "eval.py", "--checkpoint", run, *trained.flags[2:])
    assert outcome.code == 0, outcome.err
    again = json.loads((run / "eval_test.json").read_text())
    assert again["users"] == alone["users"] == 50
    assert (again["step"], again["epoch"]) == (alone["step"], alone["epoch"])
    assert again["full"] == pytest.approx(alone["full"], rel=1e-12)
    assert [*(run / "results" / "eval_test").glob("events.out.tfevents.*")]


@pytest.fixture(scope="module")
def moved(trained: Trained) -> Path:
    """The ratings in their order, from the first time to the last, but with others between."""
    head, *lines = (trained.folder / "ratings.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    times = [int(time) for _, _, time in rows]
    low, high = min(times), max(times)
    lines = [f"{u},{i},{low + (int(t) - low) ** 2 // (high - low)}" for u, i, t in rows]
    (trained.folder / "moved.csv").write_text("\n".join([head, *lines]))
    return trained.folder / "moved.csv"


def full_ndcg(run: Path, name: str = "eval_test*") -> float:
    (path,) = run.glob(f"{name}.json")
    return json.loads(path.read_text())["full"]["NDCG@10"]


def test_ratings_of_other_times_are_others(
    trained: Trained, moved: Path, run_main: RunMain
) -> None:
    run, data = trained.folder / "run", f"--dataset_path={moved}"
    outcome = run_main("eval", *trained.flags, data)
    assert outcome.code == 0 and "on other ratings than those of training" in outcome.out
    assert full_ndcg(run, "eval_test-ratings-*") != full_ndcg(run, "eval_test")
    outcome = run_main("train", *trained.command, data, f"--run_dir={run}", "--resume=auto")
    assert_one_line(outcome, "train", "was trained on other data (")


def test_compared_models_read_the_times_of_their_own_data(
    trained: Trained, moved: Path, run_main: RunMain, tmp_path: Path
) -> None:
    run, other = trained.folder / "run", tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("eval_*"))
    config = json.loads((other / "config.json").read_text())
    config["flags"]["dataset_path"] = str(moved)
    (other / "config.json").write_text(json.dumps(config))
    assert run_main("eval", "--checkpoint", other, *trained.flags[2:]).code == 0
    outcome = run_main("eval", "--compare", run, other, *trained.flags[2:])
    assert outcome.code == 0, outcome.err
    metrics = full_ndcg(run, "eval_test"), full_ndcg(other)
    assert metrics[0] != metrics[1]
    assert all(f"{each:.4f}" in outcome.out for each in metrics)


def test_ratings_without_the_times_that_are_read(
    trained: Trained, run_main: RunMain, tmp_path: Path
) -> None:
    """The message is true where there is no --use_times flag."""
    lines = (trained.folder / "ratings.csv").read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    outcome = run_main("eval", *trained.flags, f"--dataset_path={tmp_path / 'new.csv'}")
    expected = "--use_times, of the model or a teacher: new has no times: name their column with "
    assert_one_line(outcome, "eval", expected + "--columns, or train without the flag")
    given = ["--histories", tmp_path / "new.csv", "--output", tmp_path / "recs.csv"]
    outcome = run_main("recommend", *trained.flags, *given, "--at", "2001-12-17")
    assert_one_line(outcome, "recommend", "--at: the histories have no times")


def test_recommendations_depend_on_the_time(trained: Trained, run_main: RunMain) -> None:
    outcomes = [
        run_main("recommend", *trained.flags, "--user", "7", *more)
        for more in ([], ["--at", "2001-12-17"], ["--at", "2001-09-20 12:00"])
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0]
    assert len({outcome.out for outcome in outcomes}) == 3
    outcome = run_main("recommend", *trained.flags, "--history", "i1,i2", "--at", "2001-12-17")
    assert_one_line(outcome, "recommend", "--at needs histories with times")
    outcome = run_main("recommend", *trained.flags, "--user", "7", "--at", "yesterday")
    assert_one_line(outcome, "recommend", "--at: 'yesterday' is neither a number nor a date")


def test_an_export_recommends_as_the_run(trained: Trained) -> None:
    lines = (trained.folder / "ratings.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines if int(line.split(",")[0]) < 5]
    # Of the last user only two items: a line with padding.
    rows = [row for row in rows if row[0] != "4"] + [row for row in rows if row[0] == "4"][:2]
    users = sorted({row[0] for row in rows})
    histories = [[row[1] for row in rows if row[0] == user] for user in users]
    times = [[int(row[2]) for row in rows if row[0] == user] for user in users]
    user, item, time = zip(*rows, strict=True)
    table = pa.table({"user": user, "item": item, "timestamp": [int(each) for each in time]})
    serving = exported.Recommender(trained.folder / "exported")
    run = Recommender.load(trained.folder / "run", device="cpu")
    for at in (None, 10**9 + 500 * DAY):
        expected = run.recommended(table, at=at)
        found = [pair for best in serving.recommend(histories, times=times, at=at) for pair in best]
        assert [item for item, _ in found] == expected["item"].to_pylist()
        scores = [score for _, score in found]
        assert scores == pytest.approx(expected["score"].to_pylist(), abs=1e-5)
    histories[0].insert(3, "unknown")
    times[0].insert(3, 5)
    assert serving.recommend(histories, times=times, at=at)[0] == [
        (item, pytest.approx(score)) for item, score in found[:10]
    ]
    first, *others = times
    for wrong in (
        *(first[1:], [*first, 5], [first], 5),  # of all items, in one list
        *(["5"] * len(first), [None] * len(first), [float("nan")] * len(first)),
        *([datetime(2001, 1, 1)] * len(first), [1 << 63] * len(first)),
    ):
        with pytest.raises(ValueError, match="seconds since 1970, one an item"):
            serving.recommend(histories, times=[wrong, *others], at=at)
    for wrong in (times[1:], [*times, [5]], []):  # a list too few, one too many, at without times
        with pytest.raises(ValueError, match="one list a history"):
            serving.recommend(histories, times=wrong, at=at)
    # Without times, both know that they are unknown.
    alone = run.recommended(histories[1:])
    found = [pair for best in serving.recommend(histories[1:]) for pair in best]
    assert [item for item, _ in found] == alone["item"].to_pylist()
    # Also of one user beside others.
    some = [times[0], *([] for _ in times[1:])]
    assert serving.user_vectors(histories, times=some, at=at) == pytest.approx(
        np.concatenate(
            [
                serving.user_vectors(histories[:1], times=times[:1], at=at),
                serving.user_vectors(histories[1:]),
            ]
        ),
        abs=1e-5,
    )


def test_a_config_without_its_times_is_damaged(trained: Trained, run_main: RunMain) -> None:
    config = trained.folder / "run" / "config.json"
    whole = config.read_text()
    good = {"first": 1, "last": 4, "newest": 9}
    for wrong in ({"first": 5}, {"last": True}, {"newest": 1 << 70}, {"newest": None}):
        config.write_text(json.dumps(json.loads(whole) | {"times": good | wrong}))
        outcome = run_main("eval", *trained.flags)
        assert_one_line(outcome, "eval", "config.json is damaged (times is ")
    config.write_text(whole)
