"""A function and its backward pass as a pair of CUDA graphs: hundreds of launches become two.

    first call with these shapes      warm up, capture forward and backward
    every call                        copy inputs -> replay forward -> outputs
    backward                          copy the output's gradient -> replay backward -> gradients

A launch costs the host about 5 us, longer than many small kernels run. Unlike
``torch.cuda.make_graphed_callables``, this takes many shapes (the loader keeps them few, see
``pipeline/training/shape_buckets.py``), and other threads may pin memory during a capture.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.compiler import before_capture

Body = Callable[..., Tensor]
Inputs = tuple[Tensor | None, ...]

_WARM_UP = 2  # calls before the capture, in which libraries choose their kernels
# Graphs of a call, a step or a request; calls of more shapes are launched kernel by kernel.
MAX_GRAPHS = 48
# Every graph keeps a copy of its inputs: up to 3 GiB of all graphs. Of larger ones, such as rows of
# more than 65,536 positions of width 256, none is made: a graph is captured for their address.
_COPIED_BYTES = 64 << 20


class GraphedCall:
    """Calls ``body`` through CUDA graphs, one pair of them for each combination of shapes.

    Args:
        body: without host synchronisation. It draws the same random numbers as without graphs.
        module: its parameters get gradients; the body itself, if hooked.
        hooked: autograd returns the parameters' gradients, as DDP's hooks need. Otherwise the graph
            writes them into fixed ``.grad`` tensors: half the host's work, and the optimizer step
            can be a graph, too.
    """

    def __init__(self, body: Body, module: nn.Module, hooked: bool) -> None:
        self._body, self._module = body, module
        self.parameters = list(module.parameters())
        self.shared = None if hooked else [torch.zeros_like(p) for p in self.parameters]
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self.pool: Any = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """``body(*inputs)``; more combinations of shapes than ``MAX_GRAPHS`` have no graph."""
        key = tuple(None if t is None else (*t.shape, _address(t)) for t in inputs)
        captured = self._captured.get(key)
        if captured is None:
            if len(self._captured) == MAX_GRAPHS:
                return self._body(*inputs)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            captured = self._captured[key] = self._capture(inputs)
        return _Replay.apply(captured, *inputs, *(self.parameters if self.shared is None else ()))

    def release(self) -> None:
        """Free all graphs and their memory."""
        for captured in self._captured.values():
            captured.forward.reset()
            captured.backward.reset()
        self._captured.clear()
        self.pool = None  # freed with the last graph

    def _capture(self, inputs: Inputs) -> "_Captured":
        before_capture()
        if self.shared is not None:
            return _Captured(self, self._body, self.parameters, inputs)
        # DDP's hooks bind a parameter's gradient to a stream other than the captured one: capture
        # with new parameters in the same memory.
        others = [nn.Parameter(own.detach(), own.requires_grad) for own in self.parameters]
        names = (name for name, _ in self._module.named_parameters())
        named: dict[str, Tensor] = dict(zip(names, others, strict=True))
        body = partial(torch.func.functional_call, self._module, named)
        return _Captured(self, lambda *tensors: body(tensors), others, inputs)


def _address(tensor: Tensor) -> int:
    """Where a graph reads a tensor that is too large to copy, and so part of its key; else 0."""
    return tensor.data_ptr() if tensor.nbytes > _COPIED_BYTES else 0


class _Captured:
    """Forward and backward for one combination of shapes, in the shared memory pool."""

    def __init__(
        self, call: GraphedCall, body: Body, parameters: list[nn.Parameter], inputs: Inputs
    ) -> None:
        self.parameters, self.shared = parameters, call.shared
        static = [None if given is None else _static(given) for given in inputs]
        wanted = [t for t in static if t is not None and t.requires_grad] + parameters
        # Warm-up must not consume random numbers: after a resume it happens at other steps.
        generator = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                output = body(*static)
                torch.autograd.grad(output, wanted, torch.zeros_like(output))
                del output
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(generator)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # The default mode fails when another thread (the loader's) pins memory.
        capture = {"pool": call.pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **capture):
            output = body(*static)
        self.output_grad = torch.empty_like(output)
        with torch.cuda.graph(self.backward, **capture):
            gradients = iter(torch.autograd.grad(output, wanted, self.output_grad))
            input_grads = [
                None if t is None or not t.requires_grad else next(gradients) for t in static
            ]
            self.parameter_grads = list(gradients)
            if self.shared:
                torch._foreach_copy_(self.shared, self.parameter_grads)
                self.parameter_grads = []
        self.output = output.detach()
        self.input_grads = [None if grad is None else _unowned(grad) for grad in input_grads]
        # Inputs without a copy are not kept alive: their owner may reuse the memory.
        self.inputs = [None if t is None or _address(t) else t.detach() for t in static]


def _static(given: Tensor) -> Tensor:
    """The tensor that a graph reads for an input: a copy, or a large input itself."""
    kept = given.detach() if _address(given) else given.detach().clone()
    return kept.requires_grad_(given.requires_grad)


def _unowned(grad: Tensor) -> Tensor:
    """The gradient of a large input, as a tensor that does not keep its memory.

    A capture takes memory of the pool that no tensor keeps: later graphs write their gradients into
    the same. One is read right after the replay that writes it, before any other graph's replay.
    """
    if not _address(grad) or grad.dtype != torch.float32 or not grad.is_contiguous():
        return grad
    data, shape = (grad.data_ptr(), False), tuple(grad.shape)
    memory = {"shape": shape, "typestr": "<f4", "data": data, "version": 2}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=grad.device)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, *inputs: Tensor | None) -> Tensor:
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for to, given in zip(captured.inputs, inputs, strict=False):  # parameters come after
            if to is not None and given is not None:
                targets, sources = copies.setdefault(to.dtype, ([], []))
                targets.append(to)
                sources.append(given.detach())
        for targets, sources in copies.values():  # one kernel each
            torch._foreach_copy_(targets, sources)
        captured.forward.replay()
        ctx.set_materialize_grads(False)
        ctx.captured = captured
        # The backward pass reads them again at the same address.
        ctx.held = [given for given in inputs if given is not None and _address(given)]
        return captured.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        captured: _Captured = ctx.captured
        captured.output_grad.copy_(output_grad)
        captured.backward.replay()
        ctx.held = []
        inputs = (None if grad is None else grad.detach() for grad in captured.input_grads)
        if captured.shared is None:
            return (None, *inputs, *(grad.detach() for grad in captured.parameter_grads))
        for parameter, grad in zip(captured.parameters, captured.shared, strict=True):
            assert parameter.grad is None or parameter.grad is grad, "gradients are not accumulated"
            parameter.grad = grad
        return (None, *inputs)
