"""Add rows at indices that may repeat, in a fixed order: the same bits in every run.

    index   2 0 2 5 2 ... -> sorted   0 2 2 2 | 5 ...     a run of equal entries is one row's
    program                             0     |   1       tiles of sorted values, several a chunk

A program loads the values of a tile at once and finishes the rows whose runs begin in it: their
sums are stored, added to the rows, or are the gradients of an optimizer step of them. A run that
goes on in the next tiles of its chunk is summed by the program of its first one. A run across
chunks is summed chunk by chunk, and a second kernel adds these sums, many at once: the mask token's
run is a fifth of all values.

Shapes: M values, C rows, S more rows, D width; B values of a tile.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.compiler import launch, tl, triton
from model.kernels.random_bits import round_at_random


@dataclass(frozen=True)
class SortedIndex:
    """An index of rows and, for the kernels on CUDA, its sorted order."""

    index: Tensor  # int64 [M]
    count: int  # number of rows; entries of ``count`` or more are ignored
    keys: Tensor | None = None  # [M], the entries ascending
    order: Tensor | None = None  # int64 [M], the positions of ``keys`` in ``index``


KINDS = ("sgd", "adagrad", "rowwise_adagrad", "adam")


class RowOptimizer(NamedTuple):
    """Kind, state and constants of a step, an argument of kernels."""

    kind: Any  # constexpr int, the place in KINDS
    state: Tensor  # sums of squares of adagrad [R, D] or of their means [R], means of adam [R, D]
    squares: Tensor  # of adam, float32 [R, D]
    rates: Tensor  # float32 [2]: learning rate; see model.tables.table_update.Step.rates
    key: Tensor  # int32 [1], of the random bits
    beta1: float
    beta2: float
    eps: float
    scale: float  # factor of the gradients
    first_row: int  # number of the table's row that is the first here, for the random bits


def sort_index(index: Tensor, count: int) -> SortedIndex:
    """Sort an index, int64 [M], of ``count`` rows; entries are at least 0."""
    if triton is None or not index.is_cuda:
        return SortedIndex(index, count)
    # A radix sort makes fewer passes over shorter keys.
    short = count < torch.iinfo(torch.int16).max
    keys = index.clamp(max=count).to(torch.int16 if short else torch.int32)
    return SortedIndex(index, count, *keys.sort(stable=True))


def add_rows(rows: Tensor, index: SortedIndex, values: Tensor, more: Tensor | None = None) -> None:
    """rows[index[i]] += values[i], in place, for every index[i] below ``index.count``.

    Args:
        rows: float [C, D], contiguous.
        values: [M, D] of the same dtype.
        more: [S, D] of the same dtype, contiguous: rows C ... C + S - 1, in separate memory.
    """
    more = rows[:0] if more is None else more
    count = len(rows) + len(more)
    assert index.count == count
    if not len(index.index) or not count:
        return
    if _has_kernels(rows, count) and rows.is_contiguous():
        _sum_runs(rows, more, index, (values,), "add")
        return
    for part, row in ((rows, index.index), (more, index.index - len(rows))):
        if len(part):
            inside = (row >= 0) & (row < len(part))
            added = torch.where(inside[:, None], values, 0)
            accumulate(part, row.clamp(0, len(part) - 1), added)


def sum_rows(index: SortedIndex, values: Sequence[Tensor]) -> Tensor:
    """Sums [C, D] of the values of each row; those of a row without values are undefined.

    Args:
        index: of C rows, for each value of the first tensor, then of the second.
        values: one or two tensors [., D] of the same dtype.
    """
    shape = index.count, values[0].shape[1]
    if _has_kernels(values[0], index.count):
        sums = values[0].new_empty(shape)
        if len(index.index):
            _sum_runs(sums, sums[:0], index, values, "store")
        return sums
    sums = values[0].new_zeros(shape)
    add_rows(sums, index, joined(values))
    return sums


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [., D] as one; not copied if only the first has rows."""
    return torch.cat([*parts]) if any(map(len, parts[1:])) else parts[0]


def accumulate(rows: Tensor, index: Tensor, values: Tensor) -> None:
    """rows[index[i]] += values[i], in place and in a fixed order, without kernels of this file."""
    if rows.is_cuda:  # index_add_ would add atomically
        rows.index_put_((index,), values, accumulate=True)
    else:  # index_put_ would add in several threads
        rows.index_add_(0, index, values)


def step_at(rows: Tensor, index: SortedIndex, values: Sequence[Tensor], how: RowOptimizer) -> None:
    """One optimizer step of every row in the index; its gradient is the sum of its values.

    On CUDA; rows are float32 or fp16 [C, D], contiguous, values one or two tensors float32 [., D].
    """
    if len(index.index):
        _sum_runs(rows, rows[:0], index, values, "step", how)


def _has_kernels(rows: Tensor, count: int) -> bool:
    fits = rows.dtype == torch.float32 and count < torch.iinfo(torch.int32).max
    return triton is not None and rows.is_cuda and fits


# Values that a warp holds of each tensor; optimizers have more tensors.
_HELD = {"store": 1024, "add": 1024, "step": 512}
_WIDEST = 1024  # columns of a program
_CHUNK = 32  # sorted values


def _sum_runs(
    rows: Tensor,
    more: Tensor,
    index: SortedIndex,
    values: Sequence[Tensor],
    way: str,
    how: RowOptimizer | None = None,
) -> None:
    keys, width = index.keys, rows.shape[1]
    assert keys is not None
    count, chunks = len(keys), triton.cdiv(len(keys), _CHUNK)
    columns = triton.next_power_of_2(width)
    if how is None or KINDS[how.kind] != "rowwise_adagrad":  # else a program holds whole rows
        columns = min(columns, _WIDEST)
    parts, lines = triton.cdiv(width, columns), max(min(columns, 128), columns // 8)  # of a warp
    block, warps = max(1, min(_HELD[way] // lines, _CHUNK)), columns // lines
    first, second = values if len(values) == 2 else (values[0], values[0][:0])
    given = first.contiguous(), second.contiguous(), len(first)
    edges, out = first.new_empty(chunks, 2, width), (rows, more, len(rows))
    rest = edges, count, index.count, width, out, how, way, _CHUNK
    grid, sorted_ = (triton.cdiv(count, block), parts), (keys, index.order, given)
    launch(_add_runs, grid, *sorted_, *rest, block, columns, num_warps=warps)
    if chunks > 1:
        block, warps = max(1, min(8192 // columns, 64)), max(4, warps)
        launch(_add_chunks, (chunks - 1, parts), keys, *rest, block, columns, num_warps=warps)


step_rows: Any = None

if triton is not None:
    _SGD, _ADAGRAD, _ROWWISE, _ADAM = map(tl.constexpr, range(len(KINDS)))

    @triton.jit
    def step_rows(rows, row, there, column, width, grad, how) -> None:
        """One step of the optimizer ``how`` for rows that have the gradient ``grad``.

        Args:
            rows: float32 or fp16 [R, D].
            row: int64 [B, 1], of which those are updated where ``there`` is true.
            column: int [1, C], with all columns of a row for rowwise_adagrad.
            grad: float32 [B, C], zeros beyond the width.
        """
        at, inside = row * width + column, there & (column < width)
        grad = grad * how.scale
        value = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        rate = tl.load(how.rates)
        if how.kind == _ADAM:
            mean = tl.load(how.state + at, mask=inside, other=0.0)
            square = tl.load(how.squares + at, mask=inside, other=0.0)
            mean = how.beta1 * mean + (1.0 - how.beta1) * grad
            square = how.beta2 * square + (1.0 - how.beta2) * grad * grad
            tl.store(how.state + at, mean, mask=inside)
            tl.store(how.squares + at, square, mask=inside)
            value -= rate * mean / (tl.sqrt(square) * tl.load(how.rates + 1) + how.eps)
        elif how.kind == _ROWWISE:
            total = tl.load(how.state + row, mask=there, other=0.0)
            total += tl.sum(grad * grad, axis=1, keep_dims=True) / width
            tl.debug_barrier()  # every warp has read the row's sum
            tl.store(how.state + row, total, mask=there)
            value -= rate * grad / (tl.sqrt(total) + how.eps)
        elif how.kind == _ADAGRAD:
            total = tl.load(how.state + at, mask=inside, other=0.0) + grad * grad
            tl.store(how.state + at, total, mask=inside)
            value -= rate * grad / (tl.sqrt(total) + how.eps)
        else:
            value -= rate * grad
        if rows.dtype.element_ty == tl.float16:
            value = round_at_random(value, how.key, row + how.first_row, column)
        tl.store(rows + at, value.to(rows.dtype.element_ty), mask=inside)

    @triton.jit
    def _finish(key, totals, done, column, width, out, how, way: tl.constexpr) -> None:
        """Store sums [B, columns] of runs, or add them to rows, or update rows by them.

        Rows ``key`` [B], where ``done`` [B] is true.
        """
        rows, more, split = out
        row, done = key.to(tl.int64)[:, None], done[:, None]
        if way == "step":
            step_rows(rows, row, done, column, width, totals, how)
        else:
            inside = done & (column < width)
            to = tl.where(row < split, rows + row * width, more + (row - split) * width) + column
            if way == "add":
                totals += tl.load(to, mask=inside, other=0.0)
            tl.store(to, totals, mask=inside)

    @triton.jit
    def _key(keys, at, exists):
        return tl.load(keys + at, mask=exists, other=-1).to(tl.int32)

    @triton.jit
    def _values(values, of, wanted, column, width):
        """The values [B, columns] at the places ``of`` [B]; 0 where they are not ``wanted``."""
        first, second, split = values
        of = of[:, None]
        start_of = tl.where(of < split, first + of * width, second + (of - split) * width)
        return tl.load(start_of + column, mask=wanted[:, None] & (column < width), other=0.0)

    @triton.jit
    def _add_equal(sum_before, key_before, sum_, key):
        """The sum of the run that ends a part of the sorted values, from those of two parts."""
        return tl.where(key == key_before, sum_before + sum_, sum_), key

    @triton.jit
    def _add_runs(
        keys,
        order,
        values,
        edges,
        count,
        limit,
        width,
        out,
        how,
        way: tl.constexpr,
        chunk: tl.constexpr,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        start, place = tl.program_id(0) * block, tl.arange(0, block)
        opens, end = start % chunk == 0, tl.minimum((start // chunk + 1) * chunk, count)
        # All keys that the tile depends on are loaded at once, and the places of values of the next
        # tile, which few need.
        at, ahead, after = start + place, start + block + place, start + block + tl.arange(0, chunk)
        key, key_after = _key(keys, at, at < count), _key(keys, at + 1, at + 1 < count)
        before, key_ahead = _key(keys, start - 1, start > 0), _key(keys, after, after < end)
        last = _key(keys, start + block - 1, start + block <= count)
        after_chunk = _key(keys, end, end < count)
        of = tl.load(order + at, mask=at < count, other=0)
        of_ahead = tl.load(order + ahead, mask=ahead < end, other=0)
        # A run that began in the chunk's tiles before is summed by another program.
        own = (at < count) & (key < limit) & (opens | (key != before))
        if tl.max(own.to(tl.int32), axis=0) > 0:
            column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
            # The last run may go on in the next tiles.
            goes_on = (last < limit) & (opens | (last != before))
            same = goes_on & (after < end) & (key_ahead == last)
            stop = start + block + tl.sum(same.to(tl.int32), axis=0)
            added = tl.zeros([columns], tl.float32)
            for _ in range(start + block, stop, block):  # Triton 3.6 fails on a while loop here
                more = _values(values, of_ahead, ahead < stop, column, width)
                ahead += block
                of_ahead = tl.load(order + ahead, mask=ahead < stop, other=0)
                added += tl.sum(more, axis=0)
            totals = _values(values, of, own, column, width)
            spread = tl.broadcast_to(key[:, None], [block, columns])
            totals, _ = tl.associative_scan((totals, spread), 0, _add_equal)
            is_last, begins = place == block - 1, key != before
            totals = tl.where(is_last[:, None], totals + added[None, :], totals)
            ends = own & (is_last | (key != key_after))
            done = ends & begins & ((is_last & (after_chunk == last)) == 0)
            _finish(key, totals, done, column, width, out, how, way)
            # Two sums per chunk: of a run that began before it, and of one that begins in it.
            edge = (start // chunk * 2 + begins.to(tl.int32)).to(tl.int64)[:, None]
            inside = (ends & (done == 0))[:, None] & (column < width)
            tl.store(edges + edge * width + column, totals, mask=inside)

    @triton.jit
    def _add_chunks(
        keys,
        edges,
        count,
        limit,
        width,
        out,
        how,
        way: tl.constexpr,
        chunk: tl.constexpr,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        number = tl.program_id(0)
        end = (number + 1) * chunk
        key, after = _key(keys, end - 1, True), _key(keys, end, True)
        first, before = _key(keys, end - chunk, True), _key(keys, end - chunk - 1, number > 0)
        if (after == key) & ((first != key) | (before != key)) & (key < limit):
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            total = tl.load(
                edges + (number * 2 + 1).to(tl.int64) * width + column, mask=wide, other=0.0
            )
            at = number + 1 + tl.arange(0, block)
            same = _key(keys, at * chunk, at * chunk < count) == key
            found = tl.max(same.to(tl.int32), axis=0)
            while found > 0:
                edge = (at * 2).to(tl.int64)[:, None] * width + column[None, :]
                more = tl.load(edges + edge, mask=same[:, None] & wide[None, :], other=0.0)
                at += block  # the next keys are loaded meanwhile
                same = _key(keys, at * chunk, at * chunk < count) == key
                total += tl.sum(more, axis=0)
                found = tl.max(same.to(tl.int32), axis=0)
            only = tl.full([1], 0, tl.int32)
            _finish(key + only, total[None, :], only == 0, column[None, :], width, out, how, way)
