"""Files at URLs: an HTTP server on this machine, and fsspec's file system in memory."""

import errno
import gzip
import io
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.preparation.prepare import build
from pipeline.remote import RemotePath
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve

fsspec = pytest.importorskip("fsspec")  # torch requires it
CSV = b"user,item,time\nu,a,3\nu,b,1\nu,c,2\n"
HISTORY = ["b", "c", "a"]
TABLE = pa.table({"user": ["u"] * 3, "item": ["a", "b", "c"], "time": [3, 1, 2]})


def parquet(table: pa.Table = TABLE) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def arrow(table: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("ratings.csv", content)
    return stream.getvalue()


FILES = {
    "r.csv": CSV,
    "r.csv.gz": gzip.compress(CSV),
    "r.parquet": parquet(),
    "r.arrow": arrow(),
    "r.zip": zipped(CSV),
    "r.jsonl": b"".join(
        b'{"user":"u","item":"%c","time":%d}\n' % each
        for each in zip(b"abc", (3, 1, 2), strict=True)
    ),
}


class Handler(BaseHTTPRequestHandler):
    def answer(self, has_body: bool) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        content = FILES.get(name.removeprefix("short-"))
        if content is None:
            self.send_error(403 if "secret" in name else 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content[:-5] if name.startswith("short-") else content)

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def history(path: str, **flags: str) -> list[str]:
    config = DataConfig(dataset_path=path, min_user_count=0, cache_dir="/nowhere", **flags)
    store = build(resolve(config), config)
    return [store.catalog.item_id(item) for item in store.items.tolist()]


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_over_http(url: str, name: str) -> None:
    assert history(f"{url}/{name}?signature=x") == HISTORY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "no such file: http://127.0.0.1:PORT/none.csv; check the path"),
        ("secret.csv", "cannot read http://127.0.0.1:PORT/secret.csv: HTTP 403 Forbidden"),
        ("short-r.csv", "cannot read http://127.0.0.1:PORT/short-r.csv: the connection ended 5 by"),
        ("short-r.parquet", "cannot read http://127.0.0.1:PORT/short-r.parquet: the connection"),
    ],
)
def test_http_mistakes(url: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        history(f"{url}/{name}?key=secret")
    port = url.rpartition(":")[2]
    assert str(caught.value).startswith(message.replace("PORT", port))
    assert "key=secret" not in str(caught.value)


def test_a_copy_that_finds_no_room(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError) as caught:
        history(f"{url}/r.parquet")
    assert str(caught.value) == (
        f"{url}/r.parquet cannot be copied to {tempfile.gettempdir()}: No space left on device; "
        "make room, or name another folder with the variable TMPDIR"
    )


def test_a_server_that_refuses_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read http://127\.0\.0\.1:1/r\.csv: .*refused"):
        history("http://127.0.0.1:1/r.csv")


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_memory(name: str) -> None:
    with fsspec.open(f"memory://files/{name}", "wb") as file:
        file.write(FILES[name])
    assert history(f"memory://files/{name}") == HISTORY


def test_a_folder_in_memory() -> None:
    for at, kind in ((9, "x"), (10, "y"), (1, "x")):
        path = f"memory://events/day={at}/kind={kind}/part-{at}.csv"
        with fsspec.open(path, "w") as file:
            file.write(f"user,item\nu,i{at}\nu,j{at}\nu,k{at}\n")
    with fsspec.open("memory://events/_SUCCESS", "w"):
        pass
    items = [f"{letter}{at}" for at in (1, 9) for letter in "ijk"]
    assert history("memory://events", where="kind == 'x'") == items
    with pytest.raises(UserError, match=r"no such file: memory://nothing"):
        history("memory://nothing")


def test_unknown_places() -> None:
    with pytest.raises(UserError, match="cannot read nowhere://x: Protocol not known: nowhere"):
        history("nowhere://x")


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("gs://bucket/events/", "gs://bucket/events/?retry_limit_seconds=30"),
        ("gs://bucket/x?scheme=http", "gs://bucket/x?scheme=http&retry_limit_seconds=30"),
        ("gs://bucket/x?retry_limit_seconds=7", "gs://bucket/x?retry_limit_seconds=7"),
        ("s3://bucket/events/", "s3://bucket/events/"),
    ],
)
def test_google_storage_is_not_tried_for_a_quarter_of_an_hour(
    monkeypatch: pytest.MonkeyPatch, url: str, asked: str
) -> None:
    system = SimpleNamespace(from_uri=lambda url: (None, url))
    monkeypatch.setattr("pyarrow.fs.FileSystem", system)
    assert RemotePath(url)._found == (None, asked)
