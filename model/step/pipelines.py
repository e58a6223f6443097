"""TorchRec's train pipeline, in three forms.

    batch i + 2    copied to the device
    batch i + 1    its rows requested, by ``input_dist`` of the item table
    batch i        looked up, forward, backward, update

TorchRec traces the model and finds the table's call, so that its ``input_dist`` runs a batch ahead.
With exchange "torchrec" of the plan, TorchRec also runs the steps. Otherwise a step is one call
(:class:`TrainStep`), which may replay a CUDA graph.
"""

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from model.execution import ExecutionPlan
from model.step.train_step import Stepper, TrainStep, backward
from model.tables.distribute import unwrap
from pipeline.batches.train_batch import PackedBatch

# Held by a pipeline that traces the model, and by another thread that calls a module.
MODULES_CALLED = Lock()


class _TracedAlone(TrainPipelineSparseDist):
    """TorchRec's pipeline; while it traces the model, no other thread calls a module.

    torch.fx replaces the call of all modules meanwhile, and knows those of one model.
    """

    def _pipeline_model(self, *args: Any, **kwargs: Any) -> None:
        with MODULES_CALLED:
            super()._pipeline_model(*args, **kwargs)


class ExchangingPipeline(_TracedAlone):
    """TorchRec's pipeline, for a scalar loss."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: Stepper, device: torch.device
    ) -> None:
        super().__init__(model, optimizer, device, execute_all_batches=True)
        self._one = torch.ones((), device=device)

    def _backward(self, losses: Tensor) -> None:
        backward(losses, self._one)

    def release(self) -> None:
        unwrap(self._model).dense_step.release()


class StepPipeline(_TracedAlone):
    """TorchRec's pipeline with steps that are one call of ``train_step``.

    TorchRec's own ``progress`` takes the host longer and slows small steps (docs/distributed.md).

    Args:
        ahead: call the table's ``input_dist`` a batch ahead; False, where it sends nothing: only
            before a step that calls the model.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        train_step: TrainStep,
        device: torch.device,
        ahead: bool,
    ) -> None:
        super().__init__(model, train_step, device, execute_all_batches=True)
        self.train_step, self._ahead = train_step, ahead

    def progress(self, batches: Iterator[PackedBatch]) -> Tensor:
        """One step; its report. StopIteration if there is no batch left."""
        if not self.batches:
            if not self._model_attached:
                self.attach()
            self.fill_pipeline(batches)
            if not self.batches:
                raise StopIteration
        behind = self._data_dist_stream if self._ahead else self._memcpy_stream
        if behind is not None:
            stream = torch.cuda.current_stream()
            stream.wait_stream(behind)
            self.batches[0].record_stream(stream)
        if self._ahead and len(self.batches) > 1:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])
        # The last context keeps its rows, and with them the autograd graph of a launched step. A
        # capture would wait for the stream of that graph, which is not captured.
        self._set_module_context(self.contexts[0])
        requests = self._requests if self._ahead else None
        report = self.train_step(self.batches[0], self._before_forward, requests)
        self.enqueue_batch(batches)
        self.batches.popleft()
        self.contexts.popleft()
        return report

    def copy_batch_to_gpu(self, batches: Iterator[PackedBatch]) -> tuple[Any, Any]:
        """The next batch, whose copy to the device has started, or None; and its context."""
        if self.train_step.is_recorded:
            return super().copy_batch_to_gpu(batches)  # the same, as ranges with names
        batch = next(batches, None)
        if batch is not None:
            with self._stream_context(self._memcpy_stream):
                batch = batch.to(self._device, non_blocking=True)
        return batch, self._create_context()

    def _before_forward(self) -> None:
        """Prepare a call of the model, in which the table takes what it requested."""
        batch, context = self.batches[0], self.contexts[0]
        if not context.module_contexts:
            self.start_sparse_data_dist(batch, context)
        self.wait_sparse_data_dist(context)

    def _requests(self) -> list[Any]:
        """What the table requested for this batch, for a step that does not call the model."""
        (context,) = self.contexts[0].module_contexts.values()
        if self._device.type == "cuda":  # made on the stream of the requests
            for request in context.requests:
                request.record_stream(torch.cuda.current_stream())
        return context.requests

    def release(self) -> None:
        self.train_step.release()


class ReplicasPipeline(StepPipeline):
    """The same for a model without sharded modules: only copies run ahead."""

    def _pipeline_model(self, *_: Any, **__: Any) -> None:
        """There is nothing to find in a trace."""

    def _before_forward(self) -> None:
        """No table requests rows."""


def train_pipeline(
    model: DistributedModelParallel, optimizer: Stepper, plan: ExecutionPlan, device: torch.device
) -> ExchangingPipeline | StepPipeline:
    """The pipeline for ``model``; drain its batches before ``detach``."""
    if plan.exchange == "torchrec":
        return ExchangingPipeline(model, optimizer, device)
    kind = ReplicasPipeline if plan.is_replicated else StepPipeline
    step = TrainStep(model, optimizer, plan, device)
    return kind(model, step, device, ahead=plan.exchange == "all_to_all")
