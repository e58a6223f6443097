"""Around the steps: the host's lead over its GPU, losses to log."""

import math
import resource
import sys
import time
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from model.checkpoints.position import Position
from pipeline.errors import UserError

_POLL_SECONDS = 5e-5


class HostThrottle:
    """Keeps the host at most ``ahead`` steps ahead of its GPU.

    A host further ahead takes the interpreter lock from the loader's thread and delays its batches.
    The host polls the GPU instead of blocking: no watchdog observes a collective inside a CUDA
    graph, and it never ends if another rank has ended. A wait longer than ``timeout`` raises a
    RuntimeError.
    """

    def __init__(self, device: torch.device, timeout: timedelta, ahead: int = 4) -> None:
        self._timeout, self._ahead = timeout.total_seconds(), ahead
        self._on_gpu = device.type == "cuda"
        self._running: deque[torch.cuda.Event] = deque()

    def after_step(self) -> None:
        """Wait until at most ``ahead`` steps are unfinished; called after every step."""
        if not self._on_gpu:
            return
        if len(self._running) < self._ahead:
            event = torch.cuda.Event()
        else:
            event = self._running.popleft()
            self._wait_for(event)
        event.record()
        self._running.append(event)

    def wait_for_all(self) -> None:
        """Wait for all steps, before a call that would block without a timeout."""
        if self._running:
            self._wait_for(self._running[-1])

    def _wait_for(self, event: torch.cuda.Event) -> None:
        started = time.monotonic()
        while not event.query():
            if time.monotonic() - started > self._timeout:
                raise RuntimeError("timed out waiting for the GPU")
            time.sleep(_POLL_SECONDS)


class LogWindow:
    """The steps since the last line of the log; their losses stay on the device."""

    def __init__(self) -> None:
        # Of each step, float32 [2]: the sum of its losses and the number of masked positions.
        self.losses: list[torch.Tensor] = []
        # The positions before and after each step, and its learning rate.
        self.steps: list[tuple[Position, Position, float]] = []
        self.windows = 0
        self.waited = 0.0  # seconds, for the loader
        self._started = time.perf_counter()

    def reduce(self, norms: torch.Tensor | None, kept: str) -> dict[str, float]:
        """Mean loss per masked position, summed speed of all ranks, highest peak memory.

        A loss that is not finite is a UserError, which names the first such step.

        Args:
            norms: float32 [2], sums over the steps of the gradients' norm and of clipped steps,
                the same on all ranks; None: not computed.
            kept: which checkpoint there is, the last clause of the error.
        """
        totals = torch.stack(self.losses).double()
        totals = torch.cat([totals, totals.new_tensor([[self.windows, 0]])])
        dist.all_reduce(totals)
        peak = totals.new_tensor(_peak_memory(totals.device) / 1e9)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        *steps, (windows, _) = totals.tolist()
        seconds = time.perf_counter() - self._started
        for (loss_sum, _), (before, after, lr) in zip(steps, self.steps, strict=True):
            if not math.isfinite(loss_sum):
                raise UserError(
                    f"the loss became {loss_sum} at step {after.step} (epoch {after.epoch + 1}, "
                    f"its samples {before.sample} to {after.sample - 1}, lr {lr:g}): lower --lr "
                    f"or raise --warmup_share; {kept}"
                )
        values = {
            "loss": sum(loss_sum for loss_sum, _ in steps) / max(sum(n for _, n in steps), 1),
            "lr": self.steps[-1][-1],
            "records_per_second": windows / seconds,
            "step_ms": 1000 * seconds / len(self.steps),
            "peak_memory_gb": float(peak),
            "data_wait_ms": 1000 * self.waited / len(self.steps),
        }
        if norms is not None:
            norm, clipped = (norms / len(self.steps)).tolist()
            if math.isfinite(norm):
                values |= {"gradient_norm": norm, "clipped_share": clipped}
        return values


def _peak_memory(device: torch.device) -> int:
    """Most bytes in use at once: of tensors on CUDA, of the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
