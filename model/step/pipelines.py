"""TorchRec's train pipeline, in three forms.

    batch i + 2    copied to the device
    batch i + 1    its rows requested, by ``input_dist`` of the item table
    batch i        looked up, forward, backward, update

TorchRec traces the model and finds the table's call, so that its ``input_dist`` runs a batch ahead.
With exchange "torchrec" of the plan, TorchRec also runs the steps. Otherwise a step is one call
(:class:`TrainStep`), which may replay a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from model.execution import ExecutionPlan
from model.step.train_step import Stepper, TrainStep, backward
from model.tables.distribute import unwrap
from pipeline.batches.train_batch import PackedBatch


class ExchangingPipeline(TrainPipelineSparseDist):
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


class StepPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline, in which the forward pass is a whole call of ``train_step``."""

    def __init__(
        self, model: DistributedModelParallel, train_step: TrainStep, device: torch.device
    ) -> None:
        super().__init__(
            model,
            _NoOptimizer(),
            device,
            execute_all_batches=True,
            custom_model_fwd=self._train,
            enqueue_batch_after_forward=True,
        )
        self.train_step = train_step
        self._no_loss = torch.empty(0)

    def _train(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return self._no_loss, self.train_step(batch, self._take_request)

    def _take_request(self) -> Any:
        """What the table requested for this batch; the model's own call would take it."""
        context = self.contexts[0]
        _, awaited = context.input_dist_tensors_requests.popitem()
        context.module_contexts.clear()
        (request,) = awaited.wait()
        if self._device.type == "cuda":  # made on the stream of the requests
            request.record_stream(torch.cuda.current_stream())
        return request

    def _backward(self, losses: Tensor) -> None:
        """Part of the step."""

    def release(self) -> None:
        self.train_step.release()


class ReplicasPipeline(StepPipeline):
    """The same for a model without sharded modules: only copies run ahead."""

    def _pipeline_model(self, *_: Any, **__: Any) -> None:
        """There is nothing to find in a trace."""


class _NoOptimizer:
    """The step has its own."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def train_pipeline(
    model: DistributedModelParallel, optimizer: Stepper, plan: ExecutionPlan, device: torch.device
) -> ExchangingPipeline | StepPipeline:
    """The pipeline for ``model``; drain its batches before ``detach``."""
    if plan.exchange == "torchrec":
        return ExchangingPipeline(model, optimizer, device)
    kind = ReplicasPipeline if plan.is_replicated else StepPipeline
    return kind(model, TrainStep(model, optimizer, plan, device), device)
