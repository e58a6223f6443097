"""One training: from flags to the tested and exported best model in a run folder.

prepare     ranks, data, the flags that fit them
build       loader, model, optimizers, pipeline
train       run folder, checkpoints, log -> the best step
test        the best model's metrics
export      its weights, ready to serve
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torchrec.distributed import DistributedModelParallel

from model.checkpoints.checkpoints import PORTABLE, Checkpoints
from model.checkpoints.export import Trained, export
from model.checkpoints.manifest import read_manifest
from model.checkpoints.position import Position
from model.distributed import ALONE, Ranks, start
from model.evaluation.evaluate import Result
from model.execution import ExecutionPlan
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
from model.run.script import Stages
from model.run.teachers import load_teachers
from model.run.warm_up import KernelsAhead
from model.settings.config import RunConfig
from model.settings.fitting import Machine, fitted
from model.settings.flags import build, flatten
from model.settings.protocol import with_seen
from model.settings.recipes import with_recipe
from model.settings.unread import without_effect
from model.step.optimizers import Optimizers
from model.step.pipelines import train_pipeline
from model.tables.distribute import describe_shards
from model.training.profile import StepProfiler
from model.training.run_log import RunLog
from model.training.trainer import Pipeline, Trainer
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.times import TimeSpan
from pipeline.errors import warn
from pipeline.preparation.prepare import describe
from pipeline.preparation.store import SequenceStore
from pipeline.training.loader import TrainLoader


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run trains on, the same on all ranks but for ``ranks``."""

    config: RunConfig  # with the flags that fit the data
    ranks: Ranks
    store: SequenceStore
    attributes: ItemAttributes | None  # of the items
    span: TimeSpan | None  # of the times that the model reads


@dataclass(frozen=True, eq=False)
class Parts:
    """What a rank trains with."""

    plan: ExecutionPlan
    loader: TrainLoader
    model: DistributedModelParallel
    optimizers: Optimizers
    pipeline: Pipeline
    shards: str  # how each table is sharded
    executed: str  # the plan as a line of text


def train_once(
    given: Mapping[str, Any],
    stages: Stages,
    on_evaluation: Callable[[int, Result], None] | None = None,
    make_pipeline: Callable[..., Pipeline] | None = None,
) -> dict[str, Result]:
    """Train, test the best model, export it.

    Args:
        given: flags by name, of one window of ``split_time``.
        stages: of the start, those before this call too; printed before the first step.
        on_evaluation: as in :func:`train.train`.
        make_pipeline: as in :func:`train.train`.

    Returns:
        The best model's metrics by split; none if ``--max_steps`` came before an evaluation.
    """
    config = build(RunConfig, with_recipe(given))
    ranks = start(timedelta(minutes=config.training.rank_timeout))
    kernels = KernelsAhead(ranks)
    data = _prepare(given, config, ranks, stages)
    parts = _build(data, kernels, make_pipeline or train_pipeline, stages)
    # Only now that flags and data have been checked: a mistake leaves no folder behind.
    with closing(RunFolder(data.config, ranks, data.store, data.span, data.attributes)) as folder:
        ranks.say(parts.executed)
        ranks.say(f"recipe {data.config.recipe}; run folder {folder.path}")
        made_by = {"flags": flatten(data.config), "versions": versions()}
        checkpoints = Checkpoints(folder.path, ranks, data.config.checkpoint, made_by)
        position = checkpoints.resume(parts.model, parts.optimizers)
        if position.step and ranks.is_first:
            _warn_of_changes(data.config, parts, checkpoints, position)
        if ineffective := without_effect(given, data.config):
            ranks.warn(ineffective)
        folder.record({"shards": parts.shards, **asdict(parts.plan)})
        results = _train(data, parts, checkpoints, position, folder.path, stages, on_evaluation)
        if results and ranks.is_first:
            _export(data, checkpoints, folder.path, results["test"])
    return results


def _prepare(given: Mapping[str, Any], config: RunConfig, ranks: Ranks, stages: Stages) -> Prepared:
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
    return Prepared(config, ranks, store, attributes, time_span(config, store))


def _build(
    data: Prepared, kernels: KernelsAhead, make_pipeline: Callable[..., Pipeline], stages: Stages
) -> Parts:
    config, ranks, store, attributes = data.config, data.ranks, data.store, data.attributes
    count, items = num_attributes(attributes), store.num_items
    plan = plan_execution(config, items, ranks, count)
    teachers = load_teachers(config, store, ranks, plan.precision, count)
    loader = train_loader(config, store, ranks, plan, teachers, count)
    stages.end("loader")
    kernels.start(config, items, loader, plan, data.span, attributes)
    rows = first_rows(config, store, ranks)
    stages.end("vectors")
    model = build_model(config, items, ranks, plan, teachers, data.span, rows, attributes)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    pipeline = make_pipeline(model, optimizers, plan, ranks.device)
    stages.end("model")
    shards = describe_shards(model, ranks.world_size)
    executed = f"{ranks}: {plan.describe(shards)}; {optimizers}"
    return Parts(plan, loader, model, optimizers, pipeline, shards, executed)


def _warn_of_changes(
    config: RunConfig, parts: Parts, checkpoints: Checkpoints, position: Position
) -> None:
    about, samples = read_manifest(checkpoints.path(position.step)), parts.loader.num_samples
    rates = changed_rates(about, config, parts.plan.table_optimizer, position, samples)
    for line in filter(None, (rates, changed_flags(about, config, position))):
        warn(line)


def _train(
    data: Prepared,
    parts: Parts,
    checkpoints: Checkpoints,
    position: Position,
    run_dir: Path,
    stages: Stages,
    on_evaluation: Callable[[int, Result], None] | None,
) -> dict[str, Result]:
    """Train from ``position`` on, then test the best model; without one, there are no results."""
    config, ranks, store, model = data.config, data.ranks, data.store, parts.model
    validator = None
    if not config.windows.train_on_validation:
        validator = evaluator(config, model, store, "validation", ranks)
    total, done = config.training.total_steps(parts.loader.steps_per_epoch), position.step
    board = RunBoard(config, model, store, ranks, run_dir, done, parts.executed)
    on_error, log_dir = config.checkpoint.on_save_error, run_dir if ranks.is_first else None
    log = RunLog(log_dir, total, done, on_error, board.board)
    profiler = StepProfiler(
        config.profiling, model, parts.plan, parts.pipeline, run_dir, ranks, total - done, log.say
    )
    with closing(log), profiler:
        trainer = Trainer(
            model=model,
            optimizers=parts.optimizers,
            pipeline=parts.pipeline,
            loader=parts.loader,
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
        return _test(data, model, checkpoints, best_step, log, board)


def _test(
    data: Prepared,
    model: DistributedModelParallel,
    checkpoints: Checkpoints,
    best_step: int,
    log: RunLog,
    board: RunBoard,
) -> dict[str, Result]:
    """The best model's metrics by split, written."""
    config, store, ranks, results = data.config, data.store, data.ranks, dict[str, Result]()
    checkpoints.check_bytes(best_step)
    checkpoints.load_weights(model, best_step)
    best = {"step": best_step, "epoch": checkpoints.epoch(best_step)}
    if not config.windows.train_on_validation:
        results["validation"] = measure(config, model, store, "validation", ranks)[0] | best
        log.keep_result("validation", results["validation"])
    results["test"] = result = measure(config, model, store, "test", ranks)[0] | best
    best_possible = (store.best_possible or {}).get("test")
    log.write_result(best_step, "test", result, best_possible, board.items())
    return results


def _export(data: Prepared, checkpoints: Checkpoints, run_dir: Path, result: Result) -> None:
    """Export the model of ``result``, on test: into the run folder, and to ``--export_root``."""
    config, output, step = data.config, data.config.output, result["step"]
    trained = Trained(
        build_plain_model(config, data.store.num_items, ALONE, table_device="meta", span=data.span),
        checkpoints.path(step),
        step,
        metrics={"test": result},
        folder=run_dir,
        users=run_dir,
        epoch=result["epoch"],
        attributes=data.attributes,
    )
    export(trained, run_dir / PORTABLE, output.with_users, with_programs=False)
    if output.export_root:
        export(trained, Path(output.export_root), output.with_users, with_programs=True)
