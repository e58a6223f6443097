"""Recommendations by hand, ties, allow and deny, histories of any origin, files, exact top-k."""

import csv
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.bert4rec import BERT4Rec, ModelConfig
from model.distributed import Ranks
from model.evaluation import catalog_scores
from model.evaluation import top_items as top
from model.evaluation.evaluate import evaluate
from model.evaluation.users import EncodedUsers
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import CatalogSlice
from model.serving import vectors as serving
from model.serving.config import Choice, RecommendFlags
from model.serving.output import check_output, row_writer
from model.serving.recommender import _ONE_CALL, Recommender
from model.serving.rows import ItemRows, Lists, UserRows
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.formats.readers import ReadRatings
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.prepare import prepare
from pipeline.serving import histories as known
from pipeline.serving.batches import HistoryBatches
from pipeline.serving.histories import KnownHistories, of_lists, of_ratings
from pipeline.sources.config import DataConfig
from tests.conftest import ROOT, environment
from tests.test_evaluation import model_with, store_of

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
# Items a..e with these scores for every user; e has no training rating.
SCORES = [0.5, 0.9, 0.5, 0.7, 0.8]
COUNTS = [5, 1, 7, 7, 0]
CATALOG = Catalog(
    pa.array(list("abcde")), pa.array(["A", "", "C", "D", "E"]), np.array(COUNTS), pa.array(["u"])
)


def five_items(scores: list[float] = SCORES, max_len: int = 8) -> Recommender:
    return Recommender(model_with(scores), CATALOG, max_len, ALONE)


def lists_of(table: pa.Table) -> dict[Any, str]:
    """The items of each user, as a word, in the order of the rows; checks users and ranks."""
    found: dict[Any, str] = {}
    for row in table.to_pylist():
        found[row["user"]] = found.get(row["user"], "") + row["item"]
        assert row["rank"] == len(found[row["user"]])
    return found


def test_five_items_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    table = five_items().recommended([["d"], ["a", "b", "x"], ["c", "c"]], k=3)
    # b .9, d .7, a = c .5 in the catalog's order; e is cold.
    assert lists_of(table) == {0: "bac", 1: "dc", 2: "bda"}
    assert table.column_names == ["user", "rank", "item", "score", "title"]
    assert table["score"].to_pylist()[:3] == pytest.approx([0.9, 0.5, 0.5])
    assert table["title"].to_pylist()[:3] == ["", "A", "C"]
    assert capsys.readouterr().err.splitlines() == [
        "warning: 1 of 6 items in the histories are unknown to the model: left out"
    ]


@pytest.mark.parametrize(
    ("options", "items"),
    [
        ({}, "bac"),
        ({"k": 1}, "b"),
        ({"seen": "keep"}, "bdac"),
        ({"cold": "keep"}, "beac"),
        ({"allow": ["c", "a", "e", "zzz"]}, "ac"),
        ({"allow": ["e"], "cold": "keep"}, "e"),
        ({"deny": ["b"]}, "ac"),
        ({"allow": [*"abd"], "deny": ["b"]}, "a"),
        # log(1 + 1), log(6), log(8) of b, a, c: .55, -.40, -.54.
        ({"popularity_discount": 0.5}, "bac"),
    ],
)
def test_choices_by_hand(options: dict[str, Any], items: str) -> None:
    table = five_items().recommended([["d"]], **options)
    assert lists_of(table) == {0: items}


def test_a_discount_changes_scores_as_in_an_evaluation() -> None:
    table = five_items().recommended([["d"]], popularity_discount=0.5)
    expected = [s - 0.5 * math.log(c + 1) for s, c in ((0.9, 1), (0.5, 5), (0.5, 7))]
    assert table["score"].to_pylist() == pytest.approx(expected)


def test_a_discount_lowers_cold_items_like_the_most_popular_one() -> None:
    """As an evaluation does; e is cold."""
    table = five_items().recommended([["d"]], popularity_discount=0.5, cold="keep")
    assert lists_of(table) == {0: "beac"}
    expected = [s - 0.5 * math.log(c + 1) for s, c in ((0.9, 1), (0.8, 7), (0.5, 5), (0.5, 7))]
    assert table["score"].to_pylist() == pytest.approx(expected)


def test_ties_are_in_the_order_of_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    for part_items in (100, 2):
        monkeypatch.setattr(catalog_scores, "PART_ITEMS", part_items)
        recommender = five_items([0.0, -0.0, 0.0, -0.0, 0.0])
        assert lists_of(recommender.recommended([["c"]], k=3, cold="keep")) == {0: "abd"}


def test_users_without_a_known_item_get_popularity(capsys: pytest.CaptureFixture[str]) -> None:
    table = five_items().recommended([[], ["d"], ["x", "y"]], k=2)
    assert lists_of(table) == {0: "cd", 1: "ba", 2: "cd"}
    assert table["score"].to_pylist()[:2] == [7, 7]
    assert table["popularity"].to_pylist() == [True, True, False, False, True, True]
    assert "warning: 2 of 3 users have no known item: ranked by popularity" in (
        capsys.readouterr().err
    )
    # Popularity too recommends only what may be recommended.
    table = five_items().recommended([[]], deny=["c"], cold="keep")
    assert lists_of(table) == {0: "dabe"}


def test_vectors_of_no_known_item(capsys: pytest.CaptureFixture[str]) -> None:
    recommender = five_items()
    recommender.model.requires_grad_(False)
    unknown, empty = recommender.user_vectors([["x"], []])
    assert unknown.tolist() == empty.tolist()
    err = capsys.readouterr().err
    assert "2 of 2 users have no known item: their vectors are one and the same" in err


def test_one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's modules hold a batch between them: a second thread waits."""
    recommender, free = five_items(), []
    recommender.model.requires_grad_(False)

    def checked(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            free.append(_ONE_CALL.acquire(blocking=False))
            return call(*args, **options)

        return wrapped

    for name in ("encode", "top_items"):
        monkeypatch.setattr(serving, name, checked(getattr(serving, name)))
    recommender.recommended([["a"]])
    recommender.user_vectors([["a"]])
    recommender.similar_to("a")
    assert free == [False] * 4
    assert _ONE_CALL.acquire(blocking=False)
    _ONE_CALL.release()


def test_a_text_is_no_list_of_ids() -> None:
    for ids in ({"allow": "ab"}, {"deny": "ab"}):
        with pytest.raises(UserError, match="item ids must be a list, not the text 'ab'"):
            five_items().recommended([["a"]], **ids)


def test_no_users_and_no_items() -> None:
    assert five_items().recommended([]).num_rows == 0
    with pytest.raises(UserError, match="none of the 5 items may be recommended"):
        five_items().recommended([["a"]], allow=["e"])
    assert five_items().recommended([["a", "b", "c", "d"]]).num_rows == 0
    with pytest.raises(UserError, match="--k must be at least 1"):
        five_items().recommended([["a"]], k=0)
    with pytest.raises(UserError, match="lists of item ids"):
        five_items().recommended(["a", "b"])


def test_similar_items_by_hand() -> None:
    recommender = five_items()
    with torch.no_grad():
        rows = [[1, 0], [1, 1], [-1, 0], [3, 0.3], [1, 0]]
        recommender.model.embeddings.embeddings["item"].weight[1:-1, :2] = torch.tensor(rows)
    table = recommender.similar_to("a", k=3)
    assert table["item"].to_pylist() == ["d", "b", "c"]
    cosines = [3 / math.hypot(3, 0.3), math.sqrt(0.5), -1]
    assert table["score"].to_pylist() == pytest.approx(cosines)
    assert recommender.similar_to("a", cold="keep")["item"].to_pylist() == list("edbc")
    with pytest.raises(UserError, match="unknown item x"):
        recommender.similar_to("x")


def test_similar_items_of_a_cold_one_come_with_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    five_items().similar_to("e")
    assert "no training rating: its vector is random, or with --item_attributes the sum" in (
        capfd.readouterr().err
    )
    five_items().similar_to("a")
    assert not capfd.readouterr().err


def test_a_model_that_diverged_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        five_items([0.1, math.nan, 0.2, 0.3, 0.4]).recommended([["a"]])


def test_catalog_and_model_belong_together() -> None:
    with pytest.raises(UserError, match="5 items, the model 4"):
        Recommender(model_with([0.1] * 4), CATALOG, 8, ALONE)


def random_model(num_items: int, max_len: int, seed: int = 0) -> BERT4Rec:
    config = ModelConfig(num_items, max_len, EncoderConfig(emb_dim=8), HeadConfig())
    model = BERT4Rec(config, CatalogSlice(1, num_items + 1, shared=False), seed)
    nn.init.normal_(model.embeddings.embeddings["item"].weight)
    return model.eval()


def test_scores_are_products_of_the_vectors() -> None:
    recommender = Recommender(random_model(5, 4), CATALOG, 4, ALONE)
    histories = [["a", "b", "c", "d", "e"], ["b"], []]
    scores = recommender.user_vectors(histories) @ recommender.item_vectors().T
    table = recommender.recommended(histories[:2], k=5, seen="keep", cold="keep")
    for at, row in enumerate(table.to_pylist()):
        expected = np.sort(scores[at // 5])[::-1][at % 5]
        assert row["score"] == pytest.approx(expected, abs=1e-6)
        assert scores[at // 5]["abcde".index(row["item"])] == pytest.approx(expected, abs=1e-6)
    # Only the newest 3 items are read.
    again = recommender.user_vectors([["c", "d", "e"]])
    assert again[0] == pytest.approx(recommender.user_vectors(histories)[0], abs=1e-6)


@pytest.mark.parametrize("discount", [0.0, 0.4])
def test_hit_rates_are_those_of_the_full_ranking(discount: float) -> None:
    generator = np.random.default_rng(1)
    histories = [generator.permutation(60)[: generator.integers(3, 20)] + 1 for _ in range(40)]
    store = store_of(histories, 60)
    model, counts = random_model(60, 8), torch.from_numpy(store.train_item_counts)
    batches = EvalLoader(store, "test", 8, 16)
    full = evaluate(model, batches, counts, discount=discount)["full"]

    before = KnownHistories(
        pa.array(range(40)),
        np.concatenate([history[:-1] for history in histories]).astype(np.int32),
        np.cumsum([0, *(len(history) - 1 for history in histories)]),
    )
    recommender = Recommender(model, store.catalog, 8, ALONE, batch_size=7)
    choice = Choice(k=20, cold="keep", popularity_discount=discount)
    eligible = recommender.eligible(choice, None, ())
    items = np.concatenate([block.items for block in recommender.lists(before, eligible)])
    hits = items == np.array([history[-1] for history in histories])[:, None]
    assert hits.any()
    for k in (1, 5, 10, 20):
        assert hits[:, :k].any(axis=1).mean() == full[f"HR@{k}"]


NUMBERS = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.25, 1.0, 3.0])


@given(st.data())
def test_top_items_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    """Few different scores: mostly ties; chunks of 2 and parts of any size."""
    num_items, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    scores = np.array(data.draw(st.lists(NUMBERS, min_size=num_items, max_size=num_items)))
    seen = data.draw(st.sets(st.integers(0, num_items)))
    cut = data.draw(st.integers(1, num_items))
    out = data.draw(st.sets(st.integers(1, num_items)))
    expected = [item for item in range(1, num_items + 1) if item not in seen | out]
    expected.sort(key=lambda item: -scores[item - 1])

    rows = torch.tensor(scores, dtype=torch.float32)[:, None]
    added = torch.zeros(num_items + 2)
    added[list(out)] = -torch.inf
    number = torch.tensor(sorted(seen), dtype=torch.int64)
    none, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1)
    own, row = none == 0, torch.zeros_like(number)
    users = EncodedUsers(one, none, none[:, None], own, own, number, row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "CHUNK", 2)
        patch.setattr(top, "SPARE", 0)
        parts = [
            (
                CatalogSlice(low, min(low + cut, num_items + 1), False),
                top.whole_chunks(rows[low - 1 : low - 1 + cut]),
            )
            for low in range(1, num_items + 1, cut)
        ]
        items, found = top.top_items(users, parts, added, k, shared=False)
    wanted = expected[:k]
    assert items[0].tolist() == wanted + [0] * (k - len(wanted))
    assert found[0, : len(wanted)].tolist() == [scores[item - 1] for item in wanted]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=8))
def test_keys_are_in_the_order_of_scores_and_items(numbers: list[float]) -> None:
    scores, items = torch.tensor(numbers), torch.arange(len(numbers))
    keys = top.keys_of(scores, items)
    order = sorted(range(len(numbers)), key=lambda at: -numbers[at])
    assert keys.argsort(descending=True).tolist() == order
    assert torch.equal(top.scores_of(keys), scores)
    assert torch.equal(top.items_of(keys), items)


def test_blocks_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    ids = pa.array([str(item) for item in range(1, 501)])
    catalog = Catalog(ids, pa.repeat("", 500), np.ones(500, np.int64), pa.array(["u"]))
    model = random_model(500, 6)
    histories = [generator.integers(1, 501, size=n).tolist() for n in (3, 1, 9, 30, 2, 5, 4)]
    expected = Recommender(model, catalog, 6, ALONE).recommended(histories, k=20)
    assert expected.num_rows == 140
    for part_items, scores, kept in ((70, 1, 1 << 30), (499, 1 << 26, 0), (1, 1 << 26, 1 << 30)):
        monkeypatch.setattr(catalog_scores, "PART_ITEMS", part_items)
        monkeypatch.setattr(catalog_scores, "KEPT_BYTES", kept)
        monkeypatch.setattr(serving, "MAX_SCORES", scores)
        found = Recommender(model, catalog, 6, ALONE).recommended(histories, k=20)
        assert found.equals(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_host_does_not_wait_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the lists are those of the CPU, and one batch is computed while another is read."""
    monkeypatch.setattr(serving, "CUDA_PART_ITEMS", 70)
    monkeypatch.setattr(serving, "CUDA_SCORES", 500)
    model = random_model(300, 8)
    generator, device = np.random.default_rng(3), torch.device("cuda", 0)
    store = store_of([generator.integers(1, 301, size=9) for _ in range(40)], 300)
    everyone, found = known.of_store(store), []
    for ranks in (ALONE, Ranks(0, 1, 1, device)):
        moved = model.to(ranks.device)
        recommender = Recommender(moved, store.catalog, 8, ranks, batch_size=5)
        eligible = recommender.eligible(Choice(k=20, cold="keep"), None, ())
        lists = recommender.lists(everyone, eligible)
        first = next(lists)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found.append([first, *lists])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(*found, strict=True):
        assert (one.items == other.items).mean() > 0.99  # but for almost equal scores
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_batches_do_not_depend_on_the_number_of_ranks() -> None:
    histories = of_lists([["a"], [], list("abcd"), ["e", "x"], ["b", "b"]], CATALOG)
    alone = list(HistoryBatches(histories, 5, 4, 2))
    assert [batch.users.tolist() for batch in alone] == [[0, 1], [2, 3], [4, -1]]
    first, second, third = ([*batch.features.values().tolist()] for batch in alone)
    assert (first, second, third) == ([1, 6, 6], [2, 3, 4, 6, 5, 6], [2, 2, 6, 6])
    assert [batch.masked.tolist() for batch in alone] == [[1, 2], [3, 5], [2, 3]]
    assert [batch.seen.tolist() for batch in alone] == [[1], [1, 2, 3, 4, 5], [2, 2]]
    assert alone[1].seen_offsets.tolist() == [0, 4, 5]
    ranks = [list(HistoryBatches(histories, 5, 4, 2, rank=r, world_size=2)) for r in (0, 1)]
    rounds = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert [batch.users.tolist() for batch in rounds] == [[0, 1], [2, 3], [4, -1], [-1, -1]]
    for one, other in zip(alone, rounds[:3], strict=True):
        assert one.features.values().tolist() == other.features.values().tolist()
        assert one.seen.tolist() == other.seen.tolist()
    assert rounds[3].features.values().tolist() == [6, 6]
    kept = next(iter(HistoryBatches(histories, 5, 4, 2, keep_seen=True)))
    assert kept.seen.tolist() == [] and kept.seen_offsets.tolist() == [0, 0, 0]


def test_histories_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text("user,item,rating,time\n9,b,5,3\n10,x,4,1\n9,a,4,1\n9,y,1,0\n9,c,2,2\n")
    found = of_ratings(ReadRatings(file), CATALOG, min_rating=3)
    # 9 before 10; the ratings below 3 are dropped, x is unknown.
    assert found.users.to_pylist() == ["9", "10"]
    assert (found.items.tolist(), found.offsets.tolist()) == ([1, 2], [0, 2, 2])
    assert found.unknown == 1 and found.empty().tolist() == [False, True]
    assert of_ratings(ReadRatings(file), CATALOG).items.tolist() == [1, 3, 2]
    file.write_text("user,item\n1,x\n2,y\n")
    found = of_ratings(ReadRatings(file), CATALOG)
    assert (found.offsets.tolist(), found.unknown) == ([0, 0, 0], 2)


def read_in_memory(table: pa.Table) -> KnownHistories:
    return of_ratings(known.ratings_in_memory(table), CATALOG)


def test_histories_of_a_table_keep_the_types_of_ids() -> None:
    table = pa.table({"item": ["a", "c", "b"], "user": [7, 5, 7], "timestamp": [2, 0, 1]})
    recommender = five_items()
    found = recommender.recommended(table, k=1, cold="keep")
    assert found["user"].to_pylist() == [5, 7] and found.schema.field("user").type == pa.int64()
    assert found["item"].to_pylist() == ["b", "e"]
    histories = recommender.histories_of(table.append_column("rating", pa.array([1.0, 2, 3])))
    assert histories.items.tolist() == [3, 2, 1]
    for column, message in (
        (pa.array([1.5, 2, 3]), "user ids are double"),
        (pa.array(["1", None, "2"]), r"the table: row 1 \(from 0\) has no user"),
    ):
        with pytest.raises(UserError, match=message):
            read_in_memory(pa.table({"item": ["a", "c", "b"], "user": column}))
    # There is no --columns to give.
    with pytest.raises(UserError, match=r"cannot tell the user column.*rename them to user, item"):
        read_in_memory(pa.table({"item": ["a"], "who": [1]}))
    others = pa.Table.from_arrays([pa.array(["a"])] * 4, names=["user", "item", "x", "x"])
    assert read_in_memory(others).items.tolist() == [1]
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["user", "item", "item"])
    with pytest.raises(UserError, match=r"several columns are called 'item': rename them$"):
        read_in_memory(twice)


LATE = 1_600_000_000_000_000_000


@pytest.mark.parametrize(
    "times",
    [
        pa.array([0.5, -0.25, 0.125]),
        pa.array([3, 1, 2], pa.int8()),
        pa.array([LATE + 3, LATE + 1, LATE + 2], pa.uint64()),
        pa.array([Decimal(LATE + 3), Decimal(LATE + 1), Decimal(LATE + 2)], pa.decimal128(20)),
        pa.array([3, 1, 2], pa.timestamp("s")),
        pa.array([3, 1, 2], pa.timestamp("ms", "Asia/Tokyo")),
        pa.array([3, 1, 2], pa.date32()),
    ],
)
def test_times_of_a_table_are_those_of_parquet(times: pa.Array) -> None:
    table = pa.table({"item": ["a", "b", "c"], "user": ["u"] * 3, "timestamp": times})
    assert five_items().histories_of(table).items.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pa.array([1, 1e30]), "row 1 (from 0): the timestamp 1e+30 does not fit into 64 bits"),
        (pa.array([1, float("inf")]), "row 1 (from 0): the timestamp inf is not a number"),
        (pa.array([1, 1 << 40], pa.timestamp("s")), "is not between 1677-09-22 and 2262-04-11"),
    ],
)
def test_times_of_a_table_that_cannot_be_compared(times: pa.Array, message: str) -> None:
    table = pa.table({"item": ["a", "b"], "user": ["u"] * 2, "timestamp": times})
    with pytest.raises(UserError, match=re.escape(message)):
        five_items().histories_of(table)


def test_ids_that_differ_by_blanks_are_different_items() -> None:
    """As Parquet may have them."""
    ids = ["7", " 7", "7 ", "7\u00a0"]
    catalog = Catalog(pa.array(ids), pa.array([""] * 4), np.ones(4, int), pa.array(["u"]))
    assert of_lists([[*ids, "\t7"]], catalog).items.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_ids_keep_the_type_of_the_training_data(tmp_path: Path, kind: pa.DataType) -> None:
    users, items = np.repeat([3, 4], 3), [10, 20, 30, 10, 30, 20]
    table = pa.table({"user": users, "item": items})
    table = table.cast(pa.schema([("user", kind), ("item", kind)]))
    pq.write_table(table, tmp_path / "ratings.parquet")
    flags = {"dataset_path": str(tmp_path / "ratings.parquet"), "cache_dir": str(tmp_path)}
    catalog = prepare(DataConfig(min_user_count=0, **flags)).catalog
    assert catalog.items.to_pylist() == ["10", "20", "30"]
    (tmp_path / "copy").mkdir()
    catalog.write_to(tmp_path / "copy")
    catalog = Catalog.read(tmp_path / "copy")
    rows = UserRows(catalog, known.of_store(prepare(DataConfig(min_user_count=0, **flags))))
    lists = Lists(0, np.array([[2], [3]]), np.zeros((2, 1), np.float32))
    found = rows.table(lists)
    assert [found.schema.field(name).type for name in ("user", "item")] == [kind, kind]
    assert found["item"].cast(pa.string()).to_pylist() == ["20", "30"]


def rows_to_write() -> tuple[ItemRows, list[Lists]]:
    items = pa.array(['q"uo', "é,", "c\\"])
    catalog = Catalog(items, pa.array(["", "T\n", "ü"]), np.ones(3, np.int64), items)
    histories = KnownHistories(pa.array([8, 9]), np.array([1], np.int32), np.array([0, 1, 1]))
    blocks = [
        Lists(0, np.array([[3, 1]]), np.array([[0.5, -0.25]], np.float32)),
        Lists(1, np.array([[2, 0]]), np.array([[7, 0]], np.float32)),
    ]
    return UserRows(catalog, histories), blocks


ROWS = [
    {"user": 8, "rank": 1, "item": "c\\", "score": 0.5, "title": "ü", "popularity": False},
    {"user": 8, "rank": 2, "item": 'q"uo', "score": -0.25, "title": "", "popularity": False},
    {"user": 9, "rank": 1, "item": "é,", "score": 7.0, "title": "T\n", "popularity": True},
]


@pytest.mark.parametrize("extension", [".parquet", ".jsonl", ".csv"])
def test_files_of_rows(tmp_path: Path, extension: str) -> None:
    rows, blocks = rows_to_write()
    path = tmp_path / f"recs{extension}"
    with row_writer(path, rows) as write:
        for block in blocks:
            write(block)
        assert not path.exists()
    if extension == ".parquet":
        assert pq.read_table(path).to_pylist() == ROWS
    elif extension == ".jsonl":
        lines = path.read_text().splitlines()
        assert [json.loads(line) for line in lines] == ROWS
    else:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert [row["item"] for row in found] == [row["item"] for row in ROWS]
        assert [row["title"] for row in found] == [row["title"] for row in ROWS]
        assert [float(row["score"]) for row in found] == [row["score"] for row in ROWS]
    with row_writer(path, rows):  # no user
        pass
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_file_does_not_appear(tmp_path: Path) -> None:
    rows, (block, _) = rows_to_write()
    path = tmp_path / "recs.parquet"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError), row_writer(path, rows) as write:
        write(block)
        write(Lists(0, np.array([[1]]), np.array([[1 / 0]])))
    with pytest.raises(IndexError), row_writer(path, rows) as write:
        write(Lists(0, np.ones((1, 3), np.int64), np.zeros((1, 2))))  # fails in the thread
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["recs.parquet"]


def test_a_killed_writer_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "recs.jsonl"
    path.write_text("earlier")
    code = """
import os, signal, sys
from decimal import Decimal
from pathlib import Path
import numpy as np, pyarrow as pa
from model.serving.output import row_writer
from model.serving.rows import ItemRows, Lists
from pipeline.preparation.catalog import Catalog
texts = pa.array(["a"])
rows = ItemRows(Catalog(texts, texts, np.ones(1), texts))
with row_writer(Path(sys.argv[1]), rows) as write:
    write(Lists(0, np.array([[1]]), np.zeros((1, 1))))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_text() == "earlier"
    rows, blocks = rows_to_write()
    with row_writer(path, rows) as write:
        write(blocks[0])
    assert len(path.read_text().splitlines()) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["recs.jsonl"]


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "recs.csv")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv is a folder"):
        check_output(tmp_path / "folder.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*cannot be written"):
        check_output(tmp_path / "file" / "recs.csv")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--checkpoint is needed"),
        ({"checkpoint": "x"}, "give one of --user"),
        ({"checkpoint": "x", "user": "1", "all": True}, "give one of --user"),
        ({"checkpoint": "x", "all": True}, "--all needs --output"),
        ({"checkpoint": "x", "user": "1", "output": "recs.txt"}, "--output recs.txt must end in"),
        ({"checkpoint": "x", "user": "1", "columns": "a,b"}, "--columns and --separator"),
        (
            {"checkpoint": "x", "similar": "1", "choice": Choice(popularity_discount=0.5)},
            "--popularity_discount ranks items for users",
        ),
        (
            {"checkpoint": "x", "similar": "1", "choice": Choice(seen="drop")},
            "--seen ranks items for users",
        ),
    ],
)
def test_flags_that_do_not_fit(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RecommendFlags(**flags)


def test_data_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="a data frame needs pandas"):
        five_items().recommend([["a"]])
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    given = pandas.DataFrame({"user": ["z", "y", "z"], "item": ["a", "b", "c"]})
    found = five_items().recommend(given, k=1, seen="drop", allow=["a", "b", "d"])
    assert found.values.tolist() == [
        ["y", 1, "d", pytest.approx(0.7), "D"],
        ["z", 1, "b", pytest.approx(0.9), ""],
    ]
    assert five_items().similar("a", k=2)["item"].tolist() == ["b", "c"]
    with pytest.raises(UserError, match=r"the data frame: .*Conversion failed for column item"):
        five_items().recommend(given.assign(item=["a", 2, "c"]))
