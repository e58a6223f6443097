"""What TensorBoard shows of a run of train.py, and of a result of eval.py."""

from pathlib import Path
from typing import Any

from torch import nn

from model.board.board import About, Board
from model.board.examples import Examples
from model.board.projector import ItemVectors, popular_items
from model.board.result import Measured, write_measured
from model.distributed import Ranks, writing
from model.evaluation.evaluate import Result
from model.evaluation.metrics import metric_names, names_of_several
from model.evaluation.report import NOTES
from model.run.config_file import PLACES, command, versions
from model.run.trained import TrainedRun
from model.settings.config import RunConfig
from model.settings.flags import changed, flatten
from pipeline.preparation.prepare import describe
from pipeline.preparation.store import SequenceStore

# They say where a run is or how it is watched, not what it computes.
_NOT_COMPARED = (
    *(*PLACES, "dataset_name", "run_dir", "resume", "export_root", "with_users"),
    *("log_every", "profile", "tensorboard", "rank_timeout", "checkpoint_every", "keep_last"),
)

# Flags of every row of HParams: where a run has the default, its cell would else be blank.
_ALWAYS = (
    *("recipe", "max_len", "emb_dim", "num_layers", "loss", "num_epochs", "train_batch_size"),
    *("lr", "dropout"),
)


class RunBoard:
    """TensorBoard of a training run, on all ranks."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        store: SequenceStore,
        ranks: Ranks,
        run_dir: Path,
        step: int,
        plan: str,
    ) -> None:
        """``step``: steps done before; ``plan``: how the run is executed, as text."""
        self._is_full, self._model, self._store = config.board.is_full, model, store
        validates = not config.windows.train_on_validation
        self.board: Board | None = None  # of rank 0
        if ranks.is_first:
            texts = {"command": command(), "data": describe(store), "plan": plan}
            texts["versions"] = ", ".join(f"{name} {each}" for name, each in versions().items())
            of_user = names_of_several if config.holdout.targets == "all" else metric_names
            names = of_user(config.holdout.cutoffs)
            about = About(store, compared_flags(config), texts, validates, names)
            with writing(run_dir, "--run_dir"):
                self.board = Board(run_dir, step, about, self._is_full)
        self._examples: Examples | None = None
        if self._is_full and validates:
            keep_seen = config.holdout.seen == "keep"
            self._examples = Examples(model, store, config.windows.max_len, ranks, keep_seen)

    def examples(self) -> str | None:
        """Recommendations of the current model, on rank 0; called on all ranks."""
        return None if self._examples is None else self._examples()

    def items(self) -> ItemVectors | None:
        """Vectors of the current model's most popular items; called on all ranks."""
        return popular_items(self._model, self._store.train_item_counts) if self._is_full else None


def compared_flags(config: RunConfig) -> dict[str, Any]:
    """The flags in which runs may differ: the main ones, and those not at their defaults."""
    all_flags = flatten(config)
    flags = {"data": config.data.name, **{name: all_flags[name] for name in _ALWAYS}}
    flags |= changed(config)
    return {name: value for name, value in flags.items() if name not in _NOT_COMPARED}


def write_evaluated(
    run: TrainedRun, name: str, result: Result, best_possible: dict[str, float] | None
) -> None:
    """Write a result of eval.py for TensorBoard, if it is of a run folder; on rank 0 alone.

    Args:
        name: of the result's file, without its ending.
        best_possible: full metrics that the data allow, if they are known.
    """
    if not (run.folder / "checkpoints").is_dir():
        return
    flags = compared_flags(run.config)
    flags |= {key: result[key] for key in NOTES if key in result}
    with writing(run.folder):
        # An earlier version exported no step.
        measured = Measured(name, result.get("step", 0), result, flags, best_possible)
        write_measured(run.folder, measured, run.config.board.is_full)
