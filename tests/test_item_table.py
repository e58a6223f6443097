"""This project's lookup and update of the item table equal FBGEMM's."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from model.distributed import Ranks
from model.kernels.segment_sum import KINDS
from model.network.head import CatalogSlice, catalog_slice
from model.tables.config import ShardingConfig
from model.tables.cpu_adam import CpuAdamTables
from model.tables.item_table import TableShard, _LookUp
from model.tables.row_exchange import RowExchange
from model.tables.sharding_plan import FUSED_OPTIMIZERS
from model.tables.table_update import Step, update
from tests.conftest import RunMain, whole_and_in_parts
from tests.workers import sharded
from tests.workers.sharded import Built, by_torchrec

CUDA = torch.cuda.is_available()
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs CUDA"))]
ROWS, WIDTH = 9, 8
STEP = Step(lr=0.5, beta1=0.9, beta2=0.98, eps=1e-8, number=1)


def table(optimizer: str, device: str, precision: SparseType = SparseType.FP32) -> torch.nn.Module:
    """FBGEMM's module with seeded rows; for Adam on CPU this project's."""
    rows, width = ROWS, WIDTH
    on_cuda = device == "cuda"
    of_fbgemm = on_cuda or optimizer != "adam"
    made = (SplitTableBatchedEmbeddingBagsCodegen if of_fbgemm else CpuAdamTables)(
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
        weights_precision=precision,
        pooling_mode=PoolingMode.NONE,
        device=torch.device(device),
    )
    torch.manual_seed(3)
    made.split_embedding_weights()[0].copy_(torch.randn(rows, width))
    return made


def steps(device: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Looked-up ids [T], loss weights [T, D] of their rows and [C, D] of the candidates."""
    generator = torch.Generator().manual_seed(5)
    ids = [[8, 3, 8, 5, 0], [3], [8, 1, 1, 1], [], [0, 8, 7]]
    drawn = []
    for each in ids:
        shapes = (len(each), WIDTH), (count, WIDTH)
        weights = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
        drawn.append((torch.tensor(each, dtype=torch.int64, device=device), *weights))
    return drawn


ALONE = RowExchange(ROWS - 2, Ranks(0, 1, 1, torch.device("cpu")))


def shard_of(
    made: torch.nn.Module,
    optimizer: str,
    scored: CatalogSlice | None = None,
    exchange: RowExchange = ALONE,
) -> TableShard:
    return TableShard(made, optimizer, exchange, scored)


def look_up(
    made: torch.nn.Module, shard: TableShard, ids: torch.Tensor, draws: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the ids, all of them items, and the candidates in place; begins a step."""
    shard.begin_step(Step.counted(made, 1 / shard.exchange.world_size))
    trigger = torch.zeros((), device=ids.device, requires_grad=True)
    candidates = None if draws else ids[:0]

    return _LookUp.apply(trigger, shard, ids, len(ids), candidates, 0)


def by_fbgemm(
    made: torch.nn.Module, ids: torch.Tensor, low: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    joined = torch.cat([ids, torch.arange(low, low + count, device=ids.device)])
    ends = torch.arange(len(joined) + 1, device=ids.device)
    return made(joined, ends).split([len(ids), count])


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize(("low", "count"), [(1, 7), (0, 8), (0, 9), (2, 3), (1, 0)])
def test_steps_equal_fbgemms(optimizer: str, device: str, low: int, count: int) -> None:
    plain, own = table(optimizer, device), table(optimizer, device)
    shard = shard_of(own, optimizer, CatalogSlice(low, low + count, False))
    for number, (ids, of_items, of_candidates) in enumerate(steps(device, count)):
        for each in (plain, own):
            each.set_learning_rate(0.1 / (1 + number))
        items, candidates = by_fbgemm(plain, ids, low, count)
        found, scored = look_up(own, shard, ids)
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
@pytest.mark.parametrize("optimizer", KINDS)
def test_rows_looked_up_are_updated_as_by_fbgemm(optimizer: str, device: str) -> None:
    plain, own = table(optimizer, device), table(optimizer, device)
    shard = shard_of(own, optimizer)
    for ids, weights, _ in [*steps(device, 0), long_step(device)]:
        ends = torch.arange(len(ids) + 1, device=device)
        (plain(ids, ends) * weights).sum().backward()
        found, _ = look_up(own, shard, ids)
        (found * weights).sum().backward()
    torch.testing.assert_close(*(t.split_embedding_weights()[0] for t in (plain, own)))
    states = [[*itertools.chain(*each.split_optimizer_states())] for each in (plain, own)]
    torch.testing.assert_close(*states)
    assert (
        table(optimizer, device)
        .split_embedding_weights()[0][2]
        .equal(own.split_embedding_weights()[0][2])
    )  # never looked up


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_fp16_rows_are_updated_as_by_fbgemm(optimizer: str, device: str) -> None:
    """Each of both rounds its own way: equal states, and rows one spacing apart."""
    half = SparseType.FP16
    plain, own = table(optimizer, device, half), table(optimizer, device, half)
    shard = shard_of(own, optimizer)
    rows = [each.split_embedding_weights()[0] for each in (plain, own)]
    assert rows[1].dtype == torch.float16
    for ids, weights, _ in [*steps(device, 0), long_step(device)]:
        rows[0].copy_(rows[1])  # differences do not add up
        before = rows[1].clone()
        ends = torch.arange(len(ids) + 1, device=device)
        expected = plain(ids, ends)
        found, _ = look_up(own, shard, ids)
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for one in (expected, found):
            (one * weights).sum().backward()
        torch.testing.assert_close(rows[1], rows[0], rtol=2**-9, atol=2**-14)
        looked_up = torch.zeros(ROWS, dtype=torch.bool, device=device)
        looked_up[ids] = True
        assert (rows[1] != before).any(dim=1).equal(looked_up)
    states = [[*itertools.chain(*each.split_optimizer_states())] for each in (plain, own)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def long_step(device: str) -> tuple[torch.Tensor, ...]:
    """One id a thousand times, between others."""
    ids = torch.tensor([1, *[6] * 500, 0, *[6] * 500, 7], device=device)
    generator = torch.Generator().manual_seed(6)
    return ids, torch.randn(len(ids), WIDTH, generator=generator).to(device), ids


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_training_equals_fbgemms(
    one_rank: Ranks, optimizer: str, in_place: bool, loss: str
) -> None:
    config = sharded.config_of(ShardingConfig("dmp", "row_wise", optimizer, 0.1), one_rank)
    config = replace(config, head=replace(config.head, loss=loss))
    in_place = in_place and loss == "softmax"
    found = sharded.pipelined(Built.of(config, one_rank, in_place=in_place))
    expected = sharded.pipelined(Built.of(config, one_rank, **by_torchrec(one_rank)))  # or by torch
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.losses[-1] < found.losses[0] - 0.3
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-4, atol=1e-5)


def test_rows_around_the_candidates_stay_without_gradients() -> None:
    rows = torch.ones(4, 2)
    update("sgd", rows, (), torch.ones(2, 2), torch.zeros(2, 2), 1, STEP)
    assert rows.tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1]]


class Received(RowExchange):
    """The ids are already those of all ranks."""

    local_ids = lambda self, ids: ids  # noqa: E731
    own_rows = lambda self, rows, ids: rows.float()  # noqa: E731
    all_gradients = lambda self, gradient, ids: gradient  # noqa: E731


@pytest.mark.parametrize("catalog", [CatalogSlice(1, 8, True), None])
def test_several_ranks_divide_gradients_and_ignore_rows_of_other_shards(
    catalog: CatalogSlice | None,
) -> None:
    made = table("sgd", "cpu")
    before = made.split_embedding_weights()[0].clone()
    shard = shard_of(made, "sgd", catalog, Received(ROWS - 2, Ranks(0, 4, 4, torch.device("cpu"))))
    found, candidates = look_up(made, shard, torch.tensor([-1, 3, -1, 0]))
    assert found[[0, 2]].eq(0).all() and found[1].equal(before[3])
    loss = found.sum()
    if catalog is not None:
        loss = loss + candidates[4].sum()
    loss.backward()
    moved = (before - made.split_embedding_weights()[0]).sum(dim=1) / (0.1 * WIDTH / 4)
    scored = 0.0 if catalog is None else 1.0
    torch.testing.assert_close(moved, torch.tensor([1.0, 0, 0, 1, 0, scored, 0, 0, 0]))


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("optimizer", KINDS)
def test_a_shard_of_attributes_alone_is_updated_in_place(optimizer: str, device: str) -> None:
    """Three items, the mask token, row 4, and 13 attributes: the second of two ranks has row 9."""
    exchange = Received(3, Ranks(1, 2, 2, torch.device(device)), 13)
    catalog = catalog_slice(3, 1, 2, sharded=True, num_attributes=13)
    assert (exchange.low, exchange.rows) == (ROWS, ROWS)
    looked_up, in_place = table(optimizer, device), table(optimizer, device)
    for ids, weights, _ in steps(device, 0):
        for made, scored in ((looked_up, None), (in_place, catalog)):
            found, candidates = look_up(made, shard_of(made, optimizer, scored, exchange), ids)
            assert len(candidates) == 0
            (found * weights).sum().backward()
    rows = [made.split_embedding_weights()[0] for made in (looked_up, in_place)]
    torch.testing.assert_close(*rows)
    assert not rows[0].equal(table(optimizer, device).split_embedding_weights()[0])


def test_fp16_rows_are_rounded_by_the_same_bits_on_all_ranks() -> None:
    """The second of two ranks holds rows 5 to 8 of 9."""
    whole, part = (table("sgd", "cpu", SparseType.FP16) for _ in range(2))
    rows = [made.split_embedding_weights()[0] for made in (whole, part)]
    rows[1][:4] = rows[0][5:]
    exchange = Received(ROWS - 2, Ranks(1, 2, 2, torch.device("cpu")))
    for made, ids, given, rate in (
        (whole, torch.arange(9), ALONE, 0.1),
        (part, torch.arange(4), exchange, 0.2),  # of which the mean over two ranks is half
    ):
        made.set_learning_rate(rate)
        before = made.split_embedding_weights()[0].clone()
        found, _ = look_up(made, shard_of(made, "sgd", None, given), ids)
        (found * 0.0123).sum().backward()
        assert not before.equal(made.split_embedding_weights()[0])
    assert rows[1][:4].equal(rows[0][5:])


@pytest.mark.parametrize("device", PLACES)
def test_adam_does_not_update_rows_without_a_lookup(device: str) -> None:
    """Adam's averages would move rows without gradients; here only row 0 has none."""
    rows, means, squares = torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)
    given = [t.to(device) for t in (rows.clone(), means.clone(), squares.clone())]
    given += [torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device)]
    given[-1][0] = 2  # the last row's
    update("adam", given[0], given[1:3], *given[3:], 1, STEP)
    assert (given[0].cpu() != rows).any(dim=1).tolist() == [False, True, True, True]
    assert (given[1].cpu() != means).any(dim=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("items_a_position", [0, 1000])
def test_a_resumed_run_is_the_uninterrupted_one(
    run_main: RunMain,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    items_a_position: int,
) -> None:
    monkeypatch.setattr("model.run.execution.ITEMS_A_POSITION", items_a_position)
    updates = []
    update_of = TableShard.update
    monkeypatch.setattr(
        TableShard, "update", lambda *given: (updates.append(1), update_of(*given))[1]
    )
    whole, parts = whole_and_in_parts(run_main, tmp_path, cache_dir)
    assert len(updates) >= 4
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
