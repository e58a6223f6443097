"""The benchmarks: valid rows, figures and tables by hand, one measured row."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks import (
    agreement,
    checkpoint,
    data,
    evaluation,
    negatives,
    quality,
    recommend,
    rows,
    startup,
    throughput,
)
from benchmarks.limits import least_ms
from benchmarks.rows import ROWS, SETS, Row
from model.distributed import Ranks
from model.run.script import Stages
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from model.settings.recipes import with_recipe
from tests.conftest import ROOT, TINY, RunMain, losses_of, run_process
from tests.test_profile import event


@pytest.mark.parametrize("name", ROWS)
def test_train_py_accepts_the_flags_of_every_row(name: str) -> None:
    row = ROWS[name]
    for mode in row.modes:
        given = FlagParser("", RunConfig).given(row.train_flags(mode))
        flags = with_recipe(given)
        assert (flags["mode"], flags["train_batch_size"]) == (mode, row.batch)
        assert flags.get("max_steps", 0) == row.steps
        assert FlagParser("", RunConfig).parse(row.train_flags(mode)).sharding.mode == mode


def test_sets_contain_existing_rows() -> None:
    assert {row.name for rows_ in SETS.values() for row in rows_} == ROWS.keys()


@pytest.mark.parametrize(
    ("flags", "at_least"),
    [
        (rows._EXAMPLE, 499_900),
        (rows._TEN_MILLION, 10_000_000),
        (rows._HUNDRED_MILLION, 100_000_000),
        (rows._MILLION_10K_USERS, 1_000_000),
    ],
)
def test_catalogs_are_as_large_as_the_table_says(flags: tuple[str, ...], at_least: int) -> None:
    values = dict(flag.removeprefix("--").split("=") for flag in flags)
    ids, ratings = int(values["random_item_count"]), int(values["random_size"])
    assert at_least <= ids * (1 - math.exp(-ratings / ids)) < 1.005 * at_least


def line(rate: float, step_ms: float, wait_ms: float, peak: float = 1.0) -> dict[str, Any]:
    return {
        "event": "train",
        "loss": 1.0,
        "records_per_second": rate,
        "step_ms": step_ms,
        "data_wait_ms": wait_ms,
        "peak_memory_gb": peak,
    }


def test_the_first_third_is_warm_up() -> None:
    lines = [line(1, 90, 50), line(2, 80, 40), line(30, 4, 0.5), line(10, 8, 0.1)]
    lines += [{"event": "validation", "seconds": 1.0}, line(20, 5, 0.2, 2.5)]
    # Five intervals: the first two do not count.
    assert throughput._steady(lines) == {
        "records_per_second": 20,
        "step_ms": 5,
        "data_wait_ms": 0.2,
        "waited": 0.04,
        "peak_memory_gb": 2.5,
        "intervals": [1, 2, 30, 10, 20],
    }


def test_the_first_evaluation_does_not_count() -> None:
    lines: list[dict[str, Any]] = [line(1, 1, 0)]
    lines += [{"event": "validation", "seconds": s} for s in (9.0, 0.4, 0.2, 0.3)]
    assert throughput._evaluations(lines) == {
        "evaluation_seconds": 0.3,
        "first_evaluation_seconds": 9.0,
        "peak_memory_gb": 1.0,
    }


def result(row: str, ranks: int, mode: str, **found: Any) -> dict[str, Any]:
    return {"row": row, "device": "cuda", "ranks": ranks, "mode": mode, "more": [], **found}


def speed(rate: float) -> dict[str, float]:
    found = {"records_per_second": rate, "step_ms": 2.5, "waited": 0.012, "peak_memory_gb": 2.2}
    return found | {"items": 600_000}


def test_the_table_has_the_columns_of_the_example() -> None:
    results = [
        result("exact-128", 1, "ddp", **speed(20_000)),
        result("exact-128", 1, "dmp", **speed(36_000)),
        result("exact-128", 4, "ddp", failed="out of memory"),
        result("exact-128", 4, "dmp", **speed(90_000)),
        result("eval-1m", 1, "dmp", evaluation_seconds=1.5, peak_memory_gb=3.25),
    ]
    header, _, one, four, _, evaluation, _, last, _ = throughput.table(results).split("\n")
    assert header.startswith("| | ranks | local batch | global batch | DDP rec/s | DMP rec/s | imp")
    assert one == (
        "| exact-128: 500k items, exact | 1 | 128 | 128 | 20,000 | 36,000 | +80.0% | 1.20 x 30,000 "
        "| 2.50 | 1.02 | 2.20 (goal 3) | 1.2% |"
    )
    assert four == (
        "| exact-128: 500k items, exact | 4 | 128 | 512 | failed: out of memory | 90,000 | - | - "
        "| 2.50 | 1.02 | 2.20 | 1.2% |"
    )
    assert evaluation == "| | ranks | DDP s | DMP s | goal s | peak GB |"
    assert last == "| eval-1m: evaluate 1M items | 1 | - | 1.500 | 2 | 3.25 |"


def test_the_least_time_by_hand() -> None:
    # 600,000 rows of 128 numbers, 40 bytes moved for each: 3.072 GB at 3 TB/s.
    assert least_ms(ROWS["exact-128"], 600_000) == pytest.approx(1.024)
    # 16,384 positions, 3,277 masked. The encoder: 2 x 16,384 x (24 x 128^2 + 4 x 16 x 128)
    # = 13.15 G; the head: 2 x 3,276.8 x 500,000 x 128 = 419.43 G; three times both over 790 T.
    assert least_ms(ROWS["exact-1024"], 500_000) == pytest.approx(1.6427, rel=1e-4)
    # 16,384 + 3,277 + 4,096 rows of 5,120 bytes take 0.041 ms, less than 3 x (13.15 + 3.44) G.
    assert least_ms(ROWS["sampled-1024"], 500_000) == pytest.approx(0.0630, rel=1e-3)


@pytest.mark.parametrize(
    ("errors", "code", "why"),
    [
        ("bar\rbar\ntrain.py: --lr is bad\nTraceback\nChildFailedError: x\n", 1, "--lr is bad"),
        ("...\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", 1, "out of memory"),
        ("  File x\nValueError: no\n[rank0]: again\n", 1, "ValueError: no"),
        ("", 9, "exit code 9"),
        ("half a l", -9, "took too long"),
    ],
)
def test_reason_of_a_failed_run(errors: str, code: int, why: str) -> None:
    assert throughput._why(errors, code) == why


def test_a_row_measured_through_train_py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ROWS, "tiny", Row("tiny", "60 users", TINY, 32, 12, modes=("dmp",)))
    monkeypatch.setattr(throughput.tempfile, "gettempdir", lambda: str(tmp_path))
    out, earlier = tmp_path / "out.json", {"row": "tiny", "ranks": 1, "mode": "dmp", "more": []}
    out.write_text(json.dumps([{**earlier, "device": "cuda"}, {**earlier, "device": "cpu"}]))
    arguments = ["--rows", "tiny", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    throughput.main()

    kept, found = json.loads(out.read_text())  # the row of another device stays
    assert kept == {**earlier, "device": "cuda"}
    assert "failed" not in found
    assert found["items"] == 80 and found["batch"] == 32
    assert found["command"].startswith("train.py --recipe=none") and "/" not in found["command"]
    assert len(found["intervals"]) >= 12 and found["records_per_second"] > 0
    assert 0 <= found["waited"] < 1 and 0.1 < found["peak_memory_gb"] < 10
    assert f"| tiny: 60 users | 1 | 32 | 32 | - | {found['records_per_second']:,.0f} |" in (
        capsys.readouterr().out
    )
    assert not list((tmp_path / "bert4rec-throughput").glob("run"))


@pytest.mark.slow
def test_the_plain_loop_equals_the_pipeline(tmp_path: Path, cache_dir: Path) -> None:
    losses = []
    for script in ("train.py", "benchmarks/plain_loop.py"):
        run_dir = tmp_path / Path(script).stem
        flags = [*TINY, "--max_steps=7", f"--cache_dir={cache_dir}", f"--run_dir={run_dir}"]
        outcome = run_process(ROOT / script, *flags)
        assert outcome.code == 0, outcome.err
        losses.append(losses_of(run_dir))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7


@pytest.mark.parametrize(("rank", "gpu"), [(0, 0), (3, 0), (4, 1), (7, 1)])
def test_ranks_that_share_gpus(rank: int, gpu: int) -> None:
    show = "import os; print(*map(os.environ.get, ['CUDA_VISIBLE_DEVICES', 'LOCAL_RANK']))"
    given = {
        "GPUS": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "8",
        "PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "benchmarks/shared_gpus.sh"), "-c", show]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{gpu} 0\n"), done.stderr


def test_a_row_without_the_pipeline_is_kept_beside_the_pipeline_row() -> None:
    results = [
        result("exact-128", 2, "dmp", loop=loop, **speed(rate))
        for loop, rate in (("pipelined", 90_000), ("plain", 60_000))
    ]
    _, _, one, other, *_ = throughput.table(results).split("\n")
    assert one.startswith("| exact-128: 500k items, exact | 2 | 128 | 256 | - | 90,000 |")
    assert other.startswith("| exact-128: 500k items, exact, no pipeline | 2 | 128 | 256 | - | 60,")


def test_data_measures_and_keeps_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)  # of this process
    monkeypatch.setattr(data, "_loading_lines", lambda ratings, seconds: [{"ratings": ratings}])
    out = tmp_path / "data.json"
    for only in ("preparation", "loader"):
        arguments = ["--ratings", "3000", "--folder", tmp_path, "--out", out, "--only", only]
        arguments += ["--format", "parquet", "--order", "time", "--memory_gb", "1e-4"]
        arguments += ["--ways", "memory", "spilled"]
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        data.main()
    found = json.loads(out.read_text())
    assert found["loader"]["rows"] == [{"ratings": 3000}]
    prepared = found["preparation"]["ratings-3000-by-time.parquet"]
    assert prepared["ratings"] == 3000
    of_memory, spilled = prepared["rows"]
    assert (of_memory["way"], spilled["way"]) == ("memory", "spilled")
    assert of_memory["kept"] == spilled["kept"]
    # 138,493 users of 20 million ratings are 20 of 3,000.
    assert "3,000 ratings            20 users" in of_memory["kept"]
    assert 0.05 < of_memory["peak_gib"] < 10 and of_memory["cpu_seconds"] > 0
    assert f"| spilled | {spilled['seconds']:.1f} | " in capsys.readouterr().out

    row = data.loading(length=8, batch=16, num_ratings=1000, seconds=0.05)
    assert row["sequences_per_second"] > 0 and row["sequences_per_cpu_second"] > 0
    # Each of 8 positions is masked with probability 0.2, in 5 % of the rows only the last.
    share = row["masked_per_second"] / row["sequences_per_second"]
    assert share == pytest.approx(0.95 * (8 * 0.2 + 0.8**8) + 0.05, rel=0.1)


def scores_of(value: float) -> dict[str, Any]:
    """Metrics of one run, all of them ``value``."""
    names = {name: value for names in quality.SHOWN.values() for name in names}
    return {"sampled": names, "full": names, "popularity": {"sampled": names, "full": names}}


def test_the_quality_table_by_hand() -> None:
    discounted = [scores_of(value) | {"popularity_discount": 0.3} for value in (0.5, 0.7)]
    results = [
        {"test": scores_of(value), "discounted": other}
        for value, other in zip((0.2, 0.4), discounted, strict=True)
    ]
    teachers = [{"test": scores_of(value)} for value in (0.1, 0.1, 0.1)]
    lines = quality.table("beauty", results, teachers).splitlines()
    *_, popularity, teaching, ours, lowered = lines
    assert teaching == "| the teachers, 3 seeds |" + " 0.1000 ± 0.0000 |" * 7
    assert popularity == "| popularity |" + " 0.2000 |" * 7
    # Standard deviation of two values: their difference over the root of 2.
    assert ours == "| **this project**, 2 seeds |" + " 0.3000 ± 0.1414 |" * 7
    label = "the same models, --popularity_discount 0.3, 2 seeds"
    assert lowered == f"| {label} |" + " 0.6000 ± 0.1414 |" * 7
    assert len(quality.table("beauty", results).splitlines()) == len(lines) - 1


def test_the_recorded_command_has_no_folders() -> None:
    typed = ["ml-1m", "--dataset_path", "/data/ml-1m.zip", "--jobs", "8", "--cache_dir=/tmp/cache"]
    assert quality.command(typed) == (
        "python benchmarks/quality.py ml-1m --dataset_path ml-1m.zip --jobs 8 --cache_dir=cache"
    )


def test_jobs_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    scripts, log = quality.Scripts(), tmp_path / "log"
    scripts.run("said.py", log)
    with scripts._on_a_gpu():
        scripts.run("said.py", log)
    scripts.run("said.py", log)
    assert log.read_text().split() == ["2", "5", "2"]


def test_ranks_that_fit_the_gpus_run_at_once() -> None:
    one, two, four = (agreement.Job("train.py", ranks, Path(str(ranks))) for ranks in (1, 2, 4))
    assert agreement.rounds([one, two, four, two, two], 4) == [[one, two], [four], [two, two]]
    assert agreement.rounds([one, two], 0) == [[one], [two]]  # CPU


def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["agreement.py"])
    with pytest.raises(SystemExit) as ended:
        agreement.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--ranks 4 needs as many GPUs, not 2: give fewer, or --device cpu")


@pytest.mark.parametrize(
    ("found", "shown", "verdict"),
    [
        ({"step 1": 2.0, "step 2": 1.00009}, "9.0e-05 (step 2)", "PASS"),
        ({"step 1": 2.00011, "step 2": 1.0}, "1.1e-04 (step 1)", "FAIL"),
        ({"step 1": 2.0}, "inf (step 2)", "FAIL"),
        ({"step 1": 2.0, "step 2": 1.0, "step 3": 1.0}, "inf (step 3)", "FAIL"),
        ({"step 1": 2.0, "step 2": math.nan}, "inf (step 2)", "FAIL"),
    ],
)
def test_agreement_by_hand(found: dict[str, float], shown: str, verdict: str) -> None:
    line = agreement.compared("losses", 2, found, {"step 1": 2.0, "step 2": 1.0})
    *_, difference, passed = [cell.strip() for cell in line.strip("|").split("|")]
    assert (difference, passed) == (shown, verdict)


def test_the_cost_of_a_checkpoint_is_measured(one_rank: Ranks, tmp_path: Path) -> None:
    line = checkpoint.row(50, ["--emb_dim=16", "--num_layers=1"], one_rank, tmp_path / "run")
    items, width, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
    assert (items, width) == ("50", "16")
    size, still, written, waited = (int(number) for number in numbers)
    assert size == 0 and still <= written and waited >= 0


def test_the_time_of_an_evaluation_by_hand() -> None:
    host = [
        event("aten::mm", 0, 3000, DeviceType.CPU),
        event("aten::add", 3000, 4000, DeviceType.CPU),
        event("aten::copy_", 3200, 3400, DeviceType.CPU, parent=object()),
        event("cudaLaunchKernel", 3500, 3600, DeviceType.CPU),
    ]
    shown = evaluation.table(host, 1.5)
    assert shown.startswith("under the profiler 1.500 s, 2 operations\n| ms | calls | |\n")
    assert "| 3.00 | 1 | aten::mm |" in shown
    kernels = [event("gemm", start, start + 2000, DeviceType.CUDA) for start in (0, 1000, 9000)]
    shown = evaluation.table(host + kernels, 1.5)
    assert "2 operations, 3 kernels and copies, the GPU busy for 0.005 s" in shown
    assert shown.endswith("| 6.00 | 3 | gemm |")


def test_an_evaluation_is_profiled(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"
    assert run_main("train", *TINY, *folders, "--num_epochs=1").code == 0
    outcome = run_main("benchmarks.evaluation", f"--checkpoint={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "1 rank on cpu" in outcome.out
    assert "aten::" in outcome.out


def test_recommending_is_measured_and_compared_with_a_sort(
    one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = recommend.Row(users=80, items=300, length=6, width=16, k=7)
    monkeypatch.setitem(recommend.ROWS, "tiny", sizes)
    found = recommend.measure("tiny", 0.5, one_rank, tmp_path, batch_size=16, profiled=True)
    assert found["measured_users"] == 40 and found["same_as_sorted"] == 1
    assert found["seconds_for_all"] == pytest.approx(2 * found["seconds"])
    stages = found["profile"]["seconds_of_stages"]
    assert stages and stages.keys() <= {*recommend.STAGES.values(), "other"}
    assert found["table_seconds"] > 0


def test_stages_are_functions_that_exist() -> None:
    for path, name in recommend.STAGES:
        files = [each for room in ("pipeline", "model") for each in (ROOT / room).rglob("*.py")]
        (file,) = (each for each in files if each.as_posix().endswith(path))
        assert f"def {name}(" in file.read_text(), f"{path} has no {name}"


@pytest.mark.parametrize("kind", ["geometric", "zipf"])
def test_tables_of_negatives_are_measured(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert negatives.counts("zipf", 3).tolist() == [3, 1, 1]
    monkeypatch.setattr(sys, "argv", ["negatives.py", "--num_items=1000", f"--counts={kind}"])
    negatives.main()
    out = capsys.readouterr().out
    assert out.startswith("1,000 items: ") and "GiB beside the counts" in out


def test_points_of_a_start() -> None:
    line = "before training: imports 4.000 s, ranks 0.500 s, data 1.000 s, loader 0.250 s, "
    stages = Stages.parse(line + "vectors 0.500 s, model 1.500 s, log 0.250 s\n")
    steps = [
        {"event": "train", "time": 112.5, "step": 1},
        {"event": "validation", "time": 113.0, "step": 1},
        {"event": "train", "time": 114.0, "step": 2},
    ]
    assert startup.points(stages, 110.0, steps, started=101.5) == {
        "imports done": 4.5,
        "process group ready": 5.0,
        "data ready": 6.0,
        "loader ready": 6.25,
        "first item vectors made": 6.75,
        "model built": 8.25,
        "training starts": 8.5,
        "step 1 done": 11.0,
        "step 2 done": 12.5,
    }


def test_a_start_is_measured(tmp_path: Path) -> None:
    run = startup.measure([*TINY], tmp_path)
    times = [value for name, value in run.items() if not name.startswith("kernels")]
    assert list(run)[7:11] == ["step 1 done", "step 2 done", "step 3 done", "ended"]
    assert times[0] > 0 and times == sorted(times)
    lines = startup.table({"empty caches": run, "full caches": run}).splitlines()
    assert lines[0] == "| | empty caches | full caches |"
    since = run["step 1 done"] - run["loader ready"]
    assert lines[-2] == f"| from loader ready to step 1 done | {since:.2f} | {since:.2f} |"
