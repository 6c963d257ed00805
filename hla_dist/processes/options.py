"""Options of a program: a dataclass whose fields are the flags, read by tyro.

    @dataclass
    class Options(Checked):
        tokens: Count = 500  # tokens to generate                     --tokens 500, refused below 1
        greedy: bool = False  # the likeliest token each time         --greedy, --no-greedy

The comment beside or above a field is its help. A field that is a dataclass of this kind is a group of flags.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_type_hints

import tyro
from tyro._errors import on_parse_error  # private, so pyproject.toml pins tyro: its public face prints boxes and exits
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hla_dist.processes.failure import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class AtLeast:
    """The least value of a number, as a mark in its annotation."""

    minimum: float


@dataclass(frozen=True)
class Local:
    """As a mark in its annotation: an option may differ between ranks, a path for example.

    Whether it is given may not, nor which of ``words`` it is; with ``value`` it may differ in every way.
    """

    words: tuple[str, ...] = ()
    value: bool = False


Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
Amount = Annotated[float, AtLeast(0)]
Seconds = Annotated[float, AtLeast(1)]
Threads = Annotated[int, AtLeast(0), Local(value=True)]
Paths = Annotated[list[str], arg(metavar="PATH [PATH ...]"), Local()]
File = Annotated[str | None, arg(metavar="FILE"), Local()]
Directory = Annotated[str | None, arg(metavar="DIR"), Local()]


class Checked:
    """Base of options: UserError for a number below the least of its annotation, and for NaN."""

    given: frozenset[str] | None = None  # fields whose flags were typed; None: no command line made it

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for mark in getattr(hint, "__metadata__", ()):
                if isinstance(mark, AtLeast) and not value >= mark.minimum:
                    raise UserError(f"{flag(name)}: expected at least {mark.minimum:g}, got {value}")


def flag(name: str) -> str:
    """A field's option on the command line."""
    return "--" + name.replace("_", "-")


def one_of(*choices: str, alone: str | None = None) -> PrimitiveConstructorSpec[str]:
    """The annotation of a string out of ``choices``; ``alone`` is what the flag without a value means."""
    return PrimitiveConstructorSpec(
        nargs=1 if alone is None else (0, 1),
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0] if words else str(alone),
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
        choices=choices,
    )


def optional_value(alone: str, metavar: str) -> PrimitiveConstructorSpec[str | None]:
    """The annotation of a string whose flag may stand without a value and then means ``alone``; None by default."""
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{metavar}]",
        instance_from_str=lambda words: words[0] if words else alone,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [] if value is None else [value],
    )


Device = Annotated[str, one_of("auto", "cpu", "cuda"), Local(value=True)]


def parse_options(
    kind: type[Kind], program: str, about: str, arguments: Sequence[str] | None = None, quiet: bool = False
) -> Kind:
    """A dataclass of options from command-line arguments; UserError in one line for what they do not take.

    ``quiet``: --help prints nothing, for ranks other than the first.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if unknown := [word for word in words if re.match(r"--\w[\w-]*_", word)]:  # tyro would read _ as -
        _refuse(f"unrecognized arguments: {' '.join(unknown)}")
    with on_parse_error(_report):
        options = tyro.cli(
            kind, prog=program, description=about, args=words, console_outputs=not quiet, registry=_registry,
            config=(tyro.conf.OmitArgPrefixes,),
        )  # fmt: skip
    if isinstance(options, Checked):
        flags = (word.partition("=")[0] for word in words if word.startswith("--"))
        options.given = frozenset(word[2:].removeprefix("no-").replace("-", "_") for word in flags)
    return options


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (--help explains every flag)")


def _report(event: Any) -> None:
    """What tyro has met, in the words of argparse."""
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        _refuse(f"unrecognized arguments: {' '.join(event.tokens)}")
    if kind == "MissingArgs":
        names = [missing.arg.lowered.name_or_flags[-1] for missing in event.missing_arguments]
        _refuse(f"the following arguments are required: {', '.join(names)}")
    if kind == "InvalidChoice":
        choices = ", ".join(map(repr, event.choices))
        reason = f"invalid choice: {event.value!r} (choose from {choices})"
    else:
        reason = getattr(event, "message", "expected one argument")
    _refuse(f"argument {event.argument.lowered.name_or_flags[-1]}: {reason}")


def _read(kind: type, word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"invalid {kind.__name__} value: {word!r}") from None


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


def _scalar(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers and strings, and None by default: tyro would take the word None for the latter."""
    of = set(get_args(info.type)) - {type(None)} if info.type_origin in (Union, UnionType) else {info.type}
    kind = of.pop()
    if of or kind not in _METAVARS:
        return None
    return PrimitiveConstructorSpec(
        1, _METAVARS[kind], lambda words: _read(kind, words[0]), lambda value: isinstance(value, kind | None),
        lambda value: [str(value)],
    )  # fmt: skip


def _list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One value or more: tyro would take a flag without any for an empty list."""
    if info.type_origin is not list:
        return None
    (of,) = get_args(info.type)
    item = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(of, info.markers))
    assert isinstance(item, PrimitiveConstructorSpec)

    def read(words: list[str]) -> list[Any]:
        if not words:
            raise ValueError("expected at least one argument")
        return [item.instance_from_str([word]) for word in words]

    return PrimitiveConstructorSpec(
        "*", f"{item.metavar} [{item.metavar} ...]", read, lambda value: isinstance(value, list),
        lambda values: [word for value in values for word in item.str_from_instance(value)], item.choices,
    )  # fmt: skip


_registry = ConstructorRegistry()
_registry.primitive_rule(_scalar)
_registry.primitive_rule(_list)
