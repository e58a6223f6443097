"""How much of the ratings preparation holds in memory, and the files that hold the rest.

    memory = Memory(limit=1 << 29, folder=Path("~/.cache/bert4rec").expanduser())
    file = memory.file()
    place = file.write(array)
    file.read(place, array.dtype, len(array))

The files have no names: their space is free again when they are closed or when the process ends,
however it ends.
"""

import errno
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError, say
from pipeline.files import make_folder

GIB = 1 << 30
# Sorting takes about four times the bytes of the ratings that it sorts, and several stages hold
# ratings at the same time: measured with 20 and 200 million ratings (benchmarks/data.py).
_HELD_SHARE = 10
_SAID_EVERY = 2 * GIB  # bytes written between two lines on the progress
_BLOCK = 1 << 22  # elements that `blocks` yields at a time
_CGROUP = Path("/sys/fs/cgroup")


class Memory:
    """A bound for the ratings that a stage holds in memory, and the folder of the rest.

    Args:
        limit: bytes of ratings that one stage may hold; without one all are in memory.
        folder: made when it is first needed.
    """

    def __init__(self, limit: float = math.inf, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
        self.written = self.on_disk = self._said = 0

    @classmethod
    def of(cls, memory_gb: float | None, folder: Path) -> "Memory":
        """--memory_gb, by default half of what the machine has."""
        total = machine_bytes() / 2 if memory_gb is None else memory_gb * GIB
        return cls(total / _HELD_SHARE, folder)

    def file(self) -> "SpillFile":
        pa.default_memory_pool().release_unused()  # else what Arrow has freed counts, too
        return SpillFile(self)

    def count(self, size: int) -> None:
        """Count bytes that were written (or, below 0, freed); say from time to time how many."""
        self.on_disk += size
        self.written += max(size, 0)
        if self.written >= self._said:
            assert self.folder is not None
            if not self._said:
                say(
                    "--memory_gb is less than the ratings take: the rest is in "
                    f"{self.folder} until they are prepared",
                    sys.stderr,
                )
            self._said = self.written + _SAID_EVERY
            free = shutil.disk_usage(self.folder).free
            say(
                f"on disk: {self.on_disk / 1e9:.1f} GB, free: {free / 1e9:.1f} GB, written so far: "
                f"{self.written / 1e9:.1f} GB",
                sys.stderr,
            )


class SpillFile:
    """Arrays in a file without a name."""

    def __init__(self, memory: Memory) -> None:
        assert memory.folder is not None
        self._memory, self._size = memory, 0
        try:
            make_folder(memory.folder)
            self._file = tempfile.TemporaryFile(dir=memory.folder)  # noqa: SIM115
        except OSError as error:
            raise _no_room(memory.folder, error) from error

    def write(self, array: np.ndarray) -> int:
        """Write an array; returns its place, the number of its first byte."""
        place = self._size
        try:
            self._file.seek(place)
            self._file.write(np.ascontiguousarray(array).data)
        except OSError as error:
            assert self._memory.folder is not None
            raise _no_room(self._memory.folder, error) from error
        self._size += array.nbytes
        self._memory.count(array.nbytes)
        return place

    def read(self, place: int, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` elements from the byte `place` on."""
        array = np.empty(count, dtype)
        self._file.seek(place)
        read = self._file.readinto(array.view(np.uint8).data)
        assert read == array.nbytes
        return array

    def mapped(self, dtype: np.dtype) -> np.ndarray:
        """The whole file as one read-only array, memory-mapped; it outlives this object."""
        self._file.flush()
        return np.memmap(self._file, dtype, "r")

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._memory.count(-self._size)


def _no_room(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some or " * full + "name another folder with --cache_dir, or raise --memory_gb"
    return UserError(f"cannot keep ratings in {folder} while they are prepared: {reason}; {advice}")


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of parts of arrays of one length; of mapped ones only the current part is resident."""
    for start in range(0, len(arrays[0]), _BLOCK):
        yield tuple(array[start : start + _BLOCK] for array in arrays)
        for array in arrays:
            release(array)


def release(array: np.ndarray) -> None:
    """Let go of the pages of a mapped array; they are read again when needed."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def machine_bytes() -> int:
    """Memory of the machine, or of the control group (container) if that has less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _limit_files():
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return min(found)


def _limit_files() -> Iterator[Path]:
    """The files that may hold limits: of the process's groups and those that they are in."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, kinds, group = line.split(":", 2)
        if kinds in ("", "memory"):  # versions 2 and 1
            name = "memory.limit_in_bytes" if kinds else "memory.max"
            inside = _CGROUP / kinds / group.lstrip("/")
            yield from (each / name for each in (inside, *inside.parents))
