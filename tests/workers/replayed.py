"""Stands for CUDA graphs where there is no CUDA: steps run from the memory that a graph would read.

What would be captured is kept, and runs anew whenever it would be replayed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from model.step.train_step import TrainStep, _Captured
from pipeline.batches.train_batch import PackedBatch
from pipeline.training.loader import TrainLoader


class _Again:
    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run

    def reset(self) -> None:
        """As of a graph."""


class Replayed(TrainStep):
    """A training step as TrainStep makes it on CUDA, its graphs aside."""

    def _capture(self, batch: PackedBatch) -> _Captured:
        def run() -> None:
            captured.report = self._launch(captured.read_batch(batch))

        captured = _Captured(_Again(run), batch)
        return captured

    @property
    def replayable(self) -> int:
        """Shapes that were met again."""
        return sum(one is not None for one in self._captured.values())


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Pipelines that are made in here take such steps, and loaders round sizes up."""
    with (
        patch("model.step.pipelines.TrainStep", Replayed),
        patch("model.run.build.TrainLoader", partial(TrainLoader, few_shapes=True)),
    ):
        yield
