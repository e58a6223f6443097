"""An optimizer step on a batch that is on its device.

    zero_grad -> lookup -> encoder and head -> backward, which updates the tables -> optimizer

With graphs "step" of the plan, all steps of one shape are one CUDA graph, so that a small step does
not wait for the launch of some hundred kernels:

    first step of a shape      launched kernel by kernel: compiles them, makes the optimizer's state
    second                     captured, and replayed
    later ones                 copy the batch to where the graph reads it, replay

What the table requested a batch ahead is not part of the graph; it is copied like the batch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import set_multithreading_enabled
from torch.profiler import record_function

from model.execution import ExecutionPlan
from model.kernels import side_stream
from model.kernels.compiler import before_capture
from model.kernels.graphed_call import MAX_GRAPHS
from model.tables.all_to_all import Request
from model.tables.distribute import unwrap
from pipeline.batches.train_batch import PackedBatch


class Stepper(Protocol):
    """The optimizer of a step."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def backward(loss: Tensor, one: Tensor) -> None:
    """The backward pass of a scalar loss in this thread; ``one`` is its gradient.

    Switching to autograd's thread and back takes a tenth of a small step.
    """
    with record_function("## backward ##"), set_multithreading_enabled(False):
        loss.backward(one)


class TrainStep:
    """Trains ``model`` on one batch per call.

    Attributes:
        is_eager: kernels are launched one by one, so that a profile shows the parts of a step.
        is_recorded: a profile is recorded: the graph of a step, and the pipeline's copies, are
            ranges with names, which take the host time in every step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Stepper, plan: ExecutionPlan, device: torch.device
    ) -> None:
        self._model, self._optimizer, self._plan = model, optimizer, plan
        self._one = torch.ones((), device=device)
        self._captured: dict[Any, _Captured | None] = {}
        self._pool: Any = None
        self._streams: Any = None
        self._slots = 0
        self.is_eager = self.is_recorded = False

    def __call__(
        self,
        batch: PackedBatch,
        before_forward: Callable[[], None] = lambda: None,
        requests: Callable[[], list[Any]] | None = None,
    ) -> Tensor:
        """One step; float32 [2], the batch's sum of losses and its number of positions.

        Args:
            before_forward: called before the model.
            requests: what the table requested a batch ahead, for a step that does not call the
                model; None: requested here.
        """
        self._optimizer.zero_grad()
        key = None if self.is_eager or self._plan.graphs != "step" else graph_key(batch)
        if batch.slots > self._slots:  # it never falls
            self._drop_graphs()
            self._slots = batch.slots
        if key is None or key not in self._captured:
            if key is not None and len(self._captured) < MAX_GRAPHS:
                self._captured[key] = None
            before_forward()
            return self._launch(lambda: self._model(batch))
        with record_function("## step ##") if self.is_recorded else nullcontext():
            table = unwrap(self._model).embeddings
            requested = table.requests(batch) if requests is None else requests()
            table.begin_step()
            captured = self._captured[key]
            if captured is None:
                captured = self._captured[key] = self._capture(batch, requested)
            return captured(batch, requested)

    def release(self) -> None:
        """Drop all graphs; a communicator cannot be closed while a graph sends through it."""
        self._drop_graphs()
        bert = unwrap(self._model)
        bert.dense_step.release()
        if self._plan.lookup == "own":
            bert.embeddings.exchange.release()

    def _drop_graphs(self) -> None:
        if any(self._captured.values()) and torch.cuda.is_available():
            torch.cuda.synchronize()  # a graph may be running
        for captured in filter(None, self._captured.values()):
            captured.graph.reset()
        self._captured.clear()
        self._pool = None  # freed with the last graph

    def _launch(self, forward: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        with record_function("## forward ##"):
            loss, report = forward()
        backward(loss, self._one)
        with record_function("## optimizer ##"):
            self._optimizer.step()
        return report

    def _forward(self, captured: "_Captured") -> tuple[Tensor, Tensor]:
        """The model's forward pass from the memory that a graph reads."""
        bert = unwrap(self._model)
        batch, requests = captured.read(bert.embeddings)
        return bert.score(batch.without_candidates, *bert.embeddings.rows(batch, requests))

    def _capture(self, batch: PackedBatch, requests: list[Any]) -> "_Captured":
        before_capture()
        # All graphs share one memory pool: a replay overwrites the tensors of the previous one.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # The side stream has the lower priority: an update of a whole table would fill the GPU.
        self._streams = self._streams or (torch.cuda.Stream(priority=-1), torch.cuda.Stream())
        main, side = self._streams
        captured = _Captured(torch.cuda.CUDAGraph(), batch, requests)
        # thread_local: other threads (the loader's) may allocate memory meanwhile.
        with (
            torch.cuda.graph(captured.graph, self._pool, main, capture_error_mode="thread_local"),
            side_stream.running_on(side),
        ):
            captured.report = self._launch(lambda: self._forward(captured))
        self._optimizer.zero_grad()  # the gradients belong to the graph
        return captured


def graph_key(batch: PackedBatch) -> Any:
    """The shapes of a step on all ranks, by which a graph is found; None: it cannot use a graph.

    In an epoch's last step some ranks have a window more than others. Their sizes differ, but the
    number of all windows makes keys that are equal on one rank equal on every rank: all capture,
    and register memory with each other, in the same step.
    """
    names, sizes = batch.packed.names, tuple(batch.packed.sizes)
    is_masked = sizes[names.index("targets")] > 0
    return (names, sizes, batch.all_windows) if is_masked else None


class _Captured:
    """The graph of a step, and the memory that it reads and writes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, batch: PackedBatch, requests: list[Any]
    ) -> None:
        self.graph = graph
        self.report = torch.empty(0)
        packed = replace(batch.packed, words=batch.packed.words.clone())
        self._batch = replace(batch, packed=packed)
        # Others are made of views of the batch.
        self._requests = [one.clone() for one in requests if isinstance(one, Request)]

    def read(self, table: Any) -> tuple[PackedBatch, list[Any]]:
        """The batch and the table's requests, in the memory that the graph reads."""
        batch = replace(self._batch)  # not unpacked yet
        return batch, self._requests or table.requests(batch)

    def __call__(self, batch: PackedBatch, requests: list[Any]) -> Tensor:
        self._batch.packed.words.copy_(batch.packed.words)
        for mine, given in zip(self._requests, requests, strict=False):
            mine.words.copy_(given.words)
        self.graph.replay()
        return self.report.clone()
