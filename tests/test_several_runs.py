"""Several trainings in one process, at one time, or on a file system without locks."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import train
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, assert_one_line


@pytest.fixture
def given(run_dir: Path, cache_dir: Path, no_cuda: None) -> Iterator[Any]:
    """A function from more flags to those of a tiny run, whose group ends with the test."""

    def make(*flags: str) -> dict[str, Any]:
        folders = f"--cache_dir={cache_dir}", f"--run_dir={run_dir}"
        dots = "--logit_temperature=0"  # a loss of dot products can become infinite
        return FlagParser("", RunConfig).given([*TINY, *folders, dots, *flags])

    yield make
    dist.destroy_process_group()


def test_trainings_in_one_process_free_their_folder(given: Any, run_dir: Path) -> None:
    kept = []  # an error holds the frames that it passed, and what is in them
    for flags, message in (
        (("--lr=1e28", "--warmup_share=0"), "the loss became"),
        ((), "already holds a run"),
        (("--emb_dim=32", "--resume=auto"), "was trained with --emb_dim 16"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train.train(given(*flags))
        kept.append(error)
    train.train(given("--resume=auto"))
    train.train(given("--resume=auto", "--num_epochs=3"))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert sum('"validation"' in line for line in lines) == 3


def test_runs_of_one_second_have_different_folders(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    for _ in range(3):
        outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}", "--max_steps=1")
        assert outcome.code == 0, outcome.err
    expected = [f"synthetic-20260101-000000{end}" for end in ("", "-2", "-3")]
    assert sorted(path.name for path in Path("runs").iterdir()) == expected


def test_no_folder_of_runs_can_be_made(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("nowhere")
    outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}")
    assert_one_line(outcome, "train", "runs is a link to nowhere, which is missing")
    assert "--run_dir" in outcome.err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folders = f"--cache_dir={tmp_path / 'cache'}", f"--run_dir={tmp_path / 'run'}"
    outcome = run_main("train", *TINY, *folders)
    assert outcome.code == 0, outcome.err
    warned = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2  # prepared data, run folder
    assert warned[1] == (
        f"warning: {tmp_path / 'run' / '.lock'} cannot be locked ({os.strerror(number)}): let no "
        f"other run use {tmp_path / 'run'} at the same time"
    )
