"""Quality of the recipes: recipe x seeds through train.py, mean and deviation on the test split.

    python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip
    python benchmarks/quality.py beauty --dataset_path beauty.txt.gz --seeds 3 --jobs 3
    python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip --final

The model of each run is chosen on validation alone (full NDCG@10) by train.py. With --final the
recipe is trained on the validation items too, as in BERT4Rec's paper: then nothing is chosen, the
recipe's last model is tested. Every run is an ordinary run folder below --runs; the table and what
made it go to results/quality-<recipe>[-final].json. Further flags after ``--`` go to train.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def train(recipe: str, name: str, seed: int, runs: Path, more: list[str]) -> dict[str, Any]:
    """One run through the shipped script: its metrics, config and training seconds."""
    run_dir = runs / f"{name}-seed{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--dataset_name", recipe]
    command += ["--recipe", recipe, "--seed", str(seed), "--run_dir", str(run_dir), *more]
    with (runs / f"{name}-seed{seed}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run_dir / "config.json").read_text())
    training = [line for line in lines if "loss" in line]
    steps = [0, *(line["step"] for line in training)]
    milliseconds = sum(
        (step - before) * line["step_ms"]
        for before, step, line in zip(steps[:-1], steps[1:], training, strict=True)
    )
    for flag in ("dataset_path", "run_dir", "cache_dir"):  # where things lay says nothing
        config["flags"][flag] = Path(config["flags"][flag]).name
    return {
        "seed": seed,
        "test": json.loads((run_dir / "eval_test.json").read_text()),
        "config": {key: value for key, value in config.items() if key != "command"},
        "steps": lines[-1]["step"],
        "training_seconds": milliseconds / 1000,
        "records_per_second": statistics.median(line["records_per_second"] for line in training),
    }


def table(recipe: str, results: list[dict[str, Any]]) -> str:
    """Markdown: anchors, popularity, and mean ± standard deviation over the seeds."""
    columns = [(protocol, name) for protocol, names in SHOWN.items() for name in names]
    lines = ["| | " + " | ".join(f"{p} {n}" for p, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, row in ANCHORS.get(recipe, {}).items():
        cells = ("-" if value is None else f"{value:.4f}" for value in row)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    popularity = results[0]["test"]["popularity"]
    cells = (f"{popularity[protocol][name]:.4f}" for protocol, name in columns)
    lines.append("| popularity | " + " | ".join(cells) + " |")
    cells = []
    for protocol, name in columns:
        values = [result["test"][protocol][name] for result in results]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}")
    lines.append(f"| **this project**, {len(results)} seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _without_folder(flags: list[str]) -> list[str]:
    """The flags but ``--cache_dir``: where prepared data lay says nothing."""
    kept = [flag for flag in flags if not flag.startswith("--cache_dir=")]
    if "--cache_dir" in kept:
        at = kept.index("--cache_dir")
        del kept[at : at + 2]
    return kept


def main() -> None:
    """Run, collect, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--dataset_path", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--final", action="store_true", help="train on validation items too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, more = parser.parse_known_args()
    more = [flag for flag in more if flag != "--"]
    shown = _without_folder(more)
    if arguments.dataset_path:
        shown += ["--dataset_path", Path(arguments.dataset_path).name]
        more += ["--dataset_path", str(Path(arguments.dataset_path).resolve())]
    name = arguments.recipe
    if arguments.final:
        name += "-final"
        more += ["--train_on_validation", "true"]
    runs = arguments.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tasks = [
            pool.submit(train, arguments.recipe, name, seed, runs, more)
            for seed in range(arguments.seeds)
        ]
        results = [task.result() for task in tasks]
    record = {
        "recipe": arguments.recipe,
        "final": arguments.final,
        "flags": shown,
        "jobs": arguments.jobs,
        "commit": commit(),
        "versions": results[0]["config"]["versions"],
        "runs": results,
    }
    path = arguments.out / f"quality-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(arguments.recipe, results))
    print(f"{path}: commit {record['commit']}, {record['versions']}")


if __name__ == "__main__":
    main()
