"""Errors against float64, from a thousand tokens to a million: every operator, with and without decay.

    python benchmarks/numerics.py                about five minutes; reports in benchmarks/results/ and docs/
    python benchmarks/numerics.py --quick        a smoke run of seconds; report in out/benchmarks/
    python benchmarks/numerics.py --check        exit code 1 if a target is missed

B = 1, K = V = 32; q and k of length 1 (as HLAAttention makes them), v and the output's gradient normal, gates per token
with memories of about 32 tokens and more, or none. Inputs are rounded to the dtype measured, then both it and float64
compute from them; an error is the 2-norm of the difference over that of the truth, tensor by tensor. Up to 4096 tokens
plain torch computes the same in bf16, as masked T x T matrices.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hla_dist
from benchmarks import report
from benchmarks.program import begin, pyplot, save_figure
from hla_dist.operators import NAMED
from hla_dist.reference import quadratic

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
DECAYS = ("no decay", "decay")
LENGTHS = [1024 * 4**i for i in range(6)]
PLAIN = 4096  # the longest for T x T matrices
DOCS = report.ROOT / "docs" / "numerics.md"

Key = tuple[str, str, str, int]  # operator, decay, dtype, T
Errors = dict[str, float]


def draw(T: int, heads: int, size: int, decay: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs and the output's gradient in float64, rounded to ``dtype``; gates to float32, which they stay in."""
    generator = torch.Generator().manual_seed(0)
    x = {n: torch.randn(1, T, heads, size, generator=generator, dtype=torch.float64) for n in ("q", "k", "v", "dout")}
    x |= {n: F.normalize(x[n], dim=-1) for n in ("q", "k")}
    x = {n: t.to(dtype).double() for n, t in x.items()}
    if decay == "decay":  # memories of 32, 64, ... tokens, shaken from token to token
        slow = torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64) % 8)))
        shake = 2 * torch.rand(1, T, heads, generator=generator, dtype=torch.float64)
        x["log_decay"] = (slow * shake).float().double()
    return x


def run(operator, x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of ``operator`` in ``dtype``."""
    narrow = {n: t.to(dtype) for n, t in x.items() if n != "log_decay"}
    dout = narrow.pop("dout")
    if "log_decay" in x:
        narrow["log_decay"] = x["log_decay"].to(dtype if dtype == torch.float64 else torch.float32)
    leaves = {n: t.requires_grad_() for n, t in narrow.items()}
    gates = {"log_decay": leaves["log_decay"]} if "log_decay" in leaves else {}
    out = operator(leaves["q"], leaves["k"], leaves["v"], **gates)[0]
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients)}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> Errors:
    return {n: float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want}


def measure(args: argparse.Namespace, lengths: list[int]) -> tuple[dict[Key, Errors], dict[Key, Errors]]:
    """Errors of the library, and of plain torch in bf16 up to ``PLAIN`` tokens."""
    library, plain = {}, {}
    cases = [(o, d, n, t) for t in lengths for o in NAMED for d in DECAYS for n in DTYPES]
    for key in tqdm(cases, desc="numerics", leave=False):
        name, decay, kind, T = key
        x = draw(T, args.heads, args.size, decay, DTYPES[kind])
        want = run(getattr(hla_dist, name), x, torch.float64)
        library[key] = errors(run(getattr(hla_dist, name), x, DTYPES[kind]), want)
        if T <= PLAIN and kind == "bf16":

            def matrices(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor):
                return quadratic(name, q, k, v, **gates)  # noqa: B023  (called at once)

            plain[key] = errors(run(matrices, x, DTYPES[kind]), want)
    return library, plain


def judge(library: dict[Key, Errors], plain: dict[Key, Errors]) -> list[report.Target]:
    targets = []
    short = [key for key in library if key[3] <= PLAIN and key[2] == "float32"]
    worst = max(e for key in short for n, e in library[key].items() if n != "dlog_decay")
    targets.append(report.Target(f"float32, largest error up to T = {PLAIN}", worst, 1e-5, False))
    worst = max((library[key].get("dlog_decay", 0.0) for key in short), default=0.0)
    targets.append(report.Target(f"float32, d log_decay up to T = {PLAIN}", worst, 3e-5, False))
    ratios = [library[key][n] / e for key, by in plain.items() if key[2] == "bf16" for n, e in by.items()]
    targets.append(report.Target(f"bf16 over plain torch's bf16, largest up to T = {PLAIN}", max(ratios), 2.0, False))
    return targets


def tables(library: dict[Key, Errors], plain: dict[Key, Errors], lengths: list[int]) -> list[str]:
    """A table per dtype: output error, and the largest of the gradients'."""

    def cell(values: Errors | None) -> str:
        if values is None:
            return ""
        gradients = max(e for n, e in values.items() if n not in ("out", "dlog_decay"))
        gate = f", {values['dlog_decay']:.0e}" if "dlog_decay" in values else ""
        return f"{values['out']:.0e}, {gradients:.0e}{gate}"

    parts = []
    longest = max(t for t in lengths if t <= PLAIN)
    for kind in DTYPES:
        rows = []
        for name in NAMED:
            for decay in DECAYS:
                cells = [cell(library[name, decay, kind, t]) for t in lengths]
                if kind == "bf16":
                    cells.append(cell(plain.get((name, decay, kind, longest))))
                rows.append([f"`{name}`, {decay}", *cells])
        header = ["", *(f"T = {t}" for t in lengths)] + ([f"plain torch, T = {longest}"] if kind == "bf16" else [])
        parts += [f"### {kind}", report.table(header, rows)]
    return parts


def plot(path: Path, library: dict[Key, Errors], plain: dict[Key, Errors], lengths: list[int]) -> None:
    """Output error against T, one panel per dtype."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.2))
    for axis, kind in zip(axes, DTYPES):
        for i, name in enumerate(NAMED):
            for decay, style in zip(DECAYS, ("-", "--")):
                values = [library[name, decay, kind, t]["out"] for t in lengths]
                axis.loglog(lengths, values, style, color=f"C{i}", marker="o", markersize=3, label=f"{name}, {decay}")
        limits = (1e-8, 1e-5) if kind == "float32" else (1e-4, 1e-2)
        axis.set(title=f"{kind}: error of the output", xlabel="tokens", xticks=lengths, ylim=limits)
        axis.set_xticklabels([f"{t // 1024}K" for t in lengths])
        axis.minorticks_off()
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


def main() -> int:
    args = begin(
        __doc__,
        "1024 tokens, one head, K = V = 8",
        {"longest": 1, "heads": 1, "size": 8},
        longest=(1024, "longest sequence in 1024 tokens"),
        heads=(1, "heads"),
        size=(32, "head size of keys and values"),
    )
    lengths = [t for t in LENGTHS if t <= args.longest * 1024]
    library, plain = measure(args, lengths)
    targets = judge(library, plain)
    what = (
        f"B = 1, H = {args.heads}, K = V = {args.size}. In a cell: error of the output, the largest of dq, dk and dv, "
        "and, with decay, that of d log_decay; 2-norms of differences to float64 over those of the truth."
    )
    body = tables(library, plain, lengths)
    plot(args.out / "numerics.png", library, plain, lengths)
    if args.out == report.RESULTS:
        about = args.about
        run_on = f"`{about['command']}`, {about['started']}, commit {about['commit']}, torch {about['torch']}, "
        text = "\n\n".join([what, *body, run_on + f"{about['hardware']}."])
        page = DOCS.read_text()
        page = re.sub(
            r"(<!-- table -->\n).*(\n<!-- end of table -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page, flags=re.S
        )
        DOCS.write_text(page)
    keys = ("operator", "decay", "dtype", "T")
    sides = {"errors": library, "plain_torch": plain}
    data = {name: [dict(zip(keys, key), **by) for key, by in side.items()] for name, side in sides.items()}
    return report.finish(args, "Errors against float64", targets, [what, *body], data)


if __name__ == "__main__":
    sys.exit(main())
