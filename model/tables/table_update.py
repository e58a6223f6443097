"""Updates of a table's rows by their gradients, as FBGEMM's fused optimizers do them.

``update_some``: rows that were looked up, gradients of equal ids summed.
``update``: every row has a gradient: one pass over memory, in no order of ids.

    table [R, D]       row 0 | candidates, rows first ... first + C - 1 | others
    gradients          "others", S = R - C rows, behind those of the candidates [C, D]:
                       row i of both together is for row (first + i) mod R of the table

Formulas are FBGEMM's. It does not touch a row that was not looked up; here an outer row counts as
looked up if its gradient is not zero, which only Adam can tell.

Shapes: R rows of the table, C candidates, S = R - C outer rows, D width.
"""
# ruff: noqa: ANN001 - Triton takes annotations of a kernel for its own

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.kernels.compiler import row_tiles, tl, triton
from model.kernels.segment_sum import SortedIndex, adam_rows, adam_step

# Values that a program of the kernel holds at a time.
_TILE = 1024


@dataclass(frozen=True)
class Step:
    """What an optimizer needs to know besides gradients.

    Attributes:
        lr: learning rate.
        beta1, beta2, eps: as of Adam.
        number: of this step, from 1.
        scale: what gradients are multiplied with.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    number: int
    scale: float = 1.0

    @property
    def rates(self) -> tuple[float, float]:
        """What Adam multiplies its means and its roots with, bias corrections included.

        These are left to the host, which has float64.
        """
        return (
            self.lr / (1 - self.beta1**self.number),
            1 / (1 - self.beta2**self.number) ** 0.5,
        )


def update(
    optimizer: str,
    table: torch.Tensor,
    states: Sequence[torch.Tensor],
    gradient: torch.Tensor,
    outer: torch.Tensor,
    first: int,
    step: Step,
    rates: torch.Tensor | None = None,
) -> None:
    """One step of ``optimizer``, in place.

    Args:
        optimizer: one of ``UPDATES``.
        table: float32 [R, D].
        states: of FBGEMM's optimizer: two [R, D] of adam, [R, D] of adagrad, [R] of
            rowwise_adagrad.
        gradient: float32 [C, D] of the candidates, contiguous; may be overwritten.
        outer: float32 [S, D] of the other rows, contiguous; may be overwritten.
        first: the table's row of the first candidate.
        rates: float32 [2] on the device, of adam: they count instead of the step's.
    """
    if optimizer == "adam":
        count, width = table.shape
        tiles, block, columns = row_tiles(count, width, _TILE)
        adam = _adam_arguments(states, step, rates)
        sizes = count, len(gradient), width, first
        _adam[(tiles,)](table, gradient, outer, *sizes, adam, step.scale, block, columns)
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
    table: torch.Tensor,
    states: Sequence[torch.Tensor],
    index: SortedIndex,
    gradients: torch.Tensor,
    step: Step,
    rates: torch.Tensor | None = None,
) -> None:
    """One step of ``optimizer`` for the rows that are named, in place.

    Args:
        table, states, rates: as of :func:`update`.
        index: [M], rows that may occur repeatedly; R: nowhere.
        gradients: float32 [M, D], of a row the sum of its own.
    """
    if optimizer == "adam":
        adam_rows(table, index, gradients, _adam_arguments(states, step, rates), step.scale)
        return
    rows, place = index.index.unique(return_inverse=True)
    sums = gradients.new_zeros(len(rows), gradients.shape[1])
    sums.index_put_((place,), gradients, accumulate=True)
    if len(rows) and rows[-1] == len(table):
        rows, sums = rows[:-1], sums[:-1]
    parts = [part[rows] for part in (table, *states)]
    _UPDATES[optimizer](*parts, sums, step)
    for whole, part in zip((table, *states), parts, strict=True):
        whole[rows] = part


def _adam_arguments(
    states: Sequence[torch.Tensor], step: Step, rates: torch.Tensor | None
) -> tuple[Any, ...]:
    """State and constants as :func:`~model.kernels.segment_sum.adam_step` takes them."""
    if rates is None:
        rates = torch.tensor(step.rates, device=states[0].device)
    return *states, rates, step.beta1, step.beta2, step.eps


def _sgd(rows: torch.Tensor, gradient: torch.Tensor, step: Step) -> None:
    rows.add_(gradient, alpha=-step.lr * step.scale)


def _adagrad(rows: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor, step: Step) -> None:
    sums.addcmul_(gradient, gradient, value=step.scale**2)
    rows.addcdiv_(gradient, sums.sqrt().add_(step.eps), value=-step.lr * step.scale)


def _rowwise_adagrad(
    rows: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor, step: Step
) -> None:
    means = torch.linalg.vector_norm(gradient, dim=1).square_().div_(gradient.shape[1])
    sums.add_(means, alpha=step.scale**2)
    shrink = sums.sqrt().add_(step.eps).reciprocal_()
    rows.addcmul_(gradient, shrink[:, None], value=-step.lr * step.scale)


_UPDATES = {"sgd": _sgd, "adagrad": _adagrad, "rowwise_adagrad": _rowwise_adagrad}
UPDATES = (*_UPDATES, *(("adam",) if triton is not None else ()))


if triton is not None:

    @triton.jit
    def _adam(
        table,
        gradient,
        outer,
        count,
        candidates,
        width,
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
