"""train.py without its pipeline: a plain loop of copy, exchange and step, nothing done ahead.

python benchmarks/plain_loop.py --dataset_name random --mode dmp          flags of train.py
python benchmarks/throughput.py --plain --rows exact-8                    beside the pipeline
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from model.execution import ExecutionPlan
from model.run.script import start_script
from model.step.train_step import Stepper, TrainStep


class PlainLoop:
    """A :class:`model.training.trainer.Pipeline` that holds no batch ahead."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Stepper,
        plan: ExecutionPlan,
        device: torch.device,
    ) -> None:
        self.train_step, self._device = TrainStep(model, optimizer, plan, device), device

    def progress(self, batches: Iterator[Any]) -> torch.Tensor:
        """One step on the next batch; its sum of losses and its number of masked positions."""
        return self.train_step(next(batches).to(self._device, non_blocking=True))

    def release(self) -> None:
        """Free CUDA graphs."""
        self.train_step.release()

    def detach(self) -> None:
        """Nothing to give back."""


if __name__ == "__main__":
    start_script(train.read_flags, lambda given: train.train(given, make_pipeline=PlainLoop))
