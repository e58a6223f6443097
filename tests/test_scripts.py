"""The real commands: train, evaluate, export, resume, and their files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.board import tags
from model.board.examples import Examples
from model.checkpoints.checkpoints import Checkpoints, checkpoint_steps
from model.distributed import Ranks
from model.evaluation.metrics import METRICS
from model.programs.folder import PROGRAM_FILES
from model.run.trained import TrainedRun
from model.serving.recommender import Recommender
from model.settings.config import EvalFlags
from pipeline.preparation.prepare import prepare
from tests.conftest import (
    DATA,
    ROOT,
    TINY,
    RunMain,
    environment,
    needs_ml_100k,
    read_log,
    run_process,
    torchrun,
)

CLOCK = (
    "records_per_second",
    "step_ms",
    "data_wait_ms",
    "peak_memory_gb",
    "seconds",
    "time",
)


def without_clock(lines: Iterable[dict[str, float]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def read_result(run_dir: Path, split: str = "test") -> dict[str, Any]:
    return json.loads((run_dir / f"eval_{split}.json").read_text())


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """By tag and step, of the event files in a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def assert_events_are(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """The TensorBoard events of training and validation hold the same numbers as the lines."""
    found, expected = scalars(run_dir), {}
    for line in lines:
        if line["event"] == "train":
            values = tags.of_steps(line)
        else:
            values = tags.of_metrics(line) | {tags.SECONDS: line["seconds"]}
        expected |= {(tag, line["step"]): value for tag, value in values.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key


def config_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())


def assert_equal_results(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["users"] == expected["users"]
    for protocol in ("sampled", "full"):
        assert found[protocol] == pytest.approx(expected[protocol])
        assert found["popularity"][protocol] == pytest.approx(expected["popularity"][protocol])
    for name in ("step", "epoch", "ratings", "catalog", "protocol"):
        assert found[name] == expected[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    """A run by torchrun on two ranks: its folder, export, output and metrics."""
    folder = tmp_path_factory.mktemp("trained")
    outcome = torchrun(
        2,
        ROOT / "train.py",
        *TINY,
        "--train_batch_size=16",
        "--num-epochs=3",
        f"--cache_dir={cache_dir}",
        f"--run_dir={folder / 'run'}",
        f"--export_root={folder / 'export'}",
    )
    assert outcome.code == 0, outcome.err
    result = read_result(folder / "run")
    return {"run": folder / "run", "export": folder / "export", "outcome": outcome} | result


def test_output_of_a_run(trained: dict[str, Any]) -> None:
    out, err = trained["outcome"].out, trained["outcome"].err
    assert out.count("synthetic: what each stage kept") == 1  # by one rank
    assert out.count("best possible on test") == 1
    assert "2 ranks on cpu: item row_wise: looked up and updated by this project's" in out
    assert "tables adam" in out
    assert [line.split(":")[0] for line in out.splitlines() if "NDCG@10 full" in line] == [
        "epoch 1",
        "epoch 2",
        "epoch 3",
    ]
    report = out[out.index("test, 60 users\n") :].splitlines()
    _, header, sampled, width, _, full, _, _, best, *about, debiased, _, _, _, fewer = report[:15]
    assert header.split() == list(METRICS)
    bounds = trained["intervals"]["sampled"].values()
    assert width.split() == ["±", "(95", "%)", *(f"{(b - a) / 2:.4f}" for a, b in bounds)]
    lists, hits = trained["lists"], trained["debiased"]["HR@10"]
    assert about == [
        f"lists of 10: {lists['coverage@10']:.1%} of the catalog, mean popularity "
        f"{lists['popularity@10']:.1f}, novelty {lists['novelty@10']:.2f} bits"
    ]
    assert debiased.startswith(f"debiased of popularity: full HR@10 {hits:.4f}")
    for row, protocol in ((sampled, "sampled"), (full, "full")):
        assert row.startswith(f"{protocol} (")
        assert row.split()[-len(METRICS) :] == [f"{v:.4f}" for v in trained[protocol].values()]
    assert best.startswith("full, best possible on this data")
    # 80 items are no more than 100 negatives.
    assert fewer.startswith("60 of 60 users have fewer unseen items than --eval_negatives")

    assert err == ""  # no progress bar where stdout is no terminal, no messages of libraries
    lines = [
        line for line in out.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)
    ]
    logged = [line for line in read_log(trained["run"]) if "loss" in line]
    assert [re.sub(r", [\d,]+ rec/s, ETA \d+:\d\d:\d\d$", "", line[20:]) for line in lines] == [
        f"step {line['step']}/{len(logged)}, epoch {line['epoch']}, loss {line['loss']:.4f}, "
        f"lr {line['lr']:.3g}"
        for line in logged
    ]
    assert lines[-1].endswith("ETA 0:00:00")


def test_files_of_a_run(trained: dict[str, Any]) -> None:
    names = {path.name.split(".")[0] for path in trained["run"].iterdir()}
    wanted = {"catalog", "checkpoints", "config", "eval_test", "eval_validation", "events"}
    assert wanted | {"metrics"} <= names
    validation, test = (read_result(trained["run"], split) for split in ("validation", "test"))
    lines = [line for line in read_log(trained["run"]) if line["event"] == "validation"]
    best = max(lines, key=lambda line: line["full"]["NDCG@10"])
    assert validation["full"]["NDCG@10"] == pytest.approx(best["full"]["NDCG@10"])
    for result in (validation, test):
        assert (result["step"], result["epoch"]) == (best["step"], best["epoch"])
        assert result["protocol"] == config_of(trained["run"])["evaluation"]
        assert result["ratings"] == config_of(trained["run"])["ratings"]
    assert not list(trained["run"].rglob("*.part"))
    config = json.loads((trained["run"] / "config.json").read_text())
    assert config["num_items"] == 80
    assert config["flags"]["num_epochs"] == 3
    assert config["command"].startswith("train.py --recipe=none --synthetic")
    assert list(trained["run"].glob("checkpoints/step-*"))


def test_metrics_jsonl_and_the_event_file_agree(trained: dict[str, Any]) -> None:
    lines = read_log(trained["run"])
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) % 3 == 0
    assert sum(line["event"] == "validation" for line in lines) == 3
    assert_events_are(trained["run"], lines)
    result = scalars(trained["run"] / "results" / "eval_test")
    (value,) = (value for (tag, _), value in result.items() if tag == "1_quality/full_NDCG@10")
    assert value == pytest.approx(trained["full"]["NDCG@10"])


def test_tensorboard_shows_the_same_items_on_two_ranks_and_on_one(trained: dict[str, Any]) -> None:
    folder = trained["run"] / "results" / "eval_test"
    (step,) = {step for _, step in scalars(folder)}
    recommender = Recommender.load(trained["run"], "cpu")
    config = TrainedRun(EvalFlags(checkpoint=str(trained["run"]))).config
    store = prepare(config.data)
    popular = np.argsort(-store.train_item_counts[1:-1], kind="stable")
    found = np.loadtxt(folder / "vectors.tsv", delimiter="\t")
    np.testing.assert_allclose(found, recommender.item_vectors()[popular], atol=1e-4)

    events = EventAccumulator(str(trained["run"])).Reload().Tensors("examples/text_summary")
    (text,) = (e.tensor_proto.string_val[0].decode() for e in events if e.step == step)
    examples = Examples(recommender.model, store, config.windows.max_len, recommender.ranks)
    assert text == examples()


def test_eval_reproduces_trains_metrics_on_two_ranks_and_on_one(
    trained: dict[str, Any], run_main: RunMain, cache_dir: Path
) -> None:
    flags = ["--checkpoint", trained["run"], "--cache_dir", cache_dir]
    out = trained["outcome"].out
    printed = out[out.index("test, 60 users\n") :].splitlines()
    outcome = torchrun(2, ROOT / "eval.py", *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == printed
    assert_equal_results(read_result(trained["run"]), trained)
    for more in ([], ["--batch-size=7"]):
        outcome = run_main("eval", *flags, *more)
        assert outcome.code == 0, outcome.err
        assert outcome.out.splitlines() == printed
        assert_equal_results(read_result(trained["run"]), trained)


def test_eval_of_the_best_checkpoint_on_validation(
    trained: dict[str, Any], run_main: RunMain, cache_dir: Path
) -> None:
    run_main("eval", "--checkpoint", trained["run"], "--cache_dir", cache_dir, "--split=validation")
    lines = [line for line in read_log(trained["run"]) if line["event"] == "validation"]
    best = max(lines, key=lambda line: line["full"]["NDCG@10"])
    found = read_result(trained["run"], "validation")
    for protocol in ("sampled", "full"):
        for name in METRICS:
            assert found[protocol][name] == pytest.approx(best[protocol][name])


def test_a_result_names_the_checkpoint_that_was_loaded_though_a_better_one_follows(
    trained: dict[str, Any], tmp_path: Path, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained["run"], tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    loaded, better = checkpoint_steps(trained["run"])[-2:]
    best = iter([loaded, better])
    monkeypatch.setattr(Checkpoints, "best_step", lambda *_: next(best))
    run = TrainedRun(EvalFlags(checkpoint=str(tmp_path / "run")))
    run.model(one_rank)
    assert run.trained_to(one_rank)["step"] == loaded


def test_eval_with_a_popularity_discount(
    trained: dict[str, Any], run_main: RunMain, cache_dir: Path
) -> None:
    flags = ["--checkpoint", trained["run"], "--cache_dir", cache_dir]
    outcome = run_main("eval", *flags, "--popularity_discount=0.5")
    assert outcome.code == 0, outcome.err
    found = read_result(trained["run"], "test-discount-0.5")
    assert found["popularity_discount"] == 0.5
    popularity = trained["popularity"]["full"]
    assert found["popularity"]["full"] == pytest.approx(popularity)  # ranked as it was
    assert found["full"] != pytest.approx(trained["full"])
    assert_equal_results(read_result(trained["run"]), trained)  # the plain one is still there


def test_eval_of_the_exported_model(
    trained: dict[str, Any], run_main: RunMain, cache_dir: Path
) -> None:
    names = {path.name for path in trained["export"].iterdir()}
    own = {"catalog.parquet", "config.json", "model.safetensors", "checksums.json"}
    assert names == own | {*PROGRAM_FILES}
    outcome = run_main("eval", "--checkpoint", trained["export"], "--cache_dir", cache_dir)
    assert outcome.code == 0, outcome.err
    assert_equal_results(read_result(trained["export"]), trained)


def test_resuming_a_finished_run_only_tests_it_again(
    trained: dict[str, Any], run_main: RunMain, cache_dir: Path
) -> None:
    lines = read_log(trained["run"])
    outcome = run_main(
        "train",
        *TINY,
        "--num_epochs=3",
        f"--cache_dir={cache_dir}",
        f"--run_dir={trained['run']}",
        "--resume=auto",
    )
    assert outcome.code == 0, outcome.err
    assert "resumed from" in outcome.out
    assert outcome.out.splitlines()[-7:] == trained["outcome"].out.splitlines()[-7:]
    assert read_log(trained["run"]) == lines


def test_a_killed_run_resumes_to_the_bit(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    flags = [*TINY, "--num_epochs=8", f"--cache_dir={cache_dir}"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags, f"--run_dir={killed}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not list(killed.glob("checkpoints/step-*")):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "eval_test.json").exists()

    last = max(killed.glob("checkpoints/step-*")).name
    time.sleep(1)  # TensorBoard puts event files in order by the second they were begun in
    exports = [f"--export_root={folder / 'export'}" for folder in (killed, whole)]
    outcome = run_main("train", *flags, f"--run_dir={killed}", exports[0], "--resume=auto")
    assert outcome.code == 0, outcome.err
    assert f"resumed from {killed / 'checkpoints' / last}" in outcome.out
    expected = run_main("train", *flags, f"--run_dir={whole}", exports[1])
    assert expected.code == 0, expected.err

    lines = read_log(killed)
    assert int(last.removeprefix("step-")) < lines[-1]["step"]
    assert without_clock(lines) == without_clock(read_log(whole))
    assert_events_are(killed, lines)
    assert read_result(killed) == read_result(whole)
    for name, weight in load_file(whole / "export" / "model.safetensors").items():
        found = load_file(killed / "export" / "model.safetensors")[name]
        assert torch.equal(found, weight), name


def test_the_example_s_command_with_dmp(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = run_main("train", "--dataset_name", "random", "--mode", "dmp")
    assert outcome.code == 0, outcome.err
    assert "item unsharded" in outcome.out  # on the only rank
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("random-")
    assert read_result(run_dir)["users"] == 10


def test_the_example_s_command_with_ddp_on_two_ranks(tmp_path: Path) -> None:
    flags = ["--dataset_name", "random", "--mode", "ddp", f"--cache_dir={tmp_path / 'cache'}"]
    outcome = torchrun(2, ROOT / "train.py", *flags, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert (
        "2 ranks on cpu: replicated as an ordinary weight, gradients averaged by DDP" in outcome.out
    )
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert read_result(run_dir)["users"] == 10


def test_help_is_printed() -> None:
    outcome = run_process(ROOT / "train.py", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("usage: train.py [--flag value] ...")
    assert "--dataset_name TEXT" in outcome.out


@pytest.mark.slow
@needs_ml_100k
def test_ml_100k_on_two_ranks_and_on_one(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    outcome = torchrun(
        2,
        ROOT / "train.py",
        "--dataset_name=ml-100k",
        "--recipe=none",
        f"--dataset_path={DATA}",
        "--max_len=50",
        "--emb_dim=16",
        "--num_layers=1",
        "--num_epochs=1",
        "--train_batch_size=32",
        "--head=linear",
        "--sharding=table_wise",
        f"--cache_dir={cache_dir}",
        f"--run_dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    # GroupLens' counts; every user has at least 20 ratings.
    kept = "100,000 ratings           943 users         1,682 items"
    assert outcome.out.count(kept) == 3  # read, and each filter with a default
    result = read_result(tmp_path)
    assert result["users"] == 943
    # Scores at random give .099; popularity is barred from winning by the choice of negatives.
    assert result["popularity"]["full"]["HR@10"] > 0.03
    assert result["full"]["HR@10"] > 0.01
    outcome = run_main("eval", "--checkpoint", tmp_path, "--cache_dir", cache_dir)
    assert outcome.code == 0, outcome.err
    assert_equal_results(read_result(tmp_path), result)


def test_a_final_run_trains_on_validation_items_and_tests_its_last_model(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    run_dir = tmp_path / "final"
    flags = (*TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}")
    outcome = run_main("train", *flags, "--train_on_validation=true")
    assert outcome.code == 0, outcome.err
    lines = read_log(run_dir)
    assert not any(line["event"] == "validation" for line in lines)
    assert read_result(run_dir)["users"] == 60
    again = run_main("eval", f"--checkpoint={run_dir}", f"--cache_dir={cache_dir}")
    assert again.code == 0, again.err
    refused = run_main("eval", f"--checkpoint={run_dir}", "--split=validation")
    assert refused.code == 2
    assert "only --split test can evaluate it" in refused.err
