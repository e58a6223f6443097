"""How fast one core cuts, masks and batches windows, the model left out.

    python benchmarks/loader.py                          the table below
    python benchmarks/loader.py --seconds 10

Histories are random, seeded and in memory: 20 million ratings over 26,744 items, all of one length,
so that every window is full. Batches go through the same stages as in training, the prefetching
thread included; the process is held to one core. Each row is the best of three equal stretches. The
last column divides by the processor time used instead of the time passed: the two agree on a core
that does nothing else.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torchdata
import torchrec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.batch import TrainBatch
from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.masking import MaskConfig
from pipeline.store import SequenceStore
from pipeline.windows import WindowConfig

NUM_RATINGS, NUM_ITEMS = 20_000_000, 26_744
# (items a window, windows a batch)
CASES = ((100, 256), (200, 256), (16, 8), (16, 128), (16, 1024), (16, 4096))


def made_store(length: int) -> SequenceStore:
    """Users with ``length`` training items each and two held out."""
    num_users = NUM_RATINGS // (length + 2)
    items = np.random.default_rng(0).integers(
        1, NUM_ITEMS + 1, num_users * (length + 2), dtype=np.int32
    )
    return SequenceStore.from_arrays(items, np.arange(num_users + 1) * (length + 2), NUM_ITEMS)


def rates(store: SequenceStore, length: int, batch_size: int, seconds: float) -> tuple[float, ...]:
    """Sequences and masked positions a second, and sequences a second of processor time."""
    loader = TrainLoader(
        store,
        WindowConfig(max_len=length),
        MaskConfig(mask_prob=0.2, mask_last_share=0.05),
        LoaderConfig(train_batch_size=batch_size),
    )
    batches = chain.from_iterable(loader.epoch(epoch) for epoch in count())
    stretch(batches, seconds / 10)
    return max(stretch(batches, seconds / 3) for _ in range(3))


def stretch(batches: Iterator[TrainBatch], seconds: float) -> tuple[float, ...]:
    sequences = positions = 0
    start = now = time.perf_counter()
    cpu_start = time.process_time()
    while now - start < seconds:
        batch = next(batches)
        sequences += batch.num_windows
        positions += len(batch.masked)
        now = time.perf_counter()
    passed, used = now - start, time.process_time() - cpu_start
    return sequences / passed, positions / passed, sequences / used


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="to measure each row")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(
        f"{processor()}, 1 core; Python {platform.python_version()}, numpy {np.__version__}, "
        f"torch {torch.__version__}, torchrec {torchrec.__version__}, "
        f"torchdata {torchdata.__version__}\n"
    )
    print("| length | batch | sequences/s | masked positions/s | sequences/CPU s |")
    print("|---|---|---|---|---|")
    stores = {length: made_store(length) for length, _ in CASES}
    for length, batch_size in CASES:
        figures = rates(stores[length], length, batch_size, seconds)
        print(
            f"| {length} | {batch_size} |", *(f"{figure:,.0f} |" for figure in figures), flush=True
        )


if __name__ == "__main__":
    main()
