"""The manifest of a checkpoint: names, sizes and checksums that prove that it is complete.

{"format": 1, "position": {"step": 1200, "epoch": 3, "sample": 51200, ...},
 "recorded": {"flags": {...}, "versions": {...}}, "world_size": 2,
 "files": {"__0_0.distcp": {"size": 122987, "crc32": 2893481}, ...}, "crc32": 713705}
"""

import json
import zlib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import size_and_crc32, write_json

FORMAT = 1
NAME = "manifest.json"


class DamagedError(Exception):
    """A file of a checkpoint is missing, cut or altered; the message names it."""


def describe_files(folder: Path, pattern: str) -> dict[str, dict[str, int]]:
    """Size and checksum of each file in ``folder`` that matches a glob pattern."""
    return {path.name: _describe(path) for path in sorted(folder.glob(pattern))}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a folder; call it after all other files are written."""
    content = {"format": FORMAT, **content}
    write_json(folder / NAME, {**content, "crc32": _checksum(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone; DamagedError, or UserError if it is of a newer version's format."""
    try:
        content = json.loads((folder / NAME).read_text())
        checksum = content.pop("crc32")
    except OSError as error:
        raise DamagedError(f"{NAME} is missing ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{NAME} is not whole") from error
    if checksum != _checksum(content):
        raise DamagedError(f"{NAME} was altered")
    if (version := content.get("format")) != FORMAT:
        raise UserError(
            f"{folder} has format {version}, this version reads {FORMAT}: use the version that "
            "wrote it"
        )
    if not {"position", "files"} <= content.keys():
        raise DamagedError(f"{NAME} is not whole")
    return content


def verify(folder: Path, part: slice = slice(None)) -> dict[str, Any]:
    """The manifest, after a check of a part of the other files; raises like ``read_manifest``."""
    content = read_manifest(folder)
    for name, expected in sorted(content["files"].items())[part]:
        try:
            found = _describe(folder / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if found["size"] != expected["size"]:
            raise DamagedError(f"{name} has {found['size']} bytes instead of {expected['size']}")
        if found != expected:
            raise DamagedError(f"{name} was altered: its checksum differs")
    return content


def _describe(path: Path) -> dict[str, int]:
    return dict(zip(("size", "crc32"), size_and_crc32(path), strict=True))


def _checksum(content: dict[str, Any]) -> int:
    # Via JSON: a float or key must have the same checksum after it is read back.
    plain = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
