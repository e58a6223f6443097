"""For any ratings: all are counted, order is kept, and no held-out item is trained on.

For any bytes of a file: reading them gives ratings or a UserError.
"""

import gzip
import io
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches.features import ITEM
from pipeline.errors import UserError
from pipeline.formats import blocks
from pipeline.preparation.prepare import prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import RankShare, TrainLoader

# Ids that a careless reader merges, cuts or reorders.
IDS = st.sampled_from(["1", "2", "10", "007", "7", "-3", "a", "A", "b c", "é", "1e3", "NaN"])
RATING = st.tuples(IDS, IDS, st.integers(1, 5), st.integers(-3, 3))


@contextmanager
def on_disk(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        yield Path(folder) / name


def histories(store: SequenceStore) -> dict[str, list[str]]:
    """Original ids, user by user."""
    items = [store.catalog.item_id(item) for item in store.items.tolist()]
    return {
        user: items[slice(*store.offsets[at : at + 2])]
        for at, user in enumerate(store.catalog.users.to_pylist())
    }


@settings(max_examples=60)
@given(
    rows=st.lists(RATING, min_size=1, max_size=40),
    min_rating=st.integers(0, 4),
    min_item=st.integers(0, 3),
    min_user=st.integers(0, 4),
    block=st.integers(20, 200),
)
def test_every_rating_of_a_file_is_kept_in_order_or_counted_as_dropped(
    rows: list[tuple[str, str, int, int]], min_rating: int, min_item: int, min_user: int, block: int
) -> None:
    text = "".join(f"{','.join(map(str, row))}\n" for row in rows)
    # The same, rating by rating.
    left = [row for row in rows if row[2] >= min_rating]
    kept = [len(rows), len(left)]
    for column, least in ((1, min_item), (0, min_user)):
        ids = [row[column] for row in left]
        left = [row for row in left if ids.count(row[column]) >= least]
        kept.append(len(left))
    expected = {
        user: [row[1] for row in sorted(left, key=lambda row: row[3]) if row[0] == user]
        for user in {row[0] for row in left}
    }
    with (
        on_disk("r.csv", f"user,item,rating,timestamp\n{text}".encode()) as path,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(blocks, "BLOCK_BYTES", block)  # many blocks, cut anywhere
        config = DataConfig(
            dataset_path=str(path),
            min_rating=min_rating,
            min_item_count=min_item,
            min_user_count=min_user,
            cache_dir=str(path.parent / "cache"),
        )
        if not any(len(items) >= 3 for items in expected.values()):
            with pytest.raises(UserError, match=r"drops all of the|no user of r has 3 items"):
                prepare(config)
            return
        store = prepare(config)
        assert [stage["ratings"] for stage in store.counts["stages"]] == kept
        assert histories(store) == expected
        assert histories(SequenceStore.open(store.path)) == expected


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda n: max(n) >= 3),
    max_len=st.integers(1, 6),
    stride=st.sampled_from([0.1, 0.5, 1.0]),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    left_context=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_nothing_held_out_is_trained_on_and_everything_else_is(
    lengths: list[int],
    max_len: int,
    stride: float,
    batch_size: int,
    world_size: int,
    left_context: float,
) -> None:
    # Every rating has a different item, so that an item identifies its position.
    items, offsets = list(range(1, sum(lengths) + 1)), [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    store = SequenceStore.from_arrays(items, offsets, len(items))
    ends = [end - 2 if end - at >= 3 else end for at, end in pairwise(offsets)]
    trainable = {
        item for at, end in zip(offsets, ends, strict=False) for item in range(at + 1, end + 1)
    }
    trained = set()
    for rank in range(world_size):
        loader = TrainLoader(
            store,
            WindowConfig(max_len, stride),
            # Kept as they are or masked: a random item may be any.
            MaskConfig(left_context_share=left_context, random_item_share=0.0),
            LoaderConfig(batch_size),
            RankShare(rank, world_size),
        )
        for batch in (packed.unpack() for packed in loader.epoch(0)):
            values = batch.features[ITEM].values().clone()
            values[batch.masked] = batch.targets  # undo the mask
            trained |= set(values.tolist())
    assert trained - {store.num_items + 1} == trainable


def packed(name: str, content: bytes) -> bytes:
    """The content as a file of this name would hold it."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    stream = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ratings.csv", content)
        return stream.getvalue()
    if name.endswith(".parquet"):
        columns = {"user": ["a", "b"] * 9, "item": list(range(18)), "time": [1.5] * 18}
        pq.write_table(pa.table(columns), stream)
        return stream.getvalue()
    return content


NAMES = [f"r.{kind}" for kind in ("csv", "dat", "data", "inter", "txt", "csv.gz", "zip", "parquet")]
CONTENTS = {
    "r.dat": b"1::2::3::4\n" * 20,
    "r.data": b"1\t2\t3\t4\n" * 20,
    "r.inter": b"user_id:token\titem_id:token\n" + b"1\t2\n" * 20,
    "r.txt": b"1 2\n" * 20,
}
CSV = b"user,item,rating,timestamp\n" + b"1,2,3,4\n" * 20


def read_or_refuse(path: Path) -> None:
    try:
        config = DataConfig(dataset_path=str(path), cache_dir=str(path.parent / "cache"))
        tables = list(resolve(config).ratings)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for table in tables:
        assert table.column_names[:2] == ["user", "item"]
        assert not any(column.null_count for column in table.columns)


@settings(max_examples=150)
@given(name=st.sampled_from(NAMES), content=st.binary(max_size=200))
def test_readers_survive_random_bytes(name: str, content: bytes) -> None:
    with on_disk(name, content) as path:
        read_or_refuse(path)


@settings(max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    cut=st.floats(0, 1),
)
def test_readers_survive_damage(name: str, changes: list[tuple[float, int]], cut: float) -> None:
    content = bytearray(packed(name, CONTENTS.get(name, CSV)))
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    if cut > 0.5:
        content = content[: int(cut * len(content))]
    with on_disk(name, bytes(content)) as path:
        read_or_refuse(path)
