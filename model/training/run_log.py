"""What a run leaves behind besides checkpoints, written by rank 0 alone.

    runs/mine/
        config.json       every flag, versions, command: enough to rebuild the model
        metrics.jsonl     one JSON object a line: step, epoch, loss, lr, records_per_second, ...
        events.out.*      the same for TensorBoard
        eval_test.json    the final metrics

and, while it runs, a progress bar on stderr.
"""

import importlib.metadata
import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.evaluation.evaluate import Result, report, write_result
from pipeline.errors import UserError, warn
from pipeline.files import write_json, write_text

_PACKAGES = ("torch", "torchrec", "torchdata", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of what decides numbers and speed, and the device's name."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            found["fbgemm-gpu"] = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    found["python"] = sys.version.split()[0]
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def write_config(run_dir: Path, flags: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.json: the flags, facts of the data (number of items, catalog), versions."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_json(
        run_dir / "config.json",
        {"flags": flags, **facts, "versions": versions(), "command": command},
    )


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        UserError: it is missing or not one of ours.
    """
    path = run_dir / "config.json"
    try:
        text = path.read_text()
        config = json.loads(text)
        expected = {"flags": dict, "num_items": int, "catalog": str}
        if not isinstance(config, dict) or not expected.keys() <= config.keys():
            raise ValueError("keys are missing")
        for key, kind in expected.items():
            if not isinstance(config[key], kind):
                raise ValueError(f"{key} is {config[key]!r}")
        if config["num_items"] < 1 or "\\u0000" in text:
            raise ValueError("nothing like it was ever written")
    except OSError as error:
        raise UserError(
            f"{run_dir} is no run folder: {path.name} cannot be read ({error.strerror}); "
            "give the --run_dir of a training run"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore it") from error
    return config


class RunLog:
    """Progress bar, metrics.jsonl and TensorBoard events; does nothing on ranks other than 0.

    Args:
        run_dir: the run folder, or None on ranks that do not write.
        total: steps of the whole run.
        step: steps already done.
        on_error: when nothing can be written: "stop", or "continue" with a warning, without
            TensorBoard events from then on.

    Raises:
        UserError: (here and while writing) nothing can be written, and the run is to stop.
    """

    def __init__(self, run_dir: Path | None, total: int, step: int, on_error: str = "stop") -> None:
        self._run_dir, self._on_error = run_dir, on_error
        self._bar: tqdm | None = None
        self._events: SummaryWriter | None = None
        if run_dir is None:
            return
        # Lines past the resumed checkpoint belong to steps that are done again.
        lines = run_dir / "metrics.jsonl"
        try:
            _keep_lines_up_to(lines, step)
            self._file = lines.open("a")
            self._events = SummaryWriter(str(run_dir), purge_step=step + 1)
        except OSError as error:
            raise UserError(
                f"--run_dir {run_dir} cannot be written: {error.strerror or error}"
            ) from error
        # Drawn over itself on a terminal; in a log file every drawing is another line.
        self._bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line and the same scalars; names with a slash group them in TensorBoard."""
        if self._bar is None:
            return
        line = {"step": step, "epoch": epoch, **values}
        tags = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._add_scalars({**tags, "train/epoch": epoch}, step)
        except OSError as error:
            self._failed(error)
        if "loss" in values:
            speed = f"{values['records_per_second']:,.0f} rec/s"
            postfix = f"epoch {epoch}, loss {values['loss']:.4f}, {speed}"
            self._bar.set_postfix_str(postfix, refresh=sys.stderr.isatty())

    def write_result(
        self, step: int, split: str, result: Result, best_possible: dict[str, float] | None
    ) -> None:
        """Print the table, write eval_<split>.json and the same scalars for TensorBoard.

        Ends the progress bar: this is for when training is over.
        """
        if self._bar is None:
            return
        self._bar.close()
        # Printed first: what a full disk does not take must not be lost.
        print(report(split, result, best_possible), flush=True)
        try:
            write_result(self._run_dir, split, result)
            for protocol in ("sampled", "full"):
                values = result[protocol].items()
                self._add_scalars({f"{split}/{protocol}/{name}": v for name, v in values}, step)
        except (OSError, UserError) as error:
            self._failed(error)

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
            self._close_events()
            with suppress(OSError):  # of a write that has failed before
                self._file.close()

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        if self._events is not None:
            for tag, value in values.items():
                self._events.add_scalar(tag, value, step)
            self._events.flush()  # a thread writes them: now its error comes out

    def _close_events(self) -> None:
        if self._events is not None:
            with suppress(OSError):
                self._events.close()
            self._events = None

    def _failed(self, error: OSError | UserError) -> None:
        """Stop, or warn once and do without TensorBoard, whose writer is not to be used again."""
        message = f"{self._run_dir}: metrics cannot be written: {getattr(error, 'strerror', error)}"
        if self._on_error == "stop":
            raise UserError(
                f"{message}; checkpoints are intact: make room, then go on with --resume auto"
            ) from error
        if self._events is not None:
            warn(f"{message}, training goes on")
        self._close_events()


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop later lines, and what a kill or a full disk left of a line, in one atomic step."""
    if not path.exists():
        return
    before = path.read_text(errors="replace")
    kept = []
    for line in before.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            continue
    if "".join(kept) != before:
        write_text(path, "".join(kept))
