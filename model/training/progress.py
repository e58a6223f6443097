"""How training proceeds, and what happened since the last line of the log.

Pace       how far the host runs ahead of the GPU
Feed       the loader's batches on their way into the pipeline, which runs ahead of the steps
Interval   the steps since the last line of the log
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist

from model.checkpoints.position import Position
from pipeline.batches.train_batch import PackedBatch
from pipeline.errors import UserError
from pipeline.training.loader import TrainLoader

# Seconds between two questions to a GPU that is a few steps behind.
_PAUSE = 5e-5


class Feed(Iterator[PackedBatch]):
    """The loader's next ``steps`` batches; remembers what the pipeline, which runs ahead, took.

    Args:
        stop: the first epoch of which there are none.
    """

    def __init__(self, loader: TrainLoader, position: Position, steps: int, stop: int) -> None:
        self._loader = loader
        # Not one more: the pipeline must be empty when training ends in the middle of an epoch.
        self._batches = islice(loader.epoch(position.epoch, position.sample, stop), steps)
        # Of the batches that the pipeline holds: windows, and samples of the epoch after it.
        self.held: deque[tuple[int, int]] = deque()
        self.waited = 0.0

    def __next__(self) -> PackedBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        self.held.append((batch.num_windows, self._loader.state_dict()["sample"]))
        return batch


class Pace:
    """Keeps the host a few steps ahead of its GPU, no more.

    Further ahead it gains nothing, and takes the interpreter from the loader's thread, for whose
    batches it waits then; while it waits for the GPU, that thread has its turn.

    A GPU waits for ever for one whose host is gone: to send is a part of the step's graph, which no
    library watches. So the host does not wait in a call that never returns, but asks now and then.

    Args:
        timeout: of a step.
    """

    def __init__(self, device: torch.device, timeout: timedelta, ahead: int = 4) -> None:
        self._timeout = timeout.total_seconds()
        self._free: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._free = [torch.cuda.Event() for _ in range(ahead)]
        self._running: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """To be called after every step.

        Raises:
            RuntimeError: the GPU does not get on.
        """
        if self._free:
            event = self._free.pop()
        elif self._running:
            event = self._running.popleft()
            self._wait_for(event)
        else:  # no GPU
            return
        event.record()
        self._running.append(event)

    def catch_up(self) -> None:
        """Wait for all steps, before something that waits for them without end.

        Raises:
            RuntimeError: the GPU does not get on.
        """
        if self._running:
            self._wait_for(self._running[-1])

    def _wait_for(self, event: torch.cuda.Event) -> None:
        begun = time.monotonic()
        while not event.query():
            if time.monotonic() - begun > self._timeout:
                raise RuntimeError("timed out waiting for the GPU")
            time.sleep(_PAUSE)


class StepNote(NamedTuple):
    """A step: its number, its epoch, the first of its samples, the one after them, its rate."""

    step: int
    epoch: int
    first: int
    after: int
    lr: float


class Interval:
    """The steps since the last line of the log, their losses still on the device."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []  # each [2]: sum of losses, masked positions
        self.steps: list[StepNote] = []
        self.windows = 0
        self._started = time.perf_counter()

    def add(self, losses: torch.Tensor, windows: int, step: StepNote) -> None:
        """One more step; ``losses`` float32 [2] stay on the device."""
        self.losses.append(losses)
        self.steps.append(step)
        self.windows += windows

    def reduce(self) -> dict[str, float]:
        """Mean loss per masked position, speed, and peak memory, over all ranks.

        ``records_per_second`` are those of all ranks together, ``peak_memory_gb`` of the rank that
        needed most: 1e9 bytes of the device's allocator, or on CPU of the process.

        Raises:
            UserError: a loss is not finite; the first such step is named.
        """
        totals = torch.stack(self.losses).double()
        totals = torch.cat([totals, totals.new_tensor([[self.windows, 0]])])
        dist.all_reduce(totals)
        peak = totals.new_tensor(peak_memory(totals.device) / 1e9)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        rows = totals.tolist()
        passed = time.perf_counter() - self._started
        for (loss_sum, _), note in zip(rows, self.steps, strict=False):
            if not math.isfinite(loss_sum):
                raise UserError(
                    f"the loss became {loss_sum} at step {note.step} (epoch {note.epoch}, its "
                    f"samples {note.first} to {note.after - 1}, lr {note.lr:g}): lower --lr or "
                    "raise --warmup_share; earlier checkpoints are intact"
                )
        positions = sum(row[1] for row in rows)
        return {
            "loss": sum(row[0] for row in rows[:-1]) / max(positions, 1),
            "lr": self.steps[-1].lr,
            "records_per_second": rows[-1][0] / passed,
            "step_ms": 1000 * passed / len(self.steps),
            "peak_memory_gb": float(peak),
        }


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once since the process began: tensors on CUDA, all of it on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
