"""The folder of a run, locked by one process group at a time.

runs/mine/
    .lock             a word of the run that has locked it; every rank must be able to read it
    config.json       every flag, versions, command: enough to rebuild the model
    catalog.parquet   the items that the model was trained on; users.parquet: the users
    checksums.json    of these two
    checkpoints/      and the files of the log (``model/training/run_log.py``)
"""

import os
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from model.checkpoints.checkpoints import PORTABLE
from model.checkpoints.export import check_target
from model.checkpoints.exported import WEIGHTS, record_catalog
from model.distributed import Ranks, from_first_rank, writing
from model.programs.folder import check_exporters
from model.run.config_file import check_same_run, write_config
from model.settings.config import RunConfig
from model.settings.flags import flatten
from model.settings.protocol import protocol_of
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.times import ItemTimes, TimeSpan
from pipeline.errors import UserError
from pipeline.files import lock, make_folder
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore

LOCK = ".lock"


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
    attributes: ItemAttributes | None = None  # of the items, if the model has any

    def __post_init__(self) -> None:
        self._facts = {
            "num_items": self.store.num_items,
            "num_ratings": len(self.store.items),
            "catalog": self.store.catalog_fingerprint,
            "ratings": self.store.ratings_fingerprint,
        }
        if self.span is not None and self.ranks.is_first:  # which alone writes and compares
            seconds = ItemTimes(self.store).fingerprint()
            self._facts |= {"times": asdict(self.span), "rating_times": seconds}
        if self.attributes is not None:
            mark = self.attributes.fingerprint()
            self._facts |= {"num_attributes": self.attributes.count, "attributes": mark}
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
            with suppress(OSError):  # a full disk did not take the token
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

        @writing(self.path, "--run_dir")
        def write() -> None:
            evaluation = protocol_of(self.config, self.store)
            facts = self._facts | {"execution": execution, "evaluation": evaluation}
            write_config(self.path, flatten(self.config), facts)
            record_catalog(self.path, self._write_catalog)

        from_first_rank(self.ranks, write)

    def _write_catalog(self) -> None:
        # Attributes and recommendations depend on which items are trained on.
        on_validation = self.config.windows.train_on_validation
        if self.store.path is None or on_validation:
            self.store.trained_catalog(on_validation).write_to(self.path)
        else:
            Catalog.copy(self.store.path, self.path, users_folder=self.store.path)

    def _claim(self) -> tuple[Path, str]:
        """The locked folder, and what its lock file holds from now on."""
        output = self.config.output
        if not output.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--run_dir is needed with --max_restarts: a restart must find it again")
        stamp, token = time.strftime("%Y%m%d-%H%M%S"), uuid.uuid4().hex
        path = Path(output.run_dir or f"runs/{self.config.data.name}-{stamp}")
        if output.export_root:
            max_len = self.config.windows.max_len
            check_export("--export_root", Path(output.export_root), path, max_len)
        with writing(path, "--run_dir"):
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
            with writing(f"{path}: {PORTABLE} in it", "--run_dir"):
                check_target(path / PORTABLE)
        return path, token


def check_run_dir(config: RunConfig, ranks: Ranks) -> None:
    """Refuse a --run_dir that these flags do not fit, before data are prepared for it."""
    if config.output.run_dir:
        from_first_rank(ranks, lambda: _check_contents(config, Path(config.output.run_dir), {}))


def _new_folder(wanted: Path) -> Path:
    """Make a folder, of another name if there is one: two runs may start in one second."""
    path, number = wanted, 1
    make_folder(wanted.parent)
    while True:
        with suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")


def check_export(flag: str, folder: Path, run_dir: Path, max_len: int) -> None:
    """Check that the model of a run can be exported into the folder that ``flag`` names."""
    check_exporters()
    if max_len < 2:
        raise UserError(
            f"{flag} {folder}: a model of --max_len 1 reads no history, which an export serves: "
            "train with a larger one"
        )
    with writing(folder, flag):
        for path in (folder, run_dir):
            with suppress(FileNotFoundError):
                path.stat()  # an OSError for a loop of links, at which resolve() is a RuntimeError
        _check_no_root(flag, folder)
        real, run = folder.resolve(), run_dir.resolve()
        if real == run or (real / "checkpoints").exists():
            raise UserError(f"{flag} {folder} is the folder of a run: choose another one")
        if any(_is_of_run(each, run) for each in (real, *real.parents)):
            raise UserError(f"{flag} {folder} is a folder of a run: choose another one")
        if real.name == PORTABLE and (real.parent / "checkpoints").exists() and real.parent != run:
            raise UserError(f"{flag} {folder} is the model of a run: choose another folder")
        check_target(folder)


def _check_no_root(flag: str, folder: Path) -> None:
    real = Path(os.path.realpath(folder))  # resolve() is a RuntimeError at a loop of links
    if real == real.parent:
        raise UserError(f"{flag} {folder} is the root of all files: name a folder in it")


def _is_of_run(folder: Path, run: Path) -> bool:
    """Whether a folder is what a run, perhaps this one, fills with other files than a model's."""
    is_named = folder.name in ("checkpoints", "results")
    return is_named and (folder.parent == run or (folder.parent / "config.json").exists())


def _check_contents(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    with writing(path, "--run_dir"):
        _check_no_root("--run_dir", path)
        is_export, has_config = ((path / name).exists() for name in (WEIGHTS, "config.json"))
        has_checkpoints = any((path / "checkpoints").glob("step-*"))
    if is_export:
        raise UserError(f"--run_dir {path} is an exported model: choose another folder")
    if has_config:
        check_same_run(config, path, facts)
    elif has_checkpoints:
        raise UserError(
            f"--run_dir {path} has checkpoints, but config.json is missing: restore it, or "
            "choose another folder"
        )
