"""Add rows at indices that may repeat, in a fixed order: the same bits in every run.

    index 2 0 2 5 -> sorted 0 2 2 5 -> one program per run: rows[0] += ., rows[2] += . + ., ...

After the sort, equal indices form a run. A run across chunks of the sorted values is summed chunk
by chunk, and a second kernel adds these sums: the mask token's run is a fifth of all values. A
run's sum is added to its row, or is the gradient of an Adam step of that row.

Shapes: M values, C rows, S more rows, D width.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.compiler import launch, tl, triton


@dataclass(frozen=True)
class SortedIndex:
    """An index of rows and, for the kernels on CUDA, its sorted order."""

    index: Tensor  # int64 [M]
    count: int  # number of rows; entries of ``count`` or more are ignored
    keys: Tensor | None = None  # [M], the entries ascending
    order: Tensor | None = None  # int64 [M], the positions of ``keys`` in ``index``


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
        _sum_runs(rows, more, index, values, None, 1.0)
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


def adam_rows(
    rows: Tensor, index: SortedIndex, values: Tensor, adam: tuple[Any, ...], scale: float
) -> None:
    """One step of Adam for every row in the index; its gradient is scale x sum of values.

    On CUDA; rows are float32 [C, D], contiguous, values float32 [M, D], ``adam`` as for
    :func:`adam_step`.
    """
    if len(index.index):
        _sum_runs(rows, rows[:0], index, values, adam, scale)


def _sum_runs(
    rows: Tensor, more: Tensor, index: SortedIndex, values: Tensor, adam: Any, scale: float
) -> None:
    keys, width = index.keys, rows.shape[1]
    assert keys is not None
    count, values = len(keys), values.contiguous()
    chunks, parts = triton.cdiv(count, _CHUNK), triton.cdiv(width, _COLUMNS)
    edges, out = values.new_empty(chunks, 2, width), (rows, more, len(rows))
    rest = edges, count, index.count, width, out, adam, scale
    launch(_add_runs, (count, parts), keys, index.order, values, *rest, num_warps=2)
    if chunks > 1:
        launch(_add_chunks, (chunks - 1, parts), keys, *rest)


adam_step: Any = None

if triton is not None:
    # Values of a run, and columns of each, that a program adds at a time; values of a chunk.
    _BLOCK, _COLUMNS, _CHUNK = tl.constexpr(8), tl.constexpr(128), tl.constexpr(256)

    @triton.jit
    def adam_step(rows, at, inside, grad, adam) -> None:
        """One step of Adam for values that have the gradient ``grad``.

        Args:
            rows: float32, of which the values ``at`` are updated where ``inside`` is true.
            adam: means and squares (float32, like ``rows``), rates (float32 [2], see
                :class:`~model.tables.table_update.Step`), beta1, beta2, eps.
        """
        means, squares, rates, beta1, beta2, eps = adam
        mean = tl.load(means + at, mask=inside, other=0.0)
        square = tl.load(squares + at, mask=inside, other=0.0)
        value = tl.load(rows + at, mask=inside, other=0.0)
        mean = beta1 * mean + (1.0 - beta1) * grad
        square = beta2 * square + (1.0 - beta2) * grad * grad
        rate, shrink = tl.load(rates), tl.load(rates + 1)
        value -= rate * mean / (tl.sqrt(square) * shrink + eps)
        tl.store(means + at, mean, mask=inside)
        tl.store(squares + at, square, mask=inside)
        tl.store(rows + at, value, mask=inside)

    @triton.jit
    def _finish(key, total, column, width, out, adam, scale) -> None:
        """Add a run's sum to its row, or update the row by it."""
        rows, more, split = out
        wide, row = column < width, key.to(tl.int64)
        if adam is not None:
            adam_step(rows, row * width + column, wide, total * scale, adam)
        else:
            start_of = tl.where(key < split, rows + row * width, more + (row - split) * width)
            to = start_of + column
            tl.store(to, tl.load(to, mask=wide, other=0.0) + total, mask=wide)

    @triton.jit
    def _add_runs(keys, order, values, edges, count, limit, width, out, adam, scale) -> None:
        start = tl.program_id(0)
        key = tl.load(keys + start).to(tl.int32)
        before = tl.load(keys + start - 1, mask=start > 0, other=-1).to(tl.int32)
        begins = key != before
        if (begins | (start % _CHUNK == 0)) & (key < limit):
            column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
            wide = column < width
            end = tl.minimum((start // _CHUNK + 1) * _CHUNK, count)
            sums = tl.zeros([_BLOCK, _COLUMNS], tl.float32)
            at = start + tl.arange(0, _BLOCK)
            same = tl.load(keys + at, mask=at < end, other=-1).to(tl.int32) == key
            found = tl.sum(same.to(tl.int32), axis=0)
            while found > 0:
                of = tl.load(order + at, mask=same, other=0)
                inside = same[:, None] & wide
                sums += tl.load(values + of[:, None] * width + column, mask=inside, other=0.0)
                at += _BLOCK
                same = tl.load(keys + at, mask=at < end, other=-1).to(tl.int32) == key
                found = tl.sum(same.to(tl.int32), axis=0)
            total = tl.sum(sums, axis=0)
            follows = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32) == key
            if begins & (follows == 0):
                _finish(key, total, column, width, out, adam, scale)
            else:
                # Two sums per chunk: of a run that began before it, and of one that begins in it.
                edge = (start // _CHUNK) * 2 + begins.to(tl.int32)
                tl.store(edges + edge * width + column, total, mask=wide)

    @triton.jit
    def _add_chunks(keys, edges, count, limit, width, out, adam, scale) -> None:
        at = tl.program_id(0)
        end = (at + 1) * _CHUNK
        key = tl.load(keys + end - 1).to(tl.int32)
        first = tl.load(keys + at * _CHUNK).to(tl.int32)
        before = tl.load(keys + at * _CHUNK - 1, mask=at > 0, other=-1).to(tl.int32)
        follows = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32) == key
        if follows & ((first != key) | (before != key)) & (key < limit):
            column = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
            wide = column < width
            total = tl.load(edges + (at * 2 + 1) * width + column, mask=wide, other=0.0)
            going = 1
            while going > 0:
                at += 1
                total += tl.load(edges + at * 2 * width + column, mask=wide, other=0.0)
                end = (at + 1) * _CHUNK
                after = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32)
                going = (after == key).to(tl.int32)
            _finish(key, total, column, width, out, adam, scale)
