"""Softmax cross-entropy over a catalog, held by this rank or spread over the ranks.

Where it is spread, each rank holds the scoring rows of its own slice of the catalog and scores the
hidden vectors of all ranks against them. What is exchanged makes the softmax exact:

    gather    hidden vectors, targets [W * M]    -> means and log-sum-exp over each slice
    gather    log-sum-exp, target logits         -> losses of all positions
    scatter   gradients of hidden vectors, summed over slices
    backward  gather the losses' weights         -> gradients of the slice's own rows

Communicated per rank and step: about 2 x M x D values, whatever the size of the catalog. No rank
waits for its device.

Shapes: W ranks, M hidden vectors of the rank that has most, m of this rank, C candidates of this
rank, D width.
"""

from typing import Any

import torch
import torch.distributed as dist

from model.linear_cross_entropy import softmax_means, target_logits, weighted_hidden
from model.row_sums import add_rows
from model.unit_rows import unit_rows, unit_rows_gradient


def gather_sizes(size: int) -> list[int]:
    """``size`` of every rank; between hosts, so that no device is waited for."""
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([size]))
    return sizes.tolist()


def all_gather_rows(
    rows: torch.Tensor, sizes: list[int] | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Rows of all ranks, each rank's part zero-padded to the longest.

    Args:
        rows: [m, ...], with its own m on every rank.
        sizes: the m of every rank, if known.

    Returns:
        [W * M, ...] with rank r's rows from r * M on, and the m of every rank.
    """
    sizes = sizes or gather_sizes(rows.shape[0])
    padded = rows.contiguous()
    if rows.shape[0] < max(sizes):
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered, sizes


def linear_cross_entropy(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    low: int,
    scale: float = 1.0,
    cosine: bool = False,
    shared: bool = False,
) -> torch.Tensor:
    """Cross-entropy of each of this rank's positions over the whole catalog.

    Args:
        hidden: float [m, D]; m may differ between ranks and be 0.
        rows: float [C, D] of the items ``low`` ... ``low + C - 1``; where shared, C may be 0.
        targets: int64 [m] item ids, or ids of no slice: the loss of such a position means nothing,
            its gradient must be zero.
        low: first item of the rows.
        scale: what scores are multiplied with.
        cosine: score by cosines, not dot products.
        shared: the rows are this rank's slice of the catalog, not all of it.

    Returns:
        float32 [m]. Its gradient for ``rows`` sums the losses of all ranks where shared, as their
        owner needs it; every rank must then call ``backward``. Inside autocast, products are
        bfloat16 and sums float32.
    """
    hidden = torch.nn.functional.normalize(hidden, dim=-1) if cosine else hidden
    bound = abs(scale) if cosine else torch.inf
    return _LinearCrossEntropy.apply(hidden * scale, rows, targets, low, bound, cosine, shared)


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
    ) -> torch.Tensor:
        kind, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        unit, inverse = unit_rows(rows, dtype) if cosine else (rows.to(dtype), None)
        hidden, sizes = hidden.to(dtype), []
        if shared:
            hidden, sizes = all_gather_rows(hidden)
            targets, _ = all_gather_rows(targets, sizes)
        means, log_sums = softmax_means(hidden, unit, bound)
        column = targets - low
        owned = (column >= 0) & (column < unit.shape[0])
        column = column.clamp(0, max(0, unit.shape[0] - 1))
        target_rows = torch.zeros_like(means)
        if unit.shape[0]:
            target_rows = unit[column] * owned[:, None]
        wanted = target_logits(hidden, target_rows, bound)
        slice_sums = log_sums
        if shared:
            log_sums, wanted = _over_slices(log_sums, wanted, len(sizes))
            means *= (slice_sums - log_sums).exp()[:, None]
        direction = means - target_rows
        if shared:
            direction = _sum_scatter(direction, sizes)
        ctx.save_for_backward(hidden, unit, inverse, log_sums, column, owned, direction)
        ctx.sizes, ctx.bound = sizes, bound
        return _own(log_sums - wanted, sizes)

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, unit, inverse, log_sums, column, owned, direction = ctx.saved_tensors
        grad_hidden = direction * weights[:, None]
        if ctx.sizes:
            weights, _ = all_gather_rows(weights, ctx.sizes)
        mixed, factor = weighted_hidden(hidden, unit, log_sums, weights, ctx.bound)
        at_targets = hidden * (-weights * owned)[:, None]
        if inverse is None:
            grad_rows = mixed * factor[:, None]
        else:
            grad_rows = unit_rows_gradient(mixed, factor * inverse, unit)
        if unit.shape[0]:
            if inverse is not None:
                at_targets = unit_rows_gradient(at_targets, inverse[column], unit[column])
            # Positions without a row here add nothing, to none: many zeros for one row take time.
            index = column.masked_fill(~owned, unit.shape[0])
            add_rows(grad_rows, index, at_targets.to(grad_rows.dtype))
        return grad_hidden, grad_rows, None, None, None, None, None


def _over_slices(
    log_sums: torch.Tensor, wanted: torch.Tensor, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target logits [W * M] of the whole catalog from those of this slice."""
    mine = torch.stack([log_sums, wanted])
    parts = mine.new_empty(world_size, *mine.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), mine)
    return parts[:, 0].logsumexp(dim=0), parts[:, 1].sum(dim=0)


def _sum_scatter(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """This rank's rows [m, D] of the sum over ranks of [W * M, D]."""
    own = rows.new_empty(max(sizes), rows.shape[1])
    dist.reduce_scatter_tensor(own, rows)
    return own[: sizes[dist.get_rank()]]


def _own(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """This rank's part of what :func:`all_gather_rows` made; all of it where nothing is shared."""
    if not sizes:
        return rows
    start = dist.get_rank() * max(sizes)
    return rows[start : start + sizes[dist.get_rank()]]
