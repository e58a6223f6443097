"""The portable form of a trained model: no pickle, no sharding, no optimizer.

exported/
    model.safetensors    all weights, under the names of the plain BERT4Rec
    config.json          flags, number of items, catalog fingerprint, metrics
    catalog.parquet      original id and title of each item
"""

import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.catalog import Catalog
from pipeline.errors import UserError

WEIGHTS = "model.safetensors"


def export(checkpoint: Path, plain: nn.Module, run_dir: Path, folder: Path) -> None:
    """Write the portable form of a checkpoint; call it on one rank.

    Args:
        checkpoint: folder of the checkpoint.
        plain: an unsharded BERT4Rec on CPU; gets the weights of the checkpoint.
        run_dir: the run folder, for its config and catalog.

    Raises:
        UserError: the folder cannot be written.
    """
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / (WEIGHTS + ".part")
        save_file({name: t.contiguous() for name, t in state["model"].items()}, aside)
        Catalog.read(run_dir).write_to(folder)
        shutil.copyfile(run_dir / "config.json", folder / "config.json")
        aside.replace(folder / WEIGHTS)
    except OSError as error:
        raise UserError(f"--export_root {folder} cannot be written: {error.strerror}") from error


def load_exported(folder: Path, plain: nn.Module) -> None:
    """Load exported weights into a plain model, before it is sharded.

    Raises:
        UserError: the weights are damaged or of another shape.
    """
    try:
        plain.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder / WEIGHTS} cannot be loaded: {reason}") from error
