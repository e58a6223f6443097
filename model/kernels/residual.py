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
from model.kernels.compiler import row_tiles, triton
from model.kernels.dropout_bits import Dropout
from model.kernels.segment_sum import add_rows, sort_index

# Values of each tensor that a program holds at a time; backward it holds more tensors.
_TILE, _GRADIENT_TILE = 2048, 1024
# Programs that sum gradients: as many as a large device runs at once, four per multiprocessor.
_PROGRAMS = 528
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
        table: float32 [L, D], of which row ``line`` (int64 [T]) is added to each item; or None.
        outer, inner: the norms before and after the stream; dropout follows the outer one.
    """
    epsilons = outer.eps, inner.eps
    norms = outer.weight, outer.bias, inner.weight, inner.bias
    return _Enter.apply(items.contiguous(), table, line, epsilons, dropout, dtype, *norms)


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
        branch_bias: float32 [D].
        norm: the norm after the sum.
    """
    stream, branch = stream.contiguous(), branch.contiguous()
    return _Add.apply(stream, branch, branch_bias, norm.weight, norm.bias, norm.eps, dropout, dtype)


def _partial(rows: Tensor, sums: int) -> tuple[Tensor, tuple[int, ...]]:
    """Memory for ``sums`` sums over a program's rows: float32 [P, sums, D]; the kernel's sizes."""
    tiles, *tile = row_tiles(rows.shape, _GRADIENT_TILE)
    programs = max(1, min(_PROGRAMS, tiles))
    return torch.empty(programs, sums, rows.shape[1], device=rows.device), (*rows.shape, *tile)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        items: Tensor,
        table: Tensor | None,
        line: Tensor,
        epsilons: tuple[float, float],
        dropout: Dropout | None,
        dtype: torch.dtype,
        *norms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        stream, normed = torch.empty_like(items), torch.empty_like(items, dtype=dtype)
        given, results = (items, _contiguous(table), line, *norms), (stream, normed)
        tiles, *tile = row_tiles(items.shape, _TILE)
        if tiles:
            sizes = *items.shape, *tile
            kernels.enter[(tiles,)](*given, *results, *sizes, *epsilons, dropout)
        ctx.save_for_backward(*given[:-1])  # not the inner norm's bias
        ctx.epsilons, ctx.dropout = epsilons, dropout
        if table is not None:
            lines = len(table)
            ctx.line = side_stream.start(lambda: sort_index(line, lines))
        ctx.set_materialize_grads(False)
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_stream: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        items, table, *_ = ctx.saved_tensors
        grad_normed = torch.zeros_like(items) if grad_normed is None else grad_normed.contiguous()
        gradient, (partial, sizes) = torch.empty_like(items), _partial(items, 4)
        grads = _contiguous(grad_stream), grad_normed, gradient, partial
        tensors = *ctx.saved_tensors, *grads
        kernels.enter_gradient[(len(partial),)](*tensors, *sizes, *ctx.epsilons, ctx.dropout)
        of_table = None
        if table is not None:
            of_table = torch.zeros_like(table)
            add_rows(of_table, ctx.line.result(), gradient)
        return gradient, of_table, None, None, None, None, *partial.sum(dim=0).unbind()


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        dropout: Dropout | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        total, normed = torch.empty_like(stream), torch.empty_like(stream, dtype=dtype)
        tiles, *tile = row_tiles(stream.shape, _TILE)
        if tiles:
            tensors = stream, branch, _contiguous(branch_bias), weight, bias, total, normed
            sizes = *stream.shape, *tile
            kernels.add[(tiles,)](*tensors, *sizes, epsilon, dropout)
        ctx.save_for_backward(total, weight)
        ctx.epsilon, ctx.dropout, ctx.dtype = epsilon, dropout, branch.dtype
        ctx.has_bias = branch_bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed.contiguous()
        gradient, (partial, sizes) = torch.empty_like(total), _partial(total, 3)
        of_branch = torch.empty_like(total, dtype=ctx.dtype)
        tensors = total, weight, _contiguous(grad_total), grad_normed, gradient, of_branch, partial
        kernels.add_gradient[(len(partial),)](*tensors, *sizes, ctx.epsilon, ctx.dropout)
        of_weight, of_bias, added = partial.sum(dim=0).unbind()
        of_branch_bias = added if ctx.has_bias else None
        return gradient, of_branch, of_branch_bias, of_weight, of_bias, None, None, None
