"""The residual stream of a pre-norm transformer in half precision, a step in one pass over memory.

    enter      items (+ lines of a table) -> norm -> dropout -> stream -> norm -> normed
    add        stream, branch (+ its bias) -> stream + dropout(branch) -> norm -> normed

The stream is float32, what the norms hand to the next product is half precision. In plain torch a
step is a pass for each of bias, dropout, sum, norm and cast, and as many backward, which together
take longer than the matrix products between them. Kernels: :mod:`model.kernels.residual_kernels`.

Shapes: T rows, D width, L lines of a table.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from model.kernels import residual_kernels as kernels
from model.kernels import side_stream
from model.kernels.dropout_bits import Dropout, dropout_options
from model.kernels.residual_kernels import triton
from model.kernels.segment_sum import add_rows, sort_index

# Values that a program of a kernel holds of each tensor at a time; backward it holds more tensors.
_TILE, _GRADIENT_TILE = 2048, 1024
# Programs that sum gradients: as many as a large device runs at once, four a multiprocessor.
_PROGRAMS = 528
_WIDEST = 2048


def takes(items: torch.Tensor) -> bool:
    """Whether the stream of these items [T, D] may run so: on CUDA, inside bfloat16's autocast."""
    if triton is None or torch.compiler.is_compiling() or not items.is_cuda:
        return False
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return half and items.dtype == torch.float32 and items.shape[1] <= _WIDEST


def enter(
    items: torch.Tensor,
    table: torch.Tensor | None,
    line: torch.Tensor,
    outer: nn.LayerNorm,
    inner: nn.LayerNorm,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream's first values, and the same normalised.

    Args:
        items: float32 [T, D].
        table: float32 [L, D], of which line ``line`` (int64 [T]) is added; None: nothing is.
        outer, inner: the norms before and after the stream.
        dropout: behind the outer norm.
        dtype: of the normalised ones.

    Returns:
        float32 [T, D] and ``dtype`` [T, D].
    """
    epsilons = outer.eps, inner.eps
    norms = outer.weight, outer.bias, inner.weight, inner.bias
    return _Enter.apply(items.contiguous(), table, line, *norms, epsilons, dropout, dtype)


def add(
    stream: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    norm: nn.LayerNorm,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream with what a branch adds, and the same normalised.

    Args:
        stream: float32 [T, D].
        branch: any float [T, D].
        branch_bias: float32 [D], added to every row of the branch; None: nothing is.
        norm: behind the stream.
        dropout: on the branch with its bias.
        dtype: of the normalised ones.

    Returns:
        float32 [T, D] and ``dtype`` [T, D].
    """
    stream, branch = stream.contiguous(), branch.contiguous()
    return _Add.apply(stream, branch, branch_bias, norm.weight, norm.bias, norm.eps, dropout, dtype)


def _shape(rows: torch.Tensor, tile: int) -> tuple[int, int, int, int]:
    """T, D, rows and columns of a program's tile."""
    count, width = rows.shape
    columns = triton.next_power_of_2(width)
    return count, width, max(1, tile // columns), columns


def _partial(rows: torch.Tensor, sums: int) -> torch.Tensor:
    """Room for so many sums over the rows of each program: float32 [P, sums, D]."""
    count, width, block, _ = _shape(rows, _GRADIENT_TILE)
    programs = max(1, min(_PROGRAMS, triton.cdiv(count, block)))
    return torch.empty(programs, sums, width, device=rows.device)


def _given(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel wants some tensor even where it reads none."""
    return other if tensor is None else tensor.contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        items: torch.Tensor,
        table: torch.Tensor | None,
        line: torch.Tensor,
        outer_weight: torch.Tensor,
        outer_bias: torch.Tensor,
        inner_weight: torch.Tensor,
        inner_bias: torch.Tensor,
        epsilons: tuple[float, float],
        dropout: Dropout | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream, normed = torch.empty_like(items), torch.empty_like(items, dtype=dtype)
        count, width, block, columns = _shape(items, _TILE)
        seed, options = dropout_options(dropout, items)
        if count:
            kernels.enter[(triton.cdiv(count, block),)](
                items,
                _given(table, items),
                line,
                outer_weight,
                outer_bias,
                inner_weight,
                inner_bias,
                seed,
                stream,
                normed,
                count,
                width,
                block,
                columns,
                *epsilons,
                table is not None,
                **options,
            )
        ctx.save_for_backward(items, table, line, outer_weight, outer_bias, inner_weight)
        ctx.epsilons, ctx.dropout = epsilons, dropout
        if table is not None:
            lines = len(table)
            ctx.line = side_stream.start(lambda: sort_index(line, lines))
        ctx.set_materialize_grads(False)
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_stream: torch.Tensor | None, grad_normed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        items, table, line, outer_weight, outer_bias, inner_weight = ctx.saved_tensors
        grad_normed = torch.zeros_like(items) if grad_normed is None else grad_normed
        gradient, partial = torch.empty_like(items), _partial(items, 4)
        seed, options = dropout_options(ctx.dropout, items)
        kernels.enter_gradient[(len(partial),)](
            items,
            _given(table, items),
            line,
            outer_weight,
            outer_bias,
            inner_weight,
            seed,
            _given(grad_stream, items),
            grad_normed.contiguous(),
            gradient,
            partial,
            *_shape(items, _GRADIENT_TILE),
            *ctx.epsilons,
            table is not None,
            grad_stream is not None,
            **options,
        )
        of_table = None
        if table is not None:
            of_table = torch.zeros_like(table)
            add_rows(of_table, ctx.line.result(), gradient)
        return gradient, of_table, None, *partial.sum(dim=0).unbind(), None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: torch.Tensor,
        branch: torch.Tensor,
        branch_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
        dropout: Dropout | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = torch.empty_like(stream), torch.empty_like(stream, dtype=dtype)
        count, width, block, columns = _shape(stream, _TILE)
        seed, options = dropout_options(dropout, stream)
        if count:
            kernels.add[(triton.cdiv(count, block),)](
                stream,
                branch,
                _given(branch_bias, stream),
                weight,
                bias,
                seed,
                total,
                normed,
                count,
                width,
                block,
                columns,
                epsilon,
                branch_bias is not None,
                **options,
            )
        ctx.save_for_backward(total, weight)
        ctx.epsilon, ctx.dropout, ctx.dtype = epsilon, dropout, branch.dtype
        ctx.has_bias = branch_bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: torch.Tensor | None, grad_normed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed
        gradient, partial = torch.empty_like(total), _partial(total, 3)
        of_branch = torch.empty_like(total, dtype=ctx.dtype)
        seed, options = dropout_options(ctx.dropout, total)
        kernels.add_gradient[(len(partial),)](
            total,
            weight,
            seed,
            _given(grad_total, total),
            grad_normed.contiguous(),
            gradient,
            of_branch,
            partial,
            *_shape(total, _GRADIENT_TILE),
            ctx.epsilon,
            grad_total is not None,
            **options,
        )
        of_weight, of_bias, of_branch_bias = partial.sum(dim=0).unbind()
        of_branch_bias = of_branch_bias if ctx.has_bias else None
        return gradient, of_branch, of_branch_bias, of_weight, of_bias, None, None, None
