"""Approximate search of an export's item vectors beside the exact list, with FAISS on CPU.

    pip install faiss-cpu
    python benchmarks/nearest.py --vectors exported/item_vectors.npy
    python benchmarks/nearest.py --items 10000000 --width 64       drawn vectors

Drawn vectors lie around 1,000 centres; queries are drawn like the items. Recall is the share of the
exact top 100 that the index finds, its time that of one query alone, on one thread: several would
wait for each other where other processes use the machine.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

CENTRES, SPREAD, K = 1000, 1.0, 100
PROBES = (1, 4, 16, 64, 256)


def drawn(count: int, width: int, seed: int) -> np.ndarray:
    """float32 [count, width] of unit length; centres do not depend on ``seed``."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, width), np.float32)
    generator = np.random.default_rng(seed)
    vectors = np.empty((count, width), np.float32)
    for low in range(0, count, 1 << 20):
        part = vectors[low : low + (1 << 20)]
        generator.standard_normal(out=part, dtype=np.float32)
        part *= SPREAD
        part += centres[generator.integers(0, CENTRES, len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def searched(index: Any, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """The items found, int64 [queries, K], and milliseconds of the median query on one thread."""
    import faiss

    threads, found, times = faiss.omp_get_max_threads(), [], []
    faiss.omp_set_num_threads(1)
    for query in queries:
        start = time.perf_counter()
        found.append(index.search(query[None], K)[1][0])
        times.append(1e3 * (time.perf_counter() - start))
    faiss.omp_set_num_threads(threads)
    return np.stack(found), float(np.median(times))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact items that were found."""
    return float(
        np.mean([np.isin(row, best).mean() for row, best in zip(found, exact, strict=True)])
    )


def main() -> None:
    """Print the table."""
    import faiss  # not among the requirements

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=Path, help="item_vectors.npy of an export")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--queries", type=int, default=100)
    flags = parser.parse_args()
    if flags.vectors:
        vectors = np.load(flags.vectors)
        queries = vectors[:: max(1, len(vectors) // flags.queries)][: flags.queries]
    else:
        vectors = drawn(flags.items, flags.width, seed=1)
        queries = drawn(flags.queries, flags.width, seed=2)
    items, width = vectors.shape
    print(f"{items:,} items of width {width}, faiss {faiss.__version__}, ", end="")
    print(f"built by {faiss.omp_get_max_threads()} threads, top {K} of {len(queries)} queries")
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors)
    exact, ms = searched(flat, queries)
    print(f"exact: {ms:.2f} ms a query")
    del flat
    lists = int(4 * items**0.5)
    start = time.perf_counter()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(3).permutation(items)[: 40 * lists]
    index.train(vectors[np.sort(sample)])
    index.add(vectors)
    print(f"IVF of {lists:,} lists: built in {time.perf_counter() - start:.0f} s")
    for index.nprobe in PROBES:
        found, ms = searched(index, queries)
        print(f"  nprobe {index.nprobe:4}: {ms:7.2f} ms a query, recall {recall(found, exact):.3f}")


if __name__ == "__main__":
    main()
