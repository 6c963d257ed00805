"""Stages, slices, ranks, packed documents and compilation on backend="triton", against the oracles. Interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hla_dist
from hla_dist.functional import stage_ops
from hla_dist.operators import OPERATORS
from hla_kernels import slices, tiles, tune
from hla_kernels.device import INTERPRETER
from tests.harness import assert_close, compile_whole, run_ranks
from tests.kernels.interpreted import all_slow_but, compare, ridge_of, slowly
from tests.parallel.sharded import assemble, run_shard, whole_problem
from tests.problems import KEYED, Problem, check, draw, run
from tests.tolerances import FLOAT32


@pytest.mark.parametrize(("name", "mask"), all_slow_but("hla3"))
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
    ("B", "H", "G", "gates"),
    [
        slowly(4, 1, 1, "BTH"),
        slowly(2, 2, 1, "none"),
        slowly(1, 4, 2, "none"),
        slowly(1, 4, 2, "H"),
        slowly(1, 2, 2, "BTH"),
        (1, 4, 2, "BTH"),
    ],
)
def test_backward_in_slices(B, H, G, gates, monkeypatch, short_segments) -> None:
    monkeypatch.setattr(slices, "SLICED", 0)
    compare(Problem("hla2", B=B, T=45, H=H, G=G, K=5, V=4, gates=gates, scale=0.7, ridge=0.2, dtype=torch.float32))


@pytest.mark.slow
def test_repeats_bitwise(short_segments) -> None:
    problem = Problem("hla2", T=70, H=1, dtype=torch.float32)
    tensors = draw(problem)
    first, second = (run(problem, tensors, hla_dist.hla2, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_compiled() -> None:
    """Under torch.compile with full graphs, forward and backward."""
    problem = Problem("hla2", T=40, K=16, V=16, dtype=torch.float32, state=False)
    tensors = draw(problem)
    compiled = compile_whole(hla_dist.hla2)
    check(problem, tensors, run(problem, tensors, compiled, backend="triton"))


Calls = list[tuple[Problem, list[int]]]  # problems with the lengths of their shards


def _on_a_rank(calls: Calls) -> list[dict[str, torch.Tensor]]:
    group = torch.distributed.group.WORLD
    return [run_shard(group, p, lengths, backend="triton")[0]["values"] for p, lengths in calls]


@pytest.mark.parametrize("kinds", [slowly("all"), "documents and the key term, gates per channel"])
def test_over_ranks(kinds) -> None:
    """An empty shard; documents that end, begin and fill a shard: carries come late, of whole shards and of pieces."""
    shapes = {"T": 73, "K": 6, "V": 5, "scale": 0.7, "dtype": torch.float32}
    documents = (20, 45, 0, 8)
    calls = [
        (Problem("hla2", **shapes), [40, 0, 33]),
        (Problem("hla3", H=1, gates="H", **shapes), [30, 25, 18]),
        (Problem("hla2", H=1, documents=documents, ridge=0.3, key_term="H", **shapes), [30, 25, 18]),
        (Problem("linear_attention", H=2, G=1, gates="BTHK", **shapes), [30, 0, 43]),
        (Problem("ahla", H=1, documents=documents, gates="none", normalize=True, **shapes), [30, 25, 18]),
    ]
    calls = calls if kinds == "all" else calls[2:4]
    parts = run_ranks(_on_a_rank, 3, calls)
    for i, (p, lengths) in enumerate(calls):
        check(p, whole_problem(p, 3), assemble(p, lengths, [part[i] for part in parts]))


@pytest.mark.parametrize(("name", "gates"), [slowly("hla2", "BTH"), slowly("hla3", "none")])
def test_packed_documents(name, gates) -> None:
    compare(Problem(name, T=73, H=2, G=1, K=6, V=5, gates=gates, documents=(33, 0, 1, 39), dtype=torch.float32))


@pytest.mark.parametrize("gates", [slowly("none"), "BTH"])
@pytest.mark.parametrize(("name", "mask"), all_slow_but("ahla"))
def test_scan_corrects_what_summarize_kept(name, mask, gates, short_segments, monkeypatch) -> None:
    """Over several segments, from a carry: equal to a scan from it, or one where the table says so."""
    problem = Problem(
        name, mask, T=40, H=2, G=1, K=6, V=5, gates=gates, scale=0.7, ridge=ridge_of(name), dtype=torch.float32,
        key_term="H" if (name, mask) in KEYED else "none",
    )  # fmt: skip
    t = draw(problem)
    inputs = (t.q, t.k, t.v, t.log_decay, t.gain, t.skip)
    cascade_name = "hla2_prefix" if mask == "prefix" else name
    options = (cascade_name, 0.7, problem.ridge, False, 1e-6, 0, "triton")
    summary = stage_ops.summarize(*inputs, *options)
    kept = summary[1 + len(OPERATORS[cascade_name].fields) :]
    assert len(kept) == 2 * (len(problem.state_names) - 1)
    carry = list(t.initial_state or ())
    got = stage_ops.scan(*inputs, carry, kept, *options)
    want = stage_ops.scan(*inputs, carry, [], *options)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        if y.numel():
            assert_close(f"result {i}", x, y, FLOAT32)
    if name == "ahla":
        monkeypatch.setitem(tiles.LATE_CARRY, "interpreter", "again")
        again = stage_ops.scan(*inputs, carry, kept, *options)
        assert all(torch.equal(x, y) for x, y in zip(again, want, strict=True))


@pytest.mark.parametrize(("name", "mask"), all_slow_but("hla3"))
def test_normalized_stages(name, mask, short_segments) -> None:
    """Each stage, with a denominator's column at the end of states, moments and reverse states, as torch has it."""
    problem = Problem(name, mask, T=40, H=2, G=1, K=6, V=5, scale=0.7, normalize=True, dtype=torch.float32)
    t = draw(problem)
    inputs = (t.q, t.k, t.v, t.log_decay, t.gain, t.skip)
    cascade_name = "hla2_prefix" if mask == "prefix" else name
    number, carry = 1 + len(OPERATORS[cascade_name].fields), list(t.initial_state or ())
    results = []
    for backend in ("triton", "torch"):
        options = (cascade_name, 0.7, 0.0, True, 1e-3, 0, backend)
        summary = stage_ops.summarize(*inputs, *options)
        out, denominator, *rest = stage_ops.scan(*inputs, carry, summary[number:], *options)
        saved = (out, denominator, rest[len(carry) :], t.weight_out)
        reverse = stage_ops.summarize_backward(*inputs, *saved, *options)
        gradients = stage_ops.scan_backward(*inputs, *saved, reverse, *options)
        results.append([*summary[:number], out, denominator, *rest[: len(carry)], *reverse, *gradients])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        if y.numel():
            assert_close(f"result {i}", x, y, FLOAT32)


@pytest.mark.parametrize(
    ("name", "gates", "key_term"),
    [slowly("hla2", "none", "numbers"), ("hla2", "BTH", "H"), slowly("hla3", "BTH", "numbers")],
)
def test_the_key_term(name, gates, key_term, short_segments) -> None:
    """Several segments, a single token, no token; grouped heads, widths that are no power of two."""
    shapes = {"H": 2, "G": 1, "K": 6, "V": 5, "gates": gates, "scale": 0.7, "ridge": 0.3, "key_term": key_term}
    for T in (45, 1, 0):
        compare(Problem(name, T=T, normalize=T == 1, dtype=torch.float32, **shapes))


@pytest.mark.parametrize("cut", [slowly(slices.Slicing(2)), slowly(slices.Slicing(2, axis=2, state_axis=1))])
def test_the_key_term_in_slices(cut, monkeypatch) -> None:
    """Of the batch and of the heads; one of its numbers alone."""
    monkeypatch.setattr(slices, "slicing", lambda problem, gate: cut)
    problem = Problem("hla2", B=2, T=9, H=2, G=2, K=5, V=4, scale=0.7, key_term="H", dtype=torch.float32)
    tensors = draw(problem)
    for given in (tensors, replace(tensors, **{"gain" if cut.axis else "skip": None})):
        check(problem, given, run(problem, given, hla_dist.hla2, backend="triton"))


@pytest.mark.parametrize(("name", "normalize"), [("hla2", True), slowly("ahla", True), slowly("hla3", False)])
def test_what_the_ops_say_of_their_results(name, normalize) -> None:
    """Shapes, dtypes and layouts without running, as compilers ask for them, and that no input is written."""
    t = draw(Problem(name, T=20, H=2, G=1, K=6, V=5, scale=0.7, normalize=normalize, dtype=torch.float32))
    inputs = (t.q, t.k, t.v, t.log_decay, t.gain, t.skip)
    options = (name, 0.7, 0.3, normalize, 1e-3, 0, "triton")
    carry = list(t.initial_state or ())
    kept = stage_ops.summarize(*inputs, *options)[1 + len(OPERATORS[name].fields) :]
    out, denominator, *rest = stage_ops.scan(*inputs, carry, [], *options)
    saved = (*inputs, out if normalize else out.new_empty(0), denominator, rest[len(carry) :], t.weight_out)
    ops = torch.ops.hla_dist
    for op, arguments in (
        (ops.summarize, inputs),
        (ops.scan, (*inputs, carry, [])),
        (ops.scan, (*inputs, carry, kept)),
        (ops.summarize_backward, saved),
        (ops.scan_backward, (*saved, carry)),
    ):
        torch.library.opcheck(op.default, (*arguments, *options), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("gates", "short"),
    [slowly(gates, short) for gates in ("BTH", "none") for short in (True, False)],
)
def test_columns_in_several_tiles(gates, short, monkeypatch, request) -> None:
    """As on a GPU: programs with a part of the state's columns each, scores over slices; the last parts are masked."""
    monkeypatch.setattr(tiles, "first_order", lambda *args: tiles.Tile(16, 16, 4, 1, 16))
    monkeypatch.setattr(tiles, "fused", lambda *args: None)
    if short:
        request.getfixturevalue("short_segments")
    compare(Problem("hla2", T=40, H=2, G=1, K=18, V=35, gates=gates, scale=0.5, ridge=0.2, dtype=torch.float32))


def test_what_tuning_times(monkeypatch, capsys) -> None:
    """The calls of ``hla_kernels.tune``, smaller: a tile, a whole cascade, both answers to a late carry."""

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {"BATCH": 1, "TOKENS": 20, "HEADS": 1, "ROUNDS": 1, "FUSED_DTYPE": torch.float32}.items():
        monkeypatch.setattr(tune, name, value)
    target = INTERPRETER._replace(processors=1)
    assert tune._fused_results("hla2", 16, True, target)[1][0].isfinite().all()
    ms, found = tune._results(torch.float32, 16, True, target)
    assert ms == 1.5 and len(found) == 4 and all(x.isfinite().all() for x in found)
    assert tune._schedules(target).strip() in ('"interpreter": "correct",', '"interpreter": "again",')
    printed = capsys.readouterr().out
    assert "differ" not in printed and printed.count("ms  correct") == printed.count("ms  again") == 2
