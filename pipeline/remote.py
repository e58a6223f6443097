"""Files and folders at URLs, with those methods of `pathlib.Path` that reading needs.

    RemotePath("s3://bucket/events/")        Amazon S3, gs:// Google Cloud Storage: by Arrow
    RemotePath("https://host/clicks.csv")    one file, by urllib
    RemotePath("hf://datasets/a/b/c.csv")    and all others by fsspec, with the package it names

Credentials are found as these libraries find them (environment, configuration, service account).
"""

import email.utils
import io
import posixpath
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from pipeline.errors import UserError, first_remedy

_TIMEOUT_SECONDS = 20
# Google's, also for credentials that are not found: by default Arrow tries for 15 minutes.
_RETRY, _RETRY_SECONDS = "retry_limit_seconds", 30
_HTTP = ("http://", "https://")


def is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL.

    Methods raise OSError, whose text says what failed; a missing package is an OSError too.
    """

    url: str

    @cached_property
    def _found(self) -> tuple[Any, str]:
        """Arrow's file system, and the path in it."""
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

        scheme = self.url.partition("://")[0]
        if scheme in ("s3", "gs", "gcs", "file"):
            try:
                url = self.url
                if scheme in ("gs", "gcs") and _RETRY not in url:
                    url += f"{'&' if '?' in url else '?'}{_RETRY}={_RETRY_SECONDS}"
                return FileSystem.from_uri(url)
            except ValueError as error:  # ArrowInvalid
                raise OSError(22, str(error).splitlines()[0]) from error
        try:
            import fsspec

            system, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise OSError(22, str(error).splitlines()[0]) from error
        return PyFileSystem(FSSpecHandler(system)), path

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(_HTTP)

    @property
    def name(self) -> str:
        return posixpath.basename(self.url.partition("?")[0].rstrip("/"))

    def __str__(self) -> str:
        return re.sub("//[^/@]*@", "//", self.url.partition("?")[0])  # without keys

    def __truediv__(self, name: str) -> "RemotePath":
        path, mark, query = self.url.partition("?")
        return RemotePath(f"{path.rstrip('/')}/{name}{mark}{query}")

    def with_name(self, name: str) -> "RemotePath":
        path, mark, query = self.url.partition("?")
        return RemotePath(f"{posixpath.dirname(path.rstrip('/'))}/{name}{mark}{query}")

    def resolve(self) -> "RemotePath":
        return self

    def stat(self) -> SimpleNamespace:
        """Size in bytes and time of change in ns, 0 where unknown, as ``st_size``, ``st_mtime_ns``.

        Raises:
            FileNotFoundError: there is nothing at the URL.
        """
        if self._is_http:
            try:
                headers = self._request("HEAD").headers
            except FileNotFoundError:
                raise
            except OSError:  # some servers answer GET only
                with self._request("GET") as response:
                    headers = response.headers
            changed = headers.get("Last-Modified")
            time = email.utils.parsedate_to_datetime(changed).timestamp() if changed else 0
            return SimpleNamespace(
                st_size=int(headers.get("Content-Length") or 0), st_mtime_ns=int(time * 10**9)
            )
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(self.url)
        return SimpleNamespace(st_size=info.size or 0, st_mtime_ns=info.mtime_ns or 0)

    def is_file(self) -> bool:
        if self._is_http:
            try:
                self.stat()
            except OSError:
                return False
            return True
        return self._info().type.name == "File"

    def is_dir(self) -> bool:
        return not self._is_http and self._info().type.name == "Directory"

    def files_below(self) -> list[str]:
        """Names of all files in the folder, relative to it."""
        from pyarrow.fs import FileSelector

        system, path = self._found
        found = system.get_file_info(FileSelector(path, recursive=True))
        root = path.strip("/") + "/"
        files = (info.path.lstrip("/") for info in found if info.type.name == "File")
        return [file.removeprefix(root) for file in files]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file's bytes from the beginning, as a buffered stream."""
        assert mode == "rb"
        return io.BufferedReader(_Body(self._request("GET")) if self._is_http else self.seekable())

    def seekable(self) -> Any:
        """A stream that can be read at any place; over HTTP it is a temporary copy."""
        if not self._is_http:
            system, path = self._found
            return system.open_input_file(path)
        copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        try:
            with _Body(self._request("GET")) as body:
                shutil.copyfileobj(body, copy, 1 << 20)
            copy.seek(0)
        except OSError as error:
            copy.close()
            if first := first_remedy(error):
                raise UserError(
                    f"{self.url} cannot be copied to {tempfile.gettempdir()}: {error.strerror}; "
                    f"{first}, or name another folder with the variable TMPDIR"
                ) from error
            raise
        return copy

    def _info(self) -> Any:
        system, path = self._found
        return system.get_file_info(path)

    def _request(self, method: str) -> Any:
        request = urllib.request.Request(self.url, method=method)
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(self.url) from error
            raise OSError(5, f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise OSError(5, str(error.reason)) from error


class _Body(io.RawIOBase):
    """The body of an HTTP response; one that ends early is an error, which urllib does not see."""

    def __init__(self, response: Any) -> None:
        self._response = response
        length = response.headers.get("Content-Length")
        self._left = None if length is None else int(length)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._response.readinto(buffer)
        if self._left is not None:
            self._left -= count
            if not count and len(buffer) and self._left > 0:
                raise EOFError(f"the connection ended {self._left:,} bytes early")
        return count

    def close(self) -> None:
        self._response.close()
        super().close()


def seekable(path: Path | RemotePath) -> Any:
    """What zipfile, Parquet and Arrow open."""
    return path.seekable() if isinstance(path, RemotePath) else path
