"""--profile: ranges in the trace, the printed summary, and removal of all hooks."""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.nn.modules.module import Module

from model.distributed import Ranks
from model.execution import ExecutionPlan
from model.run.build import build_plain_model
from model.settings.config import RunConfig
from model.training.config import ProfileConfig
from model.training.profile import STAGES, StepProfiler, covered, summary
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, torchrun

STEPS = 3


def names_in(trace: Path) -> Counter[str]:
    """How often each range of the trace occurs, TorchRec's batch numbers left out."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = (event["name"] for event in events if event.get("cat") == "user_annotation")
    return Counter("".join(c for c in name if not c.isdigit()).replace("  ", " ") for name in names)


def test_a_trace_of_steady_steps_with_its_stages(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: list[Any] = []
    register = Module.register_forward_pre_hook

    def remember(module: Module, *arguments: Any, **more: Any) -> Any:
        hooks.append(module)
        return register(module, *arguments, **more)

    monkeypatch.setattr(Module, "register_forward_pre_hook", remember)
    outcome = run_main(
        "train",
        *TINY,
        "--train_batch_size=4",  # 36 steps an epoch: none of the recorded ones ends it
        "--max_steps=28",
        f"--profile={STEPS}",
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    (trace,) = tmp_path.glob("profile/rank0.*.pt.trace.json.gz")
    names = names_in(trace)
    for name in (
        "lookup",
        "encoder",
        "head",
        "## copy_batch_to_gpu ##",
        "## start_sparse_data_dist ##",
        "## forward ##",
        "## backward ##",
        "## optimizer ##",
        "ProfilerStep#",
    ):
        assert names[name] == STEPS, (name, names)
    assert names["## next_batch ##"] >= STEPS

    (line,) = (line for line in outcome.out.splitlines() if "a step takes the host" in line)
    assert line.startswith(f"{tmp_path / 'profile'}: ")
    times = dict(part.rsplit(" ", 1) for part in line.split("ms: ")[1].split(", "))
    assert times.keys() == STAGES.keys() - {"step"}  # a CUDA graph
    assert all(float(time) > 0 for stage, time in times.items() if stage != "data wait")
    assert len(hooks) == 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in hooks)


def test_the_trace_of_two_ranks_has_the_input_distribution(tmp_path: Path, cache_dir: Path) -> None:
    flags = ["--mode=dmp", "--sharding=table_wise", "--max_steps=6", f"--profile={STEPS}"]
    folders = [f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"]
    outcome = torchrun(2, "train.py", *TINY, *flags, *folders)
    assert outcome.code == 0, outcome.err
    for rank in (0, 1):
        (trace,) = tmp_path.glob(f"profile/rank{rank}.*.gz")
        names = names_in(trace)
        for name in ("next_batch", "start_sparse_data_dist", "wait_sparse_data_dist"):
            assert names[f"## {name} ##"] >= STEPS, names
    (line,) = (line for line in outcome.out.splitlines() if "a step takes the host" in line)
    assert "input distribution" in line


def test_a_short_run_is_recorded_from_its_first_step(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"]
    outcome = run_main("train", *flags, "--max_steps=4", "--profile=9")
    assert outcome.code == 0, outcome.err
    (trace,) = tmp_path.glob("profile/*.gz")
    # Two of the four steps warm the profiler up.
    assert names_in(trace)["encoder"] == 2
    assert outcome.err == ""


def test_a_run_that_ends_before_a_trace_says_so(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"]
    outcome = run_main("train", *flags, "--max_steps=2", "--profile=9")
    assert outcome.code == 0, outcome.err
    assert "/profile: no step: 2 steps only warm the profiler up" in outcome.out


def test_the_graph_of_the_whole_step_is_off_for_a_second_trace(
    one_rank: Ranks, tmp_path: Path
) -> None:
    bert = build_plain_model(RunConfig(), 20, one_rank)
    plan = ExecutionPlan(lookup="own", graphs="step")
    pipeline = SimpleNamespace(train_step=SimpleNamespace(is_eager=False, is_recorded=False))
    said: list[str] = []
    profiler = StepProfiler(
        ProfileConfig(STEPS), bert, plan, pipeline, tmp_path, one_rank, 14, said.append
    )
    eager, recorded = [], []
    with profiler:
        for _ in range(14):
            eager.append(pipeline.train_step.is_eager)
            recorded.append(pipeline.train_step.is_recorded)
            profiler.step()
    # Two steps before, two to warm up and three recorded, twice, and two that run out.
    assert eager == [*[False] * 7, *[True] * 5, *[False] * 2]
    assert recorded == [*[False] * 2, *[True] * 10, *[False] * 2]
    apart, as_trained = sorted(tmp_path.glob("profile/*.gz"))
    assert apart.name.startswith("rank0-apart.")
    for trace in (as_trained, apart):
        assert names_in(trace)["ProfilerStep#"] == STEPS
    assert [", without a graph of the whole step: " in line for line in said] == [False, True]


def event(
    name: str,
    start: float,
    end: float,
    device: DeviceType,
    annotation: bool = False,
    parent: object = None,
) -> SimpleNamespace:
    """Like an event of torch's profiler."""
    return SimpleNamespace(
        name=name,
        device_type=device,
        cpu_time_total=end - start if device == DeviceType.CPU else 0,
        self_cpu_time_total=end - start,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=annotation,
        cpu_parent=parent,
    )


def test_summary_by_hand() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("ProfilerStep#7", 0, 4000, cpu),
        event("ProfilerStep#8", 4000, 8000, cpu),
        event("## next_batch ##", 0, 500, cpu),
        event("## start_sparse_data_dist 9 ##", 500, 1500, cpu),
        event("## wait_sparse_data_dist 9 ##", 1500, 2000, cpu),
        event("encoder", 2000, 3000, cpu),
        event("encoder", 6000, 7000, cpu),
        event("heading", 7000, 8000, cpu),
        event("kernel", 2500, 3500, cuda),
        event("kernel", 3000, 4500, cuda),
        event("kernel", 6000, 6500, cuda),
        event("encoder", 2000, 7000, cuda, annotation=True),
    ]
    # Kernels run from 2500 to 4500 and from 6000 to 6500: 2500 of 4000.
    assert summary(events) == (
        "a step takes the host 4.00 ms: data wait 0.25, input distribution 0.75, encoder 1.00; "
        "the GPU is busy 62% of the time"
    )
    assert "GPU" not in summary(events[:8])


def test_covered_by_hand() -> None:
    assert covered([(5, 6), (0, 3), (1, 2), (2, 4)]) == 5
    assert covered([]) == 0


def test_a_negative_number_of_steps() -> None:
    with pytest.raises(UserError, match="--profile must be at least 0, not -1"):
        ProfileConfig(profile=-1)
