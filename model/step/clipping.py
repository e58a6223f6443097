"""Limit the norm of the gradients before an optimizer's step, and keep what it was."""

from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper


class ClippingOptimizer(OptimizerWrapper):
    """Divides the gradients by their common norm over ``limit`` where that is above 1, then steps.

    TorchRec's `GradientClippingOptimizer` does the same and forgets the norm.
    """

    def __init__(self, optimizer: KeyedOptimizer, limit: float, device: torch.device) -> None:
        super().__init__(optimizer)
        self._limit = limit
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        # Sums over steps of the norm and of [norm > limit]; on the device, also in a CUDA graph.
        self._sums = torch.zeros(2, device=device)

    def step(self, closure: Any = None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)
        self._sums += torch.stack([norm, (norm > self._limit).to(norm.dtype)])
        super().step(closure)

    def take_sums(self) -> Tensor:
        """float32 [2], sums over the steps since the last call: of norms, of clipped steps."""
        sums = self._sums.clone()
        self._sums.zero_()
        return sums
