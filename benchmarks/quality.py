"""Quality on a data set: several seeds through train.py, mean and deviation on the test split.

    python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip
    python benchmarks/quality.py beauty --dataset_path beauty.txt.gz --seeds 3 --jobs 3
    python benchmarks/quality.py yelp --dataset_path yelp.csv.gz -- --emb_dim 512
    python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip --final
    python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip --teachers 3 --discount 0.3 --jobs 4

train.py chooses each run's model on validation alone (full NDCG@10).

    --final        train on the validation items too, as BERT4Rec's paper does; test the last model
    --teachers N   first train N models from other seeds; the measured models learn from them
                   (``train.py --teachers``). With --seeds 0, train the teachers only
    --discount     test the same models a second time, with ``eval.py --popularity_discount``

Each run is an ordinary run folder below --runs. Results are written to
results/quality-<data>[-final][-taught].json. Flags after ``--`` go to train.py. Jobs are spread
over the GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit

SHOWN = {
    "sampled": ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10"),
    "full": ("HR@10", "NDCG@10"),
}
# Published figures, leave-one-out: sampled HR@1 / 5 / 10, NDCG@5 / 10, full HR@10 / NDCG@10.
ANCHORS: dict[str, dict[str, tuple[float | None, ...]]] = {
    "ml-1m": {
        "BERT4Rec paper (arXiv 1904.06690)": (0.2863, 0.5876, 0.6970, 0.4454, 0.4818, None, None),
        "TorchRec examples/bert4rec": (0.2636, 0.5895, 0.7078, 0.4356, 0.4740, None, None),
        "RecTools BERT4Rec": (None, None, 0.7151, None, 0.5020, 0.2921, 0.1618),
        "SASRec, 3000 negatives (antklen)": (None, None, None, None, None, 0.3159, 0.1857),
    },
    "beauty": {
        "BERT4Rec paper (arXiv 1904.06690)": (None, None, 0.3025, None, 0.1862, None, None),
        "RecTools BERT4Rec": (None, None, 0.2506, None, 0.1555, 0.0434, 0.0242),
        "RecTools SASRec": (None, None, 0.3062, None, 0.2012, 0.0595, 0.0359),
    },
}


# The first seed of the teachers.
FIRST_TEACHER = 1000


class Scripts:
    """Run train.py and eval.py as processes, each on the GPU with the fewest of them."""

    def __init__(self) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        self._running = dict.fromkeys(gpus, 0)
        self._lock = Lock()

    def run(self, script: str, log: Path, *flags: str) -> None:
        """Run a script to its end and append its output to ``log``.

        Raises:
            subprocess.CalledProcessError: the script failed; the log has its error.
        """
        with self._on_a_gpu() as environment, log.open("a") as file:
            subprocess.run(
                [sys.executable, str(ROOT / script), *flags],
                check=True,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | environment,
            )

    @contextmanager
    def _on_a_gpu(self) -> Iterator[dict[str, str]]:
        if not self._running:
            yield {}
            return
        with self._lock:
            gpu = min(self._running, key=lambda gpu: self._running[gpu])
            self._running[gpu] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            with self._lock:
                self._running[gpu] -= 1


def train(
    scripts: Scripts,
    data: str,
    name: str,
    seed: int,
    runs: Path,
    discount: float,
    more: list[str],
) -> dict[str, Any]:
    """Metrics, config and training seconds of one run of train.py."""
    run_dir, log = runs / f"{name}-seed{seed}", runs / f"{name}-seed{seed}.log"
    flags = ["--dataset_name", data, "--seed", str(seed)]
    # An interrupted benchmark continues its runs.
    scripts.run("train.py", log, *flags, "--run_dir", str(run_dir), "--resume", "auto", *more)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run_dir / "config.json").read_text())
    training = [line for line in lines if "loss" in line]
    steps = [0, *(line["step"] for line in training)]
    milliseconds = sum(
        (step - before) * line["step_ms"]
        for before, step, line in zip(steps[:-1], steps[1:], training, strict=True)
    )
    for flag in ("dataset_path", "run_dir", "cache_dir"):  # only names are worth keeping
        config["flags"][flag] = Path(config["flags"][flag]).name
    teachers = config["flags"]["teachers"].split(",")
    config["flags"]["teachers"] = ",".join(Path(teacher).name for teacher in teachers)
    found = {}
    if discount:
        flags = ["--checkpoint", str(run_dir), "--popularity_discount", str(discount)]
        scripts.run("eval.py", log, *flags)
        path = run_dir / f"eval_test-discount-{discount:g}.json"
        found["discounted"] = json.loads(path.read_text())
    return found | {
        "seed": seed,
        "test": json.loads((run_dir / "eval_test.json").read_text()),
        "config": {key: value for key, value in config.items() if key != "command"},
        "steps": lines[-1]["step"],
        "training_seconds": milliseconds / 1000,
        "records_per_second": statistics.median(line["records_per_second"] for line in training),
    }


def table(data: str, results: list[dict[str, Any]], teachers: Sequence[dict[str, Any]] = ()) -> str:
    """Markdown: anchors, popularity, and mean ± standard deviation over the seeds."""
    columns = [(protocol, name) for protocol, names in SHOWN.items() for name in names]
    lines = ["| | " + " | ".join(f"{p} {n}" for p, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, row in ANCHORS.get(data, {}).items():
        cells = ["-" if value is None else f"{value:.4f}" for value in row]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    popularity = results[0]["test"]["popularity"]
    cells = [f"{popularity[protocol][name]:.4f}" for protocol, name in columns]
    lines.append("| popularity | " + " | ".join(cells) + " |")
    rows = [("the teachers", [each["test"] for each in teachers])] if teachers else []
    rows.append(("**this project**", [result["test"] for result in results]))
    if "discounted" in results[0]:
        discount = results[0]["discounted"]["popularity_discount"]
        label = f"the same models, --popularity_discount {discount:g}"
        rows.append((label, [result["discounted"] for result in results]))
    for label, measured in rows:
        cells = []
        for protocol, name in columns:
            values = [each[protocol][name] for each in measured]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        lines.append(f"| {label}, {len(measured)} seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def command(arguments: list[str]) -> str:
    """The command line, with the last part of each path only."""
    shown = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        shown.append(flag + equals + Path(value).name if equals else Path(word).name)
    return " ".join(["python benchmarks/quality.py", *shown])


def main() -> None:
    """Run all seeds; print and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="name of the data set")
    parser.add_argument("--dataset_path", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--final", action="store_true", help="train on validation items too")
    parser.add_argument("--teachers", type=int, default=0, help="models to learn from")
    parser.add_argument(
        "--discount", type=float, default=0.0, help="popularity discount of a second test"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, more = parser.parse_known_args()
    more = [flag for flag in more if flag != "--"]
    if arguments.dataset_path:
        more += ["--dataset_path", str(Path(arguments.dataset_path).resolve())]
    name = arguments.data
    if arguments.final:
        name += "-final"
        more += ["--train_on_validation", "true"]
    runs = arguments.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    teachers = range(FIRST_TEACHER, FIRST_TEACHER + arguments.teachers)
    scripts = Scripts()
    with ThreadPoolExecutor(arguments.jobs) as pool:

        def trained(seeds: range, discount: float) -> list[dict[str, Any]]:
            tasks = [
                pool.submit(train, scripts, arguments.data, name, seed, runs, discount, more)
                for seed in seeds
            ]
            return [task.result() for task in tasks]

        taught_by = trained(teachers, 0)
        if teachers:
            folders = ",".join(str(runs / f"{name}-seed{seed}") for seed in teachers)
            name, more = f"{name}-taught", [*more, f"--teachers={folders}"]
        results = trained(range(arguments.seeds), arguments.discount)
    if not results:
        return
    record = {
        "data": arguments.data,
        "final": arguments.final,
        "teachers": taught_by,
        "command": command(sys.argv[1:]),
        "jobs": arguments.jobs,
        "commit": commit(),
        "versions": results[0]["config"]["versions"],
        "runs": results,
    }
    path = arguments.out / f"quality-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(arguments.data, results, taught_by))
    print(f"{path}: {record['command']}; commit {record['commit']}, {record['versions']}")


if __name__ == "__main__":
    main()
