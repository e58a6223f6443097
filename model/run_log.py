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
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.evaluation import Result, report, write_result
from model.manifest import write_json
from pipeline.errors import UserError

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
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not {"flags", "num_items", "catalog"} <= config.keys():
            raise ValueError("keys are missing")
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
    """

    def __init__(self, run_dir: Path | None, total: int, step: int) -> None:
        self._run_dir = run_dir
        self._bar: tqdm | None = None
        if run_dir is None:
            return
        # Lines past the resumed checkpoint belong to steps that are done again.
        self._lines = run_dir / "metrics.jsonl"
        _keep_lines_up_to(self._lines, step)
        self._file = self._lines.open("a")
        self._events = SummaryWriter(str(run_dir), purge_step=step + 1)
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
        self._file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._events.add_scalar("train/epoch", epoch, step)
        if "loss" in values:
            speed = f"{values['records_per_second']:,.0f} rec/s"
            postfix = f"epoch {epoch}, loss {values['loss']:.4f}, {speed}"
            self._bar.set_postfix_str(postfix, refresh=sys.stderr.isatty())

    def write_result(
        self, step: int, split: str, result: Result, best_possible: dict[str, float] | None
    ) -> None:
        """Write eval_<split>.json, the same scalars for TensorBoard, and print the table.

        Ends the progress bar: this is for when training is over.
        """
        if self._bar is None:
            return
        self._bar.close()
        write_result(self._run_dir, split, result)
        for protocol in ("sampled", "full"):
            for name, value in result[protocol].items():
                self._events.add_scalar(f"{split}/{protocol}/{name}", value, step)
        print(report(split, result, best_possible), flush=True)

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
            self._events.close()
            self._file.close()


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line cut off by a kill
    path.write_text("".join(kept))
