"""Command line flags from config classes, which check the values (:mod:`pipeline.config`).

Names are flat: ``--max_len`` is the field ``max_len`` of the group that declares it.
"""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import Config, plain_type
from pipeline.errors import UserError

C = TypeVar("C", bound=Config)

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}
_CLOSING_LINE = "--help-all shows all flags, by group; hyphens in names work too"
# Flags that earlier versions wrote into config.json, each with its value that has no effect now.
_RETIRED_FLAGS = {"attention_dropout": 0.0}
# Values that earlier versions wrote into config.json and this version refuses.
_RETIRED_VALUES = {"positions": "bias"}
# Names of recipes of earlier versions, whose flags config.json has.
_RETIRED_RECIPES = ("ml-100k", "ml-1m", "ml-1m-taught", "ml-20m", "beauty")


def flags_of(group_class: Any) -> dict[str, dataclasses.Field]:
    """Flags of a config class and its groups, by name."""
    flags: dict[str, dataclasses.Field] = {}
    for entry in dataclasses.fields(group_class):
        is_group = dataclasses.is_dataclass(entry.type)
        found = flags_of(entry.type) if is_group else {entry.name: entry}
        assert flags.keys().isdisjoint(found), f"a flag of {entry.name} is declared twice"
        flags |= found
    return flags


def flatten(config: Any) -> dict[str, Any]:
    """Flag values of a config by name, JSON-able."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {entry.name: value}
    return flat


def changed(config: Config) -> dict[str, Any]:
    """The flags of a config that differ from their defaults."""
    defaults = flatten(type(config)())
    return {name: value for name, value in flatten(config).items() if value != defaults[name]}


def build(config_class: type[C], flat: Mapping[str, Any]) -> C:
    """The config whose :func:`flatten` is ``flat``; missing flags keep their defaults."""
    unknown = flat.keys() - flags_of(config_class).keys()
    if unknown:
        raise UserError(f"unknown settings {', '.join(sorted(unknown))}: made by another version?")
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(entry.type):
            inside = flat.keys() & flags_of(entry.type).keys()
            group = typing.cast(type[Config], entry.type)
            values[entry.name] = build(group, {name: flat[name] for name in inside})
        elif entry.name in flat:
            values[entry.name] = _converted(entry, flat[entry.name])
    return config_class(**values)


def current_flags(config_class: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a config.json, which an earlier version may have written, for :func:`build`."""
    flags = flags_of(config_class)
    new_names = {alias: name for name in flags for alias in flags[name].metadata["aliases"]}
    flat: dict[str, Any] = {}
    for name, value in recorded.items():
        if name in _RETIRED_FLAGS and value == _RETIRED_FLAGS[name]:
            continue
        if name in _RETIRED_FLAGS or value == _RETIRED_VALUES.get(name, ...):
            raise UserError(
                f"made with --{name} {value}, which this version no longer has: use the version "
                "that made it"
            )
        if name == "acceleration" and value in ("graphs", "compile"):  # it changed only the speed
            value = "auto"
        if name == "recipe" and value in _RETIRED_RECIPES:
            value = "none"
        flat[new_names.get(name, name)] = value
    return flat


class FlagParser(argparse.ArgumentParser):
    """An argument parser over a config class; an error is a UserError of one line.

    ``--help`` shows the ``main_flags`` and ``--help-all`` all flags by group; without
    ``main_flags`` both show all.
    """

    def __init__(
        self, description: str, config_class: type[C], main_flags: Sequence[str] | None = None
    ) -> None:
        super().__init__(
            description=description,
            epilog=None if main_flags is None else _CLOSING_LINE,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="%(prog)s [--flag value] ...",
        )
        self.config_class = config_class
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help=argparse.SUPPRESS)
        if main_flags is None:
            self._add_group(config_class, self)
            return
        flags = flags_of(config_class)
        main_group = self.add_argument_group("main flags")
        for name in main_flags:
            _add_flag(main_group, flags.pop(name))
        for entry in flags.values():
            _add_flag(self, entry, hidden=True)

    def _add_group(self, group_class: Any, where: Any) -> None:
        for entry in dataclasses.fields(group_class):
            if dataclasses.is_dataclass(entry.type):
                title = (entry.type.__doc__ or "").splitlines()[0].rstrip(".")
                self._add_group(entry.type, self.add_argument_group(title))
            else:
                _add_flag(where, entry)

    def parse(self, arguments: Sequence[str]) -> Any:
        """The config that a command line describes."""
        return build(self.config_class, self.given(arguments))

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The flags on a command line, by name, without defaults."""
        known, rest = self.parse_known_args([_underscored(a) for a in arguments])
        if rest:
            close = self._close_to(rest[0].split("=")[0].lower())
            hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
            raise UserError(f"unknown argument {rest[0]}: {hint}")
        return vars(known)

    def _close_to(self, name: str) -> list[str]:
        """The flags that may be meant by an unknown name."""
        known = ["--help", "--help_all"]
        for entry in flags_of(self.config_class).values():
            known += [f"--{each}" for each in (entry.name, *entry.metadata["aliases"])]
        # --batch_size is a part of several names, and nearest to none of them.
        word = name.strip("-")
        close = [each for each in known if word and each.endswith(f"_{word}")]
        return close or difflib.get_close_matches(name, known, n=1)

    def error(self, message: str) -> typing.NoReturn:
        """Raise the message instead of printing the usage."""
        raise UserError(message.removeprefix("argument "))


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, FlagParser)
        FlagParser(parser.description or "", parser.config_class).print_help()
        parser.exit()


def _add_flag(where: Any, entry: dataclasses.Field, hidden: bool = False) -> None:
    plain, choices = plain_type(entry), entry.metadata["choices"]
    convert: Callable[[str], Any] = _boolean if plain is bool else plain
    if entry.metadata["is_path"]:
        convert = _path
    alone: dict[str, Any] = {}
    if plain is bool:
        alone = {"nargs": "?", "const": True}  # --all is --all true
    elif (values := entry.metadata["values"]) > 1:
        alone = {"nargs": values}
    shown = "" if entry.default in (None, "", ()) else f" (default: {entry.default})"
    text = entry.metadata["help"].replace("%", "%%") + shown
    for name in (entry.name, *entry.metadata["aliases"]):
        where.add_argument(
            f"--{name}",
            dest=entry.name,
            type=convert,
            help=argparse.SUPPRESS if hidden or name != entry.name else text,
            metavar=f"{{{','.join(choices)}}}" if choices else _METAVARS[plain],
            **alone,
        )


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _path(text: str) -> str:
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        cause = f"{text}: there is no such user's home folder"
        raise argparse.ArgumentTypeError(cause) from error


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def _converted(entry: dataclasses.Field, value: Any) -> Any:
    """A value of a file or a command line, in which lists and whole numbers stand for others."""
    if entry.metadata["values"] > 1:
        return tuple(value)
    if plain_type(entry) is float and type(value) is int and abs(value) < 1 << 63:
        return float(value)
    return value
