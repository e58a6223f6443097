"""The Triton kernels of :mod:`model.kernels.residual`: each one pass over memory.

Backward kernels compute means and deviations again: the row is in registers anyway. Each program
writes its sums of gradients to ``partial``, to be added up in order: the same bits in every run.

Shapes: T rows, D values of each (``width``), P programs.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from functools import lru_cache
from typing import Any, NamedTuple

from model.kernels.compiler import row_tiles, tl, triton
from model.kernels.random_bits import drop


class Tiles(NamedTuple):
    """Tiles of whole rows of a tensor [rows, width]: ``block`` rows, ``columns`` columns."""

    rows: int
    width: int
    block: Any  # constexpr, as ``columns``
    columns: Any


@lru_cache  # constants are slow to make
def tiles_of(shape: tuple[int, int], values: int) -> tuple[int, Tiles]:
    """The number of tiles of ``values`` values, and the tiles."""
    number, *tile = row_tiles(shape, values)
    return number, Tiles(*shape, *map(tl.constexpr, tile))


if triton is not None:

    @triton.jit
    def _cells(tile, tiles):
        """Rows [R] of a tile, offsets [R, C] of its values, and which of them exist."""
        row = (tile * tiles.block + tl.arange(0, tiles.block)).to(tl.int64)
        column = tl.arange(0, tiles.columns)
        wide = column < tiles.width
        at, inside = row[:, None] * tiles.width + column, (row[:, None] < tiles.rows) & wide
        return row, at, inside

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
    def enter(given, norms, results, tiles, epsilons: tl.constexpr, dropout) -> None:
        items, table, line = given
        outer_weight, outer_bias, inner_weight, inner_bias = norms
        stream, normed = results
        row, at, inside = _cells(tl.program_id(0).to(tl.int64), tiles)
        width, column = tiles.width, tl.arange(0, tiles.columns)
        wide = column < width
        values = tl.load(items + at, mask=inside, other=0.0)
        if table is not None:
            lines = tl.load(line + row, mask=row < tiles.rows, other=0)
            values += tl.load(table + lines[:, None] * width + column, mask=inside, other=0.0)
        unit, _ = _standard(values, inside, width, epsilons[0])
        values = unit * tl.load(outer_weight + column, mask=wide, other=0.0)
        values += tl.load(outer_bias + column, mask=wide, other=0.0)
        values = drop(values, dropout, row, column)
        tl.store(stream + at, values, mask=inside)
        unit, _ = _standard(values, inside, width, epsilons[1])
        values = unit * tl.load(inner_weight + column, mask=wide, other=0.0)
        values += tl.load(inner_bias + column, mask=wide, other=0.0)
        tl.store(normed + at, values, mask=inside)

    @triton.jit
    def enter_gradient(saved, grads, partial, tiles, epsilons: tl.constexpr, dropout) -> None:
        items, table, line, outer_weight, outer_bias, inner_weight = saved
        grad_stream, grad_normed, gradient = grads
        width, column = tiles.width, tl.arange(0, tiles.columns)
        wide = column < width
        weight = tl.load(outer_weight + column, mask=wide, other=0.0)
        bias = tl.load(outer_bias + column, mask=wide, other=0.0)
        weight_after = tl.load(inner_weight + column, mask=wide, other=0.0)
        of_weight = tl.zeros([tiles.block, tiles.columns], tl.float32)
        of_bias = tl.zeros([tiles.block, tiles.columns], tl.float32)
        of_weight_after = tl.zeros([tiles.block, tiles.columns], tl.float32)
        of_bias_after = tl.zeros([tiles.block, tiles.columns], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(tiles.rows, tiles.block), tl.num_programs(0)):
            row, at, inside = _cells(tile, tiles)
            values = tl.load(items + at, mask=inside, other=0.0)
            if table is not None:
                lines = tl.load(line + row, mask=row < tiles.rows, other=0)
                values += tl.load(table + lines[:, None] * width + column, mask=inside, other=0.0)
            unit, inverse = _standard(values, inside, width, epsilons[0])
            values = unit * weight + bias
            values = drop(values, dropout, row, column)
            unit_after, inverse_after = _standard(values, inside, width, epsilons[1])
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
    def add(given, results, tiles, epsilon: tl.constexpr, dropout) -> None:
        stream, branch, branch_bias, norm_weight, norm_bias = given
        total, normed = results
        row, at, inside = _cells(tl.program_id(0).to(tl.int64), tiles)
        width, column = tiles.width, tl.arange(0, tiles.columns)
        wide = column < width
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
    def add_gradient(saved, grads, partial, tiles, epsilon: tl.constexpr, dropout) -> None:
        total, norm_weight = saved
        grad_total, grad_normed, gradient, grad_branch = grads
        width, column = tiles.width, tl.arange(0, tiles.columns)
        wide = column < width
        weight = tl.load(norm_weight + column, mask=wide, other=0.0)
        of_weight = tl.zeros([tiles.block, tiles.columns], tl.float32)
        of_bias = tl.zeros([tiles.block, tiles.columns], tl.float32)
        of_branch = tl.zeros([tiles.block, tiles.columns], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(tiles.rows, tiles.block), tl.num_programs(0)):
            row, at, inside = _cells(tile, tiles)
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
