"""Maxima of chunks: by hand, and the kernel on CUDA against plain torch."""

import pytest
import torch

from model.evaluation.chunk_maxima import chunk_maxima


def test_each_chunk_of_a_row_has_its_maximum() -> None:
    values = torch.tensor([[1.0, 3.0, -torch.inf, -2.0], [0.0, -1.0, -torch.inf, -torch.inf]])
    assert chunk_maxima(values, 2).tolist() == [[3.0, -2.0], [0.0, -torch.inf]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("rows", "chunks", "chunk"), [(1, 1, 64), (7, 33, 64), (3, 5, 2)])
def test_the_kernel_equals_torch(rows: int, chunks: int, chunk: int) -> None:
    values = torch.randn(rows, chunks * chunk)
    values[0, :chunk] = -torch.inf
    assert torch.equal(chunk_maxima(values.cuda(), chunk).cpu(), chunk_maxima(values, chunk))
