"""Ranks that look up for each other; what several of them train is in test_distributed.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from model.tables.gathered_rows import GatheredRows
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from model.distributed import Ranks
from model.run.build import build_model, train_loader
from model.step.optimizers import unwrap
from model.step.pipelines import train_pipeline
from model.tables.sharding_plan import ShardingConfig
from pipeline.batches.features import ITEM, jagged_items
from pipeline.batches.train_batch import TrainBatch
from tests.workers import sharded

NUM_ROWS = sharded.NUM_ITEMS + 2


@pytest.fixture
def two_ranks(one_rank: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """This process as the second of two ranks, of which the first has the ids 3 0 22."""

    def gather(everyone: torch.Tensor, own: torch.Tensor, group: object = None) -> None:
        everyone.copy_(torch.cat([torch.tensor([3, 0, 22]), own]))

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    yield Ranks(1, 2, 2, torch.device("cpu"))


def collection_of(ranks: Ranks) -> ShardedEmbeddingCollection:
    config = sharded.config_of(sharded.WAYS["row_wise"], ranks)
    model = build_model(config, sharded.NUM_ITEMS, ranks)
    (found,) = (m for m in model.modules() if isinstance(m, ShardedEmbeddingCollection))
    return found


def batch_of(ids: list[int], **more: object) -> TrainBatch:
    features = jagged_items(torch.tensor(ids), torch.tensor([len(ids)]))
    nothing = torch.tensor([], dtype=torch.int64)
    return TrainBatch(features, nothing, nothing, 1, 1, 8, **more).with_candidates()


def test_ids_of_all_ranks_become_rows_of_the_shard(one_rank: Ranks, two_ranks: Ranks) -> None:
    exchange = GatheredRows(collection_of(one_rank), NUM_ROWS, two_ranks)
    # Of 23 rows the second of two ranks has those from 12 on.
    batch = batch_of([12, 11, 13], candidate_range=(12, 22))
    exchange.gather(batch)
    exchange.distribute(batch)
    assert batch.features.keys() == ["item", "candidate"]
    assert batch.features["item"].values().tolist() == [-1, -1, 10, 0, -1, 1]
    assert batch.features["candidate"].values().tolist() == [*range(10)]
    assert batch.ids[:3].tolist() == [12, 11, 13]
    assert batch.row_offsets.tolist() == [0, 3]


def test_drawn_candidates_are_gathered_too(one_rank: Ranks, two_ranks: Ranks) -> None:
    exchange = GatheredRows(collection_of(one_rank), NUM_ROWS, two_ranks)
    batch = batch_of([12], negatives=torch.tensor([5, 14]))
    exchange.gather(batch)
    exchange.distribute(batch)
    assert batch.features["item"].values().tolist() == [-1, -1, 10, 0, -1, 2]
    assert batch.features["candidate"].values().tolist() == []


class _Alone:
    """An exchange of one rank, which notes what happens when."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def gather(self, batch: TrainBatch) -> None:
        self.events.append("gather")
        batch.look_up_for_all(batch.features)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        self.events.append("step")
        return rows


def test_ids_travel_a_batch_ahead(one_rank: Ranks) -> None:
    config = sharded.config_of(ShardingConfig("dmp", "row_wise", "sgd", 0.1), one_rank)
    runs, exchange = [], _Alone()
    for own in (None, exchange):
        model = build_model(config, sharded.NUM_ITEMS, one_rank)
        unwrap(model).dense_step.exchange = own
        pipeline = train_pipeline(model, sharded.sgd(model), one_rank.device)
        batches = train_loader(config, sharded.histories(), one_rank).epoch(0)
        runs.append([pipeline.progress(batches)[0].item() for _ in range(3)])
        runs.append(unwrap(model).embeddings.state_dict())
    assert exchange.events == ["gather", "step", "gather", "step", "gather", "step"]
    assert runs[0] == runs[2]
    assert len(runs[0]) == 3
    assert ITEM in next(iter(runs[1]))
