"""Add rows at indices that may repeat, in a fixed order: the same bits in every run.

    index   2 0 2 5 2 ... -> sorted   0 2 2 2 | 5 ...     a run of equal entries is one row's
    program                             0     |   1       tiles of sorted values, several a chunk

A program loads the values of a tile at once and finishes the rows whose runs begin in it: their
sums are stored, added to the rows, or are the gradients of an Adam step of them. A run that goes on
in the next tiles of its chunk is summed by the program of its first one. A run across chunks is
summed chunk by chunk, and a second kernel adds these sums, many at once: the mask token's run is a
fifth of all values.

Shapes: M values, C rows, S more rows, D width; B values of a tile.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from collections.abc import Sequence
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
    """Tensors [., D] as one."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def accumulate(rows: Tensor, index: Tensor, values: Tensor) -> None:
    """rows[index[i]] += values[i], in place and in a fixed order, without kernels of this file."""
    if rows.is_cuda:  # index_add_ would add atomically
        rows.index_put_((index,), values, accumulate=True)
    else:  # index_put_ would add in several threads
        rows.index_add_(0, index, values)


def adam_rows(
    rows: Tensor,
    index: SortedIndex,
    values: Sequence[Tensor],
    adam: tuple[Any, ...],
    scale: float,
) -> None:
    """One step of Adam for every row in the index; its gradient is scale x sum of values.

    On CUDA; rows are float32 [C, D], contiguous, values one or two tensors float32 [., D], ``adam``
    as for :func:`adam_step`.
    """
    if len(index.index):
        _sum_runs(rows, rows[:0], index, values, "adam", adam, scale)


def _has_kernels(rows: Tensor, count: int) -> bool:
    fits = rows.dtype == torch.float32 and count < torch.iinfo(torch.int32).max
    return triton is not None and rows.is_cuda and fits


# Values that a warp holds of each tensor; Adam has more tensors.
_HELD = {"store": 1024, "add": 1024, "adam": 512}
_WIDEST = 1024  # columns of a program
_CHUNK = 32  # sorted values


def _sum_runs(
    rows: Tensor,
    more: Tensor,
    index: SortedIndex,
    values: Sequence[Tensor],
    way: str,
    adam: tuple[Any, ...] | None = None,
    scale: float = 1.0,
) -> None:
    keys, width = index.keys, rows.shape[1]
    assert keys is not None
    count, chunks = len(keys), triton.cdiv(len(keys), _CHUNK)
    columns = min(triton.next_power_of_2(width), _WIDEST)
    parts, lines = triton.cdiv(width, columns), min(columns, 128)  # columns of a warp
    block = min(_HELD[way] // lines, _CHUNK)
    first, second = values if len(values) == 2 else (values[0], values[0][:0])
    given = first.contiguous(), second.contiguous(), len(first)
    edges, out = first.new_empty(chunks, 2, width), (rows, more, len(rows))
    rest = edges, count, index.count, width, out, adam, scale, way, _CHUNK
    tiles, warps = triton.cdiv(count, block), columns // lines
    sorted_ = keys, index.order, given
    launch(_add_runs, (tiles, parts), *sorted_, *rest, block, columns, num_warps=warps)
    if chunks > 1:
        block = min(8192 // columns, 64)
        launch(
            _add_chunks, (chunks - 1, parts), keys, *rest, block, columns, num_warps=max(4, warps)
        )


adam_step: Any = None

if triton is not None:

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
    def _finish(key, totals, done, column, width, out, adam, scale, way: tl.constexpr) -> None:
        """Store sums [B, columns] of runs, or add them to rows, or update rows by them.

        Rows ``key`` [B], where ``done`` [B] is true.
        """
        rows, more, split = out
        row, inside = key.to(tl.int64)[:, None], done[:, None] & (column < width)
        if way == "adam":
            adam_step(rows, row * width + column, inside, totals * scale, adam)
        else:
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
        adam,
        scale,
        way: tl.constexpr,
        chunk: tl.constexpr,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        start, place = tl.program_id(0) * block, tl.arange(0, block)
        opens, end = start % chunk == 0, tl.minimum((start // chunk + 1) * chunk, count)
        # All that memory says of the tile is loaded at once; places of values, in case of need.
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
            for _ in range(start + block, stop, block):
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
            _finish(key, totals, done, column, width, out, adam, scale, way)
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
        adam,
        scale,
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
            _finish(
                key + only, total[None, :], only == 0, column[None, :], width, out, adam, scale, way
            )
