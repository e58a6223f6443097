"""The folder of one run, held by one run at a time: config.json, catalog, logs, checkpoints.

folder = RunFolder(config, ranks, store)     refuses another run's folder, resumes this run's
folder.record(config)                        config.json and the catalog
"""

import os
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from model.checkpoints.export import WEIGHTS
from model.distributed import Ranks, from_first_rank
from model.run.config import RunConfig
from model.run.flags import flatten
from model.training.run_log import read_config, write_config
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore


class RunFolder:
    """The folder of one run, held by one run at a time.

    Args:
        config: its ``--run_dir``, or ``runs/<data set>-<date>-<time>``.
        store: its data, which a resumed run must have been trained on.

    Raises:
        UserError: another run holds it, it cannot be written, or it has a run already and
            ``--resume auto`` was not given or was given with flags or data that make it another.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, store: SequenceStore) -> None:
        self._lock: IO[str] | None = None
        self._ranks, self._store = ranks, store
        self._facts = {
            "num_items": store.num_items,
            "num_ratings": len(store.items),
            "catalog": store.catalog_fingerprint,
        }
        self.path = from_first_rank(ranks, lambda: self._claim(config))

    def record(self, config: RunConfig) -> None:
        """Write config.json and the catalog.

        Raises:
            UserError: (on all ranks) they cannot be written.
        """
        from_first_rank(self._ranks, lambda: self._record(config))

    def _record(self, config: RunConfig) -> None:
        try:
            write_config(self.path, flatten(config), self._facts)
            if self._store.path is None:
                self._store.catalog.write_to(self.path)
            else:
                Catalog.copy(self._store.path, self.path)
        except OSError as error:
            raise _unwritable("--run_dir", self.path, error) from error

    def _claim(self, config: RunConfig) -> Path:
        if not config.output.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--run_dir is needed with --max_restarts: a restart must find it again")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(config.output.run_dir or f"runs/{config.data.name}-{stamp}")
        if config.output.export_root:
            _check_export(Path(config.output.export_root), path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path / ".lock", wait=False)
        except BlockingIOError as error:
            raise UserError(
                f"--run_dir {path} is in use by another run: wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise _unwritable("--run_dir", path, error) from error
        if (path / WEIGHTS).exists():
            raise UserError(f"--run_dir {path} is an exported model: choose another folder")
        if (path / "config.json").exists():
            _check_same_run(config, path, self._facts)
        elif any((path / "checkpoints").glob("step-*")):
            raise UserError(
                f"--run_dir {path} has checkpoints, but config.json is missing: restore it, or "
                "choose another folder"
            )
        return path


def _unwritable(flag: str, folder: Path, error: OSError) -> UserError:
    return UserError(f"{flag} {folder} cannot be written: {error.strerror or error}")


def _check_export(folder: Path, run_dir: Path) -> None:
    """Find out before training, not after it."""
    if folder.resolve() == run_dir.resolve() or (folder / "checkpoints").exists():
        raise UserError(f"--export_root {folder} is the folder of a run: choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable("--export_root", folder, error) from error


def _check_same_run(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    if config.output.resume == "never" and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError(
            f"--run_dir {path} already holds a run: go on with it by --resume auto, or choose "
            "another folder"
        )
    recorded = read_config(path)
    before = recorded["flags"]
    groups = (
        config.data,
        config.windows,
        config.mask,
        config.encoder,
        config.head,
        config.negatives,
    )
    now = {name: value for group in groups for name, value in flatten(group).items()}
    now["seed"] = config.loader.seed
    now["table_precision"] = config.sharding.table_precision
    for name in now.keys() - {"cache_dir", "dataset_path"}:
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
