"""Memory and time of exporting a model whose table is sharded over the ranks.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 benchmarks/export.py --items 2000000

All ranks save a checkpoint of untrained weights; rank 0 exports it, then that export again, each
without and with the programs that serve it. Memory is anonymous memory beside what rank 0 held
before (its rows and their optimizer state): pages of mapped files are not counted, because the
system takes them back when it needs them. It is sampled every millisecond.
"""

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import commit
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.export import Trained, export
from model.checkpoints.position import Position
from model.distributed import ALONE, from_first_rank, start
from model.ending import exit_rank
from model.run.build import build_model, build_plain_model
from model.run.config_file import write_config
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.settings.flags import build, flatten
from model.step.optimizers import Optimizers
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the time of the block and its peak of memory."""
    before, started, ended = anonymous(), time.perf_counter(), threading.Event()
    peaks = [before]

    def sample() -> None:
        while not ended.wait(0.001):
            peaks[0] = max(peaks[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    seconds = time.perf_counter() - started
    ended.set()
    thread.join()
    print(f"| {what} | {seconds:.1f} s | {(peaks[0] - before) / 2**20:,.0f} MiB |", flush=True)


def exports(config: RunConfig, num_items: int, checkpoint: Path, folder: Path) -> None:
    """Print a line of each export of a checkpoint, then of an exported model."""
    items = np.arange(1, num_items + 1)
    store = SequenceStore.from_arrays(items, [0, num_items], num_items)
    facts = {"num_items": num_items, "catalog": store.catalog_fingerprint}
    write_config(folder, flatten(config), facts)
    store.catalog.write_to(folder)
    with measured("reading the catalog"):
        Catalog.read(folder)
    for source, with_programs in product((checkpoint, folder / "exported"), (False, True)):
        plain = build_plain_model(config, num_items, ALONE, table_device="meta")
        trained = Trained(plain, source, 1, {}, folder, folder)
        target = folder / ("exported" if source == checkpoint else "again")
        what = "checkpoint" if source == checkpoint else "export"
        with measured(what + ", with programs" * with_programs):
            export(trained, target, with_users=False, with_programs=with_programs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--folder", help="for the checkpoint and the exports; default: a new one")
    options = parser.parse_args()
    ranks = start()
    config = build(RunConfig, {"emb_dim": options.width})
    plan = plan_execution(config, options.items, ranks)
    model = build_model(config, options.items, ranks, plan)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    folder = Path(from_first_rank(ranks, lambda: tempfile.mkdtemp(dir=options.folder)))
    checkpoints = Checkpoints(folder, ranks)
    checkpoints.save(model, optimizers, Position(step=1))
    if ranks.is_first:
        size = 4 * (options.items + 2) * options.width / 2**20
        print(f"table {size:,.0f} MiB, {size / ranks.world_size:,.0f} MiB a rank; {commit()}")
        exports(config, options.items, checkpoints.path(1), folder)
        shutil.rmtree(folder)
    exit_rank()


if __name__ == "__main__":
    main()
