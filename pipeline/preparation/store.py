"""The sequence store: every user's history on disk, memory-mapped by every rank.

    ml-1m-5f0c2a9b7d41/
        manifest.json     format version, fingerprints, counts, checksum of every other file
        items.npy         int32 [R]    dense item ids, user by user, in time order
        offsets.npy       int64 [U+1]  user u's history is items[offsets[u]:offsets[u+1]]
        catalog.parquet   original id, title and training count of item 1, 2, ..., V
        users.parquet     original id of user 0, 1, ..., U-1

A store is complete or absent (`pipeline/files.py`). `open_or_build` lets one process build it while
the others wait for its lock and then reuse what was built:

    store = open_or_build(Path("stores/mine"), fingerprint, build)   # build() -> SequenceStore
    store.items[store.offsets[7] : store.offsets[8]]                 # user 7's history
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError, warn
from pipeline.files import lock, size_and_crc32, whole_folder, write_json
from pipeline.preparation.catalog import Catalog

FORMAT_VERSION = 1
_ARRAYS = ("items.npy", "offsets.npy")
_MANIFEST_KEYS = {"num_items", "counts", "best_possible", "fingerprint", "files"}
_BLOCK = 1 << 22  # ids looked at together, so that counting never copies the whole store


class SequenceStore:
    """Histories of all users: memory-mapped, read-only.

    R ratings, U users, V items. Items are dense ids 1..V; 0 (padding) and V+1 (the mask token) do
    not occur. Leave-one-out: the last item of a user with at least 3 items is the test target, the
    one before it the validation target, the rest is the training part; of other users all is.

    Attributes:
        items: int32 [R], user by user, in time order.
        offsets: int64 [U+1]; user u's history is ``items[offsets[u]:offsets[u+1]]``.
        num_users: U.
        num_items: V.
        path: the store's folder; None: in memory.
        counts: what each preparation stage kept, cold targets, history lengths.
        best_possible: of generated data, the metrics that no model can beat on average,
            ``{"test": {"HR@10": ..., "NDCG@10": ...}, "validation": {...}}``; else None.
        fingerprint: the source and the flags that the store was made from.
        catalog: original ids and titles (read from disk at first use).
    """

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        num_items: int,
        *,
        catalog: Catalog | None = None,
        counts: dict[str, Any] | None = None,
        best_possible: dict[str, dict[str, float]] | None = None,
        fingerprint: dict[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.items, self.offsets = items, offsets
        self.num_users, self.num_items = len(offsets) - 1, num_items
        self.counts = counts or {}
        self.best_possible = best_possible
        self.fingerprint = fingerprint or {}
        self.path = path
        if catalog is not None:
            self.__dict__["catalog"] = catalog

    @classmethod
    def from_arrays(
        cls,
        items: np.ndarray | list[int],
        offsets: np.ndarray | list[int],
        num_items: int,
        **more: Any,
    ) -> "SequenceStore":
        """A store in memory; original ids are the dense ids as text.

        Raises:
            UserError: offsets do not run from 0 to len(items), or an item is not in 1..num_items.
        """
        items, offsets = np.asarray(items, dtype=np.int32), np.asarray(offsets, dtype=np.int64)
        _check(items, offsets, num_items, "arrays")
        items, offsets = items.view(), offsets.view()
        items.flags.writeable = offsets.flags.writeable = False
        return cls(items, offsets, num_items, **more)

    @classmethod
    def open(cls, path: str | Path) -> "SequenceStore":
        """Memory-map a store's folder, after checking every file against the manifest.

        Raises:
            UserError: no store there, one of another format version, or a damaged one.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, (size, checksum) in manifest["files"].items():
            try:
                whole = size_and_crc32(path / name) == (size, checksum)
            except OSError:
                whole = False
            if not whole:
                raise UserError(f"{path / name} is damaged: delete the folder to have it rebuilt")
        items, offsets = (np.load(path / name, mmap_mode="r") for name in _ARRAYS)
        store = cls(
            items,
            offsets,
            manifest["num_items"],
            counts=manifest["counts"],
            best_possible=manifest["best_possible"],
            fingerprint=manifest["fingerprint"],
            path=path,
        )
        if "catalog" in manifest:  # not in stores of earlier versions
            store.catalog_fingerprint = manifest["catalog"]
        return store

    @cached_property
    def catalog(self) -> Catalog:
        if self.path is None:
            ids = pa.array(np.arange(1, self.num_items + 1)).cast(pa.string())
            users = pa.array(np.arange(self.num_users)).cast(pa.string())
            return Catalog(ids, train_counts=self.train_item_counts[1:-1], users=users)
        return Catalog.read(self.path)

    def lengths(self) -> np.ndarray:
        """int64 [U]: items of each user."""
        return np.diff(self.offsets)

    def train_lengths(self) -> np.ndarray:
        """int64 [U]: items of each user's training part."""
        lengths = self.lengths()
        return np.where(lengths >= 3, lengths - 2, lengths)

    def evaluable_users(self) -> np.ndarray:
        """int64 [E]: users with at least 3 items, ascending."""
        return np.flatnonzero(self.lengths() >= 3)

    def targets(self, split: str) -> np.ndarray:
        """int32 [E]: the evaluable users' targets; split is "validation" or "test"."""
        last = self.offsets[self.evaluable_users() + 1]
        return self.items[last - {"validation": 2, "test": 1}[split]]

    @cached_property
    def catalog_fingerprint(self) -> str:
        """The catalog's fingerprint; a store on disk has it in the manifest."""
        return self.catalog.fingerprint

    @cached_property
    def train_item_counts(self) -> np.ndarray:
        """int64 [V+2]: occurrences of each dense id in the training parts."""
        if self.path is not None:
            return np.concatenate([[0], Catalog.read_train_counts(self.path), [0]])
        counts = np.zeros(self.num_items + 2, dtype=np.int64)
        # In place: np.bincount would allocate V counts for each block.
        for start in range(0, len(self.items), _BLOCK):
            np.add.at(counts, self.items[start : start + _BLOCK], 1)
        for split in ("validation", "test"):
            np.subtract.at(counts, self.targets(split), 1)
        return counts

    def write(self, path: Path) -> None:
        """Write the store's files into an existing, empty folder."""
        for name, array in zip(_ARRAYS, (self.items, self.offsets), strict=True):
            np.save(path / name, array, allow_pickle=False)
        self.catalog.write_to(path)
        manifest = {
            "format_version": FORMAT_VERSION,
            "num_users": self.num_users,
            "num_items": self.num_items,
            "num_ratings": len(self.items),
            "counts": self.counts,
            "best_possible": self.best_possible,
            "fingerprint": self.fingerprint,
            "catalog": self.catalog_fingerprint,
            "files": {file.name: size_and_crc32(file) for file in sorted(path.iterdir())},
        }
        write_json(path / "manifest.json", manifest)


def open_or_build(
    path: Path, fingerprint: dict[str, Any], build: Callable[[], SequenceStore]
) -> SequenceStore:
    """The store at `path` if it is undamaged and has this fingerprint, else build it there.

    Many processes may call this at once: one builds, the others wait and open its store.

    Raises:
        UserError: from `build`, or the folder cannot be written (no partial store is left).
    """
    try:
        store = _open_if_current(path, fingerprint)
        if store is not None:
            return store
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.parent / f".{path.name}.lock"):
            store = _open_if_current(path, fingerprint, warn_if_damaged=True)
            return store or _build(path, fingerprint, build)
    except OSError as error:
        raise UserError(
            f"cannot write the prepared data to {path.parent}: {error.strerror or error}; "
            "name another folder with --cache_dir"
        ) from error


def _build(
    path: Path, fingerprint: dict[str, Any], build: Callable[[], SequenceStore]
) -> SequenceStore:
    store = build()
    store.fingerprint = fingerprint
    with whole_folder(path) as aside:
        store.write(aside)
    return SequenceStore.open(path)


def _open_if_current(
    path: Path, fingerprint: dict[str, Any], warn_if_damaged: bool = False
) -> SequenceStore | None:
    try:
        store = SequenceStore.open(path)
    except UserError as error:
        if warn_if_damaged and path.exists():
            warn(f"{error}; preparing the data again")
        return None
    return store if store.fingerprint == fingerprint else None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        current = manifest["format_version"] == FORMAT_VERSION
        if current and manifest.keys() >= _MANIFEST_KEYS:
            return manifest
        if current:
            raise KeyError("a key is missing")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"no sequence store in {path}: manifest.json cannot be read") from error
    raise UserError(
        f"{path} has store format {manifest['format_version']}, this version reads "
        f"{FORMAT_VERSION}: delete the folder to have it rebuilt"
    )


def _check(items: np.ndarray, offsets: np.ndarray, num_items: int, where: str) -> None:
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items):
        raise UserError(f"{where}: offsets must run from 0 to the number of items, {len(items)}")
    if (np.diff(offsets) < 0).any():
        raise UserError(f"{where}: offsets must not decrease")
    if len(items) and not 1 <= items.min() <= items.max() <= num_items:
        raise UserError(f"{where}: item ids must be in 1..{num_items}")
