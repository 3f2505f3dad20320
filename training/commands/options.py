"""Command lines, files and records of options, all of the same dataclasses.

An options class is a frozen dataclass, whose fields are `Annotated[type, help]` with defaults. Its bases are the groups
of its `--help`; one with a field `benchmark` takes the options of that benchmark as well. Help may be a function, where
it comes from a registry.

What counts, the most first: the command line, the file of `--config` (YAML or TOML, `option: value`), the preset, the
default of the class.
"""

import argparse
import difflib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_args, get_type_hints

import tyro
import yaml

from training import distributed
from training.benchmarks.base import BENCHMARKS, Benchmark
from training.commands.presets import preset_values
from training.interruption import Interrupted, interruptible
from training.store import StorageError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Option:
    """One field: how it is declared."""

    name: str
    type: Any
    help: str
    default: Any

    @property
    def is_flag(self) -> bool:
        return self.type is bool


class Group(NamedTuple):
    """The options that one class declares, under its docstring."""

    doc: str
    options: list[Option]


def benchmark_named(name: str) -> type[Benchmark]:
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    return BENCHMARKS[name]


def build(kind: type[Options], **given: Any) -> tuple[Any, ...]:
    """(options,), or (options, benchmark) where `kind` has one, of settings by name: those given, then the preset's.

    ValueError where a name is no option.
    """
    values = preset_values(kind, given.get("preset"), given.get("model")) | given
    groups = _groups(kind, values.get("benchmark"))
    known = {option.name for group in groups.values() for option in group.options}
    for name in given.keys() - known:
        raise ValueError(_unknown(name, known))
    return _instances(kind, groups, {k: v for k, v in values.items() if k in known})


def parse(kind: type[Options], prog: str, description: str, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The same of a command line; a mistake ends the program with the reason and the nearest name."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "model", "benchmark"):
        early.add_argument(f"--{name}")
    first, _ = early.parse_known_args(arguments)
    try:
        file = read_file(Path(first.config)) if first.config else {}
        preset = preset_values(kind, first.preset or file.get("preset"), first.model or file.get("model"))
        groups = _groups(kind, first.benchmark or file.get("benchmark") or preset.get("benchmark"))
        known = {option.name: option for group in groups.values() for option in group.options}
        for name in file.keys() - known.keys():
            raise ValueError(f"--config {first.config}: {_unknown(name, known)}")
    except ValueError as reason:
        stop(prog, reason)
    positional = bool(arguments) and not arguments[0].startswith("-")  # given on the command line, which counts more
    of_file = [
        word
        for name, value in file.items()
        if not (positional and known[name].default is tyro.MISSING)
        for word in _words(known[name], value)
    ]
    file_option = Annotated[Path | None, tyro.conf.arg(help="YAML or TOML file with any of the options below")]
    declared: list[Any] = [(name, _dataclass_of(name, group, preset)) for name, group in groups.items()]
    whole = make_dataclass(kind.__name__, [*declared, ("config", file_option, field(default=None))])
    try:
        found: Any = tyro.cli(
            whole,
            prog=f"python -m {prog}",
            description=description,
            args=of_file + arguments,
            config=(tyro.conf.OmitArgPrefixes,),
            use_underscores=True,
        )
    except SystemExit as end:
        if file and end.code:
            sys.stderr.write(f"some of the options were those of --config {first.config}\n")
        raise
    values = {o.name: getattr(getattr(found, name), o.name) for name, group in groups.items() for o in group.options}
    try:
        return _instances(kind, groups, values)
    except ValueError as reason:
        stop(prog, reason)


def words_of(kind: type, settings: Mapping[str, Any]) -> list[str]:
    """These settings on a command line, as `parse` takes it; what is no option of `kind` is left out."""
    groups = _groups(kind, settings.get("benchmark"))
    known = {option.name: option for group in groups.values() for option in group.options}
    return [word for name, value in settings.items() if name in known for word in _words(known[name], value)]


def read_file(path: Path) -> dict[str, Any]:
    """{option: value} of a YAML or TOML file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or any(isinstance(value, (dict, list)) for value in content.values()):
        raise ValueError(f"--config {path}: expected lines 'option: value', got {content!r}")
    return {str(name): value for name, value in content.items() if value is not None}


def command_line(prog: str, kind: type[Options], description: str, main: Callable[..., object]) -> None:
    """Parse, run, and end with a reason: exit code 2 where the input does not fit, 1 where nothing can be written,
    130 and 143 where a signal came, as shells have it."""
    chosen = parse(kind, prog, description)
    distributed.start(getattr(chosen[0], "device", "cpu"))
    try:
        with interruptible(at_once=True):
            main(*chosen)
    except StorageError as reason:
        stop(prog, reason, code=1)
    except (ValueError, OSError, ImportError) as reason:  # those of logs and caches are ValueErrors
        stop(prog, reason)
    except KeyboardInterrupt as reason:
        if distributed.is_main():
            sys.stderr.write(f"python -m {prog}: {str(reason) or 'interrupted'}; the same command goes on from there\n")
        raise SystemExit(reason.exit_code if isinstance(reason, Interrupted) else 130) from None


def stop(prog: str, reason: object, code: int = 2) -> NoReturn:
    """End the program: the reason on stderr, exit code 2, as argparse does it, or another one."""
    sys.stderr.write(f"python -m {prog}: error: {reason}\n")
    raise SystemExit(code)


def _groups(kind: type, benchmark: str | None) -> dict[str, Group]:
    """{heading in the help: its options}: a group for every class that declares some, and the benchmark's."""
    classes = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    names = {f.name: f for f in fields(kind)}
    if "benchmark" in names:
        of_benchmark = benchmark_named(benchmark or str(names["benchmark"].default)).Options
        classes += [base for base in reversed(of_benchmark.__mro__) if is_dataclass(base)]
    groups: dict[str, Group] = {}
    for i, base in enumerate(classes):
        hints, again = (
            get_type_hints(base, include_extras=True),
            set().union(*map(inspect.get_annotations, classes[i + 1 :])),
        )
        own = inspect.get_annotations(base).keys() - again  # the last declaration counts
        options = [_option(f.name, hints[f.name], f.default) for f in fields(base) if f.name in own]
        if options:
            words = re.findall("[A-Z][a-z]*", base.__name__.removesuffix("Options").removesuffix("Config"))
            name = "_".join(words).lower()
            groups[name] = Group(inspect.getdoc(base) or "", options)
    return groups


def _option(name: str, hint: Any, default: Any) -> Option:
    declared, *markers, text = get_args(hint)
    for marker in markers:  # tyro's own, as for a positional argument
        declared = Annotated[declared, marker]
    return Option(name, declared, text() if callable(text) else text, default)


def _dataclass_of(name: str, group: Group, preset: Mapping[str, Any]) -> type:
    """A dataclass as tyro reads one."""
    declared: list[Any] = []
    for option in group.options:
        default = preset.get(option.name, option.default)
        declared.append((option.name, Annotated[option.type, tyro.conf.arg(help=option.help)], field(default=default)))
    return make_dataclass(name, declared, namespace={"__doc__": group.doc})


def _instances(kind: type[Options], groups: dict[str, Group], values: dict[str, Any]) -> tuple[Any, ...]:
    own = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    options = kind(**{name: value for name, value in values.items() if name in own})
    if "benchmark" not in own:
        return (options,)
    chosen = benchmark_named(options.benchmark)  # type: ignore[attr-defined]
    of_benchmark = {f.name for f in fields(chosen.Options)}
    return options, chosen(chosen.Options(**{k: v for k, v in values.items() if k in of_benchmark}))


def _words(option: Option, value: Any) -> list[str]:
    """An option of a file as on a command line, where its type is checked. One that has to be given is positional."""
    if option.default is tyro.MISSING:
        return [str(value)]
    if isinstance(value, bool) and "off" in get_args(option.type):
        value = "on" if value else "off"  # which YAML reads as true and false
    if option.is_flag and isinstance(value, bool):
        return [f"--{option.name}" if value else f"--no_{option.name}"]
    return [f"--{option.name}", str(value)]


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"no such option: {name}" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
