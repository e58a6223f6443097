"""Files and folders that are complete or absent, even if their writing is interrupted.

    with whole_file(path, "w") as file:      written as runs/mine/config.json.part
        file.write(text)                     fsync, rename to config.json, fsync of runs/mine
    with whole_folder(path) as aside:        written as stores/.ml-1m.part/
        ...                                  fsync of all, rename to ml-1m, fsync of stores

A process that is killed leaves `.part` and `.old` names behind; the next writer removes them.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.errors import warn

_BLOCK = 1 << 20  # bytes
_JSON_BYTES = 1 << 26  # the manifest of 100,000 ranks has a tenth
# Network drives may not offer locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file open for writing that becomes `path`, unless the block raises; then it is removed."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a killed writer's, or a pipe, whose opening would wait
    with part.open(mode) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync(path.parent)


def check_writable(path: Path) -> None:
    """Make and remove the part of a file that `whole_file` will write; OSError if that fails."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder: name a file in it", str(path))
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a pipe, whose opening would wait, or a link to a file
    part.open("wb").close()
    part.unlink()


def write_text(path: Path, text: str) -> None:
    with whole_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading; an OSError for a pipe or device, which may have no end."""
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or device", str(path))
    return file


def read_json(path: Path) -> Any:
    """The value in a JSON file; OSError if it cannot be read, ValueError if it is no such file."""
    with open_regular(path) as file:
        content = file.read(_JSON_BYTES + 1) or b""  # None in /proc, where a read would wait
    if len(content) > _JSON_BYTES:
        raise ValueError(f"larger than {_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing; OSError with the real cause."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        there = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if there.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
        if there.is_symlink():
            missing = f"{there} is a link to {there.readlink()}, which is missing"
            raise FileNotFoundError(errno.ENOENT, missing, path) from error
        raise


def clear(path: Path) -> None:
    """Delete what has this name, if possible; rmtree alone would wait for ever at a pipe."""
    with suppress(OSError):  # a folder, or nothing
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def aside_of(folder: Path) -> Path:
    """The path of `folder` while it is written."""
    return folder.with_name(f".{folder.name}.part")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder`, unless the block raises; one process at a time."""
    aside = aside_of(folder)
    clear(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_files(aside)
        publish(aside, folder)
    finally:
        clear(aside)


def publish(aside: Path, folder: Path) -> None:
    """Rename `aside`, whose files are synced, to `folder`; delete the previous `folder`."""
    sync(aside)
    old = _move_away(folder) if folder.exists() else None
    aside.rename(folder)
    sync(folder.parent)
    if old is not None:
        clear(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder if possible; a half-deleted one does not keep its name."""
    with suppress(OSError):
        clear(_move_away(folder))


def remove_old(folder: Path) -> None:
    """Delete what a writer that was killed after `publish` has left of the previous `folder`."""
    clear(_old_of(folder))


def remove_leftovers(parent: Path) -> None:
    """Delete what killed writers in `parent` did not finish."""
    for leftover in (*parent.glob(".*.part"), *parent.glob(".*.old")):
        clear(leftover)


def _move_away(folder: Path) -> Path:
    old = _old_of(folder)
    clear(old)
    return folder.rename(old)


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        sync(path)


def size_and_crc32(path: Path) -> tuple[int, int]:
    """A file's size in bytes and CRC-32, which finds damage by faulty storage, not forgery."""
    size = checksum = 0
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def lock(path: Path, wait: bool = True) -> IO[str]:
    """Hold the exclusive lock of the lock file `path` until the returned file is closed.

    Raises BlockingIOError if another process holds it and `wait` is False. The lock file stays: if
    it were deleted, two processes could lock two files of the same name. A file system without
    locks is a warning.
    """
    # Its holder may write into it: not through a link to another file.
    file = open(path, "a", opener=lambda name, to: _open_at_once(name, to | os.O_NOFOLLOW))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            warn(
                f"{path} cannot be locked ({error.strerror}): let no other run use {path.parent} "
                "at the same time"
            )
            return file
        file.close()
        raise
    return file
