"""Read a checkpoint without running code that may be hidden in it.

torch.distributed.checkpoint (DCP) stores its index, ``.metadata``, as a pickle, and unpickling can
call any function. SafeReader allows only the few classes that an index of tensors consists of. DCP
reads the tensors by torch.load(weights_only=True); it would unpickle other values unchecked.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from model.checkpoints.manifest import DATA_FILE, DamagedError
from model.checkpoints.weights import StoredTensor
from model.checkpoints.weights_file import Part
from pipeline.files import open_regular

_MODEL = "model."  # of the names of weights
# Private: the classes and functions that DCP's pickled index refers to.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}


class SafeReader(dcp.FileSystemReader):
    """A FileSystemReader for checkpoints that contain only tensors, from any source."""

    def __init__(self, checkpoint: Path) -> None:
        """DamagedError if the checkpoint's index is; dcp.load would print tracebacks."""
        super().__init__(checkpoint)
        self.index = read_index(checkpoint)
        self.storage_data = self.index.storage_data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        assert self.index.storage_meta is not None
        # Private: load_id, which the overridden FileSystemReader.read_metadata sets.
        self.index.storage_meta.load_id = self.load_id
        return self.index

    def copy_parts(self, put: Callable[[Part], None], check: Callable[[str], None]) -> None:
        """Call ``put`` with each part of the model's tensors: what one rank has stored of one.

        Only one part is in memory at a time. DamagedError if one cannot be read or is missing.

        Args:
            check: called with the name of each file before its parts are read, which then are still
                in the system's memory: the disk is read once.
        """
        files: dict[str, list[tuple[str, ChunkStorageMetadata]]] = {}
        for name, about in _weights(self.index).items():
            if sum(chunk.sizes.numel() for chunk in about.chunks) != about.size.numel():
                raise DamagedError(f"it has not all of {name}")
            for chunk in about.chunks:
                stored = self.storage_data.get(MetadataIndex(_MODEL + name, chunk.offsets))
                if stored is None:
                    raise DamagedError(f"it has not all of {name}")
                files.setdefault(stored.relative_path, []).append((name, chunk))
        for file, parts in sorted(files.items()):
            check(file)
            for name, chunk in parts:
                put(Part(name, tuple(chunk.offsets), self._read(_MODEL + name, chunk)))

    def _read(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        try:
            stored = self.storage_data[MetadataIndex(name, chunk.offsets)]
            with open_regular(Path(self.path) / stored.relative_path) as file:
                # Private: a part of a file as a file.
                part = torch.load(self._slice_file(file, stored), "cpu", weights_only=True)
            if part.shape != chunk.sizes:
                raise ValueError("its shape is another one")
        except Exception as error:
            raise DamagedError("its files are damaged") from error
        return part


def read_index(checkpoint: Path) -> Metadata:
    """The index of a checkpoint; DamagedError unless it lists tensors in files beside it."""
    try:
        with open_regular(checkpoint / ".metadata") as file:
            index = _IndexUnpickler(file).load()
        sound = (
            isinstance(index, Metadata)
            and isinstance(index.storage_meta, StorageMeta)
            and all(
                isinstance(name, str)
                and isinstance(about, TensorStorageMetadata)
                and isinstance(about.size, torch.Size)
                and isinstance(about.properties.dtype, torch.dtype)
                for name, about in index.state_dict_metadata.items()
            )
            and all(
                isinstance(each, _StorageInfo) and DATA_FILE.fullmatch(each.relative_path)
                for each in index.storage_data.values()
            )
        )
        if not sound:
            raise ValueError("it lists other things than tensors")
        for name in files_of(index):
            open_regular(checkpoint / name).close()
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            reason = f"{Path(error.filename).name}: {error.strerror}"
        raise DamagedError(f".metadata is no index of tensors: {reason.splitlines()[0]}") from error
    return index


def files_of(index: Metadata) -> set[str]:
    """Names of the files that hold the tensors of an index."""
    return {each.relative_path for each in index.storage_data.values()}


def stored_weights(index: Metadata) -> dict[str, StoredTensor]:
    """The model's tensors in a checkpoint, by name."""
    found = {}
    for name, about in _weights(index).items():
        kind = about.properties.dtype
        found[name] = StoredTensor(list(about.size), str(kind), kind.is_floating_point)
    return found


def _weights(index: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name.removeprefix(_MODEL): about
        for name, about in index.state_dict_metadata.items()
        if name.startswith(_MODEL) and isinstance(about, TensorStorageMetadata)
    }


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _ALLOWED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed there")
