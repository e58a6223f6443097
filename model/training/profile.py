"""A trace of some steady training steps, for TensorBoard or https://ui.perfetto.dev.

    python train.py --profile 10          ->  runs/mine/profile/rank0.<time>.pt.trace.json.gz
    tensorboard --logdir runs/mine           (pip install torch-tb-profiler)

What the stages of a step are called in the trace:

    data wait             ## next_batch ##
    transfer              ## copy_batch_to_gpu ... ##
    input distribution    ## start_sparse_data_dist ... ##, ## wait_sparse_data_dist ... ##; of
                          one rank, next to nothing
    lookup, encoder, head       inside ## forward ... ##; "encoder and head" where one CUDA graph
                          holds both
    backward              ## backward ... ##
    optimizer             ## optimizer ... ##, without the tables, which the backward pass updates
    step                  ## step ##: from the lookup to the optimizer, where one CUDA graph holds
                          it all; as many steps more are then trained and recorded without it, for
                          rank0-apart.<time>.pt.trace.json.gz, where its stages are to be seen

Names between ``##`` are those of TorchRec's pipeline, or like them; the other three are put, from
outside, around the modules while a trace is recorded, so that a run without one does nothing for
it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.profiler import tensorboard_trace_handler as trace_writer

from model.distributed import Ranks
from model.step.optimizers import unwrap
from pipeline.errors import UserError

# Steps before the trace: in the first ones kernels are chosen, memory is allocated, CUDA graphs are
# captured.
_SKIPPED, _WARM_UP = 100, 2
# Steps after it: the last ones have no batch to prepare any more.
_RUN_OUT = 2
# How the ranges of a stage begin in the trace.
STAGES = {
    "data wait": "## next_batch ",
    "transfer": "## copy_batch_to_gpu ",
    "input distribution": r"## (start|wait)_sparse_data_dist ",
    "lookup": "lookup$",
    "encoder": "encoder$",
    "head": "head$",
    "encoder and head": "encoder and head$",
    "backward": "## backward ",
    "optimizer": "## optimizer ",
    "step": "## step ##",
}


@dataclass(frozen=True)
class ProfileConfig:
    """What to record of training steps."""

    profile: int = field(
        default=0,
        metadata={
            "help": "steady steps to record for TensorBoard or Perfetto, in <run folder>/profile; "
            "where a step is one CUDA graph, as many more without it"
        },
    )

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise UserError(f"--profile must be a number of steps, 0 for none, not {self.profile}")


class StepProfiler:
    """Records ``--profile`` steps on every rank; entered around training.

    Args:
        model: the distributed model.
        folder: the run folder.
        steps: steps that are going to be trained; few of them are recorded from the first on.
        say: prints the times of the stages on rank 0.
    """

    def __init__(
        self,
        config: ProfileConfig,
        model: nn.Module,
        folder: Path,
        ranks: Ranks,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._recorded, self._say = config.profile, say
        self._bert, self._ranks, self._folder = unwrap(model), ranks, folder / "profile"
        # As they are trained, then apart.
        self._cycles = 2 if self._bert.dense_step.is_whole else 1
        recorded = self._cycles * (_WARM_UP + config.profile)
        self._to_skip = max(0, min(_SKIPPED, steps - recorded - _RUN_OUT))
        self._written = 0
        self._profile: profile | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "StepProfiler":
        if self._recorded and self._to_skip == 0:
            self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._end()

    def step(self) -> None:
        """To be called after every training step."""
        if self._profile is not None:
            self._profile.step()
            self._to_record -= 1
            if self._to_record == 0:
                self._end()
        elif self._recorded:
            self._to_skip -= 1
            if self._to_skip == 0:
                self._begin()

    def _begin(self) -> None:
        stages = {"lookup": self._bert.embeddings}
        if self._bert.dense_step.is_graphed:
            stages["encoder and head"] = self._bert.dense_step
        else:
            stages |= {"encoder": self._bert.encoder, "head": self._bert.head}
        for name, module in stages.items():
            self._hooks += _named(name, module)
        self._to_record = self._cycles * (_WARM_UP + self._recorded)
        activities = [ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=_WARM_UP, active=self._recorded, repeat=self._cycles),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def _end(self) -> None:
        """Stop recording; a trace that was cut short by the end of training is written too."""
        self._profile.stop()
        self._profile, self._recorded = None, 0
        for hook in self._hooks:
            hook.remove()
        self._bert.dense_step.is_whole = self._cycles == 2

    def _write(self, recorded: profile) -> None:
        apart = "-apart" * self._written
        trace_writer(str(self._folder), f"rank{self._ranks.rank}{apart}", use_gzip=True)(recorded)
        if self._ranks.is_first:
            how = ", without a graph of the whole step" * self._written
            self._say(f"{self._folder}{how}: {summary(recorded.events())}")
        self._written += 1
        self._bert.dense_step.is_whole = False


def _named(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Put a range called ``name`` around every call of ``module``."""
    running: list[record_function] = []

    def enter(*_: Any) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def summary(events: list[Any]) -> str:
    """One line: a step's time on the host, that of its stages, and how busy the GPU was.

    Args:
        events: ``torch.profiler.profile.events()``. Stages of the host may overlap on the GPU, and
            what a stage launches runs later than the stage: the trace shows both.
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
