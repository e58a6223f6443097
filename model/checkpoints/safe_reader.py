"""Read a checkpoint without running code that may be hidden in it.

torch.distributed.checkpoint (DCP) stores its index, ``.metadata``, as a pickle, and unpickling can
call any function. SafeReader allows only the few classes that an index of tensors consists of. DCP
reads the tensors by torch.load(weights_only=True); it would unpickle other values unchecked.
"""

import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

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


class UnreadableIndex(BaseException):
    """The index is damaged or contains other objects than tensors.

    Not an Exception: dcp.load of torch 2.11 would hide it, and report that there is no index.
    """


class SafeReader(dcp.FileSystemReader):
    """A FileSystemReader for checkpoints that contain only tensors, from any source."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; dcp.load turns UnreadableIndex into a CheckpointException on all ranks."""
        # Private: FileSystemReader's fs and _get_metadata_path give the index's location.
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
                # Private: load_id, which the overridden FileSystemReader.read_metadata sets.
                metadata.storage_meta.load_id = self.load_id
            except Exception as error:
                raise UnreadableIndex(f".metadata is no index of tensors: {error}") from error
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _ALLOWED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed there")
