"""Vectors of the most popular items, for TensorBoard's projector.

    results/eval_test/
        projector_config.pbtxt    names the other two
        vectors.tsv               an item a line
        items.tsv                 its title, original id and training count

Shapes: N items, D width, V items of the catalog.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from pyarrow import csv
from torch import nn

from model.board.markdown import shortened
from model.evaluation.catalog_scores import CatalogScores
from model.evaluation.evaluate import exact
from model.tables.distribute import unwrap
from pipeline.files import whole_file, write_text
from pipeline.preparation.catalog import Catalog

MOST_ITEMS = 10_000
_CONFIG, _VECTORS, _ITEMS = "projector_config.pbtxt", "vectors.tsv", "items.tsv"


@dataclass(frozen=True, eq=False)
class ItemVectors:
    """Items, the most popular first, and the vectors that score them."""

    items: np.ndarray  # int64 [N], dense ids
    vectors: np.ndarray  # float32 [N, D]


def popular_items(model: nn.Module, counts: np.ndarray) -> ItemVectors:
    """The most popular items; called on all ranks, which send only the rows of these items.

    Args:
        counts: int64 [V + 2], training count of each item.
    """
    bert = unwrap(model)
    device = next(bert.encoder.parameters()).device
    chosen = np.argsort(-counts[1:-1], kind="stable")[:MOST_ITEMS] + 1
    items = torch.from_numpy(chosen).to(device)
    with torch.no_grad(), exact(model):
        catalog = CatalogScores(bert, device)
        found = []
        for part, rows in catalog.rows_of_parts():
            inside = ((items >= part.low) & (items < part.high)).nonzero().flatten()
            found.append((inside, rows[items[inside] - part.low]))
        vectors = found[0][1].new_zeros(len(items), found[0][1].shape[1])
        for inside, rows in found:
            vectors[inside] = rows
        if catalog.shared:
            dist.all_reduce(vectors)
    return ItemVectors(chosen, vectors.cpu().numpy())


def write_vectors(folder: Path, found: ItemVectors, catalog: Catalog) -> None:
    """Write the projector's files into a folder that has events; OSError if one fails."""
    columns = [pa.array(column) for column in np.round(found.vectors, 4).T]
    options = csv.WriteOptions(include_header=False, delimiter="\t")
    with whole_file(folder / _VECTORS) as file:
        csv.write_csv(pa.table(columns, [f"{i}" for i in range(len(columns))]), file, options)
    lines = ["title\tid\tcount"]
    for item in found.items.tolist():
        name = shortened(catalog.item_id(item))
        title = shortened(catalog.title(item)) or name
        lines.append(f"{title}\t{name}\t{catalog.train_counts[item - 1]}")
    write_text(folder / _ITEMS, "\n".join(lines) + "\n")
    named = {"tensor_name": "items", "tensor_path": _VECTORS, "metadata_path": _ITEMS}
    lines = [f'  {key}: "{value}"' for key, value in named.items()]
    write_text(folder / _CONFIG, "\n".join(["embeddings {", *lines, "}", ""]))
