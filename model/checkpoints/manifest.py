"""The manifest of a checkpoint: names, sizes and checksums that prove that it is complete.

{"format": 1, "position": {"step": 1200, "epoch": 3, "sample": 51200, ...},
 "recorded": {"flags": {...}, "versions": {...}}, "world_size": 2,
 "files": {"__0_0.distcp": {"size": 122987, "crc32": 2893481}, ...}, "crc32": 713705}
"""

import dataclasses
import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoints.position import Position
from pipeline.errors import UserError
from pipeline.files import open_regular, read_json, size_and_crc32, write_json

FORMAT = 1
NAME = "manifest.json"
# Private: DCP's file names. With no other, a manifest cannot name a file outside of its folder.
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_ABOUT = ("size", "crc32")
_END = 1 << 63  # of positions


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
        content = read_json(folder / NAME)
        altered = content.pop("crc32") != _checksum(content)
    except OSError as error:
        raise DamagedError(f"{NAME} is missing ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{NAME} is not whole") from error
    if altered:
        raise DamagedError(f"{NAME} was altered")
    if (version := content.get("format")) != FORMAT:
        raise UserError(
            f"{folder} has format {version}, this version reads {FORMAT}: use the version that "
            "wrote it"
        )
    if not all(isinstance(content.get(part), dict) for part in ("position", "files")):
        raise DamagedError(f"{NAME} is not whole")
    for name, about in content["files"].items():
        if name != ".metadata" and not DATA_FILE.fullmatch(name):
            raise DamagedError(
                f"{NAME} lists {reprlib.repr(name)}, which is no file of a checkpoint"
            )
        if not isinstance(about, dict) or [*map(type, map(about.get, _ABOUT))] != [int, int]:
            raise DamagedError(f"{NAME} has no size and checksum of {name}")
    return content


def position_of(content: dict[str, Any]) -> Position:
    """The position in a manifest; DamagedError if it is none."""
    try:
        position = Position(**content["position"])
    except TypeError as error:
        raise DamagedError(f"its position is invalid ({error})") from error
    for entry in dataclasses.fields(Position):
        value, kind = getattr(position, entry.name), type(entry.default)
        # JSON may write a float as an int.
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or not -1 <= value < _END or (kind is int and value < 0):
            raise DamagedError(f"its position is invalid ({entry.name} is {reprlib.repr(value)})")
    return position


def verify(folder: Path, part: slice = slice(None)) -> dict[str, Any]:
    """The manifest, after a check of a part of the other files; raises like ``read_manifest``."""
    content = read_manifest(folder)
    for name, expected in sorted(content["files"].items())[part]:
        check_file(folder, name, expected)
    return content


def checker(folder: Path) -> Callable[[str], None]:
    """What checks one file of a checkpoint by its name; both raise like ``read_manifest``."""
    files = read_manifest(folder)["files"]

    def check(name: str) -> None:
        if name not in files:
            raise DamagedError(f"{NAME} does not list {name}")
        check_file(folder, name, files[name])

    return check


def check_file(folder: Path, name: str, expected: Mapping[str, int]) -> None:
    """DamagedError unless a file of ``folder`` is as :func:`describe_files` found it."""
    check_size(folder, name, expected["size"])
    try:
        found = _describe(folder / name)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
    if found != {key: expected[key] for key in _ABOUT}:
        raise DamagedError(f"{name} was altered: its checksum differs")


def check_size(folder: Path, name: str, expected: int) -> None:
    """DamagedError unless ``folder`` has a regular file of this size."""
    try:
        with open_regular(folder / name) as file:
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
    if found != expected:
        raise DamagedError(f"{name} has {found} bytes instead of {expected}")


def _describe(path: Path) -> dict[str, int]:
    return dict(zip(_ABOUT, size_and_crc32(path), strict=True))


def _checksum(content: dict[str, Any]) -> int:
    # Via JSON: a float or key must have the same checksum after it is read back.
    plain = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
