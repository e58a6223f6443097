"""The exchange of rows, by hand; test_distributed.py trains with it."""

import pytest
import torch
import torch.distributed as dist

from model.distributed import Ranks
from model.tables.row_exchange import RowExchange

NUM_ROWS = 23


def ranks(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, world_size, world_size, torch.device("cpu"))


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(1, [(0, 23)]), (2, [(0, 12), (12, 11)]), (4, [(0, 6), (6, 6), (12, 6), (18, 5)])],
)
def test_rows_are_cut_as_torchrec_cuts_them(
    world_size: int, expected: list[tuple[int, int]]
) -> None:
    cut = [RowExchange(NUM_ROWS - 2, ranks(rank, world_size)) for rank in range(world_size)]
    assert [(one.low, one.rows) for one in cut] == expected


def test_a_single_rank_sends_nothing() -> None:
    exchange = RowExchange(NUM_ROWS - 2, ranks(0, 1))
    ids, rows = torch.tensor([3, 22, 0]), torch.randn(3, 2)
    assert exchange.local_ids(exchange.request(ids, 0)) is ids
    assert exchange.own_rows(rows, ids) is rows
    assert exchange.all_gradients(rows, ids) is rows


def test_ids_of_all_ranks_become_rows_of_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two ranks; the first has the ids 3 0 22."""

    def gather(gathered: torch.Tensor, own: torch.Tensor) -> None:
        gathered.copy_(torch.cat([torch.tensor([3, 0, 22]), own]))

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    exchange = RowExchange(NUM_ROWS - 2, ranks(1, 2))
    # Of 23 rows the second rank has those from 12 on.
    assert exchange.local_ids(torch.tensor([12, 11, 13])).tolist() == [-1, -1, 10, 0, -1, 1]
