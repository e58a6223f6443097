"""model.pt2 and model.onnx: the encoder without Python classes of this project.

    torch.export.load("model.pt2").module()(histories, item_table)      -> vectors [B, D]
    onnxruntime.InferenceSession("model.onnx").run(None, {"histories": histories})

A model that reads times has ``times`` as another input, the last one (``padded.py``).

The ONNX graph reads the item table from model.safetensors, as external data: the table is stored
once. The torch program takes it as an argument (tensor ``item_table`` of ``item_table_of``).

Shapes: B users, L items of the longest history, D width, V items.
"""

import io
import json
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from model.bert4rec import BERT4Rec
from model.programs.padded import PaddedEncoder
from pipeline.batches.features import ITEM

TORCH_PROGRAM, ONNX_PROGRAM = "model.pt2", "model.onnx"
_OPSET = 18
_HISTORIES, _TABLE, _TIMES, _VECTORS = "histories", "item_table", "times", "user_vectors"


def item_table_name(bert: BERT4Rec) -> str:
    """Name of the table of histories' items among the weights."""
    tables = bert.embeddings.embedding_configs()
    (name,) = (table.name for table in tables if ITEM in table.feature_names)
    return f"embeddings.embeddings.{name}.weight"


def write_exported(bert: BERT4Rec, folder: Path, weights: str) -> None:
    """Write both programs into ``folder``, which has the weights in safetensors ``weights``.

    ``bert``: plain, on CPU.
    """
    import onnx  # takes a part of a second: training starts without it

    encoder = PaddedEncoder(bert).eval()
    name = item_table_name(bert)
    table = bert.state_dict()[name]
    longest = encoder.longest
    histories = torch.ones(2, min(2, longest), dtype=torch.int64)
    length = Dim("length", min=1, max=longest) if longest > 1 else None
    # A program of any number of users: Dim.DYNAMIC would exclude one user.
    users = Dim("users", min=1)
    given: tuple[Tensor, ...] = histories, table
    shapes: tuple[Any, ...] = {0: users, 1: length}, None
    names: tuple[Any, ...] = {0: "users"} | ({1: "length"} if length else {}), None
    inputs = [_HISTORIES, _TABLE]
    if encoder.times is not None:
        given += (torch.zeros(2, histories.shape[1] + 2, dtype=torch.int64),)
        shapes += ({0: users, 1: length + 2 if length else None},)
        names += ({0: "users"} | ({1: "length + 2"} if length else {}),)
        inputs.append(_TIMES)
    with torch.no_grad(), _quiet():
        program = torch.export.export(encoder, given, dynamic_shapes=shapes)
        program.example_inputs = None  # else the file would hold the table
        content = io.BytesIO()  # torch's own file says nothing of a full disk
        torch.export.save(program, content)
        (folder / TORCH_PROGRAM).write_bytes(content.getvalue())
        exported = torch.onnx.export(
            program,
            opset_version=_OPSET,
            input_names=inputs,
            output_names=[_VECTORS],
            dynamic_shapes=names,  # the program's own names are numbers by now
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    _read_table_from(model, folder / weights, name)
    onnx.save(model, folder / ONNX_PROGRAM)


def _read_table_from(model: Any, weights: Path, name: str) -> None:
    """Make the graph's input ``item_table`` an initializer that lies in a safetensors file."""
    import onnx

    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(size))[name]
    first, end = entry["data_offsets"]
    given = next(each for each in model.graph.input if each.name == _TABLE)
    table = onnx.TensorProto(name=_TABLE, dims=entry["shape"])
    table.data_type = given.type.tensor_type.elem_type
    table.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": weights.name, "offset": 8 + size + first, "length": end - first}
    for key, value in place.items():
        table.external_data.add(key=key, value=str(value))
    model.graph.input.remove(given)
    model.graph.initializer.append(table)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report their progress by warnings and logs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
