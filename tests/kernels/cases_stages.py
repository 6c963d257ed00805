"""Stages, slices, ranks, documents and compilation on backend="triton", against the oracles. Interpreted."""

from __future__ import annotations

import pytest
import torch

import hla_dist
from hla_dist.functional import stage_ops
from hla_dist.operators import OPERATORS
from hla_kernels import slices, tiles
from tests.harness import assert_close, run_ranks
from tests.kernels.interpreted import WITH_KERNELS, compare, ridge_of
from tests.problems import Problem, Tensors, check, draw, run
from tests.tolerances import FLOAT32, tolerance


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_summaries(name, mask, short_segments) -> None:
    problem = Problem(name, mask, T=99, H=2, G=1, K=6, V=5, gate_values="mild", scale=0.7, ridge=ridge_of(name))
    tensors = draw(problem)
    options = {"scale": 0.7, "ridge": problem.ridge, "mask": mask}
    inputs = (tensors.q, tensors.k, tensors.v)
    want = hla_dist.summarize(name, *inputs, log_decay=tensors.log_decay, **options)
    floats = [x.float() for x in inputs]
    got = hla_dist.summarize(name, *floats, log_decay=tensors.log_decay.float(), backend="triton", **options)
    assert_close("rho", got.rho, want.rho, FLOAT32)
    for letter, value in want.fields.items():
        assert_close(letter, got.fields[letter], value, FLOAT32)


@pytest.mark.parametrize(
    ("B", "H", "G", "gates"), [(4, 1, 1, "BTH"), (2, 2, 1, "none"), (1, 4, 2, "none"), (1, 4, 2, "H"), (1, 2, 2, "BTH")]
)
def test_backward_in_slices(B, H, G, gates, monkeypatch, short_segments) -> None:
    monkeypatch.setattr(slices, "SLICED", 0)
    compare(Problem("hla2", B=B, T=45, H=H, G=G, K=5, V=4, gates=gates, scale=0.7, ridge=0.2, dtype=torch.float32))


def test_repeats_bitwise(short_segments) -> None:
    problem = Problem("hla2", T=70, H=2, G=1, dtype=torch.float32)
    tensors = draw(problem)
    first, second = (run(problem, tensors, hla_dist.hla2, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_compiled() -> None:
    """Under torch.compile with full graphs, forward and backward."""
    problem = Problem("hla2", T=40, K=16, V=16, dtype=torch.float32, state=False)
    tensors = draw(problem)
    compiled = torch.compile(hla_dist.hla2, fullgraph=True, backend="aot_eager")
    check(problem, tensors, run(problem, tensors, compiled, backend="triton"))


def _on_a_rank(problem: Problem, rank_lengths: list[int]) -> dict[str, torch.Tensor]:
    tensors = draw(problem)
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    start = sum(rank_lengths[:rank])
    end = start + rank_lengths[rank]
    local = Tensors(
        *(x[:, start:end] for x in (tensors.q, tensors.k, tensors.v)),
        None if tensors.log_decay is None else tensors.log_decay[:, start:end],
        tensors.initial_state,
        tensors.weight_out[:, start:end],
        tuple(w if rank == 0 else torch.zeros_like(w) for w in tensors.weight_state),
    )
    return run(problem, local, getattr(hla_dist, problem.name), backend="triton", group=group)


@pytest.mark.parametrize(("name", "mask"), [("hla2", "causal"), ("hla3", "causal")])
def test_over_two_ranks(name, mask) -> None:
    lengths = [40, 33]
    problem = Problem(name, mask, T=sum(lengths), H=2, G=1, K=6, V=5, scale=0.7, dtype=torch.float32)
    parts = run_ranks(_on_a_rank, 2, problem, lengths)
    got = {key: torch.cat([part[key] for part in parts], 1) for key in ("out", "dq", "dk", "dv", "dlog_decay")}
    got |= {key: parts[0][key] for key in parts[0] if key not in got}
    check(problem, draw(problem), got)


@pytest.mark.parametrize(("name", "gates"), [("hla2", "BTH"), ("ahla", "H"), ("hla3", "none")])
def test_packed_documents(name, gates) -> None:
    compare(Problem(name, T=73, H=2, G=1, K=6, V=5, gates=gates, documents=(33, 0, 1, 39), dtype=torch.float32))


@pytest.mark.parametrize("gates", ["none", "BTH"])
@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_finish_corrects_what_summarize_kept(name, mask, gates, short_segments, monkeypatch) -> None:
    """Over several segments, from a carry: equal to a scan from it, or one where the table says so."""
    problem = Problem(
        name, mask, T=75, H=2, G=1, K=6, V=5, gates=gates, scale=0.7, ridge=ridge_of(name), dtype=torch.float32
    )
    t = draw(problem)
    inputs = (t.q, t.k, t.v, t.log_decay, None)
    cascade_name = "hla2_prefix" if mask == "prefix" else name
    options = (cascade_name, 0.7, problem.ridge, False, 1e-6, 0, "triton")
    summary = stage_ops.summarize(*inputs, *options)
    kept = summary[1 + len(OPERATORS[cascade_name].fields) :]
    assert len(kept) == 2 * (len(problem.state_names) - 1)
    carry = list(t.initial_state or ())
    got = stage_ops.finish(*inputs, carry, kept, *options)
    want = stage_ops.scan(*inputs, carry, *options)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        if y.numel():
            assert_close(f"result {i}", x, y, FLOAT32)
    if name == "ahla":
        monkeypatch.setitem(tiles.LATE_CARRY, "interpreter", "again")
        again = stage_ops.finish(*inputs, carry, kept, *options)
        assert all(torch.equal(x, y) for x, y in zip(again, want, strict=True))


@pytest.mark.parametrize(("name", "normalize"), [("hla2", True), ("hla3", False)])
def test_what_the_ops_say_of_their_results(name, normalize) -> None:
    """Shapes, dtypes and layouts without running, as compilers ask for them, and that no input is written."""
    t = draw(Problem(name, T=20, H=2, G=1, K=6, V=5, scale=0.7, normalize=normalize, dtype=torch.float32))
    inputs = (t.q, t.k, t.v, t.log_decay, None)
    options = (name, 0.7, 0.3, normalize, 1e-3, 0, "triton")
    carry = list(t.initial_state or ())
    kept = stage_ops.summarize(*inputs, *options)[1 + len(OPERATORS[name].fields) :]
    out, denominator, *rest = stage_ops.scan(*inputs, carry, *options)
    saved = (*inputs, out if normalize else out.new_empty(0), denominator, rest[len(carry) :], t.weight_out)
    ops = torch.ops.hla_dist
    for op, arguments in (
        (ops.summarize, inputs),
        (ops.scan, (*inputs, carry)),
        (ops.finish, (*inputs, carry, kept)),
        (ops.summarize_backward, saved),
        (ops.scan_backward, (*saved, carry)),
        (ops.finish_backward, (*saved, carry, [])),
    ):
        torch.library.opcheck(op.default, (*arguments, *options), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("gates", ["none", "BTH"])
@pytest.mark.parametrize("short", [False, True])
def test_columns_in_several_tiles(gates, short, monkeypatch, request) -> None:
    """As on a GPU: programs with a part of the state's columns each, scores over slices; the last parts are masked."""
    monkeypatch.setattr(tiles, "first_order", lambda *args: tiles.Tile(16, 16, 4, 1, 16))
    monkeypatch.setattr(tiles, "fused", lambda *args: None)
    if short:
        request.getfixturevalue("short_segments")
    compare(Problem("hla2", T=40, H=2, G=1, K=18, V=35, gates=gates, scale=0.5, ridge=0.2, dtype=torch.float32))


@pytest.mark.parametrize("gates", ["none", "BTH"])
def test_document_boundaries_inside_a_segment(gates, short_segments) -> None:
    """The stages with ``documents``, which public calls turn into rows instead: as the torch backend in float64."""
    problem = Problem("hla2", T=75, H=2, G=1, K=6, V=5, gates=gates)
    t = draw(problem)
    starts = torch.zeros(75, dtype=torch.int64)
    starts[[20, 21, 64]] = 1
    documents = starts.cumsum(0)
    reverse = [t.weight_state[0] + t.weight_state[0].mT, t.weight_state[1]]

    def both(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        def cast(x):
            return None if x is None else x.to(dtype)

        options = ("hla2", 0.7, 0.3, False, 1e-6, 0, backend)
        inputs = (cast(t.q), cast(t.k), cast(t.v), cast(t.log_decay), documents)
        out, denominator, *rest = stage_ops.scan(*inputs, [cast(x) for x in t.initial_state or ()], *options)
        saved = (out.new_empty(0), denominator, rest[2:], cast(t.weight_out))
        return [out, *rest[:2], *stage_ops.scan_backward(*inputs, *saved, [cast(x) for x in reverse], *options)]

    got, want = both(torch.float32, "triton"), both(torch.float64, "torch")
    names = ("out", "S", "F", "dq", "dk", "dv", "dlog_decay", "dS", "dF")
    for name, x, y in zip(names, got, want, strict=True):
        if name == "dS":
            x, y = x + x.mT, y + y.mT
        if y.numel():
            assert_close(name, x, y, tolerance(torch.float32, name))
