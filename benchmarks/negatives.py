"""How long the tables of negatives by popularity take for a large catalog, and one step's draw.

python benchmarks/negatives.py --num_items 100000000

The counts of ratings are random: geometric with a mean of 100, or by Zipf's law, popular items
first. Prints the seconds of one thread, wall and processor time, and the memory added.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.training.negatives import SharedNegatives


def counts(kind: str, num_items: int) -> np.ndarray:
    """int64 [V], in blocks: no other array of this size adds to the peak of memory."""
    found, generator = np.empty(num_items, dtype=np.int64), np.random.default_rng(0)
    for low in range(0, num_items, 1 << 20):
        part = found[low : low + (1 << 20)]
        if kind == "geometric":
            part[:] = generator.geometric(0.01, len(part)) - 1
        else:
            part[:] = num_items // np.arange(low + 1, low + 1 + len(part))
    return found


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_items", type=int, default=100_000_000)
    parser.add_argument("--negatives", type=int, default=4096, help="drawn a step")
    parser.add_argument("--counts", choices=["geometric", "zipf"], default="geometric")
    options = parser.parse_args()
    given = counts(options.counts, options.num_items)
    before, wall, processor = peak(), time.perf_counter(), time.process_time()
    negatives = SharedNegatives(options.negatives, options.num_items, 0, given)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{options.num_items:,} items: {wall:.2f} s, of a processor {processor:.2f} s")
    print(f"{(peak() - before) / 2**30:.2f} GiB beside the counts")
    started = time.perf_counter()
    negatives(0, list(range(100)))
    print(f"a step's draw: {10 * (time.perf_counter() - started):.2f} ms")


if __name__ == "__main__":
    main()
