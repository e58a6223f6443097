"""Products in half precision, and GELU and dropout between them: on CUDA against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.kernels.bf16_linear import column_sum, gelu_dropout, linear
from model.kernels.random_bits import new_dropouts

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels need CUDA")


def normal(*shape: int) -> torch.Tensor:
    """Bfloat16's, on CUDA."""
    return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def test_full_precision_equals_the_module() -> None:
    module, rows = nn.Linear(8, 6), torch.randn(5, 8)
    assert linear(module, rows).equal(module(rows))
    assert linear(module, rows, with_bias=False).equal(rows @ module.weight.T)


@needs_cuda
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3001])
def test_linear_in_half_precision(count: int, with_bias: bool) -> None:
    module, rows = nn.Linear(64, 96, device="cuda"), normal(count, 64)
    found = linear(module, rows, with_bias)
    weights = torch.randn(count, 96, device="cuda").bfloat16()
    found.backward(weights)
    assert found.dtype == rows.grad.dtype == torch.bfloat16
    assert module.weight.grad.dtype == torch.float32
    exact = rows.detach().double().requires_grad_()
    half = module.weight.detach().bfloat16().double().requires_grad_()
    bias = module.bias.detach().bfloat16().double().requires_grad_()
    expected = F.linear(exact, half, bias if with_bias else None)
    expected.backward(weights.double())
    assert error(found, expected) < 4e-3
    assert error(rows.grad, exact.grad) < 4e-3
    assert error(module.weight.grad, half.grad) < 1e-4  # bfloat16 would be 2e-3
    if with_bias:
        assert error(module.bias.grad, bias.grad) < 5e-6
    else:
        assert module.bias.grad is None


@needs_cuda
@pytest.mark.parametrize("width", [60, 64, 768, 1000, 1024])
@pytest.mark.parametrize("count", [0, 1, 1003, 30001])
def test_column_sums_are_exact_and_the_same_in_every_run(count: int, width: int) -> None:
    torch.full((1 << 24,), torch.nan, device="cuda")  # what is not written is no harmless zero
    rows = normal(count, width).detach()
    found = column_sum(rows)
    assert error(found, rows.double().sum(dim=0)) < 5e-6
    assert found.equal(column_sum(rows))


@needs_cuda
@pytest.mark.parametrize("width", [64, 384, 1000, 1024])
@pytest.mark.parametrize("count", [0, 1, 3001])
def test_gelu_and_its_gradients_are_those_of_float64(count: int, width: int) -> None:
    torch.full((1 << 24,), torch.nan, device="cuda")  # what is not written is no harmless zero
    hidden, bias = normal(count, width), torch.randn(width, device="cuda").requires_grad_()
    weights = torch.randn(count, width, device="cuda").bfloat16()
    found = gelu_dropout(hidden, bias, None)
    found.backward(weights)
    exact, added = (each.detach().double().requires_grad_() for each in (hidden, bias))
    expected = F.gelu(exact + added, approximate="tanh")
    expected.backward(weights.double())
    assert error(found, expected) < 4e-3
    assert error(hidden.grad, exact.grad) < 4e-3
    assert error(bias.grad, added.grad) < 1e-5


@needs_cuda
def test_gelu_drops_the_same_values_backward() -> None:
    (dropout,) = new_dropouts(0.2, 1, torch.device("cuda"))
    hidden = torch.full((3001, 1000), 8.0, device="cuda").bfloat16().requires_grad_()
    found = gelu_dropout(hidden, torch.zeros(1000, device="cuda"), dropout)
    found.backward(torch.ones_like(found))
    assert (found / 8).equal(hidden.grad)  # GELU is the identity there
    assert abs(float((found == 0).double().mean()) - 0.2) < 5 * (0.2 * 0.8 / found.numel()) ** 0.5
    assert found.unique().tolist() == [0, 10]
