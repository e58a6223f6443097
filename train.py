"""Train BERT4Rec on TorchRec: prepare ratings, train, validate each epoch, test the best model.

python train.py                                                   synthetic data, one process
torchrun --standalone --nproc_per_node 2 train.py --dataset_name ml-1m --run_dir runs/ml-1m
tensorboard --logdir runs
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.run.script import Stages, start_script
from model.settings.config import MAIN_FLAGS, RunConfig
from model.settings.flags import FlagParser, build, flatten
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
    from model.run.rolling import check_windows, each_window, print_windows

    windows = each_window(given)
    if len(windows) > 1:
        check_windows(windows)
    results: dict[str, Result] = {}
    tested = []
    for window in windows:
        with ExitStack() as opened:
            results = _train(window, on_evaluation, make_pipeline, opened)
        tested.append(results)
    if len(windows) > 1:
        print_windows(windows, tested)
    return results


def _train(
    given: Mapping[str, Any],
    on_evaluation: "Callable[[int, Result], None] | None",
    make_pipeline: "Callable[..., Pipeline] | None",
    opened: ExitStack,
) -> "dict[str, Result]":
    stages = Stages()
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.checkpoints.checkpoints import PORTABLE, Checkpoints
    from model.checkpoints.export import Trained, export
    from model.checkpoints.manifest import read_manifest
    from model.distributed import ALONE, start
    from model.run.board import RunBoard
    from model.run.build import (
        build_model,
        build_plain_model,
        evaluator,
        first_rows,
        item_attributes,
        num_attributes,
        prepared,
        time_span,
        train_loader,
    )
    from model.run.config_file import recorded, versions
    from model.run.execution import for_device, plan_execution
    from model.run.folder import RunFolder, check_run_dir
    from model.run.measure import measure
    from model.run.resumed import changed_flags, changed_rates
    from model.run.teachers import load_teachers
    from model.run.warm_up import KernelsAhead
    from model.settings.fitting import Machine, fitted
    from model.settings.protocol import with_seen
    from model.step.optimizers import Optimizers
    from model.step.pipelines import train_pipeline
    from model.tables.distribute import describe_shards
    from model.training.profile import StepProfiler
    from model.training.run_log import RunLog
    from model.training.trainer import Trainer
    from pipeline.errors import warn
    from pipeline.preparation.prepare import describe

    stages.end("imports")
    config = build(RunConfig, with_recipe(given))
    ranks = start(timedelta(minutes=config.training.rank_timeout))
    kernels = KernelsAhead(ranks)
    # Before data are prepared, which may take long.
    for_device(config, ranks.device)
    given = recorded(given, ranks)
    check_run_dir(build(RunConfig, with_recipe(given)), ranks)
    stages.end("ranks")
    store = prepared(config, ranks)
    stages.end("data")
    ranks.say(describe(store))
    config, reasons = fitted(given, store, Machine.of(ranks))
    config, decided = with_seen(config, store)
    ranks.say("\n".join([decided, *reasons]))

    on_validation = config.windows.train_on_validation
    attributes = item_attributes(config, lambda: store.trained_catalog(on_validation))
    if attributes is not None:
        ranks.say(attributes.describe())
    count = num_attributes(attributes)
    plan = plan_execution(config, store.num_items, ranks, count)
    teachers = load_teachers(config, store, ranks, plan.precision, count)
    loader = train_loader(config, store, ranks, plan, teachers, count)
    stages.end("loader")
    span = time_span(config, store)
    kernels.start(config, store.num_items, loader, plan, span, attributes)
    rows = first_rows(config, store, ranks)
    stages.end("vectors")
    model = build_model(config, store.num_items, ranks, plan, teachers, span, rows, attributes)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    pipeline = (make_pipeline or train_pipeline)(model, optimizers, plan, ranks.device)
    stages.end("model")
    # Only now that flags and data have been checked: a mistake leaves no folder behind.
    folder = opened.enter_context(closing(RunFolder(config, ranks, store, span, attributes)))
    shards = describe_shards(model, ranks.world_size)
    executed = f"{ranks}: {plan.describe(shards)}; {optimizers}"
    ranks.say(executed)
    ranks.say(f"recipe {config.recipe}; run folder {folder.path}")

    made_by = {"flags": flatten(config), "versions": versions()}
    checkpoints = Checkpoints(folder.path, ranks, config.checkpoint, made_by)
    position = checkpoints.resume(model, optimizers)
    if position.step and ranks.is_first:
        about = read_manifest(checkpoints.path(position.step))
        rates = changed_rates(about, config, plan.table_optimizer, position, loader.num_samples)
        for line in filter(None, (rates, changed_flags(about, config, position))):
            warn(line)
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
            on_evaluation=on_evaluation,
        )
        stages.end("log")
        log.say(str(stages))
        best_step = trainer.run().best_step
        if not best_step:  # --max_steps came before an evaluation: there is no model to test
            return {}
        checkpoints.check_bytes(best_step)
        checkpoints.load_weights(model, best_step)
        best = {"step": best_step, "epoch": checkpoints.epoch(best_step)}
        results = {}
        if validator is not None:
            results["validation"] = measure(config, model, store, "validation", ranks)[0] | best
            log.keep_result("validation", results["validation"])
        results["test"] = result = measure(config, model, store, "test", ranks)[0] | best
        best_possible = (store.best_possible or {}).get("test")
        log.write_result(best_step, "test", result, best_possible, board.items())
    if ranks.is_first:
        plain = build_plain_model(config, store.num_items, ALONE, table_device="meta", span=span)
        output = config.output
        trained = Trained(
            plain,
            checkpoints.path(best_step),
            best_step,
            metrics={"test": result},
            folder=folder.path,
            users=folder.path,
            epoch=best["epoch"],
            attributes=attributes,
        )
        export(trained, folder.path / PORTABLE, output.with_users, with_programs=False)
        if output.export_root:
            export(trained, Path(output.export_root), output.with_users, with_programs=True)
    return results


def main() -> None:
    """Train with the flags of the command line."""
    start_script(read_flags, train)


if __name__ == "__main__":
    main()
