"""Ranks compare what has to be alike before anything depends on it: options that differ would train on silently."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any, get_type_hints

import torch.distributed as dist

from hla_dist.processes.failure import expect
from hla_dist.processes.options import Local, flag

SHOWN = 8  # options that are named


def differences(given: Sequence[Mapping[str, str]], most: int = SHOWN) -> str:
    """The names whose values are not the same in ``given``, one mapping per rank; empty if there are none.

    ``--seed 0 on rank 0, 2; 5 on rank 1``, at most ``most`` names.
    """
    names = [name for name in dict.fromkeys(name for options in given for name in options)
             if len({options.get(name) for options in given}) > 1]  # fmt: skip
    lines = []
    for name in names[:most]:
        ranks: dict[str, list[str]] = {}
        for rank, options in enumerate(given):
            ranks.setdefault(options.get(name, "not there"), []).append(str(rank))
        values = (f"{value} on rank {', '.join(numbers)}" for value, numbers in ranks.items())
        lines.append(f"{name} {'; '.join(values)}")
    return " | ".join(lines) + (f" | and {len(names) - most} more" if len(names) > most else "")


def comparable(options: Any) -> dict[str, str]:
    """The options of a program by their flags, as text to compare; of what is ``Local`` only whether it is given."""
    lines: dict[str, str] = {}
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if name not in {field.name for field in fields(options)}:
            continue
        value = getattr(options, name)
        if is_dataclass(value):
            lines |= comparable(value)
            continue
        local = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Local)), None)
        if local is None:
            lines[flag(name)] = str(value)
        elif not local.value:
            named = repr(value) if value in local.words else "given"
            lines[flag(name)] = "not given" if value in (None, []) else named
    return lines


def check_options(store: dist.Store, rank: int, world_size: int, options: Mapping[str, str], timeout_s: float) -> None:
    """UserError, the same on every rank, unless all were started with the same ``options``.

    By the store in which they meet, before there is a process group: its backend depends on options. Two messages per
    rank; rank 0 compares.
    """
    store = dist.PrefixStore("options/", store)
    store.set_timeout(timedelta(seconds=timeout_s))
    store.set(f"given/{rank}", json.dumps(options))
    if rank == 0:
        given = [json.loads(store.get(f"given/{other}")) for other in range(world_size)]
        store.set("differences", differences(given))
    different = store.get("differences").decode()
    store.set(f"read/{rank}", "")
    if rank == 0:  # the store may end with this process: not before all have read it
        store.wait([f"read/{other}" for other in range(world_size)])
    expect(not different, "options", "the same on every rank", different)
