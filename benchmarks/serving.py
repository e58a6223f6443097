"""Milliseconds of one user's recommendations by an export's recommender.py, on one processor core.

    python benchmarks/serving.py                              100,000 items, width 64, length 50
    python benchmarks/serving.py --exported exported/

Without ``--exported`` the model is untrained: the time does not depend on weights. The core's time
leaves out what other processes took of it.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# Before NumPy is loaded.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def untrained(folder: Path, items: int, width: int, length: int) -> None:
    """Write an export of a model with two layers."""
    import pyarrow as pa
    from safetensors.torch import save_file

    from model.bert4rec import BERT4Rec, ModelConfig
    from model.checkpoints.export import CHECKSUMS
    from model.checkpoints.manifest import describe_files
    from model.network.config import EncoderConfig, HeadConfig
    from model.network.head import CatalogSlice
    from model.programs.folder import write_programs
    from pipeline.files import write_json
    from pipeline.preparation.catalog import Catalog

    config = ModelConfig(items, length, EncoderConfig(width, 2, 2), HeadConfig())
    bert = BERT4Rec(config, CatalogSlice(1, items + 1, shared=False)).eval()
    names = pa.array([str(item) for item in range(items)])
    titles = pa.array([""] * items)
    catalog = Catalog(names, titles, np.ones(items, np.int64), pa.array(["user"]))
    save_file(bert.state_dict(), folder / "model.safetensors")
    flags = {"max_len": length, "logit_temperature": config.head.logit_temperature}
    write_json(folder / "config.json", {"flags": flags})
    write_programs(bert, catalog, folder, "model.safetensors")
    write_json(folder / CHECKSUMS, describe_files(folder, "*"))


def main() -> None:
    """Print the percentiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exported", type=Path, help="a folder that export.py has written")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--calls", type=int, default=2000)
    flags = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as made:
        folder = flags.exported or Path(made)
        if not flags.exported:
            untrained(folder, flags.items, flags.width, flags.length)
        sys.path.insert(0, str(folder))
        from recommender import Recommender

        start = time.perf_counter()
        serving = Recommender(folder)
        print(f"loaded in {time.perf_counter() - start:.2f} s")
        length = json.loads((folder / "config.json").read_text())["flags"]["max_len"]
        generator, times = np.random.default_rng(0), []
        for _ in range(flags.calls):
            chosen = generator.integers(0, len(serving.items), length - 1)
            history = [serving.items[row] for row in chosen]
            start, start_of_core = time.perf_counter(), time.process_time()
            serving.recommend([history], flags.k)
            spent = time.perf_counter() - start, time.process_time() - start_of_core
            times.append([1e3 * each for each in spent])
        (p50, core_p50), (p99, core_p99) = np.percentile(
            times[len(times) // 10 :], [50, 99], axis=0
        )
        print(
            f"{len(serving.items):,} items, width {serving.vectors.shape[1]}, length {length}, ",
            end="",
        )
        print(f"top {flags.k}: p50 {p50:.2f} ms, p99 {p99:.2f} ms; ", end="")
        print(f"of the core's time: p50 {core_p50:.2f} ms, p99 {core_p99:.2f} ms")


if __name__ == "__main__":
    main()
