"""Sharding plans for many ranks; planning needs no process group."""

import pytest
import torch

from model.bert4rec import BERT4Rec, ModelConfig
from model.distributed import Ranks
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import catalog_slice
from model.tables.collections import ExchangedCollection
from model.tables.config import ShardingConfig
from model.tables.distribute import _Sharder
from model.tables.sharding_plan import column_width, plan_tables

NUM_ITEMS, WIDTH = 98, 32


def shards(
    sharding: str, world_size: int, num_items: int = NUM_ITEMS
) -> list[tuple[int, int, int]]:
    """(rank, rows, columns) of every shard of the item table of 100 rows."""
    config = ModelConfig(num_items, 8, EncoderConfig(WIDTH, 2), HeadConfig())
    model = BERT4Rec(config, catalog_slice(num_items, 0, world_size, sharded=True))
    ranks = Ranks(0, world_size, world_size, torch.device("cpu"))
    sharder = _Sharder({}, ExchangedCollection)
    plan = plan_tables(model, ShardingConfig(sharding=sharding), sharder, 8, ranks)
    spec = plan.plan["embeddings"]["item"].sharding_spec
    return sorted((s.placement.rank(), *s.shard_sizes) for s in spec.shards)


def test_row_wise_cuts_rows() -> None:
    assert shards("row_wise", 3) == [(0, 34, 32), (1, 34, 32), (2, 32, 32)]


def test_column_wise_gives_every_rank_a_part_of_the_width() -> None:
    assert shards("column_wise", 4) == [(rank, 100, 8) for rank in range(4)]


def test_table_wise_does_not_cut_a_table() -> None:
    assert [size for _, *size in shards("table_wise", 4)] == [[100, 32]]


@pytest.mark.parametrize("sharding", ["row_wise", "auto"])
def test_no_rank_gets_a_shard_without_rows(sharding: str) -> None:
    assert all(rows > 0 for _, rows, _ in shards(sharding, 3, num_items=2))
    assert shards("row_wise", 3, num_items=2)[0][1] == 4  # one rank holds the table
    assert [rows for _, rows, _ in shards("row_wise", 3, num_items=3)] == [2, 2, 1]


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise", "auto"])
def test_on_one_rank_the_table_is_whole(sharding: str) -> None:
    assert shards(sharding, 1) == [(0, 100, 32)]


@pytest.mark.parametrize(
    ("width", "world_size", "part"),
    [(128, 1, 128), (128, 4, 32), (128, 3, 64), (12, 8, 4), (20, 2, 20), (4, 2, 4)],
)
def test_column_width_is_a_multiple_of_four_that_divides(
    width: int, world_size: int, part: int
) -> None:
    assert column_width(width, world_size) == part
