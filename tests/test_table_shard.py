"""A shard that ranks look up and update themselves: what FBGEMM would do."""

import itertools
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from model.tables.table_shard import Lookup, TableShard, choose_lookup

from model.distributed import Ranks
from model.network.head import CatalogSlice, HeadConfig
from model.run.build import build_model
from model.tables import table_shard
from model.tables.sharding_plan import FUSED_OPTIMIZERS, ShardingConfig
from model.tables.table_update import UPDATES, Step, update
from pipeline.batches.features import jagged_items
from tests.conftest import RunMain, whole_and_in_parts
from tests.workers import sharded

CUDA = torch.cuda.is_available()
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs CUDA"))]
ROWS, WIDTH = 9, 8
STEP = Step(lr=0.5, beta1=0.9, beta2=0.98, eps=1e-8, number=1)


def table(optimizer: str, device: str, rows: int = ROWS, width: int = WIDTH) -> torch.nn.Module:
    """FBGEMM's, its rows drawn by a seed."""
    on_cuda = device == "cuda"
    made = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[
            (
                rows,
                width,
                EmbeddingLocation.DEVICE if on_cuda else EmbeddingLocation.HOST,
                ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU,
            )
        ],
        optimizer=FUSED_OPTIMIZERS[optimizer],
        learning_rate=0.1,
        eps=1e-8,
        beta1=0.9,
        beta2=0.98,
        pooling_mode=PoolingMode.NONE,
        device=torch.device(device),
    )
    torch.manual_seed(3)
    made.split_embedding_weights()[0].copy_(torch.randn(rows, width))
    return made


def steps(device: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Ids [T] looked up, weights [T, D] of their rows' loss and [C, D] of the candidates'."""
    generator = torch.Generator().manual_seed(5)
    ids = [[8, 3, 8, 5, 0], [3], [8, 1, 1, 1], [], [0, 8, 7]]
    drawn = []
    for each in ids:
        shapes = (len(each), WIDTH), (count, WIDTH)
        weights = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
        drawn.append((torch.tensor(each, dtype=torch.int64, device=device), *weights))
    return drawn


def by_fbgemm(
    made: torch.nn.Module, ids: torch.Tensor, low: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    joined = torch.cat([ids, torch.arange(low, low + count, device=ids.device)])
    ends = torch.arange(len(joined) + 1, device=ids.device)
    return made(joined, ends).split([len(ids), count])


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("optimizer", UPDATES)
@pytest.mark.parametrize(("low", "count"), [(1, 7), (0, 8), (0, 9), (2, 3), (1, 0)])
def test_steps_are_those_of_fbgemm(optimizer: str, device: str, low: int, count: int) -> None:
    if optimizer == "adam" and device == "cpu":
        pytest.skip("FBGEMM has none")
    plain, own = table(optimizer, device), table(optimizer, device)
    shard = TableShard(own, optimizer, CatalogSlice(low, low + count, False), low, 1)
    for number, (ids, of_items, of_candidates) in enumerate(steps(device, count)):
        for each in (plain, own):
            each.set_learning_rate(0.1 / (1 + number))
        items, candidates = by_fbgemm(plain, ids, low, count)
        found = shard(jagged_items(ids, torch.tensor([len(ids)])))
        scored = shard.candidates()
        torch.testing.assert_close(found, items)
        torch.testing.assert_close(scored, candidates)
        for one, other in ((items, candidates), (found, scored)):
            ((one * of_items).sum() + (other * of_candidates).sum()).backward()
    if optimizer == "adam":  # the others do not count
        assert int(plain.iter_cpu) == int(own.iter_cpu) == 5
    torch.testing.assert_close(*(t.split_embedding_weights()[0] for t in (plain, own)))
    states = [[*itertools.chain(*each.split_optimizer_states())] for each in (plain, own)]
    assert len(states[0]) == {"sgd": 0, "adam": 2}.get(optimizer, 1)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("optimizer", UPDATES)
def test_rows_looked_up_are_updated_as_by_fbgemm(optimizer: str, device: str) -> None:
    if optimizer == "adam" and device == "cpu":
        pytest.skip("FBGEMM has none")
    plain, own = table(optimizer, device), table(optimizer, device)
    shard = TableShard(own, optimizer, None, 0, 1)
    for ids, weights, _ in [*steps(device, 0), long_step(device)]:
        ends = torch.arange(len(ids) + 1, device=device)
        (plain(ids, ends) * weights).sum().backward()
        found = shard(jagged_items(ids, torch.tensor([len(ids)])))
        (found * weights).sum().backward()
    torch.testing.assert_close(*(t.split_embedding_weights()[0] for t in (plain, own)))
    states = [[*itertools.chain(*each.split_optimizer_states())] for each in (plain, own)]
    torch.testing.assert_close(*states)
    assert (
        table(optimizer, device)
        .split_embedding_weights()[0][2]
        .equal(own.split_embedding_weights()[0][2])
    )  # never looked up


def long_step(device: str) -> tuple[torch.Tensor, ...]:
    """One id a thousand times, between others."""
    ids = torch.tensor([1, *[6] * 500, 0, *[6] * 500, 7], device=device)
    generator = torch.Generator().manual_seed(6)
    return ids, torch.randn(len(ids), WIDTH, generator=generator).to(device), ids


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
@pytest.mark.parametrize("items_a_position", [0, 1000])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_training_is_that_of_fbgemm(
    one_rank: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    items_a_position: int,
    loss: str,
) -> None:
    monkeypatch.setattr(table_shard, "ITEMS_A_POSITION", items_a_position)
    sharding = ShardingConfig("dmp", "row_wise", optimizer, 0.1)
    found = trained(sharding, one_rank, loss)
    monkeypatch.setattr("model.run.build.choose_lookup", lambda *_: Lookup())
    expected = trained(sharding, one_rank, loss)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.losses[-1] < found.losses[0] - 0.3
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-4, atol=1e-5)


def trained(sharding: ShardingConfig, ranks: Ranks, loss: str) -> sharded.Run:
    config = sharded.config_of(sharding, ranks, loss=loss)
    model = build_model(config, sharded.NUM_ITEMS, ranks)
    return sharded.pipelined(config, model, sharded.sgd(model), ranks)


def test_rows_around_the_candidates_stay_without_gradients() -> None:
    rows = torch.ones(4, 2)
    update("sgd", rows, (), torch.ones(2, 2), torch.zeros(2, 2), 1, STEP)
    assert rows.tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1]]


def test_candidates_are_for_one_backward_pass() -> None:
    shard = TableShard(table("sgd", "cpu"), "sgd", CatalogSlice(1, 8, False), 1, 1)
    shard(jagged_items(torch.tensor([3]), torch.tensor([1])))
    assert shard.candidates().shape == (7, WIDTH)
    with pytest.raises(AssertionError, match="no lookup"):
        shard.candidates()


@pytest.mark.parametrize("catalog", [CatalogSlice(1, 8, True), None])
def test_several_ranks_divide_gradients_and_leave_out_rows_of_others(
    catalog: CatalogSlice | None,
) -> None:
    made = table("sgd", "cpu")
    before = made.split_embedding_weights()[0].clone()
    shard = TableShard(made, "sgd", catalog, 1, 4)
    loss = shard(jagged_items(torch.tensor([-1, 3, -1, 0]), torch.tensor([4]))).sum()
    if catalog is not None:
        loss = loss + shard.candidates()[4].sum()
    loss.backward()
    moved = (before - made.split_embedding_weights()[0]).sum(dim=1) / (0.1 * WIDTH / 4)
    scored = 0.0 if catalog is None else 1.0
    torch.testing.assert_close(moved, torch.tensor([1.0, 0, 0, 1, 0, scored, 0, 0, 0]))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_adam_on_cuda_leaves_alone_what_was_not_looked_up() -> None:
    """Its averages would move rows without gradients: of those around the candidates, the first."""
    rows, means, squares = torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)
    given = [t.cuda() for t in (rows, means, squares, torch.zeros(2, 2), torch.zeros(2, 2))]
    given[-1][0] = 2  # the last row's
    update("adam", given[0], given[1:3], *given[3:], 1, STEP)
    assert (given[0].cpu() != rows).any(dim=1).tolist() == [False, True, True, True]
    assert (given[1].cpu() != means).any(dim=1).tolist() == [False, True, True, True]


HERE, LOOKED_UP = Lookup(True, False, True), Lookup(True, False, False)
TOGETHER = Lookup(True, True, True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, HERE),
        ({"sharding": "table_wise"}, HERE),
        ({"mode": "ddp"}, Lookup()),
        ({"table_precision": "fp16"}, Lookup()),
        ({"head": "linear"}, Lookup()),
        ({"loss": "sampled_softmax"}, LOOKED_UP),
        ({"positions": 31}, LOOKED_UP),
        ({"world_size": 3}, TOGETHER),
        ({"world_size": 3, "positions": 31}, Lookup(True, True, False)),
        ({"world_size": 3, "loss": "gbce"}, Lookup(True, True, False)),
        ({"world_size": 3, "sharding": "table_wise"}, Lookup()),
        ({"world_size": 3, "sharding": "auto"}, Lookup()),
        ({"world_size": 3, "items": 2, "positions": 1}, Lookup()),  # rows 0 1 | 2 3 |
        ({"world_size": 3, "items": 3, "positions": 1}, TOGETHER),  # rows 0 1 | 2 3 | 4
        ({"world_size": 4, "width": 1 << 20, "drawn": 0, "positions": 16}, TOGETHER),  # 256 MB
        ({"world_size": 4, "width": 1 << 20, "drawn": 1, "positions": 16}, Lookup()),
    ],
)
def test_when(changed: dict[str, object], expected: Lookup) -> None:
    given = {"world_size": 1, "items": 30, "width": 8, "positions": 30, "drawn": 7} | changed
    world_size = given.pop("world_size")
    ranks = Ranks(0, world_size, world_size, torch.device("cpu"))
    sizes = [given.pop(name) for name in ("items", "width", "positions", "drawn")]
    head = HeadConfig(**{name: given.pop(name) for name in ("head", "loss") if name in given})
    assert choose_lookup(ShardingConfig(**given), head, *sizes, ranks) == expected


@pytest.mark.parametrize("items_a_position", [0, 1000])
def test_a_resumed_run_is_the_uninterrupted_one(
    run_main: RunMain,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    items_a_position: int,
) -> None:
    monkeypatch.setattr(table_shard, "ITEMS_A_POSITION", items_a_position)
    updates = []
    update_of = TableShard.update
    monkeypatch.setattr(
        TableShard, "update", lambda *given: (updates.append(1), update_of(*given))[1]
    )
    whole, parts = whole_and_in_parts(run_main, tmp_path, cache_dir)
    assert len(updates) >= 4
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
