"""The sequence store: contract, write and reuse, damage, concurrent builders."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.prepare import prepare
from pipeline.preparation.store import SequenceStore, open_or_build
from pipeline.sources.config import DataConfig
from tests.conftest import ROOT, most_bytes_of_a_file, run_process

# Users with 4, 2, 0 and 3 items; item 5 occurs as the test target of user 0 only.
ITEMS = [1, 2, 3, 5, 2, 2, 4, 1, 3]
OFFSETS = [0, 4, 6, 6, 9]


def catalog_of(*items: str, titles: tuple[str, ...] = ()) -> Catalog:
    counts, users = np.arange(len(items)), pa.array(["u", "v", "w", "x"])
    return Catalog(pa.array(items), pa.array(titles or items), counts, users)


def small_store() -> SequenceStore:
    catalog = catalog_of("a", "b", "c", "d", "é", titles=("A", "", "C", "", "É"))
    store = SequenceStore.from_arrays(ITEMS, OFFSETS, 5)
    store.catalog, store.counts = catalog, {"x": 1}
    return store


def test_leave_one_out_parts() -> None:
    store = small_store()
    assert (store.num_users, store.num_items, store.path) == (4, 5, None)
    assert store.lengths().tolist() == [4, 2, 0, 3]
    assert (store.parts.training_end - store.parts.begin).tolist() == [2, 2, 0, 1]
    assert store.evaluable_users().tolist() == [0, 3]
    assert store.targets("validation").tolist() == [3, 1]
    assert store.targets("test").tolist() == [5, 3]
    # training parts: [1, 2], [2, 2], [], [4]; places 0 (padding) and 6 (mask) stay empty
    assert store.train_item_counts.tolist() == [0, 1, 3, 0, 1, 0, 0]


def test_opening_a_store_does_not_read_its_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = SequenceStore.from_arrays(ITEMS, OFFSETS, 5)
    built.write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "read", lambda *_: pytest.fail("read"))
        opened = SequenceStore.open(tmp_path)
        assert opened.train_item_counts.tolist() == built.train_item_counts.tolist()
        assert opened.catalog_fingerprint == built.catalog.fingerprint
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["catalog"]  # as those of earlier versions
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert SequenceStore.open(tmp_path).catalog_fingerprint == built.catalog.fingerprint


def test_from_arrays_is_read_only_and_leaves_the_callers_array_alone() -> None:
    items = np.array([1, 2, 3], dtype=np.int32)
    store = SequenceStore.from_arrays(items, [0, 3], 3)
    with pytest.raises(ValueError, match="read-only"):
        store.items[0] = 2
    items[0] = 3
    assert store.catalog.items.to_pylist() == ["1", "2", "3"]


# Reads what a training reads of a store that is there, before its first step.
START = """
import sys
import model.training_run
from pipeline.preparation.store import SequenceStore
store = SequenceStore.open(sys.argv[1])
print(store.train_item_counts.tolist(), "pandas" in sys.modules)
"""


def test_a_training_starts_without_pandas(tmp_path: Path) -> None:
    """Arrow loads it in many functions, which takes as long as many steps."""
    SequenceStore.from_arrays(ITEMS, OFFSETS, 5).write(tmp_path)
    outcome = run_process("-c", START, tmp_path, cwd=ROOT)
    assert outcome.out == "[0, 1, 3, 0, 1, 0, 0] False\n", outcome.err


@pytest.mark.parametrize(
    ("items", "offsets", "message"),
    [
        ([1, 4], [0, 2], "1..3"),
        ([0, 1], [0, 2], "1..3"),
        ([1, 2], [0, 1], "0 to the number of items, 2"),
        ([1, 2], [0, 2, 1, 2], "must not decrease"),
    ],
)
def test_from_arrays_rejects(items: list[int], offsets: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceStore.from_arrays(items, offsets, 3)


def test_written_store_reads_back_memory_mapped(tmp_path: Path) -> None:
    store = open_or_build(tmp_path / "cache" / "s", {"a": 1}, small_store)
    assert isinstance(store.items, np.memmap) and not store.items.flags.writeable
    assert store.items.dtype == np.int32 and store.offsets.dtype == np.int64
    assert store.items.tolist() == ITEMS and store.offsets.tolist() == OFFSETS
    assert (store.counts, store.fingerprint, store.best_possible) == ({"x": 1}, {"a": 1}, None)
    assert store.path == tmp_path / "cache" / "s"
    assert [store.catalog.item_id(5), store.catalog.title(5)] == ["é", "É"]
    assert store.catalog.train_counts.tolist() == [0, 1, 2, 3, 4]


def test_the_catalog_of_a_run_says_what_it_trains_on(tmp_path: Path) -> None:
    """Training parts [1, 2], [2, 2], [], [4], validation parts [3], [], [], [1]."""
    store = SequenceStore.from_arrays(ITEMS, OFFSETS, 5)
    trained = [store.trained_catalog(on_validation) for on_validation in (False, True)]
    trained[1].write_to(tmp_path)
    read = Catalog.read(tmp_path, store.catalog_fingerprint)
    found = [each.is_trained().tolist() for each in (*trained, read)]
    assert found == [[True, True, False, True, False], *[[True, True, True, True, False]] * 2]
    assert read.attributes is None and read.train_counts.tolist() == [1, 3, 0, 1, 0]


def test_catalog_copy_has_the_same_fingerprint_and_another_order_has_not(tmp_path: Path) -> None:
    catalog = small_store().catalog
    catalog.write_to(tmp_path)
    copy = Catalog.read(tmp_path)
    assert copy.fingerprint == catalog.fingerprint
    assert copy.items.equals(catalog.items) and copy.titles.equals(catalog.titles)
    assert catalog_of("b", "a", "c", "d", "é").fingerprint != catalog.fingerprint
    # joined ids of two different catalogs must differ
    assert catalog_of("a", "b").fingerprint != catalog_of("a\0b").fingerprint
    with pytest.raises(UserError, match="No such file or directory; restore its cat"):
        Catalog.read(tmp_path / "nowhere")


def test_reused_until_the_fingerprint_changes(tmp_path: Path) -> None:
    builds = []

    def build() -> SequenceStore:
        builds.append(1)
        return small_store()

    for fingerprint in ({"v": 1}, {"v": 1}, {"v": 2}, {"v": 2}):
        assert open_or_build(tmp_path / "s", fingerprint, build).fingerprint == fingerprint
    assert len(builds) == 2


@pytest.mark.parametrize("file", ["items.npy", "offsets.npy", "catalog.parquet", "users.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_damaged_store_is_rebuilt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    path = tmp_path / "s"
    open_or_build(path, {}, small_store)
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    cut = content[:-3] if damage == "cut" else content
    (path / file).unlink()
    if damage != "delete":
        (path / file).write_bytes(cut)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        SequenceStore.open(path)
    assert open_or_build(path, {}, small_store).items.tolist() == ITEMS
    warning = f"warning: {path / file} is damaged: delete the folder to have it rebuilt; preparing"
    assert capsys.readouterr().err == f"{warning} the data again\n"
    assert SequenceStore.open(path).catalog.title(1) == "A"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "null"])
def test_unreadable_manifest(tmp_path: Path, text: str) -> None:
    open_or_build(tmp_path / "s", {}, small_store)
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        SequenceStore.open(tmp_path / "s")
    assert open_or_build(tmp_path / "s", {}, small_store).num_items == 5


def test_other_format_version_is_named(tmp_path: Path) -> None:
    open_or_build(tmp_path / "s", {}, small_store)
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match="store format 99"):
        SequenceStore.open(tmp_path / "s")


def test_failed_build_leaves_nothing_and_keeps_an_older_store(tmp_path: Path) -> None:
    def fail() -> SequenceStore:
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        open_or_build(tmp_path / "s", {"v": 1}, fail)
    assert [each.name for each in tmp_path.iterdir()] == [".s.lock"]
    open_or_build(tmp_path / "s", {"v": 1}, small_store)
    with pytest.raises(UserError, match="bad line"):
        open_or_build(tmp_path / "s", {"v": 2}, fail)
    assert SequenceStore.open(tmp_path / "s").fingerprint == {"v": 1}


def test_what_a_killed_writer_left_of_an_older_store_is_deleted(tmp_path: Path) -> None:
    for version in (1, 2):
        open_or_build(tmp_path / "s", {"v": version}, small_store)
    shutil.copytree(tmp_path / "s", tmp_path / ".s.old")  # killed after the rename
    assert open_or_build(tmp_path / "s", {"v": 2}, lambda: pytest.fail("built")).num_items
    assert {each.name for each in tmp_path.iterdir()} == {"s", ".s.lock"}


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Catalog, "write_to", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*--cache_dir"):
        open_or_build(tmp_path / "s", {}, small_store)
    assert [each.name for each in tmp_path.iterdir()] == [".s.lock"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        open_or_build(tmp_path / "file" / "s", {}, small_store)


def _die_while_writing(path: Path) -> None:
    Catalog.write_to = lambda *_: os._exit(1)
    open_or_build(path, {}, small_store)


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_writing, args=(tmp_path / "s",)
    )
    process.start()
    process.join(20)
    assert process.exitcode == 1
    assert any(each.name == ".s.part" for each in tmp_path.iterdir())
    assert not (tmp_path / "s").exists()
    open_or_build(tmp_path / "s", {}, small_store)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".s.lock", "s"]


def _build_slowly(path: Path, log: Path) -> None:
    def build() -> SequenceStore:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return small_store()

    assert open_or_build(path, {"v": 1}, build).items.tolist() == ITEMS


def test_one_of_many_processes_builds_and_all_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path / "s", log)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("most_bytes", [100, 30_000, 45_000])  # of any file of the store
def test_a_disk_that_takes_no_more(tmp_path: Path, most_bytes: int) -> None:
    def build() -> SequenceStore:
        return SequenceStore.from_arrays(np.arange(1, 10_001), [0, 5000, 10_000], 10_000)

    told = r"prepared data to \S+: File too large; name another"
    with most_bytes_of_a_file(most_bytes), pytest.raises(UserError, match=told):
        open_or_build(tmp_path / "store", {}, build)
    assert not (tmp_path / "store").exists()


def test_a_large_file_that_changed_within_its_size_and_time_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ratings = tmp_path / "r.csv"
    ratings.write_text("user,item\nu,a\nu,b\nu,c\n")
    config = DataConfig(
        dataset_path=str(ratings), cache_dir=str(tmp_path / "cache"), min_user_count=0
    )

    def change() -> None:
        before = ratings.stat()
        ratings.write_text("user,item\nu,a\nu,c\nu,b\n")
        os.utime(ratings, ns=(before.st_atime_ns, before.st_mtime_ns))

    small = prepare(config)
    change()
    assert prepare(config).path != small.path  # by its checksum
    monkeypatch.setattr("pipeline.formats.source_file._SMALL", 0)
    large = prepare(config)
    assert prepare(config).path == large.path
    assert capfd.readouterr().err == ""
    change()
    assert prepare(config).path == large.path
    assert capfd.readouterr().err == (
        f"warning: {ratings} was changed or renamed after {large.path} was prepared from it, but "
        "has the size and time of before: if its content is another one, delete that folder\n"
    )
