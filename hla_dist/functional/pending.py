"""States that can go back: tokens are read that may have to be taken back, as drafts of speculative decoding are.

Letters: B batch rows, T tokens that may be taken back, H query heads, G key/value heads, K and V head sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hla_dist.functional.attention import attend
from hla_dist.functional.options import SegmentOptions
from hla_dist.functional.validate import check_names, require
from hla_dist.operators import NAMED
from hla_dist.parallel.collectives import members

__all__ = ["Pending"]


class Pending:
    """A state before some tokens, and what leads from it to the state after any number of them.

        pending = Pending("hla2", before, q, k, v, log_decay=log_decay)
        pending.after(n)                                  the state after the first n of q's T tokens

    Kept are the state before, the state after and the tokens' operands: H K + 2 G K + H numbers per
    token, where a state per token would be H (K^2 + K V). ``after`` runs the operator alone over the
    tokens that stay, no projection and no other layer.

    Layers return it with ``pending=True``. Given as a layer's ``state`` it stands for the state after
    its last token; with ``pending=True`` again the new tokens are appended, so that several calls can
    be taken back together.

    Args:
        op: An operator's name; or a layer's own ``advance(before, present, *operands)``, the state
            after those tokens that are True in ``present`` [B, T], or after all if that is None.
        before: The state before the tokens; None: there was no text.
        *operands: ``[B, T, ...]`` each; an operator's are q, k and v.
        **options: The operator's, as for ``summarize``.

    Raises:
        ValueError: An option is unknown, or ``after`` is asked for more tokens than were read.

    Examples:
        >>> import torch, hla_dist
        >>> q, k, v = torch.randn(3, 2, 5, 4, 16).unbind()
        >>> pending = hla_dist.Pending("hla2", None, q, k, v, scale=0.25)
        >>> pending.after(3).S.shape  # the state after 3 tokens
        torch.Size([2, 4, 16, 16])
        >>> state = pending.after(torch.tensor([3, 0]))  # after 3 in row 0, after none in row 1
    """

    def __init__(self, op: str | Callable[..., Any], before: Any, *operands: Tensor, **options: Any) -> None:
        if isinstance(op, str):
            require(op in NAMED, "op", f"one of {tuple(NAMED)}", repr(op))
            check_names(options, SegmentOptions.__annotations__)
            require(len(operands) == 3, "operands", "q, k and v", f"{len(operands)} tensors")
            q, k, v = operands
            operands = with_gates(q, k, v, options.pop("log_decay", None))
            op = partial(operate, op, options)
        self.before = before
        self._advance = op
        self._blocks = [operands] if operands else []  # one for each call; put together when they are needed
        self._state: Any = None

    @property
    def tokens(self) -> int:
        """Return T, how many tokens can be taken back."""
        return sum(block[0].shape[1] for block in self._blocks)

    @property
    def state(self) -> Any:
        """Return the state after all tokens."""
        return self.after(self.tokens)

    def after(self, tokens: int | Tensor) -> Any:
        """Return the state after the first ``tokens``; integers ``[B]`` say how many for each row."""
        count, present = self.tokens, None
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        if isinstance(numbers, list):
            rows = self._blocks[0][0].shape[0] if self._blocks else len(numbers)
            require(len(numbers) == rows and all(type(n) is int for n in numbers), "tokens", f"integers [{rows}]",
                    list(numbers))  # fmt: skip
            low, number = min(numbers, default=0), max(numbers, default=0)
            require(low >= 0, "tokens", f"0 to {count}, the tokens that may be taken back", low)
            if low < number:
                assert isinstance(tokens, Tensor)
                place = torch.arange(number, device=self._blocks[0][0].device) if self._blocks else tokens.new_empty(0)
                present = place < tokens.to(place.device)[:, None]
        else:
            number = numbers
        require(type(number) is int and 0 <= number <= count, "tokens", f"0 to {count}, the tokens that may be taken "
                "back", number)  # fmt: skip
        if present is None and number == count and self._state is not None:
            return self._state
        if number == 0 and (self.before is not None or not self._blocks):
            return self.before
        return self._advance(self.before, present, *(torch.cat(x, 1)[:, :number] for x in zip(*self._blocks)))

    def read(self, state: Any, *operands: Tensor) -> Pending:
        """Return what is pending after more tokens, of which ``state`` is the state after the last."""
        return self._with(self.before, [*self._blocks, operands], state)

    def map(self, change: Callable[[Tensor], Tensor]) -> Pending:
        """Return it with every tensor changed: other rows, another device."""
        before, state = (x if x is None else _as(x, map(change, x)) for x in (self.before, self._state))
        return self._with(before, [tuple(map(change, block)) for block in self._blocks], state)

    def __deepcopy__(self, memo: Any) -> Pending:
        return self.map(torch.Tensor.clone)  # the layer that it is of is not copied

    def _with(self, before: Any, blocks: list[tuple[Tensor, ...]], state: Any) -> Pending:
        other = Pending(self._advance, before)
        other._blocks, other._state = blocks, state
        return other

    @property
    def kept(self) -> list[Tensor]:
        """Return the tensors kept for going back: the state before, and the operands."""
        return [*(() if self.before is None else self.before), *(x for block in self._blocks for x in block)]


def _as(state: Any, fields: Iterable[Tensor]) -> Any:
    return type(state)(*fields) if hasattr(state, "_fields") else tuple(fields)


def absent(
    padding: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Operands that leave the state alone where ``padding`` [B, T] holds: q = k = v = 0 and gate 1."""
    q, k, v = (operand.masked_fill(padding[..., None, None], 0) for operand in (q, k, v))
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(*padding.shape, -1)
        log_decay = log_decay.masked_fill(padding.view(*padding.shape, *[1] * (log_decay.dim() - 2)), 0)
    return q, k, v, log_decay


def with_gates(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, ...]:
    """An operator's operands, each with a place per token; gates that all tokens share are given to each."""
    if log_decay is None:
        return q, k, v
    return q, k, v, log_decay.expand(*q.shape[:2], -1) if log_decay.dim() == 1 else log_decay


def operate(
    op: str, options: Any, before: Any, present: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None = None,
) -> Any:  # fmt: skip
    """The state of an operator after those tokens that are ``present`` [B, T]; None: after all."""
    if present is not None:
        q, k, v, log_decay = absent(~present, q, k, v, log_decay)
    return attend(op, q, k, v, log_decay=log_decay, initial_state=before, output_final_state=True, **options)[1]


def latest(state: Any) -> Any:
    """The state that a layer goes on from: of what is pending, the one after its last token."""
    return state.state if isinstance(state, Pending) else state


def check_can_go_back(group: Any, cu_seqlens: Any) -> None:
    """ValueError where ``pending=True`` has no way back: over several ranks, and in packed documents."""
    require(members(group)[2] == 1, "pending", "a call on one device", "a group of several ranks")
    require(cu_seqlens is None, "pending", "rows of one text each", "cu_seqlens")
