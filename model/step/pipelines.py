"""TorchRec's train pipeline, in two forms.

    batch i + 2    copied to the device
    batch i + 1    its features exchanged between the ranks    (where TorchRec exchanges rows)
    batch i        looked up, forward, backward, update

With exchange "torchrec" of the plan, TorchRec rewrites the model, so that the exchange of features
runs a batch ahead. Otherwise only the copies do, and the step is one call (:class:`TrainStep`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.utils import _wait_for_batch

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


class CopyingPipeline(TrainPipelineSparseDist):
    """Copies batches ahead; a step is one call of ``train_step``."""

    def __init__(
        self, model: DistributedModelParallel, train_step: TrainStep, device: torch.device
    ) -> None:
        super().__init__(model, train_step, device, execute_all_batches=True)
        self.train_step = train_step

    def release(self) -> None:
        self.train_step.release()

    def progress(self, batches: Iterator[PackedBatch]) -> Tensor:
        """One step; its report. StopIteration if there is no batch left."""
        if not self.batches:  # the first step
            self.enqueue_batch(batches)
            self.enqueue_batch(batches)
        if not self.batches:
            raise StopIteration
        _wait_for_batch(self.batches[0], self._memcpy_stream)
        report = self.train_step(self.batches[0])
        self.enqueue_batch(batches)
        self.batches.popleft()
        self.contexts.popleft()
        return report

    def copy_batch_to_gpu(self, batches: Iterator[PackedBatch]) -> tuple[PackedBatch | None, Any]:
        """The next batch on the device, still packed: the step unpacks it."""
        context = self._create_context()
        with (
            record_function(f"## copy_batch_to_gpu {context.index} ##"),
            self._stream_context(self._memcpy_stream),
        ):
            batch = self._next_batch(batches)
            if batch is not None:
                batch = batch.move(self._device, non_blocking=True)
            return batch, context


def train_pipeline(
    model: DistributedModelParallel, optimizer: Stepper, plan: ExecutionPlan, device: torch.device
) -> ExchangingPipeline | CopyingPipeline:
    """The pipeline for ``model``; drain its batches before ``detach``."""
    if plan.exchange == "torchrec":
        return ExchangingPipeline(model, optimizer, device)
    return CopyingPipeline(model, TrainStep(model, optimizer, plan, device), device)
