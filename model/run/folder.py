"""The folder of a run, locked by one process group at a time.

runs/mine/
    .lock             a word of the run that has locked it; every rank must be able to read it
    config.json       every flag, versions, command: enough to rebuild the model
    catalog.parquet   the items and users that the model was trained on
    checkpoints/      and the files of the log (``model/training/run_log.py``)
"""

import os
import reprlib
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from model.checkpoints.checkpoints import PORTABLE
from model.checkpoints.export import WEIGHTS, check_target
from model.distributed import Ranks, from_first_rank, writing
from model.programs.folder import check_exporters
from model.settings.config import RunConfig
from model.settings.fitting import FITTED
from model.settings.flags import current_flags, flatten
from model.settings.protocol import protocol_of
from model.settings.recipes import with_recipe
from model.tables.sharding_plan import table_optimizer
from pipeline.batches.times import TimeSpan
from pipeline.errors import UserError
from pipeline.files import lock, make_folder, read_json, write_json
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore

LOCK = ".lock"
# Flags that say where the data are, or how they are read, not which.
_PLACES = ("cache_dir", "dataset_path", "split_path", "memory_gb")
_LATEST = 1 << 40  # seconds since 1970, beyond those of all times
_PACKAGES = ("torch", "torchrec", "torchdata", "numpy", "pyarrow")


@dataclass(eq=False)
class RunFolder:
    """The folder of a run, locked until `close`.

    Raises:
        UserError: another run has locked it, it cannot be written, a rank does not see it, or it
            holds a run already and ``--resume auto`` is missing or comes with other flags or data.
    """

    config: RunConfig
    ranks: Ranks
    store: SequenceStore
    span: TimeSpan | None = None  # of the times that the model reads

    def __post_init__(self) -> None:
        self._facts = {
            "num_items": self.store.num_items,
            "num_ratings": len(self.store.items),
            "catalog": self.store.catalog_fingerprint,
            "ratings": self.store.ratings_fingerprint,
        }
        if self.span is not None:
            self._facts["times"] = asdict(self.span)
        self._lock: IO[str] | None = None
        try:
            self.path, token = from_first_rank(self.ranks, self._claim)
            self._check_all_ranks(token)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _check_all_ranks(self, token: str) -> None:
        """Check that every rank sees this folder; a checkpoint would lack the files of others."""
        sees = [False] * self.ranks.world_size
        with suppress(OSError):
            sees[self.ranks.rank] = (self.path / LOCK).read_text() == token
        if self.ranks.world_size > 1:
            dist.all_gather_object(sees, sees[self.ranks.rank])
        if all(sees):
            return
        if self.ranks.is_first and [path.name for path in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            self.path.rmdir()
        raise UserError(
            f"--run_dir {self.path}: rank {sees.index(False)} does not see what rank 0 writes "
            "there: give a folder on a disk that all hosts share"
        )

    def record(self, execution: dict[str, Any]) -> None:
        """Write config.json, with plan and shards in ``execution``, protocol and catalog.

        If they cannot be written, all ranks raise a UserError.
        """

        @writing(f"--run_dir {self.path}")
        def write() -> None:
            evaluation = protocol_of(self.config, self.store)
            facts = self._facts | {"execution": execution, "evaluation": evaluation}
            write_config(self.path, flatten(self.config), facts)
            if self.store.path is None:
                self.store.catalog.write_to(self.path)
            else:
                Catalog.copy(self.store.path, self.path, users=self.store.path)

        from_first_rank(self.ranks, write)

    def _claim(self) -> tuple[Path, str]:
        """The locked folder, and what its lock file holds from now on."""
        output = self.config.output
        if not output.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--run_dir is needed with --max_restarts: a restart must find it again")
        stamp, token = time.strftime("%Y%m%d-%H%M%S"), uuid.uuid4().hex
        path = Path(output.run_dir or f"runs/{self.config.data.name}-{stamp}")
        if output.export_root:
            check_export("--export_root", Path(output.export_root), path)
        with writing(f"--run_dir {path}"):
            if output.run_dir:
                make_folder(path)
            else:
                path = _new_folder(path)
            try:
                self._lock = lock(path / LOCK, wait=False)
                self._lock.truncate(0)
                self._lock.write(token)
                self._lock.flush()
                os.fsync(self._lock.fileno())  # now other hosts see it
            except BlockingIOError as error:
                raise UserError(
                    f"--run_dir {path} is in use by another run: wait for it or choose another "
                    "folder"
                ) from error
        _check_contents(self.config, path, self._facts)
        checkpoints = path / "checkpoints"
        if os.path.lexists(checkpoints) and not checkpoints.is_dir():
            raise UserError(
                f"{checkpoints} is no folder: move it away, or choose another --run_dir"
            )
        if os.path.lexists(path / PORTABLE):
            with writing(f"--run_dir {path}: {PORTABLE} in it"):
                check_target(path / PORTABLE)
        return path, token


def check_run_dir(config: RunConfig, ranks: Ranks) -> None:
    """Refuse a --run_dir that these flags do not fit, before data are prepared for it."""
    if config.output.run_dir:
        from_first_rank(ranks, lambda: _check_contents(config, Path(config.output.run_dir), {}))


def recorded(given: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The flags given, and those that were fitted to the data when the run that goes on began."""
    again = given.get("resume") == "auto" or _is_restarted()
    if not again or not given.get("run_dir") or with_recipe(given)["recipe"] != "auto":
        return dict(given)

    def read() -> dict[str, Any]:
        with suppress(UserError):  # check_run_dir says why
            flags = current_flags(RunConfig, read_config(Path(given["run_dir"]))["flags"])
            return {name: flags[name] for name in FITTED if name in flags}
        return {}

    return {**from_first_rank(ranks, read), **given}


def _is_restarted() -> bool:
    return bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def _new_folder(wanted: Path) -> Path:
    """Make a folder, of another name if there is one: two runs may start in one second."""
    path, number = wanted, 1
    while True:
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")


def check_export(flag: str, folder: Path, run_dir: Path) -> None:
    """Check that the model of a run can be exported into the folder that ``flag`` names."""
    check_exporters()
    with writing(f"{flag} {folder}"):
        for path in (folder, run_dir):
            with suppress(FileNotFoundError):
                path.stat()  # an OSError for a loop of links, at which resolve() is a RuntimeError
        real, run = folder.resolve(), run_dir.resolve()
        if real == run or (real / "checkpoints").exists():
            raise UserError(f"{flag} {folder} is the folder of a run: choose another one")
        if any(_is_of_run(each, run) for each in (real, *real.parents)):
            raise UserError(f"{flag} {folder} is a folder of a run: choose another one")
        if real.name == PORTABLE and (real.parent / "checkpoints").exists() and real.parent != run:
            raise UserError(f"{flag} {folder} is the model of a run: choose another folder")
        check_target(folder)


def _is_of_run(folder: Path, run: Path) -> bool:
    """Whether a folder is what a run, perhaps this one, fills with other files than a model's."""
    is_named = folder.name in ("checkpoints", "results")
    return is_named and (folder.parent == run or (folder.parent / "config.json").exists())


def _check_contents(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    with writing(f"--run_dir {path}"):
        is_export, has_config = ((path / name).exists() for name in (WEIGHTS, "config.json"))
        has_checkpoints = any((path / "checkpoints").glob("step-*"))
    if is_export:
        raise UserError(f"--run_dir {path} is an exported model: choose another folder")
    if has_config:
        _check_same_run(config, path, facts)
    elif has_checkpoints:
        raise UserError(
            f"--run_dir {path} has checkpoints, but config.json is missing: restore it, or "
            "choose another folder"
        )


def _check_same_run(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
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
    sharding = config.sharding
    now = lasting_flags(config) | {"mode": sharding.mode}
    # What "auto" stood for: earlier versions had another optimizer on CPU.
    execution = recorded.get("execution")
    if isinstance(execution, dict) and "table_optimizer" in execution:
        before["embedding_optimizer"] = execution["table_optimizer"]
        now["embedding_optimizer"] = table_optimizer(sharding)
    if config.holdout.seen != "auto":  # else the data decide, as before
        now["seen"] = config.holdout.seen
        before.setdefault("seen", "drop")  # the only way of earlier versions
    now["targets"] = config.holdout.targets
    before.setdefault("targets", "next")
    for name in now:
        if before.get(name, now[name]) != now[name]:
            raise UserError(
                f"--resume auto: {path} was trained with --{name} {before[name]}, not "
                f"{now[name]}: give the same value, or choose another --run_dir"
            )
    for name, value in facts.items():
        if recorded.get(name, value) != value:
            raise UserError(
                f"--resume auto: {path} was trained on other data ({name} {recorded[name]}, not "
                f"{value}): give the ratings of that run, or choose another --run_dir"
            )


def lasting_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that a run keeps when it is resumed: they decide the model and its data."""
    kept = {"seed": config.loader.seed, "table_precision": config.sharding.table_precision}
    for group in ("data", "windows", "mask", "encoder", "head", "negatives"):
        kept |= flatten(getattr(config, group))
    return {name: kept[name] for name in kept if name not in _PLACES}


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
    except OSError as error:
        raise UserError(
            f"{run_dir} is no run folder: {path.name} cannot be read ({error.strerror}); "
            "give the --run_dir of a training run"
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
    possible = len(values) == len(names) and -_LATEST < values[0] <= values[-1] < _LATEST
    if not possible or sorted(values) != values:
        raise ValueError(f"times is {reprlib.repr(times)}")
    return TimeSpan(*values)
