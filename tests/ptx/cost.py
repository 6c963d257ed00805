"""``python -m tests.ptx.cost``: what hla2's kernels execute for a token and head, and what that cannot be faster than.

For every kind of launch of a forward and a backward: cycles of one SM that each resource takes for one token of one
head, counted from the emulated PTX, the greatest of them, and what the whole device makes of it in nanoseconds. A
model: see count.py. Latency is not in it: a walk that waits is slower.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch

import hla_dist
from tests.harness import shifted
from tests.ptx.backend import triton_backend
from tests.ptx.count import GHZ, SMS
from tests.ptx.run import Launch

SHOWN = ("issue", "tensor", "shared", "special", "convert", "integer", "float", "shuffle", "L2", "memory")
PARTS = ("conflicts", "wgmma")  # of shared: wavefronts that conflicts add, and operands of wgmma


def variant(arguments: dict[str, Any]) -> str:
    """What a launch was asked to do."""
    names = [n.lower() for n, value in arguments.items() if n.isupper() and value is True]
    return "+".join(names) or "plain"


def measured(K: int, arch: str, gated: bool, T: int, fused: bool) -> tuple[list[Launch], list[Launch]]:
    """Launches of hla2 forward and backward for two heads of one segment each, bf16."""
    torch.manual_seed(shifted(0))
    leaves = [torch.randn(1, T, 2, K).bfloat16().requires_grad_() for _ in range(3)]
    log_decay = (-0.1 * torch.rand(1, T, 2)).requires_grad_() if gated else None
    with triton_backend(arch, fused=fused) as emulator:
        out, _ = hla_dist.hla2(*leaves, log_decay=log_decay, scale=0.3 / K, backend="triton")
        forward = list(emulator.launches)
        out.float().sum().backward()
        return forward, emulator.launches[len(forward) :]


def rows(launches: list[Launch], tokens: int) -> list[str]:
    """A line for each kind of launch, and one for all together."""
    kinds: dict[str, tuple[int, Counter[str]]] = {}
    for launch in launches:
        arguments = launch.arguments
        size = f" {arguments['K']}x{arguments['V']}" if "V" in arguments else ""
        tile = f", tile {arguments['BT']}x{arguments['BV']}" if "BV" in arguments else ""
        name = f"{launch.name.removesuffix('_kernel')} {variant(arguments)}{size}{tile}"
        count, cycles = kinds.get(name, (0, Counter[str]()))
        cycles.update({k: v / tokens for k, v in (launch.meter.cycles() | launch.meter.shared_parts()).items()})
        kinds[name] = (count + 1, cycles)
    lines, total, bound = [], Counter[str](), 0.0
    for name, (count, cycles) in kinds.items():
        least = max(cycles[k] for k in SHOWN)
        lines.append(_row(f"{name}, {count} launches" if count > 1 else name, cycles, least))
        total.update(cycles)
        bound += least
    return [*lines, _row("all", total, bound)]


def _row(name: str, cycles: Counter[str], bound: float) -> str:
    first, second = sorted(SHOWN, key=lambda k: -cycles[k])[:2]
    each = " | ".join(f"{cycles[k]:.1f}" for k in (*SHOWN, *PARTS))
    return f"| {name} | {each} | {first}, {second} | {bound:.1f} | {bound / GHZ / SMS:.3f} |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", choices=("sm_80", "sm_90"))
    parser.add_argument("--columns", type=int, nargs="+", default=[64, 128], help="K = V")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--pass-by-pass", action="store_true")
    options = parser.parse_args()
    for K in options.columns:
        both = measured(K, options.arch, options.gated, options.tokens, not options.pass_by_pass)
        for way, launches in zip(("forward", "backward"), both):
            print(f"\nhla2 {way}, bf16, K = V = {K}, {options.arch}, {'gates' if options.gated else 'no gates'}:\n")
            print(f"| launch | {' | '.join((*SHOWN, *PARTS))} | limits | cycles | ns on {SMS} SMs |")
            print("|---" * (len(SHOWN) + len(PARTS) + 4) + "|")
            print(*rows(launches, 2 * options.tokens), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
