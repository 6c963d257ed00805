"""Checks at the public boundary: every error names the argument, what was expected and what came.

Shapes, dtypes, devices and options are checked always; contents (the sign of log_decay) on CPU tensors always, on
CUDA tensors only under ``validation(True)``, because reading them there makes the host wait.
"""

import math
import warnings
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from hla_dist.functional.documents import Documents
from hla_dist.operators import NAMED
from hla_dist.operators.cascade import Operator
from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.topology import EXCHANGES

# Derivatives are closed forms behind one autograd.Function: first order, right to left. What else torch can do to a
# function is refused by name: it ends otherwise in an error that speaks of setup_context.
_INSTEAD = {
    "vmap": "a call outside of it, with the mapped dimension in the batch dimension B of the inputs",
    "grad": "a call outside of it (torch.autograd.grad and backward() give every first derivative)",
    "jvp": "a call outside of it (there are derivatives in reverse mode only: torch.autograd.grad, backward())",
}

KEY_TERM = {"gain": 1.0, "skip": 0.0}  # the options of the key term, and where they change nothing
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_check_cuda_contents = False
_check_cpu_contents = True
_warned_of_heads_first = False


class validation(AbstractContextManager["validation"]):
    """Switch checks of what tensors contain on or off, for good or as a context manager.

    Contents are signs of ``log_decay`` and the order of ``cu_seqlens``.

    Args:
        enabled: Check CUDA tensors too. While on, each call costs a host synchronisation.
        cpu: Check CPU tensors. A training step that looks for NaN at its end, on all ranks together,
            sets it False.

    Examples:
        >>> import hla_dist
        >>> with hla_dist.validation(True):
        ...     pass  # calls in here check CUDA tensors
    """

    def __init__(self, enabled: bool, cpu: bool = True):
        global _check_cuda_contents, _check_cpu_contents
        self.previous = _check_cuda_contents, _check_cpu_contents
        _check_cuda_contents, _check_cpu_contents = bool(enabled), bool(cpu)

    def __exit__(self, *error: Any) -> None:
        global _check_cuda_contents, _check_cpu_contents
        _check_cuda_contents, _check_cpu_contents = self.previous


def require(condition: object, argument: str, expected: str, actual: object) -> None:
    """Raise ``ValueError("argument: expected ..., got ...")`` unless ``condition``."""
    if not condition:
        refuse(argument, expected, actual)


def refuse(argument: str, expected: str, actual: object) -> NoReturn:
    """Raise ``ValueError("argument: expected ..., got ...")``.

    Texts with sizes in them are built only here: formatting a size makes a compiler specialise on it.
    """
    raise ValueError(f"{argument}: expected {expected}, got {actual}")


def check_names(options: Iterable[str], known: Collection[str]) -> None:
    """Refuse an option that is none of the known ones."""
    for name in options:
        if name not in known:
            refuse(name, f"one of the options {', '.join(known)}", "an unknown one")


def check_inputs(q: Any, k: Any, v: Any) -> None:
    """Ranks, dtypes, devices and matching shapes of q, k, v."""
    for name, x, letters in (("q", q, "[B, T, H, K]"), ("k", k, "[B, T, G, K]"), ("v", v, "[B, T, G, V]")):
        require(isinstance(x, Tensor), name, f"a tensor {letters}", type(x).__name__)
        if x.dim() != 4:
            refuse(name, f"4 dimensions {letters}", f"shape {tuple(x.shape)}")
        require(x.dtype in FLOATS, name, "bfloat16, float16, float32 or float64", x.dtype)
        require(x.dtype == q.dtype, name, f"q's dtype {q.dtype}", x.dtype)
        require(x.device == q.device, name, f"q's device {q.device}", x.device)
        if x.shape[2] == 0 or x.shape[3] == 0:
            refuse(name, "at least one head and one channel", f"shape {tuple(x.shape)}")
    B, T, H, K = q.shape
    G = k.shape[2]
    if tuple(k.shape) != (B, T, G, K):
        refuse("k", f"[B, T, G, K] = [{B}, {T}, G, {K}] like q", f"shape {tuple(k.shape)}")
    if H % G:
        refuse("k", f"a number of heads that divides q's {H}", f"{G} heads")
    if tuple(v.shape[:3]) != (B, T, G):
        refuse("v", f"[B, T, G] = [{B}, {T}, {G}] like k in front of V", f"shape {tuple(v.shape)}")


def check_log_decay(name: str, log_decay: Any, q: Tensor, k: Tensor) -> None:
    """A natural log of gates: ``[H]``, ``[B, T, H]``, ``[G]`` or ``[B, T, G]``, <= 0; -inf is a cut.

    For first order also ``[B, T, H, K]`` or ``[B, T, G, K]``.
    """
    if log_decay is None:
        return
    B, T, H, K = q.shape
    G = k.shape[2]
    require(isinstance(log_decay, Tensor), "log_decay", "a tensor or None", type(log_decay).__name__)
    require(log_decay.dtype in FLOATS, "log_decay", "a floating dtype", log_decay.dtype)
    require(log_decay.device == q.device, "log_decay", f"q's device {q.device}", log_decay.device)
    shapes = [(H,), (B, T, H), (G,), (B, T, G)]  # a set would hash T, and every T would be compiled anew
    per_channel = "channels" in NAMED[name].forms
    if per_channel:
        shapes += [(B, T, H, K), (B, T, G, K)]
    elif log_decay.dim() == 4:
        refuse("log_decay", f"a number per head for {name} (linear_attention takes gates per channel)", "[B, T, H, K]")
    if tuple(log_decay.shape) not in shapes:
        expected = f"shape [H] = [{H}] or [B, T, H] = [{B}, {T}, {H}]"
        if G != H:
            expected += f" (or [G] = [{G}], [B, T, G])"
        if per_channel:
            expected += f", or [B, T, H, K] with K = {K}"
        refuse("log_decay", expected, f"shape {tuple(log_decay.shape)}")
    if contents_visible(log_decay):
        good = log_decay <= 0  # NaN is not
        if not bool(good.all()):
            index = tuple((~good).nonzero()[0].tolist())
            value = log_decay[index].item()
            raise ValueError(
                f"log_decay: expected values <= 0 (logs of gates, -inf cuts), got {value} at index {index}"
            )


def contents_visible(x: Tensor) -> bool:
    """Whether a tensor's contents may be read without surprising anyone."""
    if torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor):
        return False
    return _check_cpu_contents if x.device.type == "cpu" else _check_cuda_contents


def check_number(name: str, value: Any, minimum: float | None = None) -> None:
    """A finite real number, not a tensor (it would be read on the host)."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    kind = "a finite number" if minimum is None else f"a finite number >= {minimum}"
    if not ok or (minimum is not None and value < minimum):
        refuse(name, kind, repr(value))


def check_options(name: str, o: dict[str, Any]) -> None:
    """Options shared by all operators; ``o`` holds the keyword arguments by name."""
    if o["scale"] is not None:
        check_number("scale", o["scale"])
    check_number("ridge", o["ridge"])
    check_number("eps", o["eps"], 0.0)
    op = NAMED[name]
    if not op.ridged:
        ridged = " and ".join(other.name for other in NAMED.values() if other.ridged)
        require(o["ridge"] == 0.0, "ridge", f"0.0 ({name} has no ridge; {ridged} do)", o["ridge"])
    for term, neutral in KEY_TERM.items():
        if isinstance(o[term], Tensor) or o[term] != neutral:
            keyed = " and ".join(other.name for other in NAMED.values() if other.keyed)
            require(op.keyed, term, f"{neutral} ({name} has no key term; only {keyed} have one)", _shown(o[term]))
            for option, value in (("mask", "causal"), ("decay_form", "masked")):
                form = f"{neutral} with {option}={o[option]!r} (the key term is for {option}={value!r})"
                require(o[option] == value, term, form, _shown(o[term]))
    for flag in ("normalize", "output_final_state"):
        require(isinstance(o[flag], bool), flag, "True or False", repr(o[flag]))
    masks = ("causal", *(mask for mask in ("prefix",) if mask in op.forms), *(("full",) if op.full else ()))
    require(o["mask"] in masks, "mask", f"one of {masks} for {name}", repr(o["mask"]))
    require(o["decay_form"] in ("masked", "paper"), "decay_form", "'masked' or 'paper'", repr(o["decay_form"]))
    if "paper" not in op.forms:
        require(o["decay_form"] == "masked", "decay_form", f"'masked' for {name} (hla2 has both)", "'paper'")
    require(o["exchange"] in EXCHANGES, "exchange", f"one of {EXCHANGES}", repr(o["exchange"]))
    wire = o["wire_dtype"]
    require(wire in (None, torch.bfloat16), "wire_dtype", "None or torch.bfloat16", repr(wire))
    if o["mask"] == "full":
        ways = ("auto", "all_gather")
        require(o["exchange"] in ways, "exchange", f"one of {ways} with mask='full'", repr(o["exchange"]))
        require(wire is None, "wire_dtype", "None with mask='full'", repr(wire))
    backends = ("auto", "torch", "triton", "gluon")
    require(o["backend"] in backends, "backend", f"one of {backends}", repr(o["backend"]))
    chunk = o["chunk_size"]
    ok = chunk is None or (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1)
    require(ok, "chunk_size", "None or a whole number >= 1", repr(chunk))
    for packed in ("cu_seqlens_cpu", "shard_lengths"):
        require(o[packed] is None or o["cu_seqlens"] is not None, packed, "None without cu_seqlens", "a value")


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def check_key_term(name: str, value: Any, q: Tensor) -> Tensor | None:
    """``gain`` or ``skip`` as ``[H]`` in the states' dtype, or None for what leaves the operator as it is."""
    H, dtype = q.shape[2], sum_dtype(q.dtype)
    if not isinstance(value, Tensor):
        check_number(name, value)
        return None if value == KEY_TERM[name] else torch.full((H,), float(value), dtype=dtype, device=q.device)
    require(value.dtype in FLOATS, name, "a floating dtype", value.dtype)
    require(value.device == q.device, name, f"q's device {q.device}", value.device)
    if tuple(value.shape) != (H,):
        refuse(name, f"a number or shape [H] = [{H}]", f"shape {tuple(value.shape)}")
    return value.to(dtype)


def check_full(o: dict[str, Any]) -> None:
    """``mask="full"`` has no order, hence neither decay nor a state, and no kernels."""
    plain = "'auto' or 'torch' with mask='full' (it is plain matrix products)"
    require(o["backend"] in ("auto", "torch"), "backend", plain, repr(o["backend"]))
    require(
        o["log_decay"] is None, "log_decay", "None with mask='full' (every token sees the whole sequence)", "a tensor"
    )
    require(o["initial_state"] is None, "initial_state", "None with mask='full', which does not stream", "a state")
    require(not o["output_final_state"], "output_final_state", "False with mask='full', which does not stream", "True")


def check_documents(o: dict[str, Any], q: Tensor, rank: int, ranks: int) -> Documents:
    """``cu_seqlens [N + 1]`` of the whole sequence, and which part of it this rank has."""
    cu, host = o["cu_seqlens"], o["cu_seqlens_cpu"]
    if torch.compiler.is_compiling():
        refuse("cu_seqlens", "a call outside torch.compile (document lengths are read on the host)", "a traced call")
    B, T = q.shape[:2]
    require(B == 1, "cu_seqlens", "B = 1 (documents are packed into one sequence)", f"B = {B}")
    for name, x in (("cu_seqlens", cu), ("cu_seqlens_cpu", host)):
        if x is None:
            continue
        require(isinstance(x, Tensor), name, "a tensor [N + 1] of integers", type(x).__name__)
        require(x.dtype in (torch.int32, torch.int64), name, "dtype int32 or int64", x.dtype)
        require(x.dim() == 1 and len(x) > 0, name, "shape [N + 1]", f"shape {tuple(x.shape)}")
    require(cu.device == q.device, "cu_seqlens", f"q's device {q.device}", cu.device)
    if host is not None:
        require(host.device.type == "cpu", "cu_seqlens_cpu", "a tensor on the CPU", host.device)
        require(host.shape == cu.shape, "cu_seqlens_cpu", f"cu_seqlens's shape {tuple(cu.shape)}", tuple(host.shape))
    numbers = (cu if host is None else host).detach().to("cpu", torch.int64)
    name = "cu_seqlens" if host is None else "cu_seqlens_cpu"
    require(int(numbers[0]) == 0, name, "to start at 0", int(numbers[0]))
    falls = (numbers[1:] < numbers[:-1]).nonzero()
    if len(falls):
        n = int(falls[0])
        refuse(name, "to be sorted", f"{int(numbers[n])} before {int(numbers[n + 1])} at index {n + 1}")
    total, lengths = int(numbers[-1]), o["shard_lengths"]
    if lengths is None:
        lengths = [T] * ranks
        hint = "" if ranks == 1 else f" (T = {T} on each of {ranks} ranks; pass shard_lengths if shards differ)"
        require(total == sum(lengths), name, f"to end at {sum(lengths)}{hint}", total)
    else:
        whole = isinstance(lengths, (list, tuple)) and all(type(n) is int and n >= 0 for n in lengths)
        require(whole, "shard_lengths", "a list of whole numbers >= 0, one per rank", repr(lengths))
        require(len(lengths) == ranks, "shard_lengths", f"{ranks} lengths, one per rank", f"{len(lengths)}")
        require(lengths[rank] == T, "shard_lengths", f"this rank's {T} tokens at index {rank}", lengths[rank])
        require(total == sum(lengths), name, f"to end at {sum(lengths)}, the sum of shard_lengths", total)
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    return Documents(numbers, tuple(bounds), rank)


def check_state(
    state: Any, op: Operator, q: Tensor, value_dim: int, documents: Documents | None = None
) -> tuple[Tensor, ...]:
    """The fields of an initial state, ``[B, H, rows, columns]`` each, in the state dtype; none for None.

    A state is the operator's named tuple, a plain tuple or list of as many tensors, or for one field the bare tensor.
    """
    if state is None:
        return ()
    names, kind = op.states, op.state
    if isinstance(state, Tensor) and len(names) == 1:
        state = (state,)
    plain = type(state) in (tuple, list) and len(state) == len(names)
    expected = f"a {kind.__name__} (or a tuple of its {len(names)} tensors)"
    actual = type(state).__name__ + (f" of {len(state)}" if type(state) in (tuple, list) else "")
    require(plain or isinstance(state, kind), "initial_state", expected, actual)
    B, _, H, K = q.shape
    rows = B if documents is None else documents.count
    dtype = sum_dtype(q.dtype)
    for letter, x in zip(names, state):
        name = f"initial_state.{letter}"
        shape = (rows, H, *op.shape(letter, K, value_dim))
        require(isinstance(x, Tensor), name, "a tensor [B or N, H, rows, columns]", type(x).__name__)
        if tuple(x.shape) != shape:
            what = "" if documents is None else f", a row for each of {rows} documents"
            refuse(name, f"shape {shape}{what}", f"shape {tuple(x.shape)}")
        require(x.dtype == dtype, name, f"{dtype} for {q.dtype} inputs", x.dtype)
        require(x.device == q.device, name, f"q's device {q.device}", x.device)
    return tuple(state)


def warn_of_heads_first(q: Tensor) -> None:
    """Warn, once per process, of inputs that look like ``[B, H, T, K]``: several tokens, but fewer than heads."""
    global _warned_of_heads_first
    if _warned_of_heads_first or torch.compiler.is_compiling() or not 1 < q.shape[1] < q.shape[2]:
        return
    _warned_of_heads_first = True
    warnings.warn(
        f"hla_dist: q has fewer tokens (T = {q.shape[1]}) than heads (H = {q.shape[2]}); inputs are [B, T, H, K]. "
        "Transpose inputs that are [B, H, T, K]. This is said once.",
        stacklevel=4,
    )


def refuse_transforms(name: str, *inputs: Any) -> None:
    """Raise ValueError inside a ``torch.func`` transform, and for tensors that carry forward-mode tangents."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        kind = torch._C._functorch.peek_interpreter_stack().key().name.lower()
        refuse(f"torch.func.{kind}", _INSTEAD.get(kind, "a call outside of it"), f"{name} inside")
    flat = [x for given in inputs for x in (given if isinstance(given, tuple) else (given,))]  # a state is a tuple
    for x in flat:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            refuse("torch.autograd.forward_ad", _INSTEAD["jvp"], f"a dual tensor for {name}")


def no_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
    """The backward of every custom op: reached only by differentiating a gradient, or an op called by itself."""
    raise NotImplementedError(
        "hla_dist: second derivatives are not implemented (a gradient made with create_graph=True was differentiated), "
        "and stages have no derivatives of their own; mask='full' on one device, and hla_dist.reference, have both"
    )
