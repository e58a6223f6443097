"""item_vectors.npy and items.json: what a program needs beside the encoder to rank items.

Row i of the vectors is item i of items.json; the product of a user's vector and an item's is the
score of the evaluation. FAISS, usearch and pgvector read the vectors as they are.

Shapes: V items, D width.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from model.bert4rec import BERT4Rec
from pipeline.batches.features import CANDIDATE
from pipeline.preparation.catalog import Catalog

VECTORS, ITEMS = "item_vectors.npy", "items.json"
_ROWS = 1 << 18  # projected at once


def write_vectors(bert: BERT4Rec, folder: Path) -> None:
    """Write float32 [V, D] of a plain model on CPU, in blocks of rows."""
    (table,) = (
        bert.embeddings.embeddings[table.name].weight.detach()
        for table in bert.embeddings.embedding_configs()
        if CANDIDATE in table.feature_names
    )
    rows = table[1:-1]  # without padding and mask token
    about = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": tuple(rows.shape)}
    # Written, not mapped: on a full disk a mapped file ends the process (SIGBUS).
    with (folder / VECTORS).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, about)
        for low in range(0, len(rows), _ROWS):
            vectors = bert.head.project(rows[low : low + _ROWS]).numpy()
            file.write(np.ascontiguousarray(vectors, np.float32).data)


def write_items(catalog: Catalog, folder: Path) -> None:
    """Write original ids, titles and counts of what was trained on, in the order of the vectors.

    Ids are numbers where they are whole numbers in the source. One block of rows at a time is text.
    """
    columns: dict[str, Any] = {
        "items": catalog.items.cast(catalog.item_type),
        "titles": catalog.titles,
        "train_counts": catalog.train_counts,
    }
    if catalog.validation_counts is not None:
        columns["validation_counts"] = catalog.validation_counts
    with (folder / ITEMS).open("w", encoding="utf-8") as file:
        for number, (name, column) in enumerate(columns.items()):
            file.write(f'{", " if number else "{"}"{name}": [')
            for low in range(0, len(column), _ROWS):
                text = json.dumps(column[low : low + _ROWS].tolist(), ensure_ascii=False)
                file.write((", " if low else "") + text[1:-1])
            file.write("]")
        file.write("}")
