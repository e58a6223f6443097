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

from model.kernels.compiler import row_tiles, tl, triton
from model.kernels.segment_sum import SortedIndex, accumulate, adam_rows, adam_step

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
        rates: float32 [2] on the device, used by adam instead of the step's.
    """
    if optimizer == "adam":
        tiles, *tile = row_tiles(table.shape, _TILE)
        adam = _adam_arguments(states, step, rates)
        sizes = *table.shape, len(gradient), first
        _adam[(tiles,)](table, gradient, outer, *sizes, adam, step.scale, *tile)
        return
    last = first + len(gradient)
    for rows, of_rows in (
        (slice(first, last), gradient),
        (slice(last, None), outer[: len(table) - last]),
        (slice(0, first), outer[len(table) - last :]),
    ):
        if len(of_rows):
            _UPDATES[optimizer](table[rows], *(s[rows] for s in states), of_rows, step)


def update_some(
    optimizer: str,
    table: Tensor,
    states: Sequence[Tensor],
    index: SortedIndex,
    gradients: Tensor,
    step: Step,
    rates: Tensor | None = None,
) -> None:
    """One step of ``optimizer`` for the rows of an index, in place.

    Args:
        index: [M], rows, may repeat; R is ignored.
        gradients: float32 [M, D]; those of equal rows are summed.
    """
    if optimizer == "adam":
        adam_rows(table, index, gradients, _adam_arguments(states, step, rates), step.scale)
        return
    rows, place = index.index.unique(return_inverse=True)
    sums = gradients.new_zeros(len(rows), gradients.shape[1])
    accumulate(sums, place, gradients)
    if len(rows) and rows[-1] == len(table):
        rows, sums = rows[:-1], sums[:-1]
    parts = [part[rows] for part in (table, *states)]
    _UPDATES[optimizer](*parts, sums, step)
    for whole, part in zip((table, *states), parts, strict=True):
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


_UPDATES: dict[str, Callable[..., None]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
}
UPDATES = (*_UPDATES, *(("adam",) if triton is not None else ()))


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
