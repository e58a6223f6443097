"""TorchRec's train pipeline, without what one loss and few ranks do not need.

    batch i+2    copied to the device
    batch i+1    its features exchanged between the ranks
    batch i      looked up, forward, backward, update

Where features stay on their rank, because nothing is sharded (``--mode ddp``) or there is no other
rank, only the copies run ahead. Where ranks look up for each other (``model/gathered_rows.py``),
the exchange of features is one call, which needs no rewriting of the model.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd import set_multithreading_enabled
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from model.gathered_rows import GatheredRows
from model.sharding import unwrap
from pipeline.batch import TrainBatch


class Steps(Protocol):
    """What a pipeline asks of an optimizer."""

    def zero_grad(self) -> None:
        """Before a step."""

    def step(self) -> None:
        """After its backward pass."""


class _Pipeline(TrainPipelineSparseDist):
    """The same pipeline for a loss that is one number: it need not be summed first.

    Nor need another thread go through it backward: on CUDA, to wake that and to be woken again
    takes as long as a tenth of a small step.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._one = torch.ones((), device=self._device)

    def _backward(self, losses: torch.Tensor) -> None:
        with record_function("## backward ##"), set_multithreading_enabled(False):
            losses.backward(self._one)


class _UntracedPipeline(_Pipeline):
    """The same pipeline for a model that has no input distribution to take out of its forward pass.

    So there is nothing to trace; copies to the device still run a batch ahead.
    """

    def _pipeline_model(self, batch: TrainBatch, context: Any, *_: object, **__: object) -> None:
        self._pipelined_modules = []
        self.start_sparse_data_dist(batch, context)  # waits for the copy


class _CopyingPipeline(_UntracedPipeline):
    """For features that stay on their rank."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # Nothing would be launched on it but waits: the compute stream waits for the copies itself.
        self._data_dist_stream = None


class _GatheringPipeline(_UntracedPipeline):
    """For ranks that look up for each other: ids are gathered a batch ahead."""

    def __init__(self, exchange: GatheredRows, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._exchange = exchange

    def start_sparse_data_dist(self, batch: TrainBatch | None, context: Any) -> None:
        super().start_sparse_data_dist(batch, context)
        if batch is not None and batch.owned is None:
            with (
                record_function(f"## start_sparse_data_dist {context.index} ##"),
                self._stream_context(self._data_dist_stream),
            ):
                self._exchange.distribute(batch)


def train_pipeline(
    model: DistributedModelParallel, optimizer: Steps, device: torch.device
) -> TrainPipelineSparseDist:
    """The pipeline for ``model``; its batches must be drained before ``detach``."""
    given = model, optimizer, device
    if exchange := unwrap(model).dense_step.exchange:
        return _GatheringPipeline(exchange, *given, execute_all_batches=True)
    distributes = dist.get_world_size() > 1 and any(model.plan.plan.values())
    pipeline = _Pipeline if distributes else _CopyingPipeline
    return pipeline(*given, execute_all_batches=True)
