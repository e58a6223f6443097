"""The lookup of a single rank: no exchange, and the same rows as TorchRec's."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embedding import ShardedEmbeddingCollection

from model.distributed import Ranks
from model.kernels import l2_normalize
from model.losses import sharded_softmax
from model.network.config import HeadConfig
from model.network.head import CatalogSlice, Scored, ScoringHead
from model.tables import upstream
from model.tables.collections import _Split
from model.tables.distribute import unwrap
from tests.workers import sharded
from tests.workers.sharded import WAYS, Built, by_torchrec

SHARDED = [way for way in WAYS if way != "ddp"]
POSITIONS, ITEMS, WIDTH = 6, 40, 8


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("way", SHARDED)
def test_nothing_is_exchanged(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, way: str, own: bool
) -> None:
    changes = {} if own else by_torchrec(one_rank)
    built = Built.of(sharded.config_of(WAYS[way], one_rank), one_rank, **changes)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an exchange with nobody")

    monkeypatch.setattr(dist, "all_to_all_single", refuse)
    sharded.pipelined(built, epochs=2)
    built.model.eval()
    with torch.no_grad():
        loss, _ = built.model(next(built.loader().epoch(0)).to(one_rank.device))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize("way", SHARDED)
def test_rows_equal_torchrecs(one_rank: Ranks, way: str, head: str) -> None:
    config = sharded.config_of(WAYS[way], one_rank, head=head)
    for changes in ({}, by_torchrec(one_rank)):
        built = Built.of(config, one_rank, **changes | {"in_place": False})
        embeddings = unwrap(built.model).embeddings
        batch = next(built.loader().epoch(0))
        stock = ShardedEmbeddingCollection
        upstream.set_input_dist_ready(embeddings, False)
        context = stock.create_context(embeddings)
        ids = stock.input_dist(embeddings, context, batch.features).wait().wait()
        expected = stock.compute_and_output_dist(embeddings, context, ids).wait()
        for training in (True, False):
            found = embeddings.train(training)(batch)
            assert list(found) == list(expected)
            for name, rows in found.items():
                assert rows.values().equal(expected[name].values())
                assert rows.offsets().equal(expected[name].offsets())


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_gradients_of_both_features_equal_those_of_a_split(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    real = torch.cat
    monkeypatch.setattr(
        l2_normalize.torch, "cat", lambda parts, *rest: copied.append(1) or real(parts, *rest)
    )
    config = HeadConfig(logit_temperature=temperature)
    head = ScoringHead(config, CatalogSlice(1, ITEMS + 1, shared=False), ITEMS)
    rows = torch.randn(POSITIONS + ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([3, 0, 40])
    found = []
    for split in (
        lambda whole: _Split.apply(whole, [POSITIONS, ITEMS]),
        lambda whole: whole.split([POSITIONS, ITEMS]),
    ):
        whole = rows.clone().requires_grad_()
        items, candidates = split(whole)
        loss, _ = head(items[:3] * items[3:], candidates, Scored(targets))
        found.append(torch.autograd.grad(loss, whole)[0])
    assert torch.equal(*found)
    # A large catalog's gradients are joined without a copy; plain dot products leave no room.
    assert len(copied) == (temperature == 0)


@pytest.mark.parametrize(
    ("head", "changes", "has_space"),
    [
        ("linear", {"in_place": True}, False),  # behind the whole item table in memory
        ("tied", {"in_place": False}, False),  # behind the positions' rows
        ("tied", {"lookup": "fbgemm", "in_place": False}, True),
    ],
)
def test_only_gradients_that_are_joined_have_space_before_them(
    one_rank: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    changes: dict[str, Any],
    has_space: bool,
) -> None:
    built = Built.of(sharded.config_of(WAYS["row_wise"], one_rank, head), one_rank, **changes)
    offsets: list[int] = []
    real = sharded_softmax._gradient_of_rows

    def remembered(*given: Any) -> torch.Tensor:
        gradient = real(*given)
        offsets.append(int(gradient.storage_offset()))
        return gradient

    monkeypatch.setattr(sharded_softmax, "_gradient_of_rows", remembered)
    batch = next(built.loader().epoch(0))
    loss, _ = built.model.train()(batch)
    loss.backward()
    assert offsets == [has_space * batch.num_items * built.config.encoder.emb_dim]
