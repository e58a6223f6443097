"""Rows added to other rows, several of them to the same one, with the same bits in every run.

    index 2 0 2 5 -> sorted 0 2 2 5 -> a program for each run -> rows[0] += ., rows[2] += . + ., ...

``index_put_(accumulate=True)`` of torch sorts likewise, and then takes the duplicates one by one.

Shapes: M values, C rows, D width.
"""
# ruff: noqa: ANN001 - Triton takes annotations of a kernel for its own

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None

# Values of a run, and of each so many columns, that a program adds at a time.
_BLOCK, _COLUMNS = 32, 64


def add_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    values: torch.Tensor,
    more: torch.Tensor | None = None,
) -> None:
    """rows[index[i]] += values[i], in place, for every i whose index is below C.

    Args:
        rows: float [C, D], contiguous.
        index: int64 [M], not negative; C and more: nowhere.
        values: [M, D] of the same dtype.
        more: [S, D] of the same dtype, contiguous: rows C ... C + S - 1, which lie elsewhere.
    """
    more = rows[:0] if more is None else more
    count = len(rows) + len(more)
    if not len(index) or not count:
        return
    if not _has_kernel(rows, count):
        for part, begin in ((rows, 0), (more, len(rows))):
            if len(part):
                _add(part, index - begin if begin else index, values)
        return
    # A sort passes over the keys once for every few of their bits.
    short = count < torch.iinfo(torch.int16).max
    keys = index.clamp(max=count).to(torch.int16 if short else torch.int32)
    keys, order = keys.sort(stable=True)
    width, values = rows.shape[1], values.contiguous()
    _add_runs[(len(keys), triton.cdiv(width, _COLUMNS))](
        keys,
        order,
        values,
        rows,
        more,
        len(keys),
        len(rows),
        count,
        width,
        _BLOCK,
        _COLUMNS,
    )


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
    def _add_runs(
        keys,
        order,
        values,
        rows,
        more,
        count,
        split,
        limit,
        width,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        start = tl.program_id(0)
        key = tl.load(keys + start).to(tl.int32)
        before = tl.load(keys + start - 1, mask=start > 0, other=-1).to(tl.int32)
        if (key != before) & (key < limit):  # a run begins here
            column = tl.program_id(1) * columns + tl.arange(0, columns)
            wide = column < width
            sums = tl.zeros([block, columns], tl.float32)
            at = start + tl.arange(0, block)
            same = tl.load(keys + at, mask=at < count, other=-1).to(tl.int32) == key
            found = tl.sum(same.to(tl.int32), axis=0)
            while found > 0:
                of = tl.load(order + at, mask=same, other=0)
                inside = same[:, None] & wide
                sums += tl.load(values + of[:, None] * width + column, mask=inside, other=0.0)
                at += block
                same = tl.load(keys + at, mask=at < count, other=-1).to(tl.int32) == key
                found = tl.sum(same.to(tl.int32), axis=0)
            row = key.to(tl.int64)
            start_of = tl.where(key < split, rows + row * width, more + (row - split) * width)
            to = start_of + column
            total = tl.load(to, mask=wide, other=0.0) + tl.sum(sums, axis=0)
            tl.store(to, total, mask=wide)
