"""CUDA graphs faked without CUDA: steps run from the memory that a graph would read.

The captured function is kept and runs again at every replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from model.step.train_step import TrainStep, _Captured
from pipeline.batches.train_batch import PackedBatch
from pipeline.training.loader import TrainLoader


class _Again:
    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run

    def reset(self) -> None:
        """Like a graph's replay."""


class Replayed(TrainStep):
    """A training step like TrainStep's on CUDA, with fake graphs."""

    def _capture(self, batch: PackedBatch, requests: list[Any]) -> _Captured:
        def run() -> None:
            captured.report = self._launch(lambda: self._forward(captured))

        captured = _Captured(_Again(run), batch, requests)
        return captured

    @property
    def replayable(self) -> int:
        """Number of shapes that were replayed."""
        return sum(one is not None for one in self._captured.values())


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Pipelines created inside use these steps, and loaders round sizes up."""
    with (
        patch("model.step.pipelines.TrainStep", Replayed),
        patch("model.run.build.TrainLoader", partial(TrainLoader, few_shapes=True)),
    ):
        yield
