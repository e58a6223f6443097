"""Scores, the softmax loss by hand, and the same loss over a catalog cut into slices."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.bert4rec import BERT4Rec, ModelConfig
from model.network.config import EncoderConfig, HeadConfig
from model.network.head import CatalogSlice, Scored, ScoringHead, catalog_slice
from pipeline.batches.features import jagged_items
from pipeline.batches.train_batch import TrainBatch
from pipeline.errors import UserError
from tests.workers.softmax import SIZES, SLICES, problem, teachers, work


def test_loss_by_hand_with_dot_products() -> None:
    head = ScoringHead(HeadConfig(logit_temperature=0), CatalogSlice(1, 4, shared=False), 3)
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidates = torch.tensor([[3.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
    # Logits 3 0 1 and 2 0 -2; targets: item 3 and item 1.
    first = math.log(math.exp(3) + 1 + math.exp(1)) - 1
    second = math.log(math.exp(2) + 1 + math.exp(-2)) - 2
    loss, report = head(hidden, candidates, Scored(torch.tensor([3, 1])))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert report.tolist() == pytest.approx([first + second, 2], abs=1e-6)
    assert not report.requires_grad


def test_loss_by_hand_with_cosines() -> None:
    head = ScoringHead(HeadConfig(logit_temperature=0.5), CatalogSlice(1, 3, shared=False), 2)
    # Cosines .6 and .8, divided by .5: logits 1.2 and 1.6.
    candidates, targets = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([2])
    loss, _ = head(torch.tensor([[3.0, 4.0]]), candidates, Scored(targets))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.4)), abs=1e-6)


def test_without_masked_positions_the_loss_is_0_and_differentiable() -> None:
    head = ScoringHead(HeadConfig(), CatalogSlice(1, 4, shared=False), 3)
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss, report = head(hidden, torch.randn(3, 4), Scored(torch.zeros(0, dtype=torch.int64)))
    loss.backward()
    assert loss.item() == 0 and report.tolist() == [0, 0]


def test_positions_without_a_target_do_not_count() -> None:
    head = ScoringHead(HeadConfig(), CatalogSlice(1, 4, shared=False), 3)
    hidden, candidates = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    loss, report = head(hidden, candidates, Scored(torch.tensor([2, 0, 3])))
    two, _ = head(hidden[[0, 2]], candidates, Scored(torch.tensor([2, 3])))
    assert loss.item() == pytest.approx(two.item(), abs=1e-6)
    assert report[1] == 2
    loss.backward()
    assert hidden.grad[1].abs().sum() == 0


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_tied_and_linear_heads_score_with_their_own_table(head: str) -> None:
    config = ModelConfig(5, 4, EncoderConfig(emb_dim=8), HeadConfig(head=head))
    model = BERT4Rec(config, CatalogSlice(1, 6, shared=False)).eval()
    tables = {name: module.weight for name, module in model.embeddings.embeddings.items()}
    assert list(tables) == (["item"] if head == "tied" else ["item", "output"])
    assert all(table.shape == (7, 8) for table in tables.values())

    batch = TrainBatch(
        features=jagged_items(torch.tensor([2, 6, 3]), torch.tensor([3])),
        masked=torch.tensor([1]),
        targets=torch.tensor([4]),
        num_windows=1,
        num_rows=1,
        longest=8,
        candidate_range=(1, 6),
    ).to(torch.device("cpu"))
    loss, _ = model(batch)
    items = tables["item"][[2, 6, 3]]
    hidden = model.encoder(items, torch.tensor([0, 3]), batch.masked, longest=4)
    scoring = tables["item" if head == "tied" else "output"][1:6]
    logits = F.normalize(hidden, dim=1) @ F.normalize(scoring, dim=1).T / 0.07
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([3])).item(), abs=1e-5)

    loss.backward()
    touched = (tables["item"].grad.abs().sum(dim=1) > 0).tolist()
    # Row 0 is padding; tied, all candidates learn as well as the items of the row.
    inputs = [False, False, True, True, False, False, True]
    assert touched == ([False] + [True] * 6 if head == "tied" else inputs)


@given(num_items=st.integers(1, 200), world_size=st.integers(1, 40))
def test_slices_cover_the_catalog_once_and_follow_the_blocks_of_rows(
    num_items: int, world_size: int
) -> None:
    slices = [catalog_slice(num_items, rank, world_size, True) for rank in range(world_size)]
    covered = [item for part in slices for item in range(part.low, part.high)]
    assert covered == list(range(1, num_items + 1))
    assert all(part.low <= part.high for part in slices)
    assert all(part.shared == (world_size > 1) for part in slices)
    block = math.ceil((num_items + 2) / world_size)
    for rank, part in enumerate(slices):
        assert all(item // block == rank for item in range(part.low, part.high))


@given(num_items=st.integers(1, 200), world_size=st.integers(1, 40))
def test_replicated_tables_are_scored_whole_by_every_rank(num_items: int, world_size: int) -> None:
    part = catalog_slice(num_items, world_size - 1, world_size, sharded=False)
    assert part == CatalogSlice(1, num_items + 1, shared=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the worker at 3, 2 and 1 ranks: files ``<world size>-<rank>.pt``."""
    folder = tmp_path_factory.mktemp("softmax")
    mp.spawn(work, (folder,), nprocs=3)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("cosine", [False, True])
def test_the_sharded_softmax_equals_the_whole(sharded: Path, cosine: bool, world_size: int) -> None:
    # Float32, sums of 6 exponentials in another order: 1e-6 is ten roundings.
    hidden, candidates, targets, _ = problem()
    hidden.requires_grad_(), candidates.requires_grad_()
    logits = hidden @ candidates.T
    if cosine:
        logits = F.normalize(hidden, dim=1) @ F.normalize(candidates, dim=1).T
    losses = F.cross_entropy(logits, targets - 1, reduction="none")
    assert_parts_are(sharded, world_size, cosine, losses, hidden, candidates)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_teachers_of_a_sharded_softmax(sharded: Path, world_size: int) -> None:
    hidden, candidates, targets, _ = problem()
    hidden.requires_grad_(), candidates.requires_grad_()
    taught = sum((seen @ rows.T).softmax(dim=1) for seen, rows, _ in teachers()) / 2
    aims = 0.7 * F.one_hot(targets - 1, 6) + 0.3 * taught
    losses = F.cross_entropy(hidden @ candidates.T, aims, reduction="none")
    assert_parts_are(sharded, world_size, "taught", losses, hidden, candidates)


def assert_parts_are(
    sharded: Path,
    world_size: int,
    name: bool | str,
    losses: torch.Tensor,
    hidden: torch.Tensor,
    candidates: torch.Tensor,
) -> None:
    """The ranks' results equal the losses and the gradients of their weighted sum."""
    (losses * problem()[3]).sum().backward()
    parts = [torch.load(sharded / f"{world_size}-{rank}.pt")[name] for rank in range(world_size)]
    assert [len(part["losses"]) for part in parts] == SIZES[world_size]
    assert [len(part["candidates"]) for part in parts] == [
        high - low for low, high in SLICES[world_size]
    ]
    for name, expected in (
        ("losses", losses.detach()),
        ("hidden", hidden.grad),
        ("candidates", candidates.grad),
    ):
        found = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_large_logits_do_not_overflow(sharded: Path) -> None:
    # Logits 200 and -200: their exponentials are not float32, the loss is 0 and 400.
    parts = [torch.load(sharded / f"2-{rank}.pt")["large"] for rank in range(2)]
    assert torch.cat(parts).tolist() == [0.0, 400.0]


def test_flags_out_of_range() -> None:
    with pytest.raises(UserError, match="--head must be one of tied, linear, not 'none'"):
        HeadConfig(head="none")
    with pytest.raises(UserError, match=r"--logit_temperature must be at least 0, not -0\.1"):
        HeadConfig(logit_temperature=-0.1)
