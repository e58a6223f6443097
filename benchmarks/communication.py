"""Count the bytes that DDP and DMP send in a training step, and model the step on several GPUs.

    python benchmarks/communication.py                            500k items, 2 and 4 ranks on CPU
    python benchmarks/communication.py --ranks 2 4 8 --ways ddp row_wise
    python benchmarks/communication.py --show --latency_us 15     kept counts, another machine
    python benchmarks/communication.py -- --loss=sampled_softmax --train_negatives=4096

Bytes do not depend on the hardware: benchmarks/collectives.py counts every collective of real
training steps over gloo. The second table models the step on GPUs:

    communication = calls x latency + bytes of the busiest rank / (bandwidth x efficiency)
    compute       = step of one GPU, minus the passes over the rows that other ranks hold (row-wise)
    step          between max(compute, communication), with full overlap, and their sum, with none

Bytes grow linearly with the batch: two batch sizes are counted, others are interpolated. The step
of one GPU comes from ``--compute_ms`` or from results of benchmarks/throughput.py (rows exact-8,
exact-128, exact-1024 or sampled-... of ``--throughput``, in the same mode). With the exact softmax
one GPU passes over the whole table, in the time that benchmarks/limits.py gives, and each of N GPUs
over one N-th. The model leaves out the host's work, such as DDP's hooks and TorchRec's exchange for
table-wise and column-wise sharding. That work dominates short steps.

The defaults are assumptions: bandwidth of one direction of an H100's NVLink (900 GB/s both), the
efficiency that NCCL's own tests usually reach, and the latency of a small collective among 8 GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.limits import table_ms
from benchmarks.machine import ROOT, commit
from model.run.config_file import versions

WAYS = {
    "ddp": ("--mode=ddp",),
    "row_wise": ("--mode=dmp", "--sharding=row_wise"),
    "table_wise": ("--mode=dmp", "--sharding=table_wise"),
    "column_wise": ("--mode=dmp", "--sharding=column_wise"),
}
_DATA = (
    "--dataset_name=random",
    "--random_user_count=3000",
    "--random_size=8000000",
    "--mask_prob=0.2",
    "--max_len=16",
)
MODELLED = (8, 128, 1024)
Count = dict[str, Any]


def count(ranks: int, options: argparse.Namespace) -> list[Count]:
    """Run benchmarks/collectives.py on ``ranks`` processes, for each way and batch size."""
    jobs = [(way, batch) for batch in options.batches for way in options.ways]
    data = [*_DATA, *([f"--cache_dir={options.cache_dir}"] if options.cache_dir else [])]
    flags = [
        [*data, *WAYS[way], f"--train_batch_size={batch}", *options.flags] for way, batch in jobs
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps(flags))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "-m", "benchmarks.collectives"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, str(file), str(options.steps)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if "Error" in line]
            raise SystemExit("\n".join([f"counting at {ranks} ranks failed:", *why[:20]]))
        found = json.loads(file.read_text())
    facts = {"versions": versions(), "commit": commit()}
    return [
        {"way": way, "ranks": ranks, "batch": batch, "flags": options.flags, **facts, **counted}
        for (way, batch), counted in zip(jobs, found, strict=True)
    ]


def identity(count: Count) -> tuple[Any, ...]:
    """Key of a count: way, ranks, batch, and flags, which hold the size of the table."""
    return (count["way"], count["ranks"], count["batch"], *count["flags"])


def counts_table(counts: list[Count]) -> str:
    """Markdown: bytes per step and rank, by collective, and the ratio of DDP's bytes to them."""
    kinds = sorted({kind for each in counts for kind in each["collectives"]})
    lines = ["| ranks | local batch | | " + " | ".join(kinds) + " | all | busiest | DDP : it |"]
    lines.append("|---" * (len(kinds) + 6) + "|")
    for each in sorted(counts, key=lambda c: (c["ranks"], c["batch"])):
        found = [each["collectives"].get(kind) for kind in kinds]
        cells = [f"{size(e['mean'])} ({e['calls']:g})" if e else "" for e in found]
        own, ddp = total(each, "mean"), at_batch(counts, "ddp", each["ranks"], each["batch"])
        ratio = f"{ddp[1] / own:,.1f}" if ddp else "-"
        cells += [size(own), size(total(each, "most")), ratio]
        lead = [str(each["ranks"]), str(each["batch"]), each["way"]]
        lines.append("| " + " | ".join([*lead, *cells]) + " |")
    return "\n".join(lines)


def total(count: Count, which: str) -> float:
    """Bytes of all collectives: "mean" over the ranks, or "most", those of the busiest rank."""
    return sum(entry[which] for entry in count["collectives"].values())


def size(count: float) -> str:
    """Bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def at_batch(counts: list[Count], way: str, ranks: int, batch: int) -> tuple[float, float] | None:
    """(Calls, bytes of the busiest rank) per step, on the line through the counted batch sizes.

    DDP sends only all-reduces: its bytes at other numbers of ranks follow from those counted.
    """
    found = [c for c in counts if (c["way"], c["ranks"]) == (way, ranks)]
    if way == "ddp" and not found:
        counted = min((c["ranks"] for c in counts if c["way"] == way), default=ranks)
        if counted == ranks or (sends := at_batch(counts, way, counted, batch)) is None:
            return None
        return sends[0], sends[1] * (1 - 1 / ranks) / (1 - 1 / counted)
    found.sort(key=lambda c: abs(c["batch"] - batch))
    if len(found) < 2 and [c["batch"] for c in found] != [batch]:
        return None
    nearest, farthest = found[0], found[-1]
    calls = sum(entry["calls"] for entry in nearest["collectives"].values())
    sent = total(nearest, "most")
    if batch != nearest["batch"]:
        slope = (total(farthest, "most") - sent) / (farthest["batch"] - nearest["batch"])
        sent += slope * (batch - nearest["batch"])
    return calls, sent


def model_table(counts: list[Count], options: argparse.Namespace) -> str:
    """Markdown: modelled step times and records/s on GPUs, DMP beside DDP."""
    lines = [
        "| GPUs | local batch | | communication ms | compute ms | step ms | rec/s | over DDP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ways = [way for way in WAYS if any(c["way"] == way for c in counts)]  # DDP first
    for ranks in sorted({c["ranks"] for c in counts}):
        for batch in MODELLED:
            bounds: dict[str, tuple[float, float]] = {}
            for way in ways:
                compute = compute_at(way, ranks, batch, options)
                sends = at_batch(counts, way, ranks, batch)
                if sends is None:
                    continue
                spent = communication_ms(*sends, options)
                cells = [str(ranks), str(batch), way, f"{spent:.2f}", "-", "-", "-", "-"]
                if compute is not None:
                    bounds[way] = (max(compute, spent), compute + spent)
                    cells[4:7] = _bounds(compute, bounds[way], batch * ranks)
                    cells[7] = _gain(bounds, way)
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def communication_ms(calls: float, sent: float, options: argparse.Namespace) -> float:
    """Milliseconds of ``calls`` collectives in which the busiest rank sends ``sent`` bytes."""
    return calls * options.latency_us / 1e3 + sent / (options.bandwidth * options.efficiency * 1e6)


def compute_at(way: str, ranks: int, batch: int, options: argparse.Namespace) -> float | None:
    """Milliseconds that each of ``ranks`` GPUs computes in a step; None: not known."""
    compute = options.compute.get(("ddp" if way == "ddp" else "dmp", batch))
    if compute is None or way != "row_wise" or _is_sampled(options.flags):
        return compute
    return compute - (1 - 1 / ranks) * table_ms(options.items, options.emb_dim)


def _is_sampled(flags: list[str]) -> bool:
    return any("sampled_softmax" in flag for flag in flags)


def _bounds(compute: float, step: tuple[float, float], records: int) -> list[str]:
    hidden, exposed = step
    rates = f"{1e3 * records / exposed:,.0f} ... {1e3 * records / hidden:,.0f}"
    return [f"{compute:.2f}", f"{hidden:.2f} ... {exposed:.2f}", rates]


def _gain(bounds: dict[str, tuple[float, float]], way: str) -> str:
    """Speed relative to DDP, with full overlap and with none."""
    if way == "ddp" or "ddp" not in bounds:
        return "-"
    gains = sorted(ddp / own for ddp, own in zip(bounds["ddp"], bounds[way], strict=True))
    return " ... ".join(f"{gain:.2f}" for gain in gains)


def compute_ms(options: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Milliseconds of a step on one GPU, by (mode, local batch)."""
    found = {}
    if options.throughput and options.throughput.exists():
        for result in json.loads(options.throughput.read_text()):
            loss = "sampled-" if _is_sampled(options.flags) else "exact-"
            plain = result["row"].startswith(loss) and not result["more"]
            if plain and result["ranks"] == 1 and "step_ms" in result:
                found[result["mode"], result["batch"]] = result["step_ms"]
    for given in options.compute_ms:
        where, _, value = given.partition("=")
        mode, _, batch = where.partition(":")
        found[mode, int(batch)] = float(value)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--steps", type=int, default=3, help="steps to count after the warm-up")
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--emb_dim", type=int, default=128)
    parser.add_argument("--cache_dir", help="prepared data; default: as train.py")
    parser.add_argument("--bandwidth", type=float, default=450.0, help="GB/s a GPU can send")
    parser.add_argument(
        "--efficiency", type=float, default=0.8, help="reached share of the bandwidth"
    )
    parser.add_argument("--latency_us", type=float, default=20.0, help="latency of a collective")
    parser.add_argument("--throughput", type=Path, default=results / "throughput-cuda.json")
    parser.add_argument(
        "--compute_ms",
        nargs="+",
        default=[],
        metavar="MODE:BATCH=MS",
        help="a step on one GPU, e.g. ddp:8=4.1 dmp:8=2.3",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results / "communication.json",
        help="file of counts; a new count replaces the earlier one",
    )
    parser.add_argument("--show", action="store_true", help="count nothing, print kept counts")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.flags = [f"--random_item_count={options.items}", f"--emb_dim={options.emb_dim}"]
    options.flags += given[cut + 1 :]
    options.compute = compute_ms(options)
    return options


def main() -> None:
    """Count, write the counts, print both tables."""
    options = _options()
    counts = json.loads(options.out.read_text()) if options.out.exists() else []
    for ranks in options.ranks if not options.show else ():
        new = count(ranks, options)
        again = {identity(each) for each in new}
        counts = [each for each in counts if identity(each) not in again] + new
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(counts, indent=1) + "\n")
    chosen = [each for each in counts if each["flags"] == options.flags]
    if not chosen:
        raise SystemExit(f"{options.out}: nothing counted with {' '.join(options.flags)}")
    print(f"{chosen[0]['items']:,} items; bytes a rank sends in a step (calls in brackets)\n")
    print(counts_table(chosen))
    print(
        f"\nmodelled: {options.bandwidth:g} GB/s x {options.efficiency:g}, "
        f"{options.latency_us:g} us a collective; all communication hidden ... none\n"
    )
    print(model_table(chosen, options))


if __name__ == "__main__":
    main()
