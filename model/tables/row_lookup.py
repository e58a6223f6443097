"""Look up rows of a table by their ids; id -1 gives zeros.

Shapes: T ids, R rows, D width.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

import torch

from model.kernels.compiler import launch, row_tiles, tl, triton

# Values that a program of the kernel holds at a time.
_TILE = 1024


def rows_or_zeros(
    table: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rows [T, D] of ``table`` [R, D], contiguous, at ``ids``, int64 [T] from -1 to R - 1.

    The table is float32 or fp16, the rows are of ``dtype``.
    """
    if triton is None or not table.is_cuda or not len(ids):
        found = table.index_select(0, ids.clamp(min=0)).masked_fill_((ids < 0)[:, None], 0)
        return found.to(dtype)
    found = table.new_empty(len(ids), table.shape[1], dtype=dtype)
    tiles, *tile = row_tiles(found.shape, _TILE)
    launch(_rows_or_zeros, (tiles,), table, ids, found, *found.shape, *tile)
    return found


if triton is not None:

    @triton.jit
    def _rows_or_zeros(
        table, ids, found, count, width, block: tl.constexpr, columns: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)[None]
        wanted = tl.load(ids + row, mask=row < count, other=-1)[:, None]
        there = (wanted >= 0) & (column < width)
        value = tl.load(table + wanted * width + column, mask=there, other=0.0)
        inside = (row < count)[:, None] & (column < width)
        tl.store(
            found + row[:, None] * width + column, value.to(found.dtype.element_ty), mask=inside
        )
