"""The catalog: original ids, titles, training counts and attributes of the dense ids.

    store.catalog.item_id(17), store.catalog.title(17)   # ("1193", "One Flew Over the ... (1975)")

Dense item id i is row i - 1. Original ids are text, spelled as in the ratings file.
"""

import hashlib
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.files import open_regular, whole_file

FILES = ("catalog.parquet", "users.parquet")
_ITEMS = pa.schema({"item": pa.string(), "title": pa.string(), "train_count": pa.int64()})
_VALIDATION = "validation_count"  # a further column, in the folder of a run that trains on them
# Without ``pa.array``, which loads pandas: training starts without that.
_NO_USERS = pa.Table.from_batches([], pa.schema({"user": pa.string()}))
# In the files' metadata, where ids are whole numbers in the source; they are text in the files.
_ID_TYPE = b"id_type"


@dataclass(eq=False, repr=False)
class Catalog:
    """What is known of items 1..V beside the ratings, and the original ids of users 0..U-1."""

    items: pa.StringArray  # [V]
    titles: pa.StringArray  # [V], "" if there is none
    train_counts: np.ndarray  # int64 [V], occurrences in the training parts
    users: pa.StringArray  # [U]
    # Types of the ids in the source: string, or int64 for a column of whole numbers.
    item_type: pa.DataType = field(default_factory=pa.string)
    user_type: pa.DataType = field(default_factory=pa.string)
    attributes: pa.Table | None = None  # V rows: other columns of --items_path
    # int64 [V], occurrences in the validation parts, where a model is trained on them, too.
    validation_counts: np.ndarray | None = None

    @classmethod
    def read(cls, folder: str | Path, fingerprint: str = "") -> "Catalog":
        """Read the catalog of a store, a run or an export, which may be without users.

        Args:
            fingerprint: that of the catalog which a model was trained on; "": any.

        Raises:
            UserError: it cannot be read, or has another fingerprint.
        """
        paths = [Path(folder) / name for name in FILES]
        try:
            items, users = _read(paths[0], _ITEMS), _NO_USERS
            if paths[1].exists():
                users = _read(paths[1], _NO_USERS.schema)
            attributes, validation = items.drop_columns(_ITEMS.names), None
            if _VALIDATION in attributes.column_names:
                validation = attributes[_VALIDATION].cast(pa.int64()).fill_null(0).to_numpy()
                attributes = attributes.drop_columns(_VALIDATION)
            catalog = cls(
                items["item"].combine_chunks(),
                items["title"].combine_chunks(),
                items["train_count"].to_numpy(),
                users["user"].combine_chunks(),
                item_type=_id_type(items),
                user_type=_id_type(users),
                attributes=attributes if attributes.num_columns else None,
                validation_counts=validation,
            )
        except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise UserError(
                f"no readable catalog in {folder}: {reason}; restore its {' and '.join(FILES)}"
            ) from error
        if fingerprint and catalog.fingerprint != fingerprint:
            raise UserError(
                f"{paths[0]} has other items than the model was trained on: restore it, or train "
                "again"
            )
        return catalog

    def write_to(self, folder: str | Path) -> None:
        """Write the catalog's files into an existing folder; OSError if one cannot be written."""
        columns = {"item": self.items, "title": self.titles, "train_count": self.train_counts}
        if self.validation_counts is not None:
            columns[_VALIDATION] = self.validation_counts
        of_items = pa.table(columns)
        if self.attributes is not None:
            for name in self.attributes.column_names:
                of_items = of_items.append_column(name, self.attributes[name])
        tables = of_items, pa.table({"user": self.users})
        types = self.item_type, self.user_type
        for name, table, kind in zip(FILES, tables, types, strict=True):
            if kind != pa.string():
                table = table.replace_schema_metadata({_ID_TYPE: str(kind)})
            with whole_file(Path(folder) / name) as file:
                pq.write_table(table, file)

    @staticmethod
    def copy(folder: Path, to: Path, users_folder: Path | None) -> None:
        """Copy the file of the items, and that of the users from a folder of its own.

        Args:
            users_folder: None: do not copy the users.

        Raises:
            OSError: a file cannot be read or written.
        """
        for name, each in zip(FILES, (folder, users_folder), strict=True):
            if each is not None:
                with open_regular(each / name) as source, whole_file(to / name) as target:
                    shutil.copyfileobj(source, target)

    @staticmethod
    def read_train_counts(folder: Path) -> np.ndarray:
        """int64 [V], the ``train_counts`` of a store's catalog, without reading the rest."""
        with pq.ParquetFile(folder / FILES[0]) as file:
            counts = file.read(["train_count"])["train_count"].combine_chunks()
        return np.from_dlpack(counts)  # ``to_numpy`` and ``pq.read_table`` would load pandas

    def is_trained(self) -> np.ndarray:
        """bool [V]: items with a rating that a model is trained on."""
        counts = self.train_counts
        if self.validation_counts is not None:
            counts = counts + self.validation_counts
        return counts > 0

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
        """Hash of the original item ids in dense order: models and data with the same fit."""
        digest = hashlib.sha256(len(self.items).to_bytes(8, "little"))
        whole = pa.ListArray.from_arrays(pa.array([0, len(self.items)], pa.int32()), self.items)
        digest.update(pc.binary_join(whole, "\0")[0].as_buffer())
        digest.update(b"\0")
        return digest.hexdigest()[:16]


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """The table in a file, its columns of ``schema`` checked and cast; others as they are.

    Raises:
        OSError, KeyError, UnicodeDecodeError, ArrowException: it cannot be read, or a column of
            ``schema`` is missing, of another type, or has empty values.
    """
    with open_regular(path) as file:
        table = pq.read_table(file)
    for name in schema.names:
        column = table[name].cast(schema.field(name).type)
        column.validate(full=True)  # Parquet may hold text that is no UTF-8
        if column.null_count:
            raise pa.ArrowInvalid(f"{path.name} has empty values")
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _id_type(table: pa.Table) -> pa.DataType:
    metadata = table.schema.metadata or {}
    return pa.int64() if metadata.get(_ID_TYPE) == b"int64" else pa.string()
