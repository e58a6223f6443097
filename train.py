"""Train BERT4Rec on TorchRec: prepare ratings, train, validate each epoch, test the best model.

python train.py                                                   synthetic data, one process
torchrun --standalone --nproc_per_node 2 train.py --dataset_name ml-1m --run_dir runs/ml-1m
tensorboard --logdir runs
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from model.run.config import MAIN_FLAGS, RunConfig
from model.run.flags import FlagParser, build, flatten
from model.run.recipes import with_recipe
from model.run.script import start_script

if TYPE_CHECKING:
    from model.evaluation.evaluate import Result
    from model.training.trainer import Pipeline


def read_flags() -> RunConfig:
    """The config that the command line describes."""
    given = FlagParser(__doc__, RunConfig, MAIN_FLAGS).given(sys.argv[1:])
    return build(RunConfig, with_recipe(given))


def train(config: RunConfig, make_pipeline: "Callable[..., Pipeline] | None" = None) -> None:
    """Train, test the best model, export it; once for each window of --split_time.

    Args:
        make_pipeline: called with the model, its optimizers, the execution plan and the device;
            None: :func:`model.step.pipelines.train_pipeline`.
    """
    windows, tested = config.of_each_window(), []
    if len(windows) > 1:
        from pipeline.tables.points import read_points

        read_points(",".join(filter(None, (config.data.split_time, config.data.split_until))))
    for window in windows:
        with ExitStack() as opened:
            tested.append((window, _train(window, make_pipeline, opened)))
    if len(windows) > 1:
        _print_windows([(window, result) for window, result in tested if result is not None])


def _print_windows(tested: "list[tuple[RunConfig, Result]]") -> None:
    """A row of full metrics for each window, and their mean."""
    from model.evaluation.report import format_table
    from pipeline.errors import say

    rows = []
    for window, result in tested:
        data = window.data
        until = f" until {data.split_until}" if data.split_until else ""
        label = f"{data.split_time}{until}, {result['users']:,} users"
        rows.append((label, result["full"]))
    if rows:
        names = rows[0][1]
        means = {name: sum(row[name] for _, row in rows) / len(rows) for name in names}
        table = format_table([*rows, ("mean of the windows", means)])
        say(f"test, all windows, full\n{table}")


def _train(
    config: RunConfig, make_pipeline: "Callable[..., Pipeline] | None", opened: ExitStack
) -> "Result | None":
    """The result of the test on rank 0; None on others, and where no model was tested."""
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.checkpoints.checkpoints import PORTABLE, Checkpoints
    from model.checkpoints.export import Trained, export, load_checkpoint
    from model.checkpoints.manifest import read_manifest
    from model.distributed import Ranks, start
    from model.run.board import RunBoard
    from model.run.build import (
        build_model,
        build_plain_model,
        evaluator,
        prepared,
        train_loader,
    )
    from model.run.execution import for_device, plan_execution
    from model.run.folder import RunFolder, check_run_dir, versions
    from model.run.measure import measure
    from model.run.protocol import with_seen
    from model.run.schedule import changed_rates
    from model.run.trained import load_teachers
    from model.step.optimizers import Optimizers
    from model.step.pipelines import train_pipeline
    from model.tables.distribute import describe_shards
    from model.training.profile import StepProfiler
    from model.training.run_log import RunLog
    from model.training.trainer import Trainer
    from pipeline.errors import warn
    from pipeline.preparation.prepare import describe

    ranks = start(timedelta(minutes=config.training.rank_timeout))
    # Before data are prepared, which may take long.
    for_device(config, ranks.device)
    check_run_dir(config, ranks)
    store = prepared(config, ranks)
    ranks.say(describe(store))
    config, decided = with_seen(config, store)
    ranks.say(decided)

    plan = plan_execution(config, store.num_items, ranks)
    loader = train_loader(config, store, ranks, plan)
    teachers = load_teachers(config, store, ranks, plan.precision)
    model = build_model(config, store.num_items, ranks, plan, teachers)
    optimizers = Optimizers(model, plan, config.optimizer, ranks.device)
    pipeline = (make_pipeline or train_pipeline)(model, optimizers, plan, ranks.device)
    # Only now that flags and data have been checked: a mistake leaves no folder behind.
    folder = opened.enter_context(closing(RunFolder(config, ranks, store)))
    shards = describe_shards(model, ranks.world_size)
    executed = f"{ranks}: {plan.describe(shards)}; {optimizers}"
    ranks.say(executed)
    ranks.say(f"recipe {config.recipe}; run folder {folder.path}")

    recorded = {"flags": flatten(config), "versions": versions()}
    checkpoints = Checkpoints(folder.path, ranks, config.checkpoint, recorded)
    position = checkpoints.resume(model, optimizers)
    if position.step and ranks.is_first:
        about = read_manifest(checkpoints.path(position.step))
        rates = changed_rates(about, config, plan.table_optimizer, position, loader.num_samples)
        if rates:
            warn(rates)
    folder.record({"shards": shards, **asdict(plan)})

    validator = None
    if not config.windows.train_on_validation:
        validator = evaluator(config, model, store, "validation", ranks)
    total = config.training.total_steps(loader.steps_per_epoch)
    board = RunBoard(config, model, store, ranks, folder.path, position.step, executed)
    on_error, log_dir = config.checkpoint.on_save_error, folder.path if ranks.is_first else None
    log = RunLog(log_dir, total, position.step, on_error, board.board)
    profiler = StepProfiler(
        config.profiling, model, plan, pipeline, folder.path, ranks, total - position.step, log.say
    )
    with closing(log), profiler:
        trainer = Trainer(
            model=model,
            optimizers=optimizers,
            pipeline=pipeline,
            loader=loader,
            validate=validator,
            checkpoints=checkpoints,
            log=log,
            config=config.training,
            ranks=ranks,
            seed=config.loader.seed,
            position=position,
            after_step=profiler.step,
            examples=board.examples,
        )
        best_step = trainer.run().best_step
        if not best_step:  # --max_steps came before an evaluation: there is no model to test
            return None
        checkpoints.load_weights(model, best_step)
        best = {"step": best_step, "epoch": checkpoints.epoch(best_step)}
        if validator is not None:
            chosen = measure(config, model, store, "validation", ranks)[0] | best
            log.keep_result("validation", chosen)
        result = measure(config, model, store, "test", ranks)[0] | best
        best_possible = (store.best_possible or {}).get("test")
        log.write_result(best_step, "test", result, best_possible, board.items())
    if not ranks.is_first:
        return None
    plain = build_plain_model(config, store.num_items, Ranks(0, 1, 1, ranks.device))
    load_checkpoint(checkpoints.path(best_step), plain)
    output, metrics = config.output, {"test": result}
    trained = Trained(plain, best_step, metrics, folder.path, folder.path, best["epoch"])
    export(trained, folder.path / PORTABLE, output.with_users, with_programs=False)
    if output.export_root:
        export(trained, Path(output.export_root), output.with_users, with_programs=True)
    return result


def main() -> None:
    """Train with the flags of the command line."""
    start_script(read_flags, train)


if __name__ == "__main__":
    main()
