"""train.py without its pipeline: copy, exchange, step, one after the other, as a plain loop would.

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
from model.distributed import run_script
from model.step.train_step import Stepper, TrainStep
from model.training import trainer as training


class PlainLoop:
    """What :class:`model.training.trainer.Trainer` asks of a pipeline, with nothing done ahead."""

    def __init__(self, model: torch.nn.Module, optimizer: Stepper, device: torch.device) -> None:
        self._step, self._device = TrainStep(model, optimizer, device), device

    def progress(self, batches: Iterator[Any]) -> torch.Tensor:
        """One step on the next batch; its report."""
        return self._step(next(batches).copied(self._device, non_blocking=True))

    def release(self) -> None:
        """Give CUDA graphs up."""
        self._step.release()

    def detach(self) -> None:
        """Nothing is held."""


if __name__ == "__main__":
    training.train_pipeline = PlainLoop
    run_script(train.main)
