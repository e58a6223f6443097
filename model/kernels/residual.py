"""The residual stream of a pre-norm transformer in half precision, one kernel for each step.

    enter      items (+ rows of a table) -> norm -> dropout -> stream -> norm -> normed
    add        stream + dropout(branch (+ its bias)) -> stream -> norm -> normed

The stream is float32; the normed rows, which the next product reads, are half precision. In plain
torch these passes over memory take longer than the matrix products between them.

Shapes: T rows, D width, L rows of a table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels import residual_kernels as kernels
from model.kernels import side_stream
from model.kernels.bf16_linear import SUMMING_PROGRAMS, sum_partial
from model.kernels.compiler import launch, triton
from model.kernels.random_bits import Dropout
from model.kernels.segment_sum import add_rows, sort_index

# Values of each tensor that a program holds at a time; backward it holds more tensors.
_TILE, _GRADIENT_TILE = 2048, 1024
_WIDEST = 2048


def takes(items: Tensor) -> bool:
    """Whether the kernels accept these items [T, D]: on CUDA, inside bfloat16 autocast."""
    if triton is None or not items.is_cuda:
        return False
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return half and items.dtype == torch.float32 and items.shape[1] <= _WIDEST


def enter(
    items: Tensor,
    table: Tensor | None,
    line: Tensor,
    outer: nn.LayerNorm,
    inner: nn.LayerNorm,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The stream's first values, float32 [T, D], and the same normalised, ``dtype`` [T, D].

    Args:
        items: float32 [T, D].
        table: float32 [L, D], contiguous: row ``line`` (int64 [T]) is added to each item; or None.
        outer, inner: the norms before and after the stream; dropout follows the outer one.
    """
    options = (outer.eps, inner.eps), dropout
    norms = outer.weight, outer.bias, inner.weight, inner.bias
    return _Enter.apply(options, dtype, items.contiguous(), table, line, *norms)


def add(
    stream: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The stream with a branch added, float32 [T, D], and the same normalised, ``dtype`` [T, D].

    Args:
        stream: float32 [T, D].
        branch: any float [T, D]; dropout applies to the branch with its bias.
        branch_bias: float32 [D], contiguous.
        norm: the norm after the sum.
    """
    given = stream.contiguous(), branch.contiguous(), branch_bias, norm.weight, norm.bias
    return _Add.apply((norm.eps, dropout), dtype, *given)


def _memory(
    rows: Tensor, sums: int, grad_stream: Tensor | None, grad_normed: Tensor | None
) -> tuple[tuple[Tensor | None, Tensor, Tensor], Tensor, kernels.Tiles]:
    """The gradients that a backward kernel reads and writes, its sums [P, sums, D], and tiles."""
    stream = None if grad_stream is None else grad_stream.contiguous()
    normed = torch.zeros_like(rows) if grad_normed is None else grad_normed.contiguous()
    number, tiles = kernels.tiles_of(rows.shape, _GRADIENT_TILE)
    gradient, programs = torch.empty_like(rows), max(1, min(SUMMING_PROGRAMS, number))
    partial = torch.empty(programs, sums, rows.shape[1], device=rows.device)
    return (stream, normed, gradient), partial, tiles


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], dtype: torch.dtype, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        items, table, line, *_ = tensors
        results = torch.empty_like(items), torch.empty_like(items, dtype=dtype)
        number, tiles = kernels.tiles_of(items.shape, _TILE)
        if number:
            launch(kernels.enter, (number,), tensors[:3], tensors[3:], results, tiles, *options)
        ctx.save_for_backward(*tensors[:-1])  # not the inner norm's bias
        ctx.options = options
        if table is not None:
            lines = len(table)
            ctx.line = side_stream.start(lambda: sort_index(line, lines))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        items, table, *_ = ctx.saved_tensors
        grads, partial, tiles = _memory(items, 4, *grads_of_results)
        given = ctx.saved_tensors, grads, partial, tiles
        launch(kernels.enter_gradient, (len(partial),), *given, *ctx.options)
        gradient, of_table = grads[-1], None
        side_stream.mark(gradient)
        if table is not None:
            of_table = torch.zeros_like(table)
            add_rows(of_table, ctx.line.result(), gradient)
        return None, None, gradient, of_table, None, *sum_partial(partial).unbind()


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], dtype: torch.dtype, *given: Any
    ) -> tuple[Tensor, Tensor]:
        stream, branch, branch_bias, weight, _ = given
        results = torch.empty_like(stream), torch.empty_like(stream, dtype=dtype)
        number, tiles = kernels.tiles_of(stream.shape, _TILE)
        if number:
            launch(kernels.add, (number,), given, results, tiles, *options)
        ctx.save_for_backward(results[0], weight)
        ctx.options, ctx.dtype, ctx.has_bias = options, branch.dtype, branch_bias is not None
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        total, _ = ctx.saved_tensors
        grads, partial, tiles = _memory(total, 3, *grads_of_results)
        of_branch = torch.empty_like(total, dtype=ctx.dtype)
        given = ctx.saved_tensors, (*grads, of_branch), partial, tiles
        launch(kernels.add_gradient, (len(partial),), *given, *ctx.options)
        of_weight, of_bias, added = sum_partial(partial).unbind()
        of_branch_bias = added if ctx.has_bias else None
        return None, None, grads[-1], of_branch, of_branch_bias, of_weight, of_bias
