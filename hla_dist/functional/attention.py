"""The public operators. Shapes: B batch, T local tokens, H query heads, G key/value heads, K and V head sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hla_dist.functional import backend as backends
from hla_dist.functional import exported, packed, stage_ops, validate
from hla_dist.functional.autograd import CausalFunction, FinishFunction, Options, Place, StartFunction
from hla_dist.functional.documents import Documents
from hla_dist.functional.full import Full
from hla_dist.functional.transforms import refuse_transforms
from hla_dist.operators import NAMED, OPERATORS
from hla_dist.operators.precision import as_autocast, without_autocast
from hla_dist.operators.summary import Summary
from hla_dist.parallel import agreement, collectives, topology
from hla_dist.states import AHLAState, HLA2PaperState, HLA2State, HLA3State, LinearState, PrefixState


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay_form: str = "masked",
    scale: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: str = "causal",
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    shard_lengths: list[int] | None = None,
    group: Any = None,
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, LinearState | None]:
    """First-order (gated) linear attention: ``o_t = sum_{i<=t} Gamma(t, i) (q_t . k_i) v_i``.

    The options are those of :func:`hla2`, without ridge and the prefix mask. State: ``LinearState(P)``,
    ``P = sum Gamma(end, i) k_i v_i^T  [B, H, K, V]``.
    """
    return _attend("linear_attention", q, k, v, {n: x for n, x in locals().items() if n not in "qkv"})


def hla2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay_form: str = "masked",
    scale: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: str = "causal",
    initial_state: HLA2State | HLA2PaperState | PrefixState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    shard_lengths: list[int] | None = None,
    group: Any = None,
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, HLA2State | HLA2PaperState | PrefixState | None]:
    """Second-order symmetric linear attention (HLA, arXiv 2510.27258): ``u = LA(q, k, k) + ridge q, o = LA(q, u, v)``.

        LA(a, b, c)_t = sum_{i<=t} Gamma(t, i) (a_t . b_i) c_i,   Gamma(t, i) = g_{i+1} ... g_t,   g = exp(log_decay)

    q ``[B, T, H, K]``, k ``[B, T, G, K]``, v ``[B, T, G, V]``, G divides H. Returns ``out [B, T, H, V]`` in q's dtype
    and the state, None unless asked for. Differentiable in q, k, v, log_decay and initial_state; not twice.

    log_decay           natural log of the gates, <= 0: ``[H]`` or ``[B, T, H]`` (``[G]``, ``[B, T, G]``); -1e4 or less,
                        -inf included, cuts the past off, with a gradient of 0
    decay_form          "masked", the equations above; "paper", the paper's recurrence with decay to the letter:
                        S_t = g S + k k^T, C_t = g C + q v^T, G_t = g G + k k^T C_{t-1}, o = q^T ((S + ridge I) C - G);
                        with gates it is another operator, without them the same one. Nothing differs with mask="prefix"
                        (its recurrence has no G) and "full" (no decay)
    scale               q is replaced by scale * q, in the ridge and the states too
    ridge               lambda of the paper's S + lambda I
    normalize, eps      out = numerator / (denominator + eps), the denominator being the same cascade on ones; it has
                        no sign, so eps does not protect it where q and k have mixed signs
    mask                "causal"; "prefix" (the paper's eq. 3.1: o = LA(w, q, v), w = LA(q, k, k) + ridge q); "full"
    initial_state       the carry before the first token, ``HLA2State(S, F)`` (prefix: ``PrefixState(S, C)``, paper:
                        ``HLA2PaperState(S, C, G)``), float32
                        (float64 for float64 inputs), ``[B, H, K, K]`` and ``[B, H, K, V]`` (V + 1 with normalize)
    output_final_state  also return the carry after the last token; T = 1 with an initial state is a decode step
    group               ProcessGroup, 1-D DeviceMesh or mpi4py communicator over which the sequence is sharded, rank
                        r's tokens before rank r + 1's; T is local, may differ, may be 0. initial_state is read on
                        rank 0; the final state, the whole sequence's, comes back on every rank
    exchange            how summaries travel over the group: "all_gather"; "scan" (recursive doubling);
                        "hierarchical" (inside machines, then across); "auto": all_gather up to 8 ranks or on one
                        machine, else hierarchical on machines of equal ranks, else scan. All are exact; mask="full"
                        has all_gather only
    wire_dtype          torch.bfloat16: summaries travel rounded to it, in half the bytes, with errors of its size
                        (docs/numerics.md); None: as they are
    backend             "auto": Triton's kernels on a GPU, else torch; "torch"; "triton": an error where it cannot run
    chunk_size          tokens a chunk; None: 64, or the next power of two for shorter segments
    cu_seqlens          ``[N + 1]`` integers, documents packed into one sequence, B = 1: none sees another, some may be
                        empty. States then have N rows. With a group it is the whole sequence's; row n of the
                        initial state is read on the rank of document n's first token, row n of the final state is
                        valid on the rank of its last (an empty document: where it would start), zero elsewhere
    cu_seqlens_cpu      the same on the host, where cu_seqlens is on a GPU: reading lengths makes the host wait
    shard_lengths       with a group and cu_seqlens: one host integer a rank; None: equal shards

    Precision: sums and states in float32 (float64 for float64 inputs), whatever the input dtype; autocast changes
    nothing. Without decay F grows like T^2.
    Communication: with a group, one all-gather of summaries forward, one backward (other exchanges: an all-gather
    of 64 bytes a rank and the messages of docs/sequence-parallel.md); bytes independent of T. Every rank must run
    backward if one does.
    Errors: ValueError naming the argument, what was expected and what came; with a group, on every rank alike.
    """
    return _attend("hla2", q, k, v, {n: x for n, x in locals().items() if n not in "qkv"})


def ahla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay_form: str = "masked",
    scale: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: str = "causal",
    initial_state: AHLAState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    shard_lengths: list[int] | None = None,
    group: Any = None,
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, AHLAState | None]:
    """Second-order asymmetric linear attention (AHLA of the paper): ``r = LA(q, k, v)``, ``o = LA(q, k, r)``.

    The options are those of :func:`hla2`, without ridge and the prefix mask. State: ``AHLAState(P, E)``,
    ``P = sum Gamma(end, i) k_i v_i^T``, ``E = sum Gamma(end, i) k_i r_i^T``, ``[B, H, K, V]`` both.
    """
    return _attend("ahla", q, k, v, {n: x for n, x in locals().items() if n not in "qkv"})


def hla3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    decay_form: str = "masked",
    scale: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: str = "causal",
    initial_state: HLA3State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    shard_lengths: list[int] | None = None,
    group: Any = None,
    exchange: str = "auto",
    wire_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, HLA3State | None]:
    """Third-order linear attention: ``u = LA(q, k, k) + ridge q``, ``r = LA(q, k, v)``, ``o = LA(q, u, r)``.

    Equal to the masked matrix form ((L o W W^T) W) V; the paper's own streaming form is not (docs/algebra.md). The
    options are those of :func:`hla2`, without the prefix mask. State: ``HLA3State(S, P, F)``. Without decay F grows
    like T^3. A summary holds 3 K^2 + 3 K V numbers a head.
    """
    return _attend("hla3", q, k, v, {n: x for n, x in locals().items() if n not in "qkv"})


def summarize(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    mask: str = "causal",
    decay_form: str = "masked",
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Summary:
    """A segment's summary: what it does to any carry (docs/algebra.md, segment summaries).

    Arguments as for the operator named. float32, or float64 for float64 inputs; not differentiable (autograd says
    so if asked). No communication.
    """
    validate.require(operator in NAMED, "operator", f"one of {tuple(NAMED)}", repr(operator))
    options = dict.fromkeys(("cu_seqlens", "cu_seqlens_cpu", "shard_lengths", "initial_state"))
    options |= {
        "decay_form": decay_form,
        "exchange": "auto",
        "wire_dtype": None,
        "backend": backend,
        "output_final_state": False,
        "eps": 0.0,
    }
    options |= {"scale": scale, "ridge": ridge, "normalize": normalize, "mask": mask, "chunk_size": chunk_size}
    refuse_transforms("summarize", q, k, v, log_decay)
    validate.check_inputs(q, k, v)
    validate.check_options(operator, options)
    validate.require(mask != "full", "mask", "'causal' or 'prefix' (a full mask has no segments)", repr(mask))
    validate.check_log_decay(log_decay, q, k)
    name = _cascade(operator, options)
    log_decay = _per_query_head(log_decay, q)
    op = OPERATORS[name]
    value_dim = v.shape[3] + int(normalize)
    options["backend"] = backends.resolve(backend, name, mask, q, value_dim, chunk_size)
    rho, *rest = stage_ops.summarize(q, k, v, log_decay, *_options(name, options))
    return Summary(name, rho, dict(zip(op.fields, rest)))


def _cascade(name: str, o: dict[str, Any]) -> str:
    """The cascade that an operator's mask and decay form choose."""
    forms = NAMED[name].forms
    if o["mask"] in forms:
        return forms[o["mask"]].name
    return forms["paper"].name if o["decay_form"] == "paper" else name


def _options(name: str, o: dict[str, Any]) -> Options:
    numbers = (float(o["scale"]), float(o["ridge"]), o["normalize"], float(o["eps"]), o["chunk_size"] or 0)
    return Options(name, *numbers, o["backend"])


def _per_query_head(log_decay: Tensor | None, q: Tensor) -> Tensor | None:
    """Gates per query head."""
    if log_decay is None or log_decay.shape[-1] == q.shape[2]:
        return log_decay
    return log_decay.repeat_interleave(q.shape[2] // log_decay.shape[-1], dim=-1)


def _rank_of(group: Any) -> tuple[int, int]:
    """This rank's number in the group, and how many there are."""
    if group is None:
        return 0, 1
    pg = collectives.resolve_group(group)
    return collectives.group_rank(pg), collectives.group_size(pg)


def _validate(name: str, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[str, Documents | None]:
    """Check everything local; return the name of the cascade, and the documents if there are any."""
    if o["mask"] != "full" or o["group"] is not None:  # on one device that is plain torch
        refuse_transforms(name, q, k, v, o["log_decay"], o["initial_state"])
    validate.check_inputs(q, k, v)
    validate.check_options(name, o)
    validate.check_log_decay(o["log_decay"], q, k)
    documents = None
    if o["cu_seqlens"] is not None:
        documents = validate.check_documents(o, q, *_rank_of(o["group"]))
    if o["backend"] == "triton" and o["mask"] == "full":
        backends.resolve("triton", name, "full", q, v.shape[3], o["chunk_size"])
    if o["mask"] == "full":
        validate.check_full(o["log_decay"], o)
        return name, documents
    cascade = _cascade(name, o)
    value_dim = v.shape[3] + int(o["normalize"])
    validate.check_state(o["initial_state"], cascade, q, value_dim, documents)
    o["backend"] = backends.resolve(o["backend"], cascade, o["mask"], q, value_dim, o["chunk_size"])
    return cascade, documents


def _place(o: dict[str, Any], cascade: str, documents: Documents | None, q: Tensor, k: Tensor, v: Tensor) -> Place:
    if o["group"] is None:
        return Place()
    pg = collectives.resolve_group(o["group"])
    if collectives.group_size(pg) == 1:
        return Place()
    exchange = topology.resolve(o["exchange"], pg.group_name)
    wire = "" if o["wire_dtype"] is None else str(o["wire_dtype"]).removeprefix("torch.")
    gates = o["log_decay"]
    kind = "None" if gates is None else f"[{'' if gates.dim() == 1 else 'B,T,'}{gates.shape[-1]}]"
    description = (
        f"{cascade} B={q.shape[0]} H={q.shape[2]} G={k.shape[2]} K={q.shape[3]} V={v.shape[3]} dtype={q.dtype} "
        f"device={q.device.type} log_decay={kind} scale={o['scale']} ridge={o['ridge']} normalize={o['normalize']} "
        f"eps={o['eps']} mask={o['mask']} output_final_state={o['output_final_state']} "
        f"packed={o['cu_seqlens'] is not None} exchange={exchange} wire={wire or None}"
    )
    if documents is not None:
        description += agreement.contents("cu_seqlens", documents.cu)
    return Place(pg.group_name, collectives.group_rank(pg), description, exchange, wire)


def raise_everywhere(error: ValueError, like: Any, group: Any) -> NoReturn:
    """Raise a local error, on every rank of the group if there is one; ``like``: a tensor on the group's device."""
    if group is not None and not torch.compiler.is_compiling():
        device = like.device if isinstance(like, Tensor) and like.device.type != "meta" else torch.device("cpu")
        agreement.fail(group, error, device)
    raise error


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[Tensor, Any]:
    q, k, v = as_autocast(q, k, v)
    cascade, documents, log_decay, place, initial = _prepare(name, q, k, v, o)
    if o["mask"] == "full":
        with without_autocast(q.device):
            return Full(name, o).attend(q, k, v, place, documents), None
    if torch.compiler.is_compiling():  # Dynamo refuses one tensor in two places
        k, v = k.view_as(k), v.view_as(v)
    options, wanted = _options(cascade, o), o["output_final_state"]
    if torch.compiler.is_exporting() and documents is None and not place.group_name:
        how = (name, o["mask"], o.get("decay_form", "masked"))
        out, *state = exported.attend(q, k, v, log_decay, list(initial), *how, *options)
        return out, OPERATORS[cascade].state(*state) if wanted else None
    if documents is not None:
        out, state = packed.attend(documents, q, k, v, log_decay, tuple(initial), wanted, options, place)
    else:
        out, *state = CausalFunction.apply(options, place, wanted, q, k, v, log_decay, *initial)
    return out, OPERATORS[cascade].state(*state) if state else None


def _prepare(name: str, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[Any, ...]:
    """Checked and resolved: the cascade, documents, gates per query head, the place, the initial state's fields."""
    _rank_of(o["group"])  # a group this rank is not in is nobody else's error
    try:
        cascade, documents = _validate(name, q, k, v, o)
    except ValueError as error:
        raise_everywhere(error, q, o["group"])
    initial = o["initial_state"]
    if initial is None:
        initial = ()
    elif o["mask"] != "full" and OPERATORS[cascade].states[0] == "S":
        initial = ((initial[0] + initial[0].mT) / 2, *initial[1:])  # S enters symmetric; so does its gradient
    return cascade, documents, _per_query_head(o["log_decay"], q), _place(o, cascade, documents, q, k, v), initial


_DEFAULTS = {n: p.default for n, p in inspect.signature(hla2).parameters.items() if n not in "qkv"}


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """``hla_dist.<name>(q, k, v, **options)`` for any operator that is registered (``hla_dist.operators``)."""
    return _attend(name, q, k, v, _DEFAULTS | options)


class Started(NamedTuple):
    """A call under way; ``finish()`` gives what the operator returns. To be finished once, in the order of starts."""

    finish: Callable[[], tuple[Tensor, Any]]


def start(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Started:
    """Begin ``hla_dist.<name>(q, k, v, **options)``: what runs before ``finish()`` runs beside the exchange.

        call = start("hla2", q, k, v, group=group)
        gate = project(x)                            # forward and backward while summaries travel
        out, state = call.finish()

    The results are the operator's, to the bit. An exchange by messages that is to return the final state is made before
    this returns. Without a group, with documents or the full mask, and under
    torch.compile, everything happens in ``finish()``. Every rank makes the same starts and finishes in the same order.
    Communication and errors: those of the operator.
    """
    o = _DEFAULTS | options
    if o["group"] is None or o["cu_seqlens"] is not None or o["mask"] == "full" or torch.compiler.is_compiling():
        return Started(partial(_attend, name, q, k, v, o))
    q, k, v = as_autocast(q, k, v)
    cascade, _, log_decay, place, initial = _prepare(name, q, k, v, o)
    options_, wanted = _options(cascade, o), o["output_final_state"]
    if not place.group_name:  # a group of one
        return Started(partial(_attend, name, q, k, v, o))
    link: list[Any] = []
    anchor, *under_way = StartFunction.apply(link, options_, place, wanted, q, k, v, log_decay, *initial)
    inputs = tuple(x if x is None else x.detach() for x in (q, k, v, log_decay))
    entering = [x.detach() for x in initial]

    def finish() -> tuple[Tensor, Any]:
        out, *state = FinishFunction.apply(link, options_, place, wanted, anchor, under_way, inputs, entering)
        return out, OPERATORS[cascade].state(*state) if state else None

    return Started(finish)
