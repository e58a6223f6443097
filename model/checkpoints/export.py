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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from model.bert4rec import BERT4Rec
from model.checkpoints.exported import (
    CHECKSUMS,
    CONFIG,
    SEALED,
    TIE,
    WEIGHTS,
    check_bytes,
    check_catalog,
    loading,
)
from model.checkpoints.manifest import DamagedError, checker, describe_files
from model.checkpoints.safe_reader import SafeReader, stored_weights
from model.checkpoints.weights import check_finite, check_fit
from model.checkpoints.weights_file import AddedRows, Part, WeightsFile, row_blocks
from model.programs.exporters import item_table_name
from model.programs.folder import PROGRAM_FILES, write_programs
from pipeline.batches.attributes import ItemAttributes
from pipeline.errors import UserError, remedy
from pipeline.files import (
    clear,
    make_folder,
    read_json,
    remove_folder,
    sync,
    sync_files,
    write_json,
)
from pipeline.preparation.catalog import FILES, Catalog

_ASIDE = ".export.part"


@dataclass(frozen=True)
class Trained:
    """A model to export.

    Attributes:
        plain: an unsharded model on CPU, without attributes; only its tables may be on "meta".
        weights: a checkpoint, or a folder with an exported model.
        metrics: by split.
        epoch: from 1; 0: not known.
        folder: has the model's config.json and catalog.
        users: has users.parquet, if there is one: a run, also where its model is exported.
        attributes: of the items, if ``weights`` have their rows: exported rows of items are sums.
    """

    plain: BERT4Rec
    weights: Path
    step: int
    metrics: Mapping[str, Any]
    folder: Path
    users: Path
    epoch: int = 0
    attributes: ItemAttributes | None = None


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
            _copy_checkpoint(trained, shapes, file)
        tie["fingerprint"] = file.fingerprint()
        file.replace_metadata(_metadata(tie))
    return tie


def _metadata(tie: Mapping[str, Any]) -> dict[str, str]:
    return {TIE: json.dumps({**tie, SEALED: True})}


def _copy_checkpoint(
    trained: Trained, shapes: Mapping[str, torch.Tensor], file: WeightsFile
) -> None:
    """Copy the weights of a checkpoint; attributes' rows are added to those of their items."""
    checkpoint, sums, stored_shapes = trained.weights, None, dict(shapes)
    if trained.attributes is not None:
        name = item_table_name(trained.plain)
        sums = AddedRows(name, shapes[name], trained.attributes)
        stored_shapes[name] = sums.stored

    def checked(part: Part) -> None:
        check_finite({part.name: part.values})
        part = part if sums is None else sums.without_attributes(part)
        if len(part.values):
            file.put(part)

    try:
        reader, check = SafeReader(checkpoint), checker(checkpoint)
        check(".metadata")
        check_fit(stored_weights(reader.index), stored_shapes)
        reader.copy_parts(checked, check)
        if sums is not None:
            file.change(sums.name, sums.add)
    except (DamagedError, ValueError) as error:
        raise UserError(
            f"{checkpoint} cannot be exported: {error}; go on with training by --resume auto, or "
            "restore it"
        ) from error


def _exported_parts(folder: Path, shapes: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    if (folder / CHECKSUMS).exists():
        with loading(folder):
            check_bytes(folder, WEIGHTS)
    with loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights:
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
