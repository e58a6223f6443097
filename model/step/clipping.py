"""Limit the norm of the gradients before an optimizer's step, and add it up for the log."""

from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

from model.step.averaging import JoinedGradients

# So that the factor of gradients of zero is finite, as in ``clip_grad_norm_``.
_EPSILON = 1e-6


class ClippingOptimizer(OptimizerWrapper):
    """Scales the gradients so that their common norm is at most ``limit``, then steps.

    TorchRec's `GradientClippingOptimizer` does the same, but does not give the norm.

    Args:
        limit: of the L2 norm of all gradients as one vector.
        device: that of the gradients.
        joined: holds all gradients in one tensor when a step begins, so that few kernels clip them;
            None: they are tensors of their own.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        limit: float,
        device: torch.device,
        joined: JoinedGradients | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._limit, self._joined = limit, joined
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        # Sums over steps of the norm and of [norm > limit]; on the device, for CUDA graphs.
        self._sums = torch.zeros(2, device=device)

    def step(self, closure: Any = None) -> None:
        if self._joined is None:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)
        else:
            norm = torch.linalg.vector_norm(self._joined.flat)
            self._joined.flat *= (self._limit / (norm + _EPSILON)).clamp(max=1)
        self._sums += torch.stack([norm, (norm > self._limit).to(norm.dtype)])
        super().step(closure)

    def take_sums(self) -> Tensor:
        """float32 [2], sums over the steps since the last call: of norms, of clipped steps."""
        sums = self._sums.clone()
        self._sums.zero_()
        return sums
