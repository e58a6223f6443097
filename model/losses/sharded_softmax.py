"""Softmax cross-entropy over a catalog that this rank holds or that is spread over the ranks.

If it is spread, each rank scores the hidden vectors of all ranks against its slice of the catalog.
These exchanges make the softmax exact:

    gather           hidden vectors, targets [W * M]  -> means and log-sum-exp over each slice
    gather           log-sum-exp, target logits       -> losses of all positions
    reduce-scatter   gradients of hidden vectors, summed over slices
    gather           (backward) the losses' weights   -> gradients of the slice's rows

A rank sends about 2 x M x D values per step; its host never waits for its device.

Distillation: with the mean q of the teachers' probabilities, the loss is

    log sum_j exp(h . c_j) - h . ((1 - share) c_target + share sum_j q_j c_j)

The last sum is a mean of rows under another softmax: the same kernels compute it and its gradient.

Shapes: W ranks, m positions of this rank, M = the largest m of any rank, C candidates of this rank,
D width, E width of a teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels import side_stream
from model.kernels.l2_normalize import (
    normalize_rows,
    normalize_rows_gradient,
    product_dtype,
)
from model.kernels.segment_sum import add_rows, sort_index
from model.kernels.side_stream import Pending
from model.losses.linear_cross_entropy import softmax_means, target_logits, weighted_hidden


def all_gather_rows(rows: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """Rows [m, ...] of all ranks as [W * M, ...], zero-padded, rank r's from r * M on; and sizes.

    If ``sizes``, m of every rank, are not given, hosts exchange them without waiting for devices.
    """
    if not sizes:
        counts = torch.empty(dist.get_world_size(), dtype=torch.int64)
        dist.all_gather_into_tensor(counts, torch.tensor([len(rows)]))
        sizes = counts.tolist()
    padded = rows.contiguous()
    if rows.shape[0] < max(sizes):
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered, sizes


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's logits at this rank's positions, as the factors hidden @ rows.T."""

    hidden: Tensor  # [m, E], scaled
    rows: Tensor  # [C, E] of the items that this rank scores
    bound: float  # upper bound of the logits' absolute values
    log_sums: Tensor | None = None  # [m], over the whole catalog; None: the loss computes it


@dataclass(frozen=True)
class TeacherTargets:
    """What takes a share of the target's weight: the mean of the teachers' probabilities."""

    logits: Sequence[TeacherLogits] = ()  # of each teacher, at this rank's positions
    share: float = 0.0  # summed weight of all teachers


NO_TEACHERS = TeacherTargets()


@dataclass(frozen=True)
class Beside:
    """The scored rows, and what the loss computes of them alone: it may run while the encoder does.

    With a side stream (``model/kernels/side_stream.py``) it runs there from :meth:`start` on.

    Attributes:
        rows: float [C, D].
        cosine: scores are cosines, else dot products.
        unit: the rows [C, D] as products take them, at length 1 for cosines, and the inverses [C]
            of their lengths; None for dot products.
        in_backward: the rows' gradient runs on the side stream, too; else it has space before it,
            for ``join_gradients``.
    """

    rows: Tensor
    cosine: bool
    unit: Pending[tuple[Tensor, Tensor | None]]
    in_backward: bool

    @classmethod
    def start(cls, rows: Tensor, cosine: bool = False, in_backward: bool = False) -> "Beside":
        """Start for the rows [C, D] of :func:`linear_cross_entropy`, inside the same autocast.

        Args:
            in_backward: possible only if nothing but work of ``side_stream.run`` reads the rows'
                gradient, as with this project's lookup.
        """
        given = rows.detach(), product_dtype(rows), cosine
        return cls(rows, cosine, side_stream.start(lambda: _unit_rows(*given)), in_backward)


def linear_cross_entropy(
    hidden: Tensor,
    beside: Beside,
    targets: Tensor,
    low: int,
    scale: float = 1.0,
    shared: bool = False,
    teachers: TeacherTargets = NO_TEACHERS,
    sizes: list[int] | None = None,
) -> Tensor:
    """Cross-entropy of each of this rank's positions over the whole catalog.

    Args:
        hidden: float [m, D]; m may differ between ranks and be 0.
        beside: started for the rows of the items ``low`` ... ``low + C - 1``: all items or, if
            ``shared``, this rank's slice of the catalog, where C may be 0.
        targets: int64 [m] item ids. The loss of a position whose target is in no slice is
            meaningless, and the gradient given for it must be zero.
        scale: factor of the scores.
        sizes: m of every rank, if known.

    Returns:
        float32 [m]. If ``shared``, every rank must call ``backward``, and the gradient for the rows
        is that of the losses of all ranks. Inside autocast, products are bfloat16, sums float32.
    """
    hidden = torch.nn.functional.normalize(hidden, dim=-1) if beside.cosine else hidden
    bound = abs(scale) if beside.cosine else torch.inf
    options = low, bound, shared, teachers, sizes, beside
    return _LinearCrossEntropy.apply(hidden * scale, beside.rows, targets, *options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, *options: Any) -> Tensor:
        low, bound, shared, teachers, sizes, beside = options
        unit, inverse = beside.unit.result()
        hidden, items = hidden.to(unit.dtype), len(rows)
        if shared:
            hidden, sizes = all_gather_rows(hidden, sizes)
            targets, _ = all_gather_rows(targets, sizes)
        else:
            sizes = []
        means, log_sums = softmax_means(hidden, unit, bound)
        column = targets - low
        owned = (column >= 0) & (column < items)
        # Positions with targets in other slices get no row: adding many zeros to one row is slow.
        index = column.masked_fill(~owned, items)
        ctx.index = side_stream.start(lambda: sort_index(index, items))
        column = column.clamp(0, max(0, items - 1))
        aims = unit[column] * owned[:, None] if items else torch.zeros_like(means)
        wanted = target_logits(hidden, aims, bound)
        if teachers.logits:
            taught, teachers = _taught(teachers, unit, sizes)
            aims = torch.lerp(aims.to(taught.dtype), taught, teachers.share)
            wanted = torch.lerp(wanted, (hidden * taught).sum(dim=1), teachers.share)
        if sizes:
            log_sums, wanted = _of_all_slices(means, log_sums, wanted)
        direction, losses = means - aims, log_sums - wanted
        if sizes:
            rank, most = dist.get_rank(), max(sizes)
            summed = direction.new_empty(most, direction.shape[1])
            dist.reduce_scatter_tensor(summed, direction)
            direction = summed[: sizes[rank]]
            losses = losses[rank * most : rank * most + sizes[rank]]
        ctx.save_for_backward(hidden, unit, inverse, log_sums, column, owned, direction)
        ctx.sizes, ctx.bound, ctx.teachers = sizes, bound, teachers
        ctx.on_side_stream = beside.in_backward
        # In place, rows may come after a whole other table.
        ctx.before = 0 if beside.in_backward else rows.storage_offset()
        return losses

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        hidden, unit, inverse, log_sums, column, owned, direction = ctx.saved_tensors
        grad_hidden = direction * weights[:, None]
        if ctx.sizes:
            weights, _ = all_gather_rows(weights, ctx.sizes)
        given = weights, hidden, unit, inverse, log_sums, column, owned
        if ctx.on_side_stream:
            for_rows = side_stream.start(lambda: _gradient_of_rows(ctx, *given)).unfinished()
        else:
            for_rows = _gradient_of_rows(ctx, *given)
        return grad_hidden, for_rows, *([None] * 7)


def _gradient_of_rows(
    ctx: Any,
    weights: Tensor,
    hidden: Tensor,
    unit: Tensor,
    inverse: Tensor | None,
    log_sums: Tensor,
    column: Tensor,
    owned: Tensor,
) -> Tensor:
    """The gradient [C, D] for the rows, by the losses' ``weights`` [W * M] of all ranks."""
    mixed, factor = weighted_hidden(hidden, unit, log_sums, weights, ctx.bound)
    teachers: TeacherTargets = ctx.teachers
    if teachers.logits:
        mixed, factor = mixed * factor[:, None], torch.ones_like(factor)
    for teacher in teachers.logits:
        assert teacher.log_sums is not None
        less, times = weighted_hidden(
            teacher.hidden, teacher.rows, teacher.log_sums, weights, teacher.bound, hidden
        )
        mixed.addcmul_(less, times[:, None], value=-teachers.share / len(teachers.logits))
    at_targets = hidden * (-weights * owned * (1 - teachers.share))[:, None]
    if inverse is None:
        gradient = mixed * factor[:, None]
    else:
        gradient = normalize_rows_gradient(mixed, factor * inverse, unit, ctx.before)
    if unit.shape[0]:
        if inverse is not None:
            at_targets = normalize_rows_gradient(at_targets, inverse[column], unit[column])
        add_rows(gradient, ctx.index.result(), at_targets.to(gradient.dtype))
    return gradient


@torch.no_grad()
def _unit_rows(rows: Tensor, dtype: torch.dtype, cosine: bool) -> tuple[Tensor, Tensor | None]:
    return normalize_rows(rows, dtype) if cosine else (rows.to(dtype), None)


def _of_all_slices(means: Tensor, log_sums: Tensor, *added: Tensor) -> tuple[Tensor, ...]:
    """The log-sum-exp over the whole catalog, [N] as ``log_sums``, those over this rank's slice.

    Args:
        means: [N, D] over the slice; become, **in place**, its part of those over the catalog.
        added: [N] each, of the slice; returned as sums over all slices.
    """
    each_rank = [1] * dist.get_world_size()
    slices, _ = all_gather_rows(torch.stack([log_sums, *added])[None], each_rank)
    whole, *rest = slices.unbind(1)  # [W, N] each
    whole = whole.logsumexp(dim=0)
    means *= (log_sums - whole).exp()[:, None]
    return whole, *(part.sum(dim=0) for part in rest)


def _taught(
    teachers: TeacherTargets, unit: Tensor, sizes: list[int]
) -> tuple[Tensor, TeacherTargets]:
    """This slice's part of the teachers' mean rows [W * M, D]; the teachers for all ranks."""
    total, gathered = torch.zeros((), device=unit.device), []
    for teacher in teachers.logits:
        hidden = teacher.hidden
        if sizes:
            hidden, _ = all_gather_rows(hidden, sizes)
        means, log_sums = softmax_means(hidden, teacher.rows, teacher.bound, unit)
        if sizes:
            (log_sums,) = _of_all_slices(means, log_sums)
        total = total + means / len(teachers.logits)
        gathered.append(TeacherLogits(hidden, teacher.rows, teacher.bound, log_sums))
    return total, TeacherTargets(gathered, teachers.share)
