"""What reaches the terminal: no commands to it, and no output that is needed."""

import errno
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import printable, say, warn
from tests.conftest import TINY, RunMain, assert_one_line

ESCAPES = "\x1b[2J\x9b31m\a\r\n\u202e\udcff"
ESCAPED = r"\x1b[2J\x9b31m\x07\r\n\u202e\udcff"


def test_control_characters_become_escapes() -> None:
    assert printable(f"Amélie {ESCAPES} 東京") == f"Amélie {ESCAPED} 東京"


@given(st.text())
def test_what_is_printed_is_one_line_without_commands(text: str) -> None:
    line = printable(text)
    assert line.isprintable() and printable(line) == line
    line.encode()  # a name that is no text can be printed too


def test_lines_stay_lines_and_a_warning_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    say("a table\nof \x1b two lines")
    warn("one\nline")
    assert capsys.readouterr() == (
        "a table\nof \\x1b two lines\n",
        "warning: one\\nline\n",
    )


def test_names_cannot_command_the_terminal(run_main: RunMain, tmp_path: Path) -> None:
    name = tmp_path / f"ratings{ESCAPES}.csv"
    assert_one_line(run_main("train", f"--dataset_path={name}"), "train", f"ratings{ESCAPED}.csv")
    name.write_text(f"user,item,rating\n1,2,4\n1,3,{ESCAPES[:4]}\n", errors="surrogateescape")
    outcome = run_main("train", f"--dataset_path={name}", f"--cache_dir={tmp_path}")
    assert_one_line(outcome, "train", f"ratings{ESCAPED}.csv:3: ")
    assert "\x1b" not in outcome.err


def test_without_a_stdout_training_goes_on(
    run_main: RunMain, run_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python does if its descriptor is closed
    outcome = run_main("train", *TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}")
    assert outcome.code == 0, outcome.err
    assert (run_dir / "eval_test.json").exists()


class _Broken:
    """A stream whose writes fail."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


def test_only_output_without_a_reader_is_dropped() -> None:
    for number in (errno.EPIPE, errno.EIO):  # head has ended; the terminal is closed
        say("text", _Broken(number))
    with pytest.raises(OSError, match="No space left"):
        say("text", _Broken(errno.ENOSPC))
