"""How a script starts, how it ends after another rank has failed, and the signals it hears."""

import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from model import ending
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.position import Position
from model.distributed import Ranks, start
from model.ending import LostRankError, failure_of_another_rank, run_script
from model.run import script
from model.training import agreement
from model.training.agreement import NOTHING, STOP, Agreement
from pipeline import errors
from pipeline.errors import UserError
from tests.conftest import run_process


def ends(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a script that raises ``error`` on one of several ranks."""

    def exits(code: int) -> None:
        raise SystemExit(code)

    def fail() -> None:
        raise error

    monkeypatch.setattr(os, "_exit", exits)
    monkeypatch.setattr(ending, "_has_other_ranks", lambda: True)
    with pytest.raises(SystemExit) as end:
        run_script(fail)
    return int(str(end.value.code))


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:80")


def test_the_first_failure_is_told_by_the_others(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure_of_another_rank() is None
    ending._tell_other_ranks("KeyError: 7")
    ending._tell_other_ranks("a consequence")
    assert failure_of_another_rank() == "rank 0 failed: KeyError: 7"
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    assert ends(CLOSED, monkeypatch) == 2
    assert capsys.readouterr().err.endswith(": rank 0 failed: KeyError: 7\n")


@pytest.mark.parametrize("told_by", ["nobody", "rank 0", "another rank that is left"])
def test_one_of_the_ranks_that_are_left_tells_of_a_killed_rank_0(
    one_rank: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told_by: str,
) -> None:
    """torchrun ends them at once, before their turn to print."""
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)

    def ended_meanwhile(_: float) -> None:
        if told_by == "rank 0":
            ending._note_printed()
        elif told_by != "nobody":
            assert ending._is_first_to_tell()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(errors.time, "sleep", ended_meanwhile)
    assert ends(LostRankError("another rank ended at step 6"), monkeypatch) == 2
    line = ": rank 1: another rank ended at step 6\n"
    assert capsys.readouterr().err.endswith(line) == (told_by == "nobody")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("lost", [CLOSED, LostRankError("rank 1 failed: no file")])
def test_a_line_that_its_rank_has_printed_is_not_repeated(
    one_rank: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: Exception,
) -> None:
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("pipeline.errors.time.sleep", lambda _: None)
    assert ends(UserError("no file"), monkeypatch) == 2
    assert capsys.readouterr().err.endswith(": rank 1: no file\n")
    monkeypatch.setenv("RANK", "0")
    assert ends(lost, monkeypatch) == 2
    assert capsys.readouterr().err == ""


def test_the_rank_that_knows_which_one_is_stuck_prints_it(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others, which know less, may have printed before."""
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    ends(UserError("no answer from rank 0, or a rank that it names"), monkeypatch)
    capsys.readouterr()
    assert ends(LostRankError("no answer from rank 5", is_known=True), monkeypatch) == 2
    assert capsys.readouterr().err.endswith(": no answer from rank 5\n")


def test_a_line_of_a_rank_on_another_host_is_repeated(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ending, "_PRINTED", "printed on another host")
    assert ends(UserError("no file"), monkeypatch) == 2
    monkeypatch.undo()
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    capsys.readouterr()
    assert ends(CLOSED, monkeypatch) == 2
    assert capsys.readouterr().err.endswith(": rank 0 failed: no file\n")


@pytest.mark.parametrize("where", [{"WORLD_SIZE": "x"}, {}])
def test_ranks_that_are_not_started_by_torchrun(
    no_cuda: None, monkeypatch: pytest.MonkeyPatch, where: dict[str, str]
) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **where}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"this rank cannot join the others .*torchrun"):
        start()


def test_a_rank_that_ended_without_a_word(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    assert ends(CLOSED, monkeypatch) == 2
    assert capsys.readouterr().err.endswith(": another rank ended: see its error\n")
    assert failure_of_another_rank() is None  # this rank is not the cause


@pytest.mark.parametrize(
    ("error", "code", "stored"),
    [
        (UserError("no file"), 2, "rank 0 failed: no file"),
        (KeyError("a\x1bb"), 1, "rank 0 failed: KeyError: 'a\\x1bb'"),
    ],
)
def test_a_failure_is_stored_for_the_others(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, stored: str
) -> None:
    monkeypatch.setattr(ending.dist, "destroy_process_group", lambda: None)
    assert ends(error, monkeypatch) == code
    assert failure_of_another_rank() == stored


def test_torch_prints_no_stack_traces_about_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its C++ does above the line of the rank that goes on; read when torch is loaded."""
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    monkeypatch.setattr(script, "_prepare_streams", lambda: None)
    levels = []

    def read_flags() -> NoReturn:
        levels.append(os.environ.get("TORCH_CPP_LOG_LEVEL"))
        raise KeyError

    with pytest.raises(KeyError):
        script.start_script(read_flags, print)
    assert levels == ["ERROR"]


INTERRUPTED = """
import sys
from model.run.script import start_script

class CtrlC:
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
start_script(dict, print)
"""


@pytest.mark.parametrize("name", ["torch", "torchrec"])
def test_ctrl_c_during_the_imports_ends_a_script_without_a_traceback(name: str) -> None:
    outcome = run_process("-c", INTERRUPTED.format(name=name))
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


def test_a_script_collects_garbage_but_that_of_its_imports() -> None:
    main = "lambda _: print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    start = f"import gc; from model.run.script import start_script; start_script(dict, {main})"
    outcome = run_process("-c", start)
    assert (outcome.code, outcome.out) == (0, "True True\n"), outcome.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_save(one_rank: Ranks, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Agreement(one_rank) as agreed:
        assert agreed.exchange() == NOTHING
        os.kill(os.getpid(), number)
        assert agreed.exchange() == STOP + number
    assert signal.getsignal(number) == before


def test_a_hang_up_that_nohup_ignores_stays_ignored(one_rank: Ranks) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Agreement(one_rank) as agreed:
            os.kill(os.getpid(), signal.SIGHUP)
            assert agreed.exchange() == NOTHING
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("text", "seconds", "message"),
    [
        ("Timed out waiting 3000ms", 0, "no answer from rank 5 for 3 s at step 10: it is stuck"),
        # Another rank has timed out before this one, and closed its connections.
        ("Connection closed by peer", 10, "no answer from rank 5 for 3 s at step 10: it is stuck"),
        ("Connection closed by peer", 1, "another rank ended at step 10"),
    ],
)
@pytest.mark.parametrize(
    ("saved", "advice"),
    [
        (0, "there is no checkpoint yet: start again with --resume auto"),
        (7, "the checkpoint of step 7 is intact: go on with --resume auto"),
    ],
)
def test_a_stuck_rank_is_told_from_one_that_ended(
    one_rank: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    seconds: int,
    message: str,
    saved: int,
    advice: str,
) -> None:
    checkpoints = Checkpoints(tmp_path, one_rank)
    if saved:
        checkpoints._write({"model": {"weight": torch.ones(1)}}, Position(step=saved))

    def barrier(*_: object, **__: object) -> None:
        raise RuntimeError("[Rank 0]: Ranks 5 failed to pass monitoredBarrier in 10000 ms")

    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(agreement.dist, "monitored_barrier", barrier)
    agreed = Agreement(replace(one_rank, timeout=timedelta(seconds=3)))
    agreed._barrier_group = dist.group.WORLD
    told = agreed.explain(RuntimeError(text), 10, checkpoints)
    assert str(told) == f"{message}; {advice}"


def test_a_rank_without_its_launcher_stops(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    parents = iter([7, 7, 1])  # at the third look it belongs to init
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(script.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    with Agreement(one_rank) as agreed:
        script._end_with(7)
        assert agreed.exchange() == STOP + signal.SIGTERM
    assert len(slept) == 2
    assert capsys.readouterr().err == "warning: torchrun has ended: rank 3 ends too\n"
