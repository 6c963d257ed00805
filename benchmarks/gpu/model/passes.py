"""The launches of ``hla2`` as this project makes them, forward and backward, put through the model.

    python -m benchmarks.gpu.model.passes [--shape B,T,H,K] [--operator hla2] [--gated] [--backward] [--normalize]
        [--key-term]

"channels" is linear_attention with a gate per channel, whatever the other options say. With T = 1 it is decoding:
``--shape 64,1,16,128``.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.model import predict as model
from benchmarks.gpu.timing import PERCENT_OF_COPY
from hla_kernels import channels, device, slices, stages
from hla_kernels.cascade import CASCADES, Problem, with_denominator
from hla_kernels.sequences import Sequence

Shape = tuple[int, int, int, int]
PER_CHANNEL = "channels"
MEMORY_BOUND = ("scan_states", "inner_products", "segment_decay", "gate_gradient", "key_term", "key_term_backward")


def captured(call: Callable[[], object]) -> list[tuple[Any, int, dict, dict]]:
    """Every launch of a call on meta tensors, in order, not run: kernel, grid, arguments, options."""
    launched: list[tuple[Any, int, dict, dict]] = []
    device.replace_launcher(lambda *launch: launched.append(launch))
    try:
        call()
    finally:
        device.replace_launcher(None)
    return launched


def launches_of(call: Callable[[], object], shape: Shape) -> list[model.Launch]:
    """Every launch of a call on meta tensors, in order, not run, as the model takes it."""
    return [launch_of(*launch, shape) for launch in captured(call)]


class Options(NamedTuple):
    """What launches other kernels: ``normalize``, a key term."""

    normalize: bool = False
    keyed: bool = False


PLAIN = Options()


def on_meta(
    shape: Shape, operator: str, gated: bool, options: Options = PLAIN
) -> tuple[Problem, list[Tensor], Tensor, Tensor | None]:
    """A bfloat16 problem of ``shape`` [B, T, H, K], a carry and the gradients of its output and denominator.

    Without memory, and without the denominator's passes, which walks hold apart.
    """
    B, T, H, K = shape
    passes = CASCADES[operator]
    with torch.device("meta"):
        q, k, v, do = (torch.empty(B, T, H, K, dtype=torch.bfloat16) for _ in range(4))
        log = torch.empty(B, T, H) if gated else None
        carry = [torch.empty(B, H, K, K + (options.normalize and p.c != "k")) for p in passes]
        dden = torch.empty(B, T, H) if options.normalize else None
        term = {name: torch.empty(H) for name in ("gain", "skip") if options.keyed}
    target = device.Target("sm_90", 132)
    return Problem(passes, q, k, v, log, 1.0, 0.0, target, operator=operator, **term), carry, do, dden


def launches(
    shape: Shape, gated: bool, backward: bool, operator: str = "hla2", options: Options = PLAIN
) -> list[model.Launch]:
    """Every launch of an operator's forward, or of its backward."""
    if operator == PER_CHANNEL:
        (problem, (carry,), do, _), log = on_meta(shape, "linear_attention", False), torch.empty(shape, device="meta")
        call = channels.Call(problem.q, problem.k, problem.v, log, 1.0, problem.target)
        if backward:
            return launches_of(lambda: channels.scan_backward(call, carry, do, carry), shape)
        return launches_of(lambda: channels.scan(call, carry), shape)
    problem, carry, do, dden = on_meta(shape, operator, gated, options)
    if options.normalize:
        problem = replace(problem, passes=with_denominator(problem.passes), sequences={})
    if backward:
        return launches_of(lambda: slices.sliced_backward(problem, carry, do, carry, gated, dden), shape)
    return launches_of(lambda: stages.scan(problem, carry), shape)


def is_decoding(launched: list[model.Launch]) -> bool:
    """Whether it is a single token, forward."""
    return {x.name for x in launched} == {"decode"}


def percent_of_copy(launched: list[model.Launch], ms: float) -> float:
    """Unique bytes over the time that all of it takes, in percent of the copy bandwidth."""
    return 100 * sum(x.unique_bytes for x in launched) / model.H200.hbm / (1e-3 * ms)


def predicted(launched: list[model.Launch]) -> Iterator[tuple[model.Launch, model.Prediction]]:
    """Each launch with its prediction; equal ones are simulated once."""
    known: dict[tuple, model.Prediction] = {}
    for x in launched:
        key = (x.name, x.compiled.hash, x.grid, x.steps, x.unique_bytes)
        known[key] = known.get(key) or model.predict(x)
        yield x, known[key]


def launch_of(kernel: Any, grid: int, a: dict, options: dict, shape: tuple[int, int, int, int]) -> model.Launch:
    name = kernel.fn.__name__.removesuffix("_kernel")
    heads = a["b"].p.shape[2] if "b" in a else shape[2]
    steps, unique = 0, 0.0
    if name == "first_order":
        steps = min(a["segment_chunks"], -(-a["T"] // a["BT"]))
        reads = {id(a[x].p): a["V" if x == "c" else "K"] for x in "abc" if x != "a" or a["EMIT"]}
        reads |= {id(a["add"].p): a["V"]} if a["ADD"] else {}
        columns = sum(reads.values()) + a["V"] * (a["PAIR"] + a["EMIT"])
        unique = columns * a["b"].p.shape[0] * a["T"] * heads * 2
        flags = [f for f in ("EMIT", "REVERSE", "ADD", "PAIR", "LEAVE", "GATED") if a[f]]
        name = "first_order " + "+".join(flags).lower()
    elif name.startswith("channel_"):
        steps = min(a["segment_chunks"], -(-a["T"] // a["BT"])) if "segments" in a else a["K"] // a["BC"]
        read = {id(x.p): x.p for x in a.values() if isinstance(x, Sequence)}
        unique = sum(x.numel() * x.element_size() for x in read.values())
        name += " " + "+".join(f for f in ("EMIT", "REVERSE", "LEAVE") if a.get(f)).lower()
    elif name == "fused_forward":
        steps = -(-a["T"] // a["BT"])
        unique = 4 * shape[0] * shape[1] * shape[2] * shape[3] * 2
    elif name == "decode":
        steps = -(-a["K"] // a["BR"])
        unique = 2 * 4 * grid * a["K"] * (a["K"] * a["HAS_S"] + a["V"] * (a["HAS_P"] + a["HAS_F"]))
    elif name == "key_term":
        moved = {"product": True, "out": True, "a": a["RIDGE"], "c": a["SKIP"]}
        unique = bytes_of(a, moved)
    elif name == "key_term_backward":
        both = a["SKIP"] and a["SUMS"]
        moved = {"dout": True, "gained": a["GAIN"], "product": a["GAIN"] and a["SUMS"], "dc": both, "c": both}
        unique = bytes_of(a, moved)
    elif name == "scan_states":
        unique = 2 * 4 * a["E"] * a["row_of_heads"] * (a["segments"] + 1)
    elif name == "gate_gradient":
        unique = 4 * (a["slots"] + 1) * a["x"].numel() / max(1, a["slots"])
    elif name == "inner_products":
        unique = 8 * a["left"].numel()
    elif name == "segment_decay":
        unique = 4 * shape[0] * shape[1] * shape[2]
    if name in MEMORY_BOUND:
        steps = model.BYTES_ONLY
    compiled = model.compile_launch(kernel, stand_in(a), options)
    return model.Launch(name, compiled, grid, options["num_warps"], steps, unique)


def bytes_of(arguments: dict, moved: dict[str, bool]) -> float:
    """Of the sequences that are read or written, once each."""
    return sum(arguments[name].p.nbytes for name, is_moved in moved.items() if is_moved)


def stand_in(arguments: dict) -> dict:
    """Meta tensors have no address to specialise on: what allocators give is a multiple of 16."""
    made: dict[int, Any] = {}

    def real(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return made.setdefault(id(x), Pointer(x.dtype))
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*(real(y) for y in x))
        return tuple(real(y) for y in x) if isinstance(x, tuple) else x

    return {name: real(x) for name, x in arguments.items()}


class Pointer:
    """What Triton asks of a tensor when it compiles."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 16


def report(launched: list[model.Launch]) -> float:
    """Print a table; total milliseconds."""
    total = 0.0
    print(model.HEAD, model.RULE, sep="\n")
    for x, p in predicted(launched):
        total += p.ms
        print(model.line(p, x.grid), flush=True)
    return total


def main() -> None:
    parser = model.options((*CASCADES, PER_CHANNEL), ("--normalize", "--key-term"))
    o = parser.parse_args()
    shape, options = o.shape, Options(o.normalize, o.key_term)
    if o.into:
        ways = [launches(shape, o.gated, way, o.operator, options) for way in (False, True)]
        forward, backward = (sum(p.ms for _, p in predicted(launched)) for launched in ways)
        decoding = {PERCENT_OF_COPY: percent_of_copy(ways[0], forward)} if is_decoding(ways[0]) else {}
        model.write_into(o.into, forward, backward, **decoding)
        return
    launched = launches(shape, o.gated, o.backward, o.operator, options)
    total = report(launched)
    B, T, H, K = shape
    if is_decoding(launched):
        moved, percent = sum(x.unique_bytes for x in launched) / 1e6, percent_of_copy(launched, total)
        print(f"predicted: total {total:.3f} ms; {moved:.0f} MB of states, {percent:.0f} {PERCENT_OF_COPY}")
        return
    work = len(CASCADES.get(o.operator, (0,))) * (2 * 64 * K + 4 * K * K) * B * T * H * (3 if o.backward else 1)
    print(
        f"predicted: total {total:.3f} ms; counted operations at {work / total / 1e9:.0f} TFLOP/s, "
        f"{100 * work / total / 1e-3 / model.H200.matrix:.0f} % of the measured matrix rate"
    )


if __name__ == "__main__":
    main()
