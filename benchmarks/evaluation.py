"""Profile one evaluation with torch's profiler; takes the flags of eval.py.

    python benchmarks/evaluation.py --checkpoint runs/ml-1m
    torchrun --standalone --nproc_per_node 2 benchmarks/evaluation.py --checkpoint runs/ml-1m

Prints the seconds of an evaluation without the profiler. Then, of one with it: how long the GPU
was busy, how many operations the host launched, and the slowest operations.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import commit, processor
from model.distributed import start
from model.nodes import prepared_data
from model.run.build import evaluator
from model.run.config_file import versions
from model.run.script import start_script
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags
from model.settings.flags import FlagParser
from model.training.profile import covered

SHOWN = 12


def table(events: list[Any], seconds: float) -> str:
    """The slowest kernels or, without a GPU, operations by their own time.

    Args:
        events: ``torch.profiler.profile.events()`` of an evaluation.
        seconds: duration of that evaluation.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    device = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    times, calls = Counter[str](), Counter[str]()
    for event in device or host:
        times[event.name] += (
            event.time_range.end - event.time_range.start if device else event.self_cpu_time_total
        )
        calls[event.name] += 1
    operations = sum(event.name.startswith("aten::") for event in host if event.cpu_parent is None)
    lines = [f"under the profiler {seconds:.3f} s, {operations} operations"]
    if device:
        busy = covered([(event.time_range.start, event.time_range.end) for event in device]) / 1e6
        lines[0] += f", {len(device)} kernels and copies, the GPU busy for {busy:.3f} s"
    lines += ["| ms | calls | |", "|---|---|---|"]
    for name, spent in times.most_common(SHOWN):
        lines.append(f"| {spent / 1000:.2f} | {calls[name]} | {name[:100]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure with the flags of the command line."""
    start_script(lambda: FlagParser(__doc__, EvalFlags).parse(sys.argv[1:]), measure)


def measure(flags: EvalFlags) -> None:
    """Evaluate three times: to warm up, to measure the time, and under the profiler."""
    ranks = start()
    run = TrainedRun(flags)
    store = prepared_data(run.config.data, ranks)
    run.check_catalog(store)
    discount = flags.popularity_discount
    evaluate = evaluator(run.config, run.model(ranks), store, flags.split, ranks, discount)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        evaluate()
        seconds.append(time.perf_counter() - started)
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        evaluate()
        taken = time.perf_counter() - started
    ranks.say(f"{processor()}; {ranks}; {commit()}; {versions()}")
    ranks.say(f"{flags.checkpoint}: first {seconds[0]:.3f} s, then {seconds[1]:.3f} s")
    ranks.say(table(recorded.events(), taken))


if __name__ == "__main__":
    main()
