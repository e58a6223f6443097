"""The output of an evaluation: a printed table and ``eval_<split>.json``."""

from pathlib import Path

from model.evaluation.evaluate import Result
from pipeline.errors import UserError
from pipeline.files import write_json

_PROTOCOLS = {
    "drop": {
        "sampled": "sampled (against unseen items by popularity)",
        "full": "full (all items, seen ones removed)",
    },
    "keep": {
        "sampled": "sampled (against items by popularity)",
        "full": "full (all items, seen ones kept)",
    },
}
# Keys of a result that is not the one of training, by which its file is named, too.
_NOTES = {
    "popularity_discount": "popularity discount {:g}",
    "other_seen": "seen items not as in training ({})",
    "other_ratings": "on other ratings than those of training ({})",
}


def format_report(split: str, result: Result, best_possible: dict[str, float] | None = None) -> str:
    """The table of a split: for each protocol the model's row, then the popularity ranking's.

    Then the :func:`remarks`.
    """
    rows: list[tuple[str, dict[str, float]]] = []
    for protocol, label in _PROTOCOLS[_seen(result)].items():
        rows.append((label, result[protocol]))
        if "popularity" in result:
            rows.append((f"{protocol}, popularity alone", result["popularity"][protocol]))
    if best_possible and _seen(result) == "drop":  # it never repeats an item
        rows.append(("full, best possible on this data", best_possible))
    notes = "".join(f", {_NOTES[key].format(result[key])}" for key in _NOTES if key in result)
    table = f"{split}, {result['users']:,} users{notes}\n{format_table(rows)}"
    return "\n".join([table, *remarks(result)])


def _seen(result: Result) -> str:
    return result.get("protocol", {}).get("seen", "drop")


def remarks(result: Result) -> list[str]:
    """A line for each reason not to trust the figures or the model."""
    found = []
    if fewer := result.get("fewer_negatives"):
        unseen = "unseen items" if _seen(result) == "drop" else "items to draw"
        found.append(
            f"{fewer:,} of {result['users']:,} users have fewer {unseen} than "
            "--eval_negatives: their sampled metrics are too high; compare full ones"
        )
    below = [
        f"{protocol} {result[protocol]['NDCG@10']:.4f} against {known['NDCG@10']:.4f}"
        for protocol, known in result.get("popularity", {}).items()
        if result[protocol]["NDCG@10"] < known["NDCG@10"]
    ]
    if below:
        remedy = "train longer (--num_epochs), start from a recipe (--recipe), or change --lr"
        if "popularity_discount" in result:
            remedy = "lower --popularity_discount, which lowers full metrics, or train longer"
        found.append(f"the model is below popularity (NDCG@10 {', '.join(below)}): {remedy}")
    return found


def format_table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Rows of (label, metrics) as aligned text with a header, the metrics of the first row."""
    width = max(len(label) for label, _ in rows)
    names = {name: max(9, 2 + len(name)) for name in rows[0][1]}
    lines = [" " * width + "".join(f"{name:>{size}}" for name, size in names.items())]
    for label, row in rows:
        cells = (
            f"{row[name]:>{size}.4f}" if name in row else " " * size for name, size in names.items()
        )
        lines.append(f"{label:<{width}}" + "".join(cells).rstrip())
    return "\n".join(lines)


def write_result(folder: Path, split: str, result: Result) -> Path:
    """Write ``eval_<split>.json`` into ``folder``; other keys than training's change the name."""
    name = f"eval_{split}"
    if discount := result.get("popularity_discount"):
        name += f"-discount-{discount:g}"
    if seen := result.get("other_seen"):
        name += f"-seen-{seen}"
    if ratings := result.get("other_ratings"):
        name += f"-ratings-{ratings}"
    path = folder / f"{name}.json"
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path
