"""The output of an evaluation: a printed table and ``eval_<split>.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from model.distributed import writing
from model.evaluation.evaluate import Result
from model.evaluation.ranked_users import MODEL, MOST_FREQUENT, RECENT, REPEAT_LAST
from pipeline.evaluation.config import SELECTING
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
_HALF_WIDTH = "± (95 %)"
_BASELINES = {
    REPEAT_LAST: "repeat last",
    MOST_FREQUENT: "most frequent of the user",
    RECENT: "popular in the last {recent_days} days",
}
_KINDS = {
    "history": "history length (users)",
    "target_popularity": "popularity of the target (users)",
    "target": "kind of target (users)",
}
# Keys of a result that is not the one of training, by which its file is named, too.
NOTES = {
    "popularity_discount": "popularity discount {:g}",
    "other_seen": "seen items not as in training ({})",
    "other_targets": "targets not as in training ({})",
    "other_ratings": "on other ratings than those of training ({})",
}


def format_report(
    split: str, result: Result, best_possible: Mapping[str, float] | None = None
) -> str:
    """The table of a split: for each protocol the model's row, then the popularity ranking's.

    Then the :func:`remarks`.
    """
    rows = [
        (_PROTOCOLS[_seen(result)][protocol] if name == MODEL else _row(protocol, name), metrics)
        for protocol, columns in rankings(result, best_possible).items()
        for name, metrics in columns.items()
    ]
    users = f"{result['users']:,} users"
    if "targets" in result:
        users += f" with {result['targets']:,} targets"
    table = f"{', '.join([split, users, *notes(result)])}\n{format_table(rows)}"
    return "\n".join([table, *about_lists(result), *_about_groups(result), *remarks(result)])


def notes(result: Result) -> list[str]:
    """In what the evaluation differs from that of training."""
    return [NOTES[key].format(result[key]) for key in NOTES if key in result]


def rankings(
    result: Result, best_possible: Mapping[str, float] | None = None
) -> dict[str, dict[str, Mapping[str, float]]]:
    """By protocol the metrics of the model, half of their intervals, and those of other rankings.

    Args:
        best_possible: full metrics that no model can beat, if they are known.
    """
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for protocol in _PROTOCOLS[_seen(result)]:
        rows = found[protocol] = {MODEL: result[protocol]}
        if "intervals" in result:
            rows[_HALF_WIDTH] = _half_widths(result["intervals"][protocol])
        if "popularity" in result:
            rows["popularity alone"] = result["popularity"][protocol]
        for name, metrics in result.get("baselines", {}).items():
            rows[_BASELINES[name].format_map(result)] = metrics[protocol]
    if best_possible and _seen(result) == "drop":  # it never repeats an item
        found["full"]["best possible on this data"] = best_possible
    return found


def _row(protocol: str, name: str) -> str:
    return f"  {name}" if name == _HALF_WIDTH else f"{protocol}, {name}"


def _half_widths(bounds: dict[str, list[float]]) -> dict[str, float]:
    return {name: (high - low) / 2 for name, (low, high) in bounds.items()}


def about_lists(result: Result) -> list[str]:
    """Metrics that are not in the table, at 10; all are in the result file."""
    if "lists" not in result:
        return []
    lists, debiased = result["lists"], result["debiased"]
    return [
        f"lists of 10: {lists['coverage@10']:.1%} of the catalog, mean popularity "
        f"{lists['popularity@10']:,.1f}, novelty {lists['novelty@10']:.2f} bits",
        f"debiased of popularity: full HR@10 {debiased['HR@10']:.4f}, NDCG@10 "
        f"{debiased['NDCG@10']:.4f}; {result['cold_targets']:.1%} of targets are cold",
    ]


def _about_groups(result: Result) -> list[str]:
    lines = []
    for kind, groups in result.get("groups", {}).items():
        shown = (
            f"{name} {group['full'][SELECTING]:.4f} ({group['users']:,})"
            for name, group in groups.items()
        )
        lines.append(f"full {SELECTING} by {_KINDS[kind]}: {', '.join(shown)}")
    return lines


def _seen(result: Result) -> str:
    return result.get("protocol", {}).get("seen", "drop")


def remarks(result: Result) -> list[str]:
    """A line for each reason not to trust the figures or the model."""
    found = []
    if left_out := result.get("users_left_out"):
        lack = "have fewer than 3 items: they are trained on and not evaluated"
        if result.get("protocol", {}).get("split", "leave_one_out") != "leave_one_out":
            lack = "have no item of this part, or none before it: they are not evaluated"
        found.append(f"{left_out:,} of {left_out + result['users']:,} users {lack}")
    if dropped := result.get("ratings_dropped"):
        found.append(
            f"{dropped:,} ratings of this part are not evaluated: their items or users have too "
            "few training ratings (--min_item_count, --min_user_count)"
        )
    if fewer := result.get("fewer_negatives"):
        unseen = "unseen items" if _seen(result) == "drop" else "items to draw"
        found.append(
            f"{fewer:,} of {result['users']:,} users have fewer {unseen} than "
            "--eval_negatives: their sampled metrics are too high; compare full ones"
        )
    below = [
        f"{protocol} {result[protocol][SELECTING]:.4f} against {known[SELECTING]:.4f}"
        for protocol, known in result.get("popularity", {}).items()
        if result[protocol][SELECTING] < known[SELECTING]
    ]
    if below:
        remedy = "train longer (--num_epochs), change --lr, or leave flags to --recipe auto"
        if "popularity_discount" in result:
            remedy = "lower --popularity_discount, which lowers full metrics, or train longer"
        found.append(f"the model is below popularity ({SELECTING} {', '.join(below)}): {remedy}")
    own, baselines = result["full"], dict(result.get("baselines", {}))
    recent = baselines.pop(RECENT, None)
    if recent and own[SELECTING] < (other := recent["full"][SELECTING]):
        found.append(
            f"the model is below what was popular in the last {result['recent_days']} days "
            f"({SELECTING} full {own[SELECTING]:.4f} against {other:.4f}): train longer, or on "
            "later data"
        )
    repeated = [rows["full"][SELECTING] for rows in baselines.values()]
    if repeated and own[SELECTING] < (best := max(repeated)):
        found.append(
            f"the model is below repeating the user's own items ({SELECTING} full "
            f"{own[SELECTING]:.4f} against {best:.4f}): train longer, or show those items beside "
            "its own"
        )
    return found


def format_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
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
    """Write ``eval_<split>.json`` into ``folder``; other keys than training's change the name.

    Raises:
        UserError: it cannot be written.
    """
    name = f"eval_{split}"
    if discount := result.get("popularity_discount"):
        name += f"-discount-{discount:g}"
    if seen := result.get("other_seen"):
        name += f"-seen-{seen}"
    if targets := result.get("other_targets"):
        name += f"-targets-{targets}"
    if ratings := result.get("other_ratings"):
        name += f"-ratings-{ratings}"
    path = folder / f"{name}.json"
    with writing(path):
        write_json(path, result)
    return path
