"""Command lines from dataclasses: every field is an option, and may come from a YAML file instead."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


class Kind(NamedTuple):
    """What a field takes."""

    type: Any  # a class, which makes a value of a text
    choices: tuple[Any, ...]  # none: any value of the type
    help: str


def parse(
    options: type[Options],
    prog: str,
    description: str,
    arguments: list[str] | None = None,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Options:
    """An instance of the dataclass `options`, whose fields are `Annotated[type, help]` and have defaults.

    Choices are a `Literal`, or, where they come from a table, `Annotated[str, help, its names]`. The type of a field
    whose default is None is `type | None`.

    `defaults` are what the help says of fields whose default is found out later.

    `--config file.yaml` supplies {field: value}; what is on the command line counts more. A file with a name that is
    no field, or a value that is not of the field's type, ends the program with the reason.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the options below")
    hints = get_type_hints(options, include_extras=True)
    kinds = {}
    for f in fields(options):
        kinds[f.name] = kind = _kind(hints[f.name])
        text = kind.help.replace("%", "%%")
        if kind.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        default = defaults.get(f.name, f.default)
        shown = "" if default is None else f" (default: {default})"
        metavar = None if kind.choices else f.name[:1].upper()
        parser.add_argument(
            f"--{f.name}",
            type=kind.type,
            choices=kind.choices or None,
            default=None,
            help=text + shown,
            metavar=metavar,
        )
    given = vars(parser.parse_args(arguments))
    file = given.pop("config")
    from_file = _from_yaml(parser, file, kinds) if file else {}
    return options(**(from_file | {name: value for name, value in given.items() if value is not None}))


def stop(prog: str, reason: object) -> NoReturn:
    """End the program: the reason on stderr, exit code 2, as argparse does it."""
    sys.stderr.write(f"python -m {prog}: error: {reason}\n")
    raise SystemExit(2)


def _kind(hint: Any) -> Kind:
    taken, text, *names = get_args(hint)
    if get_origin(taken) in (Union, UnionType):
        (taken,) = (part for part in get_args(taken) if part is not NoneType)
    choices = get_args(taken) if get_origin(taken) is Literal else tuple(*names)
    return Kind(type(choices[0]) if choices else taken, choices, text)


def _from_yaml(parser: argparse.ArgumentParser, file: Path, kinds: dict[str, Kind]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {file}: cannot be read: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {file}: expected lines 'option: value', got {content!r}")
    unknown = sorted(map(str, content.keys() - kinds.keys()))
    if unknown:
        parser.error(f"--config {file}: no such option: {', '.join(unknown)}; there are {', '.join(kinds)}")
    return {name: _cast(parser, file, name, value, kinds[name]) for name, value in content.items()}


def _cast(parser: argparse.ArgumentParser, file: Path, name: str, value: Any, kind: Kind) -> Any:
    wanted, choices = kind.type, kind.choices
    if value is None or (choices and value in choices) or (not choices and type(value) is wanted):
        return value
    number_in_text = wanted in (int, float) and isinstance(value, (int, str)) and not isinstance(value, bool)
    if not choices and (number_in_text or (wanted in (Path, str) and not isinstance(value, (dict, list, bool)))):
        try:
            return wanted(value)  # YAML reads 1e-5 as text, and a path always
        except ValueError:
            pass
    expected = f"one of {', '.join(map(str, choices))}" if choices else f"a value of type {wanted.__name__}"
    parser.error(f"--config {file}, {name}: expected {expected}, got {value!r}")
