"""A file cannot be written: the line names the cause, and advice that its cause has."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch.distributed.checkpoint as dcp

from model.checkpoints import export as export_module
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.config import CheckpointConfig
from model.distributed import Ranks, writing
from model.ending import _users_to_fix
from model.training.run_log import At, RunLog
from pipeline.errors import UserError, remedy

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
        f"{tmp_path}: metrics cannot be written: {os.strerror(number)}; checkpoints are intact: "
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
        with writing(str(tmp_path / "checkpoints")):
            raise failure(number)

    checkpoints = Checkpoints(tmp_path, one_rank, CheckpointConfig())
    with pytest.raises(UserError) as told:
        checkpoints._succeeds(fail)
    assert str(told.value) == (
        f"{tmp_path / 'checkpoints'} cannot be written: {os.strerror(number)}; earlier checkpoints "
        f"are intact; {ADVICE[number]}go on with --resume auto"
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
def test_a_write_that_no_file_s_own_message_tells(number: int) -> None:
    """Other causes than a lack of room are no proof that it was a write: a traceback shows it."""
    error = OSError(number, os.strerror(number), "runs/file")
    message = _users_to_fix(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        told = f"runs/file cannot be written: {os.strerror(number)}; {ADVICE[number]}try again"
        assert message == told
    else:
        assert message is None
