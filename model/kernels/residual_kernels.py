"""The Triton kernels of :mod:`model.kernels.residual`: each one pass over memory.

Backward kernels compute means and deviations again: the row is in registers anyway. Each program
writes its sums of gradients to ``partial``, to be added up in order: the same bits in every run.

Shapes: T rows (``count``), D values of each (``width``), P programs.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from model.kernels.compiler import tl, triton
from model.kernels.dropout_bits import drop

if triton is not None:

    @triton.jit
    def _standard(values, inside, width, epsilon: tl.constexpr):
        """Rows at mean 0 and deviation 1, 0 outside; and 1 / deviation."""
        mean = tl.sum(values, axis=1) / width
        centred = tl.where(inside, values - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + epsilon)
        return centred * inverse[:, None], inverse

    @triton.jit
    def _standard_gradient(grad, unit, inverse, width):
        """The gradient for the values before :func:`_standard`, from ``unit``'s; 0 outside."""
        mean = tl.sum(grad, axis=1) / width
        along = tl.sum(grad * unit, axis=1) / width
        return (grad - mean[:, None] - unit * along[:, None]) * inverse[:, None]

    @triton.jit
    def enter(
        items,
        table,
        line,
        outer_weight,
        outer_bias,
        inner_weight,
        inner_bias,
        stream,
        normed,
        count,
        width,
        block: tl.constexpr,
        columns: tl.constexpr,
        outer_epsilon: tl.constexpr,
        inner_epsilon: tl.constexpr,
        dropout,
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)
        wide = column < width
        at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
        values = tl.load(items + at, mask=inside, other=0.0)
        if table is not None:
            lines = tl.load(line + row, mask=row < count, other=0)
            values += tl.load(table + lines[:, None] * width + column, mask=inside, other=0.0)
        unit, _ = _standard(values, inside, width, outer_epsilon)
        values = unit * tl.load(outer_weight + column, mask=wide, other=0.0)
        values += tl.load(outer_bias + column, mask=wide, other=0.0)
        values = drop(values, dropout, row, column)
        tl.store(stream + at, values, mask=inside)
        unit, _ = _standard(values, inside, width, inner_epsilon)
        values = unit * tl.load(inner_weight + column, mask=wide, other=0.0)
        values += tl.load(inner_bias + column, mask=wide, other=0.0)
        tl.store(normed + at, values, mask=inside)

    @triton.jit
    def enter_gradient(
        items,
        table,
        line,
        outer_weight,
        outer_bias,
        inner_weight,
        grad_stream,
        grad_normed,
        gradient,
        partial,
        count,
        width,
        block: tl.constexpr,
        columns: tl.constexpr,
        outer_epsilon: tl.constexpr,
        inner_epsilon: tl.constexpr,
        dropout,
    ) -> None:
        column = tl.arange(0, columns)
        wide = column < width
        weight = tl.load(outer_weight + column, mask=wide, other=0.0)
        bias = tl.load(outer_bias + column, mask=wide, other=0.0)
        weight_after = tl.load(inner_weight + column, mask=wide, other=0.0)
        of_weight = tl.zeros([block, columns], tl.float32)
        of_bias = tl.zeros([block, columns], tl.float32)
        of_weight_after = tl.zeros([block, columns], tl.float32)
        of_bias_after = tl.zeros([block, columns], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(count, block), tl.num_programs(0)):
            row = (tile * block + tl.arange(0, block)).to(tl.int64)
            at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
            values = tl.load(items + at, mask=inside, other=0.0)
            if table is not None:
                lines = tl.load(line + row, mask=row < count, other=0)
                values += tl.load(table + lines[:, None] * width + column, mask=inside, other=0.0)
            unit, inverse = _standard(values, inside, width, outer_epsilon)
            values = unit * weight + bias
            values = drop(values, dropout, row, column)
            unit_after, inverse_after = _standard(values, inside, width, inner_epsilon)
            grad = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            of_weight_after += grad * unit_after
            of_bias_after += grad
            grad = _standard_gradient(grad * weight_after, unit_after, inverse_after, width)
            if grad_stream is not None:
                grad += tl.load(grad_stream + at, mask=inside, other=0.0)
            grad = drop(grad, dropout, row, column)
            grad = tl.where(inside, grad, 0.0)
            of_weight += grad * unit
            of_bias += grad
            grad = _standard_gradient(grad * weight, unit, inverse, width)
            tl.store(gradient + at, grad, mask=inside)
        sums = partial + tl.program_id(0) * 4 * width + column
        tl.store(sums, tl.sum(of_weight, axis=0), mask=wide)
        tl.store(sums + width, tl.sum(of_bias, axis=0), mask=wide)
        tl.store(sums + 2 * width, tl.sum(of_weight_after, axis=0), mask=wide)
        tl.store(sums + 3 * width, tl.sum(of_bias_after, axis=0), mask=wide)

    @triton.jit
    def add(
        stream,
        branch,
        branch_bias,
        norm_weight,
        norm_bias,
        total,
        normed,
        count,
        width,
        block: tl.constexpr,
        columns: tl.constexpr,
        epsilon: tl.constexpr,
        dropout,
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)
        wide = column < width
        at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if branch_bias is not None:
            added += tl.load(branch_bias + column, mask=wide, other=0.0)
        added = drop(added, dropout, row, column)
        values = tl.load(stream + at, mask=inside, other=0.0) + added
        tl.store(total + at, values, mask=inside)
        unit, _ = _standard(values, inside, width, epsilon)
        values = unit * tl.load(norm_weight + column, mask=wide, other=0.0)
        values += tl.load(norm_bias + column, mask=wide, other=0.0)
        tl.store(normed + at, values, mask=inside)

    @triton.jit
    def add_gradient(
        total,
        norm_weight,
        grad_total,
        grad_normed,
        gradient,
        grad_branch,
        partial,
        count,
        width,
        block: tl.constexpr,
        columns: tl.constexpr,
        epsilon: tl.constexpr,
        dropout,
    ) -> None:
        column = tl.arange(0, columns)
        wide = column < width
        weight = tl.load(norm_weight + column, mask=wide, other=0.0)
        of_weight = tl.zeros([block, columns], tl.float32)
        of_bias = tl.zeros([block, columns], tl.float32)
        of_branch = tl.zeros([block, columns], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(count, block), tl.num_programs(0)):
            row = (tile * block + tl.arange(0, block)).to(tl.int64)
            at, inside = row[:, None] * width + column, (row[:, None] < count) & wide
            values = tl.load(total + at, mask=inside, other=0.0)
            unit, inverse = _standard(values, inside, width, epsilon)
            grad = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            of_weight += grad * unit
            of_bias += grad
            grad = _standard_gradient(grad * weight, unit, inverse, width)
            if grad_total is not None:
                grad += tl.load(grad_total + at, mask=inside, other=0.0)
            tl.store(gradient + at, grad, mask=inside)
            grad = drop(grad, dropout, row, column)
            of_branch += grad
            tl.store(grad_branch + at, grad, mask=inside)
        sums = partial + tl.program_id(0) * 3 * width + column
        tl.store(sums, tl.sum(of_weight, axis=0), mask=wide)
        tl.store(sums + width, tl.sum(of_bias, axis=0), mask=wide)
        tl.store(sums + 2 * width, tl.sum(of_branch, axis=0), mask=wide)
