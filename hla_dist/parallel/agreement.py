"""Ranks agree on a call before its data matters, at the price of 64 bytes in front of each payload.

Every exchange sends one frame per rank: a header (direction, call number, signature hash, status, length, hash of
contents) and a payload of the length last agreed for its direction. A call with an agreed signature that fits is one
collective. A new signature, or a longer payload, sends one frame more, once: all ranks enter with the old length and
status NEW, see that everybody asks for the same thing, and send again with the new length. Contents, such as where
documents begin, must be alike too but may change from call to call at no cost. A rank that failed a check enters with
status FAILED, so nobody waits for it. Whenever headers differ, ranks exchange what they wanted to do and all raise the
same ValueError.

On CUDA the headers of a steady call are read one call later, or before gradients or
losses are summed, so that nothing synchronises.
"""

import hashlib
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hla_dist.parallel import collectives, topology

HEADER_BYTES = 64
_OK, _NEW, _FAILED = 0, 1, 2
# frames of halos and of experts' counts are far smaller than summaries: directions of their own keep them small
_DIRECTIONS = {"forward": 0, "backward": 1, "halo forward": 2, "halo backward": 3, "experts forward": 4}
_CONTENTS = " of "  # in a description, before what may change from call to call
_MAGIC = 0x48_4C_41  # "HLA": a frame that is not the library's (another collective in its place) is told apart


@dataclass
class _Direction:
    """What a group has agreed on in one direction."""

    length: int = 0  # payload bytes of a steady frame
    known: set[int] = field(default_factory=set)
    calls: int = 0


@dataclass
class _Pending:
    """A frame under way."""

    group: collectives.Group  # the caller's
    pg: collectives.Group  # over which it travels
    direction: str
    work: Any
    gathered: Tensor
    payload_bytes: int
    call: int
    hash: int
    contents: int  # hash of what must be alike in this call, and may change from call to call
    description: str


_agreements: WeakKeyDictionary[collectives.Group, dict[str, _Direction]] = WeakKeyDictionary()
_deferred: WeakKeyDictionary[collectives.Group, tuple[Tensor, Any, _Pending]] = WeakKeyDictionary()


def contents(name: str, numbers: Tensor) -> str:
    """Host integers that all ranks must give alike, to end a description with: another one is no new signature."""
    shown = [str(n) for n in (numbers if len(numbers) <= 8 else numbers[:4]).tolist()]
    digest = "" if len(numbers) <= 8 else f",..({len(numbers)},{zlib.crc32(numbers.numpy().tobytes()):08x})"
    return f"{_CONTENTS}{name}=[{','.join(shown)}{digest}]"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _frame(pending: _Pending, status: int, length: int, payload: Tensor | None, device: torch.device) -> Tensor:
    fields = [_MAGIC, _DIRECTIONS[pending.direction], pending.call, pending.hash, status, length, pending.contents, 0]
    header = torch.tensor(fields, dtype=torch.int64).view(torch.uint8).to(device, non_blocking=True)
    if payload is not None and payload.numel() == length:
        return torch.cat([header, payload])
    frame = torch.zeros(HEADER_BYTES + length, dtype=torch.uint8, device=device)
    frame[:HEADER_BYTES] = header
    if payload is not None:
        frame[HEADER_BYTES : HEADER_BYTES + payload.numel()] = payload
    return frame


def _send(pending: _Pending, status: int, length: int, payload: Tensor | None, device: torch.device) -> None:
    frame = _frame(pending, status, length, payload, device)
    with named(pending):
        pending.gathered, pending.work = collectives.all_gather_flat(frame, pending.pg, async_op=True)


def named(pending: _Pending) -> AbstractContextManager[None]:
    """Add the exchange, group and rank to whatever the transport raises."""
    description = pending.description or "a failed call"
    what = f"{pending.direction} exchange number {pending.call} of {description}"
    return collectives.named(what, pending.group)


def start(
    pg: collectives.Group,
    direction: str,
    description: str,
    payload: Tensor | None,
    device: torch.device,
    failure: str | None = None,
) -> _Pending:
    """Send one frame per rank; returns what ``finish`` waits for.

    description: everything that shapes the payload, as text, and its ``contents``; payload: flat uint8. ``failure``
    (then payload is None) is a local error: every rank raises it.
    Communication: one all-gather; one more when the signature is new or its payload outgrows the agreed length.
    """
    topology.ranks_per_node(pg)  # first of all on every rank, whatever comes next
    backward_group = collectives.backward_group(pg)  # on every rank at its first call, whatever that is
    agreed = _agreements.setdefault(pg, {name: _Direction() for name in _DIRECTIONS})[direction]
    settle(pg)
    agreed.calls += 1
    signature, _, data = description.partition(_CONTENTS)
    hashes = _hash(signature), _hash(data)
    lane = backward_group if direction.endswith("backward") else pg
    pending = _Pending(pg, lane, direction, None, torch.empty(0), 0, agreed.calls, *hashes, description)
    if failure is not None:
        _send(pending, _FAILED, agreed.length, None, device)
        _wait(pending)
        _raise_differences(pending, failure)
    assert payload is not None
    pending.payload_bytes = payload.numel()
    if pending.hash in agreed.known and payload.numel() <= agreed.length:
        _send(pending, _OK, agreed.length, payload, device)
        return pending
    _send(pending, _NEW, agreed.length, None, device)
    _wait(pending)
    _check(pending, _headers(pending), _NEW)
    agreed.length = max(agreed.length, payload.numel())
    agreed.known.add(pending.hash)
    _send(pending, _OK, agreed.length, payload, device)
    return pending


def finish(pending: _Pending, at_once: bool = False) -> Tensor:
    """Wait, check the headers, return the payloads ``[P, payload_bytes]`` (uint8, a view of the frames).

    at_once: read the headers now on CUDA too, where messages that not every rank may send are to follow.
    """
    _wait(pending)
    frames = pending.gathered.view(collectives.group_size(pending.pg), -1)
    if _reads_later(pending) and not at_once:
        _deferred[pending.group] = (*_copy_to_host(frames[:, :HEADER_BYTES]), pending)
    else:
        _check(pending, _headers(pending), _OK)
    return frames[:, HEADER_BYTES : HEADER_BYTES + pending.payload_bytes]


def fail(group: Any, error: ValueError, device: torch.device, direction: str = "forward") -> None:
    """Enter the exchange that comes next with a local error, so that every rank of the group raises the same text."""
    pg = collectives.resolve_group(group)
    if collectives.group_size(pg) == 1:
        raise error
    start(pg, direction, "", None, device, failure=str(error))


def wait_for(pending: _Pending, works: list[Any]) -> None:
    """Wait for further messages of the same exchange; an error names the exchange."""
    with named(pending):
        for work in works:
            collectives.wait(work, pending.pg)


def _wait(pending: _Pending) -> None:
    if pending.work is not None:
        with named(pending):
            collectives.wait(pending.work, pending.pg)
        pending.work = None


def _headers(pending: _Pending) -> Tensor:
    frames = pending.gathered.view(collectives.group_size(pending.pg), -1)
    return frames[:, :HEADER_BYTES].contiguous().cpu().view(torch.int64)


def _reads_later(pending: _Pending) -> bool:
    return pending.gathered.is_cuda


def _copy_to_host(headers: Tensor) -> tuple[Tensor, Any]:
    """A copy under way, and the event after which it may be read. Not run on hardware yet."""
    host = torch.empty(headers.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(headers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def settle_all() -> None:
    """Check what steady calls left for the next one; before another collective.

    A rank that failed such a call waits in an exchange of its own, and would take the other collective for it.
    """
    for pg in list(_deferred):
        settle(pg)


def settle(pg: collectives.Group) -> None:
    """The same for one group."""
    if pg in _deferred:
        host, event, pending = _deferred.pop(pg)
        event.synchronize()
        _check(pending, host.view(torch.int64), _OK)


def _check(pending: _Pending, headers: Tensor, status: int) -> None:
    own = [_MAGIC, _DIRECTIONS[pending.direction], pending.call, pending.hash, status]
    if (headers[:, :5] != torch.tensor(own)).any() or (headers[:, 6] != pending.contents).any():
        _raise_differences(pending, None)


def _raise_differences(pending: _Pending, failure: str | None) -> None:
    """Exchange what every rank wanted and raise the same ValueError on all."""
    with named(pending):
        reports = collectives.all_gather_objects(
            (failure, pending.direction, pending.call, pending.description), pending.pg
        )
    failures = [(rank, text) for rank, (text, *_) in enumerate(reports) if text is not None]
    if failures:
        raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in failures))
    if len({call for _, _, call, _ in reports}) > 1:
        raise ValueError(
            "group: expected every rank to make the same calls in the same order, got "
            + ", ".join(
                f"rank {rank} at {way} call {call} ({text})" for rank, (_, way, call, text) in enumerate(reports)
            )
        )
    words = [f"{direction} {description}".split() for _, direction, _, description in reports]
    shared = set(words[0]).intersection(*words[1:])
    kinds: dict[str, list[int]] = {}
    for rank, described in enumerate(words):
        kinds.setdefault(" ".join(word for word in described if word not in shared), []).append(rank)
    listed = [f"{kind or 'nothing else'} on rank {', '.join(map(str, ranks))}" for kind, ranks in kinds.items()]
    expected = "the same operator, shapes, dtype and options on every rank"
    raise ValueError(f"group: expected {expected}, got {'; '.join(listed)}")
