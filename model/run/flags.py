"""Command line flags from config dataclasses: one field, one flag, one default.

Every config class declares its flags as fields with a help text and checks them itself; this module
only turns fields into an argument parser and back. Names are flat: ``--max_len`` is the field
``max_len`` of whatever group has it.

    parser = FlagParser("Train BERT4Rec", RunConfig)
    config = parser.parse(["--mode", "ddp", "--num-epochs", "3"])     # hyphens work too
    assert build(RunConfig, flatten(config)) == config
"""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import UserError

C = TypeVar("C")

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}


def flags_of(group_class: type) -> dict[str, dataclasses.Field]:
    """All flags of a config class: its own fields and, recursively, those of its groups.

    A class with groups holds config dataclasses as fields; a name in two groups is a bug of ours.
    """
    flags: dict[str, dataclasses.Field] = {}
    hints = typing.get_type_hints(group_class)
    for entry in dataclasses.fields(group_class):
        kind = hints[entry.name]
        found = flags_of(kind) if dataclasses.is_dataclass(kind) else {entry.name: entry}
        clash = flags.keys() & found.keys()
        assert not clash, f"flags declared twice: {clash}"
        flags |= found
    return flags


def flatten(config: Any) -> dict[str, Any]:
    """Flag values of a config, JSON-able, in the order of declaration."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {entry.name: value}
    return flat


def build(config_class: type[C], flat: Mapping[str, Any]) -> C:
    """The config that ``flat`` describes; missing flags keep their defaults.

    Raises:
        UserError: an unknown flag, a value of another type, or one the config refuses.
    """
    unknown = flat.keys() - flags_of(config_class).keys()
    if unknown:
        raise UserError(f"unknown settings {', '.join(sorted(unknown))}: made by another version?")
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config_class):
        kind = hints[entry.name]
        if dataclasses.is_dataclass(kind):
            inside = flags_of(kind).keys() & flat.keys()
            values[entry.name] = build(kind, {name: flat[name] for name in inside})
        elif entry.name in flat:
            values[entry.name] = _checked(entry, kind, flat[entry.name])
    return config_class(**values)


class FlagParser(argparse.ArgumentParser):
    """An argument parser over a config class whose complaints are one line.

    Args:
        description: for ``--help``.
        config_class: its flags, nested groups included.
    """

    def __init__(self, description: str, config_class: type[C]) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="%(prog)s [--flag value] ...",
        )
        self._config_class = config_class
        self._add_group(config_class, self)

    def _add_group(self, group_class: type, where: Any) -> None:
        hints = typing.get_type_hints(group_class)
        for entry in dataclasses.fields(group_class):
            kind = hints[entry.name]
            if dataclasses.is_dataclass(kind):
                title = (kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")
                self._add_group(kind, self.add_argument_group(title))
                continue
            shown = "" if entry.default in (None, "") else f" (default: {entry.default})"
            where.add_argument(
                f"--{entry.name}",
                type=_reader(kind),
                choices=entry.metadata.get("choices"),
                help=entry.metadata["help"].replace("%", "%%") + shown,
                metavar=None if "choices" in entry.metadata else _METAVARS[_plain(kind)],
            )

    def parse(self, arguments: Sequence[str]) -> Any:
        """The config that the command line asks for.

        Raises:
            UserError: an unknown flag or a bad value.
        """
        return build(self._config_class, self.given(arguments))

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Only what the command line says, by flag name."""
        known, rest = self.parse_known_args([_underscored(a) for a in arguments])
        if rest:
            names = [option for option in self._option_string_actions if option.startswith("--")]
            close = difflib.get_close_matches(rest[0].split("=")[0], names, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise UserError(f"unknown argument {rest[0]}: {hint}")
        return vars(known)

    def error(self, message: str) -> typing.NoReturn:
        """One line instead of the usage text."""
        raise UserError(message.removeprefix("argument "))


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _plain(kind: Any) -> type:
    """``int`` of ``int | None``."""
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _reader(kind: Any) -> Any:
    plain = _plain(kind)
    return _boolean if plain is bool else plain


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def _checked(entry: dataclasses.Field, kind: Any, value: Any) -> Any:
    """``value`` if it is of the flag's type and among its choices (a file may hold anything)."""
    name, choices = entry.name, entry.metadata.get("choices")
    if value is None and isinstance(kind, types.UnionType):
        return None
    plain = _plain(kind)
    fits = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not fits:
        raise UserError(f"--{name} must be of type {plain.__name__}, not {value!r}")
    if choices and value not in choices:
        raise UserError(f"--{name} must be one of {', '.join(choices)}, not {value!r}")
    if plain is float and not math.isfinite(value):
        raise UserError(f"--{name} must be a finite number, not {value}")
    return value
