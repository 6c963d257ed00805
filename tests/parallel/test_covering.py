"""Every operator with every option on every number of ranks: a row for every two values, forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hla_dist.parallel.topology import EXCHANGES
from tests.covering import Row, allowed_pairs, covering, pairs_of
from tests.harness import RankPool
from tests.parallel.sharded import check_sharded
from tests.problems import GATE_FORMS, GATE_VALUES, KEY_TERMS, KEYED, KINDS, RIDGED, Problem

# A new option is a line here (and one below where it does not go with everything).
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "gates": GATE_FORMS,
    "gate_values": GATE_VALUES,
    "ranks": (1, 2, 3, 4, 8),
    "split": ("even", "uneven", "single tokens", "empty first", "empty middle", "empty last"),
    "T": (1, 63, 64, 65, 129, 1100),
    "exchange": EXCHANGES[1:],
    "documents": ("none", "few", "many"),
    "heads": ((1, 1), (2, 2), (4, 2), (3, 1)),
    "sizes": ((3, 5), (8, 4), (1, 1)),
    "chunk_size": (None, 16, 48),
    "B": (1, 2),
    "scale": (1.0, 0.4),
    "ridge": (0.0, 0.7),
    "key_term": KEY_TERMS,
    "normalize": (False, True),
    "state": (False, True),
    "strided": (False, True),
    "dtype": (torch.float64, torch.float32),
}


def allowed(row: Row) -> bool:
    """What goes together, two by two."""
    name, mask = row.get("kind", (None, None))
    rules = (
        mask == "full" and row.get("gates", "none") != "none",
        mask == "full" and row.get("state", False),
        mask == "full" and row.get("exchange", "all_gather") != "all_gather",
        row.get("ranks") == 1 and row.get("exchange", "all_gather") != "all_gather",
        mask == "full" and row.get("gate_values", "mild") != "mild",
        row.get("gates") == "none" and row.get("gate_values", "mild") != "mild",
        name is not None and name not in RIDGED and row.get("ridge", 0.0) != 0.0,
        name is not None and (name, mask) not in KEYED and row.get("key_term", "none") != "none",
        row.get("documents", "none") != "none" and row.get("B", 1) != 1,
        row.get("ranks") == 1 and row.get("split", "even") != "even",
    )
    return not any(rules)


def lengths_of(split: str, ranks: int, T: int) -> list[int]:
    """Shards of a sequence."""
    even = [T * (r + 1) // ranks - T * r // ranks for r in range(ranks)]
    if ranks == 1 or split == "even":
        return even
    if split == "uneven":
        return [*(n // 2 for n in even[:-1]), T - sum(n // 2 for n in even[:-1])]
    if split == "single tokens":
        ones = min(ranks - 1, T)
        return [1] * ones + [0] * (ranks - 1 - ones) + [T - ones]
    fewer = [T * (r + 1) // (ranks - 1) - T * r // (ranks - 1) for r in range(ranks - 1)]
    at = {"empty first": 0, "empty middle": ranks // 2, "empty last": ranks - 1}[split]
    return [*fewer[:at], 0, *fewer[at:]]


def documents_of(kind: str, T: int) -> tuple[int, ...] | None:
    """Lengths of documents that sum to T."""
    if kind == "none":
        return None
    if kind == "few":
        return (T // 3, 0, T - T // 3)
    step = max(1, T // 12)
    return (*[step] * (T // step), T % step, 0)


ROWS = covering(PARAMETERS, allowed)


def test_every_pair_occurs() -> None:
    got = set().union(*map(pairs_of, ROWS))
    assert allowed_pairs(PARAMETERS, allowed) <= got
    assert all(allowed(row) for row in ROWS)
    without = set().union(*map(pairs_of, ROWS[1:]))
    assert not allowed_pairs(PARAMETERS, allowed) <= without, "the first row adds nothing"


def test_a_rule_about_three_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a row with"):
        covering({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, lambda row: len(row) < 3)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_row(pool: RankPool, number: int) -> None:
    row = ROWS[number]
    name, mask = row["kind"]
    (heads, groups), (K, V) = row["heads"], row["sizes"]
    same = (
        "gates",
        "gate_values",
        "T",
        "chunk_size",
        "B",
        "scale",
        "ridge",
        "key_term",
        "normalize",
        "state",
        "strided",
    )
    problem = Problem(
        name, mask, H=heads, G=groups, K=K, V=V, seed=number, documents=documents_of(row["documents"], row["T"]),
        exchange=row["exchange"], dtype=row["dtype"], node=2 - row["ranks"] % 2, **{key: row[key] for key in same},
    )  # fmt: skip
    check_sharded(pool, row["ranks"], problem, lengths_of(row["split"], row["ranks"], row["T"]))
