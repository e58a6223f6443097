"""One rank exchanges nothing with itself, and looks up what TorchRec would."""

import pytest
import torch
import torch.distributed as dist
from model.tables.lone_rank import look_up_at_home
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from model.distributed import Ranks
from model.run.build import build_model, train_loader
from model.step.optimizers import unwrap
from tests.workers import sharded
from tests.workers.sharded import NUM_ITEMS, WAYS, histories, sgd

SHARDED = [way for way in WAYS if way != "ddp"]


@pytest.mark.parametrize("way", SHARDED)
def test_nothing_is_exchanged(one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    config = sharded.config_of(WAYS[way], one_rank)
    model = build_model(config, NUM_ITEMS, one_rank)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an exchange with nobody")

    monkeypatch.setattr(dist, "all_to_all_single", refuse)
    sharded.pipelined(config, model, sgd(model), one_rank, epochs=2)
    # What an evaluation does between two epochs: the same model, called as it is.
    batch = next(iter(train_loader(config, histories(), one_rank).epoch(0)))
    with torch.no_grad():
        loss, _ = model(batch.to(one_rank.device))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize("way", SHARDED)
def test_rows_are_those_of_torchrec(one_rank: Ranks, way: str, head: str) -> None:
    config = sharded.config_of(WAYS[way], one_rank, head=head)
    embeddings = unwrap(build_model(config, NUM_ITEMS, one_rank)).embeddings
    batch = next(iter(train_loader(config, histories(), one_rank).epoch(0)))
    features = batch.to(one_rank.device).features
    expected = ShardedEmbeddingCollection.forward(embeddings, features).wait()
    found = embeddings(features)
    assert list(found) == list(expected)
    for name, rows in found.items():
        assert rows.values().equal(expected[name].values())
        assert rows.offsets().equal(expected[name].offsets())


def test_a_table_in_several_shards_is_left_to_torchrec(one_rank: Ranks) -> None:
    model = build_model(sharded.config_of(WAYS["column_wise"], one_rank), NUM_ITEMS, one_rank)
    embeddings = unwrap(model).embeddings
    del embeddings.forward
    embeddings._embedding_names_per_sharding = [["item", "candidate"] * 2]  # two shards' columns
    look_up_at_home(model)
    assert embeddings.forward.__func__ is ShardedEmbeddingCollection.forward
