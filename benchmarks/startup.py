"""How long train.py takes to its first training steps, with empty caches and with full ones.

    python benchmarks/startup.py                                       synthetic data
    python benchmarks/startup.py --dataset_path ml-1m.zip -- --seed 3

Runs train.py for three steps: first with no prepared data and no compiled kernels, then again with
those that the first run left. Flags after ``--`` go to train.py. Each line of the table is a point
in time, in seconds since the process was started; a step is done when its loss is on the host. The
last lines count the kernels that Triton compiled until then (none on CPU).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit, processor
from model.run.script import Stages

STEPS = 3
POINTS = {
    "imports": "imports done",
    "ranks": "process group ready",
    "data": "data ready",
    "loader": "loader ready",
    "vectors": "first item vectors made",
    "model": "model built",
    "log": "training starts",
}


def points(
    stages: dict[str, float], trains: float, steps: list[dict[str, Any]], started: float
) -> dict[str, float]:
    """Seconds since ``started`` at each point.

    Args:
        stages: seconds of each stage before ``trains``, when training starts.
        steps: lines of metrics.jsonl.
    """
    at, found = trains - sum(stages.values()), {}
    for stage, seconds in stages.items():
        at += seconds
        found[POINTS[stage]] = at - started
    trained = (line for line in steps if line["event"] == "train")
    return found | {f"step {line['step']} done": line["time"] - started for line in trained}


def table(runs: dict[str, dict[str, float]]) -> str:
    """Markdown: a column for each run, a line for each point, then the time to the first step."""
    names = list(next(iter(runs.values())))
    lines = [f"| | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    for name in names:
        form = ",.0f" if name.startswith("kernels") else ".2f"
        lines.append(f"| {name} | {' | '.join(format(run[name], form) for run in runs.values())} |")
    for since in ("loader ready", "training starts"):
        waits = (run["step 1 done"] - run[since] for run in runs.values())
        cells = " | ".join(format(wait, ".2f") for wait in waits)
        lines.append(f"| from {since} to step 1 done | {cells} |")
    return "\n".join(lines)


def measure(flags: list[str], folder: Path) -> dict[str, float]:
    """The points of one run of train.py, whose caches are in ``folder``."""
    run_dir, kernels = folder / "run", folder / "kernels"
    shutil.rmtree(run_dir, ignore_errors=True)
    known = len(_compiled(kernels))
    places = [f"--cache_dir={folder / 'data'}", f"--run_dir={run_dir}"]
    few = [f"--max_steps={STEPS}", "--log_every=1"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, *few, *places]
    environment = os.environ | {"TRITON_CACHE_DIR": str(kernels)}
    stages, trains, started = {}, 0.0, time.time()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(Stages.TITLE.encode()):
                stages, trains = Stages.parse(line.decode()), time.time()
    ended = time.time()
    if process.returncode:
        sys.exit("startup.py: train.py failed")
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = points(stages, trains, steps, started) | {"ended": ended - started}
    made = _compiled(kernels)[known:]
    for name in ("training starts", "step 1 done", "ended"):
        count = sum(at <= started + found[name] for at in made)
        found[f"kernels, {name}"] = count
    return found


def _compiled(folder: Path) -> list[float]:
    """When each kernel in the cache was written, in seconds since 1970, ascending."""
    return sorted(file.stat().st_mtime for file in folder.rglob("*.cubin"))


def main() -> None:
    """Measure both runs, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_path", type=Path)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :]
    if options.dataset_path is not None:
        flags.append(f"--dataset_path={options.dataset_path.resolve()}")
    folder = Path(tempfile.mkdtemp(prefix="bert4rec-startup-"))
    try:
        runs = {caches: measure(flags, folder) for caches in ("empty caches", "full caches")}
    finally:
        shutil.rmtree(folder)
    print(f"{processor()}; commit {commit()}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
