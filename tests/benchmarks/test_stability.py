"""benchmarks/stability.py at a tiny size: every part runs, and what must be equal is."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks need the train extra")
pytest.importorskip("matplotlib", reason="the benchmarks need the train extra")
from benchmarks import stability
from benchmarks.evidence import tasks
from hla_dist.models import LanguageModel, ModelConfig
from tests.harness import assert_close, shifted
from tests.tolerances import FLOAT32

PIECE = 32
TEXT = torch.randint(256, (400,), generator=torch.Generator().manual_seed(shifted(0)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "TRAINED", PIECE)
    monkeypatch.setattr(stability, "OPERATORS", ("hla2",))
    library = argparse.Namespace(train=TEXT.numpy(), held_out=TEXT.numpy())
    monkeypatch.setattr(tasks, "corpus", lambda data="": library)


def test_every_part_is_in_the_report_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(models=1, steps=1, hidden=32, reused=64)
    normed = stability.norms([16, 64], 1, 4)
    lost, reuses = stability.loss(args, [32, 64, 96])
    recalled = stability.recall(1, [16, 64])
    text = "\n".join(stability.tables(normed, lost, reuses, recalled))
    for name in (*stability.NORMS, stability.MODELS[0], *stability.RECALLING):
        assert f"| {name} |" in text
    assert [r["T"] for r in lost if r["model"] == stability.MODELS[0]] == [
        32,
        64,
        96,
        32,
        64,
    ]  # bf16 up to a kept state
    assert lost[0]["bits"] == pytest.approx(lost[0]["anew"], rel=FLOAT32)
    assert all(r["difference"] < FLOAT32 for r in reuses)
    assert all(target.met for target in stability.judge(normed, lost, reuses) if "bits" not in target.name)
    (tmp_path / "stability.json").write_text(json.dumps({"norms": normed, "loss": lost, "recall": recalled}))
    monkeypatch.setattr(sys, "argv", ["stability.py", "--plots", "--out", str(tmp_path)])
    assert stability.main() == 0
    for name in ("stability", "stability_norms"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_a_stream_is_the_whole_text() -> None:
    """In pieces, from a state at a position of its own, as by one call; anew, every piece is read by itself."""
    torch.manual_seed(shifted(0))
    config = ModelConfig(vocab_size=256, hidden_size=16, num_layers=2, num_heads=1, attention={"rope_theta": 100.0})
    model, text = LanguageModel(config), TEXT[:129]
    with torch.no_grad():
        chances = model(text[None, :-1])[0].log_softmax(-1)
    want = -chances.gather(1, text[1:, None])[:, 0] / math.log(2)
    head, state = stability.stream(model, text[:51])
    tail, _ = stability.stream(model, text[50:], state, 50)
    assert_close("bits", torch.cat([head, tail]), want, FLOAT32)
    pieces = [stability.stream(model, text[start : start + PIECE + 1])[0] for start in range(0, 128, PIECE)]
    assert_close("anew", stability.anew(model, text), torch.cat(pieces), FLOAT32)
