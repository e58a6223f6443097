"""A trace of a few training steps, for TensorBoard or https://ui.perfetto.dev.

    python train.py --profile 10          ->  runs/mine/profile/rank0.<time>.pt.trace.json.gz
    tensorboard --logdir runs/mine           (pip install torch-tb-profiler)

A CUDA graph of the whole step hides its stages. In this case the same number of steps is then
traced without it, into rank0-apart.<time>.pt.trace.json.gz.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule
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
    "input distribution": r"## (start|wait)_sparse_data_dist ",  # TorchRec exchanges rows
    "lookup": "lookup$",
    "encoder": "encoder$",
    "head": "head$",
    "encoder and head": "encoder and head$",  # in one CUDA graph
    "backward": "## backward ",  # also updates the tables
    "optimizer": "## optimizer ",
    "step": "## step ##",  # one CUDA graph from the lookup to the optimizer
}


class StepProfiler:
    """Records ``--profile`` steps on every rank; a context manager around training.

    Args:
        folder: the run folder.
        steps: steps that will be trained; a short run is recorded from its first step.
        say: prints the times of the stages, called on rank 0.
    """

    def __init__(
        self,
        config: ProfileConfig,
        model: nn.Module,
        plan: ExecutionPlan,
        pipeline: Any,
        folder: Path,
        ranks: Ranks,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._steps, self._say = config.profile, say
        self._bert, self._ranks, self._folder = unwrap(model), ranks, folder / "profile"
        self._graphs = plan.graphs
        # With the graph of the whole step, then without.
        self._train_step: TrainStep | None = pipeline.train_step if plan.graphs == "step" else None
        self._cycles = 1 if self._train_step is None else 2
        recorded = self._cycles * (_WARM_UP + self._steps)
        self._first = max(0, min(_SKIPPED, steps - recorded - _RUN_OUT)) if self._steps else -1
        self._last = self._first + recorded
        self._done = self._written = 0
        self._profile: profile | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "StepProfiler":
        if self._first == 0:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:  # the end of training cuts the trace short
            self._end(self._profile)

    def step(self) -> None:
        """Call after each training step."""
        self._done += 1
        if self._done == self._first:
            self._begin()
        elif self._profile is not None:
            self._profile.step()
            if self._done == self._last:
                self._end(self._profile)

    def _begin(self) -> None:
        stages = {"lookup": self._bert.embeddings}
        if self._graphs == "dense":
            stages["encoder and head"] = self._bert.dense_step
        else:
            stages |= {"encoder": self._bert.encoder, "head": self._bert.head}
        for name, module in stages.items():
            self._hooks += _named(name, module)
        activities = [ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=_WARM_UP, active=self._steps, repeat=self._cycles),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _end(self, running: profile) -> None:
        running.stop()
        self._profile = None
        for hook in self._hooks:
            hook.remove()
        if self._train_step is not None:
            self._train_step.is_eager = False

    def _write(self, recorded: profile) -> None:
        apart = "-apart" * self._written
        trace_writer(str(self._folder), f"rank{self._ranks.rank}{apart}", use_gzip=True)(recorded)
        if self._ranks.is_first:
            how = ", without a graph of the whole step" * self._written
            self._say(f"{self._folder}{how}: {summary(recorded.events())}")
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
