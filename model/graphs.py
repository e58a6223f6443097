"""CUDA graphs of a module's training step: hundreds of kernel launches become two.

    first call with these shapes      warm up, capture forward and backward
    every call                        copy inputs -> replay forward -> output
    backward                          copy the output's gradient -> replay backward -> gradients

Launching a small kernel costs the host about 5 us, which is more than many of them run; a replayed
graph is launched once. The loader's few batch shapes (``pipeline/rounding.py``) are what makes few
graphs do. After ``torch.cuda.make_graphed_callables``, which captures one shape and, with a thread
that pins memory beside it, fails: its capture forbids CUDA calls to all threads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_WARM_UP = 2  # libraries choose their kernels, compilers compile, before the capture
_MAX_GRAPHS = 48


class StepGraphs:
    """Calls ``body`` through CUDA graphs, one pair of them for each combination of shapes.

    Args:
        body: a function of tensors, some of them None, to one tensor; without host
            synchronisation. Random numbers continue from the device's generator as they would
            without graphs.
        parameters: what else its output depends on and is to be differentiated by.
        hooked: somebody waits for autograd to hand over the parameters' gradients, as DDP does.
            Else they are put into ``.grad`` without it, which saves the host half of the work.
    """

    def __init__(
        self,
        body: Callable[..., torch.Tensor],
        parameters: list[torch.nn.Parameter],
        hooked: bool = True,
    ) -> None:
        self._body, self._parameters, self._hooked = body, parameters, hooked
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """``body(*inputs)``; shapes beyond the first so many combinations are run as they come."""
        key = tuple(None if tensor is None else tuple(tensor.shape) for tensor in inputs)
        captured = self._captured.get(key)
        if captured is None:
            if len(self._captured) == _MAX_GRAPHS:
                return self._body(*inputs)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            captured = _Captured(self._body, self._parameters, inputs, self._pool)
            self._captured[key] = captured
        return _Replay.apply(captured, *inputs, *(self._parameters if self._hooked else ()))


class _Captured:
    """Forward and backward of one combination of shapes, with the memory they read and write.

    All share one memory pool: the activations of one are gone when another is replayed.
    """

    def __init__(
        self,
        body: Callable[..., torch.Tensor],
        parameters: list[torch.nn.Parameter],
        inputs: tuple[torch.Tensor | None, ...],
        pool: Any,
    ) -> None:
        self.inputs = [
            None if given is None else given.detach().clone().requires_grad_(given.requires_grad)
            for given in inputs
        ]
        wanted = [t for t in self.inputs if t is not None and t.requires_grad] + parameters
        self.parameters = parameters
        # Warming up must not use up random numbers: when it happens is chance after a resume.
        generator = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                output = body(*self.inputs)
                torch.autograd.grad(output, wanted, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(generator)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, as the loader's, may go on allocating memory meanwhile.
        capture = {"pool": pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **capture):
            output = body(*self.inputs)
        self.output_grad = torch.zeros_like(output)
        with torch.cuda.graph(self.backward, **capture):
            gradients = iter(torch.autograd.grad(output, wanted, self.output_grad))
        self.output = output.detach()
        self.input_grads = [
            None if t is None or not t.requires_grad else next(gradients) for t in self.inputs
        ]
        self.parameter_grads = list(gradients)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *inputs: torch.Tensor | None) -> torch.Tensor:
        for static, given in zip(captured.inputs, inputs, strict=False):  # parameters come after
            if static is not None and given is not None:
                static.detach().copy_(given, non_blocking=True)
        captured.forward.replay()
        ctx.captured, ctx.hooked = captured, len(inputs) > len(captured.inputs)
        return captured.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        captured: _Captured = ctx.captured
        captured.output_grad.copy_(output_grad)
        captured.backward.replay()
        inputs = (None if grad is None else grad.detach() for grad in captured.input_grads)
        if ctx.hooked:
            return (None, *inputs, *(grad.detach() for grad in captured.parameter_grads))
        for parameter, grad in zip(captured.parameters, captured.parameter_grads, strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return (None, *inputs)
