"""The encoder's fast path on CUDA against its plain one; skipped where there is no CUDA."""

import pytest
import torch

from model.encoder import Encoder, EncoderConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")

LENGTHS = [40, 7, 0, 23, 40, 1, 12, 0]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def encoder(dropout: float = 0.0) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(EncoderConfig(emb_dim=64, nhead=2, dropout=dropout), max_len=40).train()
    for parameter in made.parameters():  # small initial weights would hide what attention does
        torch.nn.init.normal_(parameter, std=0.15)
    return made


def inputs(seed: int, left_rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    items = torch.randn(int(offsets[-1]), 64, generator=generator)
    masked = torch.randperm(len(items), generator=generator)[:30].sort().values
    return items, offsets, masked, torch.arange(len(LENGTHS)) < left_rows


def results(model: Encoder, given: Inputs, half: bool) -> list[torch.Tensor]:
    """The output, and the gradients of a weighted sum of it, in float32 on the CPU."""
    model.zero_grad()
    device = next(model.parameters()).device
    items, offsets, masked, left_only = (tensor.to(device) for tensor in given)
    items = items.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        found = model(items, offsets, masked, 40, left_only)
    weights = torch.linspace(-1, 1, found.numel(), device=device).view_as(found)
    (found.float() * weights).sum().backward()
    gradients = [items.grad, *(parameter.grad for parameter in model.parameters())]
    return [tensor.detach().float().cpu().clone() for tensor in (found, *gradients)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < limit


@pytest.mark.parametrize("left_rows", [0, 4, 8])
def test_jagged_half_precision_is_padded_full_precision(left_rows: int) -> None:
    given = inputs(1, left_rows)
    plain, fast = encoder(), encoder().cuda()
    torch.full((1 << 24,), torch.nan, device="cuda")  # what is not written is not harmless zeros
    assert_close(results(fast, given, half=True), results(plain, given, half=False), 0.03)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_compute_what_the_plain_code_does(compiled: bool, hooked: bool) -> None:
    plain, fast = encoder(), encoder().cuda()
    fast.accelerate(compiled, hooked)
    for seed, left_rows in ((1, 4), (2, 4), (3, 6), (1, 4)):  # captured once, replayed with others
        given = inputs(seed, left_rows)
        assert_close(results(fast, given, half=True), results(plain, given, half=False), 0.03)


def test_dropout_follows_the_seed_through_graphs() -> None:
    plain, fast = encoder(0.3).cuda(), encoder(0.3).cuda()
    fast.accelerate(compiled=False)
    given = inputs(1, 4)

    def seeded(model: Encoder, seed: int) -> torch.Tensor:
        torch.cuda.manual_seed(seed)
        return results(model, given, half=True)[0]

    first, second = seeded(fast, 1), seeded(fast, 2)  # the first call captures
    assert first.equal(seeded(plain, 1))
    assert second.equal(seeded(plain, 2))
    assert not first.equal(second)
