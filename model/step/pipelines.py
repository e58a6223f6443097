"""TorchRec's train pipeline, without what one loss and few ranks do not need.

    batch i+2    copied to the device
    batch i+1    its features exchanged between the ranks
    batch i      looked up, forward, backward, update

Where features stay on their rank, because nothing is sharded (``--mode ddp``) or there is no other
rank, only the copies run ahead. Where ranks look up for each other (``model/tables/gathered_rows.py``),
the exchange of features is one call, which needs no rewriting of the model. In both cases nothing
comes between a step's forward and its backward pass, and it is one call too (:class:`TrainStep`).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.utils import _wait_for_batch

from model.step.optimizers import unwrap
from model.step.train_step import Stepper, TrainStep, backward
from model.tables.gathered_rows import GatheredRows
from pipeline.batches.train_batch import PackedBatch


class _TracedPipeline(TrainPipelineSparseDist):
    """The same pipeline for a loss that is one number: it need not be summed first."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: Stepper, device: torch.device
    ) -> None:
        super().__init__(model, optimizer, device, execute_all_batches=True)
        self._one = torch.ones((), device=device)

    def _backward(self, losses: torch.Tensor) -> None:
        backward(losses, self._one)

    def release(self) -> None:
        """Give CUDA graphs up."""
        unwrap(self._model).dense_step.release()


class _WholePipeline(TrainPipelineSparseDist):
    """Copies, and whatever ``_distribute`` does, run ahead of steps that are one call."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: Stepper, device: torch.device
    ) -> None:
        super().__init__(model, optimizer, device, execute_all_batches=True)
        self._step = TrainStep(model, optimizer, device)
        # Where nothing would be launched on it but waits, the steps' stream waits for the copies.
        self._data_dist_stream = None

    def release(self) -> None:
        """Give CUDA graphs up."""
        self._step.release()

    def progress(self, batches: Iterator[Step]) -> torch.Tensor:
        """One step; its report.

        Raises:
            StopIteration: there is no batch left.
        """
        if not self.batches:  # the first
            self.enqueue_batch(batches)
            self.start_sparse_data_dist(*self._next(0))
            self.enqueue_batch(batches)
        if not self.batches:
            raise StopIteration
        _wait_for_batch(self.batches[0], self._data_dist_stream)
        report = self._step(self.batches[0])
        self.start_sparse_data_dist(*self._next(1))
        self.enqueue_batch(batches)
        self.batches.popleft()
        self.contexts.popleft()
        return report

    def copy_batch_to_gpu(self, batches: Iterator[Step]) -> tuple[Step | None, Any]:
        """The next batch; of a step that is a graph, which cuts it by itself, still packed."""
        context = self._create_context()
        with (
            record_function(f"## copy_batch_to_gpu {context.index} ##"),
            self._stream_context(self._memcpy_stream),
        ):
            batch = self._next_batch(batches)
            if batch is not None:
                whole = unwrap(self._model).dense_step.is_whole
                move = batch.copied if whole else batch.to
                batch = move(self._device, non_blocking=True)
            return batch, context

    def _next(self, number: int) -> tuple[Step | None, Any]:
        if len(self.batches) <= number:
            return None, None
        return self.batches[number], self.contexts[number]

    def start_sparse_data_dist(self, batch: Step | None, context: Any) -> None:
        """Wait for the batch's copy, exchange its features if they are."""
        if batch is None:
            return
        with (
            record_function(f"## start_sparse_data_dist {context.index} ##"),
            self._stream_context(self._data_dist_stream),
        ):
            _wait_for_batch(batch, self._memcpy_stream)
            self._distribute(batch)

    def _distribute(self, batch: Step) -> None:
        """Features stay on their rank."""


class _GatheringPipeline(_WholePipeline):
    """For ranks that look up for each other: ids are gathered a batch ahead."""

    def __init__(self, exchange: GatheredRows, *args: Any) -> None:
        super().__init__(*args)
        self._exchange = exchange
        if self._device.type == "cuda":
            # Before the steps' own kernels: other ranks wait for it.
            self._data_dist_stream = torch.cuda.Stream(priority=-2)

    def _distribute(self, batch: Step) -> None:
        self._exchange.gather(batch)


def train_pipeline(
    model: DistributedModelParallel, optimizer: Stepper, device: torch.device
) -> TrainPipelineSparseDist:
    """The pipeline for ``model``; its batches must be drained before ``detach``."""
    given = model, optimizer, device
    if exchange := unwrap(model).dense_step.exchange:
        return _GatheringPipeline(exchange, *given)
    distributes = dist.get_world_size() > 1 and any(model.plan.plan.values())
    return (_TracedPipeline if distributes else _WholePipeline)(*given)
