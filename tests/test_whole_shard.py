"""A shard that is scored and updated in place: what FBGEMM's lookup and optimizers would do."""

import itertools
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from model import whole_shard
from model.head import CatalogSlice, HeadConfig
from model.kernels.table_update import UPDATES, Step, update
from model.plan import FUSED_OPTIMIZERS, ShardingConfig
from model.ranks import Ranks
from model.run import build_model
from model.whole_shard import WholeShard, scores_in_place
from pipeline.batch import jagged_items
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
    shard = WholeShard(own, optimizer, CatalogSlice(low, low + count, False), low, 1)
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


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_training_is_that_with_looked_up_candidates(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(whole_shard, "ITEMS_A_POSITION", 0)
    sharding = ShardingConfig("dmp", "row_wise", optimizer, 0.1)
    found = trained(sharding, one_rank)
    monkeypatch.setattr("model.run.scores_in_place", lambda *_: False)
    expected = trained(sharding, one_rank)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.losses[-1] < found.losses[0] - 0.3
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-4, atol=1e-5)


def trained(sharding: ShardingConfig, ranks: Ranks) -> sharded.Run:
    config = sharded.config_of(sharding, ranks)
    model = build_model(config, sharded.NUM_ITEMS, ranks)
    return sharded.pipelined(config, model, sharded.sgd(model), ranks)


def test_rows_around_the_candidates_stay_without_gradients() -> None:
    rows = torch.ones(4, 2)
    update("sgd", rows, (), torch.ones(2, 2), torch.zeros(2, 2), 1, STEP)
    assert rows.tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5], [1, 1]]


def test_candidates_are_for_one_backward_pass() -> None:
    shard = WholeShard(table("sgd", "cpu"), "sgd", CatalogSlice(1, 8, False), 1, 1)
    shard(jagged_items(torch.tensor([3]), torch.tensor([1])))
    assert shard.candidates().shape == (7, WIDTH)
    with pytest.raises(AssertionError, match="no lookup"):
        shard.candidates()


def test_gradients_are_divided_by_the_number_of_ranks_once() -> None:
    made = table("sgd", "cpu")
    before = made.split_embedding_weights()[0].clone()
    shard = WholeShard(made, "sgd", CatalogSlice(1, 8, True), 1, 4)
    items = shard(jagged_items(torch.tensor([3, 0]), torch.tensor([2])))
    # What TorchRec has divided, and what the softmax has not.
    (items.sum() / 4 + shard.candidates()[4].sum()).backward()
    moved = (before - made.split_embedding_weights()[0]).sum(dim=1) / (0.1 * WIDTH / 4)
    torch.testing.assert_close(moved, torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 0]))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_adam_on_cuda_leaves_alone_what_was_not_looked_up() -> None:
    """Its averages would move rows without gradients: of those around the candidates, the first."""
    rows, means, squares = torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)
    given = [t.cuda() for t in (rows, means, squares, torch.zeros(2, 2), torch.zeros(2, 2))]
    given[-1][0] = 2  # the last row's
    update("adam", given[0], given[1:3], *given[3:], 1, STEP)
    assert (given[0].cpu() != rows).any(dim=1).tolist() == [False, True, True, True]
    assert (given[1].cpu() != means).any(dim=1).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"sharding": "table_wise"}, True),
        ({"mode": "ddp"}, False),
        ({"table_precision": "fp16"}, False),
        ({"head": "linear"}, False),
        ({"loss": "sampled_softmax"}, False),
        ({"world_size": 3}, True),
        ({"world_size": 3, "sharding": "table_wise"}, False),
        ({"world_size": 3, "sharding": "auto"}, False),
        ({"positions": 31}, False),
        ({"world_size": 3, "items": 2, "positions": 1}, False),  # rows 0 1 | 2 3 |
        ({"world_size": 3, "items": 3, "positions": 1}, True),  # rows 0 1 | 2 3 | 4
    ],
)
def test_when(changed: dict[str, object], expected: bool) -> None:
    given = {"world_size": 1, "items": 30, "positions": 30} | changed
    world_size = given.pop("world_size")
    ranks = Ranks(0, world_size, world_size, torch.device("cpu"))
    items, positions = given.pop("items"), given.pop("positions")
    head = HeadConfig(**{name: given.pop(name) for name in ("head", "loss") if name in given})
    assert scores_in_place(ShardingConfig(**given), head, items, positions, ranks) is expected


def test_a_resumed_run_is_the_uninterrupted_one(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_shard, "ITEMS_A_POSITION", 0)
    updates = []
    update_of = WholeShard.update
    monkeypatch.setattr(
        WholeShard, "update", lambda *given: (updates.append(1), update_of(*given))[1]
    )
    whole, parts = whole_and_in_parts(run_main, tmp_path, cache_dir)
    assert len(updates) >= 4
    for name, weight in whole.items():
        assert torch.equal(parts[name], weight), name
