"""TensorBoard's events of a training run.

    runs/mine/events.out.*              training and validation, texts, layout
    runs/mine/results/popularity/       a line in the charts of the metrics: the popularity ranking
    runs/mine/results/best_possible/    the same for the best that generated data allow
    runs/mine/results/eval_test/        see :mod:`model.board.result`

Lines of one chart are runs of their own for TensorBoard.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from model.board import markdown, tags
from model.board.projector import ItemVectors, write_vectors
from model.board.result import RESULTS, Measured, write_measured
from model.evaluation.evaluate import Result
from model.evaluation.metrics import METRICS
from pipeline.preparation.store import SequenceStore

_POPULARITY, _BEST = "popularity", "best_possible"


@dataclass(frozen=True, eq=False)
class About:
    """What does not change in a run.

    Attributes:
        flags: that differ from their defaults.
        texts: shown as they are, by heading.
        validates: whether the run evaluates while it trains.
        metrics: names of the metrics.
    """

    store: SequenceStore
    flags: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    validates: bool = True
    metrics: Sequence[str] = METRICS


class Board:
    """The events of a run, of which ``step`` steps are done: later ones are shown no more.

    Args:
        full: False writes only curves.

    Raises:
        OSError: a file cannot be written; of any method.
    """

    def __init__(self, run_dir: Path, step: int, about: About, full: bool) -> None:
        self.run_dir, self._about, self._full = run_dir, about, full
        self._best = about.store.best_possible or {}
        lines = [_POPULARITY, _BEST] if "validation" in self._best else [_POPULARITY]
        folders = {"": run_dir}
        if about.validates:
            folders |= {line: run_dir / RESULTS / line for line in lines}
        self._opened = ExitStack()
        self._events = {
            name: self._opened.enter_context(SummaryWriter(str(folder), purge_step=step + 1))
            for name, folder in folders.items()
        }
        if full:
            self._events[""].add_custom_scalars(tags.layout(about.metrics))
            self._add_text("run", markdown.sections(about.texts), step)

    def add_steps(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a line of training steps in metrics.jsonl."""
        self._add_scalars("", tags.of_steps(values), step)

    def add_evaluation(
        self, step: int, result: Result, seconds: float, examples: str | None
    ) -> None:
        """Metrics of validation, beside the lines of popularity and the best possible."""
        self._add_scalars("", tags.of_metrics(result) | {tags.SECONDS: seconds}, step)
        if "popularity" in result:
            self._add_scalars(_POPULARITY, tags.of_metrics(result["popularity"]), step)
        if _BEST in self._events:
            self._add_scalars(_BEST, tags.of_metrics({"full": self._best["validation"]}), step)
        if examples is not None:
            self._add_text("examples", examples, step)

    def add_result(
        self, name: str, step: int, split: str, result: Result, items: ItemVectors | None
    ) -> None:
        """The result of ``split`` after training, and vectors of the evaluated model."""
        best = self._best.get(split)
        measured = Measured(name, step, result, self._about.flags, best)
        folder = write_measured(self.run_dir, measured, self._full)
        if items is not None:
            write_vectors(folder, items, self._about.store.catalog)

    def close(self) -> None:
        self._opened.close()

    def _add_scalars(self, run: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._events[run].add_scalar(tag, value, step)
        self._events[run].flush()  # raises the error of the thread that writes them

    def _add_text(self, tag: str, text: str, step: int) -> None:
        self._events[""].add_text(tag, text, step)
        self._events[""].flush()
