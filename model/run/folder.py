"""The folder of a run, locked by one process group at a time.

runs/mine/
    config.json       every flag, versions, command: enough to rebuild the model
    catalog.parquet   the items and users that the model was trained on
    checkpoints/      and the files of the log (``model/training/run_log.py``)
"""

import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.export import WEIGHTS
from model.distributed import Ranks, from_first_rank, writing
from model.run.config import RunConfig
from model.run.flags import current_flags, flatten
from model.tables.sharding_plan import table_optimizer
from pipeline.errors import UserError
from pipeline.files import lock, write_json
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore

_PACKAGES = ("torch", "torchrec", "torchdata", "numpy", "pyarrow")


@dataclass(eq=False)
class RunFolder:
    """The folder of a run, locked until the process ends.

    Raises:
        UserError: another run has locked it, it cannot be written, or it holds a run already and
            ``--resume auto`` is missing or comes with other flags or data.
    """

    config: RunConfig
    ranks: Ranks
    store: SequenceStore

    def __post_init__(self) -> None:
        self._facts = {
            "num_items": self.store.num_items,
            "num_ratings": len(self.store.items),
            "catalog": self.store.catalog_fingerprint,
        }
        self.path = from_first_rank(self.ranks, self._claim)

    def record(self, execution: dict[str, Any]) -> None:
        """Write config.json, with plan and shards in ``execution``, and the catalog.

        If they cannot be written, all ranks raise a UserError.
        """

        @writing(f"--run_dir {self.path}")
        def write() -> None:
            facts = self._facts | {"execution": execution}
            write_config(self.path, flatten(self.config), facts)
            if self.store.path is None:
                self.store.catalog.write_to(self.path)
            else:
                Catalog.copy(self.store.path, self.path)

        from_first_rank(self.ranks, write)

    def _claim(self) -> Path:
        output = self.config.output
        if not output.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--run_dir is needed with --max_restarts: a restart must find it again")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(output.run_dir or f"runs/{self.config.data.name}-{stamp}")
        if output.export_root:
            _check_export(Path(output.export_root), path)
        with writing(f"--run_dir {path}"):
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = lock(path / ".lock", wait=False)
            except BlockingIOError as error:
                raise UserError(
                    f"--run_dir {path} is in use by another run: wait for it or choose another "
                    "folder"
                ) from error
        if (path / WEIGHTS).exists():
            raise UserError(f"--run_dir {path} is an exported model: choose another folder")
        if (path / "config.json").exists():
            _check_same_run(self.config, path, self._facts)
        elif any((path / "checkpoints").glob("step-*")):
            raise UserError(
                f"--run_dir {path} has checkpoints, but config.json is missing: restore it, or "
                "choose another folder"
            )
        return path


def _check_export(folder: Path, run_dir: Path) -> None:
    """Check before training that the export after training can be written."""
    if folder.resolve() == run_dir.resolve() or (folder / "checkpoints").exists():
        raise UserError(f"--export_root {folder} is the folder of a run: choose another one")
    with writing(f"--export_root {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _check_same_run(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    if config.output.resume == "never" and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
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
    now = {"seed": config.loader.seed, "mode": sharding.mode}
    now |= {"table_precision": sharding.table_precision}
    for group in ("data", "windows", "mask", "encoder", "head", "negatives"):
        now |= flatten(getattr(config, group))
    # What "auto" stood for: earlier versions had another optimizer on CPU.
    execution = recorded.get("execution")
    if isinstance(execution, dict) and "table_optimizer" in execution:
        before["embedding_optimizer"] = execution["table_optimizer"]
        now["embedding_optimizer"] = table_optimizer(sharding)
    for name in now:
        if name not in ("cache_dir", "dataset_path") and before.get(name, now[name]) != now[name]:
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


def versions() -> dict[str, str]:
    """Versions of the packages that decide results and speed, and the device's name."""
    found = {name: version(name) for name in _PACKAGES}
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        with suppress(PackageNotFoundError):
            found["fbgemm-gpu"] = version(name)
    found["python"] = sys.version.split()[0]
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def write_config(run_dir: Path, flags: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write config.json: flags, facts of the data and of the execution, versions."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"flags": flags, **facts, "versions": versions(), "command": command}
    write_json(run_dir / "config.json", content)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Read config.json and check its parts."""
    path = run_dir / "config.json"
    try:
        text = path.read_text()
        config = json.loads(text)
        expected = {"flags": dict, "num_items": int, "catalog": str}
        if not isinstance(config, dict) or not expected.keys() <= config.keys():
            raise ValueError("keys are missing")
        for key, kind in expected.items():
            if not isinstance(config[key], kind):
                raise ValueError(f"{key} is {config[key]!r}")
        if config["num_items"] < 1 or "\\u0000" in text:
            raise ValueError("a value in it is impossible")
    except OSError as error:
        raise UserError(
            f"{run_dir} is no run folder: {path.name} cannot be read ({error.strerror}); "
            "give the --run_dir of a training run"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore it") from error
    return config
