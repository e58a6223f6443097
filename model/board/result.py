"""One result of an evaluation: a point beside the curves, a row of HParams, a table.

    runs/mine/results/eval_test/    events, and after training the files of the projector

The folder is a run of its own for TensorBoard: the result is a point beside the curves of
validation, and HParams lists only the metrics of results.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from model.board import markdown, tags
from model.board.hparams import add_flags
from model.evaluation.evaluate import Result
from model.evaluation.report import remarks

RESULTS = "results"


@dataclass(frozen=True)
class Measured:
    """A result and what it is of.

    Attributes:
        name: of the result's file, without its ending.
        step: of the evaluated model.
        flags: that differ from their defaults.
        best_possible: full metrics that the data allow, if that is known.
    """

    name: str
    step: int
    result: Result
    flags: Mapping[str, Any]
    best_possible: Mapping[str, float] | None = None


def write_measured(run_dir: Path, measured: Measured, full: bool) -> Path:
    """Write the events of a result, in place of those of an earlier one of the same name.

    Args:
        full: False writes only the scalars.

    Returns:
        Their folder.

    Raises:
        OSError: a file cannot be written.
    """
    folder, result = run_dir / RESULTS / measured.name, measured.result
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with closing(SummaryWriter(str(folder))) as events:
        for tag, value in tags.of_metrics(result).items():
            events.add_scalar(tag, value, measured.step)
        if full:
            # HParams cuts the name of a run after a few letters.
            run = {"run": f"{run_dir.resolve().name}/{measured.name}"}
            add_flags(events, run | dict(measured.flags))
            events.add_text("result", _text(measured), measured.step)
        events.flush()  # raises the error of the thread that writes them
    return folder


def _text(measured: Measured) -> str:
    result, known = measured.result, measured.result.get("popularity", {})
    rows: dict[str, Mapping[str, float]] = {}
    for protocol in ("sampled", "full"):
        rows[protocol] = result[protocol]
        if protocol in known:
            rows[f"{protocol}, popularity"] = known[protocol]
    if measured.best_possible:
        rows["full, best possible"] = measured.best_possible
    users, step = f"{result['users']:,} users", f"step {measured.step:,}"
    title = f"**{markdown.escaped(measured.name)}**, {users}, {step}"
    return "\n\n".join([title, markdown.metrics_table(rows), *remarks(result)])
