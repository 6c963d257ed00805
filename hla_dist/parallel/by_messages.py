"""Both directions of an exchange that goes by messages: what travels, and what the scan's result means.

Its headers are under way when ``forward`` or ``backward`` is called; nothing else is sent before every rank's has been
read. Neither needs anything of the program any more, so both run behind its work (``background.py``). Shapes as in
``exchange.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hla_dist.operators.cascade import Fields
from hla_dist.parallel import agreement, collectives, messages
from hla_dist.parallel.wire import Layout


class _Line:
    """A group as a line of positions; backward it is read from its last rank."""

    def __init__(self, pending: Any, backward: bool):
        self.pending, self.pg, self.backward = pending, pending.pg, backward
        self.size = collectives.group_size(self.pg)
        self.in_order = collectives.in_order(self.pg)
        self.position = self._mirror(collectives.group_rank(self.pg))

    def _mirror(self, number: int) -> int:
        return self.size - 1 - number if self.backward else number

    def post(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[Any]:
        with agreement.named(self.pending):
            return collectives.post(
                self.pg,
                [(self._mirror(position), x) for position, x in sends],
                [(self._mirror(position), x) for position, x in receives],
            )

    def wait(self, works: list[Any]) -> None:
        agreement.wait_for(self.pending, works)


def forward(
    pending: Any, layout: Layout, payload: Tensor, initial: list[Tensor], total: bool, exchange: str
) -> list[Tensor]:
    """``[*carry, *(state of the whole sequence), own rho, *own backward fields]``, the last as ``[1, ...]``.

    Communication: the messages of ``exchange``; with ``total`` one broadcast of the state from the last rank.
    """
    op = layout.operator
    way = messages.Direction(layout, backward=False)
    agreement.finish(pending, at_once=True)
    line = _Line(pending, backward=False)
    own = {name: x[0] for name, x in layout.unpack(way.full, payload[None]).items()}
    before = messages.prefix(line, way, own, exchange)
    carry = before
    if carry is None:
        carry = dict(zip(op.states, initial)) if initial else {n: torch.zeros_like(own[n]) for n in op.states}
    state: list[Tensor] = []
    if total:
        whole = own if before is None else way.join(own, before)
        sent = layout.pack(op.states, [whole[name] for name in op.states])
        with agreement.named(pending):
            collectives.broadcast(sent, pending.pg, source=line.size - 1)
        state = [x[0].clone() for x in layout.unpack(op.states, sent[None]).values()]
    kept = op.settle(own, carry) if op.settle else {name: own[name] for name in op.backward_fields}
    return [
        *(carry[name].clone() for name in op.states),
        *state,
        *(x[None].clone() for x in (own["rho"], *(kept[name] for name in op.backward_fields))),
    ]


def backward(
    pending: Any, layout: Layout, payload: Tensor, kept: list[Tensor], total: bool, exchange: str
) -> list[Tensor]:
    """The reverse carry that enters this rank from its right.

    kept: this rank's rho and backward fields ``[1, ...]``, which travel with its reverse summary.
    Communication: the messages of ``exchange``; with ``total`` one all-reduce of the final state's gradients.
    """
    op = layout.operator
    way = messages.Direction(layout, backward=True)
    agreement.finish(pending, at_once=True)
    line = _Line(pending, backward=True)
    split = layout.nbytes(op.reverses)
    own: Fields = dict(zip(("rho", *op.backward_fields), (x[0] for x in kept)))
    own |= {name: x[0] for name, x in layout.unpack(op.reverses, payload[None, :split]).items()}
    entering: Fields | None = None
    if total:
        summed = payload[split:].view(layout.wire).to(layout.dtype)
        with agreement.named(pending):
            collectives.all_reduce_sum(summed, pending.pg)
        entering = {name: x[0] for name, x in layout.wide().unpack(op.reverses, summed.view(torch.uint8)[None]).items()}
        if line.position == 0:
            own |= op.combine_reverse(own, own, entering)
    carry = messages.prefix(line, way, own, exchange)
    if carry is None:
        carry = entering or {name: torch.zeros_like(own[name]) for name in op.reverses}
    return [carry[name].clone() for name in op.reverses]
