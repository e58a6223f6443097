"""Worker: the shared linear_cross_entropy at 3, 2, 1 ranks; results to FOLDER/<ranks>-<rank>.pt.

torch.multiprocessing.spawn(work, (FOLDER,), nprocs=3)
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist

from model.ending import exit_rank
from model.losses.sharded_softmax import (
    Beside,
    TeacherLogits,
    TeacherTargets,
    linear_cross_entropy,
)

# By world size: positions of each rank, and items [low, high) of each rank.
SIZES = {1: [7], 2: [7, 0], 3: [4, 0, 3]}
SLICES = {1: [(1, 7)], 2: [(1, 5), (5, 7)], 3: [(1, 4), (4, 7), (7, 7)]}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """7 hidden vectors, 6 candidates (items 1..6), targets, and a weight of each loss."""
    generator = torch.Generator().manual_seed(5)
    hidden, candidates = torch.randn(13, 4, generator=generator).split([7, 6])
    targets = torch.tensor([1, 6, 4, 4, 2, 5, 3])
    return hidden.clone(), candidates.clone(), targets, torch.linspace(0.5, 2, 7)


def teachers() -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Two: 7 hidden vectors, 6 rows, and a bound of the logits; of width 4 and of another one."""
    generator = torch.Generator().manual_seed(6)
    first, second = (torch.randn(13, width, generator=generator) for width in (4, 3))
    return [(first[:7], first[7:], math.inf), (second[:7], second[7:], math.inf)]


def solve(rank: int, world_size: int, folder: Path) -> None:
    """This rank's part."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size
    )
    sizes, (low, high) = SIZES[world_size], SLICES[world_size][rank]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {}
    for cosine in (False, True):
        hidden, candidates, targets, weights = problem()
        hidden = hidden[own].requires_grad_()
        candidates = candidates[low - 1 : high - 1].requires_grad_()
        losses = linear_cross_entropy(
            hidden, Beside.start(candidates, cosine), targets[own], low, shared=True
        )
        (losses * weights[own]).sum().backward()
        found[cosine] = {
            "losses": losses.detach(),
            "hidden": hidden.grad,
            "candidates": candidates.grad,
        }
    hidden, candidates, targets, weights = problem()
    hidden = hidden[own].requires_grad_()
    candidates = candidates[low - 1 : high - 1].requires_grad_()
    taught = [
        TeacherLogits(seen[own], rows[low - 1 : high - 1], bound)
        for seen, rows, bound in teachers()
    ]
    beside, teachers_ = Beside.start(candidates), TeacherTargets(taught, 0.3)
    losses = linear_cross_entropy(
        hidden, beside, targets[own], low, shared=True, teachers=teachers_
    )
    (losses * weights[own]).sum().backward()
    found["taught"] = {
        "losses": losses.detach(),
        "hidden": hidden.grad,
        "candidates": candidates.grad,
    }
    if world_size == 2:
        found["large"] = linear_cross_entropy(
            torch.tensor([[20.0]]),
            Beside.start(torch.tensor([[10.0 - 20 * rank]])),
            torch.tensor([1 + rank]),
            1 + rank,
            shared=True,
        )
    torch.save(found, folder / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def work(rank: int, folder: Path) -> None:
    """One process: a rank of 3, then of 2, then of 1, if the world has this rank."""
    for world_size in (3, 2, 1):
        if rank < world_size:
            solve(rank, world_size, folder)
    exit_rank()
