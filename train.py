"""Train BERT4Rec on TorchRec: prepare ratings, train, validate each epoch, test the best model.

python train.py                                                   synthetic data, one process
torchrun --standalone --nproc_per_node 2 train.py --dataset_name ml-1m --run_dir runs/ml-1m
tensorboard --logdir runs
"""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from model.run.script import Stages, start_script
from model.settings.config import MAIN_FLAGS, RunConfig
from model.settings.flags import FlagParser, build
from model.settings.recipes import with_recipe

if TYPE_CHECKING:
    from model.evaluation.evaluate import Result
    from model.training.trainer import Pipeline


def read_flags() -> dict[str, Any]:
    """The flags of the command line, checked as far as they can be without data."""
    given = FlagParser(__doc__, RunConfig, MAIN_FLAGS).given(sys.argv[1:])
    build(RunConfig, with_recipe(given))
    return given


def train(
    given: Mapping[str, Any],
    on_evaluation: "Callable[[int, Result], None] | None" = None,
    make_pipeline: "Callable[..., Pipeline] | None" = None,
) -> "dict[str, Result]":
    """Train, test the best model, export it; once for each window of ``split_time``.

    Args:
        given: flags by name, without the hyphens; others are from the recipe, or fit the data.
        on_evaluation: called on all ranks after each evaluation, with the epoch, from 1, and the
            metrics on validation; what it raises ends the training.
        make_pipeline: called with the model, its optimizers, the execution plan and the device;
            None: :func:`model.step.pipelines.train_pipeline`.

    Returns:
        The best model's metrics on "validation" and "test", as in eval_test.json, of the last
        window; none if ``--max_steps`` ended the training before an evaluation.
    """
    stages = Stages()
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.run.rolling import check_windows, each_window, print_windows
    from model.training_run import train_once

    stages.end("imports")
    windows = each_window(given)
    if len(windows) > 1:
        check_windows(windows)
        stages.end("windows")
    results: dict[str, Result] = {}
    tested = []
    for window in windows:
        results = train_once(window, stages, on_evaluation, make_pipeline)
        tested.append(results)
        stages = Stages()
    if len(windows) > 1:
        print_windows(windows, tested)
    return results


def if_too_large(given: Mapping[str, Any]) -> str:
    """What to do if there is not enough memory."""
    evaluated = "test" if given.get("train_on_validation") else "val"
    return (
        f"lower --train_batch_size, --max_len, --emb_dim or --{evaluated}_batch_size, or use more "
        "ranks"
    )


def main() -> None:
    """Train with the flags of the command line."""
    start_script(read_flags, train, if_too_large)


if __name__ == "__main__":
    main()
