"""Optimizer steps on a table's rows with the formulas of FBGEMM's fused optimizers.

``update`` updates every row, in one pass over the table in memory order:

    table [R, D]    outer rows 0 ... first - 1 | candidates first ... first + C - 1 | outer rows
    gradients       of the candidates [C, D], then of the S = R - C outer rows [S, D]; gradient i of
                    the concatenation belongs to row (first + i) mod R of the table

FBGEMM's Adam does not update rows without a lookup. Here an outer row counts as looked up if its
gradient is not zero.

Shapes: R rows of the table, C candidates, S outer rows, D width.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.kernels.compiler import launch, row_tiles, tl, triton
from model.kernels.random_bits import mixed, random_bits, rounded_at_random
from model.kernels.segment_sum import (
    KINDS,
    RowOptimizer,
    SortedIndex,
    accumulate,
    joined,
    step_at,
    step_rows,
)

# Values that a program of the kernel holds at a time.
_TILE = 1024


@dataclass(frozen=True)
class Step:
    """Constants of one optimizer step.

    Attributes:
        beta1, beta2: of Adam.
        eps: of Adam and Adagrad.
        number: of the step, from 1.
        scale: factor of the gradients.
        first_row: number of the table's row that is this rank's first.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    number: int
    scale: float = 1.0
    first_row: int = 0

    @classmethod
    def counted(cls, tables: Any, scale: float = 1.0) -> "Step":
        """The next step of FBGEMM's module ``tables``, whose step count rises by one."""
        known, count = tables.optimizer_args, tables.iter_cpu.numpy()
        count += 1
        return cls(
            lr=tables.get_learning_rate(),
            beta1=known.beta1,
            beta2=known.beta2,
            eps=known.eps,
            number=int(count[0]),
            scale=scale,
        )

    def rates(self, optimizer: str) -> tuple[float, ...]:
        """The learning rate; for Adam, also the factor of the roots of its squares; float64.

        Both of Adam correct the bias of its averages.
        """
        if optimizer != "adam":
            return (self.lr,)
        lr = self.lr / (1 - self.beta1**self.number)
        return lr, 1 / (1 - self.beta2**self.number) ** 0.5

    @property
    def key(self) -> int:
        """The key of the random bits by which fp16 rows are rounded, in [0, 2^32)."""
        return mixed(self.number)


class StepOnDevice:
    """What differs from step to step, in device memory that kernels and CUDA graphs read.

    Attributes:
        rates: float32 [2], :meth:`Step.rates` of the tables' optimizer.
        encoder_lr: float32 [], learning rate of the encoder.
        key: int32 [1], the bits of :attr:`Step.key`.
    """

    # Places of the three. They are aligned to 16 bytes: for others, Triton compiles other kernels.
    _RATES, _ENCODER_LR, _KEY, _SIZE = 0, 4, 8, 12

    def __init__(self, device: torch.device) -> None:
        self._written = torch.zeros(self._SIZE, device=device)
        self.rates = self._written[self._RATES :][:2]
        self.encoder_lr = self._written[self._ENCODER_LR]
        self.key = self._written[self._KEY :][:1].view(torch.int32)

    def write(self, optimizer: str, step: Step, encoder_lr: float = 0.0) -> None:
        """Write the values of ``step`` by one copy: fills of each took the host 50 to 150 us."""
        values = np.zeros(self._SIZE, dtype=np.float32)
        for place, rate in enumerate(step.rates(optimizer), self._RATES):
            values[place] = rate
        values[self._ENCODER_LR] = encoder_lr
        values.view(np.uint32)[self._KEY] = step.key
        # Pageable memory: CUDA has read it when the call returns.
        self._written.copy_(torch.from_numpy(values), non_blocking=True)


def update(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    gradient: Tensor,
    outer: Tensor,
    first: int,
    step: Step,
    on_device: StepOnDevice | None = None,
) -> None:
    """One step of ``optimizer``, in place.

    Args:
        table: float32 or fp16 [R, D].
        states: the optimizer's state: two [R, D] for adam, [R, D] for adagrad, [R] for
            rowwise_adagrad.
        gradient: float32 [C, D] of the candidates, contiguous; may be overwritten.
        outer: float32 [S, D] of the other rows, contiguous; may be overwritten.
        first: the table's row of the first candidate.
        on_device: the values of ``step``, which the kernels on CUDA read; None: written here.
    """
    if has_kernels(table):
        tiles, *tile = row_tiles(table.shape, _TILE)
        how = _row_optimizer(optimizer, table, states, step, on_device)
        sizes = *table.shape, len(gradient), first
        given = table, gradient, outer, *sizes, how
        launch(_update_all, (tiles,), *given, *tile)
        return
    last = first + len(gradient)
    parts = table, *states
    scored: list[tuple[slice, Tensor]] = [(slice(first, last), gradient)]
    if optimizer == "adam":
        touched = outer.any(dim=1).nonzero()[:, 0]
        places = (last + touched) % len(table)
        _update_at(optimizer, parts, places, outer[touched], step)
    else:  # a gradient of zero changes no row
        scored += [
            (slice(last, None), outer[: len(table) - last]),
            (slice(0, first), outer[len(table) - last :]),
        ]
    for rows, of_rows in scored:
        if len(of_rows):
            _update_at(optimizer, parts, rows, of_rows, step)


def update_some(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    index: SortedIndex,
    gradients: Sequence[Tensor],
    step: Step,
    on_device: StepOnDevice | None = None,
) -> None:
    """One step of ``optimizer`` for the rows of an index, in place.

    Args:
        table: float32 or fp16 [R, D].
        index: [M], rows, may repeat; R is ignored.
        gradients: one or two tensors, float32, together [M, D]; those of equal rows are summed.
    """
    if has_kernels(table):
        how = _row_optimizer(optimizer, table, states, step, on_device)
        step_at(table, index, gradients, how)
        return
    rows, place = index.index.unique(return_inverse=True)
    gradient = joined(gradients)
    sums = gradient.new_zeros(len(rows), gradient.shape[1])
    accumulate(sums, place, gradient)
    if len(rows) and rows[-1] == len(table):
        rows, sums = rows[:-1], sums[:-1]
    _update_at(optimizer, (table, *states), rows, sums, step)


def has_kernels(table: Tensor) -> bool:
    """Whether this table is updated by a kernel, else by plain torch."""
    return triton is not None and table.is_cuda


def _update_at(
    optimizer: str, parts: Sequence[Tensor], rows: Tensor | slice, gradient: Tensor, step: Step
) -> None:
    """Update the different ``rows`` of table and state; float32 slices in place."""
    table, *states = parts
    given = [part[rows] for part in parts]
    values, *kept = given
    updated = values.float()
    _UPDATES[optimizer](updated, *kept, gradient, step)
    if table.dtype == torch.float16:
        numbers = torch.arange(len(table), device=table.device)[rows] + step.first_row
        bits = random_bits(step.key, numbers, gradient.shape[1])
        table[rows] = rounded_at_random(updated, bits)
        parts, given = states, kept
    if not isinstance(rows, slice):
        for whole, part in zip(parts, given, strict=True):
            whole[rows] = part


def _row_optimizer(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    step: Step,
    on_device: StepOnDevice | None,
) -> RowOptimizer:
    if on_device is None:
        on_device = StepOnDevice(table.device)
        on_device.write(optimizer, step)
    rates = on_device.rates
    state, squares, *_ = *states, rates, rates  # any tensor where there is no state
    return RowOptimizer(
        tl.constexpr(KINDS.index(optimizer)),
        state,
        squares,
        rates,
        on_device.key,
        step.beta1,
        step.beta2,
        step.eps,
        step.scale,
        step.first_row,
    )


def _sgd(rows: Tensor, gradient: Tensor, step: Step) -> None:
    rows.add_(gradient, alpha=-step.lr * step.scale)


def _adagrad(rows: Tensor, sums: Tensor, gradient: Tensor, step: Step) -> None:
    sums.addcmul_(gradient, gradient, value=step.scale**2)
    rows.addcdiv_(gradient, sums.sqrt().add_(step.eps), value=-step.lr * step.scale)


def _rowwise_adagrad(rows: Tensor, sums: Tensor, gradient: Tensor, step: Step) -> None:
    means = torch.linalg.vector_norm(gradient, dim=1).square_().div_(gradient.shape[1])
    sums.add_(means, alpha=step.scale**2)
    shrink = sums.sqrt().add_(step.eps).reciprocal_()
    rows.addcmul_(gradient, shrink[:, None], value=-step.lr * step.scale)


def _adam_by_torch(
    rows: Tensor, means: Tensor, squares: Tensor, gradient: Tensor, step: Step
) -> None:
    rate, shrink = step.rates("adam")
    gradient = gradient.mul_(step.scale)
    means.mul_(step.beta1).add_(gradient, alpha=1 - step.beta1)
    squares.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
    rows.addcdiv_(means, squares.sqrt().mul_(shrink).add_(step.eps), value=-rate)


_UPDATES: dict[str, Callable[..., None]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam_by_torch,
}


if triton is not None:

    @triton.jit
    def _update_all(
        table,
        gradient,
        outer,
        count,
        width,
        candidates,
        first,
        how,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
        column = tl.arange(0, columns)[None]
        scored, wide = row < candidates, column < width
        of_outer = (row >= candidates) & (row < count)
        grad = tl.load(gradient + row * width + column, mask=scored & wide, other=0.0)
        behind = outer + (row - candidates) * width + column
        grad += tl.load(behind, mask=of_outer & wide, other=0.0)
        touched = tl.max(tl.abs(grad), axis=1, keep_dims=True) > 0
        there = scored | (of_outer & touched)
        step_rows(table, (row + first) % count, there, column, width, grad, how)
