"""Data sets by name: flags, finding the ratings, downloads, reuse."""

import errno
import hashlib
import io
import os
import urllib.error
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.preparation.prepare import prepare
from pipeline.sources import download as download_module
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve
from pipeline.sources.download import download
from pipeline.sources.random_ratings import RandomRatings
from pipeline.sources.ratings_files import find_ratings

REAL_DATA = Path(os.environ.get("BERT4REC_DATA", Path(__file__).parents[2] / "shared" / "data"))
RATINGS = "".join(f"{user}::{item}::5::{item}\n" for user in (1, 2) for item in range(1, 6))
MOVIES = "1::Café (1995)::Drama\n3::Three: a::b\n".encode("latin-1")


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def archive(**members: bytes | str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


ML_1M = archive(**{"ml-1m/README": "x", "ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": MOVIES})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": "ml-2m"}, "--dataset_name 'ml-2m' is none of synthetic, random, ml-100k"),
        ({"dataset_name": "../x", "dataset_path": "x"}, "--dataset_name must be made of letters"),
        ({"dataset_name": "random", "dataset_path": "x"}, "--dataset_name random is generated"),
        ({"min_user_count": -1}, "--min_user_count must be at least 0, not -1"),
        ({"min_item_count": -1}, "--min_item_count must be at least 0, not -1"),
        ({"data_seed": -1}, "--data_seed must be at least 0, not -1"),
        ({"random_size": 0}, "--random_size must be at least 1 and at most 2,147,483,647, not 0"),
        (
            {"random_item_count": 1 << 31},
            "--random_item_count must be at least 1 and at most 2,147",
        ),
        ({"columns": "a,b"}, "--columns is for --dataset_path, not for generated data"),
        ({"dataset_name": "random", "file_order": "newest_first"}, "--file_order is for --dataset"),
        ({"min_rating": float("nan")}, "--min_rating must be a finite number, not nan"),
        ({"columns": "user"}, "--columns must name user,item"),
        ({"dataset_path": "a\0.csv"}, "--dataset_path holds a null character"),
        ({"cache_dir": "a\0"}, "--cache_dir holds a null character"),
    ],
)
def test_bad_flags(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**flags)


def test_defaults_keep_the_examples_flags() -> None:
    config = DataConfig()
    assert config.name == "synthetic"
    sizes = (config.random_user_count, config.random_item_count, config.random_size)
    assert sizes == (10, 30, 300)
    assert (config.min_user_count, config.min_item_count) == (5, 0)
    assert config.min_rating is None  # the example's 0 drops ratings below it


def test_name_of_a_file_without_dataset_name() -> None:
    assert DataConfig(dataset_path="/a/my clicks.csv.gz").name == "my_clicks"
    assert DataConfig(dataset_path="/a/b.csv", dataset_name="mine").name == "mine"
    assert DataConfig(dataset_path="/a/" + "é" * 120 + ".csv").name == "é" * 50


def test_the_cache_folder_is_the_given_one_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DataConfig().cache_folder == Path("/somewhere/bert4rec")
    assert DataConfig(cache_dir="/else").cache_folder == Path("/else")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache_folder == Path.home() / ".cache" / "bert4rec"


@pytest.mark.parametrize(
    "path", ["", "ml-1m", "ml-1m.zip", "ml-1m/ratings.dat"], ids=["parent", "folder", "zip", "file"]
)
def test_movielens_layouts(tmp_path: Path, path: str) -> None:
    if path != "ml-1m.zip":
        write(tmp_path / "ml-1m" / "ratings.dat", RATINGS)
        write(tmp_path / "ml-1m" / "movies.dat", MOVIES)
    write(tmp_path / "ml-1m.zip", ML_1M)
    write(tmp_path / "ml-20m" / "ratings.csv", "another data set")
    store = prepare(DataConfig("ml-1m", str(tmp_path / path), cache_dir=str(tmp_path / "cache")))
    assert store.items.tolist() == [1, 2, 3, 4, 5] * 2
    assert store.catalog.titles.to_pylist() == ["Café (1995)", "", "Three: a", "", ""]
    assert store.counts["name"] == "ml-1m"


def test_parent_folder_with_the_zip_only(tmp_path: Path) -> None:
    write(tmp_path / "ml-1m.zip", ML_1M)
    files, titles = find_ratings(tmp_path, "ml-1m")
    assert [file.member for file in files] == ["ml-1m/ratings.dat"]
    assert titles.member == "ml-1m/movies.dat"


def test_recbole_folder_with_titles(tmp_path: Path) -> None:
    lines = "".join(f"u\t{item}\n" for item in "abc")
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\n" + lines)
    write(tmp_path / "x.item", "item_id:token\tname:token_seq\nb\tBee\n")
    config = DataConfig(dataset_path=str(tmp_path), min_user_count=0, cache_dir=str(tmp_path / "c"))
    assert prepare(config).catalog.titles.to_pylist() == ["", "Bee", ""]


def test_titles_end_at_line_ends_only(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "user,item\nu,a\nu,b\nu,c\n")
    content = 'movieId,title\r\na,"One\u0085, two"\r\nb,T\u001dr\u00e9s\n'
    (tmp_path / "movies.csv").write_bytes(content.encode())
    config = DataConfig(dataset_path=str(tmp_path), min_user_count=0, cache_dir=str(tmp_path / "c"))
    assert prepare(config).catalog.titles.to_pylist() == ["One\u0085, two", "T\u001drés", ""]


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    for at, name in enumerate(("b", "a", "_c", ".d")):
        table = pa.table({"user": [7] * 3, "item": [10 * at + 1, 10 * at + 2, 10 * at + 3]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    config = DataConfig(
        dataset_path=str(tmp_path), min_user_count=0, cache_dir=str(tmp_path / "cache")
    )
    store = prepare(config)
    # a.parquet first (11, 12, 13), then b.parquet (1, 2, 3); hidden files are left out
    assert store.items.tolist() == [4, 5, 6, 1, 2, 3]


def test_numbered_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"part.{at}.parquet" for at in (0, 1, 2, 10, 11)]
    for at, name in enumerate(names):
        pq.write_table(pa.table({"user": [7], "item": [at]}), tmp_path / name)
    files, _ = find_ratings(tmp_path, "mine")
    assert [file.name for file in files] == names


@pytest.mark.parametrize(
    ("members", "name", "message"),
    [
        ({"a.txt": "", "b.txt": ""}, "mine", "no ratings file in it; looked for ratings.csv, rat"),
        (
            {"p-0.csv": "", "p-0.json": ""},
            "mine",
            r"itself .there are p-0.csv, p-0.json; names of parts differ only in numbers",
        ),
        ({"a/ratings.csv": "", "b/ratings.csv": ""}, "mine", "several ratings files .a/ratings.cs"),
        ({"ml-20m/ratings.csv": ""}, "ml-1m", "no ratings file in it; looked for ratings.dat"),
        ({"__MACOSX/ratings.csv": ""}, "mine", "no ratings file in it"),
        ({}, "mine", "no ratings file in it"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_or_zip_without_ratings_is_an_error(
    tmp_path: Path, members: dict[str, str], name: str, message: str, zipped: bool
) -> None:
    path = tmp_path / "data"
    if zipped:
        path.write_bytes(archive(**members))
    else:
        path.mkdir()
        for member, content in members.items():
            write(path / member, content)
    with pytest.raises(UserError, match=message):
        resolve(DataConfig(name, str(path), cache_dir=str(tmp_path / "cache")))


def test_members_outside_the_archive_are_harmless(tmp_path: Path) -> None:
    lines = "user,item\n" + "u,a\nu,b\nu,c\n"
    write(tmp_path / "in" / "x.zip", archive(**{"../../evil/ratings.csv": lines}))
    config = DataConfig(
        dataset_path=str(tmp_path / "in" / "x.zip"), min_user_count=0, cache_dir=str(tmp_path / "c")
    )
    assert prepare(config).num_items == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "in"]


def test_missing_and_damaged_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*nothing\.csv; check the path"):
        resolve(DataConfig(dataset_path=str(tmp_path / "nothing.csv")))
    write(tmp_path / "x.zip", ML_1M[:300])
    with pytest.raises(UserError, match=r"cannot read .*x\.zip"):
        resolve(DataConfig(dataset_path=str(tmp_path / "x.zip")))


def test_store_is_reused_until_source_or_flags_change(tmp_path: Path) -> None:
    path = write(tmp_path / "r.dat", RATINGS)

    def store_of(**flags: int) -> tuple[Path, int]:
        store = prepare(DataConfig(dataset_path=str(path), cache_dir=str(tmp_path / "c"), **flags))
        return store.path, (store.path / "manifest.json").stat().st_mtime_ns

    first = store_of()
    assert store_of() == first
    assert store_of(random_size=7) == first  # a flag that this data set does not read
    assert store_of(min_user_count=4)[0] != first[0]
    write(path, RATINGS.replace("2::5::5::5\n", ""))
    changed = prepare(
        DataConfig(dataset_path=str(path), min_user_count=4, cache_dir=str(tmp_path / "c"))
    )
    assert changed.lengths().tolist() == [5, 4]
    os.utime(path, ns=(1, 1))
    assert store_of()[0] != first[0]


def test_random_ratings() -> None:
    tables = list(RandomRatings(4, 6, 600_000, rating=3.0, seed=1))
    whole = pa.concat_tables(tables)
    assert len(tables) == 2 and whole.num_rows == 600_000
    assert np.unique(whole["rating"]).tolist() == [3.0]
    for column, count in (("user", 4), ("item", 6)):
        share = np.bincount(whole[column].to_numpy(), minlength=count) / 600_000
        assert len(share) == count and np.abs(share - 1 / count).max() < 0.01
    assert pa.concat_tables(RandomRatings(4, 6, 600_000, rating=3.0, seed=1)).equals(whole)
    assert not pa.concat_tables(RandomRatings(4, 6, 600_000, rating=3.0, seed=2)).equals(whole)


@pytest.mark.parametrize(
    ("skew", "share"),  # of the k-th most frequent item of 6: the integral from k to k + 1
    [
        (1.0, np.log(np.arange(2, 8) / np.arange(1, 7)) / np.log(7)),
        (0.5, np.diff(np.sqrt(np.arange(1, 8))) / (np.sqrt(7) - 1)),
        (2.0, -np.diff(1 / np.arange(1, 8)) / (1 - 1 / 7)),
    ],
)
def test_skewed_random_ratings(skew: float, share: np.ndarray) -> None:
    tables = RandomRatings(4, 6, 400_000, rating=0.0, seed=1, skew=skew)
    whole = pa.concat_tables(tables)["item"].to_numpy()
    found = np.bincount(whole, minlength=6) / len(whole)
    by_id = share[[0, 5, 4, 3, 2, 1]]  # the k-th has id 5 (k - 1) modulo 6
    assert len(found) == 6 and np.abs(found - by_id).max() < 0.005


def test_frequent_items_are_spread_over_the_ids() -> None:
    tables = RandomRatings(4, 1000, 400_000, rating=0.0, seed=1, skew=0.5)
    counts = np.bincount(pa.concat_tables(tables)["item"].to_numpy(), minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    assert np.abs(counts.reshape(4, 250).sum(1) / 400_000 - 0.25).max() < 0.02
    # The 40 most frequent: as many in each quarter.
    quarters = np.bincount(np.argsort(-counts)[:40] // 250, minlength=4)
    assert np.abs(quarters - 10).max() <= 2


@pytest.mark.parametrize("items", [1, 2, 3, 4, 30, 997])
def test_every_item_is_drawn(items: int) -> None:
    tables = RandomRatings(4, items, 60_000, rating=0.0, seed=1, skew=0.5)
    ids = pa.concat_tables(tables)["item"].to_numpy()
    assert np.unique(ids).tolist() == list(range(items))


def test_stores_with_the_most_frequent_items_first_are_not_reused() -> None:
    sizes = {"random_user_count": 4, "random_item_count": 6, "random_size": 100}
    uniform, skewed = (
        resolve(DataConfig(dataset_name="random", random_skew=skew, **sizes)).fingerprint
        for skew in (0.0, 1.0)
    )
    assert "random_ids" not in uniform["flags"]  # the same store as before
    assert skewed["flags"]["random_ids"] == "scattered"


def test_random_data_set_keeps_every_rating_at_any_min_rating(tmp_path: Path) -> None:
    store = prepare(DataConfig("random", min_rating=4, cache_dir=str(tmp_path)))
    assert len(store.items) == 300 and (store.num_users, store.num_items) == (10, 30)


class Response(io.BytesIO):
    headers: ClassVar = {"Content-Length": "4"}


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes | Exception) -> list[str]:
    asked = []

    def urlopen(url: str, timeout: float) -> Response:
        asked.append(url)
        if isinstance(content, Exception):
            raise content
        return Response(content)

    monkeypatch.setattr(download_module.urllib.request, "urlopen", urlopen)
    return asked


def test_download_once_and_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, ML_1M)
    monkeypatch.setitem(download_module.CHECKSUMS, "ml-1m", hashlib.md5(ML_1M).hexdigest())
    config = DataConfig("ml-1m", cache_dir=str(tmp_path / "cache"))
    assert prepare(config).num_items == 5
    prepare(config)
    assert asked == ["https://files.grouplens.org/datasets/movielens/ml-1m.zip"]
    assert (tmp_path / "cache" / "ml-1m.zip").read_bytes() == ML_1M


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "md5 .* where GroupLens publishes c4d9eecfca2ab87c1945afe126590906.*path"),
        (urllib.error.URLError("no route to host"), "cannot download .no route.*--dataset_path"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"to .*\(No space left on device\); make room, or name another folder with --cache_dir",
        ),
        (TimeoutError("timed out"), "cannot download .*timed out.*--dataset_path"),
    ],
)
def test_failed_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | Exception, message: str
) -> None:
    serve(monkeypatch, content)
    with pytest.raises(UserError, match=message):
        download("ml-1m", tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [".ml-1m.zip.lock"]


def test_real_movielens_100k(tmp_path: Path) -> None:
    path = REAL_DATA / "ml-100k.zip"
    if not path.exists():
        pytest.skip(f"no ml-100k.zip in the real data folder {REAL_DATA} (set BERT4REC_DATA)")
    store = prepare(DataConfig("ml-100k", str(REAL_DATA), cache_dir=str(tmp_path)))
    assert (store.num_users, store.num_items, len(store.items)) == (943, 1682, 100_000)
    assert store.catalog.title(1) == "Toy Story (1995)"
    assert store.catalog.users[-1].as_py() == "943"


def test_random_skew_reaches_the_ratings() -> None:
    sizes = {"random_user_count": 4, "random_item_count": 6, "random_size": 100}
    for skew in (0.0, 1.5):
        ratings = resolve(DataConfig(dataset_name="random", random_skew=skew, **sizes)).ratings
        assert isinstance(ratings, RandomRatings) and ratings.skew == skew
