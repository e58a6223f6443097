"""The trained model as safetensors: no pickle, no sharding, no optimizer state.

exported/
    model.safetensors    all weights, under the names of the plain BERT4Rec
    config.json          flags, number of items, catalog fingerprint, versions, test metrics
    catalog.parquet      original id and title of each item
    users.parquet        original ids of the users, only with --with_users
    model.onnx ...       what serves it, if asked for (model/programs)
    checksums.json       size and CRC-32 of each of these files; whatever reads one checks it

A folder holds a model once it holds model.safetensors, which is removed first and written last. Its
metadata and config.json name the same step and fingerprint of the weights.
"""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor  # Private: TorchRec's shards

from model.bert4rec import BERT4Rec
from model.checkpoints.manifest import (
    DamagedError,
    check_file,
    checker,
    describe_files,
)
from model.checkpoints.safe_reader import SafeReader, stored_weights
from model.checkpoints.weights import StoredTensor, check_finite, check_fit
from model.checkpoints.weights_file import Part, WeightsFile, row_blocks
from model.programs.folder import PROGRAM_FILES, write_programs
from pipeline.errors import UserError, remedy
from pipeline.files import (
    clear,
    make_folder,
    open_regular,
    read_json,
    remove_folder,
    sync,
    sync_files,
    write_json,
)
from pipeline.preparation.catalog import FILES, Catalog

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "checksums.json"
_FLOATING = ("F16", "BF16", "F32", "F64")
_ASIDE = ".export.part"
# Key of the metadata; one, because safetensors writes several in random order.
_TIE = "trained"
_TIED = ("step", "fingerprint")
_SEALED = "sealed"  # in the metadata: there are checksums


@dataclass(frozen=True)
class Trained:
    """A model to export.

    Attributes:
        plain: an unsharded model on CPU; only its tables may be on "meta".
        weights: a checkpoint, or a folder with an exported model.
        metrics: by split.
        epoch: from 1; 0: not known.
        folder: has the model's config.json and catalog.
        users: has users.parquet, if there is one: a run, also where its model is exported.
    """

    plain: BERT4Rec
    weights: Path
    step: int
    metrics: Mapping[str, Any]
    folder: Path
    users: Path
    epoch: int = 0


def export(trained: Trained, folder: Path, with_users: bool, with_programs: bool) -> None:
    """Export a model into ``folder``; called on one rank.

    If it is interrupted, the folder holds its old model, the new one or none. Weights are copied
    part by part: a part is what one rank has stored, or a block of an exported file.

    Args:
        with_programs: write also what serves the model.

    Raises:
        UserError: a file cannot be written, the weights are not those of ``trained.plain``, or not
            finite.
    """
    try:
        with _aside(folder) as aside:
            config = read_json(trained.folder / CONFIG)
            for each in {trained.folder, trained.users}:
                check_catalog(each)
            catalog = Catalog.read(trained.folder, config.get("catalog", ""))
            config |= _copy_weights(trained, aside) | {"metrics": trained.metrics}
            if trained.epoch:
                config["epoch"] = trained.epoch
            Catalog.copy(trained.folder, aside, trained.users if with_users else None)
            if with_programs:
                with safe_open(aside / WEIGHTS, framework="pt") as file:
                    # Tensors that are mapped: the table is read from disk as far as it is used.
                    mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                trained.plain.load_state_dict(mapped, assign=True)
                write_programs(trained.plain, catalog, aside, WEIGHTS)
            write_json(aside / CONFIG, config)
            write_json(aside / CHECKSUMS, describe_files(aside, "*"))
            sync_files(aside)
            _replace(folder, aside)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}; "
            + remedy(error, f"python export.py --checkpoint {trained.users} --output {folder}")
        ) from error


def check_target(folder: Path) -> None:
    """Write and remove files as :func:`export` will; OSError if that fails."""
    with _aside(folder) as aside:
        (aside / WEIGHTS).write_bytes(b"probe")
        probe = (aside / WEIGHTS).replace(folder / f"{_ASIDE}.probe")
        probe.unlink()
        sync(folder)
    for name in (WEIGHTS, CONFIG, CHECKSUMS, *FILES, *PROGRAM_FILES):
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} in it is a folder")


def remove_export(folder: Path) -> None:
    """Delete an export if possible; without its weights, the rest of it is none."""
    with suppress(OSError):
        (folder / WEIGHTS).unlink()
    remove_folder(folder)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, which may be a mount point: a rename cannot enter another one."""
    aside = folder / _ASIDE
    make_folder(folder)
    clear(aside)
    aside.mkdir()
    try:
        yield aside
    finally:
        clear(aside)


def _copy_weights(trained: Trained, folder: Path) -> dict[str, Any]:
    """Write the weights; what ties config.json to them."""
    shapes = trained.plain.state_dict()
    tie = {"step": trained.step, "fingerprint": "0" * 16}
    with WeightsFile(folder / WEIGHTS, shapes, _metadata(tie)) as file:
        if (trained.weights / WEIGHTS).exists():
            for part in _exported_parts(trained.weights, shapes):
                file.put(part)
        else:
            _copy_checkpoint(trained.weights, shapes, file.put)
        tie["fingerprint"] = file.fingerprint()
        file.replace_metadata(_metadata(tie))
    return tie


def _metadata(tie: Mapping[str, Any]) -> dict[str, str]:
    return {_TIE: json.dumps({**tie, _SEALED: True})}


def _copy_checkpoint(
    checkpoint: Path, shapes: Mapping[str, torch.Tensor], put: Callable[[Part], None]
) -> None:
    def checked(part: Part) -> None:
        check_finite({part.name: part.values})
        put(part)

    try:
        reader, check = SafeReader(checkpoint), checker(checkpoint)
        check(".metadata")
        check_fit(stored_weights(reader.index), shapes)
        reader.copy_parts(checked, check)
    except (DamagedError, ValueError) as error:
        raise UserError(
            f"{checkpoint} cannot be exported: {error}; go on with training by --resume auto, or "
            "restore it"
        ) from error


def _exported_parts(folder: Path, shapes: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    if (folder / CHECKSUMS).exists():
        with _loading(folder):
            _check_bytes(folder, WEIGHTS)
    with _loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name, whole in shapes.items():
            stored = weights.get_slice(name)
            for rows in row_blocks(whole):
                values = stored[rows]
                check_finite({name: values})
                yield Part(name, (rows.start, 0)[: whole.dim()], values)


def _replace(folder: Path, aside: Path) -> None:
    """Move the files of ``aside`` into ``folder``; the weights are absent in between."""
    held_model = any((folder / name).exists() for name in (WEIGHTS, CONFIG))
    (folder / WEIGHTS).unlink(missing_ok=True)
    sync(folder)
    if held_model:
        outdated = (folder / name for name in (FILES[1], *PROGRAM_FILES))
        for path in (*outdated, *folder.glob("eval_*.json")):
            path.unlink(missing_ok=True)
    for path in aside.iterdir():
        if path.name != WEIGHTS:
            path.replace(folder / path.name)
    sync(folder)
    (aside / WEIGHTS).replace(folder / WEIGHTS)
    sync(folder)
    with suppress(OSError):  # only needed if ``folder`` is new; a parent may be unreadable
        sync(folder.parent)


def check_exported(folder: Path, config: Mapping[str, Any], plain: nn.Module) -> int | None:
    """Check that exported weights fit ``plain``, which may be on "meta", and config.json.

    Args:
        config: the content of the folder's config.json.

    Returns:
        The training step of the weights; None if an earlier version exported them, without
        checksums.
    """
    with _loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        stored = {
            name: StoredTensor(each.get_shape(), each.get_dtype(), each.get_dtype() in _FLOATING)
            for name, each in slices.items()
        }
        check_fit(stored, plain.state_dict())
        tie = json.loads((weights.metadata() or {}).get(_TIE, "{}"))
        if unknown := tie.keys() - {*_TIED, _SEALED}:
            raise ValueError(f"its metadata have {min(unknown)!r}")
        for name in _TIED:
            found, wanted = tie.get(name), config.get(name)
            if found != wanted:
                raise ValueError(f"its {name} is {found}, that of {CONFIG} {wanted}")
        if not tie.get(_SEALED):
            return None
        _check_bytes(folder, CONFIG)
        return tie["step"]


def record_catalog(folder: Path, write: Callable[[], None]) -> None:
    """Write the catalog of a run by ``write``, and its checksums; without these while it changes.

    Raises:
        OSError: it cannot be written.
    """
    (folder / CHECKSUMS).unlink(missing_ok=True)
    write()
    write_json(folder / CHECKSUMS, describe_files(folder, "*.parquet"))


def check_catalog(folder: Path) -> None:
    """UserError if the catalog of a run or an export was altered; none of an earlier version's."""
    if not (folder / CHECKSUMS).exists():
        return
    for name in (each for each in FILES if (folder / each).exists()):
        try:
            _check_bytes(folder, name)
        except (DamagedError, OSError, ValueError) as error:
            again = (
                "export it again" if (folder / WEIGHTS).exists() else "restore it, or train again"
            )
            raise UserError(f"{folder / name} cannot be used ({error}): {again}") from error


def _check_bytes(folder: Path, name: str) -> None:
    """DamagedError, OSError or ValueError unless a file of an export has its checksum."""
    checksums = read_json(folder / CHECKSUMS)
    try:
        check_file(folder, name, checksums[name])
    except (LookupError, TypeError) as error:
        raise ValueError(f"{CHECKSUMS} does not have {name}") from error


def load_exported(folder: Path, model: nn.Module, checks_bytes: bool = True) -> None:
    """Load checked weights into a model, plain or sharded; each rank reads only its own rows.

    A UserError may be raised on some ranks only.

    Args:
        checks_bytes: read the whole file first; one rank of each host does.
    """
    if checks_bytes and (folder / CHECKSUMS).exists():
        with _loading(folder):
            _check_bytes(folder, WEIGHTS)
    with _loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights, torch.no_grad():
        loaded = model.state_dict()
        for name, tensor in loaded.items():
            _read(weights.get_slice(name), tensor)
        check_finite(loaded)


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    path = folder / WEIGHTS
    try:
        open_regular(path).close()
        yield
    except Exception as error:  # of safetensors: any
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UserError(
            f"{path} cannot be loaded ({reason.splitlines()[-1].strip()}): its {CONFIG} belongs to "
            "another model, or it is damaged; export it again"
        ) from error


def _read(stored: Any, tensor: torch.Tensor | ShardedTensor) -> None:
    parts = [(tensor, [0] * tensor.dim())]
    if isinstance(tensor, ShardedTensor):
        parts = [(each.tensor, each.metadata.shard_offsets) for each in tensor.local_shards()]
    for values, offsets in parts:
        cut = zip(offsets[1:], values.shape[1:], strict=True)
        columns = [slice(low, low + width) for low, width in cut]
        for rows in row_blocks(values):
            wanted = slice(offsets[0] + rows.start, offsets[0] + rows.stop)
            values[rows].copy_(stored[(wanted, *columns)])
