"""An optimizer step as one CUDA graph.

Launching a small kernel costs the host about 5 us, longer than many of them run; clipping and AdamW
launch dozens.
"""

from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer, OptimizerWrapper

from model.kernels.compiler import before_capture

_WARM_UP = 2  # steps before the capture, in which the optimizer makes its state


class GraphedOptimizer(OptimizerWrapper):
    """Steps through a CUDA graph once the gradients stay at the same addresses.

    The optimizer's learning rates are tensors on the device; its first step makes its state.
    """

    def __init__(self, optimizer: KeyedOptimizer, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(optimizer)
        self._parameters = parameters
        self._gradients: list[Tensor | None] = []
        self._steady = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Drop the gradients: every step writes new ones."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, closure: Any = None) -> None:
        gradients = [parameter.grad for parameter in self._parameters]
        if [*map(id, gradients)] != [*map(id, self._gradients)]:  # a step that was not replayed
            if self._graph is None:
                self._gradients, self._steady = gradients, 0
            super().step(closure)
            return
        self._steady += 1
        if self._graph is None and self._steady > _WARM_UP:
            before_capture()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                super().step(closure)
        if self._graph is None:
            super().step(closure)
        else:
            self._graph.replay()
