"""Every operator on backend="triton" against the oracle in float64: outputs, states, every gradient. Run interpreted.

Buffers that kernels are to fill are filled with NaN beforehand: what a kernel leaves unwritten is seen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hla_dist
from hla_dist.functional import stage_ops
from hla_dist.operators import OPERATORS
from hla_dist.reference import quadratic
from hla_kernels import cascade, device, slices, tiles
from hla_kernels.device import INTERPRETED
from tests.harness import assert_close, relative_error, run_ranks
from tests.problems import RIDGED, STREAMING, Problem, Tensors, check, draw, oracle, run
from tests.tolerances import FLOAT32, LOW_PRECISION_FACTOR, tolerance

WITH_KERNELS = [kind for kind in STREAMING if kind[1] != "paper"]

assert INTERPRETED, "run by test_interpreter.py, with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty full of NaN."""
    empty = torch.empty

    def fill(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one or two chunks: a short sequence is scanned over several."""
    monkeypatch.setattr(cascade, "SHORTEST", 32)
    monkeypatch.setattr(cascade, "RESTART", 64)


def _compare(problem: Problem) -> None:
    tensors = draw(problem)
    check(problem, tensors, run(problem, tensors, getattr(hla_dist, problem.name), backend="triton"))


def _ridge(name: str) -> float:
    return 0.3 if name in RIDGED else 0.0


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_several_segments_with_gates_ridge_scale_and_grouped_heads(name, mask, short_segments) -> None:
    _compare(
        Problem(
            name,
            mask,
            T=97,
            H=2,
            G=1,
            K=20,
            V=12,
            gate_values="per_head",
            scale=0.7,
            ridge=_ridge(name),
            dtype=torch.float32,
        )
    )


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_several_segments_without_gates(name, mask, short_segments) -> None:
    _compare(Problem(name, mask, T=97, H=1, K=5, V=33, gates="none", ridge=_ridge(name), dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_one_segment_normalised_with_fixed_gates(name, mask) -> None:
    _compare(Problem(name, mask, B=2, T=65, H=1, K=16, V=16, gates="H", normalize=True, dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_a_single_token(name, mask) -> None:
    """The decoding step, and its gradients."""
    shapes = {"T": 1, "H": 2, "G": 1, "K": 20, "V": 12, "scale": 0.7, "ridge": _ridge(name), "dtype": torch.float32}
    _compare(Problem(name, mask, B=2, gates="BTH", **shapes))
    _compare(Problem(name, mask, gates="none", normalize=True, **shapes))


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
@pytest.mark.parametrize(("columns", "launches"), [(16, 1), (65, None)])
def test_a_cascade_that_fits_is_one_launch(name, mask, columns, launches, monkeypatch) -> None:
    """And one that does not runs pass by pass."""
    found = []

    def launcher(kernel, grid, arguments, options):
        found.append(kernel.fn.__name__)
        kernel[(grid,)](**arguments)

    monkeypatch.setattr(device, "_launcher", launcher)
    q, k, v = torch.randn(3, 1, 40, 1, columns).unbind()
    hla_dist_out, _ = getattr(hla_dist, name)(q, k, v, mask=mask, backend="triton")
    want, _ = hla_dist.reference.quadratic(name, q.double(), k.double(), v.double(), mask=mask)
    assert_close("out", hla_dist_out, want, FLOAT32)
    passes = 1 if name == "linear_attention" else 3 if name == "hla3" else 2
    kernel = "first_order_kernel" if launches is None or name == "linear_attention" else "fused_forward_kernel"
    assert found == [kernel] * (launches or passes)


@pytest.mark.parametrize("T", [0, 31, 32, 33])
def test_lengths_about_a_chunk(T, short_segments) -> None:
    _compare(Problem("hla2", T=T, K=17, V=16, scale=0.5, ridge=0.2, strided=True, dtype=torch.float32))


@pytest.mark.parametrize("gate_values", ["hard_cut", "near_zero", "near_one", "zero"])
def test_gates_of_every_strength(gate_values, short_segments) -> None:
    _compare(Problem("hla2", T=70, H=1, gate_values=gate_values, scale=0.5, dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_float16_at_most_twice_the_error_of_plain_torch(name, mask) -> None:
    problem = Problem(
        name, mask, T=70, H=2, G=1, K=16, V=16, scale=0.05, gates="BTH", state=False, dtype=torch.float16, seed=1
    )
    for case in (problem, replace(problem, normalize=True, gates="none")):
        tensors = draw(case)
        want = oracle(case, tensors)
        plain = oracle(case, tensors, quadratic, dtype=torch.float16)
        got = run(case, tensors, getattr(hla_dist, name), backend="triton")
        for key in want:
            allowed = LOW_PRECISION_FACTOR * relative_error(plain[key], want[key])
            assert_close(f"{key} of {case}", got[key], want[key], allowed)


def test_float16_inner_sequences_do_not_overflow() -> None:
    """u = q T 16 is 1e5 at the end; the output, v of which is small, is not."""
    ones = torch.ones(1, 100, 1, 16, dtype=torch.float16)
    out, _ = hla_dist.hla2(ones, 16 * ones, ones * 2**-20, backend="triton")
    want = hla_dist.reference.serial("hla2", ones.double(), 16 * ones.double(), ones.double() * 2**-20)[0]
    assert want.abs().max() < 65504 < 16**2 * 16 * 100
    assert_close("out", out, want, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_summaries(name, mask, short_segments) -> None:
    problem = Problem(name, mask, T=99, H=2, G=1, K=6, V=5, gate_values="mild", scale=0.7, ridge=_ridge(name))
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
    _compare(Problem("hla2", B=B, T=45, H=H, G=G, K=5, V=4, gates=gates, scale=0.7, ridge=0.2, dtype=torch.float32))


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
    _compare(Problem(name, T=73, H=2, G=1, K=6, V=5, gates=gates, documents=(33, 0, 1, 39), dtype=torch.float32))


@pytest.mark.parametrize("gates", ["none", "BTH"])
@pytest.mark.parametrize(("name", "mask"), WITH_KERNELS)
def test_finish_corrects_what_summarize_kept(name, mask, gates, short_segments) -> None:
    """Over several segments, from a carry: equal to a scan from it; and what the ops say of their results is true."""
    problem = Problem(
        name, mask, T=75, H=2, G=1, K=6, V=5, gates=gates, scale=0.7, ridge=_ridge(name), dtype=torch.float32
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
    torch.library.opcheck(torch.ops.hla_dist.summarize.default, (*inputs, *options), test_utils="test_faketensor")
    torch.library.opcheck(
        torch.ops.hla_dist.finish.default, (*inputs, carry, kept, *options), test_utils="test_faketensor"
    )


@pytest.mark.parametrize("gates", ["none", "BTH"])
@pytest.mark.parametrize("short", [False, True])
def test_columns_in_several_tiles(gates, short, monkeypatch, request) -> None:
    """As on a GPU: programs with a part of the state's columns each; the last part is masked."""
    monkeypatch.setattr(tiles, "first_order", lambda *args: tiles.Tile(16, 16, 4, 1))
    monkeypatch.setattr(tiles, "fused", lambda *args: None)
    if short:
        request.getfixturevalue("short_segments")
    _compare(Problem("hla2", T=40, H=2, G=1, K=18, V=35, gates=gates, scale=0.5, ridge=0.2, dtype=torch.float32))


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
