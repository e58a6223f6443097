"""The files that serve a model, beside its weights, config.json and catalog in an export."""

import importlib.util
import shutil
from pathlib import Path

from model.bert4rec import BERT4Rec
from model.programs.exporters import ONNX_PROGRAM, TORCH_PROGRAM, write_exported
from model.programs.vectors import ITEMS, VECTORS, write_items, write_vectors
from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog

_RECOMMENDER = "recommender.py"
PROGRAM_FILES = (TORCH_PROGRAM, ONNX_PROGRAM, VECTORS, ITEMS, _RECOMMENDER)


def check_exporters() -> None:
    """UserError unless the packages that write ONNX are installed."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"an export needs the package {name}: pip install onnx onnxscript")


def write_programs(bert: BERT4Rec, catalog: Catalog, folder: Path, weights: str) -> None:
    """Write ``PROGRAM_FILES`` into a folder that has the weights as safetensors.

    Args:
        bert: a plain model on CPU, with its weights.
        weights: name of the weights' file, which model.onnx reads.
    """
    write_exported(bert, folder, weights)
    write_vectors(bert, folder)
    write_items(catalog, folder)
    shutil.copyfile(Path(__file__).with_name(_RECOMMENDER), folder / _RECOMMENDER)
