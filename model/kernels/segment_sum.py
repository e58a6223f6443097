"""Rows added to other rows, several of them to the same one, with the same bits in every run.

    index 2 0 2 5 -> sorted 0 2 2 5 -> a program for each run -> rows[0] += ., rows[2] += . + ., ...

A run that goes on from one chunk of the sorted values into the next is added up chunk by chunk, and
a second kernel adds up these sums: the mask token's are a fifth of all. What becomes of a row's sum
is the caller's: it is added, or it is the gradient of a step of Adam.

``index_put_(accumulate=True)`` of torch sorts likewise, and then takes the duplicates one by one.
An index may be sorted long before its values are there.

Shapes: M values, C rows, D width.
"""
# ruff: noqa: ANN001 - Triton takes annotations of a kernel for its own

from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

# Values of a run, and of each so many columns, that a program adds at a time; values of a chunk;
# warps of a program.
_BLOCK, _COLUMNS, _CHUNK, _WARPS = 8, 128, 256, 2


@dataclass(frozen=True)
class SortedIndex:
    """An index int64 [M] of ``count`` rows, its entries ascending, and where these were.

    The latter two are None where no kernel would want them.
    """

    index: torch.Tensor
    count: int
    keys: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


def sort_index(index: torch.Tensor, count: int) -> SortedIndex:
    """Sort an index of ``count`` rows: int64 [M], not negative; ``count`` and more: nowhere."""
    if triton is None or not index.is_cuda:
        return SortedIndex(index, count)
    # A sort passes over the keys once for every few of their bits.
    short = count < torch.iinfo(torch.int16).max
    keys = index.clamp(max=count).to(torch.int16 if short else torch.int32)
    return SortedIndex(index, count, *keys.sort(stable=True))


def add_rows(
    rows: torch.Tensor,
    index: SortedIndex,
    values: torch.Tensor,
    more: torch.Tensor | None = None,
) -> None:
    """rows[index[i]] += values[i], in place, for every i whose index is somewhere.

    Args:
        rows: float [C, D], contiguous.
        index: [M], of C + S rows.
        values: [M, D] of the same dtype.
        more: [S, D] of the same dtype, contiguous: rows C ... C + S - 1, which lie elsewhere.
    """
    more = rows[:0] if more is None else more
    count = len(rows) + len(more)
    assert index.count == count
    if not len(index) or not count:
        return
    if not _has_kernel(rows, count):
        for part, begin in ((rows, 0), (more, len(rows))):
            if len(part):
                _add(part, index.index - begin if begin else index.index, values)
        return
    _sum_runs(rows, more, index, values)


def adam_rows(
    rows: torch.Tensor,
    means: torch.Tensor,
    squares: torch.Tensor,
    index: SortedIndex,
    values: torch.Tensor,
    rates: torch.Tensor,
    scale: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """A step of Adam for every row that the index names, with its values' sum as the gradient.

    Args:
        rows: float32 [C, D] on CUDA, contiguous.
        means, squares: float32 [C, D], of the gradients so far.
        index: [M], of C rows.
        values: float32 [M, D].
        rates: float32 [2], see :class:`~model.tables.table_update.Step`.
        scale: what gradients are multiplied with.
    """
    if len(index):
        adam = means, squares, rates, scale, beta1, beta2, eps
        _sum_runs(rows, rows[:0], index, values, adam)


def _sum_runs(
    rows: torch.Tensor,
    more: torch.Tensor,
    index: SortedIndex,
    values: torch.Tensor,
    adam: tuple[Any, ...] | None = None,
) -> None:
    keys, order, limit = index.keys, index.order, index.count
    assert keys is not None
    width, values = rows.shape[1], values.contiguous()
    chunks, parts = triton.cdiv(len(keys), _CHUNK), triton.cdiv(width, _COLUMNS)
    edges = values.new_empty(chunks, 2, width)
    means, squares, rates, *known = adam or (rows, rows, rows, 0.0, 0.0, 0.0, 0.0)
    out = rows, more, len(rows), width, means, squares, rates, *known
    sizes = adam is not None, _CHUNK, _COLUMNS
    count = len(keys)
    runs = keys, order, values, edges, count, limit, *out, *sizes, _BLOCK
    _add_runs[(count, parts)](*runs, num_warps=_WARPS)
    if chunks > 1:
        _add_chunks[(chunks - 1, parts)](keys, edges, count, limit, *out, *sizes)


def _add(rows: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """In plain torch, by sorted sums, unlike those of index_add_ on CUDA."""
    inside = (index >= 0) & (index < len(rows))
    values = torch.where(inside[:, None], values, 0)
    rows.index_put_((index.clamp(0, len(rows) - 1),), values, accumulate=True)


def _has_kernel(rows: torch.Tensor, count: int) -> bool:
    fits = rows.is_contiguous() and count < torch.iinfo(torch.int32).max
    return triton is not None and rows.is_cuda and rows.dtype == torch.float32 and fits


if triton is not None:

    @triton.jit
    def _finish(
        key,
        total,
        column,
        wide,
        rows,
        more,
        split,
        width,
        means,
        squares,
        rates,
        scale,
        beta1,
        beta2,
        eps,
        adam: tl.constexpr,
    ) -> None:
        row = key.to(tl.int64)
        if adam:
            at = row * width + column
            grad = total * scale
            mean = beta1 * tl.load(means + at, mask=wide, other=0.0) + (1.0 - beta1) * grad
            square = tl.load(squares + at, mask=wide, other=0.0)
            square = beta2 * square + (1.0 - beta2) * grad * grad
            value = tl.load(rows + at, mask=wide, other=0.0)
            rate, shrink = tl.load(rates), tl.load(rates + 1)
            value -= rate * mean / (tl.sqrt(square) * shrink + eps)
            tl.store(means + at, mean, mask=wide)
            tl.store(squares + at, square, mask=wide)
            tl.store(rows + at, value, mask=wide)
        else:
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
        rows,
        more,
        split,
        width,
        means,
        squares,
        rates,
        scale,
        beta1,
        beta2,
        eps,
        adam: tl.constexpr,
        chunk: tl.constexpr,
        columns: tl.constexpr,
        block: tl.constexpr,
    ) -> None:
        start = tl.program_id(0)
        key = tl.load(keys + start).to(tl.int32)
        before = tl.load(keys + start - 1, mask=start > 0, other=-1).to(tl.int32)
        begins = key != before
        if (begins | (start % chunk == 0)) & (key < limit):
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            end = tl.minimum((start // chunk + 1) * chunk, count)
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
                _finish(
                    key,
                    total,
                    column,
                    wide,
                    rows,
                    more,
                    split,
                    width,
                    means,
                    squares,
                    rates,
                    scale,
                    beta1,
                    beta2,
                    eps,
                    adam,
                )
            else:
                # Of each chunk the sum of a run from before it, and that of one that begins in it.
                edge = (start // chunk) * 2 + begins.to(tl.int32)
                tl.store(edges + edge * width + column, total, mask=wide)

    @triton.jit
    def _add_chunks(
        keys,
        edges,
        count,
        limit,
        rows,
        more,
        split,
        width,
        means,
        squares,
        rates,
        scale,
        beta1,
        beta2,
        eps,
        adam: tl.constexpr,
        chunk: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        at = tl.program_id(0)
        end = (at + 1) * chunk
        key = tl.load(keys + end - 1).to(tl.int32)
        first = tl.load(keys + at * chunk).to(tl.int32)
        before = tl.load(keys + at * chunk - 1, mask=at > 0, other=-1).to(tl.int32)
        follows = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32) == key
        if follows & ((first != key) | (before != key)) & (key < limit):
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            total = tl.load(edges + (at * 2 + 1) * width + column, mask=wide, other=0.0)
            going = 1
            while going > 0:
                at += 1
                total += tl.load(edges + at * 2 * width + column, mask=wide, other=0.0)
                end = (at + 1) * chunk
                after = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32)
                going = (after == key).to(tl.int32)
            _finish(
                key,
                total,
                column,
                wide,
                rows,
                more,
                split,
                width,
                means,
                squares,
                rates,
                scale,
                beta1,
                beta2,
                eps,
                adam,
            )
