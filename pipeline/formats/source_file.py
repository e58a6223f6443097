"""Files of ratings: plain, packed by gzip, bzip2, xz, zstd or lz4, or in a zip archive.

    SourceFile(Path("ratings.csv"))
    SourceFile(Path("ml-1m.zip"), member="ml-1m/ratings.dat")    # streamed, never unpacked to disk

A file's first bytes, not its name, decide how it is unpacked.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.files import size_and_crc32
from pipeline.remote import RemotePath, seekable

# Ratings as text compress to 1/10, at most 1/30; a file with a far higher ratio is no table.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
_BROKEN = (
    OSError,
    HTTPException,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    RuntimeError,
    NotImplementedError,
)
_SMALL = 64 << 20  # bytes of files whose content is part of their stamp: under 0.1 s
_BLOCK = 1 << 20  # bytes decoded at a time
PACKED_NAMES = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
# How a packed file begins, and what unpacks it.
_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda stream: _arrow_unpacks(stream, "zstd"),
    b"\x04\x22\x4d\x18": lambda stream: _arrow_unpacks(stream, "lz4"),
}


# How text in other encodings than UTF-8 begins.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class SourceFile:
    """One file, or one member of a zip archive."""

    path: Path | RemotePath
    member: str = ""
    keys: tuple[tuple[str, str], ...] = ()  # columns by the names of folders (Hive): day=2020-01-31

    @property
    def name(self) -> str:
        """Name of the member or else the file, without ``.gz``; its extension sets the format."""
        return unpacked_name((self.member or self.path.name).rsplit("/", 1)[-1])

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    def stamp(self) -> list[Any]:
        """[path, member, size in bytes, mtime in ns, CRC-32 of a small local file, else None].

        It changes with the file.
        """
        with reading(self):
            status = self.path.stat()
            checksum = None
            if status.st_size <= _SMALL and isinstance(self.path, Path):
                checksum = size_and_crc32(self.path)[1]
        path = str(self.path.resolve())
        return [path, self.member, status.st_size, status.st_mtime_ns, checksum]

    def check_unpacked(self, size: int) -> None:
        """Reject a file with an unpacked size (bytes) far above that of a table of ratings."""
        if size > max(BOMB_BYTES, BOMB_RATIO * self.path.stat().st_size):
            raise UserError(
                f"{self} unpacks to more than {BOMB_RATIO} times its size: it looks like a bomb; "
                "unpack it yourself if it is none"
            )

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The unpacked bytes, of text in UTF-16 as UTF-8.

        A failure to open or, in the block, to read is a `UserError`.
        """
        with reading(self), ExitStack() as stack:
            if self.member:
                archive = stack.enter_context(zipfile.ZipFile(seekable(self.path)))
                stream: Any = stack.enter_context(archive.open(self.member))
            else:
                stream = stack.enter_context(self.path.open("rb"))
            beginning = stream.peek(6)
            for magic, unpack in _UNPACK.items():
                if beginning.startswith(magic):
                    stream = stack.enter_context(unpack(stream))
            beginning = stream.peek(4)
            marks = (mark for mark in _MARKS if beginning.startswith(mark))
            if mark := next(marks, b""):
                stream = io.BufferedReader(_AsUtf8(stream, _MARKS[mark]))
            yield stream


class _AsUtf8(io.RawIOBase):
    """Text of another encoding as a stream of UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._text = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (size := self._text.readinto(buffer)):
            block = self._stream.read(_BLOCK)
            try:
                self._text = io.BytesIO(self._decoder.decode(block, not block).encode())
            except UnicodeDecodeError as error:
                raise EOFError(f"it is no {self._encoding} text, as which it begins") from error
            if not block and not self._text.getbuffer():
                return 0
        return size


def _arrow_unpacks(stream: Any, codec: str) -> Any:
    return io.BufferedReader(pa.CompressedInputStream(stream, codec))


def unpacked_name(name: str) -> str:
    """A file's name without the extension of its packing."""
    ending = next((each for each in PACKED_NAMES if name.lower().endswith(each)), "")
    return name[: len(name) - len(ending)]


@contextmanager
def reading(source: SourceFile | Path | RemotePath) -> Iterator[None]:
    """Turn every failure to read `source` into a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no such file: {source}; check the path") from error
    except KeyError as error:
        raise UserError(f"no such member: {source}") from error
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), "broken")
        if "encrypted" in reason or "decrypt" in reason:  # zipfile's and Arrow's words
            raise UserError(f"{source} is encrypted: decrypt it first") from error
        if isinstance(error, NotImplementedError):
            raise UserError(f"cannot read {source}: {reason}; unpack it yourself") from error
        hint = error.strerror if isinstance(error, OSError) and error.strerror else None
        if isinstance(error, IsADirectoryError):
            hint = "it is a folder; name a file"
        raise UserError(f"cannot read {source}: {hint or f'{reason}; is it complete?'}") from error


def zip_members(path: Path | RemotePath) -> list[str]:
    """Names of the files in a zip archive, except those that macOS adds."""
    with reading(path), zipfile.ZipFile(seekable(path)) as archive:
        files = [info.filename for info in archive.infolist() if not info.is_dir()]
    return [name for name in files if not name.startswith("__MACOSX/")]


def is_zip(path: Path | RemotePath) -> bool:
    with reading(path), path.open("rb") as file:
        return file.read(2) == b"PK"
