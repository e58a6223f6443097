"""Reading a checkpoint without running code of whoever wrote it.

    dcp.load(state, storage_reader=SafeReader(path))

torch.distributed.checkpoint keeps its index (``.metadata``) as a pickle, and a pickle may call
anything. This reader unpickles nothing but the few classes that an index of tensors is made of.
Values that are no tensors are not among them: torch would unpickle those freely, and we write none.
Tensors themselves are read by torch.load(weights_only=True).
"""

import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

_KNOWN = {
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
    """A FileSystemReader for checkpoints of tensors alone, from anybody."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            ValueError: it is not whole, or there is more in it than places of tensors.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
            except Exception as error:
                raise ValueError(f".metadata is no index of tensors: {error}") from error
        if not isinstance(metadata, Metadata) or metadata.storage_meta is None:
            raise ValueError(".metadata is no index of tensors")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _KNOWN.get(module, ()) or is_type:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
