"""Limit the norm of the gradients before an optimizer's step, and add the norms up for the log.

CUDA graphs of whole steps do both in the kernels of AdamW (:mod:`model.step.flat_adamw`).
"""

from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

from model.step.averaging import JoinedGradients

# So that the factor of gradients of zero is finite, as in ``clip_grad_norm_``.
_EPSILON = 1e-6


class NormSums:
    """Sums over steps: of the gradients' norm, and of [norm > limit].

    ``values``, float32 [2], are on the device: CUDA graphs add to them.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(2, device=device)

    def take(self) -> Tensor:
        """float32 [2], the sums over the steps since the last call."""
        taken = self.values.clone()
        self.values.zero_()
        return taken


class ClippingOptimizer(OptimizerWrapper):
    """Scales the gradients so that their common norm is at most ``limit``, then steps.

    TorchRec's `GradientClippingOptimizer` does the same, but does not give the norm, which is added
    to ``norms``.

    Args:
        limit: of the L2 norm of all gradients as one vector.
        joined: holds all gradients in one tensor when a step begins, so that few kernels clip them;
            None: they are tensors of their own.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        limit: float,
        joined: JoinedGradients | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._limit, self._joined = limit, joined
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self.norms = NormSums(self._parameters[0].device)

    def step(self, closure: Any = None) -> None:
        if self._joined is None:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)
        else:
            norm = torch.linalg.vector_norm(self._joined.flat)
            self._joined.flat *= (self._limit / (norm + _EPSILON)).clamp(max=1)
        self.norms.values += torch.stack([norm, (norm > self._limit).to(norm.dtype)])
        super().step(closure)
