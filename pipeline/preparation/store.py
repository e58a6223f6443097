"""The sequence store: every user's history on disk, memory-mapped by every rank.

    ml-1m-5f0c2a9b7d41/
        manifest.json     format version, fingerprints, counts, checksum of every other file
        items.npy         int32 [R]    dense item ids, user by user, in time order
        offsets.npy       int64 [U+1]  user u's history is items[offsets[u]:offsets[u+1]]
        times.npy         int64 [R]    times of the items, if the data have times
        parts.npy         int64 [2, U] where training and validation parts end; no file: the last
                                       two items of a user are held out
        catalog.parquet   original id, title and training count of item 1, 2, ..., V
        users.parquet     original id of user 0, 1, ..., U-1

A store is complete or absent (`pipeline/files.py`).
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError, first_remedy, warn
from pipeline.files import (
    clear,
    lock,
    make_folder,
    remove_old,
    size_and_crc32,
    whole_folder,
    write_json,
)
from pipeline.jagged import jagged_positions
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.memory import blocks
from pipeline.preparation.parts import Parts

FORMAT_VERSION = 1
_TIMES, _PARTS = "times.npy", "parts.npy"
_ARRAYS = ("items.npy", "offsets.npy")
_FIELDS = ("num_items", "counts", "best_possible", "fingerprint")


@dataclass(eq=False, repr=False)
class SequenceStore:
    """Histories of all users: memory-mapped, read-only.

    R ratings, U users, V items. Items are dense ids 1..V; 0 (padding) and V+1 (the mask token) do
    not occur. ``parts`` says which items train and which are held out.
    """

    items: np.ndarray  # int32 [R], user by user, in time order
    offsets: np.ndarray  # int64 [U+1]; user u's history is items[offsets[u]:offsets[u+1]]
    num_items: int  # V
    # Output size of each preparation stage, cold targets, history lengths.
    counts: dict[str, Any] = field(default_factory=dict)
    # For generated data, metrics that no model can beat on average: {"test": {"HR@10": ...}}.
    best_possible: dict[str, dict[str, float]] | None = None
    # The source and the flags that the store was made from.
    fingerprint: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None  # the store's folder; None: in memory
    ends: np.ndarray | None = None  # int64 [2, U], of `Parts`; None: leave-one-out
    # What made the parts: {"by", "points" as given, "times" of them}; empty: leave-one-out.
    split: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def parts(self) -> Parts:
        """Where the training, validation and test part of each history end."""
        if self.ends is None:
            return Parts.leave_one_out(self.offsets)
        return Parts.of_ends(self.offsets, self.ends, self.split["by"])

    @property
    def time_unit(self) -> str:
        """Unit of the times: "s", "ms", "us", "ns" since 1970; another text or "": unknown."""
        return self.counts.get("times", {}).get("unit", "")

    @cached_property
    def times(self) -> np.ndarray | None:
        """int64 [R]: times of the items in :attr:`time_unit`; None: there are none.

        Memory-mapped and checked when first read: training does not read them.
        """
        if self.path is None or not (self.path / _TIMES).exists():
            return None
        manifest = _read_manifest(self.path)
        _check(self.path / _TIMES, manifest["files"].get(_TIMES))
        return np.load(self.path / _TIMES, mmap_mode="r")

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_arrays(
        cls, items: np.ndarray | list[int], offsets: np.ndarray | list[int], num_items: int
    ) -> "SequenceStore":
        """A checked store in memory; its original ids are the dense ids as text."""
        items, offsets = np.asarray(items, dtype=np.int32), np.asarray(offsets, dtype=np.int64)
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items):
            raise UserError(f"arrays: offsets must run from 0 to the number of items, {len(items)}")
        if (np.diff(offsets) < 0).any():
            raise UserError("arrays: offsets must not decrease")
        if len(items) and not 1 <= items.min() <= items.max() <= num_items:
            raise UserError(f"arrays: item ids must be in 1..{num_items}")
        items, offsets = items.view(), offsets.view()
        items.flags.writeable = offsets.flags.writeable = False
        return cls(items, offsets, num_items)

    @classmethod
    def open(cls, path: str | Path, check: bool = True) -> "SequenceStore":
        """Memory-map a store's folder, after checking every file against the manifest.

        Without ``check``, another process of this host has just done so.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, recorded in manifest["files"].items():
            if check and name != _TIMES:
                _check(path / name, recorded)
        items, offsets = (np.load(path / name, mmap_mode="r") for name in _ARRAYS)
        known: dict[str, Any] = {name: manifest[name] for name in _FIELDS}
        if "split" in manifest:
            known |= {"split": manifest["split"], "ends": np.load(path / _PARTS, mmap_mode="r")}
        store = cls(items, offsets, **known, path=path)
        if "catalog" in manifest:  # not in stores of earlier versions
            store.catalog_fingerprint = manifest["catalog"]
        return store

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, read when it is first needed; UserError if it cannot be."""
        if self.path is None:
            ids = pa.array(np.arange(1, self.num_items + 1)).cast(pa.string())
            users = pa.array(np.arange(self.num_users)).cast(pa.string())
            return Catalog(ids, pa.repeat("", len(ids)), self.train_item_counts[1:-1], users)
        return Catalog.read(self.path)

    def trained_catalog(self, train_on_validation: bool) -> Catalog:
        """The catalog of a run, which says which items it trains on."""
        if not train_on_validation:
            return self.catalog
        places = jagged_positions(self.parts.training_end, self.parts.validation_end)
        counts = np.bincount(self.items[places], minlength=self.num_items + 2)[1:-1]
        return replace(self.catalog, validation_counts=counts)

    def lengths(self) -> np.ndarray:
        """int64 [U]: items of each user."""
        return np.diff(self.offsets)

    def evaluable_users(self, split: str = "test") -> np.ndarray:
        """int64 [E]: users with a target in ``split``, "validation" or "test", ascending."""
        return self.parts.users(split)

    def targets(self, split: str) -> np.ndarray:
        """int32 [E]: the evaluable users' targets, of several the first."""
        return self.items[self.parts.targets(split, self.items)[1]]

    @cached_property
    def catalog_fingerprint(self) -> str:
        return self.catalog.fingerprint

    @cached_property
    def ratings_fingerprint(self) -> str:
        """Hash of all histories as dense ids, and of their parts if they are not leave-one-out.

        Data sets with the same have the same metrics.
        """
        digest = hashlib.sha256()
        for array in (self.offsets, self.items, *(() if self.ends is None else self.ends)):
            for (part,) in blocks(array):
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    @cached_property
    def train_item_counts(self) -> np.ndarray:
        """int64 [V+2]: occurrences of each dense id in the training parts."""
        if self.path is not None:
            return np.concatenate([[0], Catalog.read_train_counts(self.path), [0]])
        counts = np.zeros(self.num_items + 2, np.int64)
        for (items,) in blocks(self.items):
            counts += np.bincount(items, minlength=len(counts))
        held_out = self.items[jagged_positions(self.parts.training_end, self.parts.end)]
        return counts - np.bincount(held_out, minlength=len(counts))

    def write(self, path: Path) -> None:
        """Write the store's files into an existing, empty folder."""
        for name, array in zip(_ARRAYS, (self.items, self.offsets), strict=True):
            _save(path / name, array)
        if self.times is not None:
            _save(path / _TIMES, self.times)
        if self.ends is not None:
            _save(path / _PARTS, self.ends)
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
        if self.ends is not None:
            manifest["split"] = self.split
        write_json(path / "manifest.json", manifest)


def _check(path: Path, recorded: list[int] | None) -> None:
    """Raise a UserError unless a file has its recorded size and checksum."""
    try:
        whole = list(size_and_crc32(path)) == recorded
    except OSError:
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: delete the folder to have it rebuilt")


def _save(path: Path, array: np.ndarray) -> None:
    """`np.save`, whose error on a full disk does not say so."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        for (part,) in blocks(array):
            file.write(np.ascontiguousarray(part).data)


def open_or_build(
    path: Path, fingerprint: dict[str, Any], build: Callable[[], SequenceStore]
) -> SequenceStore:
    """The store at `path` if it is undamaged and has this fingerprint, else build it there.

    Many processes may call this at once: one builds, the others wait and open its store.
    """
    try:
        store = _open_if_current(path, fingerprint)
        if store is not None:
            remove_old(path)
            return store
        make_folder(path.parent)
        with lock(path.parent / f".{path.name}.lock"):
            store = _open_if_current(path, fingerprint, warn_if_damaged=True)
            if store is not None:
                return store
            _remove_abandoned(path.parent)
            built = build()
            built.fingerprint = fingerprint
            with whole_folder(path) as aside:
                built.write(aside)
            return SequenceStore.open(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # Arrow's text is longer
        first = f"{first}, or " if (first := first_remedy(error)) else ""
        raise UserError(
            f"cannot write the prepared data to {path.parent}: {reason}; {first}"
            "name another folder with --cache_dir"
        ) from error


def _remove_abandoned(stores: Path) -> None:
    """Delete what killed processes have written of stores that nobody is writing now."""
    for part in stores.glob(".*.part"):
        with suppress(OSError), lock(stores / f"{part.stem}.lock", wait=False):
            clear(part)


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
        version = manifest["format_version"]
        if version == FORMAT_VERSION and not manifest.keys() >= {*_FIELDS, "files"}:
            raise KeyError("a key is missing")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"no sequence store in {path}: manifest.json cannot be read") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has store format {version}, this version reads {FORMAT_VERSION}: delete the "
            "folder to have it rebuilt"
        )
    return manifest
