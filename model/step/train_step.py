"""An optimizer step: what is done with a batch that is on its device.

    zero_grad -> lookup -> encoder and head -> backward, which updates the tables -> optimizer

Where every part of it can be captured (``DenseStep.is_whole``), steps of one shape are one CUDA
graph: a host that launches it once, not some hundred kernels, is no longer what a small step waits
for.

    first step of a shape      as it comes: compiles kernels, makes the optimizer's state
    second                     captured, and replayed
    later ones                 the batch copied to where the graph reads it, replayed

In a graph, what nothing waits for runs beside the rest (:mod:`model.kernels.side_stream`).
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import set_multithreading_enabled
from torch.profiler import record_function

from model.kernels import side_stream
from model.step.optimizers import unwrap
from pipeline.batches.train_batch import TrainBatch
from pipeline.batches.train_batch import PackedBatch

# Combinations of shapes; those beyond are trained as they come.
_MAX_GRAPHS = 48


class Stepper(Protocol):
    """What a step asks of an optimizer."""

    def zero_grad(self) -> None:
        """Before a step."""

    def step(self) -> None:
        """After its backward pass."""


def backward(loss: torch.Tensor, one: torch.Tensor) -> None:
    """The backward pass of a loss that is one number, in this thread; ``one`` is its gradient.

    To wake another thread for it, and to be woken again, takes a tenth of a small step.
    """
    with record_function("## backward ##"), set_multithreading_enabled(False):
        loss.backward(one)


class TrainStep:
    """Trains ``model`` on one batch a call.

    Args:
        model: sharded; its loss is one number.
        optimizer: of ``model``; where steps are captured, its learning rates are on the device.
    """

    def __init__(self, model: nn.Module, optimizer: Stepper, device: torch.device) -> None:
        self._model, self._optimizer = model, optimizer
        self._one = torch.ones((), device=device)
        self._seen: dict[Any, _Captured | None] = {}
        self._pool: Any = None
        self._streams: Any = None

    def __call__(self, batch: Step) -> torch.Tensor:
        """One step; float32 [2], the batch's sum of losses and its number of positions."""
        self._optimizer.zero_grad()
        bert = unwrap(self._model)
        key = _key(batch) if bert.dense_step.is_whole else None
        if key is None or (key not in self._seen and len(self._seen) == _MAX_GRAPHS):
            return self._run(batch.ready())
        if key not in self._seen:
            self._seen[key] = None
            return self._run(batch.ready())
        with record_function("## step ##"):
            assert bert.table_shard is not None
            bert.table_shard.count()
            captured = self._seen[key]
            if captured is None:
                captured = self._seen[key] = self._capture(batch)
            return captured(batch)

    def release(self) -> None:
        """Give all graphs up; communicators cannot be closed while one sends through them."""
        for captured in self._seen.values():
            if captured is not None:
                captured.graph.reset()
        self._seen.clear()
        self._pool = None  # gone with the last graph
        unwrap(self._model).dense_step.release()

    def _run(self, batch: TrainBatch) -> torch.Tensor:
        with record_function("## forward ##"):
            loss, report = self._model(batch)
        backward(loss, self._one)
        with record_function("## optimizer ##"):
            self._optimizer.step()
        return report

    def _capture(self, batch: PackedBatch) -> "_Captured":
        # All share one pool of memory: what one step keeps is gone when another is replayed.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # What is left aside, as an update of a whole table, would keep the chain from the GPU.
        self._streams = self._streams or (torch.cuda.Stream(priority=-1), torch.cuda.Stream())
        chain, beside = self._streams
        captured = _Captured(torch.cuda.CUDAGraph(), batch)
        # Other threads, as the loader's, may go on allocating memory meanwhile.
        with (
            torch.cuda.graph(captured.graph, self._pool, chain, capture_error_mode="thread_local"),
            side_stream.running_on(beside),
        ):
            captured.report = self._run(captured.like(batch))
        self._optimizer.zero_grad()  # gradients are the graph's, not to be held on to
        return captured


def _key(batch: Step) -> Any:
    """What two batches have in common that one graph can train; None: of no other."""
    if not isinstance(batch, PackedBatch) or not batch.alike:
        return None
    names, sizes = batch.packed.names, tuple(batch.packed.sizes)
    return (names, sizes, batch.everyone is None) if sizes[names.index("targets")] else None


class _Captured:
    """The graph of a step, and the memory that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: PackedBatch) -> None:
        self.graph = graph
        self.report = torch.empty(0)
        self._read = [given.clone() for given in _given(batch)]

    def like(self, batch: PackedBatch) -> TrainBatch:
        """A batch of the same shape, of what the graph reads; to be cut while it is captured."""
        words, *everyone = self._read
        packed = replace(batch.packed, words=words)
        return replace(batch, packed=packed, everyone=everyone[0] if everyone else None).ready()

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        torch._foreach_copy_(self._read, _given(batch))
        self.graph.replay()
        return self.report.clone()


def _given(batch: PackedBatch) -> list[torch.Tensor]:
    """What of a batch is not in its shape."""
    return [batch.packed.words, *([] if batch.everyone is None else [batch.everyone])]
