"""Every entry of the tile table compiled ahead of time for every architecture, and what must hold of the code.

Compiled in a process of its own, which has no use for a GPU even where there is one. Unchanged kernels come from what
is committed, some of which is compiled again; all of it by the test that is marked slow.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are compiled where Triton is installed (Linux)")
from hla_kernels import aot, device, report, tiles, tune  # not before Triton is known to be there
from hla_kernels.device import SUPPORTED, Target
from tests.covering import slow_but

ROOT = Path(__file__).parents[2]
GOOD = report.Row("sm_90", "bfloat16", "first_order", "emit", 128, 128, "64x64 w4 s2", 200, 0, 1024, {}, 0)


def test_every_entry_compiles_within_its_architecture(tmp_path: Path) -> None:
    written = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "hla_kernels.report", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(written.read_text())["kernels"]
    compiled = {
        (row["arch"], row["dtype"], row["K"], row["tile"], "gated" in row["variant"])
        for row in rows
        if row["kernel"] == "first_order"
    }
    for (arch, dtype), entries in tiles.TABLE.items():
        for columns, pair in entries.items():
            for gated, tile in enumerate(pair):
                text = f"{tile.BT}x{tile.BV} w{tile.warps} s{tile.stages}"
                assert (arch, str(dtype).removeprefix("torch."), columns, text, bool(gated)) in compiled
    fused = {(r["arch"], r["K"], r["tile"], "gated" in r["variant"]) for r in rows if r["kernel"] == "fused_forward"}
    for (arch, _, columns), pair in tiles.FUSED.items():
        for gated, tile in enumerate(pair):
            text = tile and f"{tile.BT}x{columns} w{tile.warps} s{tile.stages}"
            assert tile is None or (arch, columns, text, bool(gated)) in fused
    for kernel in ("decode", *(f"channel_{name}" for name in ("scores", "inner", "rows", "columns"))):
        assert {row["arch"] for row in rows if row["kernel"] == kernel} == set(SUPPORTED)
    walks = {(row["variant"].split("+")[0], "gated" in row["variant"]) for row in rows if row["kernel"] == "walk"}
    assert walks == set(itertools.product(("alone", "apart", "adds", "makes b", "makes c"), (False, True)))
    assert all(row["matrix"]["wgmma.mma_async"] for row in rows if row["kernel"] == "walk")
    assert "| sm_90 | bfloat16 | first_order |" in done.stdout


@pytest.mark.parametrize(
    "case",
    [
        report.Case("sm_90", "float32", 128, 128, True),
        pytest.param(report.Case("sm_100", "bfloat16", 64, 64, True), marks=pytest.mark.slow),
        pytest.param(report.Case("gfx942", "bfloat16", 64, 64, False), marks=pytest.mark.slow),
        pytest.param(report.Case("sm_80", "float16", 64, 64, True), marks=pytest.mark.slow),
    ],
    ids=report.case_name,
)
def test_what_is_committed_is_what_compiles(case: report.Case) -> None:
    program = (
        "import json, sys; from hla_kernels import report; print(json.dumps(report.compile_case(report.Case(*{}))[1]))"
    )
    command = [sys.executable, "-c", program.format(tuple(case))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    kept = report.committed()
    for key, found in json.loads(done.stdout).items():
        if key in kept:
            assert aot.Resources(*found) == kept[key]


@pytest.mark.slow
def test_everything_committed_is_what_compiles(tmp_path: Path) -> None:
    kept = report.committed()
    found, _ = report.compile_all(device.SUPPORTED, tmp_path, fresh=True)
    assert {key: got for key, got in found.items() if key in kept} == {key: kept[key] for key in found if key in kept}


def test_a_thread_has_two_columns_where_terms_of_gates_are_summed() -> None:
    """Of one, threads that hold the same sum would differ in its last bit (tiles.py)."""
    for (arch, _), entries in tiles.TABLE.items():
        for pair in entries.values():
            tile, lanes = pair.decayed, 64 if arch == "gfx942" else 32
            assert tile.BT * tile.BV >= 2 * lanes * tile.warps, (arch, tile)


def test_what_breaks_a_rule() -> None:
    wgmma = {"wgmma.mma_async": 8, "mma.sync": 0}
    good = GOOD._replace(matrix=wgmma)
    assert list(report.broken_rules(good)) == []
    limit = aot.SHARED_LIMIT["sm_90"]
    (text,) = report.broken_rules(good._replace(shared=limit + 1))
    assert f"{limit + 1} bytes of shared memory" in text
    for dtype, arch in itertools.product(("bfloat16", "float16", "float32"), ("sm_90", "sm_100")):
        spilling = good._replace(spills=8, dtype=dtype, arch=arch, matrix={**wgmma, "mma.sync": 1})
        allowed = report.LOCAL_SEEN.get((arch, dtype, 128), report.LOCAL)
        assert list(report.broken_rules(spilling._replace(reloads=allowed))) == []
        (text,) = report.broken_rules(spilling._replace(reloads=allowed, restores=1))
        assert f"the main loop reads local memory {allowed} times and writes it 1 times" in text
    most = report.LOCAL_WALKS
    walk = good._replace(kernel="walk", variant="adds+gated", spills=8, reloads=most)
    assert list(report.broken_rules(walk)) == []
    (text,) = report.broken_rules(walk._replace(restores=1))
    assert f"the main loop reads local memory {most} times and writes it 1 times" in text
    (text,) = report.broken_rules(good._replace(early=1))
    assert "1 copies begin into what a matrix instruction may still read" in text
    for tile, variant in (("64x64 w4 s2", "emit"), ("32x32 w4 s2", "emit+inner")):
        slow = good._replace(tile=tile, variant=variant, matrix={"wgmma.mma_async": 0, "mma.sync": 8})
        (text,) = report.broken_rules(slow)
        assert "no wgmma" in text
    assert list(report.broken_rules(slow._replace(K=1, variant="inner+leave"))) == []  # one row is no 64
    (text,) = report.broken_rules(good._replace(narrow=2))
    assert "2 offsets of 32 bits that grow" in text
    none = good._replace(matrix=dict.fromkeys(wgmma, 0))
    assert any("no matrix instructions" in text for text in report.broken_rules(none))
    allowed = report.SPILLS["sm_80", "bfloat16", 128]
    older = good._replace(arch="sm_80", matrix={"mma.sync": 8})
    assert list(report.broken_rules(older._replace(spills=allowed))) == []
    (text,) = report.broken_rules(older._replace(spills=allowed + 8))
    assert f"allowed are {allowed}" in text
    assert list(report.broken_rules(older._replace(K=256, V=256, spills=allowed + 8))) == []  # told, not limited


def test_tuning_wants_a_gpu_and_leaves_the_table_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        without.setattr(sys, "argv", ["tune"])
        assert tune.main() == 2
    assert "no GPU here" in capsys.readouterr().err
    before = dict(tiles.TABLE["sm_90", torch.bfloat16]), dict(tiles.FUSED)
    tried = []

    def results(dtype, rows, gated, target):
        tile = tiles.TABLE["sm_90", dtype][rows][gated]
        tried.append(tile)
        if tile.stages == 3:
            raise RuntimeError("out of shared memory")
        wrong = tile.warps == 8 and tile.BT == 32
        return float(tile.BT), [torch.ones(2) * (2.0 if wrong else 1.0)]

    monkeypatch.setattr(tune, "_results", results)
    found = tune.tune(torch.bfloat16, 128, False, Target("sm_90", 132))
    monkeypatch.setattr(tune, "_fused_results", lambda operator, rows, gated, target: (1.0, [torch.ones(2)]))
    fused = tune.tune_fused("ahla", 64, True, Target("sm_90", 132))
    assert {None, tiles.FUSED["sm_90", "ahla", 64][1]} < {tile for _, tile in fused}
    assert (dict(tiles.TABLE["sm_90", torch.bfloat16]), dict(tiles.FUSED)) == before
    assert len(tried) == 1 + len(tune.candidates(128)) > 10
    assert [ms for ms, _ in found] == sorted(ms for ms, _ in found) and found[0][1].BT == 16
    assert all(tile.stages < 3 and not (tile.warps == 8 and tile.BT == 32) for _, tile in found)


RACED = [("ahla", 64, True), ("ahla", 128, False), ("ahla", 128, True)]


@pytest.mark.parametrize(("operator", "rows", "gated"), slow_but(RACED[:1], RACED))
def test_the_report_sees_tiles_that_race(operator: str, rows: int, gated: bool) -> None:
    """With two stages Triton copies the next chunk's k into what a product of this one still reads; with one not."""
    now = tiles.FUSED["sm_90", operator, rows][gated]
    assert now is not None and now.stages == 1
    program = f"""
from hla_kernels import aot, report, tiles
for stages in (2, 1):
    tile = tiles.FUSED["sm_90", {operator!r}, {rows}][{gated}]._replace(stages=stages)
    tiles.FUSED = {{("sm_90", {operator!r}, {rows}): (tile, tile)}}
    case = report.Case("sm_90", "bfloat16", {rows}, {rows}, {gated})
    launches = [x for x in report._launches(case) if x[0].fn.__name__ == "fused_forward_kernel"]
    print(stages, aot.compile_launch("sm_90", *launches[0]).early)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.split() == ["2", "1", "1", "0"], done.stderr[-4000:]
