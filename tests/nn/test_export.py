"""torch.export: one program for every length, stored, loaded by another process, with and without a state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hla_dist.models import LanguageModel, ModelConfig
from tests.harness import assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64

LONGEST, LENGTHS = 1024, (1, 2, 63, 64, 65, 513, 1024)
LOAD_AND_RUN = """
import sys, torch, hla_dist
whole, goes_on = (torch.export.load(f"{sys.argv[1]}/{name}.pt2").module() for name in ("whole", "goes_on"))
given = torch.load(f"{sys.argv[1]}/given.pt")
state = [getattr(hla_dist, name)(*fields) for name, fields in given["state"]]
results = []
for length in given["lengths"]:
    ids, positions = given["ids"][:, :length].clone(), torch.arange(7, 7 + length).repeat(2, 1)
    logits, after = goes_on(ids, positions, state)
    results.append((whole(ids), logits, [list(fields) for fields in after]))
torch.save(results, f"{sys.argv[1]}/results.pt")
"""


class GoesOn(nn.Module):
    """The model as a function of positional arguments, with a state in and out."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, state: list[Any]) -> Any:
        return self.model(tokens, state, positions=positions, return_state=True)


@torch.no_grad()
@pytest.mark.slow
def test_one_exported_program_serves_every_length_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(shifted(0))
    config = ModelConfig(
        vocab_size=40, hidden_size=16, num_layers=4, num_heads=2, pattern="hla2,ahla,hla3,linear_attention",
        attention={"rope_theta": 1e4},
    )  # fmt: skip
    model, ids = LanguageModel(config).double().eval(), torch.randint(40, (2, LONGEST))
    _, state = model(ids[:, :7], return_state=True)
    length = torch.export.Dim("T", max=LONGEST)
    example, positions = ids[:, :100].clone(), torch.arange(100).repeat(2, 1)
    whole = torch.export.export(model, (example,), dynamic_shapes={"tokens": {1: length}}, strict=False)
    shapes = {"tokens": {1: length}, "positions": {1: length}, "state": pytree.tree_map(lambda _: None, state)}
    goes_on = torch.export.export(GoesOn(model), (example, positions, state), dynamic_shapes=shapes, strict=False)
    torch.export.save(whole, tmp_path / "whole.pt2")
    torch.export.save(goes_on, tmp_path / "goes_on.pt2")
    fields = [(type(layer).__name__, list(layer)) for layer in state]
    torch.save({"ids": ids, "state": fields, "lengths": LENGTHS}, tmp_path / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for length, (logits, after_state, states) in zip(LENGTHS, torch.load(tmp_path / "results.pt"), strict=True):
        part = ids[:, :length]
        assert_close(f"logits, T = {length}", logits, model(part), FLOAT64)
        want, after = model(part, state, positions=torch.arange(7, 7 + length), return_state=True)
        assert_close(f"logits after a state, T = {length}", after_state, want, FLOAT64)
        for got, layer in zip(states, after, strict=True):
            for one, two in zip(got, layer, strict=True):
                assert_close(f"state, T = {length}", one, two, FLOAT64)


@pytest.mark.parametrize("pattern", ["softmax", "memory"])
def test_a_softmax_layer_is_refused_in_one_line(pattern: str) -> None:
    model = LanguageModel(ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, pattern=pattern))
    kind = {"softmax": "SoftmaxAttention", "memory": "MemoryAttention"}[pattern]
    with torch.no_grad(), raises_value_error("torch.export", "linear layers", f"got {kind}"):
        torch.export.export(model, (torch.zeros(1, 9, dtype=torch.long),), strict=False)
