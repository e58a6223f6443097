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

    Args:
        group: all ranks, for an all-reduce beside other collectives; None: the default group.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        parameters: list[nn.Parameter],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._parameters, self._group = parameters, group
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters]
        self._flat = parameters[0].new_zeros(sum(sizes))
        self._between = [
            self._flat.new_zeros(size - p.numel())
            for p, size in zip(parameters, sizes, strict=True)
        ]
        self._means = [
            part[: p.numel()].view_as(p)
            for p, part in zip(parameters, self._flat.split(sizes), strict=True)
        ]

    def step(self, closure: Any = None) -> None:
        self._average()
        super().step(closure)

    @torch.no_grad()
    def _average(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        # In the buffer are those that autograd added to the last step's means.
        moved = [g is not mean for g, mean in zip(gradients, self._means, strict=True)]
        if all(moved):  # one small kernel; copies of each would be several slow ones
            pairs = zip(gradients, self._between, strict=True)
            torch.cat([part.reshape(-1) for pair in pairs for part in pair], out=self._flat)
        else:
            for mean, gradient in zip(self._means, gradients, strict=True):
                if gradient is not mean:
                    mean.copy_(gradient)
        dist.all_reduce(self._flat, group=self._group)
        self._flat /= dist.get_world_size()
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            parameter.grad = mean
