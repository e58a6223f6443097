"""Rows at length 1 and their gradients: by hand, and the kernels on CUDA against plain torch."""

import pytest
import torch

from model.kernels import l2_normalize
from model.kernels.l2_normalize import join_gradients, normalize_rows, normalize_rows_gradient

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_rows_at_length_1_and_their_gradient_by_hand() -> None:
    unit, inverse = normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.float32)
    assert unit.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert inverse[0] == pytest.approx(0.2)
    gradient = normalize_rows_gradient(
        torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([0.2, 1.0]), unit
    )
    # (I - u u^T) g / |row|: g = (1, 0), u = (.6, .8), |row| = 5
    assert gradient[0].tolist() == [pytest.approx(0.2 * 0.64), pytest.approx(-0.2 * 0.48)]


def test_gradient_equals_autograds() -> None:
    rows = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 8, dtype=torch.float64)
    (torch.nn.functional.normalize(rows, dim=-1) * weights).sum().backward()
    unit, inverse = normalize_rows(rows.detach(), torch.float64)
    torch.testing.assert_close(normalize_rows_gradient(weights, inverse, unit), rows.grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_unit_rows_have_the_gradient_of_normalize(device: str) -> None:
    given, weights = torch.randn(2, 9, 12, device=device).unbind()
    found, expected = (given.clone().requires_grad_() for _ in range(2))
    unit = l2_normalize._Unit.apply(found)  # plain torch on a CPU, kernels on CUDA
    plain = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(unit, plain)
    (unit * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_second_parts_gradient_has_space_for_the_first_parts() -> None:
    whole, mixed, first = torch.randn(7, 4), torch.randn(5, 4), torch.randn(2, 4)
    unit, inverse = normalize_rows(whole[2:], torch.float32)
    second = normalize_rows_gradient(mixed, inverse, unit, before=2 * 4)
    own_unit, _ = normalize_rows(whole[2:].clone(), torch.float32)
    assert torch.equal(second, normalize_rows_gradient(mixed, inverse, own_unit))
    expected = torch.cat([first, second])
    joined = join_gradients(first, second)
    assert torch.equal(joined, expected) and joined.data_ptr() == second.data_ptr() - 2 * 4 * 4
    assert torch.equal(join_gradients(first, second.clone()), expected)


def test_only_a_gradient_has_space_before_it() -> None:
    """Rows 2 to 6 of 7: the unit rows take the memory of 5, the gradient that of all."""
    whole = torch.randn(7, 4, requires_grad=True)
    gradients = []
    rows = whole[2:]
    rows.register_hook(gradients.append)
    unit = l2_normalize._Unit.apply(rows)
    assert unit.untyped_storage().nbytes() == 5 * 4 * 4
    unit.sum().backward()
    assert gradients[0].untyped_storage().nbytes() == 7 * 4 * 4


@cuda
@pytest.mark.parametrize("width", [4, 60, 128, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_plain_torch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows, mixed = (torch.randn(1003, width, generator=generator) for _ in range(2))
    rows[7] = 0
    scale = torch.rand(1003, generator=generator)
    unit, inverse = normalize_rows(rows.double(), torch.float64)
    found, found_inverse = normalize_rows(rows.cuda(), dtype)
    assert found.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert float((found.cpu().double() - unit).norm() / unit.norm()) < limit
    rest = torch.arange(1003) != 7  # its inverse is 1e12
    torch.testing.assert_close(found_inverse.cpu()[rest].double(), inverse[rest], rtol=1e-5, atol=0)
    expected = normalize_rows_gradient(mixed.double(), scale.double(), unit)
    gradient = normalize_rows_gradient(mixed.cuda().to(dtype), scale.cuda(), found).cpu().double()
    assert float((gradient - expected).norm() / expected.norm()) < limit
