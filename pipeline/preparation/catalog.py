"""The catalog: original ids and titles of the dense ids.

    store.catalog.item_id(17), store.catalog.title(17)   # ("1193", "One Flew Over the ... (1975)")

Dense item id i is row i - 1. Original ids are text, spelled as in the ratings file.
"""

import hashlib
import io
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
from pipeline.sources.layout import split_line
from pipeline.sources.source_file import SourceFile

FILES = ("catalog.parquet", "users.parquet")
_ITEMS = pa.schema({"item": pa.string(), "title": pa.string(), "train_count": pa.int64()})
_NO_USERS = pa.table({"user": pa.array([], pa.string())})
# In the files' metadata, where ids are whole numbers in the source; they are text in the files.
_ID_TYPE = b"id_type"
_TITLE_SEPARATORS = {"dat": "::", "csv": ",", "item": "\t"}


@dataclass(eq=False, repr=False)
class Catalog:
    """Original ids, titles and training counts of items 1..V, and original ids of users 0..U-1."""

    items: pa.StringArray  # [V]
    titles: pa.StringArray  # [V], "" if there is none
    train_counts: np.ndarray  # int64 [V], occurrences in the training parts
    users: pa.StringArray  # [U]
    # Types of the ids in the source: string, or int64 for a column of whole numbers.
    item_type: pa.DataType = field(default_factory=pa.string)
    user_type: pa.DataType = field(default_factory=pa.string)

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
            catalog = cls(
                items["item"].combine_chunks(),
                items["title"].combine_chunks(),
                items["train_count"].to_numpy(),
                users["user"].combine_chunks(),
                *map(_id_type, (items, users)),
            )
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"no readable catalog in {folder}: {reason}") from error
        if fingerprint and catalog.fingerprint != fingerprint:
            raise UserError(
                f"{paths[0]} has other items than the model was trained on: restore it, or train "
                "again"
            )
        return catalog

    def write_to(self, folder: str | Path) -> None:
        """Write the catalog's files into an existing folder."""
        columns = {"item": self.items, "title": self.titles, "train_count": self.train_counts}
        tables = pa.table(columns), pa.table({"user": self.users})
        types = self.item_type, self.user_type
        for name, table, kind in zip(FILES, tables, types, strict=True):
            if kind != pa.string():
                table = table.replace_schema_metadata({_ID_TYPE: str(kind)})
            pq.write_table(table, Path(folder) / name)

    @staticmethod
    def copy(folder: Path, to: Path, with_users: bool = True) -> None:
        """Copy the catalog's files, that of the users only ``with_users``."""
        for name in FILES if with_users else FILES[:1]:
            with open_regular(folder / name) as source, whole_file(to / name) as target:
                shutil.copyfileobj(source, target)

    @staticmethod
    def read_train_counts(folder: Path) -> np.ndarray:
        """The ``train_counts`` of the catalog in ``folder``, without reading the rest."""
        return pq.read_table(folder / FILES[0], columns=["train_count"])["train_count"].to_numpy()

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


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; KeyError or ArrowException if they are not of it."""
    with open_regular(path) as file:
        table = pq.read_table(file)
    columns = table.select(schema.names).cast(schema)
    if any(column.null_count for column in columns.columns):
        raise pa.ArrowInvalid(f"{path.name} has empty values")
    return columns.replace_schema_metadata(table.schema.metadata)


def _id_type(table: pa.Table) -> pa.DataType:
    metadata = table.schema.metadata or {}
    return pa.int64() if metadata.get(_ID_TYPE) == b"int64" else pa.string()


def read_titles(file: SourceFile, items: pa.StringArray) -> pa.StringArray:
    """string [V]: the titles of the items with these original ids, "" if the file has none.

    The title is the second field of a line in GroupLens' movies.dat (``::``), movies.csv and u.item
    (``|``) and in RecBole's ``.item`` (tab); the text is UTF-8 or Latin-1.
    """
    with file.open() as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    extension = file.name.rsplit(".", 1)[-1]
    separator = "|" if file.name == "u.item" else _TITLE_SEPARATORS[extension]
    lines = (line.rstrip("\n") for line in io.StringIO(text, newline=None))  # not at "\x85"
    fields = (split_line(line, separator) for line in lines if separator in line)
    titles = {line[0].strip(): line[1].strip() for line in fields}
    return pa.array([titles.get(item, "") for item in items.to_pylist()], pa.string())
