"""One result of an evaluation: a point beside the curves, a row of HParams, a table.

    runs/mine/results/eval_test/    events, and after training the files of the projector

The folder is a run of its own for TensorBoard: the result is a point beside the curves of
validation, and HParams lists only the metrics of results.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from model.board import markdown, tags
from model.board.hparams import add_flags
from model.evaluation.evaluate import Result
from model.evaluation.ranked_users import MODEL
from model.evaluation.report import about_lists, rankings, remarks

RESULTS = "results"
_PROTOCOLS = ("full", "sampled")  # the first one chooses the best model
_OF_GROUPS = ("HR@10", "NDCG@10", "MRR")


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
            _add_histograms(events, result, measured.step)
        events.flush()  # raises the error of the thread that writes them
    return folder


def _text(measured: Measured) -> str:
    """A table of each protocol, with a line for each metric: narrow enough for the page."""
    result = measured.result
    users, step = f"{result['users']:,} users", f"step {measured.step:,}"
    parts = [f"**{markdown.escaped(measured.name)}**, {users}, {step}"]
    found = rankings(result, measured.best_possible)
    for protocol in _PROTOCOLS:
        lines = {name: _across(found[protocol], name) for name in found[protocol][MODEL]}
        parts.append(markdown.metrics_table(protocol, lines))
    return "\n\n".join([*parts, *about_lists(result), *_groups(result), *remarks(result)])


def _across(columns: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    return {name: values[metric] for name, values in columns.items() if metric in values}


def _groups(result: Result) -> list[str]:
    """Metrics by history length, popularity of the target and its kind, as one table."""
    rows: dict[str, Mapping[str, float]] = {}
    for kind, groups in result.get("groups", {}).items():
        for name, group in groups.items():
            label = f"{kind.replace('_', ' ')}: {name}, {group['users']:,} users"
            rows[label] = {metric: group["full"][metric] for metric in _OF_GROUPS}
    return [markdown.metrics_table("full, by group", rows)] if rows else []


def _add_histograms(events: SummaryWriter, result: Result, step: int) -> None:
    """Ranks of the targets, by their logarithm to base 10: 0 is rank 1, 1 is rank 10.

    An interval of ranks begins at the limit before it, that of rank 1 at 1/2. TensorBoard draws the
    first and the last interval with targets from ``min`` and to ``max``.
    """
    histogram = result.get("rank_histogram", {"limits": []})
    limits = [math.log10(limit) for limit in histogram["limits"]]
    edges = [math.log10(0.5), *limits]
    for protocol in _PROTOCOLS if limits else ():
        counts = histogram[protocol]
        occupied = [at for at, count in enumerate(counts) if count]
        # The sums are those of the intervals' ends: no view of TensorBoard shows them.
        pairs = [*zip(counts, limits, strict=True)]
        events.add_histogram_raw(
            f"log10_of_ranks/{protocol}",
            min=edges[occupied[0]],
            max=limits[occupied[-1]],
            num=sum(counts),
            sum=sum(count * limit for count, limit in pairs),
            sum_squares=sum(count * limit**2 for count, limit in pairs),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )
