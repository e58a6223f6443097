"""Linear layers in bfloat16, and bias, GELU and dropout between two of them.

Unlike autocast, this casts a weight once for both passes, and its gradient is float32.

Shapes: T rows, D and N widths, P programs.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.compiler import launch, tl, triton
from model.kernels.random_bits import Dropout, drop

# Programs that sum over rows: as many as a large device runs at once, four per multiprocessor;
# ``column_sum``, a smaller kernel, runs twice as many.
SUMMING_PROGRAMS = 528
# Rows and columns that a program holds at a time where it adds up the sums of such programs.
_FINAL_TILE = 256, 8


def linear(module: nn.Linear, rows: Tensor, with_bias: bool = True) -> Tensor:
    """``module(rows)``, [T, D] -> [T, N], with or without its bias.

    bfloat16 rows on CUDA are multiplied in bfloat16, even outside of autocast.
    """
    weight, bias = module.weight, module.bias if with_bias else None
    fits = rows.is_cuda and rows.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if triton is None or not fits:
        return F.linear(rows, weight, bias)
    return _Linear.apply(rows.contiguous(), weight, bias)


def gelu_dropout(hidden: Tensor, bias: Tensor, dropout: Dropout | None) -> Tensor:
    """dropout(tanh GELU(hidden + bias)), half precision [T, N] on CUDA; bias float32 [N]."""
    return _GeluDropout.apply(hidden.contiguous(), bias, dropout)


def column_sum(rows: Tensor) -> Tensor:
    """Rows [T, N] (contiguous on CUDA) summed to float32 [N]; the same bits in every run."""
    partial, grid = _partial(rows, 2 * SUMMING_PROGRAMS)
    launch(_column_sum, grid, rows, partial, *rows.shape, _BLOCK.value, _COLUMNS.value)
    return sum_partial(partial)


def sum_partial(partial: Tensor) -> Tensor:
    """float32 [P, ...], contiguous on CUDA, summed over P; the same bits in every run.

    torch's sum gives each column to few threads, and takes several times as long.
    """
    total = partial.new_empty(partial.shape[1:])
    sizes, (block, columns) = (len(partial), total.numel()), _FINAL_TILE
    grid = 1, triton.cdiv(total.numel(), columns)
    launch(_column_sum, grid, partial, total, *sizes, block, columns)
    return total


def _partial(rows: Tensor, programs: int) -> tuple[Tensor, tuple[int, int]]:
    """Memory for the sum of each program's rows, float32 [P, N], P about ``programs``; the grid."""
    count, width = rows.shape
    parts = triton.cdiv(width, _COLUMNS)
    programs = max(1, min(triton.cdiv(count, _BLOCK), programs // parts))
    return torch.empty(programs, width, device=rows.device), (programs, parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        ctx.has_bias = bias is not None
        return F.linear(rows, weight, None if bias is None else bias.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_bias = column_sum(grad) if ctx.has_bias else None
        if len(rows):
            of_weight = torch.mm(grad.t(), rows, out_dtype=torch.float32)  # not rounded afterwards
        else:
            of_weight = torch.zeros(weight.shape, device=rows.device)
        of_rows = grad @ weight if ctx.needs_input_grad[0] else None
        return of_rows, of_weight, of_bias


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor, dropout: Dropout | None) -> Tensor:
        result = torch.empty_like(hidden)
        count, width = hidden.shape
        if count:
            grid = triton.cdiv(count, _BLOCK), triton.cdiv(width, _COLUMNS)
            launch(_gelu, grid, hidden, bias, result, count, width, dropout)
        ctx.save_for_backward(hidden, bias)
        ctx.dropout = dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, bias = ctx.saved_tensors
        gradient, (partial, grid) = torch.empty_like(hidden), _partial(hidden, SUMMING_PROGRAMS)
        tensors = hidden, bias, grad.contiguous(), gradient, partial
        launch(_gelu_gradient, grid, *tensors, *hidden.shape, ctx.dropout)
        return gradient, sum_partial(partial), None


if triton is not None:
    # Rows and columns that a program holds at a time.
    _BLOCK, _COLUMNS = tl.constexpr(16), tl.constexpr(128)

    @triton.jit
    def _gate(values):
        """Half of 1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))."""
        inner = 0.7978845608028654 * values * (1.0 + 0.044715 * values * values)
        return 1.0 / (1.0 + tl.exp(-2.0 * inner))

    @triton.jit
    def _gelu(hidden, bias, result, count, width, dropout) -> None:
        row = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
        column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
        wide = column < width
        at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
        values = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(bias + column, mask=wide, other=0.0)
        values *= _gate(values)
        values = drop(values, dropout, row, column)
        tl.store(result + at, values, mask=inside)

    @triton.jit
    def _gelu_gradient(hidden, bias, grad, gradient, partial, count, width, dropout) -> None:
        column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
        wide = column < width
        added = tl.load(bias + column, mask=wide, other=0.0)
        sums = tl.zeros([_BLOCK, _COLUMNS], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(count, _BLOCK), tl.num_programs(0)):
            row = (tile * _BLOCK + tl.arange(0, _BLOCK)).to(tl.int64)
            at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
            slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            values = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32) + added
            gate = _gate(values)
            steep = 1.5957691216057308 * (1.0 + 0.134145 * values * values)
            slope *= gate + values * gate * (1.0 - gate) * steep
            slope = drop(slope, dropout, row, column)
            sums += slope
            tl.store(gradient + at, slope, mask=inside)
        tl.store(partial + tl.program_id(0) * width + column, tl.sum(sums, axis=0), mask=wide)

    @triton.jit
    def _column_sum(
        rows, partial, count, width, block: tl.constexpr, columns: tl.constexpr
    ) -> None:
        column = tl.program_id(1) * columns + tl.arange(0, columns)
        sums = tl.zeros([block, columns], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(count, block), tl.num_programs(0)):
            row = (tile * block + tl.arange(0, block)).to(tl.int64)
            inside = (row[:, None] < count) & (column < width)
            at = row[:, None] * width + column
            sums += tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        at = partial + tl.program_id(0) * width + column
        tl.store(at, tl.sum(sums, axis=0), mask=column < width)
