"""A file cannot be written: the line names the cause, and advice that its cause has."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch.distributed.checkpoint as dcp

from model import distributed, training_run
from model.checkpoints import export as export_module
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.config import CheckpointConfig
from model.distributed import Ranks, writing
from model.ending import _users_to_fix
from model.evaluation import report
from model.run import board
from model.training.run_log import At, RunLog
from pipeline.errors import UserError, remedy
from tests.conftest import TINY, RunMain, assert_one_line

ADVICE = {
    errno.ENOSPC: "make room, then ",
    errno.EDQUOT: "make room, then ",
    errno.EROFS: "make it writable, then ",
    errno.EACCES: "change its permissions, then ",
    errno.EPERM: "change its permissions, then ",
    errno.EIO: "",
    errno.EFBIG: "",
    errno.ENAMETOOLONG: "",
    errno.ESTALE: "",
}
every = pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)


def raises(error: Exception) -> NoReturn:
    raise error


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@every
def test_a_log_that_cannot_be_written_says_what_to_do(tmp_path: Path, number: int) -> None:
    log = RunLog(tmp_path, total=4, step=0)
    log._file = SimpleNamespace(write=lambda text: raises(failure(number)))
    with pytest.raises(UserError) as told:
        log.write_steps(At(1, 1, 0), {"loss": 1.0})
    assert str(told.value) == (
        f"{tmp_path}: metrics cannot be written: {os.strerror(number)}; "
        f"{ADVICE[number]}go on with --resume auto"
    )


@every
@pytest.mark.parametrize("of", ["this rank", "another rank", "a user's error"])
def test_a_checkpoint_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, one_rank: Ranks, number: int, of: str
) -> None:
    def fail() -> None:
        if of == "another rank":
            raise dcp.api.CheckpointException("write", {1: (failure(number), None)})
        if of == "this rank":
            raise failure(number)
        with writing(tmp_path / "checkpoints", advise=False):
            raise failure(number)

    checkpoints = Checkpoints(tmp_path, one_rank, CheckpointConfig())
    with pytest.raises(UserError) as told:
        checkpoints._succeeds(fail)
    assert str(told.value) == (
        f"{tmp_path / 'checkpoints'} cannot be written: {os.strerror(number)}; there is no "
        f"checkpoint yet; {ADVICE[number]}start again with --resume auto"
    )


@every
def test_an_export_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: raises(error))
    with pytest.raises(OSError, match=r".") as found:
        export_module.check_target(tmp_path / "exported")
    advice = remedy(found.value, "python export.py")
    assert advice == f"{ADVICE[number]}python export.py"


@every
@pytest.mark.parametrize(
    ("flag", "other"),
    [("--run_dir", "or name another place with --run_dir"), ("", "then try again")],
)
def test_a_place_that_cannot_be_written_says_what_to_do(number: int, flag: str, other: str) -> None:
    with pytest.raises(UserError) as told, writing(Path("a/b"), flag):
        raise failure(number)
    advice = f"; {ADVICE[number].removesuffix(', then ')}, {other}" if ADVICE[number] else ""
    place = f"{flag} a/b".lstrip()
    assert str(told.value) == f"{place} cannot be written: {os.strerror(number)}{advice}"


def test_a_full_disk_is_told_with_the_flag_that_names_another(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each script, whose files go to a disk that takes none."""
    sync, full, run = os.fsync, [tmp_path / "full"], tmp_path / "run"

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(full[0]):
            raise failure(errno.ENOSPC)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train = ["train", *TINY, "--num_epochs=1"]
    cache, disk = f"--cache_dir={cache_dir}", full[0]
    trained = run_main(*train, cache, f"--run_dir={run}")
    assert trained.code == 0, trained.err
    reason = "No space left on device; make room"
    for command, flag, path in (
        ([*train, cache], "--run_dir", disk / "run"),
        ([*train, cache, f"--run_dir={tmp_path / 'other'}"], "--export_root", disk / "exported"),
        (["recommend", f"--checkpoint={run}", "--all"], "--output", disk / "recommended.csv"),
        (["eval", f"--checkpoint={run}"], "--per_user", disk / "ranks.parquet"),
        (["export", f"--checkpoint={run}"], "--output", disk / "exported"),
    ):
        told = f"{flag} {path} cannot be written: {reason}, or name another place with {flag}"
        assert_one_line(run_main(*command, f"{flag}={path}"), command[0], told)
    told = f"prepared data to {disk / 'stores'}: {reason}, or name another folder with --cache_dir"
    assert_one_line(run_main(*train, f"--cache_dir={disk}"), "train", told)
    full[0] = run
    told = f"{run / 'eval_test.json'} cannot be written: {reason}, then try again"
    per_user = f"--per_user={tmp_path / 'ranks.parquet'}"
    assert_one_line(run_main("eval", f"--checkpoint={run}", per_user), "eval", told)
    assert (tmp_path / "ranks.parquet").is_file()
    again = [*train, cache, f"--run_dir={run}", "--resume=auto", "--num_epochs=2"]
    told = f"--run_dir {run} cannot be written: {reason}, or name another place with --run_dir"
    assert_one_line(run_main(*again), "train", told)


def test_a_model_in_a_read_only_folder_is_evaluated(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers and every user's rank are there, whichever file of the folder is refused."""
    run, ranks = tmp_path / "run", tmp_path / "ranks.parquet"
    places = f"--cache_dir={cache_dir}", f"--run_dir={run}"
    trained = run_main("train", *TINY, "--num_epochs=1", *places)
    assert trained.code == 0, trained.err
    flags = "eval", f"--checkpoint={run}", f"--per_user={ranks}"
    printed = run_main(*flags).out
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        for place, name, path in (
            (report, "write_json", run / "eval_test.json"),
            (board, "write_measured", run),
        ):
            ranks.unlink()
            with monkeypatch.context() as patch:
                patch.setattr(place, name, lambda *_, number=number: raises(failure(number)))
                outcome = run_main(*flags)
            assert outcome.code == 0 and outcome.out == printed != "" and ranks.is_file()
            assert outcome.err == (
                f"warning: the result is printed, but not in the folder: {path} cannot be written: "
                f"{os.strerror(number)}; {ADVICE[number]}try again\n"
            )


@pytest.mark.parametrize(
    ("script", "flags", "advice"),
    [
        ("train", "", "--train_batch_size --max_len --emb_dim --val_batch_size"),
        (
            "train",
            "--train_on_validation",
            "--train_batch_size --max_len --emb_dim --test_batch_size",
        ),
        ("eval", "--checkpoint=x", "--batch_size"),
        ("recommend", "--checkpoint=x --user=1", "--batch_size"),
        ("export", "--checkpoint=x --output=y", ""),
    ],
)
def test_too_little_memory_names_flags_of_the_script(
    run_main: RunMain, monkeypatch: pytest.MonkeyPatch, script: str, flags: str, advice: str
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(training_run if script == "train" else distributed, "start", fail)
    outcome = run_main(script, *flags.split())
    assert_one_line(outcome, script, "not enough memory (Unable to allocate 9 GiB): ")
    assert [word.strip(",") for word in outcome.err.split() if word.startswith("--")] == (
        advice.split()
    )


@every
def test_a_write_that_no_file_s_own_message_tells(number: int) -> None:
    """Other causes than a lack of room are no proof that it was a write: a traceback shows it."""
    error = OSError(number, os.strerror(number), "runs/file")
    message = _users_to_fix(error, "")
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        told = f"runs/file cannot be written: {os.strerror(number)}; {ADVICE[number]}try again"
        assert message == told
    else:
        assert message is None
