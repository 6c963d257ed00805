"""What softmax and memory layers make of the keys they see as one custom op, for programs that ``torch.export`` makes.

Which keys a token sees depends on how many came before, and is read on the host when the program runs. No shape may
depend on it. So a state with a window has all its slots, one less than the span, and one without gets T more in each
call. Slots that are not filled are zeros. The op has no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.functional.custom_op import custom_op, fake_of
from hla_dist.operators.precision import sum_dtype
from hla_dist.softmax import attend
from hla_dist.softmax.key_spans import KeySpans

OPTIONS = "int? span, int? window, int? delay, float scale, bool final"


def see(call: attend.SoftmaxCall, q: Tensor, own: Tensor, cached: Tensor | None, *view) -> tuple:
    """``attend.see`` of one device, ``call.spans.before`` [B] tokens of each row having been read."""
    spans, (window, delay, _) = call.spans, view
    results = iter(see_keys(q, own, cached, spans.before, spans.window, *view, spans.final))
    near = next(results) if window is not None or delay is None else None
    entering = (next(results), next(results)) if delay is not None else None
    return near, entering, (next(results), next(results)) if spans.final else None


@custom_op(f"(Tensor q, Tensor own, Tensor? cached, Tensor before, {OPTIONS}) -> Tensor[]")
def see_keys(q, own, cached, before, span, window, delay, scale, final) -> list[Tensor]:
    """``attend.see`` in one list, without what is None."""
    batch, tokens = q.shape[:2]
    before, place = before.cpu(), before.device
    if cached is not None:
        attend.check_slots(before, cached.shape[1], span)
    ragged = bool((before != before[:1]).any())
    bounds = torch.arange((batch if ragged else 1) + 1) * tokens
    if ragged:  # each row a document
        q, own = (x.reshape(1, batch * tokens, *x.shape[2:]) for x in (q, own))
    spans = KeySpans(bounds, [q.shape[1]], before[: len(bounds) - 1], span, ragged, final)
    call = attend.SoftmaxCall(spans, None, 0)
    near, entering, after = attend.see(call, q, own, cached, window, delay, scale)
    results = [x.reshape(batch, tokens, *x.shape[2:]).contiguous() for x in (near, *(entering or ())) if x is not None]
    if after is None:
        return results
    kept, read = after
    empty = _slots(tokens, cached, span) - kept.shape[1]
    if span is not None or empty or not bool(before.any()):  # else it is new: no copy of a long cache
        kept = F.pad(kept, (0, 0, 0, 0, 0, empty))
    return [*results, kept, read.to(place)]


def _slots(tokens: int, cached: Tensor | None, span: int | None) -> int:
    """Of the state after the call."""
    return span - 1 if span is not None else tokens + (0 if cached is None else cached.shape[1])


@fake_of(see_keys)
def _(q, own, cached, before, span, window, delay, scale, final) -> list[Tensor]:
    results = []
    if delay is None:
        results += [q.new_empty(q.shape)]
    elif window is not None:
        results += [q.new_empty(*q.shape[:3], q.shape[3] + 1, dtype=sum_dtype(q.dtype))]
    if delay is not None:
        results += [own.new_empty(own.shape), q.new_empty(q.shape[:2], dtype=torch.bool)]
    if final:
        kept = own.new_empty(own.shape[0], _slots(q.shape[1], cached, span), *own.shape[2:])
        results += [kept, torch.empty_like(before)]
    return results
