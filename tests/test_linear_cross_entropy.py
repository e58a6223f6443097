"""The cross-entropy without stored logits equals the plain one: losses, gradients, memory."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.losses import linear_cross_entropy as core
from model.losses.sharded_softmax import Beside, linear_cross_entropy

SCALE = 1 / 0.07
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(positions: int, items: int, width: int, dtype: torch.dtype) -> Problem:
    """Hidden vectors, rows, targets among which are zeros, and weights, 0 where the target is."""
    generator = torch.Generator().manual_seed(positions + items)
    hidden, rows = torch.randn(positions + items, width, generator=generator).split(
        [positions, items]
    )
    targets = torch.randint(1, items + 1, (positions,), generator=generator)
    targets[2::7] = 0
    weights = torch.rand(positions, generator=generator) * (targets > 0)
    return hidden.to(dtype), rows.to(dtype), targets, weights.to(dtype)


def plain(
    hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, cosine: bool, scale: float
) -> torch.Tensor:
    """All logits at once."""
    if cosine:
        hidden, rows = F.normalize(hidden, dim=1), F.normalize(rows, dim=1)
    logits = (hidden * scale @ rows.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, targets - 1, reduction="none", ignore_index=-1)


def ours(
    hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, cosine: bool, scale: float
) -> torch.Tensor:
    losses = linear_cross_entropy(hidden, Beside.start(rows, cosine), targets, 1, scale)
    return torch.where(targets > 0, losses, 0)


def solved(loss: Any, given: Problem, *options: Any) -> list[torch.Tensor]:
    """Losses, and the gradients of their weighted sum."""
    hidden, rows, targets, weights = given
    hidden, rows = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
    losses = loss(hidden, rows, targets, *options)
    (losses * weights).sum().backward()
    return [losses.detach(), hidden.grad, rows.grad]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


# Rows of 9 float32 logits: blocks of 5 of 30 candidates, of 7, of 1, and all at once.
@pytest.mark.parametrize("block_bytes", [4 * 9 * 5, 4 * 9 * 7, 1, 1 << 20])
@pytest.mark.parametrize(("cosine", "scale"), [(True, SCALE), (True, 200.0), (False, 1.0)])
def test_equals_the_plain_one(
    cosine: bool, scale: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "BLOCK_BYTES", block_bytes)
    asked = problem(9, 30, 8, torch.float64)
    expected = solved(plain, asked, cosine, scale)
    # Float64; logits of 200 make the exponentials' relative error 200 roundings.
    for found, wanted in zip(solved(ours, asked, cosine, scale), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [8, 6])  # 6: no kernel of FlashAttention takes it on CUDA
@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_products_are_as_exact_as_plain_ones(
    width: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(core, "_is_fused", lambda *_: False)
    asked = problem(60, 700, width, torch.float32)
    expected = solved(plain, asked, True, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        half = solved(plain, asked, True, SCALE)
        found = solved(ours, asked, True, SCALE)
    for name, one, other, exact in zip(
        ("loss", "hidden", "rows"), found, half, expected, strict=True
    ):
        assert one.dtype == torch.float32
        # Unit roundoff is 2^-8; blocks round as the plain path does, in another order.
        assert error(one, exact) < max(1.5 * error(other, exact), 2**-8), name


@pytest.mark.parametrize("cosine", [True, False])
def test_no_positions_times_items_matrix_is_stored(
    cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple) else (made,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    monkeypatch.setattr(core, "BLOCK_BYTES", 4 * 300 * 20)
    asked = problem(300, 400, 8, torch.float32)
    with Watch():
        solved(ours, asked, cosine, SCALE if cosine else 1.0)
    assert largest == (400 * 8 if cosine else 300 * 20)
    with Watch():
        solved(plain, asked, cosine, 1.0)
    assert largest == 300 * 400


def test_without_targets_gradients_are_zero() -> None:
    hidden, rows, targets, _ = problem(5, 30, 8, torch.float32)
    given = (hidden, rows, torch.zeros_like(targets), torch.zeros(5))
    losses, for_hidden, for_rows = solved(ours, given, True, SCALE)
    assert losses.tolist() == [0] * 5
    assert not for_hidden.any() and not for_rows.any()


@pytest.mark.parametrize("cosine", [True, False])
def test_without_positions_the_rows_gradient_is_zero(cosine: bool) -> None:
    losses, for_hidden, for_rows = solved(
        ours, problem(0, 30, 8, torch.float32), cosine, SCALE if cosine else 1.0
    )
    assert losses.shape == (0,) and for_hidden.shape == (0, 8)
    assert for_rows.shape == (30, 8) and not for_rows.any()


def test_large_dot_products_do_not_overflow() -> None:
    # Logits 200 and -200: their exponentials are not float32, the loss is 0 and 400.
    asked = (
        torch.tensor([[20.0], [20.0]]),
        torch.tensor([[10.0], [-10.0]]),
        torch.tensor([1, 2]),
        torch.ones(2),
    )
    losses, for_hidden, for_rows = solved(ours, asked, False, 1.0)
    assert losses.tolist() == [0, 400]
    assert for_hidden.tolist() == [[0], [20]] and for_rows.tolist() == [[20], [-20]]


def test_a_row_of_zeros_scores_zero() -> None:
    # Untrained tables may have one: cosines 0 and 1 at scale 1, the target is the zero row.
    hidden, rows = torch.tensor([[3.0, 0, 0, 0]]), torch.zeros(2, 4)
    rows[1, 0] = 5.0
    losses, _, for_rows = solved(ours, (hidden, rows, torch.tensor([1]), torch.ones(1)), True, 1.0)
    assert losses.item() == pytest.approx(math.log(1 + math.e), abs=1e-6)
    assert for_rows.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("width", [128, 64, 12])  # 12: blocks
@pytest.mark.parametrize("positions", [1, 26, 3000])
def test_flash_attention_on_cuda(width: int, positions: int) -> None:
    asked = problem(positions, 10_001, width, torch.float64)
    expected = solved(plain, asked, True, SCALE)
    hidden, rows, targets, weights = (part.cuda() for part in asked)
    with torch.autocast("cuda", torch.bfloat16):
        found = solved(ours, (hidden.float(), rows.float(), targets, weights), True, SCALE)
    for one, exact in zip(found, expected, strict=True):
        assert error(one.cpu().double(), exact) < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_queries_in_parts_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [part.cuda() for part in problem(700, 900, 64, torch.float32)]
    found = []
    for size in (700, 256):  # the last part has 188
        monkeypatch.setattr(core, "query_part", lambda *_, size=size: size)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(solved(ours, asked, True, SCALE))
    for whole, parts in zip(*found, strict=True):
        assert error(parts.double(), whole.double()) < 0.01


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (0, 0),
        (13_440, 13_440),  # 105 programs: the kernel divides the keys
        (13_441, 6_784),  # 106
        (15_104, 7_552),  # 118
        (15_105, 15_105),  # 119, of 132 in a round
        (20_000, 10_112),  # 157, of 264
        (33_792, 33_792),  # two whole rounds
        (40_960, 10_240),  # 320, of 396
        (125_000, 125_000),  # 977, of 1,056
    ],
)
def test_queries_in_whole_rounds_or_few_enough(count: int, size: int) -> None:
    assert core.query_part(count, 132) == size


@given(st.integers(0, 200_000), st.sampled_from((78, 108, 132)))
def test_parts_are_few_enough(count: int, processors: int) -> None:
    size = core.query_part(count, processors)
    if size != count:
        assert size % 128 == 0 and size <= 0.8 * 128 * processors
        assert (-(-count // size) - 1) * size < count
