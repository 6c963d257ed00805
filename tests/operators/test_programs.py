"""Blocks that run as programs give what blocks that run as written do, bit for bit, and let go of what they read."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import hla_dist
from hla_dist.functional import stage_ops
from hla_dist.functional.autograd import Options, zero_fields
from hla_dist.operators import OPERATORS, pool, program, segment
from tests.harness import shifted

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate a head": {"gates": "head"},
    "gate a token": {"gates": "token"},
    "documents": {"gates": "token", "documents": True},
    "normalized": {"gates": "head", "normalize": True},
    "scaled, ridge": {"gates": "token", "scale": 0.5, "ridge": 0.1},
    "grouped heads": {"gates": "token", "kv_heads": 2},
    "bfloat16": {"gates": "head", "dtype": torch.bfloat16},
    "float64": {"gates": "token", "dtype": torch.float64, "kv_heads": 1, "normalize": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, several full blocks and a shorter one, in few tokens."""
    pool.let_go()
    monkeypatch.setattr(segment, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(segment, "TILE_TOKENS", 64)


def stages(name: str, seed: int, case: dict[str, Any], tokens: int = 150) -> list[Tensor]:
    """Results of all six stages."""
    generator = torch.Generator().manual_seed(shifted(seed))
    dtype, kv_heads = case.get("dtype", torch.float32), case.get("kv_heads", 4)

    def random(heads: int, width: int) -> Tensor:
        return torch.randn(2, tokens, heads, width, generator=generator, dtype=torch.float64).mul_(0.3).to(dtype)

    q, k, v, dout = random(4, 6), random(kv_heads, 6), random(kv_heads, 5), random(4, 5)
    shapes = {None: None, "head": (4,), "token": (2, tokens, 4)}
    shape = shapes[case.get("gates")]
    logs = None if shape is None else torch.rand(shape, generator=generator, dtype=torch.float64).mul_(-0.2).to(dtype)
    documents = torch.arange(tokens).floor_divide_(37) if case.get("documents") else None
    options = Options(
        name, case.get("scale", 1.0), case.get("ridge", 0.0), case.get("normalize", False), 1e-6, 16, "torch"
    )
    op, inputs = OPERATORS[name], (q, k, v, logs, documents)

    def states(names: tuple[str, ...]) -> list[Tensor]:
        like = zero_fields(options, q, v, names)
        return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in like]

    carry, reverse = states(op.states), states(op.reverses)
    summary = stage_ops.summarize(*inputs, *options)
    scanned = stage_ops.scan(*inputs, carry, *options)
    finished = stage_ops.finish(*inputs, carry, summary[1 + len(op.fields) :], *options)
    saved = (*scanned[:2], scanned[2 + len(op.states) :], dout)
    reverses = stage_ops.summarize_backward(*inputs, *saved, *options)
    grads = stage_ops.scan_backward(*inputs, *saved, reverse, *options)
    return [*summary, *scanned, *finished, *reverses, *grads]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_bit_for_bit_what_blocks_as_written_give(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool.Scratch, "is_worth_recording", lambda *_: False)
        want = []
        for seed in range(2):
            pool.let_go()
            want.append(stages(name, seed, CASES[case]))
    runs = []
    run = program.Program.run
    monkeypatch.setattr(program.Program, "run", lambda self, *at: (runs.append(at), run(self, *at))[1])
    pool.let_go()
    for seed in range(2):  # the first records its programs, the second runs them on other tensors
        got = stages(name, seed, CASES[case])
        assert all(torch.equal(x, y) for x, y in zip(got, want[seed], strict=True))
    assert len(runs) > 100 or CASES[case].get("documents")


def _buffers(count: int) -> list[pool.Buffer]:
    return [pool.Buffer(10, torch.float32, torch.device("cpu")) for _ in range(count)]


def test_buffers_in_use_at_different_times_share_memory() -> None:
    buffers = _buffers(4)
    a, b, c, d = (x.flat for x in buffers)
    result = torch.empty(10)
    with program.Recorder() as recorder:
        a.fill_(1.0)
        torch.add(a, 1.0, out=b)
        torch.mul(b.view(2, 5), 2.0, out=c.view(2, 5))
        torch.add(b, c, out=d)
        d[3:] += 1.0
        result.copy_(d)
    lasting: dict[int, list[pool.Buffer]] = {}
    block = program.Program(recorder, buffers, lasting, [result])
    assert len(lasting[10]) == 3
    want = result.clone()
    for x in (*buffers, *lasting[10]):
        x.flat.fill_(torch.nan)
    result.zero_()
    block.run()
    assert torch.equal(result, want)
    assert result.tolist() == [6.0] * 3 + [7.0] * 7


def test_a_fresh_tensor_in_a_block_is_a_bug() -> None:
    buffers = _buffers(1)
    with program.Recorder() as recorder:
        torch.add(buffers[0].flat, 1)
    with pytest.raises(AssertionError, match="add returns a fresh tensor"):
        program.Program(recorder, buffers, {}, [])


def test_calls_that_come_in_between_are_not_the_blocks() -> None:
    """A finalizer's, or a signal handler's."""
    buffers, theirs = _buffers(1), torch.zeros(3)
    with program.Recorder() as recorder:
        theirs.add_(1)
        buffers[0].flat.fill_(2.0)
        theirs + 1
    program.Program(recorder, buffers, {}, []).run()
    assert theirs.tolist() == [1.0] * 3


def test_nothing_is_recorded_where_torch_tells_modes_nothing() -> None:
    q, k, v = (torch.randn(1, 150, 2, 8) for _ in range(3))
    gates = -torch.rand(2)
    pool.let_go()
    want = hla_dist.hla2(q, k, v, log_decay=gates)[0]
    for _ in range(2):
        with torch._C.DisableTorchFunction():
            for _ in range(4):
                assert torch.equal(hla_dist.hla2(q, k, v, log_decay=gates)[0], want)
        for _ in range(4):
            assert torch.equal(hla_dist.hla2(q, k, v, log_decay=gates)[0], want)


def test_programs_keep_no_tensor_of_a_call() -> None:
    q, k, v = (torch.randn(1, 300, 2, 8) for _ in range(3))
    for _ in range(4):
        hla_dist.hla2(q, k, v)
    left = [weakref.ref(x) for x in (q, k, v)]
    del q, k, v
    assert [x() for x in left] == [None] * 3


def test_what_is_kept_for_ever_new_lengths_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_PROGRAMS", 12)
    for tokens in range(1, 120):
        x = torch.randn(1, tokens, 2, 8)
        for _ in range(4):
            out = hla_dist.hla2(x, x, x)[0]
        spare = [one for spares in pool._spare.values() for one in spares]
        assert sum(len(one.programs) for one in spare) <= 12
    with monkeypatch.context() as patch:
        patch.setattr(pool.Scratch, "is_worth_recording", lambda *_: False)
        assert torch.equal(out, hla_dist.hla2(x, x, x)[0])


def test_too_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait for the collector of cycles."""
    monkeypatch.setattr(pool, "MOST_BYTES", 0)
    freed = []
    borrow = pool.borrow

    def watched(*how: Any) -> pool.Scratch:
        scratch = borrow(*how)
        weakref.finalize(scratch, freed.append, True)
        return scratch

    monkeypatch.setattr(segment, "borrow", watched)
    x = torch.randn(1, 300, 2, 8)
    gc.collect()
    gc.disable()
    try:
        hla_dist.hla2(x, x, x, log_decay=-torch.rand(2))
        assert freed and not any(pool._spare.values())
    finally:
        gc.enable()
