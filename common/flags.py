"""Dataclass fields as command-line flags: typed, documented, and refused in one line when they cannot work.

A section of the configuration is a frozen dataclass whose fields are made with flag(); the annotation gives the
type (int, float, str, bool, `X | None`, `tuple[X, ...]`), the section the group in --help.
"""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from common.errors import ConfigError, one_line, shown

MODES = ("pretrain", "finetune")

_TYPE_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")
_EXPLICIT = "_explicit_flags"

Section = TypeVar("Section")


@dataclass(frozen=True)
class FlagSpec:
    """What flag() was given, beside the default."""

    help: str
    modes: tuple[str, ...]
    choices: tuple[Any, ...] | None
    minimum: float | None
    maximum: float | None
    metavar: str | None
    nargs: str | int | None
    required: bool
    aliases: tuple[str, ...]

    def expected(self, kind: type) -> str:
        """What a single value must be, in words."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        word = _TYPE_WORDS[kind]
        if self.minimum is not None and self.maximum is not None:
            return f"{word} from {self.minimum} to {self.maximum}"
        if self.minimum is not None:
            return f"{word} of at least {self.minimum}"
        return word if self.maximum is None else f"{word} of at most {self.maximum}"

    def allows(self, value: Any) -> bool:
        """Whether a single value of the right type is within choices and range."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, (int, float)):
            low = -math.inf if self.minimum is None else self.minimum
            high = math.inf if self.maximum is None else self.maximum
            return low <= value <= high
        return True


@dataclass(frozen=True)
class _Kind:
    """An annotation taken apart: the type of a single value, whether None is one, whether it is a tuple."""

    single: type
    optional: bool
    many: bool


def flag(
    default: Any,
    help: str,  # noqa: A002 - the name that argparse users know
    *,
    modes: Sequence[str] = MODES,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    nargs: str | int | None = None,
    required: bool = False,
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: value when the flag is not given.
        help: one sentence; the default and the range are added to it.
        modes: programs or modes in which the flag has an effect; elsewhere it is refused.
        choices: the allowed values.
        minimum: smallest allowed value.
        maximum: largest allowed value.
        metavar: name of the value in --help, best its unit (SECONDS).
        nargs: how many values a tuple takes ("+" when not given).
        required: whether the flag must be given (the default is then never used on the command line).
        aliases: further names, without dashes.
    """
    spec = FlagSpec(
        help=help,
        modes=tuple(modes),
        choices=None if choices is None else tuple(choices),
        minimum=minimum,
        maximum=maximum,
        metavar=metavar,
        nargs=nargs,
        required=required,
        aliases=tuple(aliases),
    )
    for value in default if isinstance(default, tuple) else (default,):
        if value is not None and not spec.allows(value):
            raise ValueError(f"default {value!r} of the flag with the help {help!r} is not allowed")
    return dataclasses.field(default=default, metadata={"flag": spec})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a ConfigError of one line that says what to do.

    `--mask-prob` and `--mask_prob` are the same flag; abbreviations are not accepted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)
        self._elsewhere: dict[str, str] = {}
        # argparse itself takes -1 for a number, and -1e-3 for a flag
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def refuse(self, option: str, mode: str) -> None:
        """Remember a flag that exists, but has no effect in `mode`."""
        self._elsewhere[option] = mode

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Check and normalise the flags, parse, and note which ones were typed; see explicit()."""
        given, typed = self._checked(args)
        result, extras = super().parse_known_args(given, namespace)
        setattr(result, _EXPLICIT, explicit(result) | typed)
        return result, extras

    def error(self, message: str) -> NoReturn:
        """Raise what argparse itself finds as a ConfigError."""
        message = " ".join(message.split())
        if match := re.match(r"argument (-[^/\s:]+)[^:]*: (.*)", message):
            raise ConfigError(f"{match[1]}: {match[2]}; see --help")
        if match := re.match(r"argument (\S+): invalid choice: '(.*?)'.* \(choose from (.*)\)", message):
            choices = match[3].replace("'", "").split(", ")
            raise ConfigError(f"{match[2]}: expected one of {', '.join(choices)}{_nearest(match[2], choices)}")
        if match := re.match(r"the following arguments are required: (.*)", message):
            raise ConfigError(f"{match[1]}: must be given; see --help")
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            kind = "unknown flag" if match[1].startswith("-") else "not expected here (flags begin with --)"
            raise ConfigError(f"{match[1]}: {kind}; see --help")
        raise ConfigError(f"{message}; see --help")

    def _checked(self, args: Sequence[str] | None) -> tuple[list[str], frozenset[str]]:
        """The arguments with their flags in the registered spelling, and the fields that they set."""
        if args is None:
            raise TypeError("hand the arguments to parse_args(): only programs look at sys.argv")
        given, typed = list(args), set()
        for place, argument in enumerate(given):
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                break  # what follows belongs to the sub-command, which checks it itself
            if not argument.startswith("--"):
                continue
            name, equals, value = argument.partition("=")
            option = "--" + name[2:].replace("-", "_")
            action = self._option_string_actions.get(option)
            if action is None:
                self._unknown(name, option)
            if isinstance(action, _Switch):
                self._check_switch(name, action, value if equals else None, given[place + 1 : place + 2])
            given[place] = option + equals + value
            typed.add(action.dest)
        return given, frozenset(typed - {"help"})

    def _check_switch(self, name: str, action: _Switch, value: str | None, following: list[str]) -> None:
        if value is None and following and not following[0].startswith("-"):
            takes_words = any(not other.option_strings for other in self._actions)
            if not takes_words or following[0].lower() in _SWITCH_WORDS:
                value = following[0]
        if value is not None:
            raise ConfigError(f"{name} {value}: a switch takes no value; write {action.on} or {action.off} alone")

    def _unknown(self, name: str, option: str) -> NoReturn:
        if option in self._elsewhere:
            raise ConfigError(f"{name}: has no effect in {self._elsewhere[option]}; remove it")
        known = [text for text in self._option_string_actions if text.startswith("--")]
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        raise ConfigError(f"{name}: unknown flag; " + (f"did you mean {near[0]}?" if near else "see --help"))


def add_flags(parser: Parser, section: type, mode: str, group_title: str) -> None:
    """Give `parser` the flags of a dataclass that have an effect in `mode`, as a group of --help."""
    group = parser.add_argument_group(group_title)
    kinds = _kinds(section)
    for field in _flag_fields(section):
        spec: FlagSpec = field.metadata["flag"]
        kind = kinds[field.name]
        names = (field.name, *spec.aliases)
        options = [f"--{name}" for name in names]
        negative = [f"--no_{name}" for name in names] if kind.single is bool else []
        if mode not in spec.modes:
            for option in [*options, *negative]:
                parser.refuse(option, mode)
            continue
        common: dict[str, Any] = {
            "dest": field.name,
            "default": field.default,
            "required": spec.required,
            "help": _help(spec, kind, field.default),
        }
        if kind.single is bool:
            group.add_argument(*options, *negative, action=_Switch, **common)
        else:
            metavar = spec.metavar or (
                "{" + ",".join(map(str, spec.choices)) + "}" if spec.choices else _METAVARS[kind.single]
            )
            nargs = (spec.nargs or "+") if kind.many else None
            group.add_argument(
                *options,
                action=_StoreMany if kind.many else "store",
                type=_converter(options[0], spec, kind.single),
                metavar=metavar,
                nargs=nargs,
                **common,
            )


def explicit(namespace: argparse.Namespace) -> frozenset[str]:
    """Names of the fields whose flags the user typed."""
    return getattr(namespace, _EXPLICIT, frozenset())


def from_namespace(section: type[Section], namespace: argparse.Namespace) -> Section:
    """Build a dataclass (sections inside it included) from parsed flags; the rest keeps its defaults."""
    values: dict[str, Any] = {}
    for name, inner in _sections(section).items():
        values[name] = from_namespace(inner, namespace)
    for field in _flag_fields(section):
        if hasattr(namespace, field.name):
            values[field.name] = getattr(namespace, field.name)
    return section(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dicts, with lists for tuples, as JSON and checkpoints hold it."""
    return {field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(section: type[Section], values: Mapping[str, Any], where: str = "configuration") -> Section:
    """Build a dataclass from what to_dict() gave; missing keys take their defaults.

    Raises ConfigError that lists the unknown keys, or names a value of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: is {type(values).__name__}, expected a table of settings")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, section))}
    unknown = sorted(str(key) for key in values if key not in fields)
    if unknown:
        raise ConfigError(f"{where}: unknown settings {one_line(', '.join(unknown))}; was it made by another version?")
    inner, kinds = _sections(section), _kinds(section)
    built: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{where}: {name}"
        if name in inner:
            built[name] = from_dict(inner[name], value, place)
        else:
            built[name] = _from_plain(value, kinds.get(name), fields[name].metadata.get("flag"), place)
    return section(**built)


class _Switch(argparse.Action):
    """--flag and --no_flag, neither with a value."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)
        half = len(self.option_strings) // 2
        self.on, self.off = self.option_strings[0], self.option_strings[half]
        self._negative = frozenset(self.option_strings[half:])

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string not in self._negative)


class _StoreMany(argparse.Action):
    """Several values as a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def _help(spec: FlagSpec, kind: _Kind, default: Any) -> str:
    notes = []
    if spec.required:
        notes.append("required")
    elif kind.single is bool:
        notes.append(f"default: {'on' if default else 'off'}")
    elif default is None or default == "" or default == ():
        if "(default" not in spec.help:  # where nothing is given, the text may say what then holds
            notes.append("default: none")
    else:
        notes.append("default: " + (" ".join(map(str, default)) if kind.many else str(default)))
    if spec.choices is None and (spec.minimum is not None or spec.maximum is not None):
        notes.append(spec.expected(kind.single))
    return (f"{spec.help} ({'; '.join(notes)})" if notes else spec.help).replace("%", "%%")


def _converter(option: str, spec: FlagSpec, single: type) -> Any:
    """A function from the typed text to a value; its errors name flag, value and what is expected."""

    def convert(text: str) -> Any:
        try:
            value = single(text)
        except ValueError:
            value = None
        if value is None or not spec.allows(value):
            raise ConfigError(f"{option} {text}: expected {spec.expected(single)}{_nearest(text, spec.choices)}")
        return value

    return convert


def _nearest(text: str, choices: Iterable[Any] | None) -> str:
    near = difflib.get_close_matches(text, [str(choice) for choice in choices or ()], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _flag_fields(section: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(section) if "flag" in field.metadata]


def _sections(section: type) -> dict[str, type]:
    """The fields that are dataclasses themselves."""
    hints = typing.get_type_hints(section)
    names = [field.name for field in dataclasses.fields(section)]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def _kinds(section: type) -> dict[str, _Kind]:
    hints = typing.get_type_hints(section)
    return {field.name: _kind(hints[field.name], field.name) for field in _flag_fields(section)}


def _kind(hint: Any, name: str) -> _Kind:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        hint = inner[0] if len(inner) == 1 else None
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    if hint not in _TYPE_WORDS or (hint is bool and (many or optional)):
        raise TypeError(f"field {name}: flags of type {hint!r} are not supported")
    return _Kind(single=hint, optional=optional, many=many)


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(value: Any, kind: _Kind | None, spec: FlagSpec | None, where: str) -> Any:
    """A value of to_dict(), checked as if it had been typed."""
    if kind is None or spec is None:
        return tuple(value) if isinstance(value, list) else value
    if value is None and kind.optional:
        return None
    if not kind.many:
        return _single_from_plain(value, kind, spec, where)
    if not isinstance(value, (list, tuple)) or (isinstance(spec.nargs, int) and len(value) != spec.nargs):
        count = f" of {spec.nargs} values" if isinstance(spec.nargs, int) else ""
        raise ConfigError(f"{where} {shown(value)}: expected a list{count}")
    return tuple(_single_from_plain(item, kind, spec, where) for item in value)


def _single_from_plain(value: Any, kind: _Kind, spec: FlagSpec, where: str) -> Any:
    if kind.single is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.single or not spec.allows(value):
        raise ConfigError(f"{where} {shown(value)}: expected {spec.expected(kind.single)}")
    return value
