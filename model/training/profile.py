"""A trace of a few training steps, for TensorBoard or https://ui.perfetto.dev.

    python train.py --profile 10          ->  runs/mine/profile/rank0.<time>.pt.trace.json.gz
    tensorboard --logdir runs/mine           (pip install torch-tb-profiler)

A CUDA graph of the whole step hides its stages. In this case the same number of steps is then
traced without it, into rank0-apart.<time>.pt.trace.json.gz.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile, record_function, schedule
from torch.profiler import tensorboard_trace_handler as trace_writer

from model.distributed import Ranks
from model.execution import ExecutionPlan
from model.step.train_step import TrainStep
from model.tables.distribute import unwrap
from model.training.config import ProfileConfig

# Steps before the trace: the first ones choose kernels, allocate memory, capture CUDA graphs.
_SKIPPED, _WARM_UP = 100, 2
# Steps after it: the last ones have no further batch to prepare.
_RUN_OUT = 2
# Regular expressions for the beginning of each stage's ranges in the trace. Ranges with ## are
# TorchRec's or named like them; the others are hooks that exist only while a trace is recorded.
STAGES = {
    "data wait": "## next_batch ",
    "transfer": "## copy_batch_to_gpu ",
    "input distribution": r"## (start|wait)_sparse_data_dist ",  # of the item table
    "lookup": "lookup$",
    "encoder": "encoder$",
    "head": "head$",
    "backward": "## backward ",  # also updates the tables
    "optimizer": "## optimizer ",
    "step": "## step ##",  # one CUDA graph from the lookup to the optimizer
}


@dataclass(eq=False)
class StepProfiler:
    """Records ``--profile`` steps on every rank; a context manager around training."""

    config: ProfileConfig
    model: nn.Module
    plan: ExecutionPlan
    pipeline: Any
    run_dir: Path
    ranks: Ranks
    steps: int  # that will be trained; a short run is recorded from its first step
    say: Callable[[str], None]  # prints the times of the stages, called on rank 0

    def __post_init__(self) -> None:
        # With the graph of the whole step, then without.
        self._cycles = 2 if self.plan.graphs == "step" else 1
        self._train_step: TrainStep | None = getattr(self.pipeline, "train_step", None)
        recorded = self._cycles * (_WARM_UP + self.config.profile)
        skipped = max(0, min(_SKIPPED, self.steps - recorded - _RUN_OUT))
        self._first = skipped if self.config.profile else -1
        self._last = skipped + recorded
        self._done = self._written = 0
        self._profile: profile | None = None
        self._recording = ExitStack()  # the profile, and the hooks that name the stages

    def __enter__(self) -> "StepProfiler":
        if self._first == 0:
            self._begin()
        return self

    def step(self) -> None:
        """Call after each training step."""
        self._done += 1
        if self._done == self._first:
            self._begin()
        elif self._profile is not None:
            self._profile.step()
            if self._done == self._last:
                self.__exit__()

    def _begin(self) -> None:
        bert = unwrap(self.model)
        for name, module in (
            ("lookup", bert.embeddings),
            ("encoder", bert.encoder),
            ("head", bert.head),
        ):
            for hook in _named(name, module):
                self._recording.enter_context(hook)
        steps = self.config.profile
        recording = profile(
            schedule=schedule(wait=0, warmup=_WARM_UP, active=steps, repeat=self._cycles),
            on_trace_ready=self._write,
        )
        self._profile = self._recording.enter_context(recording)
        if self._train_step is not None:
            self._train_step.is_recorded = True

    def __exit__(self, *_: object) -> None:
        self._recording.close()  # the end of training may cut the trace short
        self._profile = None
        if self._train_step is not None:
            self._train_step.is_eager = self._train_step.is_recorded = False

    def _write(self, recorded: profile) -> None:
        folder, apart = self.run_dir / "profile", "-apart" * self._written
        trace_writer(str(folder), f"rank{self.ranks.rank}{apart}", use_gzip=True)(recorded)
        if self.ranks.is_first:
            how = ", without a graph of the whole step" * self._written
            self.say(f"{folder}{how}: {summary(recorded.events())}")
        self._written += 1
        if self._train_step is not None:
            self._train_step.is_eager = True


def _named(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Record every call of ``module`` as a range called ``name``."""
    stage = record_function(name)

    def enter(*_: Any) -> None:
        stage.__enter__()

    def leave(*_: Any) -> None:
        stage.__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def summary(events: list[Any]) -> str:
    """One line from ``profile.events()``: host time of a step and its stages, share of GPU time.

    The GPU runs a stage's kernels later, and stages may overlap there: see the trace.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in host if event.name.startswith("ProfilerStep")]
    count = max(len(steps), 1)
    spent = {
        stage: sum(event.cpu_time_total for event in host if re.match(names, event.name))
        for stage, names in STAGES.items()
    }
    parts = [f"{stage} {time / count / 1000:.2f}" for stage, time in spent.items() if time]
    if not parts:
        return f"no step: {_WARM_UP} steps only warm the profiler up"
    whole = sum(event.cpu_time_total for event in steps)
    text = f"a step takes the host {whole / count / 1000:.2f} ms: {', '.join(parts)}"
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if kernels:
        span = max(end for _, end in kernels) - min(start for start, _ in kernels)
        text += f"; the GPU is busy {covered(kernels) / span:.0%} of the time"
    return text


def covered(ranges: list[tuple[float, float]]) -> float:
    """Length of the union of ranges (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
