"""Published times that the simulator is held against, and the network and layer that its projections assume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulator.network import Link, Network
from benchmarks.simulator.schedules import EXCHANGES, Wire, wire_of
from benchmarks.simulator.simulate import HEADER, Layer, efficiency, simulate, step

# ZeCO (arXiv 2507.01004): ranks, exchange, milliseconds
ZECO = ((8, "all_gather", 0.375), (256, "all_gather", 8.514), (8, "ring", 0.226), (256, "ring", 2.165))
_NOMINAL = 1 << 20  # bytes of a state: only s * beta can be fitted

INSIDE, ACROSS, NODE = Link(3e-6, 1 / 300e9), Link(8e-6, 1 / 50e9), 8
HEADS, K, TOKENS = 16, 128, 16384
COMBINE = 10e-6  # S C of 16 heads is 67 MFLOP: launches and memory traffic decide
RATE = 400e12  # FLOP a second that a bf16 layer is assumed to reach
# forward: 197 kFLOP a token and head (K = 128, chunk 64) and half as much again for a sharded pass; backward 2.5 times
_OPERATOR = 1.5 * 197e3 * HEADS * TOKENS / RATE
# projections and feed-forward of a layer of width H K: 12 width^2 weights, two FLOP each, backward twice
_DENSE = 2 * 12 * (HEADS * K) ** 2 * TOKENS / RATE
LAYERS = {
    "the operator alone": Layer(_OPERATOR, 2.5 * _OPERATOR, 0.0),
    "a whole layer": Layer(_OPERATOR + _DENSE, 2.5 * _OPERATOR + 2 * _DENSE, 0.0),
}
WORLDS = tuple(2**i for i in range(3, 13))


def fit_zeco(launch: bool) -> dict[str, Any]:
    """alpha, s beta, blocks, and with ``launch`` a constant a call: least squares of relative errors, none negative.

    The residuals are those of the simulator with the fitted values, not of the formulas that the fit uses.
    """
    times = np.array([ms for *_, ms in ZECO])
    best: tuple[float, np.ndarray, int] | None = None
    for blocks in range(1, 65):
        rows = []
        for ranks, exchange, _ in ZECO:
            k = min(blocks, ranks)
            hops, part = (ranks - 1, 1.0) if exchange == "all_gather" else (ranks - 2 + k, 1 / k)
            rows.append([hops, hops * part, 1.0])
        a = np.array(rows) / times[:, None]
        free = range(3 if launch else 2)
        for chosen in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(1, len(free) + 1)):
            x = np.zeros(3)
            x[list(chosen)] = np.linalg.lstsq(a[:, chosen], np.ones(len(ZECO)), rcond=None)[0]
            error = float(np.square(a @ x - 1).sum())
            if x.min() >= 0 and (best is None or error < best[0]):
                best = (error, x, blocks)
    assert best is not None
    (alpha, sbeta, constant), blocks = (best[1] * 1e-3).tolist(), best[2]
    link = Link(alpha, sbeta / _NOMINAL)
    wire = Wire(blocks, _NOMINAL // blocks, _NOMINAL // blocks)
    got = [1e3 * (constant + simulate(e, wire, Network(ranks, 1, link, link)).seconds) for ranks, e, _ in ZECO]
    return {
        "alpha_us": alpha * 1e6,
        "s_beta_us": sbeta * 1e6,
        "blocks": blocks,
        "launch_us": constant * 1e6,
        "simulated_ms": got,
        "residuals": [g / ms - 1 for g, (*_, ms) in zip(got, ZECO)],
    }


def project(worlds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every exchange in every world: seconds each way, bytes a rank, and efficiency by layer, overlapped or not.

    Overlapped: summaries travel behind the operator's own work on its shard.
    """
    rows = []
    wires = wire_of("hla2", HEADS, K, K, combine=COMBINE, header=HEADER)
    for ranks in worlds:
        network = Network(ranks, min(NODE, ranks), INSIDE, ACROSS)
        for exchange in EXCHANGES:
            outcomes = step(exchange, wires, network)
            row: dict[str, Any] = {"ranks": ranks, "exchange": exchange}
            row |= {"forward_s": outcomes[0].seconds, "backward_s": outcomes[1].seconds}
            row |= {"bytes": sum(x.bytes for x in outcomes), "messages": sum(x.messages for x in outcomes)}
            for name, layer in LAYERS.items():
                row[name] = efficiency(outcomes, layer)
                behind = (_OPERATOR, 2.5 * _OPERATOR)
                left = tuple(x._replace(exposed=max(0.0, x.seconds - b)) for x, b in zip(outcomes, behind))
                row[f"{name}, overlapped"] = efficiency((left[0], left[1]), layer)
            rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Weak-scaling efficiency over ranks, one panel a layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(LAYERS), figsize=(11, 4.2), sharey=True)
    for panel, (name, layer) in zip(panels, LAYERS.items()):
        for number, exchange in enumerate(EXCHANGES):
            mine = [row for row in rows if row["exchange"] == exchange]
            ranks = [row["ranks"] for row in mine]
            panel.plot(ranks, [row[name] for row in mine], "o-", color=f"C{number}", label=exchange, markersize=3)
            panel.plot(ranks, [row[f"{name}, overlapped"] for row in mine], "--", color=f"C{number}", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [str(r) for r in ranks], rotation=45)
        panel.set_title(f"{name}: {layer.forward * 1e3:.2f} + {layer.backward * 1e3:.2f} ms", fontsize=10)
        panel.set_xlabel(f"ranks, {TOKENS} tokens each")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.02)
    panels[0].set_ylabel("weak-scaling efficiency")
    panels[1].legend(loc="lower left", fontsize=8, title="dashed: behind the operator's local work", title_fontsize=7)
    figure.suptitle(
        f"PROJECTION, simulated, not measured: hla2, H = {HEADS}, K = V = {K}, nodes of {NODE}, "
        f"{INSIDE.alpha * 1e6:g} us and 300 GB/s inside, {ACROSS.alpha * 1e6:g} us and 50 GB/s across",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
