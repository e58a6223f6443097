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
    parts = [title, markdown.metrics_table(rows), *_groups(result), *remarks(result)]
    return "\n\n".join(parts)


def _groups(result: Result) -> list[str]:
    """Metrics by history length, popularity of the target and its kind, as one table."""
    rows: dict[str, Mapping[str, float]] = {}
    for kind, groups in result.get("groups", {}).items():
        for name, group in groups.items():
            label = f"{kind.replace('_', ' ')}: {name}, {group['users']:,} users"
            rows[label] = {metric: group["full"][metric] for metric in _OF_GROUPS}
    return [markdown.metrics_table(rows)] if rows else []


def _add_histograms(events: SummaryWriter, result: Result, step: int) -> None:
    """Ranks of the targets, from 1, in intervals that grow with the rank."""
    histogram = result.get("rank_histogram", {"limits": []})
    limits = histogram["limits"]
    for protocol in ("full", "sampled") if limits else ():
        counts = histogram[protocol]
        # The sums are those of the intervals' ends: no view of TensorBoard shows them.
        pairs = [*zip(counts, limits, strict=True)]
        events.add_histogram_raw(
            f"ranks/{protocol}",
            min=1,
            max=limits[-1],
            num=sum(counts),
            sum=sum(count * limit for count, limit in pairs),
            sum_squares=sum(count * limit**2 for count, limit in pairs),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )
