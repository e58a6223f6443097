"""Records/s of train.py as users run it: loader, transfer, step and logging.

    python benchmarks/throughput.py                                  the rows of this device, 1 rank
    python benchmarks/throughput.py --ranks 1 2 4 8 --rows gpus      DDP beside DMP as ranks grow
    python benchmarks/throughput.py --rows exact-8 10m-4096 --modes dmp
    python benchmarks/throughput.py --ranks 2 --rows exact-8 --plain       without train pipeline
    python benchmarks/throughput.py --rows ml-1m-256 --dataset_path ml-1m.zip -- --precision fp32
    python benchmarks/throughput.py --show benchmarks/results/throughput-cuda.json

Each cell is one run of train.py (through torchrun on several ranks), ended by ``--max_steps``. Its
figures are medians of metrics.jsonl over the last two thirds of the intervals. "least ms" is the
lower bound for an H100 by benchmarks/limits.py. benchmarks/rows.py lists the rows; flags after
``--`` go to train.py. A failed run becomes a row with its error. Results are kept in ``--out``; a
new result replaces the earlier one of the same row.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.limits import least_ms
from benchmarks.machine import ROOT, commit, processor
from benchmarks.rows import ROWS, SETS, Row
from model.run.config_file import versions

Result = dict[str, Any]
# A result replaces an earlier one that agrees with it in these fields.
KEY = ("row", "device", "ranks", "mode", "more", "loop")


def measure(row: Row, mode: str, ranks: int, options: argparse.Namespace) -> Result:
    """Figures of one run of train.py, or ``{"failed": reason}``."""
    run_dir = options.folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    flags = [*row.train_flags(mode), *options.more]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    script = "benchmarks/plain_loop.py" if options.plain else "train.py"
    command = [sys.executable, *(launch if ranks > 1 else ()), str(ROOT / script), *flags]
    folders = [f"--cache_dir={options.cache_dir}", f"--run_dir={run_dir}"]
    if row.needs_path:
        folders.append(f"--dataset_path={options.dataset_path.resolve()}")
    # One core per rank by default.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    started = time.perf_counter()
    code, errors = _run([*command, *folders], environment, options.timeout)
    found: Result = {"row": row.name, "device": options.device, "ranks": ranks, "mode": mode}
    found |= {"more": options.more, "seconds": round(time.perf_counter() - started, 1)}
    found |= {"command": " ".join([script, *flags]), "batch": row.batch} | options.facts
    found["loop"] = "plain" if options.plain else "pipelined"
    found["threads"] = environment["OMP_NUM_THREADS"]
    try:
        if code:
            return found | {"failed": _why(errors, code)}
        found["items"] = json.loads((run_dir / "config.json").read_text())["num_items"]
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return found | (_evaluations(lines) if row.evaluates else _steady(lines))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _run(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str]:
    """Exit code and stderr of a command, killed with its children after ``timeout`` seconds."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = -signal.SIGKILL
        errors.seek(0)
        return code, errors.read()


def _why(errors: str, code: int) -> str:
    """The line of stderr that best explains the failure."""
    lines = [line.strip() for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return "took too long"
    if "OutOfMemoryError" in errors:
        return "out of memory"
    own = [line.removeprefix("train.py: ") for line in lines if line.startswith("train.py: ")]
    raised = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
    return (own or raised or lines or [f"exit code {code}"])[-1 if not own else 0][:200]


def _steady(lines: list[Result]) -> Result:
    """Medians over the last two thirds of the intervals; ``waited`` is a share of the step."""
    intervals = [line for line in lines if "loss" in line]
    steady = intervals[-(-len(intervals) // 3) :] or intervals
    names = ("records_per_second", "step_ms", "data_wait_ms")
    found = {name: statistics.median(line[name] for line in steady) for name in names}
    return found | {
        "waited": found["data_wait_ms"] / found["step_ms"],
        "peak_memory_gb": max(line["peak_memory_gb"] for line in intervals),
        "intervals": [round(line["records_per_second"], 1) for line in intervals],
    }


def _evaluations(lines: list[Result]) -> Result:
    """Median of all evaluations except the first, which also draws the negatives."""
    first, *rest = (line["seconds"] for line in lines if line["event"] == "validation")
    peak = max(line["peak_memory_gb"] for line in lines if "loss" in line)
    return {
        "evaluation_seconds": statistics.median(rest),
        "first_evaluation_seconds": first,
        "peak_memory_gb": peak,
    }


def table(results: list[Result]) -> str:
    """Markdown: a table of training, with all columns of TorchRec's example, and of evaluation."""
    pairs: dict[tuple[Any, ...], dict[str, Result]] = {}
    for result in results:
        key = tuple(result.get(name, "pipelined") for name in KEY if name not in ("mode", "more"))
        key += tuple(result["more"])
        pairs.setdefault(key, {})[result["mode"]] = result
    training = [both for key, both in pairs.items() if not ROWS[key[0]].evaluates]
    evaluating = [both for key, both in pairs.items() if ROWS[key[0]].evaluates]
    lines = []
    if training:
        lines += [
            "| | ranks | local batch | global batch | DDP rec/s | DMP rec/s | improvement "
            "| of goal | step ms | least ms | peak GB | data wait |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *map(_training_line, training),
            "",
        ]
    if evaluating:
        lines += ["| | ranks | DDP s | DMP s | goal s | peak GB |", "|---|---|---|---|---|---|"]
        lines += [*map(_evaluation_line, evaluating), ""]
    return "\n".join(lines)


def _training_line(both: dict[str, Result]) -> str:
    shown = both.get("dmp") or both["ddp"]
    row, ranks = ROWS[shown["row"]], shown["ranks"]
    rates = [both.get(mode, {}).get("records_per_second") for mode in ("ddp", "dmp")]
    ddp, dmp = rates
    gain = f"{dmp / ddp - 1:+.1%}" if ddp and dmp else "-"
    best = shown.get("records_per_second")
    goal = "-"
    if row.goal and ranks == 1 and best:
        goal = f"{best / row.goal:.2f} x {row.goal:,.0f}"
    memory = _number(shown.get("peak_memory_gb"), ".2f")
    if row.memory_goal and ranks == 1:
        memory += f" (goal {row.memory_goal:g})"
    what = ", ".join([row.what, *shown["more"]])
    if shown.get("loop") == "plain":
        what += ", no pipeline"
    cells = [f"{row.name}: {what}", ranks, row.batch, row.batch * ranks]
    cells += [_cell(both.get(mode), "records_per_second", ",.0f") for mode in ("ddp", "dmp")]
    least = least_ms(row, shown["items"]) if shown["device"] == "cuda" and best else None
    cells += [gain, goal, _number(shown.get("step_ms"), ",.2f"), _number(least, ".2f"), memory]
    cells.append(_number(shown.get("waited"), ".1%"))
    return "| " + " | ".join(map(str, cells)) + " |"


def _evaluation_line(both: dict[str, Result]) -> str:
    shown = both.get("dmp") or both["ddp"]
    row = ROWS[shown["row"]]
    cells = [f"{row.name}: {row.what}", shown["ranks"]]
    cells += [_cell(both.get(mode), "evaluation_seconds", ".3f") for mode in ("ddp", "dmp")]
    cells += [_number(row.goal, "g"), _number(shown.get("peak_memory_gb"), ".2f")]
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(result: Result | None, name: str, form: str) -> str:
    if result is None:
        return "-"
    return f"failed: {result['failed']}" if "failed" in result else _number(result[name], form)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _keep(path: Path, result: Result) -> None:
    """Write the result into the file; it replaces an earlier one of the same row."""
    kept = json.loads(path.read_text()) if path.exists() else []
    key = [result[name] for name in KEY]
    kept = [each for each in kept if [each.get(name, "pipelined") for name in KEY] != key]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*kept, result], indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SETS, *ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1])
    parser.add_argument("--modes", nargs="+", choices=("ddp", "dmp"), default=["ddp", "dmp"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dataset_path", type=Path, help="ML-1M, for rows that use it")
    parser.add_argument("--cache_dir", type=Path, help="prepared data, kept between runs")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per run")
    parser.add_argument("--plain", action="store_true", help="without the train pipeline")
    parser.add_argument("--out", type=Path, help="file of results, added to")
    parser.add_argument("--show", type=Path, help="print the table of a file, measure nothing")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.more = given[cut + 1 :]
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.cache_dir = options.cache_dir or Path(tempfile.gettempdir()) / "bert4rec-throughput"
    options.out = options.out or ROOT / "benchmarks/results" / f"throughput-{options.device}.json"
    hardware = processor()
    if options.device == "cuda":
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; {hardware}"
    options.facts = {"hardware": hardware, "versions": versions(), "commit": commit()}
    return options


def main() -> None:
    """Run each row in each mode at each number of ranks; print the table."""
    options = _options()
    if options.show:
        results = json.loads(options.show.read_text())
        print(table(results))
        return
    chosen = options.rows or ["gpu" if options.device == "cuda" else "cpu"]
    rows = {row.name: row for name in chosen for row in SETS.get(name) or (ROWS[name],)}
    # A new folder, so that two benchmarks can run at once, each on a GPU.
    options.folder = Path(tempfile.mkdtemp(prefix="bert4rec-throughput-"))
    try:
        results = _measured(rows, options)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    print(
        f"{options.facts['hardware']}, {threads} threads a rank; commit {options.facts['commit']}; "
        f"{options.facts['versions']}\n"
    )
    print(table(results))


def _measured(rows: dict[str, Row], options: argparse.Namespace) -> list[Result]:
    """Measure every row in each mode at each number of ranks; write each result at once."""
    results = []
    for row in rows.values():
        if row.needs_path and options.dataset_path is None:
            print(f"{row.name}: left out, it needs --dataset_path", file=sys.stderr)
            continue
        for ranks in options.ranks:
            for mode in (mode for mode in options.modes if mode in row.modes):
                result = measure(row, mode, ranks, options)
                about = result.get("failed") or result.get("intervals") or "measured"
                print(f"{row.name}, {ranks} ranks, {mode}: {about}", file=sys.stderr, flush=True)
                _keep(options.out, result)
                results.append(result)
    return results


if __name__ == "__main__":
    main()
