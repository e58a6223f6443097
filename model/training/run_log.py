"""The log of a run, written by rank 0.

    runs/mine/metrics.jsonl     a JSON object a line, of an event: "train" (steps) or "validation"
    runs/mine/eval_test.json    the final metrics

The same goes to TensorBoard (:mod:`model.board`).

A terminal gets a progress bar on stderr. Elsewhere stdout gets a line every --log_every steps:

    2025-03-01 12:00:00 step 50/4,000, epoch 1, loss 6.1234, lr 0.0003, 12,345 rec/s, ETA 0:12:34
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from model.board.board import Board
from model.board.projector import ItemVectors
from model.distributed import writing
from model.evaluation.evaluate import Result
from model.evaluation.report import format_report, write_result
from pipeline.errors import UserError, remedy, say, warn
from pipeline.files import open_regular, whole_file

_LINE_BYTES, _LOG_BYTES = 1 << 16, 1 << 32  # more than any line and log of a run


@dataclass(frozen=True)
class At:
    """Where training is: steps done, epoch from 1, samples (windows) seen in the whole run."""

    step: int
    epoch: int
    samples: int


@dataclass(eq=False)
class RunLog:
    """Progress, metrics.jsonl and TensorBoard events; does nothing on ranks other than 0."""

    run_dir: Path | None  # None on ranks that do not write
    total: int  # steps of the whole run
    step: int  # steps already done
    # If a write fails: "stop" by a UserError, or "continue" with a warning and, from then on,
    # without TensorBoard events.
    on_error: str = "stop"
    board: Board | None = None  # closed with the log

    def __post_init__(self) -> None:
        self._bar: tqdm | None = None
        self._has_failed = False
        self._started = time.monotonic()
        self._file: IO[str] | None = None  # metrics.jsonl, on rank 0
        self._opened = ExitStack()
        if self.board is not None:
            self._opened.callback(self.board.close)
        if self.run_dir is None:
            return
        lines, done = self.run_dir / "metrics.jsonl", self.step
        with writing(self.run_dir, "--run_dir"):
            _keep_lines_up_to(lines, done)  # a resumed run repeats the steps after its checkpoint
            self._file = self._opened.enter_context(lines.open("a"))
        if _shows_bar():
            bar = tqdm(
                total=self.total, initial=done, unit="step", dynamic_ncols=True, mininterval=0.5
            )
            self._bar = self._opened.enter_context(bar)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def write_steps(self, at: At, values: dict[str, float]) -> None:
        """Log the steps since the last call: loss, lr, records_per_second and more."""
        self._write("train", at, values)
        self._on_board(lambda board: board.add_steps(at.step, {"epoch": at.epoch, **values}))
        if self.run_dir is not None:
            # A reader of stdout, such as head, may have ended; metrics.jsonl has the line.
            with suppress(OSError):
                self._show(at.step, at.epoch, values)

    def write_evaluation(
        self, at: At, result: Result, seconds: float, examples: str | None = None
    ) -> None:
        """Log an evaluation on validation.

        Args:
            examples: recommendations as Markdown, for TensorBoard.
        """
        self._write("validation", at, {"seconds": seconds, **result})
        self._on_board(lambda board: board.add_evaluation(at.step, result, seconds, examples))

    def _write(self, event: str, at: At, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        head = {"event": event, "time": round(time.time(), 3), **asdict(at)}
        try:
            self._file.write(json.dumps({**head, **values, **head}) + "\n")  # head comes first
            self._file.flush()
        except OSError as error:
            self._failed(error)

    def _on_board(self, add: Callable[[Board], None]) -> None:
        if self.board is not None:
            try:
                add(self.board)
            except OSError as error:
                self._failed(error)

    def _show(self, step: int, epoch: int, values: dict[str, float]) -> None:
        loss, speed = f"loss {values['loss']:.4f}", f"{values['records_per_second']:,.0f} rec/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch}, {loss}, {speed}")
            return
        step_seconds = (time.monotonic() - self._started) / (step - self.step)
        eta = timedelta(seconds=round(step_seconds * (self.total - step)))
        say(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} step {step:,}/{self.total:,}, epoch {epoch}, "
            f"{loss}, lr {values['lr']:.3g}, {speed}, ETA {eta}"
        )

    def write_result(
        self,
        step: int,
        split: str,
        result: Result,
        best_possible: dict[str, float] | None,
        items: ItemVectors | None = None,
    ) -> None:
        """After training: print the table, write eval_<split>.json and what TensorBoard shows.

        Args:
            items: vectors of the evaluated model, for TensorBoard.
        """
        if self.run_dir is None:
            return
        if self._bar is not None:
            self._bar.close()
        # Printed first: a full disk must not hide the result.
        say(format_report(split, result, best_possible))
        try:
            name = write_result(self.run_dir, split, result).stem
            if self.board is not None:
                self.board.add_result(name, step, split, result, items)
        except (OSError, UserError) as error:
            self._failed(error)

    def keep_result(self, split: str, result: Result) -> None:
        """Write eval_<split>.json alone."""
        if self.run_dir is not None:
            try:
                write_result(self.run_dir, split, result)
            except UserError as error:
                self._failed(error)

    def say(self, text: str) -> None:
        """Print to stdout, above the progress bar."""
        if self._bar is not None:
            with self._bar.external_write_mode(sys.stdout):
                say(text)
        elif self.run_dir is not None:
            say(text)

    def close(self) -> None:
        with suppress(OSError):  # of a write that failed before
            self._opened.close()

    def _failed(self, error: OSError | UserError) -> None:
        """Stop, or warn once and go on without TensorBoard, whose writer is unusable now."""
        reason = getattr(error.__cause__ or error, "strerror", error)
        message = f"{self.run_dir}: metrics cannot be written: {reason}"
        if self.on_error == "stop":
            then = remedy(error, "go on with --resume auto")
            raise UserError(f"{message}; {then}") from error
        if not self._has_failed:
            self._has_failed = True
            warn(f"{message}, training goes on")
        if self.board is not None:
            with suppress(OSError):
                self.board.close()
            self.board = None


def _shows_bar() -> bool:
    """Whether stdout and stderr are a terminal of known width: at width 0 tqdm prints nothing."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return True


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop later lines, and lines that a kill or a full disk cut short, atomically."""
    if not path.exists():
        return
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LOG_BYTES:
            raise UserError(f"{path} has more than {_LOG_BYTES >> 30} GiB: move it away")
        if all(_is_kept(line, step) for line in _lines(file)):
            return
        file.seek(0)
        with whole_file(path) as kept:
            kept.writelines(line for line in _lines(file) if _is_kept(line, step))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines, the longest in parts: one of this log is short."""
    return iter(lambda: file.readline(_LINE_BYTES), b"")


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, LookupError, TypeError, RecursionError):  # not a line of this log
        return False
