"""TorchRec's train pipelines for a loss that is one number.

    several ranks, sharded tables: TrainPipelineSparseDist
        batch i+2    copied to the device
        batch i+1    its features exchanged between the ranks
        batch i      looked up, forward, backward, update

    features stay on their rank, as there is no other or nothing is sharded: TrainPipelineBase
        batch i+1    copied to the device
        batch i      looked up, forward, backward, update

Both are changed in their backward pass alone.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import set_multithreading_enabled
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist


class Steps(Protocol):
    """What a pipeline asks of an optimizer."""

    def zero_grad(self) -> None:
        """Before a step."""

    def step(self) -> None:
        """After its backward pass."""


class _OneLoss:
    """A pipeline whose loss is one number: it need not be summed first.

    Nor need another thread go through it backward: on CUDA, to wake that and to be woken again
    takes as long as a tenth of a small step.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._one = torch.ones((), device=self._device)

    def _backward(self, losses: torch.Tensor) -> None:
        with record_function("## backward ##"), set_multithreading_enabled(False):
            losses.backward(self._one)


class _DistributingPipeline(_OneLoss, TrainPipelineSparseDist):
    """Distributes the features of a batch ahead, and copies the one after it."""


class _CopyingPipeline(_OneLoss, TrainPipelineBase):
    """Copies a batch ahead: for a model whose features stay on their rank."""

    def detach(self) -> nn.Module:
        """Ready for batches from elsewhere, when the last ones were trained."""
        self.reset()
        return self._model


def train_pipeline(
    model: DistributedModelParallel, optimizer: Steps, device: torch.device
) -> TrainPipelineSparseDist | TrainPipelineBase:
    """The pipeline for ``model``; its batches must be drained before ``detach``."""
    if dist.get_world_size() > 1 and any(model.plan.plan.values()):
        return _DistributingPipeline(model, optimizer, device, execute_all_batches=True)
    return _CopyingPipeline(model, optimizer, device)
