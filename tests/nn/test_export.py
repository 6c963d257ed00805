"""torch.export: one program for every length, stored, loaded by another process, with and without a state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hla_dist import MemoryAttention, SoftmaxAttention
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn.softmax_attention import stacked
from tests.harness import assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64

LONGEST, LENGTHS = 1024, (1, 2, 63, 64, 65, 513, 1024)
STARTS = torch.tensor([7, 3])  # tokens that each row has read
LOAD_AND_RUN = """
import sys, torch, hla_dist
whole, goes_on = (torch.export.load(f"{sys.argv[1]}/{name}.pt2").module() for name in ("whole", "goes_on"))
given = torch.load(f"{sys.argv[1]}/given.pt")
state = [getattr(hla_dist.states, name)(*fields) for name, fields in given["state"]]
results = []
for length in given["lengths"]:
    ids, at = given["ids"][:, :length].clone(), torch.arange(length).repeat(2, 1)
    logits, own = whole(ids)
    later, after = goes_on(ids, given["starts"][:, None] + at, state)
    last, _ = goes_on(ids[:, :2].clone(), length + at[:, :1] + torch.arange(ids[:, :2].shape[1]), own)
    results.append((logits, later, last, [list(fields) for fields in after]))
torch.save(results, f"{sys.argv[1]}/results.pt")
"""
MODELS: dict[str, dict[str, Any]] = {
    "linear": dict(pattern="hla2,ahla,hla3,linear_attention", attention={"rope_theta": 1e4}),
    "softmax and memory": dict(pattern="softmax,memory", memory={"window": 5}),
    "windows": dict(
        pattern="softmax,memory",
        softmax={"window": 5},
        memory={"window": 4, "op": "hla2", "memory": "all", "join": "token", "decay": "head"},
    ),
}


class Begins(nn.Module):
    """The model without a state, which it returns."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens, return_state=True)


class GoesOn(Begins):
    """The model as a function of positional arguments, with a state in and out."""

    def forward(self, tokens: Tensor, positions: Tensor, state: list[Any]) -> Any:
        return self.model(tokens, state, positions=positions, return_state=True)


def dims(state: list[Any], unbounded: bool) -> list[Any]:
    """What of states has no fixed size: the keys and values of softmax layers without a window."""
    slots = {1: torch.export.Dim("S", max=2 * LONGEST)}
    grow = {"KVState": ("k", "v")} if unbounded else {}
    return [
        type(layer)(*(slots if name in grow.get(type(layer).__name__, ()) else None for name in layer._fields))
        for layer in state
    ]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_exported_program_serves_every_length_in_another_process(name: str, tmp_path: Path) -> None:
    torch.manual_seed(shifted(0))
    pattern = MODELS[name]["pattern"].split(",")
    sizes = dict(vocab_size=40, hidden_size=16, num_layers=len(pattern), num_heads=4, num_kv_heads=2)
    config = ModelConfig(**sizes, **MODELS[name])
    model, ids = LanguageModel(config).double().eval(), torch.randint(40, (2, LONGEST))
    rows = [model(ids[n : n + 1, :count], return_state=True)[1] for n, count in enumerate(STARTS.tolist())]
    state = [stacked(layer) for layer in zip(*rows, strict=True)]
    length = torch.export.Dim("T", max=LONGEST)
    example, positions = ids[:, :100].clone(), torch.arange(100).repeat(2, 1)
    whole = torch.export.export(Begins(model), (example,), dynamic_shapes={"tokens": {1: length}}, strict=False)
    shapes = {"tokens": {1: length}, "positions": {1: length}, "state": dims(state, "softmax" not in MODELS[name])}
    goes_on = torch.export.export(GoesOn(model), (example, positions, state), dynamic_shapes=shapes, strict=False)
    torch.export.save(whole, tmp_path / "whole.pt2")
    torch.export.save(goes_on, tmp_path / "goes_on.pt2")
    fields = [(type(layer).__name__, list(layer)) for layer in state]
    torch.save({"ids": ids, "state": fields, "starts": STARTS, "lengths": LENGTHS}, tmp_path / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for length, (logits, later, last, fields) in zip(LENGTHS, torch.load(tmp_path / "results.pt"), strict=True):
        part, positions = ids[:, :length], torch.arange(length)
        want, own = model(part, return_state=True)
        assert_close(f"logits, T = {length}", logits, want, FLOAT64)
        want, after = model(part, state, positions=STARTS[:, None] + positions, return_state=True)
        assert_close(f"logits after a state, T = {length}", later, want, FLOAT64)
        more = part[:, :2], length + positions[:2]
        want = model(more[0], own, positions=more[1])
        assert_close(f"logits after the program's state, T = {length}", last, want, FLOAT64)
        got = [type(layer)(*values) for layer, values in zip(after, fields, strict=True)]
        positions = STARTS[:, None] + length + torch.arange(1)
        want = model(part[:, :1], after, positions=positions)
        assert_close(f"the model after it, T = {length}", model(part[:, :1], got, positions=positions), want, FLOAT64)
        for layer, values in zip(after, got, strict=True):
            for one, two in zip(values, layer, strict=True):
                if one.shape == two.shape:  # a program's states have slots that are not filled
                    assert_close(f"state, T = {length}", one, two, FLOAT64)


@torch.no_grad()
@pytest.mark.parametrize("kind", [SoftmaxAttention, MemoryAttention])
def test_what_a_program_cannot_do_is_refused_in_one_line(kind: type[nn.Module]) -> None:
    layer, x = kind(8, 2), torch.zeros(1, 9, 8)
    for name, value in (
        ("cu_seqlens", torch.tensor([0, 9])),
        ("attention_mask", torch.ones(1, 9)),
        ("pending", True),
    ):
        with raises_value_error("torch.export", f"{kind.__name__} without documents", f"got {name}"):
            torch.export.export(layer, (x,), {name: value}, strict=False)
