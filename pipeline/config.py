"""Config classes: frozen dataclasses whose fields declare a flag, its help and its allowed values.

    @dataclass(frozen=True)
    class WindowConfig(Config):
        max_len: int = flag(100, "maximum number of items in a window", at_least=1)

    WindowConfig(max_len=0)          UserError: --max_len must be at least 1, not 0

Modules named ``config.py`` import nothing large (no torch, no pyarrow), so that ``--help`` and
errors in flags appear at once.
"""

import math
import operator
import reprlib
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, get_args

from pipeline.errors import UserError

_HOLDS = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    limit: float | None = None,
    reason: str = "",
    values: int = 1,
    is_path: bool = False,
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field that is a command line flag.

    Args:
        help: what the flag does and its unit; one clause, no full stop.
        limit: the most that fits numbers and memory; named only in the error of a larger value.
        reason: why these bounds; ends the error message.
        values: how many the flag takes; more than one make a tuple of texts.
        is_path: whether ~ on a command line is the home folder; shells do not see it in --flag=~/x.
        aliases: other names, accepted on the command line and in config.json.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
        "limit": math.inf if limit is None else limit,
        "reason": reason,
        "values": values,
        "is_path": is_path,
        "aliases": tuple(aliases),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Base of the config classes: a new instance checks its flags and raises `UserError`."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if "choices" in entry.metadata:
                value = getattr(self, entry.name)
                _check_type(entry, value)
                _check_value(entry, value)
        self.check()

    def check(self) -> None:
        """Rules about more than one flag; subclasses raise UserError."""


def plain_type(entry: Field) -> type:
    """``int`` of a flag ``int | None``."""
    kinds = get_args(entry.type) or (entry.type,)
    return next(each for each in kinds if each is not type(None))


def _check_type(entry: Field, value: Any) -> None:
    """Values of callers and of files have any type; those of NumPy count as Python's."""
    if entry.metadata["values"] > 1 or (value is None and type(None) in get_args(entry.type)):
        return
    plain = plain_type(entry)
    kind = {int: Integral, float: Real}.get(plain, plain)
    if not isinstance(value, kind) or (type(value) is bool and plain is not bool):
        found = reprlib.repr(value)
        raise UserError(f"--{entry.name} must be of type {plain.__name__}, not {found}")


def _check_value(entry: Field, value: Any) -> None:
    choices, bounds = entry.metadata["choices"], entry.metadata["bounds"]
    if choices and value not in choices:
        raise UserError(f"--{entry.name} must be one of {', '.join(choices)}, not {value!r}")
    if not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{entry.name} must be a finite number, not {value}")
    if value > entry.metadata["limit"]:
        limit = entry.metadata["limit"]
        raise UserError(f"--{entry.name} must be at most {limit:,}, not {value}")
    if not all(_HOLDS[word](value, bound) for word, bound in bounds.items()):
        allowed = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items())
        reason = f": {entry.metadata['reason']}" if entry.metadata["reason"] else ""
        raise UserError(f"--{entry.name} must be {allowed}, not {value}{reason}")
    if abs(value) >= 1 << 63 and isinstance(value, int):
        raise UserError(f"--{entry.name} must have less than 64 bits, not {value.bit_length():,}")
