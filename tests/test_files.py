"""Files and folders are complete or absent after any interruption; locks are exclusive."""

import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_process(work: Callable[[Path], None], path: Path) -> int:
    process = multiprocessing.get_context("fork").Process(target=work, args=(path,))
    process.start()
    process.join(20)
    return process.exitcode


def test_written_files_have_the_content_and_no_other_name(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "first\n")
    files.write_text(tmp_path / "a.txt", "second\n")
    files.write_json(tmp_path / "b.json", {"step": 3, "best": [0.5, None]})
    assert (tmp_path / "a.txt").read_text() == "second\n"
    assert json.loads((tmp_path / "b.json").read_text()) == {"step": 3, "best": [0.5, None]}
    assert names(tmp_path) == ["a.txt", "b.json"]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ValueError, match="bad"), files.whole_file(path, "w") as file:
        file.write("new")
        raise ValueError("bad")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def _die_in_file(path: Path) -> None:
    with files.whole_file(path, "w") as file:
        file.write("half")
        file.flush()
        os._exit(9)


def test_a_killed_writer_of_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    assert in_a_process(_die_in_file, path) == 9
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt", "a.txt.part"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def fill(folder: Path, text: str) -> None:
    with files.whole_folder(folder) as aside:
        (aside / "x").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "s"
    fill(folder, "old")
    (folder / "only in the old one").touch()
    fill(folder, "new")
    assert names(folder) == ["x"] and (folder / "x").read_text() == "new"
    assert names(folder.parent) == ["s"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "s", "old")
    with pytest.raises(ValueError, match="bad"), files.whole_folder(tmp_path / "s") as aside:
        (aside / "x").write_text("new")
        raise ValueError("bad")
    assert (tmp_path / "s" / "x").read_text() == "old" and names(tmp_path) == ["s"]


def _die_in_folder(folder: Path) -> None:
    with files.whole_folder(folder) as aside:
        (aside / "left over").write_text("half")
        os._exit(9)


def test_a_killed_writer_of_a_folder_leaves_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "s", "old")
    assert in_a_process(_die_in_folder, tmp_path / "s") == 9
    assert (tmp_path / "s" / "x").read_text() == "old" and names(tmp_path) == [".s.part", "s"]
    fill(tmp_path / "s", "new")
    assert names(tmp_path / "s") == ["x"] and names(tmp_path) == ["s"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.part", ".b.old", "c.part", ".lock", "d"):
        (tmp_path / name).mkdir()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "c.part", "d"]
    files.remove_folder(tmp_path / "d")
    files.remove_folder(tmp_path / "absent")
    assert names(tmp_path) == [".lock", "c.part"]


def test_content_is_durable_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append((self.name, target.name))
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Path:
        done.append((self.name, target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write_text(tmp_path / "a.txt", "text")
    assert done == [("fsync", "a.txt.part"), ("a.txt.part", "a.txt"), ("fsync", tmp_path.name)]
    done.clear()
    fill(tmp_path / "s", "text")
    assert done == [
        ("fsync", "x"),
        ("fsync", ".s.part"),
        (".s.part", "s"),
        ("fsync", tmp_path.name),
    ]


def test_size_and_crc32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "check").write_bytes(b"123456789")
    # The check value that catalogues of CRCs give for CRC-32.
    assert files.size_and_crc32(tmp_path / "check") == (9, 0xCBF43926)
    monkeypatch.setattr(files, "_BLOCK", 4)
    assert files.size_and_crc32(tmp_path / "check") == (9, 0xCBF43926)
    (tmp_path / "empty").touch()
    assert files.size_and_crc32(tmp_path / "empty") == (0, 0)


def test_one_process_holds_the_lock_and_others_fail_or_wait(tmp_path: Path) -> None:
    held = files.lock(tmp_path / ".lock")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / ".lock", wait=False)
    got = threading.Event()

    def wait() -> None:
        with files.lock(tmp_path / ".lock"):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.2)
    held.close()
    assert got.wait(10)
    waiting.join()
    files.lock(tmp_path / ".lock", wait=False).close()


@pytest.mark.timeout(20)  # rmtree would wait for a writer of the pipe
@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_folder_is_in_nobodys_way(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in (".a.part", ".a.old", ".b.part"):
        make(tmp_path / name)
    fill(tmp_path / "a", "old")
    for name in (".a.part", ".a.old"):
        files.clear(tmp_path / name)
        make(tmp_path / name)
    fill(tmp_path / "a", "new")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]
    make(tmp_path / ".a.old")
    files.remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_a_json_file_whose_reading_would_wait_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return None  # type: ignore[return-value]  # what a raw file without data gives

    monkeypatch.setattr(files, "open_regular", lambda path: Waiting())
    with pytest.raises(ValueError, match="Expecting value"):
        files.read_json(tmp_path / "kmsg")


def test_a_folder_that_cannot_be_made_has_its_real_cause(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "new" / "below")
    files.make_folder(tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below").is_dir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "good").symlink_to("new")
    files.make_folder(tmp_path / "good")
    for name, reason in (
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("link", f"{tmp_path / 'link'} is a link to nowhere, which is missing"),
        ("link/below/it", f"{tmp_path / 'link'} is a link to nowhere, which is missing"),
    ):
        with pytest.raises(OSError, match=reason) as error:
            files.make_folder(tmp_path / name)
        assert error.value.strerror == reason
    with pytest.raises(NotADirectoryError):
        files.check_writable(tmp_path / "file" / "x.csv")
