"""Add rows at indices that may repeat, in a fixed order: the same bits in every run.

    index 2 0 2 5 -> sorted 0 2 2 5 -> one program per run: rows[0] += ., rows[2] += . + ., ...

After the sort, equal indices form a run. A run across chunks of the sorted values is summed chunk
by chunk, and a second kernel adds these sums: the mask token's run is a fifth of all values. A
run's sum is added to its row, or is the gradient of an optimizer step of that row.

Shapes: M values, C rows, S more rows, D width.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

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
    fits = rows.is_contiguous() and count < torch.iinfo(torch.int32).max
    if triton is not None and rows.is_cuda and rows.dtype == torch.float32 and fits:
        _sum_runs(rows, more, index, values, None)
        return
    for part, row in ((rows, index.index), (more, index.index - len(rows))):
        if len(part):
            inside = (row >= 0) & (row < len(part))
            added = torch.where(inside[:, None], values, 0)
            accumulate(part, row.clamp(0, len(part) - 1), added)


def accumulate(rows: Tensor, index: Tensor, values: Tensor) -> None:
    """rows[index[i]] += values[i], in place and in a fixed order, without kernels of this file."""
    if rows.is_cuda:  # index_add_ would add atomically
        rows.index_put_((index,), values, accumulate=True)
    else:  # index_put_ would add in several threads
        rows.index_add_(0, index, values)


def step_at(rows: Tensor, index: SortedIndex, values: Tensor, how: RowOptimizer) -> None:
    """One optimizer step of every row in the index; its gradient is the sum of its values.

    On CUDA; rows are float32 or fp16 [C, D], contiguous, values float32 [M, D].
    """
    if len(index.index):
        _sum_runs(rows, rows[:0], index, values, how)


def _sum_runs(
    rows: Tensor, more: Tensor, index: SortedIndex, values: Tensor, how: RowOptimizer | None
) -> None:
    keys, width = index.keys, rows.shape[1]
    assert keys is not None
    count, values = len(keys), values.contiguous()
    block, columns = 8, 128
    if how is not None and KINDS[how.kind] == "rowwise_adagrad":  # a program holds a whole row
        columns = triton.next_power_of_2(width)
        block = max(1, min(block, 1024 // columns))
    chunks, parts = triton.cdiv(count, _CHUNK), triton.cdiv(width, columns)
    edges, out = values.new_empty(chunks, 2, width), (rows, more, len(rows))
    rest = edges, count, index.count, width, out, how
    runs = keys, index.order, values, *rest, block, columns
    launch(_add_runs, (count, parts), *runs, num_warps=2)
    if chunks > 1:
        launch(_add_chunks, (chunks - 1, parts), keys, *rest, columns)


step_rows: Any = None

if triton is not None:
    _CHUNK = tl.constexpr(256)  # values
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
    def _finish(key, total, column, width, out, how) -> None:
        """Add a run's sum to its row, or update the row by it."""
        rows, more, split = out
        if how is not None:
            row = tl.full([1, 1], 0, tl.int64) + key
            step_rows(rows, row, row >= 0, column[None, :], width, total[None, :], how)
        else:
            wide, row = column < width, key.to(tl.int64)
            start_of = tl.where(key < split, rows + row * width, more + (row - split) * width)
            to = start_of + column
            tl.store(to, tl.load(to, mask=wide, other=0.0) + total, mask=wide)

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
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        # A program adds ``block`` values of a run at a time, ``columns`` columns of each.
        start = tl.program_id(0)
        key = tl.load(keys + start).to(tl.int32)
        before = tl.load(keys + start - 1, mask=start > 0, other=-1).to(tl.int32)
        begins = key != before
        if (begins | (start % _CHUNK == 0)) & (key < limit):
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            end = tl.minimum((start // _CHUNK + 1) * _CHUNK, count)
            sums = tl.zeros([block, columns], tl.float32)
            at = start + tl.arange(0, block)
            same = tl.load(keys + at, mask=at < end, other=-1).to(tl.int32) == key
            found = tl.sum(same.to(tl.int32), axis=0)
            while found > 0:
                of = tl.load(order + at, mask=same, other=0)
                inside = same[:, None] & wide
                sums += tl.load(values + of[:, None] * width + column, mask=inside, other=0.0)
                at += block
                same = tl.load(keys + at, mask=at < end, other=-1).to(tl.int32) == key
                found = tl.sum(same.to(tl.int32), axis=0)
            total = tl.sum(sums, axis=0)
            follows = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32) == key
            if begins & (follows == 0):
                _finish(key, total, column, width, out, how)
            else:
                # Two sums per chunk: of a run that began before it, and of one that begins in it.
                edge = (start // _CHUNK) * 2 + begins.to(tl.int32)
                tl.store(edges + edge * width + column, total, mask=wide)

    @triton.jit
    def _add_chunks(keys, edges, count, limit, width, out, how, columns: tl.constexpr) -> None:
        at = tl.program_id(0)
        end = (at + 1) * _CHUNK
        key = tl.load(keys + end - 1).to(tl.int32)
        first = tl.load(keys + at * _CHUNK).to(tl.int32)
        before = tl.load(keys + at * _CHUNK - 1, mask=at > 0, other=-1).to(tl.int32)
        follows = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32) == key
        if follows & ((first != key) | (before != key)) & (key < limit):
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            total = tl.load(edges + (at * 2 + 1) * width + column, mask=wide, other=0.0)
            going = 1
            while going > 0:
                at += 1
                total += tl.load(edges + at * 2 * width + column, mask=wide, other=0.0)
                end = (at + 1) * _CHUNK
                after = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32)
                going = (after == key).to(tl.int32)
            _finish(key, total, column, width, out, how)
