"""A user's mistakes at the command line: exit code 2, one line with the remedy, no leftovers.

Most tests run `main()` in this process; the last ones start real ranks.
"""

import fcntl
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from model.distributed import Ranks
from model.run.folder import RunFolder
from model.settings.config import OutputConfig, RunConfig
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from tests.conftest import (
    ROOT,
    TINY,
    RunMain,
    assert_one_line,
    most_bytes_of_a_file,
    run_process,
    torchrun,
)

# 4 users of 3 items, 1 of 2.
RATINGS = "user,item,rating,time\n" + "".join(
    f"{user},{item},{rating},{when}\n"
    for when, (user, item, rating) in enumerate(
        [(u, i, 4) for u in range(4) for i in range(u, u + 3)] + [(9, 1, 1), (9, 2, 1)]
    )
)


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.csv"
    path.write_text(RATINGS)
    return path


@pytest.mark.parametrize(
    "flag",
    ["--precision=bf16", "--compute_kernel=fused_uvm"],
)
def test_flags_that_need_cuda(run_main: RunMain, run_dir: Path, cache_dir: Path, flag: str) -> None:
    # Found before the data are read: there are none.
    flags = "--dataset_path=none.csv", f"--run_dir={run_dir}", f"--cache_dir={cache_dir}", flag
    outcome = run_main("train", *TINY, *flags)
    assert_one_line(outcome, "train", f"{flag.replace('=', ' ')} needs CUDA")
    assert not run_dir.exists()


def test_an_unknown_column_lists_those_there_are(
    run_main: RunMain, run_dir: Path, tmp_path: Path, ratings: Path
) -> None:
    flags = [f"--dataset_path={ratings}", "--columns=user,movie"]
    outcome = run_main("train", *flags, f"--run_dir={run_dir}", f"--cache_dir={tmp_path / 'c'}")
    for word in ("movie", "user", "item", "rating", "time", str(ratings)):
        assert word in outcome.err


def test_a_run_folder_that_cannot_be_written(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}")
        assert_one_line(outcome, "train", f"--run_dir {run_dir} cannot be written: ")


def test_a_run_folder_on_a_disk_that_takes_nothing(tmp_path: Path, one_rank: Ranks) -> None:
    config = RunConfig(output=OutputConfig(run_dir=str(tmp_path / "run")))
    store = SequenceStore.from_arrays(np.arange(1, 4), [0, 3], 3)
    told = f"--run_dir {tmp_path / 'run'} cannot be written: File too large"
    with most_bytes_of_a_file(0), pytest.raises(UserError, match=re.escape(told)):
        RunFolder(config, one_rank, store)


def test_an_export_folder_that_cannot_be_written_is_found_before_training(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, run_dir: Path
) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "model"
    flags = [f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", f"--export_root={root}"]
    assert_one_line(run_main("train", *TINY, *flags), "train", f"--export_root {root} cannot be")
    assert not run_dir.exists()


def test_an_export_of_a_model_without_histories(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, run_dir: Path
) -> None:
    flags = [f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", f"--export_root={tmp_path / 'e'}"]
    outcome = run_main("train", *TINY, *flags, "--max_len=1")
    message = f"--export_root {tmp_path / 'e'}: a model of --max_len 1 reads no history"
    assert_one_line(outcome, "train", message)
    assert not run_dir.exists()


def test_a_cache_that_cannot_be_written(run_main: RunMain, tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    cache_dir = tmp_path / "file" / "cache"
    outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}")
    assert_one_line(outcome, "train", str(cache_dir))
    assert not run_dir.exists()


def test_a_run_folder_in_use(
    run_main: RunMain, tmp_path: Path, run_dir: Path, cache_dir: Path
) -> None:
    run_dir.mkdir(parents=True)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}")
    assert_one_line(outcome, "train", f"--run_dir {run_dir} is in use by another run")
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a finished run, made by a real process; do not change it."""
    path = tmp_path_factory.mktemp("errors") / "run"
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={path}"]
    outcome = run_process(ROOT / "train.py", *flags)
    assert outcome.code == 0, outcome.err
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder that the test may damage."""
    return shutil.copytree(trained, tmp_path / "copy")


def test_a_folder_that_holds_a_run_already(
    run_main: RunMain, trained: Path, cache_dir: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock"}
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={trained}"]
    assert_one_line(run_main("train", *flags), "train", f"--run_dir {trained} already holds a run")
    for changed, message in (
        ("--emb_dim=32", f"{trained} was trained with --emb_dim 16, not 32"),
        ("--seed=5", f"{trained} was trained with --seed 0, not 5"),
        ("--mode=ddp", f"{trained} was trained with --mode dmp, not ddp"),
        (
            "--embedding_optimizer=rowwise_adagrad",
            f"{trained} was trained with --embedding_optimizer adam, not rowwise_adagrad",
        ),
        ("--data_seed=5", f"{trained} was trained with --data_seed 0, not 5"),
    ):
        outcome = run_main("train", *flags, "--resume=auto", changed)
        assert_one_line(outcome, "train", message)
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock"}
    assert after == before


def test_a_run_whose_tables_had_another_optimizer_by_default(
    run_main: RunMain, copied: Path, cache_dir: Path
) -> None:
    """Before CPU tables had Adam, "auto" was row-wise Adagrad there."""
    config = json.loads((copied / "config.json").read_text())
    assert config["flags"]["embedding_optimizer"] == "auto"
    assert config["execution"]["table_optimizer"] == "adam"
    config["execution"]["table_optimizer"] = "rowwise_adagrad"
    (copied / "config.json").write_text(json.dumps(config))
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={copied}", "--resume=auto"]
    message = f"{copied} was trained with --embedding_optimizer rowwise_adagrad, not adam: give"
    assert_one_line(run_main("train", *flags), "train", message)


def edit_config(folder: Path, **flags: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["flags"] |= flags
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_checkpoint_of_another_shape(
    run_main: RunMain, copied: Path, cache_dir: Path, script: str
) -> None:
    edit_config(copied, emb_dim=32)
    shutil.rmtree(copied / "model", ignore_errors=True)  # eval.py would prefer it
    arguments = ["--checkpoint", copied]
    if script == "train":
        arguments = [*TINY, "--emb_dim=32", f"--run_dir={copied}", "--resume=auto"]
    outcome = run_main(script, *arguments, f"--cache_dir={cache_dir}")
    assert_one_line(outcome, script, "does not fit this model")


def test_a_rank_that_ends_while_a_checkpoint_is_read(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = f"--cache_dir={cache_dir}", f"--run_dir={tmp_path}"
    assert run_main("train", *TINY, *folders, "--num_epochs=1").code == 0
    shutil.rmtree(tmp_path / "model")  # eval.py would prefer it

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:80")

    monkeypatch.setattr("model.checkpoints.checkpoints.dcp.load", lost)
    outcome = run_main("eval", f"--checkpoint={tmp_path}")
    assert_one_line(outcome, "eval", "another rank ended while")


def test_a_state_that_was_cut_otherwise(
    run_main: RunMain, copied: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(
            "Size mismatch between saved torch.Size([9]) and current: torch.Size([36]) for "
            "optimizer.state.tables.embeddings.embeddings.item.weight.item.momentum1"
        )

    monkeypatch.setattr("model.checkpoints.checkpoints.dcp.load", refuse)
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={copied}", "--resume=auto"]
    outcome = run_main("train", *flags)
    assert_one_line(outcome, "train", "needs the run's own sharding and number of ranks")


def test_eval_on_other_data(run_main: RunMain, copied: Path, ratings: Path) -> None:
    flags = ["--checkpoint", copied, f"--cache_dir={copied / 'cache'}"]
    edit_config(copied, min_user_count=0)
    outcome = run_main("eval", *flags, f"--dataset_path={ratings}")
    assert_one_line(outcome, "eval", f"{copied} was trained on 80 items that are not the 6 of this")
    # As many items, but others: 20 users of 4 items each.
    lines = [f"{item // 4},x{item},{item}\n" for item in range(80)]
    ratings.write_text("".join(["user,item,time\n", *lines]))
    outcome = run_main("eval", *flags, f"--dataset_path={ratings}")
    assert_one_line(outcome, "eval", "not the 80 of this data: give the ratings of training")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is needed"),
        (["--checkpoint=nowhere"], "nowhere is no run folder: config.json cannot be read"),
        (
            ["--checkpoint=nowhere", "--split=train"],
            "--split must be one of test, validation, not 'train'",
        ),
        (["--checkpoint=nowhere", "--batch_size=0"], "--batch_size must be at least 1, not 0"),
        (
            ["--checkpoint=nowhere", "--popularity_discount=1.5"],
            "--popularity_discount must be at least 0 and at most 1, not 1.5",
        ),
    ],
)
def test_bad_flags_of_eval(run_main: RunMain, arguments: list[str], message: str) -> None:
    assert_one_line(run_main("eval", *arguments), "eval", message)


def test_eval_of_a_run_without_checkpoint(run_main: RunMain, copied: Path, cache_dir: Path) -> None:
    for name in ("checkpoints", "model"):
        shutil.rmtree(copied / name, ignore_errors=True)
    outcome = run_main("eval", "--checkpoint", copied, f"--cache_dir={cache_dir}")
    assert_one_line(outcome, "eval", f"{copied} has no evaluated model yet")


def test_eval_reports_a_result_that_cannot_be_written(
    run_main: RunMain, copied: Path, cache_dir: Path
) -> None:
    (copied / "eval_validation.json.part").mkdir()
    flags = ["--checkpoint", copied, f"--cache_dir={cache_dir}", "--split=validation"]
    outcome = run_main("eval", *flags)
    assert_one_line(outcome, "eval", f"{copied / 'eval_validation.json'} cannot be written")
    assert "validation, 60 users" in outcome.out  # the figures are not lost


def test_a_real_process_prints_one_line() -> None:
    outcome = run_process(ROOT / "train.py", "--nhead=3")
    assert_one_line(outcome, "train", "--nhead 3 does not divide --emb_dim 64")
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("ModuleNotFoundError('No module named x')", "ModuleNotFoundError: No module named x"),
        ("OSError('libx.so: undefined symbol: f\\nmore')", "OSError: libx.so: undefined symbol: f"),
        ("AttributeError()", "AttributeError: "),
    ],
)
def test_a_library_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, shown: str
) -> None:
    (tmp_path / "torchrec.py").write_text(f"raise {error}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = run_process(ROOT / "eval.py", "--checkpoint", "x")
    message = f"TorchRec cannot be imported ({shown}): activate the virtual environment"
    assert_one_line(outcome, "eval", message)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        pytest.param(
            *("train", ["--dataset_path", "none.csv"], "no such file: none.csv; check the path"),
            marks=pytest.mark.slow,
        ),
        ("eval", ["--chekpoint", "x"], "unknown argument --chekpoint: did you mean --checkpoint?"),
    ],
)
def test_all_ranks_end_and_one_prints_the_error(
    tmp_path: Path, script: str, arguments: list[str], message: str
) -> None:
    outcome = torchrun(2, ROOT / f"{script}.py", *arguments, cwd=tmp_path, timeout=60)
    assert outcome.code == 1  # torchrun's own
    ours = [line for line in outcome.err.splitlines() if line.startswith(f"{script}.py: ")]
    assert ours == [f"{script}.py: {message}"]
    # The only traceback is torchrun's: a rank failed with exit code 2.
    assert outcome.err.count("Traceback (most recent call last)") == 1
    assert "ChildFailedError" in outcome.err and "exitcode  : 2" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_preparation_ends_before_the_interpreter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratings: Path
) -> None:
    """Arrow's threads may abort an interpreter that ends."""

    def end(code: int) -> NoReturn:
        raise SystemExit(code)

    arguments = f"preparation --dry_run --dataset_path {ratings} --min_user_count 1".split()
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("pipeline.preparation", run_name="__main__")


def test_a_module_that_is_run_is_named(tmp_path: Path) -> None:
    command = ["-m", "pipeline.preparation", "--dataset_path", str(tmp_path / "none.csv")]
    outcome = run_process(*command)
    assert outcome.code == 2
    assert outcome.err.startswith(f"preparation: no such file: {tmp_path}/none.csv")
