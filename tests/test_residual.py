"""The residual stream's kernels on CUDA against plain torch; skipped where there is no CUDA."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.kernels import residual
from model.kernels.random_bits import Dropout, new_dropouts
from model.network.config import EncoderConfig
from model.network.encoder import Encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels need CUDA")

Tensors = list[torch.Tensor]


def norm_of(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, device="cuda")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def doubled(tensors: Tensors) -> Tensors:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def solved(outputs: Tensors, inputs: Tensors) -> Tensors:
    """Outputs, and gradients of their sum with fixed weights that bfloat16 has."""
    torch.manual_seed(5)
    weights = [torch.randn(each.shape, device="cuda").bfloat16() for each in outputs]
    weights = [each.to(output.dtype) for each, output in zip(weights, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def assert_close(found: Tensors, expected: Tensors) -> None:
    """Within 5e-6 of the norm, for bfloat16 within its rounding error, 4e-3."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        limit = 4e-3 if one.dtype == torch.bfloat16 else 5e-6
        assert float((one - other).norm()) <= limit * float(other.norm())


@pytest.fixture(autouse=True)
def nothing_unwritten_is_zero() -> None:
    torch.manual_seed(0)
    torch.full((1 << 24,), torch.nan, device="cuda")


@pytest.mark.parametrize("width", [64, 100, 128, 256, 384, 2048])
@pytest.mark.parametrize("count", [0, 1, 1003, 9001])
def test_add_equals_plain_torch(count: int, width: int) -> None:
    norm = norm_of(width)
    stream, bias = normal(count, width), normal(width)
    branch = normal(count, width, dtype=torch.bfloat16)
    inputs = [stream, branch, bias, norm.weight, norm.bias]
    found = residual.add(stream, branch, bias, norm, None, torch.bfloat16)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16]
    exact = doubled(inputs)
    total = exact[0] + exact[1] + exact[2]
    normed = F.layer_norm(total, (width,), exact[3], exact[4], norm.eps)
    assert_close(solved([*found], inputs), solved([total, normed], exact))


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("width", [64, 100, 128, 256, 384])
@pytest.mark.parametrize("count", [0, 1, 1003, 9001])
def test_enter_equals_plain_torch(count: int, width: int, has_table: bool) -> None:
    outer, inner = norm_of(width), norm_of(width)
    items = normal(count, width)
    table = normal(20, width) if has_table else None
    line = torch.randint(20, (count,), device="cuda")
    norms = [outer.weight, outer.bias, inner.weight, inner.bias]
    inputs = [items, *norms] if table is None else [items, *norms, table]
    found = residual.enter(items, table, line, outer, inner, None, torch.bfloat16)
    exact = doubled(inputs)
    summed = exact[0] if table is None else exact[0] + exact[5][line]
    stream = F.layer_norm(summed, (width,), exact[1], exact[2], outer.eps)
    normed = F.layer_norm(stream, (width,), exact[3], exact[4], inner.eps)
    assert_close(solved([*found], inputs), solved([stream, normed], exact))


def test_an_unused_result_has_no_gradient() -> None:
    norm, stream = norm_of(64), normal(30, 64)
    branch = normal(30, 64, dtype=torch.bfloat16)
    _, found = residual.add(stream, branch, None, norm, None, torch.float32)
    exact = doubled([stream, branch])
    expected = F.layer_norm(exact[0] + exact[1], (64,), norm.weight.double(), norm.bias.double())
    assert_close(solved([found], [stream, branch]), solved([expected], exact))


def masks(dropout: Dropout, count: int, width: int) -> Tensors:
    """Dropout's factors of a branch's values, forward and backward."""
    stream, norm = torch.zeros(count, width, device="cuda"), nn.LayerNorm(width, device="cuda")
    branch = torch.ones(count, width, device="cuda").requires_grad_()
    total, _ = residual.add(stream, branch, None, norm, dropout, torch.bfloat16)
    (gradient,) = torch.autograd.grad(total, branch, torch.ones_like(total))
    return [total.detach(), gradient]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(share: float) -> None:
    one, other = new_dropouts(share, 2, torch.device("cuda"))
    forward, backward = masks(one, 5000, 384)
    assert forward.equal(backward)
    assert forward.unique().tolist() == [0, pytest.approx(1 / (1 - share))]
    deviation = (share / (1 - share) / forward.numel()) ** 0.5
    assert abs(float(forward.double().mean()) - 1) < 5 * deviation
    for elsewhere in (masks(other, 5000, 384)[0], forward.roll(1, 0), forward.roll(1, 1)):
        covariance = float(((forward - 1) * (elsewhere - 1)).double().mean())
        assert abs(covariance) < 5 * share / (1 - share) / forward.numel() ** 0.5  # independent


def test_dropout_behind_the_first_norm_is_the_same_backward() -> None:
    (dropout,) = new_dropouts(0.3, 1, torch.device("cuda"))
    outer, inner = norm_of(256), norm_of(256)
    items, line = normal(3001, 256), torch.zeros(3001, dtype=torch.int64, device="cuda")
    inputs = [items, outer.weight, outer.bias]
    stream, _ = residual.enter(items, None, line, outer, inner, dropout, torch.bfloat16)
    exact = doubled(inputs)
    mask = masks(dropout, 3001, 256)[0].double()  # the same seed, the same places
    expected = F.layer_norm(exact[0], (256,), exact[1], exact[2], outer.eps) * mask
    assert_close(solved([stream], inputs), solved([expected], exact))


def test_a_replayed_graph_draws_new_masks_that_follow_the_seed() -> None:
    def draw() -> torch.Tensor:
        (dropout,) = new_dropouts(0.5, 1, torch.device("cuda"))
        return masks(dropout, 100, 64)[0]

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw()
    found = []
    for seed in (1, None, 2, 1):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        found.append(drawn.clone())
    assert found[0].equal(found[3])
    assert not any(found[0].equal(each) for each in found[1:3])
    torch.cuda.manual_seed(1)
    assert found[0].equal(draw())


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_encoder_equals_the_plain_one(
    num_layers: int, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncoderConfig(64, 2, num_layers, dropout=0.0, learned_positions=learned)
    encoder = Encoder(config, max_len=40).cuda().train()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.15)
    offsets = torch.tensor([0, 40, 47, 47, 70, 71], device="cuda")
    items, masked = normal(71, 64), torch.tensor([1, 3, 40, 69, 70], device="cuda")

    def encoded(fused: bool) -> Tensors:
        monkeypatch.setattr(residual, "takes", lambda _: fused)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            hidden = encoder(items, offsets, masked, longest=40)
        assert hidden.dtype == torch.float32
        return solved([hidden], [items, *encoder.parameters()])

    for one, other in zip(encoded(True), encoded(False), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02  # both are rounded to bfloat16


def test_the_kernels_run_only_inside_autocast() -> None:
    items = torch.zeros(3, 64, device="cuda")
    assert not residual.takes(items)
    with torch.autocast("cuda", torch.bfloat16):
        assert residual.takes(items)
        assert not residual.takes(items.cpu())
        assert not residual.takes(items.half())
