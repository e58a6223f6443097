"""Average the gradients of replicated parameters in one all-reduce after the backward pass.

    gradients of all parameters -> one buffer -> all-reduce -> their means as gradients

For the encoder's few megabytes, the hooks of DistributedDataParallel take longer than the
all-reduce. Without hooks, and with means at fixed addresses, CUDA graphs can hold the backward pass
and the update.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

# Alignment of the parameters, in values: kernels read four at once.
_ALIGNED = 4


class JoinedGradients:
    """The gradients of parameters in one tensor, ``flat``, each at a multiple of ``_ALIGNED``.

    The parameters are all of one dtype and device. Values of ``flat`` between them are zeros.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters]
        self.flat = parameters[0].new_zeros(sum(self._sizes))
        places = zip(parameters, self._sizes, strict=True)
        self._gaps = [self.flat.new_zeros(size - p.numel()) for p, size in places]
        self._views = self.views(self.flat)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each parameter in a tensor like ``self.flat``, in the parameter's shape."""
        parts = zip(self._parameters, flat.split(self._sizes), strict=True)
        return [part[: p.numel()].view_as(p) for p, part in parts]

    def size(self, count: int) -> int:
        """Values of ``flat`` that the first ``count`` parameters take."""
        return sum(self._sizes[:count])

    def join(self) -> None:
        """Copy the gradients into ``flat``, of which each ``.grad`` is a view from then on.

        A gradient that is None counts as zeros.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        # A gradient that was set to zero, not to None, is the view: autograd has added to it.
        apart = [g is not view for g, view in zip(gradients, self._views, strict=True)]
        if all(apart):  # one small kernel; copies of each would be several slow ones
            pairs = zip(gradients, self._gaps, strict=True)
            torch.cat([part.reshape(-1) for pair in pairs for part in pair], out=self.flat)
        else:
            for view, gradient in zip(self._views, gradients, strict=True):
                if gradient is not view:
                    view.copy_(gradient)
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view


class AveragingOptimizer(OptimizerWrapper):
    """Replaces the gradients by their means over all ranks, then steps.

    Args:
        gradients: of parameters that are the same on every rank.
        group: all ranks, for an all-reduce beside other collectives; None: the default group.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        gradients: JoinedGradients,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._gradients, self._group = gradients, group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._gradients.join()
        dist.all_reduce(self._gradients.flat, group=self._group)
        self._gradients.flat /= dist.get_world_size()
        super().step(closure)
