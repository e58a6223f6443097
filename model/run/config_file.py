"""config.json of a run: flags, versions, facts; and whether a run that goes on has the same."""

import os
import reprlib
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from model.distributed import Ranks, from_first_rank
from model.settings.config import WINDOW, RunConfig
from model.settings.fitting import FITTED
from model.settings.flags import build, current_flags, flatten
from model.settings.recipes import with_recipe
from model.tables.sharding_plan import table_optimizer
from pipeline.batches.attributes import MOST_ATTRIBUTES
from pipeline.batches.times import LATEST, TimeSpan
from pipeline.errors import UserError
from pipeline.files import read_json, write_json

# Flags that say where the data are, or how they are read, not which.
PLACES = ("cache_dir", "dataset_path", "split_path", "items_path", "memory_gb")
_PACKAGES = ("torch", "torchrec", "torchdata", "numpy", "pyarrow")


def recorded(given: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The flags given, and those that were fitted to the data when the run that goes on began.

    Raises:
        UserError: they do not fit each other.
    """
    again = given.get("resume") == "auto" or _is_restarted()
    if not again or not given.get("run_dir") or with_recipe(given)["recipe"] != "auto":
        return dict(given)

    def read() -> dict[str, Any]:
        with suppress(UserError):  # check_run_dir says why
            flags = current_flags(RunConfig, read_config(Path(given["run_dir"]))["flags"])
            # A flag that did not exist: the run began as without it.
            plain = flatten(RunConfig())
            return {name: flags.get(name, plain[name]) for name in FITTED}
        return {}

    flags = {**from_first_rank(ranks, read), **given}
    try:
        build(RunConfig, with_recipe(flags))
    except UserError as error:
        raise UserError(
            f"--resume auto: the flags of {given['run_dir']} and those given do not fit each other "
            f"({error}): give the flags of that run, or choose another --run_dir"
        ) from error
    return flags


def _is_restarted() -> bool:
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def check_same_run(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    """Check that a run may go on in the folder of another one.

    Args:
        facts: of the data, by name, as :func:`write_config` records them.

    Raises:
        UserError: it was not told to, or lasting flags or facts differ.
    """
    if config.output.resume == "never" and not _is_restarted():
        raise UserError(
            f"--run_dir {path} already holds a run: go on with it by --resume auto, or choose "
            "another folder"
        )
    recorded = read_config(path)
    try:
        before = current_flags(RunConfig, recorded["flags"])
    except UserError as error:
        raise UserError(f"--resume auto: {path / 'config.json'}: {error}") from error
    # Before the flags: other data decide some of them, such as --seen, otherwise.
    for name, value in facts.items():
        if recorded.get(name, value) != value:
            raise UserError(
                f"--resume auto: {path} was trained on other data ({name} {recorded[name]}, not "
                f"{value}): give the ratings and items of that run, or choose another --run_dir"
            )
    before, now = _comparable(before, config, recorded.get("execution"))
    for name in now:
        if before.get(name, now[name]) != now[name]:
            was, new = (flags[name] if flags[name] != "" else "none" for flags in (before, now))
            raise UserError(
                f"--resume auto: {path} was trained with --{name} {was}, not {new}: give the same "
                "value, or choose another --run_dir"
            )


def _comparable(
    before: dict[str, Any], config: RunConfig, execution: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of a run before, and those of ``config`` that must be the same, in one form.

    Args:
        execution: of the run before, as its config.json has it.
    """
    sharding = config.sharding
    before, now = dict(before), lasting_flags(config) | {"mode": sharding.mode}
    # What "auto" stood for: earlier versions had another optimizer on CPU.
    if isinstance(execution, dict) and "table_optimizer" in execution:
        before["embedding_optimizer"] = execution["table_optimizer"]
        now["embedding_optimizer"] = table_optimizer(sharding)
    if config.holdout.seen != "auto":  # else the data decide, as before
        now["seen"] = config.holdout.seen
        before.setdefault("seen", "drop")  # the only way of earlier versions
    now["targets"] = config.holdout.targets
    before.setdefault("targets", "next")  # likewise
    for flags in (before, now):  # one fact: a window of a longer --split_time has both
        end = f" until {until}" if (until := flags.pop("split_until", "")) else ""
        flags["split_time"] = f"{flags.get('split_time', '')}{end}"
    return before, now


def lasting_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that a run keeps when it is resumed: they decide the model and its data."""
    kept = {"seed": config.loader.seed, "table_precision": config.sharding.table_precision}
    for group in ("data", "windows", "mask", "encoder", "head", "negatives"):
        kept |= flatten(getattr(config, group))
    return {name: kept[name] for name in kept if name not in PLACES}


def versions() -> dict[str, str]:
    """Versions of the packages that decide results and speed, and the device's name."""
    found = {name: version(name) for name in _PACKAGES}
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        with suppress(PackageNotFoundError):
            found["fbgemm-gpu"] = version(name)
    found["python"] = sys.version.split()[0]
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_config(run_dir: Path, flags: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.json: flags, facts of the data and of the execution, versions."""
    content = {"flags": flags, **facts, "versions": versions(), "command": command()}
    write_json(run_dir / "config.json", content)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read config.json and check its parts."""
    path = run_dir / "config.json"
    try:
        config = read_json(path)
        expected = {"flags": dict, "num_items": int, "catalog": str}
        if not isinstance(config, dict) or not expected.keys() <= config.keys():
            raise ValueError("keys are missing")
        for key, kind in expected.items():
            if type(config[key]) is not kind:  # True is no int
                raise ValueError(f"{key} is {reprlib.repr(config[key])}")
        texts = (value for value in config["flags"].values() if isinstance(value, str))
        if not 1 <= config["num_items"] < 1 << 31 or any("\0" in text for text in texts):
            raise ValueError("a value in it is impossible")
        read_span(config)
        read_num_attributes(config)
    except OSError as error:
        wanted = "give the --run_dir of a training run"
        first = run_dir / WINDOW.format(1)
        if isinstance(error, FileNotFoundError) and first.is_dir():
            wanted = f"it holds the runs of several windows: give one of them, such as {first}"
        raise UserError(
            f"{run_dir} is no run folder: {path.name} cannot be read ({error.strerror}); {wanted}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore it") from error
    return config


def read_span(config: Mapping[str, Any]) -> TimeSpan | None:
    """The span of the times in a config.json; None if the model reads none.

    Raises:
        ValueError: it has none, or an impossible one.
    """
    if not config["flags"].get("use_times"):
        return None
    times = config.get("times")
    names = [each.name for each in fields(TimeSpan)]
    found = [times.get(name) for name in names] if isinstance(times, dict) else []
    values = [value for value in found if type(value) is int]  # True is no int
    possible = len(values) == len(names) and -LATEST < values[0] <= values[-1] < LATEST
    if not possible or sorted(values) != values:
        raise ValueError(f"times is {reprlib.repr(times)}")
    return TimeSpan(*values)


def read_num_attributes(config: Mapping[str, Any]) -> int:
    """The number of attributes in a config.json; 0 if the model has none.

    Raises:
        ValueError: there is none, or an impossible one.
    """
    if not config["flags"].get("item_attributes"):
        return 0
    count = config.get("num_attributes")
    if type(count) is not int or not 1 <= count <= MOST_ATTRIBUTES:
        raise ValueError(f"num_attributes is {reprlib.repr(count)}")
    return count
