"""Small and odd shapes of every kernel, for compute-sanitizer to watch: ``compute-sanitizer python THIS``.

The suite starts it under memcheck, racecheck and initcheck, each in a process of its own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck")
SECONDS = 50.0
OPERATORS = ("linear_attention", "hla2", "ahla", "hla3")


def watched(tool: str) -> str:
    """What compute-sanitizer says, its last line; RuntimeError where it finds something or is not there."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise RuntimeError("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "3", sys.executable, "-m", "benchmarks.gpu.sanitized"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise RuntimeError(f"{last} {done.stderr[-200:]}")
    return last


def main() -> None:
    """Forward and backward of shapes whose tokens, rows and columns fill no tile."""
    import torch

    import hla_dist

    for K, V, T, gated in ((64, 64, 130, True), (128, 128, 70, False), (128, 128, 70, True), (20, 33, 65, True)):
        for operator, keyed in (*((o, False) for o in OPERATORS), ("hla2", True), ("hla3", True)):
            sizes = ((2, K), (1, K), (1, V))
            leaves = [torch.randn(2, T, *size, device="cuda", dtype=torch.bfloat16).requires_grad_() for size in sizes]
            options = {"log_decay": -torch.rand(2, T, 2, device="cuda")} if gated else {}
            if keyed:
                options |= {name: torch.rand(2, device="cuda").requires_grad_() for name in ("gain", "skip")}
            out, state = getattr(hla_dist, operator)(
                *leaves, scale=0.3 / K, backend="triton", output_final_state=True, **options
            )
            term = [options[name] for name in ("gain", "skip") if keyed]
            torch.autograd.grad(out.float().sum() + sum(x.sum() for x in state), leaves + term)
            with torch.no_grad():
                one, more = [x[:, :1] for x in leaves], dict(zip(("gain", "skip"), term))
                getattr(hla_dist, operator)(*one, initial_state=state, backend="triton", **more)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
