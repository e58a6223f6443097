"""TorchRec's train pipeline, without what one loss and few ranks do not need.

batch i+2    copied to the device
batch i+1    its features exchanged between the ranks
batch i      looked up, forward, backward, update

several ranks    TrainPipelineSparseDist, backward in the thread that calls
one rank         features are not exchanged with oneself
--mode ddp       nothing is sharded: only copies run ahead
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import set_multithreading_enabled
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import Awaitable, NoWait
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipeline.batch import TrainBatch


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


class _ReplicatedPipeline(_Pipeline):
    """The same pipeline for a model without sharded modules.

    There is no input distribution to take out of the forward pass, so there is nothing to trace;
    copies to the device still run a batch ahead.
    """

    def _pipeline_model(self, batch: TrainBatch, context: Any, *_: object, **__: object) -> None:
        self._pipelined_modules = []
        self.start_sparse_data_dist(batch, context)  # waits for the copy


class _LonePipeline(_Pipeline):
    """The same pipeline for one rank, which keeps its features.

    TorchRec would tell the only rank through the device, and wait for the answer, how many of its
    features go to itself, and make an index to put them in order by. ``detach`` takes back what is
    done here like what TorchRec does.
    """

    def __init__(self, model: DistributedModelParallel, *args: object, **kwargs: object) -> None:
        super().__init__(model, *args, **kwargs)
        plans = (table for module in model.plan.plan.values() for table in module.values())
        if all(plan.sharding_type != "row_wise" for plan in plans):
            # Nothing is launched on it but waits: the copies of a batch ahead are waited for here.
            self._data_dist_stream = None

    def _pipeline_model(self, *args: object, **kwargs: object) -> None:
        super()._pipeline_model(*args, **kwargs)
        for module in self._pipelined_modules:
            for distribution in module._input_dists:
                distribution._dist.forward = lambda features: NoWait(_Kept(features))


class _Kept(Awaitable[KeyedJaggedTensor]):
    """What comes of a redistribution to oneself."""

    def __init__(self, features: KeyedJaggedTensor) -> None:
        super().__init__()
        self._features = features

    def _wait_impl(self) -> KeyedJaggedTensor:
        return self._features.sync()


def train_pipeline(
    model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device
) -> TrainPipelineSparseDist:
    """TorchRec's three-batch pipeline over ``model``; batches must be drained before ``detach``."""
    pipeline = _LonePipeline if dist.get_world_size() == 1 else _Pipeline
    if not any(True for _ in _sharded_tables(model)):
        pipeline = _ReplicatedPipeline
    return pipeline(model, optimizer, device, execute_all_batches=True)


def _sharded_tables(model: DistributedModelParallel) -> Iterator[str]:
    for name, plan in model.plan.plan.items():
        yield from (f"{name}.{table}" for table in plan)
