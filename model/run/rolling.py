"""Rolling windows: a training for each two neighbours of --split_time, and a table of all."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.distributed import start
from model.evaluation.evaluate import Result
from model.evaluation.report import format_table
from model.run.build import prepared
from model.run.config_file import recorded
from model.run.execution import for_device
from model.run.folder import check_run_dir
from model.settings.config import WINDOW, RunConfig
from model.settings.flags import build
from model.settings.protocol import with_seen
from model.settings.recipes import with_recipe
from pipeline.errors import UserError, say
from pipeline.tables.points import read_points


def each_window(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The flags of each training; those given, if there is one.

    Raises:
        UserError: the points are none or do not ascend, flags do not fit several trainings, or
            --run_dir holds a run of the other kind.
    """
    config = build(RunConfig, with_recipe(given))
    windows, folder = config.of_each_window(), config.output.run_dir
    if len(windows) == 1:
        if folder and _holds(folder, WINDOW.format(1)):
            raise UserError(
                f"--run_dir {folder} holds the runs of several windows: choose another folder, or "
                "go on with theirs by --resume auto and their --split_time"
            )
        return [dict(given)]
    if _holds(folder, "config.json"):
        raise UserError(
            f"--run_dir {folder} holds a run: choose another folder for those of several windows"
        )
    read_points(config.data.split_time, config.data.split_until)
    return [
        {
            **given,
            "split_time": window.data.split_time,
            "split_until": window.data.split_until,
            "run_dir": window.output.run_dir,
        }
        for window in windows
    ]


def check_windows(windows: Sequence[Mapping[str, Any]]) -> None:
    """Prepare the data of all windows: a mistake in the last one does not wait for the trainings.

    Raises:
        UserError: the data or the folder of a window do not fit, or nobody can be evaluated in it.
    """
    config = build(RunConfig, with_recipe(windows[0]))
    ranks = start(timedelta(minutes=config.training.rank_timeout))
    for_device(config, ranks.device)
    for window in windows:
        check_run_dir(build(RunConfig, with_recipe(recorded(window, ranks))), ranks)
    for window in windows:
        config = build(RunConfig, with_recipe(window))
        with_seen(config, prepared(config, ranks))


def _holds(folder: str, name: str) -> bool:
    try:
        return (Path(folder) / name).exists()
    except OSError:  # RunFolder says why
        return False


def print_windows(
    windows: Sequence[Mapping[str, Any]], tested: Sequence[Mapping[str, Result]]
) -> None:
    """A row of full metrics for each window that was tested, and their mean; on rank 0."""
    if dist.get_rank():
        return
    rows = []
    for window, results in zip(windows, tested, strict=True):
        if "test" in results:
            until = f" until {window['split_until']}" if window["split_until"] else ""
            label = f"{window['split_time']}{until}, {results['test']['users']:,} users"
            rows.append((label, results["test"]["full"]))
    if rows:
        names = rows[0][1]
        means = {name: sum(row[name] for _, row in rows) / len(rows) for name in names}
        table = format_table([*rows, ("mean of the windows", means)])
        say(f"test, all windows, full\n{table}")
