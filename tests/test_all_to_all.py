"""The all-to-all exchange, by hand with two ranks in one process; test_distributed.py trains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.distributed import Ranks
from model.tables import all_to_all
from model.tables.all_to_all import AllToAll, Request

ROWS, SLOTS, WIDTH = 9, 3, 2  # rank 0 holds rows 0 ... 4, rank 1 rows 5 ... 8
TABLE = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
IDS = [torch.tensor([7, 1, 7, 8, 1, 4]), torch.tensor([5, 5, 0])]


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[AllToAll]:
    """Both ranks' exchanges."""
    monkeypatch.setattr(all_to_all, "narrow_group", lambda ranks: None)
    return [
        AllToAll(ROWS - 2, Ranks(rank, 2, 2, torch.device("cpu")), graphs=False) for rank in (0, 1)
    ]


def exchanged(monkeypatch: pytest.MonkeyPatch, calls: list[Callable[[], Any]]) -> list[Any]:
    """Run one call for each rank, twice: to see what it sends, and with what it receives."""
    sent: list[Tensor] = []

    def send(received: Tensor, mine: Tensor, group: object = None) -> None:
        sent.append(mine.clone())
        received.zero_()

    monkeypatch.setattr(dist, "all_to_all_single", send)
    for call in calls:
        call()
    whole = torch.stack([each.view(2, -1, *each.shape[1:]) for each in sent])  # [from, to, ...]

    found = []
    for rank, call in enumerate(calls):

        def receive(received: Tensor, mine: Tensor, group: object = None, rank: int = rank) -> None:
            received.copy_(whole[:, rank].flatten(0, 1))

        monkeypatch.setattr(dist, "all_to_all_single", receive)
        found.append(call())
    return found


def requests(exchanges: list[AllToAll], monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    pairs = zip(exchanges, IDS, strict=True)
    return exchanged(monkeypatch, [lambda e=e, i=i: e.request(i, SLOTS) for e, i in pairs])


def test_each_row_is_requested_once_of_the_rank_that_holds_it(
    exchanges: list[AllToAll], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = requests(exchanges, monkeypatch)
    # Rank 0 requests rows 1 4 of rank 0 and 7 8 (its rows 2 3) of rank 1; rank 1 row 0, and 5.
    assert first.received.tolist() == [1, 4, -1, 0, -1, -1]
    assert second.received.tolist() == [2, 3, -1, 0, -1, -1]
    assert first.slots.tolist() == [3, 0, 3, 4, 0, 1]
    assert second.slots.tolist() == [3, 3, 0]
    for request in (first, second):
        index = request.by_slot
        assert index.count == request.num_slots == 6
        assert index.keys.dtype == torch.int32 and index.keys.diff().ge(0).all()
        assert request.slots[index.order].equal(index.keys.long())
        assert request.clone().words.equal(request.words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_come_back_in_the_order_of_the_ids(
    exchanges: list[AllToAll], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pairs = [*zip(exchanges, requests(exchanges, monkeypatch), strict=True)]

    def look_up(exchange: AllToAll, request: Request) -> Tensor:
        local = exchange.local_ids(request)
        shard = TABLE[exchange.low : exchange.low + exchange.rows]
        rows = torch.where(local[:, None] < 0, 0.0, shard[local.clamp(min=0)])
        return exchange.own_rows(rows.to(dtype), request)

    found = exchanged(monkeypatch, [lambda e=e, r=r: look_up(e, r) for e, r in pairs])
    for rows, ids in zip(found, IDS, strict=True):
        assert rows.dtype == torch.float32  # sent as they are stored
        assert rows.equal(TABLE[ids])


def test_gradients_of_equal_ids_are_summed_before_they_are_sent(
    exchanges: list[AllToAll], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [*zip(exchanges, requests(exchanges, monkeypatch), strict=True)]
    gradients = [torch.full((len(ids), WIDTH), 1.0) for ids in IDS]
    gradients[1] *= 10
    calls = [
        lambda e=e, r=r, g=g: e.all_gradients([g[:1], g[1:]], r)
        for (e, r), g in zip(pairs, gradients, strict=True)
    ]
    (first,), (second,) = exchanged(monkeypatch, calls)
    # By slot: ids 1 1 | 4 | - of rank 0 and 0 of rank 1; ids 7 7 | 8 | - and 5 5.
    assert first[:, 0].tolist() == [2, 1, 0, 10, 0, 0]
    assert second[:, 0].tolist() == [2, 1, 0, 20, 0, 0]
