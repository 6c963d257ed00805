"""Options that came from a file: of the types that the annotations say, or refused by name.

Python itself does not look: a window of "8" fails somewhere inside, and a bias of "false" is one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hla_dist.functional.validate import require


def keywords(*layers: type) -> dict[str, Any]:
    """Return the arguments that these take by keyword alone, and their types."""
    known: dict[str, Any] = {}
    for layer in layers:
        names, hints = inspect.getfullargspec(layer).kwonlyargs, get_type_hints(layer.__init__)  # type: ignore[misc]
        known |= {name: hints[name] for name in names}
    return known


def check_types(where: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """ValueError naming an option that is not known, or whose value is of another type than that in ``known``."""
    for name, value in options.items():
        require(name in known, where, f"options out of {', '.join(known)}", repr(name))
        kind = known[name]
        text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
        require(_is(value, kind), where, f"{name} of type {text}", repr(value))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; as in JSON an integer is a float, a list a tuple, and a bool no number."""
    of, parts = get_origin(kind), get_args(kind)
    if of in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if of in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_is(item, parts[0]) for item in value)
    if of is Callable:
        return callable(value)
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, (int, float) if kind is float else of or kind)
