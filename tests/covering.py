"""Pairwise covering arrays: few rows in which every allowed pair of values of every two parameters occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

from tests.harness import shifted

Row = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs_of(row: Mapping[str, Any]) -> set[Pair]:
    """The pairs of values in a row, parameters in the row's order."""
    return {(a, row[a], b, row[b]) for a, b in combinations(row, 2)}


def allowed_pairs(parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> set[Pair]:
    """Every pair that ``allowed`` accepts alone; it must accept a row if it accepts each of the row's pairs."""
    return {
        (a, x, b, y)
        for a, b in combinations(parameters, 2)
        for x, y in product(parameters[a], parameters[b])
        if allowed({a: x, b: y})
    }


def covering(parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], seed: int = 0) -> list[Row]:
    """Rows that cover ``allowed_pairs``, found greedily, always the same.

    Every row starts from a pair not yet covered and takes, parameter by parameter, the value with most new pairs.
    Raises ValueError if a pair fits into no row: ``allowed`` then speaks of more than pairs.
    """
    rng = random.Random(shifted(seed))
    missing = allowed_pairs(parameters, allowed)
    rows = []
    while missing:
        best: Row = {}
        gained: set[Pair] = set()
        start = min(missing, key=repr)
        for _ in range(10):
            row = _complete(parameters, allowed, missing, {start[0]: start[1], start[2]: start[3]}, rng)
            new = pairs_of(row) & missing
            if len(new) > len(gained):
                best, gained = row, new
        if not gained:
            raise ValueError(f"allowed: expected a row with {start}, got none")
        rows.append(best)
        missing -= gained
    return rows


def slow_but(quick: Sequence[tuple[Any, ...]], every: Sequence[tuple[Any, ...]]) -> list[Any]:
    """All of ``every``, for ``pytest.mark.parametrize``; marked slow but for ``quick``."""
    assert set(quick) <= set(every)
    return [pytest.param(*x, marks=() if x in quick else pytest.mark.slow) for x in every]


def thinned(**parameters: Sequence[Any]) -> list[Any]:
    """Every combination, for ``pytest.mark.parametrize``: those that cover all pairs, and the others marked slow."""
    quick = [tuple(row.values()) for row in covering(parameters, lambda row: True)]
    return slow_but(quick, list(product(*parameters.values())))


def _complete(parameters, allowed, missing: set[Pair], row: Row, rng: random.Random) -> Row:
    others = [name for name in parameters if name not in row]
    rng.shuffle(others)
    for name in others:
        fits = [v for v in parameters[name] if all(allowed({n: x, name: v}) for n, x in row.items())]
        if not fits:
            return {}
        rng.shuffle(fits)

        def gain(value: Any) -> int:
            added = [(n, x, name, value) for n, x in row.items()] + [(name, value, n, x) for n, x in row.items()]  # noqa: B023
            return sum(p in missing for p in added)

        row = {**row, name: max(fits, key=gain)}
    return {name: row[name] for name in parameters} if allowed(row) else {}
