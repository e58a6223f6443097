"""Softmax cross-entropy over a catalog whose rows are spread over the ranks.

Each rank holds the scoring rows of its own slice of the catalog and scores the hidden vectors of
all ranks against them. Two small all-reduces, of row maxima and of (sum of exponentials, target
logit), make the softmax exact; the backward pass sums the hidden vectors' gradients over the
slices. Communicated per rank and step: about 2 x M x D values, whatever the size of the catalog.

Shapes: W ranks, M hidden vectors of the rank that has most, C candidates of this rank, D width.
"""

from typing import Any

import torch
import torch.distributed as dist


def all_gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Rows of all ranks, each rank's part zero-padded to the longest.

    Args:
        rows: [m, ...], with its own m on every rank.

    Returns:
        [W * M, ...] with rank r's rows from r * M on, and the m of every rank.
    """
    world_size = dist.get_world_size()
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = count.new_empty(world_size)
    dist.all_gather_into_tensor(counts, count)
    sizes: list[int] = counts.tolist()
    longest = max(sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = rows.new_empty(world_size * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered, sizes


def sharded_cross_entropy(
    hidden: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, low: int
) -> torch.Tensor:
    """Cross-entropy of each of this rank's positions over the candidates of all ranks.

    Args:
        hidden: float [m, D]; m may differ between ranks and be 0.
        candidates: float [C, D], rows of the items ``low`` ... ``low + C - 1``; C may be 0.
        targets: int64 [m] item ids, each in the slice of exactly one rank, or in none: the loss
            of such a position means nothing, its gradient must be zero.
        low: first item of this rank's slice.

    Returns:
        float32 [m]. Its gradient for ``candidates`` sums the losses of all ranks, as their owner
        needs it; every rank must call ``backward``.
    """
    return _ShardedCrossEntropy.apply(hidden, candidates, targets, low)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, low: int
    ) -> torch.Tensor:
        everyone, sizes = all_gather_rows(hidden)  # [W * M, D]
        wanted, _ = all_gather_rows(targets)  # [W * M]
        logits = (everyone @ candidates.T).float()  # [W * M, C]
        column = wanted - low
        owned = (column >= 0) & (column < candidates.shape[0])
        row, column = torch.where(owned)[0], column[owned]

        row_max = logits.new_full((logits.shape[0],), torch.finfo(torch.float32).min)
        if candidates.shape[0]:
            row_max = logits.amax(dim=1)
        dist.all_reduce(row_max, dist.ReduceOp.MAX)
        logits -= row_max[:, None]
        sums = logits.new_zeros(2, logits.shape[0])  # target logit, sum of exponentials
        sums[0, row] = logits[row, column]
        probabilities = logits.exp_()
        sums[1] = probabilities.sum(dim=1)
        dist.all_reduce(sums)
        probabilities /= sums[1, :, None]

        ctx.save_for_backward(everyone, candidates, probabilities, row, column)
        ctx.sizes = sizes
        return (sums[1].log() - sums[0])[_own_rows(sizes)]

    @staticmethod
    def backward(
        ctx: Any, grad_losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        everyone, candidates, grad_logits, row, column = ctx.saved_tensors
        weight, _ = all_gather_rows(grad_losses)  # [W * M], zero where padded
        grad_logits *= weight[:, None]
        grad_logits[row, column] -= weight[row]
        grad_logits = grad_logits.to(everyone.dtype)
        grad_candidates = grad_logits.T @ everyone
        grad_everyone = grad_logits @ candidates
        dist.all_reduce(grad_everyone)
        return grad_everyone[_own_rows(ctx.sizes)], grad_candidates, None, None


def _own_rows(sizes: list[int]) -> slice:
    """Where this rank's rows lie in a tensor made by :func:`all_gather_rows`."""
    start = dist.get_rank() * max(sizes)
    return slice(start, start + sizes[dist.get_rank()])
