"""The largest value of each chunk of columns.

Torch's reduction of so few columns reads at a quarter of an H200's memory bandwidth; a kernel takes
its place on CUDA.

Shapes: U rows, C columns.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

import torch
from torch import Tensor

from model.kernels.compiler import launch, row_tiles, tl, triton


def chunk_maxima(values: Tensor, chunk: int) -> Tensor:
    """float32 [U, C / chunk] of contiguous float32 [U, C]."""
    chunks = values.view(-1, chunk)
    if triton is None or not values.is_cuda:
        return chunks.amax(dim=1).view(len(values), -1)
    maxima = torch.empty(len(chunks), device=values.device)
    tiles, *tile = row_tiles(chunks.shape, values=4096)
    launch(_maxima, (tiles,), chunks, maxima, *chunks.shape, *tile)
    return maxima.view(len(values), -1)


if triton is not None:

    @triton.jit
    def _maxima(chunks, maxima, count, width, block: tl.constexpr, columns: tl.constexpr) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)
        inside = (row[:, None] < count) & (column < width)
        at = chunks + row[:, None] * width + column
        values = tl.load(at, mask=inside, other=float("-inf"))
        tl.store(maxima + row, tl.max(values, axis=1), mask=row < count)
