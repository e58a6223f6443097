"""One rank exchanges nothing with itself, and its pipeline can be taken off the model again."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.dist_data import KJTAllToAll

from model.ranks import Ranks
from model.run import build_model, train_loader
from model.sharding import unwrap
from model.train_pipeline import train_pipeline
from tests.workers import sharded
from tests.workers.sharded import NUM_ITEMS, WAYS, histories, sgd


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collectives of one rank with itself are an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an exchange with nobody")

    monkeypatch.setattr(dist, "all_to_all_single", refuse)
    yield


@pytest.mark.parametrize("way", ["row_wise", "table_wise", "column_wise"])
def test_no_sizes_are_exchanged(one_rank: Ranks, no_exchange: None, way: str) -> None:
    config = sharded.config_of(WAYS[way], one_rank)
    model = build_model(config, NUM_ITEMS, one_rank)
    run = sharded.pipelined(config, model, sgd(model), one_rank, epochs=2)
    assert run.pipelined == 1


@pytest.mark.parametrize("way", ["row_wise", "table_wise", "column_wise"])
def test_detach_gives_the_model_back(one_rank: Ranks, way: str) -> None:
    config = sharded.config_of(WAYS[way], one_rank)
    model = build_model(config, NUM_ITEMS, one_rank)
    loader = train_loader(config, histories(), one_rank)
    pipeline = train_pipeline(model, sgd(model), one_rank.device)
    for epoch in range(2):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps_per_epoch):
            pipeline.progress(batches)
        pipeline.detach()
        module = unwrap(model).embeddings
        for distribution in module._input_dists:
            assert distribution._dist.forward.__func__ is KJTAllToAll.forward
        # What an evaluation does between two epochs: the same model, called as it is.
        batch = next(iter(train_loader(config, histories(), one_rank).epoch(0)))
        with torch.no_grad():
            loss, _ = model(batch.to(one_rank.device))
        assert torch.isfinite(loss)
