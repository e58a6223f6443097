"""How long training pauses while a checkpoint is saved.

    python benchmarks/checkpoint.py                              three sizes of the tables
    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --items 3706 -- --emb_dim 256

Builds a model of that many items as train.py does, with optimizer state, and saves it a few times
in two ways. Each column is a median in milliseconds:

    stands still     a save in the middle of an epoch: training waits for a copy in host memory
    written after    the time until a thread has written that copy
    if waited for    a save at the end of an epoch: training waits until it is written

Flags after ``--`` go to the model.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import commit, processor
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.position import Position
from model.distributed import Ranks, from_first_rank, start
from model.ending import exit_rank
from model.run.build import build_model
from model.run.config_file import versions
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from model.step.optimizers import Optimizers

REPEATS = 5


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that the work takes, on a GPU until all of its kernels have run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def row(items: int, flags: list[str], ranks: Ranks, folder: Path) -> str:
    """A line of the table."""
    config: RunConfig = FlagParser("", RunConfig).parse(flags)
    plan = plan_execution(config, items, ranks)
    model = build_model(config, items, ranks, plan)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    optimizers.materialise_state()
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, ranks, config.checkpoint)
    pauses, written, waited = [], [], []
    for step in range(1, 2 * REPEATS, 2):
        position = Position(step=step, best_step=step)
        pause = timed(
            partial(checkpoints.save, model, optimizers, position, wait=False), ranks.device
        )
        pauses.append(pause)
        written.append(pause + timed(checkpoints.finish, ranks.device))
        after = Position(step=step + 1, best_step=step + 1)
        waited.append(timed(partial(checkpoints.save, model, optimizers, after), ranks.device))
    files = (file for file in checkpoints.path(2 * REPEATS).iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files) / 1e6
    medians = " | ".join(f"{statistics.median(each):,.0f}" for each in (pauses, written, waited))
    return f"| {items:,} | {config.encoder.emb_dim} | {size:,.0f} | {medians} |"


def main() -> None:
    """Measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[3_706, 54_542, 500_000])
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :] or ["--emb_dim=128"]
    ranks = start()
    ranks.say(f"{ranks}; {processor()}; commit {commit()}; {versions()}\n")
    ranks.say("| items | width | MB | stands still ms | written after ms | if waited for ms |")
    ranks.say("|---|---|---|---|---|---|")
    folder = from_first_rank(ranks, lambda: Path(tempfile.mkdtemp(prefix="bert4rec-checkpoint-")))
    try:
        for number, items in enumerate(options.items):
            ranks.say(row(items, flags, ranks, folder / str(number)))
    finally:
        if ranks.is_first:
            shutil.rmtree(folder)
    exit_rank()


if __name__ == "__main__":
    main()
