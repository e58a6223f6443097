"""Lists of items as text for the user: a history, and what is recommended after it."""

from collections.abc import Sequence

import numpy as np

from model.serving.rows import Lists
from pipeline.preparation.catalog import Catalog

_SHOWN = 10  # newest items of a history


def format_history(catalog: Catalog, items: np.ndarray) -> str:
    """The newest items of a history, int [T] dense ids, oldest first."""
    if not len(items):
        return "history without a known item: the most popular items"
    shown = items[-_SHOWN:].tolist()
    some = f", the newest {len(shown)}" if len(shown) < len(items) else ""
    count = f"{len(items):,} known item{'s' * (len(items) != 1)}"
    lines = [[catalog.item_id(item), catalog.title(item)] for item in shown]
    return "\n".join([f"history of {count}{some}, oldest first", *_aligned(lines)])


def format_list(catalog: Catalog, lists: Lists, scored_by: str) -> str:
    """The list of one user: rank, item, title if there are any, score.

    Args:
        scored_by: heading of the scores; "count": they are whole numbers.
    """
    digits = 0 if scored_by == "count" else 4
    lines = [["rank", "item", "title", scored_by]]
    for rank, (item, score) in enumerate(zip(lists.items[0], lists.scores[0], strict=True), 1):
        if item:
            ids = catalog.item_id(int(item)), catalog.title(int(item))
            lines.append([str(rank), *ids, f"{score:.{digits}f}"])
    if not any(line[2] for line in lines[1:]):
        lines = [[rank, item, score] for rank, item, _, score in lines]
    return "\n".join(_aligned(lines))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return ["  " + "  ".join(line).rstrip() for line in cells]
