"""The catalog: original ids, titles and attributes of the dense ids.

    store.catalog.item_id(17), store.catalog.title(17)   # ("1193", "One Flew Over the ... (1975)")

Dense item id i is row i - 1. Original ids are text, spelled as in the ratings file.
"""

import hashlib
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError

_FILES = ("catalog.parquet", "users.parquet")
_COLUMNS = ["item", "title", "train_count"]


@dataclass(eq=False, repr=False)
class Catalog:
    """Original ids, titles and training counts of items 1..V, and original ids of users 0..U-1."""

    items: pa.StringArray  # [V]
    titles: pa.StringArray  # [V], "" if there is none
    train_counts: np.ndarray  # int64 [V], occurrences in the training parts
    users: pa.StringArray  # [U]
    attributes: pa.Table | None = None  # V rows: other columns of --items_path

    @classmethod
    def read(cls, folder: str | Path) -> "Catalog":
        """Read the catalog in a store's or a run's folder."""
        try:
            items: pa.Table = pq.read_table(Path(folder) / _FILES[0])
            users: pa.Table = pq.read_table(Path(folder) / _FILES[1])
            attributes = items.drop_columns(_COLUMNS)
            return cls(
                items["item"].combine_chunks(),
                items["title"].combine_chunks(),
                items["train_count"].to_numpy(),
                users["user"].combine_chunks(),
                attributes if attributes.num_columns else None,
            )
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"no readable catalog in {folder}: {error}") from error

    def write_to(self, folder: str | Path) -> None:
        """Write the catalog's files into an existing folder."""
        columns = {"item": self.items, "title": self.titles, "train_count": self.train_counts}
        table = pa.table(columns)
        if self.attributes is not None:
            for name, column in zip(
                self.attributes.column_names, self.attributes.columns, strict=True
            ):
                table = table.append_column(name, column)
        pq.write_table(table, Path(folder) / _FILES[0])
        pq.write_table(pa.table({"user": self.users}), Path(folder) / _FILES[1])

    @staticmethod
    def copy(folder: Path, to: Path) -> None:
        for name in _FILES:
            shutil.copyfile(folder / name, to / name)

    @staticmethod
    def read_train_counts(folder: Path) -> np.ndarray:
        """The ``train_counts`` of the catalog in ``folder``, without reading the rest."""
        return pq.read_table(folder / _FILES[0], columns=["train_count"])["train_count"].to_numpy()

    def item_id(self, item: int) -> str:
        """Original id of dense id `item` (1..V)."""
        assert 1 <= item <= len(self.items)
        return self.items[item - 1].as_py()

    def title(self, item: int) -> str:
        """Title of dense id `item` (1..V), "" if there is none."""
        assert 1 <= item <= len(self.items)
        return self.titles[item - 1].as_py()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the original item ids in dense order; a model fits data sets with the same."""
        digest = hashlib.sha256(len(self.items).to_bytes(8, "little"))
        whole = pa.ListArray.from_arrays(pa.array([0, len(self.items)], pa.int32()), self.items)
        digest.update(pc.binary_join(whole, "\0")[0].as_buffer())
        digest.update(b"\0")
        return digest.hexdigest()[:16]
