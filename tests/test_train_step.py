"""A step as one CUDA graph equals a step that launches its kernels one by one."""

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node
from torchrec.sparse.jagged_tensor import JaggedTensor

from model.distributed import Ranks, seed_dropout, start
from model.kernels.random_bits import mixed
from model.network.config import EncoderConfig
from model.step import pipelines, train_step
from model.step.pipelines import train_pipeline
from model.step.train_step import TrainStep
from model.tables.config import ShardingConfig
from model.tables.distribute import unwrap
from model.tables.item_table import ShardedItemTable
from pipeline.batches.features import ITEM
from pipeline.training.loader import TrainLoader
from tests.workers import sharded
from tests.workers.replayed import Replayed
from tests.workers.sharded import Built

ENCODER = EncoderConfig(64, 2, 1, dropout=0.2)


@pytest.fixture
def one_gpu() -> Iterator[Ranks]:
    """This process as the only rank of a process group, on CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need CUDA")
    yield start()
    dist.destroy_process_group()


ADAM = ShardingConfig("dmp", "row_wise")
HALF = replace(ADAM, table_precision="fp16")
TABLES = [
    (ADAM, "tied"),
    (ADAM, "linear"),
    (replace(ADAM, embedding_optimizer="rowwise_adagrad"), "tied"),
    (HALF, "tied"),
    (HALF, "linear"),
]


def trained(
    ranks: Ranks, loss: str, sharding: ShardingConfig, head: str, epochs: int = 6
) -> tuple[list[list[float]], dict[str, torch.Tensor], int]:
    """Reports of all steps, the weights, and how many graphs there were."""
    config = sharded.config_of(sharding, ranks, head, loss)
    built = Built.of(replace(config, encoder=ENCODER), ranks)
    model = built.model.train()
    assert built.plan.graphs == "step"
    optimizers = built.optimizers()
    step, reports = TrainStep(model, optimizers, built.plan, ranks.device), []
    loader = built.loader()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            optimizers.set_lr(1 / (1 + len(reports)))
            seed_dropout(ranks.device, len(reports))
            reports.append(step(batch.to(ranks.device)).tolist())
    graphs = sum(one is not None for one in step._captured.values())
    weights = {name: value.clone() for name, value in model.named_parameters()}
    table = torch.cat([shard.rows for shard in unwrap(model).embeddings.shards])
    step.release()
    return reports, weights | {"table": table}, graphs


@pytest.mark.parametrize("items_a_position", [0, 1000])
@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
@pytest.mark.parametrize(("sharding", "head"), TABLES)
def test_a_graph_equals_the_launched_kernels(
    one_gpu: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    items_a_position: int,
    sharding: ShardingConfig,
    head: str,
) -> None:
    monkeypatch.setattr("model.run.execution.ITEMS_A_POSITION", items_a_position)
    found, captured, graphs = trained(one_gpu, loss, sharding, head)
    monkeypatch.setattr(train_step, "MAX_GRAPHS", 0)
    plain, weights, none = trained(one_gpu, loss, sharding, head)
    assert none == 0
    assert 0 < graphs < len(found) / 2
    assert len({*map(tuple, found)}) == len(found)
    near, close = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-5}
    if sharding is HALF:  # a last bit of a float32 decides how some rows are rounded
        near, close = {"rtol": 0.0, "atol": 0.02}, {"rtol": 0.02, "atol": 0.02}
        weights = {"table": weights["table"]}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), **near)
    for name, weight in weights.items():
        torch.testing.assert_close(captured[name], weight, **close)


def test_steps_with_fp16_tables_have_graphs(one_gpu: Ranks) -> None:
    """A second run gives the same bits."""
    (found, weights, graphs), (again, same, _) = (
        trained(one_gpu, "sampled_softmax", HALF, "tied") for _ in range(2)
    )
    assert graphs > 0 and weights["table"].dtype == torch.float16
    assert found == again and weights["table"].equal(same["table"])


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
def test_a_graph_reads_every_batch(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr("model.run.build.TrainLoader", partial(TrainLoader, few_shapes=True))
    config = sharded.config_of(sharded.WAYS["row_wise"], one_rank, loss=loss)
    runs, replays = [], []
    for most in (0, 48):
        monkeypatch.setattr(train_step, "MAX_GRAPHS", most)
        built = Built.of(config, one_rank, graphs="step")
        model = built.model.train()
        step, reports = Replayed(model, sharded.sgd(model), built.plan, one_rank.device), []
        loader = built.loader()
        for epoch in range(4):
            reports += [step(b.to(one_rank.device)).tolist() for b in loader.epoch(epoch)]
        replays.append(step.replayable)
        runs.append((reports, sharded.weights_of(model)))
    assert replays[0] == 0 < replays[1]
    assert runs[0][0] == runs[1][0]
    for name, weight in runs[0][1].items():
        assert weight.equal(runs[1][1][name]), name


def test_a_step_begins_by_writing_what_differs_where_its_graph_reads_it(one_rank: Ranks) -> None:
    built = Built.of(sharded.config_of(ADAM, one_rank), one_rank, graphs="step")
    optimizers, table = built.optimizers(), unwrap(built.model).embeddings
    written, peak = table.step_on_device, built.config.optimizer.lr
    for number in (1, 2):
        optimizers.set_lr(1 / number)
        optimizers.zero_grad()  # TorchRec gives the tables their rate
        table.begin_step()
        assert written.encoder_lr.item() == pytest.approx(peak / number)
        corrected = built.plan.table_lr / number / (1 - 0.9**number)
        shrink = 1 / (1 - built.config.optimizer.beta2**number) ** 0.5
        assert written.rates.tolist() == pytest.approx([corrected, shrink])
        assert written.key.item() % 2**32 == mixed(number)
    places = {group["lr"].data_ptr() for group in optimizers.dense.param_groups}
    assert places == {written.encoder_lr.data_ptr()}
    shards = {shard._on_device for shard in table.shards}
    assert shards == {written}


def test_graphs_of_fewer_slots_are_dropped(one_rank: Ranks) -> None:
    config = sharded.config_of(sharded.WAYS["row_wise"], one_rank)
    built = Built.of(config, one_rank, graphs="step")
    model = built.model.train()
    step = Replayed(model, sharded.sgd(model), built.plan, one_rank.device)
    batch, other = itertools.islice(built.loader().epoch(0), 2)
    losses = []
    for slots, graphs in ((8, [0, 0, 1, 2, 2, 2]), (16, [0, 0, 1, 2, 2, 2])):
        for count in graphs:
            given = batch if len(losses) % 2 == 0 else other
            losses.append(step(replace(given, slots=slots))[0].item())
            assert step.replayable == count
    assert len({*losses}) == 12


@pytest.mark.parametrize("graphs", ["none", "step"])
def test_the_pipeline_keeps_no_autograd_graph_between_steps(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, graphs: str
) -> None:
    """A capture fails while the autograd graph of a launched step lives on another stream."""
    config = sharded.config_of(sharded.WAYS["row_wise"], one_rank)
    built = Built.of(config, one_rank, graphs=graphs)
    made: list[weakref.ref[Node]] = []
    look_up = ShardedItemTable.compute_and_output_dist

    def looked_up(*args: Any) -> dict[str, JaggedTensor]:
        rows = look_up(*args)
        made.append(weakref.ref(rows[ITEM].values().grad_fn))
        return rows

    monkeypatch.setattr(ShardedItemTable, "compute_and_output_dist", looked_up)
    alive = []

    class Watched(Replayed):
        def __call__(self, *args: Any) -> Tensor:
            alive.append(sum(graph() is not None for graph in made))
            return super().__call__(*args)

    monkeypatch.setattr(pipelines, "TrainStep", Watched)
    model = built.model.train()
    pipeline = train_pipeline(model, sharded.sgd(model), built.plan, one_rank.device)
    batches = built.loader().epoch(0)
    with pytest.raises(StopIteration):
        while True:
            pipeline.progress(batches)
    assert len(made) >= 3
    assert not any(alive)


def test_the_pipeline_captures_graphs(one_gpu: Ranks) -> None:
    config = sharded.config_of(ShardingConfig("dmp", "row_wise"), one_gpu)
    built = Built.of(config, one_gpu)
    model = built.model.train()
    pipeline = train_pipeline(model, built.optimizers(), built.plan, one_gpu.device)
    for epoch in range(4):
        batches = built.loader().epoch(epoch)
        with pytest.raises(StopIteration):
            while True:
                assert pipeline.progress(batches).isfinite().all()
    assert any(pipeline.train_step._captured.values())
    pipeline.release()


def test_released_graphs_are_captured_again(one_gpu: Ranks) -> None:
    config = sharded.config_of(ShardingConfig("dmp", "row_wise"), one_gpu)
    config = replace(config, encoder=replace(ENCODER, dropout=0))
    built = Built.of(config, one_gpu)
    step = TrainStep(built.model.train(), built.optimizers(), built.plan, one_gpu.device)
    batch = next(built.loader().epoch(0)).to(one_gpu.device)
    losses = []
    for _ in range(2):
        losses += [step(batch)[0].item() for _ in range(3)]
        assert [*step._captured.values()] != [None]
        step.release()
        assert not step._captured
    assert losses == sorted(losses, reverse=True)
    assert len({*losses}) == 6
