"""One call of an operator, checked and resolved: the only thing that is handed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hla_dist.functional import validate
from hla_dist.functional.backend import resolve as resolve_backend
from hla_dist.functional.documents import Documents
from hla_dist.functional.options import DEFAULTS
from hla_dist.operators import NAMED, OPERATORS
from hla_dist.operators.cascade import Operator
from hla_dist.operators.precision import as_autocast, sum_dtype
from hla_dist.parallel import agreement, collectives, topology


class Plan(NamedTuple):
    """What a call is beside its tensors: plain values that autograd functions and custom ops take.

    The first seven are the trailing arguments of every stage op. An empty ``group_name``: one device, nothing is sent.
    """

    operator: str  # the cascade
    scale: float
    ridge: float
    normalize: bool
    eps: float
    chunk_size: int
    backend: str  # "torch", "triton" or "gluon": resolved
    output_state: bool = False
    group_name: str = ""
    rank: int = 0
    description: str = ""
    exchange: str = "all_gather"  # resolved: parallel.topology
    wire: str = ""  # dtype that summaries travel in; empty: their own

    @property
    def cascade(self) -> Operator:
        """The operator's passes."""
        return OPERATORS[self.operator]

    @property
    def stage_arguments(self) -> tuple[Any, ...]:
        """The trailing arguments of the stage ops."""
        return self[:7]

    def alone(self) -> Plan:
        """The same on one device."""
        return Plan(*self[:8])

    def exchange_arguments(self, q: Tensor, v: Tensor) -> tuple[str, list[int], bool, str, str]:
        """The trailing arguments of the exchange ops."""
        dims = [q.shape[0], q.shape[2], q.shape[3], v.shape[3] + int(self.normalize)]
        return self.operator, dims, q.dtype == torch.float64, self.exchange, self.wire

    def zeros(self, q: Tensor, v: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        """Zero states, moments or reverse states by name, ``[B, H, rows, columns]``."""
        op, dims = self.cascade, (q.shape[3], v.shape[3] + int(self.normalize))
        dtype = sum_dtype(q.dtype)
        return [torch.zeros(q.shape[0], q.shape[2], *op.shape(n, *dims), dtype=dtype, device=q.device) for n in names]

    def kept_output(self, out: Tensor) -> Tensor:
        """The output, if backward reads it: with ``normalize``."""
        return out if self.normalize else out.new_empty(0)


class Call(NamedTuple):
    """Tensors and plan of a call; gates per query head, key term ``[H]``, the initial state's fields, or none."""

    mask: str
    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    gain: Tensor | None
    skip: Tensor | None
    initial: tuple[Tensor, ...]
    documents: Documents | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The leading arguments of every stage op."""
        return self.q, self.k, self.v, self.log_decay, self.gain, self.skip

    @staticmethod
    def checked(name: str, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Call:
        """Check everything and resolve backend, exchange and group; ValueError on every rank of the group alike."""
        group = options.get("group")
        collectives.members(group)  # a group this rank is not in is nobody else's error
        q, k, v = as_autocast(q, k, v)
        try:
            return _check(name, q, k, v, options)
        except ValueError as error:
            raise_everywhere(error, q, group)


def raise_everywhere(error: ValueError, like: Any, group: Any, direction: str = "forward") -> NoReturn:
    """Raise a local error, on every rank of the group if there is one.

    like: a tensor on the group's device; direction: of the exchange that the other ranks are about to enter.
    """
    if group is not None and not torch.compiler.is_compiling():
        device = like.device if isinstance(like, Tensor) and like.device.type != "meta" else torch.device("cpu")
        agreement.fail(group, error, device, direction)
    raise error


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Call:
    validate.check_names(options, DEFAULTS)
    o = DEFAULTS | dict(options)
    full = o["mask"] == "full"
    if not full or o["group"] is not None:  # on one device that is plain torch
        validate.refuse_transforms(name, q, k, v, o["log_decay"], o["initial_state"], o["gain"], o["skip"])
    validate.check_inputs(q, k, v)
    validate.check_options(name, o)
    validate.check_log_decay(name, o["log_decay"], q, k)
    gain, skip = (validate.check_key_term(term, o[term], q) for term in ("gain", "skip"))
    documents = None
    if o["cu_seqlens"] is not None:
        documents = validate.check_documents(o, q, *collectives.members(o["group"])[1:])
    forms = NAMED[name].forms
    cascade = forms.get(o["mask"]) or (forms["paper"] if o["decay_form"] == "paper" and not full else NAMED[name])
    per_channel = o["log_decay"] is not None and o["log_decay"].dim() == 4
    if per_channel and not full:
        cascade = forms["channels"]
        validate.require(o["wire_dtype"] is None, "wire_dtype", "None with gates per channel", repr(o["wire_dtype"]))
    initial: tuple[Tensor, ...] = ()
    width = v.shape[3] + int(o["normalize"])
    if full:
        validate.check_full(o)
        backend = "torch"
    else:
        initial = validate.check_state(o["initial_state"], cascade, q, width, documents)
        backend = resolve_backend(o["backend"], cascade.name, q, v.shape[3], o["normalize"], o["chunk_size"])
        if initial and cascade.states[0] == "S":  # S enters symmetric; so does its gradient
            initial = ((initial[0] + initial[0].mT) / 2, *initial[1:])
    gates = o["log_decay"]
    if gates is not None and not per_channel and gates.shape[-1] != q.shape[2]:
        gates = gates.repeat_interleave(q.shape[2] // gates.shape[-1], dim=-1)
    scale = q.shape[3] ** -0.5 if o["scale"] is None else float(o["scale"])
    settings = (scale, float(o["ridge"]), o["normalize"], float(o["eps"]), o["chunk_size"] or 0)
    plan = Plan(cascade.name, *settings, backend, o["output_final_state"])
    if o["group"] is not None:
        plan = _over_group(plan, o, documents, q, k, v)
    return Call(o["mask"], plan, q, k, v, gates, gain, skip, initial, documents)


def _over_group(plan: Plan, o: dict[str, Any], documents: Documents | None, q: Tensor, k: Tensor, v: Tensor) -> Plan:
    """The plan with its group, unless that is a group of one."""
    pg = collectives.resolve_group(o["group"])
    if collectives.group_size(pg) == 1:
        return plan
    exchange = topology.resolve(o["exchange"], pg.group_name)
    wire = "" if o["wire_dtype"] is None else str(o["wire_dtype"]).removeprefix("torch.")
    gates = o["log_decay"]
    sizes = () if gates is None else gates.shape if gates.dim() == 1 else ("B", "T", *gates.shape[2:])
    kind = "None" if gates is None else f"[{','.join(map(str, sizes))}]"
    term = " ".join(f"{x}={'[H]' if isinstance(o[x], Tensor) else float(o[x])}" for x in validate.KEY_TERM)
    description = (
        f"{plan.operator} B={q.shape[0]} H={q.shape[2]} G={k.shape[2]} K={q.shape[3]} V={v.shape[3]} dtype={q.dtype} "
        f"device={q.device.type} log_decay={kind} scale={plan.scale} ridge={plan.ridge} {term} "
        f"normalize={plan.normalize} eps={plan.eps} mask={o['mask']} output_final_state={plan.output_state} "
        f"packed={documents is not None} exchange={exchange} wire={wire or None}"
    )
    if documents is not None:
        description += agreement.contents("cu_seqlens", documents.cu)
    rank = collectives.group_rank(pg)
    return plan._replace(group_name=pg.group_name, rank=rank, description=description, exchange=exchange, wire=wire)
