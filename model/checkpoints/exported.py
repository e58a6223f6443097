"""Check and load an exported model (export.py), whole or by the ranks of a sharded one."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torchrec.distributed.types import ShardedTensor

from model.checkpoints.manifest import DamagedError, check_file, describe_files
from model.checkpoints.weights import StoredTensor, check_finite, check_fit, local_parts
from model.checkpoints.weights_file import row_blocks
from pipeline.errors import UserError
from pipeline.files import open_regular, read_json, write_json
from pipeline.preparation.catalog import FILES

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "checksums.json"
_FLOATING = ("F16", "BF16", "F32", "F64")
# Key of the metadata; one, because safetensors writes several in random order.
TIE = "trained"
TIED = ("step", "fingerprint")
SEALED = "sealed"  # in the metadata: there are checksums


def check_exported(folder: Path, config: Mapping[str, Any], plain: nn.Module) -> int | None:
    """Check that exported weights fit ``plain``, which may be on "meta", and config.json.

    Args:
        config: the content of the folder's config.json.

    Returns:
        The training step of the weights; None if an earlier version exported them, without
        checksums.
    """
    with loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        stored = {
            name: StoredTensor(each.get_shape(), each.get_dtype(), each.get_dtype() in _FLOATING)
            for name, each in slices.items()
        }
        check_fit(stored, plain.state_dict())
        tie = json.loads((weights.metadata() or {}).get(TIE, "{}"))
        if unknown := tie.keys() - {*TIED, SEALED}:
            raise ValueError(f"its metadata have {min(unknown)!r}")
        for name in TIED:
            found, wanted = tie.get(name), config.get(name)
            if found != wanted:
                raise ValueError(f"its {name} is {found}, that of {CONFIG} {wanted}")
        if not tie.get(SEALED):
            return None
        check_bytes(folder, CONFIG)
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
            check_bytes(folder, name)
        except (DamagedError, OSError, ValueError) as error:
            again = (
                "export it again" if (folder / WEIGHTS).exists() else "restore it, or train again"
            )
            raise UserError(f"{folder / name} cannot be used ({error}): {again}") from error


def check_bytes(folder: Path, name: str) -> None:
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
        with loading(folder):
            check_bytes(folder, WEIGHTS)
    with loading(folder), safe_open(folder / WEIGHTS, framework="pt") as weights, torch.no_grad():
        loaded = model.state_dict()
        for name, tensor in loaded.items():
            _read(weights.get_slice(name), tensor)
        check_finite(loaded)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn every failure to read a folder's weights into a UserError."""
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
    """Read this rank's part of a stored tensor, in place."""
    for values, offsets in local_parts(tensor):
        cut = zip(offsets[1:], values.shape[1:], strict=True)
        columns = [slice(low, low + width) for low, width in cut]
        for rows in row_blocks(values):
            wanted = slice(offsets[0] + rows.start, offsets[0] + rows.stop)
            values[rows].copy_(stored[(wanted, *columns)])
