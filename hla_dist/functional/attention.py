"""The public operators. Shapes: B batch, T local tokens, H query heads, G key/value heads, K and V head sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hla_dist.functional import exported, full, packed, stage_ops, validate
from hla_dist.functional.autograd import CausalFunction, FinishFunction, StartFunction
from hla_dist.functional.call import Call
from hla_dist.functional.options import SegmentOptions
from hla_dist.operators import NAMED
from hla_dist.operators.precision import without_autocast
from hla_dist.operators.summary import Summary
from hla_dist.states import AHLAState, HLA2PaperState, HLA2State, HLA3State, LinearState, PrefixState

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hla_dist.functional.options import Options


def linear_attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, LinearState | None]:
    """First-order (gated) linear attention.

        o_t = sum_{i<=t} Gamma(t, i) (q_t . k_i) v_i

    ``log_decay`` may have a gate per channel, ``[B, T, H, K]``: then Gamma(t, i) is a vector that
    multiplies k_i; plain torch, on a GPU too with ``backend="torch"``, in chunks of 16 tokens.

    The options are ``Options``, without ridge, gain, skip and the prefix mask. The state is
    ``LinearState(P)`` with ``P = sum Gamma(end, i) k_i v_i^T``, ``[B, H, K, V]``. Shapes,
    precision, communication and errors are those of ``hla2``.

    Examples:
        >>> import torch, hla_dist
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> out, state = hla_dist.linear_attention(q, k, v, output_final_state=True)
        >>> out.shape, state.P.shape
        (torch.Size([1, 100, 4, 16]), torch.Size([1, 4, 16, 16]))
    """
    return _from_outside("linear_attention", q, k, v, options)


def hla2(
    q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, HLA2State | HLA2PaperState | PrefixState | None]:
    """Second-order symmetric linear attention (HLA, arXiv 2510.27258).

        u = gain LA(q, k, k) + ridge q + skip k,   o = LA(q, u, v)
        LA(a, b, c)_t = sum_{i<=t} Gamma(t, i) (a_t . b_i) c_i
        Gamma(t, i) = g_{i+1} ... g_t,   g = exp(log_decay)

    q is ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, and G divides H. Returns ``out``
    ``[B, T, H, V]`` in q's dtype, and the state, which is None unless asked for: ``HLA2State(S, F)``,
    with the prefix mask ``PrefixState(S, C)``, with the paper's decay ``HLA2PaperState(S, C, G)``.
    Differentiable once, in q, k, v, log_decay, gain, skip and initial_state. The options are
    ``Options``, all of them.

    Precision: sums and states are float32 (float64 for float64 inputs), whatever the input dtype.
    Autocast changes nothing. Without decay F grows like T^2.

    Communication: with a group, one all-gather of summaries forward and one backward. Other exchanges
    send an all-gather of 64 bytes per rank and the messages of docs/sequence-parallel.md. Bytes are
    independent of T. Every rank must run backward if one does.

    Errors: ValueError naming the argument, what was expected and what came; with a group, on every rank
    alike.

    Examples:
        >>> import torch, hla_dist
        >>> q, k, v = torch.randn(3, 1, 128, 4, 32).unbind()
        >>> gates = torch.full((4,), -0.01)  # the log of a gate per head
        >>> out, state = hla_dist.hla2(q, k, v, log_decay=gates, output_final_state=True)
        >>> token = torch.randn(3, 1, 1, 4, 32).unbind()  # the next one: a decode step
        >>> out, state = hla_dist.hla2(
        ...     *token, log_decay=gates, initial_state=state, output_final_state=True
        ... )
        >>> out.shape
        torch.Size([1, 1, 4, 32])
    """
    return _from_outside("hla2", q, k, v, options)


def ahla(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, AHLAState | None]:
    """Second-order asymmetric linear attention (AHLA of the paper).

        r = LA(q, k, v),   o = LA(q, k, r)

    The options are ``Options``, without ridge, gain, skip and the prefix mask. The state is
    ``AHLAState(P, E)`` with ``P = sum Gamma(end, i) k_i v_i^T`` and ``E = sum Gamma(end, i) k_i
    r_i^T``, both ``[B, H, K, V]``. All else is as for ``hla2``.
    """
    return _from_outside("ahla", q, k, v, options)


def hla3(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, HLA3State | None]:
    """Third-order linear attention.

        u = gain LA(q, k, k) + ridge q + skip k,   r = LA(q, k, v),   o = LA(q, u, r)

    It equals the masked matrix form ((L o W W^T) W) V; the paper's own streaming form does not
    (docs/algebra.md). The options are ``Options``, without the prefix mask. The state is
    ``HLA3State(S, P, F)``. Without decay F grows like T^3. A summary holds 3 K^2 + 3 K V numbers per
    head. All else is as for ``hla2``.
    """
    return _from_outside("hla3", q, k, v, options)


def _from_outside(name: str, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Any]:
    """``attend``, with a warning of a layout that callers may mistake; the library's own layers do not."""
    result = attend(name, q, k, v, **options)
    if options.get("group") is None and options.get("initial_state") is None:
        validate.warn_of_heads_first(q)
    return result


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> tuple[Tensor, Any]:
    """``hla_dist.<name>(q, k, v, **options)`` for any registered operator (``hla_dist.operators``)."""
    return _run(Call.checked(name, q, k, v, options))


def _run(call: Call) -> tuple[Tensor, Any]:
    plan = call.plan
    if call.mask == "full":
        with without_autocast(call.q.device):
            return full.attend(call), None
    if torch.compiler.is_compiling():
        call = _apart(call)
    if _is_exported(call) and call.documents is None and not plan.group_name:
        out, *state = exported.attend(*call.inputs, list(call.initial), *plan.stage_arguments)
        return out, plan.cascade.state(*state) if plan.output_state else None
    if call.documents is not None:
        out, state = packed.attend(call)
    else:
        out, *state = CausalFunction.apply(plan, *call.inputs, *call.initial)
    return out, plan.cascade.state(*state) if state else None


def _apart(call: Call) -> Call:
    """The call with no tensor in two places: compilers refuse such a call or, torch 2.11, leave a gradient out."""
    log_decay, gain, skip = (x if x is None else x.view_as(x) for x in call.inputs[3:])
    initial = tuple(x.view_as(x) for x in call.initial)
    apart = call._replace(log_decay=log_decay, gain=gain, skip=skip, initial=initial)
    return apart._replace(k=call.k.view_as(call.k), v=call.v.view_as(call.v))


def _is_exported(call: Call) -> bool:
    """Whether a program is made that needs no gradient: torch 2.11 says so of torch.compile, too."""
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.inputs)
    return torch.compiler.is_exporting() and not (torch.compiler.is_dynamo_compiling() and gradients)


def summarize(operator: str, q: Tensor, k: Tensor, v: Tensor, **options: Unpack[SegmentOptions]) -> Summary:
    """Return a segment's summary: what it does to any carry (docs/algebra.md, eq. 4).

    float32, or float64 for float64 inputs. Not differentiable; autograd says so if asked. No
    communication.

    Args:
        operator: The operator's name.
        q: ``[B, T, H, K]``.
        k: ``[B, T, G, K]``.
        v: ``[B, T, G, V]``.
        **options: log_decay, decay_form, scale, ridge, gain, skip, normalize, mask (not full),
            backend and chunk_size, as for the operator named.
    """
    validate.require(operator in NAMED, "operator", f"one of {tuple(NAMED)}", repr(operator))
    validate.check_names(options, SegmentOptions.__annotations__)
    mask = options.get("mask")
    validate.require(mask != "full", "mask", "'causal' or 'prefix' (a full mask has no segments)", repr(mask))
    inner = (options.get(name) for name in ("log_decay", *validate.KEY_TERM))
    validate.refuse_transforms("summarize", q, k, v, *inner)
    call = Call.checked(operator, q, k, v, options)
    rho, *rest = stage_ops.summarize(*call.inputs, *call.plan.stage_arguments)
    return Summary(call.plan.operator, rho, dict(zip(call.plan.cascade.fields, rest)), options.get("gain", 1.0))


class Started(NamedTuple):
    """A call under way. ``finish()`` returns the results; call it once, and in the order of starts."""

    finish: Callable[[], tuple[Tensor, Any]]


def start(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Started:
    """Begin ``hla_dist.<name>(q, k, v, **options)``: what runs before ``finish()`` runs beside the
    exchange.

        call = start("hla2", q, k, v, group=group)
        gate = project(x)                            # forward and backward while summaries travel
        out, state = call.finish()

    The results are the operator's, to the bit. An exchange by messages that is to return the final
    state is made before this returns. Without a group, with documents or the full mask, and under
    torch.compile, everything but the checks happens in ``finish()``. Every rank makes the same starts
    and finishes in the same order. Communication and errors: those of the operator.
    """
    call = Call.checked(name, q, k, v, options)
    plan = call.plan
    if not plan.group_name or call.documents is not None or call.mask == "full" or torch.compiler.is_compiling():
        return Started(lambda: _run(call))
    link: list[Any] = []
    anchor, *under_way = StartFunction.apply(link, plan, *call.inputs, *call.initial)
    detached = tuple(x if x is None else x.detach() for x in call.inputs)
    entering = [x.detach() for x in call.initial]

    def finish() -> tuple[Tensor, Any]:
        out, *state = FinishFunction.apply(link, plan, anchor, under_way, detached, entering)
        return out, plan.cascade.state(*state) if state else None

    return Started(finish)
