"""Both protocols by hand, ties, NaN, seen items, popularity; independence of block sizes."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.bert4rec import BERT4Rec, ModelConfig
from model.evaluation import catalog_scores
from model.evaluation import evaluate as module
from model.evaluation.evaluate import Result, evaluate, target_ranks
from model.evaluation.metrics import METRICS
from model.evaluation.report import format_report, remarks, write_result
from model.evaluation.users import EncodedUsers
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import CatalogSlice
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.store import SequenceStore

# Leave-one-out: training parts 1 2 3, 2 and 4 2; test targets 5, 3 and 2 (which user 2 had before).
HISTORIES = [[1, 2, 3, 4, 5], [2, 6, 3], [4, 2, 6, 2]]
SCORES = [0.6, 0.5, 0.5, 0.4, 0.3, 0.2]  # of items 1..6, for every user


def store_of(histories: list[list[int]], num_items: int) -> SequenceStore:
    offsets = np.cumsum([0, *map(len, histories)])
    return SequenceStore.from_arrays(np.concatenate(histories), offsets, num_items)


class SameForAll(nn.Module):
    """An encoder whose hidden vector is (1, 0, 0, 0) for every user."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.eye(4)[0])

    def forward(
        self, items: object, offsets: object, masked: torch.Tensor, *_: object, longest: int
    ) -> object:
        return self.answer.expand(len(masked), -1)


def model_with(scores: list[float]) -> BERT4Rec:
    """A model that gives items 1..V these scores."""
    config = ModelConfig(len(scores), 8, EncoderConfig(emb_dim=4), HeadConfig(logit_temperature=0))
    model = BERT4Rec(config, CatalogSlice(1, len(scores) + 1, shared=False))
    model.encoder = SameForAll()
    with torch.no_grad():
        table = model.embeddings.embeddings["item"].weight.zero_()
        table[1:-1, 0] = torch.tensor(scores)
        table[[0, -1], 0] = 99.0  # padding and mask: must never be ranked
    return model


def evaluated(scores: list[float], split: str = "test") -> Result:
    store = store_of(HISTORIES, 6)
    batches = EvalLoader(store, split, 8, 2)
    return evaluate(model_with(scores), batches, torch.from_numpy(store.train_item_counts))


def of_ranks(*ranks: int) -> dict[str, float]:
    """Metrics of a few small ranks, again and by another formula."""
    found = {f"HR@{k}": np.mean([r <= k for r in ranks]) for k in (1, 5, 10, 20)}
    for k in (5, 10, 20):
        found[f"NDCG@{k}"] = np.mean([math.log(2) / math.log(r + 1) * (r <= k) for r in ranks])
    return found | {"MRR": np.mean([1 / r for r in ranks])}


def test_test_split_by_hand() -> None:
    result = evaluated(SCORES)
    assert result["users"] == 3
    # User 0: 5 only against 6. User 1: 3 against 1 (ahead), 4, 5; 2 and 6 are seen.
    # User 2: 2, though it is in the history, against 1 (ahead), 3 (a tie), 5.
    assert result["full"] == pytest.approx(of_ranks(1, 2, 3))
    # Unseen items that occur in training: none; 1, 4; 1, 3.
    assert result["sampled"] == pytest.approx(of_ranks(1, 2, 3))


def test_popularity_by_hand() -> None:
    # Training counts 1 3 1 1 0 0. User 0: 5 ties with 6. User 1: 3 ties with 1 and 4. User 2: 2.
    result = evaluated(SCORES)["popularity"]
    assert result["full"] == pytest.approx(of_ranks(2, 3, 1))
    assert result["sampled"] == pytest.approx(of_ranks(1, 3, 1))


def test_validation_split_by_hand() -> None:
    # Targets 4, 6, 6. User 0: 5 and 6 behind 4. User 1: 6 behind 1 3 4 5. User 2: behind 1 3 5.
    result = evaluated(SCORES, "validation")
    assert result["full"] == pytest.approx(of_ranks(1, 5, 4))


def test_a_popularity_discount_lowers_frequent_items() -> None:
    store = store_of(HISTORIES, 6)
    counts = torch.from_numpy(store.train_item_counts)
    scores = [0.6, 0.7, *SCORES[2:]]
    for discount in (0.4, 1.0):
        batches = EvalLoader(store, "test", 8, 2)
        found = evaluate(model_with(scores), batches, counts, discount=discount)
        # Items 5 and 6 were never trained: lowered as item 2, the most popular.
        assert counts[1:-1].tolist() == [1, 3, 1, 1, 0, 0]
        logs = torch.tensor([2, 4, 2, 2, 4, 4]).log()
        lowered = torch.tensor(scores) - discount * logs
        expected = evaluated(lowered.tolist())
        assert found == expected
        assert found["full"] != evaluated(scores)["full"]
        assert found["popularity"] == evaluated(scores)["popularity"]


def test_a_discount_of_1_lifts_no_item_that_was_never_trained() -> None:
    store = store_of(HISTORIES, 6)
    counts = torch.from_numpy(store.train_item_counts)
    batches = EvalLoader(store, "test", 8, 2)
    found = evaluate(model_with(SCORES), batches, counts, discount=1.0)["full"]
    # Lowered by nothing, 5 would be ahead of the targets 3 and 2: ranks 1 3 4.
    assert found == pytest.approx(of_ranks(1, 2, 3))


@pytest.mark.parametrize(("asked", "fewer"), [(0, None), (1, 1), (2, 1), (3, 3), (100, 3)])
def test_users_with_fewer_negatives_are_counted(asked: int, fewer: int | None) -> None:
    """The users have 0, 2 and 2 unseen items that occur in training parts."""
    store = store_of(HISTORIES, 6)
    batches = EvalLoader(store, "test", 8, 2)
    counts = torch.from_numpy(store.train_item_counts)
    result = evaluate(model_with(SCORES), batches, counts, negatives=asked)
    assert result.get("fewer_negatives") == fewer
    lines = format_report("test", result).splitlines()
    said = [line for line in lines if "fewer unseen items" in line]
    if fewer is None:
        assert not said
    else:
        assert said == [
            f"{fewer} of 3 users have fewer unseen items than --eval_negatives: their sampled "
            "metrics are too high; compare full ones"
        ]


def test_a_model_below_popularity_is_called_so() -> None:
    def remarked(*shares: float, **more: float) -> list[str]:
        sampled, full = ({name: share for name in METRICS} for share in shares)
        known = {name: 0.5 for name in METRICS}
        result = {"users": 3, "sampled": sampled, "full": full, **more}
        return remarks(result | {"popularity": {"sampled": known, "full": known}})

    assert remarked(0.5, 0.6) == []
    (line,) = remarked(0.6, 0.25)
    assert line.startswith("the model is below popularity (NDCG@10 full 0.2500 against 0.5000): ")
    assert "--num_epochs" in line and "--recipe" in line
    (line,) = remarked(0.4, 0.25)
    assert "(NDCG@10 sampled 0.4000 against 0.5000, full 0.2500 against 0.5000)" in line
    (line,) = remarked(0.6, 0.25, popularity_discount=0.5)
    assert "lower --popularity_discount" in line
    assert remarks({"users": 3, "sampled": {}, "full": {}}) == []  # without popularity


def test_equal_scores_are_never_a_win() -> None:
    # User 0: 5 = 6. User 1: 3 = 1 4 5. User 2: 2 = 1 3 5.
    assert evaluated([0.5] * 6)["full"] == pytest.approx(of_ranks(2, 4, 4))


def test_nan_never_wins() -> None:
    # Item 1 is NaN: it is ahead of the targets of users 1 and 2, and that of user 0 stays first.
    assert evaluated([math.nan, *SCORES[1:]])["full"] == pytest.approx(of_ranks(1, 2, 3))
    # All are NaN: every target is last.
    assert evaluated([math.nan] * 6)["full"] == pytest.approx(of_ranks(2, 4, 4))
    assert evaluated([math.nan] * 6)["sampled"] == pytest.approx(of_ranks(1, 3, 3))
    # Only the target is NaN: last, and infinite scores are in order.
    assert evaluated([*SCORES[:4], math.nan, math.inf])["full"] == pytest.approx(of_ranks(2, 3, 4))
    assert evaluated([-math.inf] * 4 + [math.inf, -math.inf])["full"]["HR@1"] == 1 / 3


def test_popularity_of_an_earlier_result_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(HISTORIES, 6)
    counts = torch.from_numpy(store.train_item_counts)
    batches = [*EvalLoader(store, "test", 8, 2)]
    before = evaluated([0.5] * 6)
    monkeypatch.setattr(
        catalog_scores.CatalogScores, "counted", lambda *_: pytest.fail("counted again")
    )
    assert evaluate(model_with(SCORES), batches, counts, earlier=before) == {
        **before,
        "sampled": pytest.approx(of_ranks(1, 2, 3)),
        "full": pytest.approx(of_ranks(1, 2, 3)),
    }


def test_evaluation_restores_the_model_s_mode() -> None:
    batches = list(EvalLoader(store_of(HISTORIES, 6), "test", 8, 2))
    model = model_with(SCORES)
    for training in (True, False):
        evaluate(model.train(training), batches, torch.ones(8))
        assert model.training == training


def test_random_scores_hit_10_of_101() -> None:
    count, draws = 20_000, torch.Generator().manual_seed(3)
    negatives = torch.arange(2, 102).repeat(count, 1)
    nothing = torch.zeros(0, dtype=torch.int64)
    ones = torch.ones(count, dtype=torch.int64)
    own = ones > 0
    users = EncodedUsers(torch.zeros(count, 0), ones, negatives, own, own, nothing, nothing)
    scores = torch.rand(count, 101, generator=draws)
    scored = [(CatalogSlice(1, 102, shared=False), scores)]
    for ranks in target_ranks(users, lambda: scored, shared=False)[:2]:
        for cutoff in (1, 10, 20):
            share = cutoff / 101
            deviation = math.sqrt(share * (1 - share) / count)
            assert abs((ranks <= cutoff).double().mean() - share) < 4 * deviation
        assert ranks.max() == 101


def test_batch_and_block_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    histories = [generator.integers(1, 61, size=generator.integers(3, 20)) for _ in range(23)]
    store = store_of(histories, 60)
    popularity = torch.from_numpy(store.train_item_counts)
    config = ModelConfig(60, 8, EncoderConfig(emb_dim=8), HeadConfig())
    model = BERT4Rec(config, CatalogSlice(1, 61, shared=False))
    nn.init.normal_(model.embeddings.embeddings["item"].weight)
    results = []

    def add(batch_size: int, max_scores: int) -> None:
        batches = EvalLoader(store, "test", 8, batch_size)
        monkeypatch.setattr(module, "MAX_SCORES", max_scores)
        results.append(evaluate(model, batches, popularity))

    for batch_size, max_scores in product((1, 5, 100), (1, 4 * 60, 1 << 26)):
        add(batch_size, max_scores)
    monkeypatch.setattr(catalog_scores, "PART_ITEMS", 7)
    for kept_bytes in (0, 1 << 20):
        monkeypatch.setattr(catalog_scores, "KEPT_BYTES", kept_bytes)
        add(5, 4 * 7)
    assert results[0]["users"] == 23
    assert 0 < results[0]["full"]["MRR"] < 1
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for protocol in ("sampled", "full"):
            assert result[protocol] == pytest.approx(results[0][protocol])
            expected = results[0]["popularity"][protocol]
            assert result["popularity"][protocol] == pytest.approx(expected)


def test_the_report_names_both_protocols_and_popularity() -> None:
    result = evaluated(SCORES)
    lines = format_report("test", result, {"HR@10": 0.875}).splitlines()
    assert lines[0] == "test, 3 users"
    assert lines[1].split() == list(METRICS)
    starts = ["sampled (", "sampled, popularity", "full (", "full, popularity", "full, best"]
    starts += ["the model is below popularity"]
    assert [line[: len(start)] for line, start in zip(lines[2:], starts, strict=True)] == starts
    assert lines[4].split()[-len(METRICS) :] == [f"{v:.4f}" for v in result["full"].values()]
    assert "0.8750" in lines[6]


def test_the_result_file_is_written_whole_or_refused(tmp_path: Path) -> None:
    result = evaluated(SCORES)
    path = write_result(tmp_path, "test", result)
    assert json.loads(path.read_text()) == result
    assert [file.name for file in tmp_path.iterdir()] == ["eval_test.json"]
    with pytest.raises(UserError, match=r"eval_test\.json cannot be written"):
        write_result(tmp_path / "nowhere", "test", result)
