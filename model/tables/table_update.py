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

import torch
from torch import Tensor

from model.kernels.compiler import launch, row_tiles, tl, triton
from model.kernels.segment_sum import SortedIndex, accumulate, adam_rows, adam_step, joined

# Values that a program of the kernel holds at a time.
_TILE = 1024


@dataclass(frozen=True)
class Step:
    """Constants of one optimizer step.

    Adagrad has Adam's eps. Steps are numbered from 1; ``scale`` is a factor of the gradients.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    number: int
    scale: float = 1.0

    @classmethod
    def counted(cls, table: Any, scale: float = 1.0) -> "Step":
        """The next step of FBGEMM's module ``table``, which counts it."""
        known = table.optimizer_args
        return cls(
            lr=table.get_learning_rate(),
            beta1=known.beta1,
            beta2=known.beta2,
            eps=known.eps,
            number=int(table.iter_cpu.add_(1)),
            scale=scale,
        )

    @property
    def rates(self) -> tuple[float, float]:
        """Factors of Adam's means and of its roots of squares, bias-corrected in float64."""
        lr = self.lr / (1 - self.beta1**self.number)
        return lr, 1 / (1 - self.beta2**self.number) ** 0.5


def update(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    gradient: Tensor,
    outer: Tensor,
    first: int,
    step: Step,
    rates: Tensor | None = None,
) -> None:
    """One step of ``optimizer``, in place.

    Args:
        table: float32 [R, D].
        states: the optimizer's state: two [R, D] for adam, [R, D] for adagrad, [R] for
            rowwise_adagrad.
        gradient: float32 [C, D] of the candidates, contiguous; may be overwritten.
        outer: float32 [S, D] of the other rows, contiguous; may be overwritten.
        first: the table's row of the first candidate.
        rates: float32 [2] on the device, used by Adam's kernels instead of the step's.
    """
    if optimizer == "adam" and has_adam_kernels(table):
        tiles, *tile = row_tiles(table.shape, _TILE)
        adam = _adam_arguments(states, step, rates)
        sizes = *table.shape, len(gradient), first
        given = table, gradient, outer, *sizes, adam, step.scale
        launch(_adam, (tiles,), *given, *tile)
        return
    last = first + len(gradient)
    scored: list[tuple[slice, Tensor]] = [(slice(first, last), gradient)]
    if optimizer == "adam":
        touched = outer.any(dim=1).nonzero()[:, 0]
        places = (last + touched) % len(table)
        _update_at(optimizer, (table, *states), places, outer[touched], step)
    else:  # a gradient of zero changes no row
        scored += [
            (slice(last, None), outer[: len(table) - last]),
            (slice(0, first), outer[len(table) - last :]),
        ]
    for rows, of_rows in scored:
        if len(of_rows):
            _UPDATES[optimizer](table[rows], *(s[rows] for s in states), of_rows, step)


def update_some(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    index: SortedIndex,
    gradients: Sequence[Tensor],
    step: Step,
    rates: Tensor | None = None,
) -> None:
    """One step of ``optimizer`` for the rows of an index, in place.

    Args:
        index: [M], rows, may repeat; R is ignored.
        gradients: one or two tensors, float32, together [M, D]; those of equal rows are summed.
    """
    if optimizer == "adam" and has_adam_kernels(table):
        adam_rows(table, index, gradients, _adam_arguments(states, step, rates), step.scale)
        return
    rows, place = index.index.unique(return_inverse=True)
    gradient = joined(gradients)
    sums = gradient.new_zeros(len(rows), gradient.shape[1])
    accumulate(sums, place, gradient)
    if len(rows) and rows[-1] == len(table):
        rows, sums = rows[:-1], sums[:-1]
    _update_at(optimizer, (table, *states), rows, sums, step)


def has_adam_kernels(table: Tensor) -> bool:
    """Whether Adam updates this table by a kernel, else by plain torch."""
    return triton is not None and table.is_cuda


def _update_at(
    optimizer: str, parts: Sequence[Tensor], rows: Tensor, gradient: Tensor, step: Step
) -> None:
    """Update the different ``rows`` of table and state."""
    copies = [part[rows] for part in parts]
    _UPDATES[optimizer](*copies, gradient, step)
    for whole, part in zip(parts, copies, strict=True):
        whole[rows] = part


def _adam_arguments(states: Sequence[Tensor], step: Step, rates: Tensor | None) -> tuple[Any, ...]:
    """State and constants as :func:`~model.kernels.segment_sum.adam_step` takes them."""
    if rates is None:
        rates = torch.tensor(step.rates, device=states[0].device)
    return *states, rates, step.beta1, step.beta2, step.eps


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
    rate, shrink = step.rates
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
UPDATES = tuple(_UPDATES)


if triton is not None:

    @triton.jit
    def _adam(
        table,
        gradient,
        outer,
        count,
        width,
        candidates,
        first,
        adam,
        scale,
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
        grad *= scale
        touched = tl.max(tl.abs(grad), axis=1, keep_dims=True) > 0
        inside = (scored | (of_outer & touched)) & wide
        adam_step(table, (row + first) % count * width + column, inside, grad, adam)
