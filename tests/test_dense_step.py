"""The gradients of both features' rows become one tensor, and a large catalog's are not copied."""

import pytest
import torch
from model.step.graphs import replaced

from model.kernels import l2_normalize
from model.network.dense_step import _Split
from model.network.head import CatalogSlice, HeadConfig, ScoringHead

POSITIONS, ITEMS, WIDTH = 6, 40, 8


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_split_is_torch_split(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = torch.cat
    monkeypatch.setattr(
        l2_normalize.torch, "cat", lambda parts, *rest: copied.append(1) or real(parts, *rest)
    )
    config = HeadConfig(logit_temperature=temperature)
    head = ScoringHead(config, CatalogSlice(1, ITEMS + 1, shared=False))
    rows = torch.randn(POSITIONS + ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([3, 0, 40])
    found = []
    for split in (
        lambda whole: _Split.apply(whole, POSITIONS),
        lambda whole: whole.split([POSITIONS, ITEMS]),
    ):
        whole = rows.clone().requires_grad_()
        items, candidates = split(whole)
        loss, _ = head(items[:3] * items[3:], candidates, targets)
        found.append(torch.autograd.grad(loss, whole)[0])
    assert torch.equal(*found)
    assert len(copied) == (temperature == 0)  # plain dot products leave no room


def test_a_module_computes_with_other_parameters_for_a_while() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    own = dict(module.named_parameters())
    others = {p: torch.nn.Parameter(p.detach() + 1) for p in own.values()}
    with replaced(module, others):
        module(torch.ones(1, 2)).sum().backward()
        assert [*module.parameters()] == [*others.values()]
    assert dict(module.named_parameters()) == own
    assert all(p.grad is None for p in own.values())
    assert all(p.grad is not None for p in others.values())
