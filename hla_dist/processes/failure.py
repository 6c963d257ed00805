"""How mistakes reach the user: one line, the same on every rank, and never a hang.

Set-up work that can fail on one rank alone (a file missing on one node, a full disk on rank 0) runs inside
:func:`together`, so that the others learn of it instead of waiting in the next collective.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from hla_dist.parallel.collectives import all_gather_objects, group_rank, group_size

Result = TypeVar("Result")

_ASK_AGAIN_S = 0.25  # well below any timeout


class UserError(Exception):
    """A mistake the user can mend; its text is one line with what was expected and what came."""


def expect(condition: object, name: str, expected: str, actual: object) -> None:
    """Raise ``UserError("name: expected ..., got ...")`` unless ``condition``."""
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {actual}")


class Disagreement(UserError):
    """Another rank's :class:`UserError`, raised here so that all ranks stop alike."""


def together(group: Any, work: Callable[[], Result], patient: bool = False) -> Result:
    """``work()`` on every rank of ``group``; if it raises anywhere, every rank raises :class:`UserError` alike.

    ``group`` None: this process alone. ``patient``: the work, which must not communicate over ``group``, may take one
    rank longer than the group's timeout. Communication: one small gather of objects, with ``patient`` four per second
    and one more. OSError and ValueError count as user errors, since this wraps reading and writing of files and
    building from options; any other exception is raised here as it is, after the other ranks have been told.
    """
    if group is None:
        try:
            return work()
        except (OSError, ValueError) as exc:
            raise UserError(describe(exc)) from exc
    result: Any = None
    failure: BaseException | None = None
    with _patience(group) if patient and group_size(group) > 1 else nullcontext():
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


@contextmanager
def _patience(group: Any) -> Iterator[None]:
    """Leave the block when every rank of ``group`` has come to its end, whatever the group's timeout.

    A thread of every rank asks the others again and again: a collective waits for such a thread, not for the work. (A
    group with a longer timeout would have an end too, and somebody would have to guess it.)
    """
    done = threading.Event()
    failures: list[Exception] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def ask() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread begins with the first GPU
            done.wait(_ASK_AGAIN_S)
            while not all(all_gather_objects(done.is_set(), group)):
                done.wait(_ASK_AGAIN_S)
        except Exception as exc:  # raised again where the work has ended
            failures.append(exc)

    asking = threading.Thread(target=ask, name="patience", daemon=True)
    asking.start()
    yield
    done.set()
    asking.join()
    if failures:
        raise failures[0]


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Make an OSError of the block a UserError: ``what`` and the system's reason."""
    try:
        yield
    except OSError as exc:
        raise UserError(f"{what}: {exc.strerror or exc}") from exc


def optional_package(name: str, flag: str, use: object = "") -> Any:
    """Return the imported package; UserError, which says what it is for and how to get it, where there is none."""
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        top, reason = name.partition(".")[0], f" for {use}" if use else ""
        raise UserError(f"{flag}: expected the package '{top}'{reason}, got none; pip install {top}") from exc


def describe(exc: BaseException) -> str:
    """One line for ``exc``, without the type's name where the text speaks for itself."""
    text = " ".join(str(exc).split())
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    return text if isinstance(exc, (UserError, ValueError)) and text else f"{type(exc).__name__}: {text}"
