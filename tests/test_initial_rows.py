"""Item vectors to start from: pairs and vectors by hand, the tables that get them, train.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.distributed import Ranks
from model.network.config import EncoderConfig, HeadConfig
from model.network.initial_rows import initial_rows
from model.run import build
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.settings.fitting import Machine, fitted
from model.tables.config import ShardingConfig
from pipeline import cooccurrence
from pipeline.cooccurrence import Pairs, pairs_of
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from tests.conftest import TINY, RunMain, assert_one_line

CPU = torch.device("cpu")


def store_of(*histories: list[int], num_items: int = 6) -> SequenceStore:
    """Histories of at least three items; the last two of each are held out."""
    offsets = np.cumsum([0, *map(len, histories)])
    return SequenceStore.from_arrays(np.concatenate(histories), offsets, num_items)


def found(pairs: Pairs) -> dict[tuple[int, int], float]:
    both = zip(pairs.low.tolist(), pairs.high.tolist(), strict=True)
    return dict(zip(both, pairs.weight.tolist(), strict=True))


def test_pairs_by_hand() -> None:
    # 5 and 6 are held out; the second user's items are in no pair with the first one's.
    store = store_of([1, 2, 1, 3, 5, 6], [4, 2, 5, 6])
    assert found(pairs_of(store, 0)) == {
        (1, 2): 2.0,
        (1, 3): pytest.approx(1 + 1 / 3),
        (2, 3): 0.5,
        (2, 4): 1.0,
    }
    with_validation = found(pairs_of(store, 0, train_on_validation=True))
    assert with_validation[3, 5] == 1.0 and with_validation[2, 5] == pytest.approx(1 + 1 / 3)
    assert not any(6 in pair for pair in with_validation)


def test_items_far_apart_are_no_pair() -> None:
    store = store_of([1, 2, 2, 2, 2, 3, 4, 5, 5])
    pairs = found(pairs_of(store, 0))
    assert pairs[1, 3] == pytest.approx(1 / 5)
    assert (1, 4) not in pairs and (2, 2) not in pairs


def test_without_pairs_there_are_none() -> None:
    for store in (store_of([1, 2, 3]), SequenceStore.from_arrays([], [0, 0], 3)):
        assert found(pairs_of(store, 0)) == {}


def test_of_many_ratings_whole_users_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    items = 40
    store = store_of(*([2 * n + 1, 2 * n + 2, 1, 1] for n in range(items // 2)), num_items=items)
    assert len(pairs_of(store, 0).low) == 20
    monkeypatch.setattr(cooccurrence, "MOST_RATINGS", 11)
    drawn = [found(pairs_of(store, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == len(drawn[2]) == 5  # of two ratings each


def test_vectors_factorise_the_positive_pmi() -> None:
    generator = np.random.default_rng(1)
    low, high = np.triu_indices(8, k=1)
    pairs = Pairs(low + 1, high + 1, generator.uniform(0.1, 3, len(low)))
    counts = np.zeros((9, 9))  # the ninth item is in no pair
    counts[low, high] = counts[high, low] = pairs.weight
    context = counts.sum(axis=0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(counts * context.sum() / np.outer(counts.sum(axis=1), context))
    left, values, _ = np.linalg.svd(np.nan_to_num(np.maximum(pmi, 0), neginf=0, posinf=0))
    expected = left[:, :4] * np.sqrt(values[:4])
    expected = expected[:8] / np.linalg.norm(expected[:8], axis=1, keepdims=True)

    rows = initial_rows(pairs, 9, 4, 0, True, CPU)
    assert rows.shape == (11, 4) and rows.dtype == torch.float32
    assert not rows[0].any() and not rows[9:].any()
    vectors = rows[1:9] / (5 * 0.02 * math.sqrt(4))
    # The sign of each singular vector is free: products of vectors are compared.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-4)
    dots = initial_rows(pairs, 9, 4, 0, False, CPU)
    torch.testing.assert_close(dots, rows / 5)


def test_vectors_repeat_and_a_small_catalog_leaves_columns_empty() -> None:
    pairs = Pairs(np.array([1, 3]), np.array([2, 4]), np.array([1.0, 2.0]))
    rows, again = (initial_rows(pairs, 5, 16, seed, True, CPU) for seed in (3, 3))
    assert torch.equal(rows, again)
    near = torch.nn.functional.normalize(rows[1:5], dim=1) @ rows[1:5].T
    assert rows.isfinite().all() and not rows[:, 5:].any()
    assert near[0, 2:].abs().max() < 1e-5  # 1, 2 and 3, 4 have nothing in common
    assert not rows[5].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_vectors_on_cuda_repeat_to_the_last_bit() -> None:
    draws = np.random.default_rng(0)
    low, high = draws.integers(1, 3000, (2, 100_000))
    pairs = Pairs(low, high + 1000, draws.random(100_000))
    cuda = torch.device("cuda")
    first, *others = (initial_rows(pairs, 4000, 128, 1, True, cuda) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    assert first[1:-1].norm(dim=1).gt(0).float().mean() > 0.9


WAYS = {
    "own": ShardingConfig(),
    "fp16": ShardingConfig(table_precision="fp16"),
    "column_wise": ShardingConfig(sharding="column_wise"),
    "ddp": ShardingConfig("ddp"),
}


@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize("way", WAYS)
def test_tables_start_from_the_rows_and_other_items_from_their_draw(
    one_rank: Ranks, way: str, head: str
) -> None:
    encoder, scored = EncoderConfig(16, 2, 1), HeadConfig(head=head)
    config = RunConfig(encoder=encoder, head=scored, sharding=WAYS[way])
    rows = torch.zeros(8, 16)
    rows[2:5] = torch.randn(3, 16).half()
    plan = plan_execution(config, 6, one_rank)
    drawn, started = (
        build.build_model(config, 6, one_rank, plan, rows=given) for given in (None, rows)
    )
    tables = [
        [
            value.local_tensor() if hasattr(value, "local_tensor") else value
            for name, value in model.state_dict().items()
            if name.startswith("embeddings.")
        ]
        for model in (drawn, started)
    ]
    assert len(tables[0]) == (1 if head == "tied" else 2)
    for before, after in zip(*tables, strict=True):
        assert torch.equal(after[2:5].float(), rows[2:5])
        others = [0, 1, 5, 6, 7]
        assert torch.equal(after[others], before[others]) and before[others].any()


def test_too_large_a_table_is_refused_and_not_chosen(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of([1, 2, 3, 4, 5, 6])
    config = RunConfig(
        encoder=EncoderConfig(16), sharding=ShardingConfig(table_init="cooccurrence")
    )
    found = build.first_rows(config, store, one_rank)
    assert found is not None and found[1:5].any(dim=1).all() and not found[5:].any()
    assert build.first_rows(RunConfig(), store, one_rank) is None
    monkeypatch.setattr(build, "MOST_VALUES", 95)
    with pytest.raises(UserError, match=r"--table_init cooccurrence is for tables of at most 95"):
        build.first_rows(config, store, one_rank)


def test_the_fit_chooses_it_for_cosines_and_catalogs_with_room() -> None:
    def chosen(items: int, **given: float) -> str:
        store = SequenceStore.from_arrays([1, 2, 3], [0, 3], items)
        machine = Machine("cuda", 80 << 30)
        return fitted({"dataset_path": "a.csv", **given}, store, machine)[0].sharding.table_init

    assert chosen(1 << 18) == "cooccurrence"
    assert chosen((1 << 18) + 1) == "normal"
    assert chosen(1 << 20, emb_dim=64) == "cooccurrence"
    assert chosen(9, logit_temperature=0) == "normal"


def test_train_py_starts_from_them_and_a_resumed_run_goes_on(
    run_main: RunMain, run_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--table_init=cooccurrence", f"--cache_dir={cache_dir}"]

    def losses(folder: Path, *more: str) -> list[str]:
        outcome = run_main("train", *flags, f"--run_dir={folder}", *more)
        assert outcome.code == 0, outcome.err
        assert "goes on otherwise" not in outcome.err
        lines = [line for line in outcome.out.splitlines() if ", loss " in line]
        return [line.split("loss ")[1].split(",")[0] for line in lines]

    whole = losses(run_dir)
    recorded = json.loads((run_dir / "config.json").read_text())["flags"]
    assert recorded["table_init"] == "cooccurrence"
    other = run_dir.with_name("other")
    normal = losses(other, "--table_init=normal")
    assert len(whole) == len(normal) and whole[0] != normal[0]
    parts = run_dir.with_name("parts")
    begun = losses(parts, "--max_steps=3")
    # The table is that of the checkpoint, however it began: no vectors are computed for it.
    monkeypatch.setattr(build, "pairs_of", None)
    more = losses(parts, "--resume=auto", "--max_steps=5")
    rest = losses(parts, "--resume=auto", "--table_init=normal")
    assert begun + more + rest == whole and more and rest
    refused = run_main("train", *flags, "--table_init=svd")
    assert_one_line(refused, "train", "--table_init")
