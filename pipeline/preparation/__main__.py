"""Prepare a data set, or with --dry_run only say what was recognised and what would be kept.

    python -m pipeline.preparation --dataset_path clicks.csv --dry_run

The flags are those of the data, as of train.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from pipeline.errors import UserError, exit_with_message
from pipeline.preparation.checks import UNITS
from pipeline.preparation.prepare import build, describe, prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.sources.datasets import resolve

_USERS, _ITEMS = 3, 8  # shown
_KINDS = {str(kind): kind for kind in (int, float)} | {str(float | None): float}


def main(arguments: Sequence[str]) -> None:
    """Prepare the data set that the flags name; prints what each stage kept."""
    flags = vars(_parser().parse_args(arguments))
    dry_run = flags.pop("dry_run")
    config = DataConfig(**flags)
    if not dry_run:
        store = prepare(config)
        print(describe(store), f"\n  in {store.path}", sep="")
        return
    source = resolve(config)
    try:
        store = build(source, config)
    finally:
        for line in getattr(source.ratings, "recognised", []):
            print(line, flush=True)
    print(describe(store))
    print("\n".join(["  first histories, oldest item first:", *first_histories(store)]))


def first_histories(store: SequenceStore) -> list[str]:
    """A line for each of the first users: original id, and the first items with their times."""
    lines = []
    times, unit = store.times, store.time_unit
    for user in range(min(_USERS, store.num_users)):
        start, end = store.offsets[user : user + 2].tolist()
        shown = []
        for at in range(start, min(end, start + _ITEMS)):
            text = store.catalog.item_id(int(store.items[at]))
            if times is not None:
                text += f" ({_shown(int(times[at]), unit)})"
            shown.append(text)
        more = f", ... {end - start:,} in all" if end - start > _ITEMS else ""
        lines.append(f"    {store.catalog.users[user].as_py()}: {', '.join(shown)}{more}")
    return lines


def _shown(time: int, unit: str) -> str:
    return str(np.datetime64(time // UNITS[unit], "s")) if unit in UNITS else f"{time}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pipeline.preparation",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--dry_run", action="store_true", default=False, help="say what would be, write nothing"
    )
    for entry in fields(DataConfig):
        kind: Any = _KINDS.get(str(entry.type), str)
        parser.add_argument(
            f"--{entry.name}", type=kind, help=entry.metadata["help"].replace("%", "%%")
        )
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        exit_with_message(str(error))
    # Not the interpreter's own end: a thread of Arrow that lets a Python object go then aborts it.
    os._exit(0)
