"""Work that is done once a node (a host): by its first rank, for the others too."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from model.distributed import Ranks, from_first_rank, raise_on_all
from pipeline.errors import UserError
from pipeline.preparation.prepare import prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig

T = TypeVar("T")


def from_first_of_node(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on the first rank of each node; its result on all ranks of the node.

    A UserError is raised on all ranks. Called on all ranks.
    """
    mine: list[T] = []
    error = None
    if ranks.local_rank == 0:
        try:
            mine.append(work())
        except UserError as found:
            error = found
    try:
        raise_on_all(ranks, error)
    finally:
        del error  # as in `from_first_rank`
    results: list[Any] = [None] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(results, (ranks.node, mine))
    for node, theirs in filter(None, results):
        if not mine and theirs and node == ranks.node:
            return theirs[0]
    return mine[0] if mine else work()  # a launcher may give no rank of a node the local rank 0


def prepared_data(config: DataConfig, ranks: Ranks) -> SequenceStore:
    """The prepared data: built by rank 0 if need be, and its files checked by one rank a node."""
    mine: list[SequenceStore] = []

    def path() -> Path:
        if not mine:
            mine.append(prepare(config))
        assert mine[0].path is not None
        return mine[0].path

    # Before other nodes, which may have the same cache folder.
    from_first_rank(ranks, path)
    found = from_first_of_node(ranks, path)
    return mine[0] if mine else SequenceStore.open(found, check=False)


def shared_arrays(ranks: Ranks, make: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """Arrays that the first rank of each node makes and the others map; called on all ranks.

    If there is no room for them in the folder for temporary files, each rank makes them.
    """
    if ranks.world_size == 1:
        return make()
    made: list[np.ndarray] = []

    def folder() -> Path | None:
        made.extend(make())
        return _written(made) if ranks.local_world_size > 1 else None

    found = from_first_of_node(ranks, folder)
    arrays = made
    if not made and found:
        # asarray: np.memmap, a subclass, is slower to index.
        arrays = [np.asarray(np.load(path, mmap_mode="r")) for path in sorted(found.iterdir())]
    dist.all_gather_object([None] * ranks.world_size, None)  # now all have mapped them
    if made and found:
        shutil.rmtree(found, ignore_errors=True)
    return arrays or make()


def _written(arrays: list[np.ndarray]) -> Path | None:
    folder = None
    with suppress(OSError):
        folder = Path(tempfile.mkdtemp())
        for number, array in enumerate(arrays):
            np.save(folder / f"{number}.npy", array)
        return folder
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return None
