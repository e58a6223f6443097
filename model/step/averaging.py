"""Gradients of what every rank holds: their means, in one all-reduce after the backward pass.

    gradients of all parameters -> one piece of memory -> all-reduce -> their means as gradients

DistributedDataParallel hooks into autograd to send some gradients while others are computed. The
encoder's few megabytes take less time than its hooks; and without hooks, with means that always lie
where they lay, the backward pass and the update can be CUDA graphs (``model/step/graphs.py``).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

# Values at whose multiples a parameter begins: kernels read four at once.
_ALIGNED = 4


class Unwrapped(DataParallelWrapper):
    """Leaves what is replicated as it is, for :class:`AveragingOptimizer`, or for one rank."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        dmp._dmp_wrapped_module.to(device)


def begin_as_first_rank(parameters: list[nn.Parameter]) -> None:
    """Begin everywhere with the values of rank 0."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), 0)


class AveragingOptimizer(OptimizerWrapper):
    """Replaces the gradients by their means over all ranks, then steps.

    Args:
        optimizer: does the step.
        parameters: the same on every rank, all of one dtype and device. A gradient that is None
            counts as zeros.
    """

    def __init__(self, optimizer: KeyedOptimizer, parameters: list[nn.Parameter]) -> None:
        super().__init__(optimizer)
        self._parameters = parameters
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters]
        self._flat = parameters[0].new_zeros(sum(sizes))
        self._means = [
            part[: p.numel()].view_as(p)
            for p, part in zip(parameters, self._flat.split(sizes), strict=True)
        ]

    def step(self, closure: Any = None) -> None:
        self._average()
        super().step(closure)

    @torch.no_grad()
    def _average(self) -> None:
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            if parameter.grad is None:
                mean.zero_()
            elif parameter.grad is not mean:
                moved.append((mean, parameter.grad))
        if moved:
            torch._foreach_copy_(*map(list, zip(*moved, strict=True)))
        dist.all_reduce(self._flat)
        self._flat /= dist.get_world_size()
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            parameter.grad = mean
