"""What the GPU suite writes: targets met or missed, tables as Markdown, everything as JSON, plots."""

import itertools
import math
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu.contenders import PASSES, WALKS, Shape
from benchmarks.gpu.predictions import prediction
from benchmarks.gpu.timing import DECODED, DIFFERENCE, PERCENT_OF_COPY
from benchmarks.program import pyplot
from benchmarks.report import Target, table
from hla_kernels.walks import OPERATORS

NAN = float("nan")
JUDGED_AT = 128  # columns at which walks are to be faster than passes
WAYS = ("forward", "forward + backward")


def _find(rows: list[dict], operator: str, what: str, contender: str, shape: Shape) -> float:
    wanted = (operator, what, contender, str(shape))
    for row in rows:
        if (row["operator"], row["what"], row["contender"], row["shape"]) == wanted:
            return row["ms"]
    return NAN


def targets(results: dict[str, Any], shapes: tuple[Shape, ...]) -> list[Target]:
    """The figures this suite is run for; what was not measured is NaN and a miss."""
    rows, out = results["rows"], []
    for operator, shape in [(o, s) for o in PASSES for s in shapes]:
        for gated in ("", "gated, "):
            peer = f"fla {gated.rstrip(', ')}".rstrip() + f", {len(PASSES[operator])} calls"
            own = f"{operator}, gated" if gated else operator
            for what, bound in (("forward", 3.0), ("forward + backward", 2.5)):
                against, ms = peer, _find(rows, operator, what, peer, shape)
                if gated and what != "forward" and math.isnan(ms):
                    # with gates fla's backward refuses some Tritons on Hopper: its time without them is a lower bound
                    against = peer.replace(" gated", "") + " without gates"
                    ms = _find(rows, operator, what, peer.replace(" gated", ""), shape)
                ratio = ms / _find(rows, operator, what, own, shape)
                out.append(Target(f"{own} against {against}, {what}, {shape}: times as fast", ratio, bound, True))
    for shape in shapes:
        for what, bound in (("forward", 50.0), ("forward + backward", 40.0)):
            one = _find(rows, "hla2", what, "fla, one first-order call", shape)
            ratio = _find(rows, "hla2", what, "hla2", shape) / one
            out.append(Target(f"aim: hla2's time over one first-order call of fla, {what}, {shape}", ratio, 1.0, False))
            if shape.K == 128:
                own = [r for r in rows if r["contender"] == "hla2" and (r["what"], r["shape"]) == (what, str(shape))]
                rate = own[0]["percent_of_matrix_rate"] if own else NAN
                out.append(Target(f"hla2 {what}, {shape}: % of the matrix rate", rate, bound, True))
    longest = {row["contender"]: row["ms"] for row in results["lengths"] if row["T"] == 32768}
    ratio = longest.get("softmax (SDPA)", NAN) / longest.get("hla2", NAN)
    out.append(Target("FlashAttention's time over hla2's at T = 32768, forward", ratio, 25.0, True))
    out.append(Target("one head, 1M tokens: % of a full device's throughput", results["one_head"], 60.0, True))
    for shape in shapes:
        name = f"peak memory beyond inputs, outputs and gradients, over their sum, {shape}"
        out.append(Target(name, results["memory"].get(str(shape), NAN), 0.25, False))
    out.append(Target("decoding: % of copy bandwidth", max(results["decoding"].values(), default=NAN), 60.0, True))
    return out


def wrong(results: dict[str, Any]) -> list[str]:
    """Checks that failed, none at all, and outputs that differ from a peer's."""
    lines = [
        f"{c['case']} {c['tensor']} {c['error']:.2e} > {c['allowed']:.2e} {c['failure']}"
        for c in results["checks"]
        if not c["good"]
    ]
    if not results["checks"]:
        lines.append("no check has run")
    lines += [f"{name}: not run, out of time" for name in results["unchecked"]]
    lines += [f"CRASHED {text}" for text in results["crashed"]]
    for r in results["rows"]:
        if not r.get("difference", 0.0) <= DIFFERENCE and r["what"] == "forward":
            lines.append(f"{r['operator']}, {r['shape']}: {r['difference']:.2e} from {r['contender']}")
    return lines


def verdict(results: dict[str, Any]) -> str:
    """What the walks came to beside the passes, and the one line that makes them the default if they are to be.

    They are to be if every check of a walk has run and is right, no walk has failed elsewhere, and every operator was
    timed at K = V = 128, both ways, and is faster there. Walks that are slower at other shapes are named.
    """
    checked = [c for c in results["checks"] if c["case"].endswith(WALKS)]
    times = {(r["contender"], _place(r)): r["ms"] for r in results["rows"]}
    walked = [r for r in results["rows"] if WALKS in r["contender"]]
    if not checked and not walked:
        return ""
    ratios = [times.get((r["contender"].replace(WALKS, ""), _place(r)), NAN) / r["ms"] for r in walked]
    wide = [ratio for r, ratio in zip(walked, ratios) if r["K"] == JUDGED_AT]
    right, cases = sum(c["good"] for c in checked), results["walk_checks"]
    text = f"Walks: {right} of {cases} cases right, "
    text += f"{min(wide):.2f} to {max(wide):.2f} times as fast as passes" if wide else "none timed"
    text += f" at K = V = {JUDGED_AT}"
    slower = [
        f"{r['contender']}, {r['shape']}, {r['what']}: {ratio:.2f} times as fast"
        for r, ratio in zip(walked, ratios)
        if not ratio > 1
    ]
    failed = [line for line in wrong(results) + results["left_out"] if WALKS in line]
    timed = {(r["operator"], r["what"]) for r in walked if r["K"] == JUDGED_AT}
    missing = [f"{o}, {what}" for o, what in itertools.product(OPERATORS, WAYS) if (o, what) not in timed]
    if right == cases > 0 and not failed and not missing and all(ratio > 1 for ratio in wide):
        text += ". To make them the default, in kernels/walks.py: BY_DEFAULT = True"
        return text + ("" if not slower else f" (slower than passes: {'; '.join(slower)})")
    why = [f"Slower than passes: {'; '.join(slower)}"] if slower else []
    why += [f"Not timed at K = V = {JUDGED_AT}: {'; '.join(missing)}"] if missing else []
    why += [f"Wrong, crashed, unchecked or left out: {len(failed)}"] if failed else []
    return ". ".join([text, "They stay by name only", *why])


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operator"], row["shape"], row["what"]


def plot(results: dict[str, Any], out: Path) -> list[str]:
    """Time and percent of the bound against T."""
    plt = pyplot()  # only here: everything else is written without it

    names = []
    for key, label in (("ms", "milliseconds, forward"), ("percent_of_bound", "percent of the bound, forward")):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for name in dict.fromkeys(row["contender"] for row in results["lengths"]):
            points = [(row["T"], row[key]) for row in results["lengths"] if row["contender"] == name]
            axes.loglog(*zip(*points), marker="o", label=name)
        axes.set(xlabel="tokens, 16 heads of 128", ylabel=label)
        axes.grid(alpha=0.3)
        if results["lengths"]:
            axes.legend()
        names.append(f"gpu_suite_{key}.png")
        figure.savefig(out / names[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return names


def write(results: dict[str, Any], about: dict[str, Any], goals: list[Target], out: Path) -> None:
    """gpu_suite.json, gpu_suite_*.png and gpu_suite.md; what cannot be drawn is named."""
    try:
        images = plot(results, out)
    except Exception as error:
        images = []
        results["left_out"].append(f"plots: {type(error).__name__}: {error}")
    good = sum(c["good"] for c in results["checks"])
    checks = [
        [c["case"], c["tensor"], f"{c['error']:.2e}", f"{c['allowed']:.2e}"]
        + ["" if c["good"] else f"FAIL {c['failure']}".replace("\n", " ").replace("|", "/")]
        for c in results["checks"]
    ]
    rows = [
        [r["operator"], r["shape"], r["what"], r["contender"], f"{r['ms']:.3f}"]
        + [prediction(results, r["contender"], r["shape"], r["what"])]
        + [f"{r['percent_of_bound']:.0f}"]
        + [f"{r['percent_of_matrix_rate']:.0f}", f"{r['difference']:.1e}" if "difference" in r else ""]
        for r in results["rows"]
    ]
    decoding = dict(results["decoding"])
    if percent := prediction(results, "hla2", DECODED, PERCENT_OF_COPY):
        decoding[f"predicted, {PERCENT_OF_COPY}"] = float(percent)
    header = ["operator", "shape", "what", "contender", "ms", "predicted ms"]
    header += ["% of bound", "% of matrix rate", "difference"]
    lengths = [
        [str(r["T"]), r["contender"], f"{r['ms']:.3f}"]
        + [prediction(results, r["contender"], Shape(1, r["T"], 16, 128), "forward"), f"{r['percent_of_bound']:.0f}"]
        for r in results["lengths"]
    ]
    parts = [
        "\n".join(
            [f"- CRASHED {text}" for text in results["crashed"]]
            + [f"- not checked, out of time: {name}" for name in results["unchecked"]]
            + [f"- FAILED or left out: {text}" for text in results["left_out"]]
        )
        or "Nothing was left out.",
        verdict(results),
        f"## Correctness: {good} of {len(results['checks'])} cases within their bound",
        table(["case", "tensor", "error", "allowed", ""], checks),
        "## Times",
        "The device's own, launches queued ahead. The bound: the larger of operations over the matrix rate and bytes "
        "over the copy bandwidth, both as measured. Operations: 2 * 64 K + 4 K^2 a token, head and pass forward, three "
        "times that backward, whatever is computed again. Difference: of a peer's output from this library's. "
        f"Predicted, {len(results.get('predicted', {}))} cases: by the static model, whose processes end with this "
        "run; it has no softmax attention and no torch.",
        table(header, rows),
        table(["T", "contender, forward", "ms", "predicted ms", "% of bound"], lengths),
        "\n".join(f"- decoding, {name}: {value:.1f}" for name, value in decoding.items()),
        "\n".join(
            f"- peak memory beyond, over the sum, {name}: {value:.3f}" for name, value in results["memory"].items()
        ),
        "\n".join(f"- a carry that comes late, {name}: {ms:.3f} ms" for name, ms in results["schedules"].items()),
        "\n".join(f"- compute-sanitizer: {text}" for text in results.get("watched", ())),
        table(
            ["the static model's rates", "measured", "in the model"],
            [[name, *(f"{x:.4g}" for x in pair)] for name, pair in results.get("fit", {}).items()],
        )
        if results.get("fit")
        else "",
        "\n".join(f"![]({name})" for name in images),
    ]
    report.write("gpu_suite", out, "The kernels on this GPU", about, goals, [part for part in parts if part], results)
