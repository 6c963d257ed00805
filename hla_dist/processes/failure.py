"""How mistakes reach the user: one line, the same on every rank, and never a hang.

Set-up work that can fail on one rank alone (a file missing on one node, a full disk on rank 0) runs inside
:func:`together`, so that the others learn of it instead of waiting in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hla_dist.parallel.collectives import all_gather_objects, group_rank

Result = TypeVar("Result")


class UserError(Exception):
    """A mistake the user can mend; its text is one line with what was expected and what came."""


class Disagreement(UserError):
    """Another rank's :class:`UserError`, raised here so that all ranks stop alike."""


def together(group: Any, work: Callable[[], Result]) -> Result:
    """``work()`` on every rank of ``group``; if it raises anywhere, every rank raises :class:`UserError` alike.

    Communication: one small gather of objects. OSError and ValueError count as user errors, since this wraps
    reading and writing of files and building from options; any other exception is raised here as it is, after the
    other ranks have been told.
    """
    result: Any = None
    failure: BaseException | None = None
    try:
        result = work()
    except Exception as exc:  # told to the others before it goes on
        failure = exc
    messages = all_gather_objects(None if failure is None else describe(failure), group)
    if failure is not None and not isinstance(failure, (UserError, OSError, ValueError)):
        raise failure
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is None:
        return result
    alone = sum(message is not None for message in messages) < len(messages)
    text = f"rank {first}: {messages[first]}" if alone and first != 0 else messages[first]
    if failure is not None and group_rank(group) == first:
        raise UserError(text) from failure
    raise Disagreement(text)


def describe(exc: BaseException) -> str:
    """One line for ``exc``, without the type's name where the text speaks for itself."""
    text = " ".join(str(exc).split())
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    return text if isinstance(exc, (UserError, ValueError)) and text else f"{type(exc).__name__}: {text}"
