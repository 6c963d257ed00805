"""The op that programs of torch.export have in place of what reads the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hla_dist.softmax import attend
from hla_dist.softmax.exported import see_keys
from tests.harness import assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64

SCALE, HEADS, GROUPS, SIZE = 0.5, 4, 2, 3
VIEWS = {  # span, window and delay; numbers of a row
    "softmax": (None, None, None, 2 * SIZE),
    "window": (4, 4, None, 2 * SIZE),
    "memory before": (5, 4, 4, 2 * SIZE),
    "memory of all, queries too": (4, 4, 0, 4 * SIZE),
    "memory alone": (1, None, 0, 2 * SIZE),
}


def arguments(view: str, before: list[int] | None, slots: int, tokens: int, final: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(shifted(0))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dtype=torch.float64, generator=generator)

    span, window, delay, width = VIEWS[view]
    q, own = drawn(tokens, HEADS, SIZE), drawn(tokens, GROUPS, width)
    cached = None if before is None else drawn(slots, GROUPS, width)
    read = torch.tensor(before or [0, 0])
    return [q, own, cached, read, span, window, delay, SCALE, final]


def results(*args: Any) -> list[Tensor]:
    """The op's, zeros where nothing enters a memory yet: what lies there says nothing."""
    found, window, delay = see_keys(*args), args[5], args[6]
    if delay is not None:
        at = 0 if window is None else 1
        found[at] = found[at] * found[at + 1][..., None, None]
    return found


@pytest.mark.parametrize("before", [None, [0, 0], [2, 2], [9, 1]], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_it_is_what_its_fake_says_for_any_rows(view: str, before: list[int] | None) -> None:
    slots = 9 if VIEWS[view][0] is None else VIEWS[view][0] - 1
    for tokens, final in ((5, True), (1, True), (0, True), (1, False)):
        args = arguments(view, before, slots, tokens, final)
        torch.library.opcheck(see_keys, args, test_utils=("test_schema", "test_faketensor"))
        both = results(*args)
        for n in range(2):
            alone = results(*(x[n : n + 1] if isinstance(x, Tensor) else x for x in args))
            for one, two in zip(both, alone, strict=True):
                assert_close(f"row {n}, {tokens} tokens", one[n : n + 1].double(), two.double(), FLOAT64)


def test_a_state_with_too_few_slots_is_refused_when_the_program_runs() -> None:
    with raises_value_error("state.k", "at least 3 keys per row", "got 2"):
        see_keys(*arguments("window", [7, 1], 2, 1))
    with raises_value_error("state.k", "at least 7 keys per row", "got 2"):
        attend.check_slots(torch.tensor([7, 1]), 2, None)
