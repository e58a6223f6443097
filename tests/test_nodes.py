"""Work that is done once a node: which rank does it, and what the others take."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import nodes
from model.distributed import Ranks
from model.nodes import from_first_of_node, prepared_data, shared_arrays
from pipeline.errors import UserError
from pipeline.sources.config import DataConfig

ARRAYS = [np.arange(5), np.ones((2, 3))]


def rank_of(number: int) -> Ranks:
    """Two nodes of two ranks."""
    return Ranks(number, 4, 2, torch.device("cpu"), node=str(number // 2), local_rank=number % 2)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What the other ranks give to a gathering of results, by rank."""
    others: dict[int, Any] = {}

    def gather(found: list[Any], mine: Any) -> None:
        assert len(found) == 4
        if not isinstance(mine, tuple):  # errors, or a barrier
            found[:] = [mine] * 4
            return
        given = ([others[rank]] if rank in others else [] for rank in range(4))
        found[:] = [(str(rank // 2), each) for rank, each in enumerate(given)]

    monkeypatch.setattr(nodes.dist, "all_gather_object", gather)
    return others


def nothing() -> Any:
    raise AssertionError("another rank does it")


def test_the_result_of_the_node_s_first_rank(gathered: dict[int, Any]) -> None:
    gathered.update({0: "a", 2: "b"})
    assert [from_first_of_node(rank_of(rank), nothing) for rank in (1, 3)] == ["a", "b"]
    assert [from_first_of_node(rank_of(rank), lambda: "c") for rank in (0, 2)] == ["c", "c"]

    gathered.clear()  # of a launcher that knows no first rank of the node
    assert from_first_of_node(rank_of(3), lambda: "d") == "d"

    def fail() -> None:
        raise UserError("no file")

    with pytest.raises(UserError, match="no file"):
        from_first_of_node(rank_of(2), fail)


def test_arrays_are_made_once_a_node_and_mapped(
    gathered: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.tempfile, "tempdir", str(tmp_path))
    gathered[2] = nodes._written(ARRAYS)
    found = shared_arrays(rank_of(3), nothing)
    assert all(isinstance(each.base, np.memmap) for each in found)
    for each, expected in zip(found, ARRAYS, strict=True):
        np.testing.assert_array_equal(each, expected)
    assert shared_arrays(rank_of(0), lambda: ARRAYS) == ARRAYS
    assert [*tmp_path.iterdir()] == [gathered[2]]  # what rank 0 has written is gone
    nodes.shutil.rmtree(gathered[2])
    np.testing.assert_array_equal(found[1], ARRAYS[1])


def test_arrays_without_room_for_files_are_made_by_each_rank(
    gathered: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.tempfile, "tempdir", str(tmp_path / "missing"))
    for rank in (0, 1):
        assert shared_arrays(rank_of(rank), lambda: ARRAYS) == ARRAYS


def test_the_checksums_of_prepared_data_are_checked_once_a_node(
    gathered: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,time\n" + "".join(f"a,{item},{item}\n" for item in range(4)))
    cache = str(tmp_path / "cache")
    config = DataConfig(dataset_path=str(path), cache_dir=cache, min_user_count=1)
    monkeypatch.setattr(nodes, "from_first_rank", lambda ranks, work: None)
    first = prepared_data(config, rank_of(2))
    gathered[2] = first.path
    monkeypatch.setattr("pipeline.preparation.store.size_and_crc32", nothing)
    other = prepared_data(config, rank_of(3))
    assert other.items.tolist() == first.items.tolist() and other.path == first.path
