"""Whether a seed trains and evaluates the same on any number of ranks of one host.

    python benchmarks/agreement.py                                     synthetic data, 1, 2, 4 ranks
    python benchmarks/agreement.py --ranks 1 2 -- --dataset_path ml-1m.zip --precision fp32

Trains one seed through train.py on each number of ranks: the same global batch, no dropout, four
epochs. Then trains half of the steps on the most ranks and the rest on fewer, and evaluates the
first run of the most ranks on fewer. Each line of the table compares a run's losses, step by step,
or the metrics of an evaluation, with those of the first line of their kind. FAIL, and exit code 1,
if anything differs by more than 1e-4. Flags after ``--`` go to train.py. On GPUs, jobs that fit
beside each other run at once.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit, processor
from model.run.config_file import versions

LIMIT = 1e-4
SETTINGS = (
    "--recipe=none",
    "--synthetic_user_count=2000",
    "--synthetic_item_count=3000",
    "--max_len=32",
    "--emb_dim=64",
    "--dropout=0",
    "--lr=0.003",
    "--seed=7",
    "--num_epochs=4",
    "--eval_every=4",
    "--log_every=1",
)


@dataclass(frozen=True)
class Job:
    """A script on some ranks, and its run folder."""

    script: str
    ranks: int
    run_dir: Path
    flags: tuple[str, ...] = ()

    def start(self, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
        """On these GPUs (none: on CPU), its output beside the run folder."""
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}")
        command = (sys.executable, *launch, str(ROOT / self.script), *self.flags)
        # One core per rank by default.
        places = {"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with self.log.open("wb") as log:
            return subprocess.Popen(command, env=places, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return self.run_dir.with_suffix(".log")


def run(jobs: Sequence[Job], gpus: Sequence[str]) -> None:
    """Run all, at once where their ranks fit the GPUs; SystemExit if one fails."""
    for together in rounds(jobs, len(gpus)):
        free, started = iter(gpus), []
        for job in together:
            started.append(job.start([next(free) for _ in range(job.ranks if gpus else 0)]))
        codes = [process.wait() for process in started]
        for job, code in zip(together, codes, strict=True):
            if code:
                sys.exit(f"{job.log.read_text()}\nagreement.py: {job.run_dir.name} failed")


def rounds(jobs: Sequence[Job], gpus: int) -> list[list[Job]]:
    """Jobs that run at once, in the order given."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and sum(each.ranks for each in found[-1]) + job.ranks <= gpus:
            found[-1].append(job)
        else:
            found.append([job])
    return found


def losses(run_dir: Path) -> dict[str, float]:
    """By step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {f"step {line['step']}": line["loss"] for line in lines if "loss" in line}


def metrics(run_dir: Path) -> dict[str, float]:
    """Of the evaluation on the test part, by protocol and name."""
    found = json.loads((run_dir / "eval_test.json").read_text())
    return {f"{p} {name}": v for p in ("full", "sampled") for name, v in found[p].items()}


def compared(name: str, ranks: int, found: dict[str, float], first: dict[str, float]) -> str:
    """A line of the table; where only one of both has a number, they differ without limit."""
    apart = {key: float("inf") for key in first | found}
    for key in first.keys() & found.keys():
        difference = abs(found[key] - first[key])
        apart[key] = min(apart[key], difference)  # infinite for NaN
    worst = max(apart, key=lambda key: apart[key])
    last = list(found)[-1]
    verdict = "PASS" if apart[worst] <= LIMIT else "FAIL"
    cells = name, ranks, len(found), f"{last}: {found[last]:.5f}", f"{apart[worst]:.1e} ({worst})"
    return f"| {' | '.join(map(str, cells))} | {verdict} |"


def agreement(
    folder: Path, all_ranks: Sequence[int], batch: int, flags: Sequence[str], gpus: Sequence[str]
) -> Iterator[str]:
    """Train and evaluate everything in ``folder``; the lines of the table.

    Args:
        all_ranks: numbers of ranks, ascending.
        batch: windows of a step of all ranks.
        flags: of train.py.
    """

    def trained(name: str, ranks: int, *more: str) -> Job:
        local = f"--train_batch_size={batch // ranks}"
        places = f"--cache_dir={folder / 'cache'}", f"--run_dir={folder / name}"
        return Job("train.py", ranks, folder / name, (*SETTINGS, *flags, local, *places, *more))

    first, *fewer, most = (trained(f"trained on {n}", n) for n in all_ranks)
    run([first, *fewer, most], gpus)
    expected = losses(first.run_dir)
    half = f"--max_steps={len(expected) // 2}"
    stopped = trained(f"stopped on {most.ranks}", most.ranks, half)
    run([stopped], gpus)
    continued, evaluated = [], []
    for ranks in all_ranks[:-1]:
        continued.append(trained(f"continued on {ranks}", ranks, "--resume=auto"))
        shutil.copytree(stopped.run_dir, continued[-1].run_dir)
        copied = folder / f"evaluated on {ranks}"
        shutil.copytree(most.run_dir, copied)
        given = f"--checkpoint={copied}", f"--cache_dir={folder / 'cache'}"
        evaluated.append(Job("eval.py", ranks, copied, given))
    run([*continued, *evaluated], gpus)
    for job in (first, *fewer, most, *continued):
        yield compared(f"losses, {job.run_dir.name}", job.ranks, losses(job.run_dir), expected)
    of_most = metrics(most.run_dir)
    for job in (most, *evaluated):
        yield compared(f"metrics, {job.run_dir.name}", job.ranks, metrics(job.run_dir), of_most)


def main() -> None:
    """Train, evaluate, print the table; exit code 1 for FAIL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="two or more")
    parser.add_argument("--batch", type=int, default=128, help="windows of a step of all ranks")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :]
    all_ranks = sorted(set(options.ranks))
    if len(all_ranks) < 2 or any(options.batch % n for n in all_ranks):
        parser.error("--ranks needs two numbers, which divide --batch")
    gpus: list[str] = []
    if options.device == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        gpus = visible.split(",")[:count] if visible else [*map(str, range(count))]
    if gpus and all_ranks[-1] > len(gpus):
        most = f"--ranks {all_ranks[-1]} needs as many GPUs, not {len(gpus)}"
        parser.error(f"{most}: give fewer, or --device cpu")
    folder = Path(tempfile.mkdtemp(prefix="bert4rec-agreement-"))
    started = time.perf_counter()
    try:
        lines = list(agreement(folder, all_ranks, options.batch, flags, gpus))
    finally:
        shutil.rmtree(folder)
    hardware = f"{len(gpus)} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    print(f"{hardware}; {processor()}; commit {commit()}; {versions()}")
    print(f"{time.perf_counter() - started:.0f} s\n")
    print("| what | ranks | numbers | the last | largest difference | |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    passed = not any(line.endswith("FAIL |") for line in lines)
    print(f"\n{'PASS' if passed else 'FAIL'}: {LIMIT:g}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
