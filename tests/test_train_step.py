"""A step as one CUDA graph is the step that launches its kernels one by one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from model.distributed import Ranks, seed_dropout, start
from model.network.encoder import EncoderConfig
from model.run.build import build_model, train_loader
from model.step import train_step
from model.step.optimizers import Optimizers, unwrap
from model.step.train_step import TrainStep
from model.tables import table_shard
from model.tables.sharding_plan import ShardingConfig
from pipeline.training.loader import TrainLoader
from tests.workers import sharded
from tests.workers.replayed import Replayed, let_be_whole

ENCODER = EncoderConfig(64, 2, 1, dropout=0.2, attention_dropout=0)


@pytest.fixture
def one_gpu() -> Iterator[Ranks]:
    """This process as the only rank of a process group, on CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need CUDA")
    yield start()
    dist.destroy_process_group()


def trained(
    ranks: Ranks, loss: str, epochs: int = 6
) -> tuple[list[list[float]], dict[str, torch.Tensor], int]:
    """Reports of all steps, the weights, and how many graphs there were."""
    config = sharded.config_of(ShardingConfig("dmp", "row_wise"), ranks, loss=loss)
    config = replace(config, encoder=ENCODER)
    model = build_model(config, sharded.NUM_ITEMS, ranks).train()
    assert unwrap(model).dense_step.is_whole
    optimizers = Optimizers(model, config.sharding, config.optimizer, ranks.device)
    step, reports = TrainStep(model, optimizers, ranks.device), []
    loader = train_loader(config, sharded.histories(), ranks)
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            optimizers.set_lr(1 / (1 + len(reports)))
            seed_dropout(ranks.device, len(reports))
            reports.append(step(batch.copied(ranks.device)).tolist())
    graphs = sum(one is not None for one in step._seen.values())
    weights = {name: value.clone() for name, value in model.named_parameters()}
    table = unwrap(model).table_shard._rows.clone()
    step.release()
    return reports, weights | {"table": table}, graphs


@pytest.mark.parametrize("items_a_position", [0, 1000])
@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
def test_a_graph_trains_what_the_launched_kernels_do(
    one_gpu: Ranks, monkeypatch: pytest.MonkeyPatch, loss: str, items_a_position: int
) -> None:
    monkeypatch.setattr(table_shard, "ITEMS_A_POSITION", items_a_position)
    found, captured, graphs = trained(one_gpu, loss)
    monkeypatch.setattr(train_step, "_MAX_GRAPHS", 0)
    plain, weights, none = trained(one_gpu, loss)
    assert none == 0
    assert 0 < graphs < len(found) / 2
    assert len({*map(tuple, found)}) == len(found)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(captured[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax"])
def test_a_graph_reads_each_batch_anew(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr("model.run.build.TrainLoader", partial(TrainLoader, few_shapes=True))
    config = sharded.config_of(sharded.WAYS["row_wise"], one_rank, loss=loss)
    runs, replays = [], []
    for most in (0, 48):
        monkeypatch.setattr(train_step, "_MAX_GRAPHS", most)
        model = build_model(config, sharded.NUM_ITEMS, one_rank).train()
        let_be_whole(model)
        step, reports = Replayed(model, sharded.sgd(model), one_rank.device), []
        loader = train_loader(config, sharded.histories(), one_rank)
        for epoch in range(4):
            reports += [step(b.copied(one_rank.device)).tolist() for b in loader.epoch(epoch)]
        replays.append(step.replayable)
        runs.append((reports, sharded.weights_of(model)))
    assert replays[0] == 0 < replays[1]
    assert runs[0][0] == runs[1][0]
    for name, weight in runs[0][1].items():
        assert weight.equal(runs[1][1][name]), name


def test_graphs_that_are_given_up_are_captured_again(one_gpu: Ranks) -> None:
    config = sharded.config_of(ShardingConfig("dmp", "row_wise"), one_gpu)
    config = replace(config, encoder=replace(ENCODER, dropout=0))
    model = build_model(config, sharded.NUM_ITEMS, one_gpu).train()
    optimizers = Optimizers(model, config.sharding, config.optimizer, one_gpu.device)
    step = TrainStep(model, optimizers, one_gpu.device)
    batch = next(train_loader(config, sharded.histories(), one_gpu).epoch(0))
    batch = batch.copied(one_gpu.device)
    losses = []
    for _ in range(2):
        losses += [step(batch)[0].item() for _ in range(3)]
        assert [*step._seen.values()] != [None]
        step.release()
        assert not step._seen
    assert losses == sorted(losses, reverse=True)
    assert len({*losses}) == 6
