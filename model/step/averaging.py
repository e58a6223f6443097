"""Average the gradients of replicated parameters in one all-reduce after the backward pass.

    gradients of all parameters -> one buffer -> all-reduce -> their means as gradients

For the encoder's few megabytes, the hooks of DistributedDataParallel take longer than the
all-reduce. Without hooks, and with means at fixed addresses, CUDA graphs can hold the backward pass
and the update.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

# Alignment of the parameters, in values: kernels read four at once.
_ALIGNED = 4


class AveragingOptimizer(OptimizerWrapper):
    """Replaces the gradients by their means over all ranks, then steps.

    The parameters are the same on every rank, all of one dtype and device. None gradients count as
    zeros.
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
        gradients, moved_to = [], []
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            if parameter.grad is None:
                mean.zero_()
            elif parameter.grad is not mean:
                gradients.append(parameter.grad)
                moved_to.append(mean)
        if gradients:
            torch._foreach_copy_(moved_to, gradients)
        dist.all_reduce(self._flat)
        self._flat /= dist.get_world_size()
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            parameter.grad = mean
