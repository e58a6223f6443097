"""Softmax cross-entropy over a catalog that this rank holds or that is spread over the ranks.

Spread, each rank holds the scoring rows of its slice of the catalog and scores the hidden vectors
of all ranks. These exchanges make the softmax exact:

    gather           hidden vectors, targets [W * M]  -> means and log-sum-exp over each slice
    gather           log-sum-exp, target logits       -> losses of all positions
    reduce-scatter   gradients of hidden vectors, summed over slices
    gather           (backward) the losses' weights   -> gradients of the slice's rows

A rank sends about 2 x M x D values per step, whatever the size of the catalog, and its host never
waits for its device.

Distillation: with the mean q of the probabilities of teachers, models trained before, the loss is

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

from model.kernels import side_stream
from model.kernels.l2_normalize import normalize_rows, normalize_rows_gradient
from model.kernels.segment_sum import add_rows, sort_index
from model.losses.linear_cross_entropy import softmax_means, target_logits, weighted_hidden


def gather_sizes(size: int) -> list[int]:
    """``size`` of every rank, exchanged between hosts, so that none waits for its device."""
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([size]))
    return sizes.tolist()


def all_gather_rows(
    rows: torch.Tensor, sizes: list[int] | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Rows of all ranks [W * M, ...], rank r's from r * M on, zero-padded; and m of every rank.

    Args:
        rows: [m, ...].
        sizes: m of every rank, if known.
    """
    sizes = sizes or gather_sizes(rows.shape[0])
    padded = rows.contiguous()
    if rows.shape[0] < max(sizes):
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered, sizes


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's logits at this rank's positions, as the factors hidden @ rows.T.

    Attributes:
        hidden: [m, E], scaled.
        rows: [C, E] of the items that this rank scores.
        bound: upper bound of the logits' absolute values.
        log_sums: log-sum-exp [m] over the whole catalog; None until the loss has computed it.
    """

    hidden: torch.Tensor
    rows: torch.Tensor
    bound: float
    log_sums: torch.Tensor | None = None


def linear_cross_entropy(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    low: int,
    scale: float = 1.0,
    cosine: bool = False,
    shared: bool = False,
    teacher_logits: Sequence[TeacherLogits] = (),
    teacher_share: float = 0.0,
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """Cross-entropy of each of this rank's positions over the whole catalog.

    Args:
        hidden: float [m, D]; m may differ between ranks and be 0.
        rows: float [C, D] of the items ``low`` ... ``low + C - 1``; if ``shared``, C may be 0.
        targets: int64 [m] item ids. The loss of a position whose target is in no slice is
            meaningless, and the gradient given for it must be zero.
        low: first item of the rows.
        scale: factor of the scores.
        cosine: score by cosines instead of dot products.
        shared: the rows are this rank's slice of the catalog, not all of it.
        teacher_logits: one for each teacher, on every rank.
        teacher_share: weight of all teachers together; the target has the rest.
        sizes: m of every rank, if known.

    Returns:
        float32 [m]. If ``shared``, every rank must call ``backward``, and the gradient for ``rows``
        is that of the losses of all ranks. Inside autocast, products are bfloat16, sums float32.
    """
    hidden = torch.nn.functional.normalize(hidden, dim=-1) if cosine else hidden
    bound = abs(scale) if cosine else torch.inf
    options = low, bound, cosine, shared, teacher_logits, teacher_share, sizes
    return _LinearCrossEntropy.apply(hidden * scale, rows, targets, *options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        low: int,
        bound: float,
        cosine: bool,
        shared: bool,
        teacher_logits: Sequence[TeacherLogits],
        teacher_share: float,
        sizes: list[int] | None,
    ) -> torch.Tensor:
        kind, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        unit, inverse = normalize_rows(rows, dtype) if cosine else (rows.to(dtype), None)
        hidden = hidden.to(dtype)
        if shared:
            hidden, sizes = all_gather_rows(hidden, sizes)
            targets, _ = all_gather_rows(targets, sizes)
        else:
            sizes = []
        means, log_sums = softmax_means(hidden, unit, bound)
        column = targets - low
        owned = (column >= 0) & (column < unit.shape[0])
        # Positions whose target is elsewhere get no row: adding many zeros to one row takes time.
        nowhere = unit.shape[0]
        index = column.masked_fill(~owned, nowhere)
        ctx.index = side_stream.start(lambda: sort_index(index, nowhere))
        column = column.clamp(0, max(0, unit.shape[0] - 1))
        target_rows = torch.zeros_like(means)
        if unit.shape[0]:
            target_rows = unit[column] * owned[:, None]
        wanted = target_logits(hidden, target_rows, bound)
        aims = target_rows
        if teacher_logits:
            taught, teacher_logits = _taught(teacher_logits, unit, sizes)
            aims = torch.lerp(target_rows.to(taught.dtype), taught, teacher_share)
            wanted = torch.lerp(wanted, (hidden * taught).sum(dim=1), teacher_share)
        slice_sums = log_sums
        if shared:
            log_sums, wanted = _over_slices(log_sums, wanted, len(sizes))
            means *= (slice_sums - log_sums).exp()[:, None]
        direction = means - aims
        if shared:
            direction = _sum_scatter(direction, sizes)
        ctx.save_for_backward(hidden, unit, inverse, log_sums, column, owned, direction)
        ctx.sizes, ctx.bound, ctx.teacher_logits, ctx.teacher_share = (
            sizes,
            bound,
            teacher_logits,
            teacher_share,
        )
        return _own(log_sums - wanted, sizes)

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, unit, inverse, log_sums, column, owned, direction = ctx.saved_tensors
        grad_hidden = direction * weights[:, None]
        if ctx.sizes:
            weights, _ = all_gather_rows(weights, ctx.sizes)
        mixed, factor = weighted_hidden(hidden, unit, log_sums, weights, ctx.bound)
        if ctx.teacher_logits:
            mixed, factor = mixed * factor[:, None], torch.ones_like(factor)
        for teacher in ctx.teacher_logits:
            less, times = weighted_hidden(
                teacher.hidden, teacher.rows, teacher.log_sums, weights, teacher.bound, hidden
            )
            mixed.addcmul_(less, times[:, None], value=-ctx.teacher_share / len(ctx.teacher_logits))
        at_targets = hidden * (-weights * owned * (1 - ctx.teacher_share))[:, None]
        if inverse is None:
            grad_rows = mixed * factor[:, None]
        else:
            grad_rows = normalize_rows_gradient(mixed, factor * inverse, unit)
        if unit.shape[0]:
            if inverse is not None:
                at_targets = normalize_rows_gradient(at_targets, inverse[column], unit[column])
            add_rows(grad_rows, ctx.index.result(), at_targets.to(grad_rows.dtype))
        return grad_hidden, grad_rows, *([None] * 8)


def _taught(
    teacher_logits: Sequence[TeacherLogits], unit: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, list[TeacherLogits]]:
    """This slice's part of the mean row [W * M, D] under the teachers' probabilities.

    And their logits at the positions of all ranks, with log-sum-exp over the whole catalog.
    """
    total, gathered = torch.zeros((), device=unit.device), []
    for teacher in teacher_logits:
        hidden = teacher.hidden
        if sizes:
            hidden, _ = all_gather_rows(hidden, sizes)
        means, log_sums = softmax_means(hidden, teacher.rows, teacher.bound, unit)
        if sizes:
            slice_sums, log_sums = log_sums, _gathered(log_sums, len(sizes)).logsumexp(dim=0)
            means *= (slice_sums - log_sums).exp()[:, None]
        total = total + means / len(teacher_logits)
        gathered.append(TeacherLogits(hidden, teacher.rows, teacher.bound, log_sums))
    return total, gathered


def _over_slices(
    log_sums: torch.Tensor, wanted: torch.Tensor, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target logits [W * M] over the whole catalog from those of this slice."""
    parts = _gathered(torch.stack([log_sums, wanted]), world_size)
    return parts[:, 0].logsumexp(dim=0), parts[:, 1].sum(dim=0)


def _gathered(mine: torch.Tensor, world_size: int) -> torch.Tensor:
    """Every rank's tensor of this shape: [W, ...]."""
    parts = mine.new_empty(world_size, *mine.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1) if mine.ndim > 1 else parts.flatten(), mine)
    return parts


def _sum_scatter(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """This rank's rows [m, D] of the sum over ranks of [W * M, D]."""
    own = rows.new_empty(max(sizes), rows.shape[1])
    dist.reduce_scatter_tensor(own, rows)
    return own[: sizes[dist.get_rank()]]


def _own(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """This rank's part of rows from :func:`all_gather_rows`; all of them if nothing is shared."""
    if not sizes:
        return rows
    start = dist.get_rank() * max(sizes)
    return rows[start : start + sizes[dist.get_rank()]]
