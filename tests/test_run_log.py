"""Log lines or a bar; metrics.jsonl and events on a full disk and after a resume."""

import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.training.run_log import At, RunLog
from model.training.trainer import Trainer
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, read_log


def break_metrics(log: RunLog) -> None:
    # Every write fails with a full disk.
    log._file = Path("/dev/full").open("a")  # noqa: SIM115


def break_events(log: RunLog) -> None:
    assert log.board is not None
    events = log.board._events[""]
    events.file_writer.event_writer._general_file_writer.filename = b"/dev/full"


@pytest.fixture(params=[break_metrics, break_events])
def broken(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunLog], None]:
    """Break the log after step 3."""
    step = Trainer._step

    def patched(self: Trainer, *arguments: object) -> None:
        step(self, *arguments)
        if self.position.step == 3:
            request.param(self.log)

    monkeypatch.setattr(Trainer, "_step", patched)
    return request.param


def test_a_full_disk_stops_the_run(
    run_main: RunMain, run_dir: Path, cache_dir: Path, broken: Callable[[RunLog], None]
) -> None:
    flags = [*TINY, f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    outcome = run_main("train", *flags)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == (
        f"train.py: {run_dir}: metrics cannot be written: No space left on device; make room, then "
        "go on with --resume auto"
    )


def test_training_continues_on_a_full_disk_with_on_save_error_continue(
    run_main: RunMain, run_dir: Path, cache_dir: Path, broken: Callable[[RunLog], None]
) -> None:
    flags = [*TINY, f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    outcome = run_main("train", *flags, "--on_save_error=continue")
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.count("warning: ") == 1
    assert "metrics cannot be written: No space left on device, training goes on" in outcome.err
    steps = [line["step"] for line in read_log(run_dir) if "loss" in line]
    assert steps == ([1, 2] if broken is break_metrics else list(range(1, steps[-1] + 1)))
    assert "test, 60 users" in outcome.out and (run_dir / "eval_test.json").exists()


def test_a_run_folder_without_room_for_a_log(
    run_main: RunMain, run_dir: Path, cache_dir: Path
) -> None:
    (run_dir / "metrics.jsonl").mkdir(parents=True)
    outcome = run_main("train", *TINY, f"--run_dir={run_dir}", f"--cache_dir={cache_dir}")
    assert outcome.code == 2
    message = f"train.py: --run_dir {run_dir} cannot be written: Is a directory"
    assert outcome.err.splitlines() == [message]


LINES = '{"step": 1}\n{"step": 2}\n{"step": 2, "validation": 0}\n{"step": 3}\n{"step": 4}\n'


@pytest.mark.parametrize("rest", ["", '{"step": 1', '{"step": 2}', "[1]\n", "7\n", "\0\0\n", "é\n"])
def test_a_resume_keeps_whole_lines_up_to_its_step(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES.encode() + rest.encode("latin-1"))
    RunLog(tmp_path, total=9, step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "validation": 0}\n'


def test_a_resume_that_drops_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES)
    before = path.stat().st_ino
    RunLog(tmp_path, total=9, step=4).close()
    assert (path.read_text(), path.stat().st_ino) == (LINES, before)


def test_a_resume_that_cannot_write_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.files.os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        RunLog(tmp_path, total=9, step=2)
    assert path.read_text() == LINES


def values(loss: float) -> dict[str, float]:
    return {"loss": loss, "lr": 3e-4, "records_per_second": 12345.6}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the log: noon, and ``seconds`` that a test moves."""
    time = SimpleNamespace(
        seconds=50.0, strftime=lambda form: datetime(2025, 3, 1, 12).strftime(form)
    )
    time.monotonic = time.time = lambda: time.seconds
    monkeypatch.setattr("model.training.run_log.time", time)
    return time


def test_lines_where_stdout_is_no_terminal(
    tmp_path: Path, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, total=4000, step=100)
    clock.seconds += 40
    log.write_steps(At(120, 1, 0), values(6.54321))  # 2 s a step, 3,880 left
    log.advance()
    log.say("epoch 1: validation")
    log.write_evaluation(At(120, 1, 0), {"full": {"HR@10": 0.5}}, 1.0)
    clock.seconds += 60
    log.write_steps(At(1100, 2, 0), values(5.0))  # 1,000 steps in 100 s, 2,900 left
    log.close()
    assert capsys.readouterr() == (
        "2025-03-01 12:00:00 step 120/4,000, epoch 1, loss 6.5432, lr 0.0003, 12,346 rec/s, "
        "ETA 2:09:20\n"
        "epoch 1: validation\n"
        "2025-03-01 12:00:00 step 1,100/4,000, epoch 2, loss 5.0000, lr 0.0003, 12,346 rec/s, "
        "ETA 0:04:50\n",
        "",
    )


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    log = RunLog(tmp_path, total=4, step=1)
    for step in (2, 3, 4):
        log.advance()
        log.write_steps(At(step, 1, 0), values(step))
    log.say("epoch 1: validation")
    log.close()
    out, err = capsys.readouterr()
    assert out == "epoch 1: validation\n"
    last = err.strip().split("\r")[-1]
    assert "| 4/4 [" in last and "epoch 1, loss 4.0000, 12,346 rec/s" in last


def test_lines_on_a_terminal_of_unknown_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(stream, "fileno", lambda: 1)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    log = RunLog(tmp_path, total=4, step=1)
    log.write_steps(At(2, 1, 0), values(2))
    log.close()
    assert "step 2/4, epoch 1" in capsys.readouterr().out


def test_a_reader_of_stdout_that_ends_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        log = RunLog(tmp_path, total=4, step=1)
        log.write_steps(At(2, 1, 0), values(2))
        log.write_steps(At(3, 1, 0), values(3))
        log.close()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), written)  # what is buffered must go somewhere
    assert [line["step"] for line in read_log(tmp_path)] == [2, 3]


def test_other_ranks_write_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None, total=4, step=0)
    log.advance()
    log.write_steps(At(1, 1, 0), values(1.0))
    log.say("hello")
    log.write_result(1, "test", {}, None)
    log.close()
    assert capsys.readouterr() == ("", "")
