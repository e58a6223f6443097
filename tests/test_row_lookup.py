"""Rows by their ids, and zeros for id -1."""

import pytest
import torch

from model.tables.row_lookup import rows_or_zeros

CUDA = torch.cuda.is_available()
PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs CUDA"))]


@pytest.mark.parametrize("device", PLACES)
def test_rows_of_ids_and_zeros_for_minus_1(device: str) -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    ids = torch.tensor([2, -1, 0, 2], device=device)
    found = rows_or_zeros(table, ids)
    assert found.tolist() == [[5, 6], [0, 0], [1, 2], [5, 6]]
    assert rows_or_zeros(table, ids[:0]).shape == (0, 2)


@pytest.mark.parametrize("device", PLACES)
def test_fp16_rows_are_converted_when_they_are_wanted_as_float32(device: str) -> None:
    table = torch.tensor([[1.0, 2.0**-24], [3.0, -65504.0]], device=device).half()
    ids = torch.tensor([1, -1, 0], device=device)
    for dtype in (torch.float32, torch.float16):
        found = rows_or_zeros(table, ids, dtype)
        assert found.dtype == dtype
        assert found.tolist() == [[3, -65504], [0, 0], [1, 2**-24]]


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("width", [1, 60, 128, 384, 1500])
@pytest.mark.parametrize("count", [1, 7, 9001])
def test_the_kernel_copies(count: int, width: int) -> None:
    torch.manual_seed(count)
    table = torch.randn(50, width, device="cuda")
    ids = torch.randint(-1, 50, (count,), device="cuda")
    expected = torch.cat([table, torch.zeros_like(table[:1])])[ids]
    assert rows_or_zeros(table, ids).equal(expected)
