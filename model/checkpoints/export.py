"""The trained model as safetensors: no pickle, no sharding, no optimizer state.

exported/
    model.safetensors    all weights, under the names of the plain BERT4Rec
    config.json          flags, number of items, catalog fingerprint, versions
    catalog.parquet      original id and title of each item
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor  # Private: TorchRec's shards

from model.checkpoints.safe_reader import SafeReader
from pipeline.errors import UserError
from pipeline.files import aside_of, publish, sync, sync_files
from pipeline.preparation.catalog import Catalog

WEIGHTS = "model.safetensors"


def export(checkpoint: Path, plain: nn.Module, run_dir: Path, folders: Iterable[Path]) -> None:
    """Export the folder of a checkpoint into each of ``folders``; call it on one rank.

    A new folder is complete once it exists; in an existing folder the weights are replaced last.
    ``plain``, an unsharded BERT4Rec, gets the checkpoint's weights.
    """
    weights = plain.to_empty(device="cpu").state_dict()
    dcp.load({"model": weights}, storage_reader=SafeReader(checkpoint), no_dist=True)
    for folder in folders:
        aside = aside_of(folder)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            Catalog.read(run_dir).write_to(aside)
            shutil.copyfile(run_dir / "config.json", aside / "config.json")
            save_file(weights, aside / WEIGHTS)
            sync_files(aside)
            if not folder.exists():
                publish(aside, folder)
                continue
            for path in sorted(aside.iterdir(), key=lambda path: path.name == WEIGHTS):
                path.replace(folder / path.name)
            sync(folder)
            aside.rmdir()
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"{folder} cannot be written: {error.strerror or error}; the trained model is in "
                f"{checkpoint}: make room and run again with --resume auto"
            ) from error


def load_exported(folder: Path, model: nn.Module) -> None:
    """Load exported weights into a model, plain or sharded; each rank reads only its own rows."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights, torch.no_grad():
            wanted = model.state_dict()
            if different := wanted.keys() ^ set(weights.keys()):
                raise ValueError(f"size mismatch: {min(different)} is only in one of both")
            for name, tensor in wanted.items():
                _read(weights.get_slice(name), tensor, name)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{folder / WEIGHTS} cannot be loaded ({reason}): its config.json belongs to another "
            "model, or it is damaged; export it again"
        ) from error


def _read(stored: Any, tensor: torch.Tensor | ShardedTensor, name: str) -> None:
    if (found := stored.get_shape()) != list(tensor.shape):
        raise ValueError(f"size mismatch of {name}: {found}, not {list(tensor.shape)}")
    if not isinstance(tensor, ShardedTensor):
        tensor.copy_(stored[...])
        return
    for shard in tensor.local_shards():
        ranges = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        shard.tensor.copy_(stored[tuple(slice(start, start + size) for start, size in ranges)])
